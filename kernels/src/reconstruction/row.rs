//! What both variants do with a row.
use crate::math::norm::{EPSILON, inverse_norm, projection};

use cubecl::prelude::*;

/// Vectors from one row of an operand to the next; or where a row begins.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(super) struct PerOperand {
    pub whole: usize,
    pub first: usize,
    pub second: usize,
}

#[cube]
impl PerOperand {
    /// Where a row begins.
    pub(super) fn at(&self, row: usize) -> PerOperand {
        PerOperand {
            whole: row * self.whole,
            first: row * self.first,
            second: row * self.second,
        }
    }
}

/// A vector of the whole and of the sum of its parts.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Pair<N: Size> {
    pub whole: Vector<f32, N>,
    pub part: Vector<f32, N>,
}

#[cube]
pub(super) fn load<F: Float, N: Size>(
    whole: &[Vector<F, N>],
    first: &[Vector<F, N>],
    second: &[Vector<F, N>],
    row: &PerOperand,
    d: usize,
) -> Pair<N> {
    Pair::<N> {
        whole: Vector::<f32, N>::cast_from(whole[row.whole + d]),
        part: Vector::<f32, N>::cast_from(first[row.first + d])
            + Vector::<f32, N>::cast_from(second[row.second + d]),
    }
}

/// `whole·part`, `‖whole‖` and `‖part‖` of a row.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Products {
    pub dot: f32,
    pub whole: f32,
    pub part: f32,
}

#[cube]
impl Products {
    pub(super) fn cosine(&self) -> f32 {
        // Divided one after the other: the product of two small norms would underflow.
        self.dot / max(self.whole, EPSILON) / max(self.part, EPSILON)
    }

    /// The gradient of the whole, where `share` arrives at the row's cosine.
    pub(super) fn of_whole(&self, share: f32) -> Gradient {
        gradient(self.whole, self.part, self.dot, share)
    }

    /// The gradient of the parts' sum.
    pub(super) fn of_part(&self, share: f32) -> Gradient {
        gradient(self.part, self.whole, self.dot, share)
    }
}

/// `(along · own + away · other) · inverse`
#[derive(CubeType, Clone, Copy)]
pub(super) struct Gradient {
    along: f32,
    away: f32,
    inverse: f32,
}

#[cube]
fn gradient(own: f32, other: f32, dot: f32, share: f32) -> Gradient {
    let inverse = inverse_norm(own);
    let inverse_other = inverse_norm(other);
    let along = projection(dot * inverse * inverse_other, own);
    Gradient {
        along: -share * along * inverse,
        away: share * inverse_other,
        inverse,
    }
}

#[cube]
impl Gradient {
    pub(super) fn apply<N: Size>(
        &self,
        own: Vector<f32, N>,
        other: Vector<f32, N>,
    ) -> Vector<f32, N> {
        let away = Vector::<f32, N>::new(self.away) * other;
        fma(Vector::<f32, N>::new(self.along), own, away) * Vector::<f32, N>::new(self.inverse)
    }
}
