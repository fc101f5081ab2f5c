//! `x̂ = x / max(‖x‖₂, EPSILON)`, and the way back: `dx = (dx̂ − x̂ (x̂·dx̂)) / ‖x‖₂`, or `dx̂ / EPSILON` where the norm was clamped.

use cubecl::prelude::*;

/// The norm below which a row is divided by the constant instead, as in torch's `normalize`.
pub(crate) const EPSILON: f32 = 1e-12;

/// Sums of squares that are gathered side by side, so that reading waits for memory only.
pub(crate) const SIDE_BY_SIDE: usize = 4;

/// No squares yet.
#[cube]
pub(crate) fn no_squares<N: Size>() -> Array<Vector<f32, N>> {
    let mut squares = Array::<Vector<f32, N>>::new(SIDE_BY_SIDE);
    #[unroll]
    for i in 0..SIDE_BY_SIDE {
        squares[i] = Vector::<f32, N>::new(0.0);
    }
    squares
}

/// Adds the squares of the `columns` vectors from `from` on.
#[cube]
pub(crate) fn add_squares<F: Float, N: Size>(
    squares: &mut Array<Vector<f32, N>>,
    values: &[Vector<F, N>],
    from: usize,
    columns: usize,
) {
    for turn in 0..columns / SIDE_BY_SIDE {
        let first = from + turn * SIDE_BY_SIDE;
        #[unroll]
        for i in 0..SIDE_BY_SIDE {
            let value = Vector::<f32, N>::cast_from(values[first + i]);
            squares[i] = fma(value, value, squares[i]);
        }
    }
    for d in columns / SIDE_BY_SIDE * SIDE_BY_SIDE..columns {
        let value = Vector::<f32, N>::cast_from(values[from + d]);
        squares[0] = fma(value, value, squares[0]);
    }
}

/// The norm whose squares these are.
#[cube]
pub(crate) fn norm_of<N: Size>(squares: &Array<Vector<f32, N>>) -> f32 {
    let mut all = squares[0];
    #[unroll]
    for i in 1..SIDE_BY_SIDE {
        all += squares[i];
    }
    all.vector_sum().sqrt()
}

/// The norm of the `columns` vectors from `from` on.
#[cube]
pub(crate) fn row_norm<F: Float, N: Size>(
    values: &[Vector<F, N>],
    from: usize,
    columns: usize,
) -> f32 {
    let mut squares = no_squares::<N>();
    add_squares::<F, N>(&mut squares, values, from, columns);
    norm_of::<N>(&squares)
}

/// What a row of this norm is multiplied with.
#[cube]
pub(crate) fn inverse_norm(norm: f32) -> f32 {
    // A norm that is NaN stays: `max` would take the other.
    1.0 / select(norm < EPSILON, EPSILON, norm)
}

/// `along`, the product of a row with its gradient, or nothing where the norm was clamped and the length of the row is free.
#[cube]
pub(crate) fn projection(along: f32, norm: f32) -> f32 {
    let mut projection = along;
    if norm < EPSILON {
        projection = 0.0;
    }
    projection
}
