//! Which gradients of a cosine head are computed, and what comes of it.

use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::std::tensor::TensorHandle;

use crate::blueprint::{Blueprint, Strategy};
use crate::error::Error;
use crate::math::narrow::narrow;
use crate::memory::empty;
use crate::operand::{F32, addressable, contiguous, count, float_dtype, offset, whole, widest};

/// Which gradients to compute. The product for one that is left out is skipped; that of the scale takes the embeddings'.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The gradient of the embeddings.
    pub embeddings: bool,
    /// The gradient of the class weights.
    pub weights: bool,
    /// The gradient of the scale.
    pub scale: bool,
}

impl Wanted {
    /// Both operands', of a scale that is given.
    pub const BOTH: Self = Self {
        embeddings: true,
        weights: true,
        scale: false,
    };
    /// Both operands' and the scale's: nothing is frozen.
    pub const ALL: Self = Self {
        scale: true,
        ..Self::BOTH
    };
    /// The embeddings' alone: the heads are frozen.
    pub const EMBEDDINGS: Self = Self {
        weights: false,
        ..Self::BOTH
    };
    /// The class weights' alone: what made the embeddings is frozen.
    pub const WEIGHTS: Self = Self {
        embeddings: false,
        ..Self::BOTH
    };

    /// The scale's alone.
    pub const SCALE: Self = Self {
        embeddings: false,
        weights: false,
        scale: true,
    };

    pub(crate) fn any(self) -> bool {
        self.embeddings || self.weights || self.scale
    }

    /// With those that others come from.
    pub(crate) fn computed(self) -> Self {
        Self {
            embeddings: self.embeddings || self.scale,
            ..self
        }
    }
}

/// The gradients that were asked for, contiguous.
#[derive(Clone, Debug, Default)]
pub struct Gradients {
    /// `[heads, rows, dim]`, of the operands' dtype; rows that are ignored have zeros, if their embeddings are finite.
    pub embeddings: Option<TensorHandle>,
    /// `[heads, classes, dim]`, of the operands' dtype; the rows `K..classes` have zeros.
    pub weights: Option<TensorHandle>,
    /// `[heads]`, f32: of each head's scale, as if it had its own. The gradient of the one that all share is their sum.
    pub scale: Option<TensorHandle>,
}

impl Gradients {
    /// New gradients, head `h` times `by_head[h]` (f32, `[heads]`): for an upstream gradient that is only known after
    /// [`forward_backward`](crate::cosine_cross_entropy::forward_backward).
    ///
    /// # Errors
    /// A typed [`Error`] if the factors do not fit, or a gradient is not contiguous or passes 32-bit addresses.
    pub fn scaled(&self, client: &Client, by_head: &TensorHandle) -> Result<Self, Error> {
        let scaled = |operand, gradient: &Option<TensorHandle>| match gradient {
            Some(gradient) => scaled(client, operand, gradient, by_head, false).map(Some),
            None => Ok(None),
        };
        let of_numbers = |gradient| scaled_numbers(client, gradient, by_head);
        Ok(Self {
            embeddings: scaled("gradient of the embeddings", &self.embeddings)?,
            weights: scaled("gradient of the class weights", &self.weights)?,
            scale: self.scale.as_ref().map(of_numbers).transpose()?,
        })
    }

    /// Without what was computed only because others come from it.
    pub(crate) fn only(self, wanted: Wanted) -> Self {
        Self {
            embeddings: self.embeddings.filter(|_| wanted.embeddings),
            ..self
        }
    }
}

/// [`Gradients::scaled`] of a number a head.
fn scaled_numbers(
    client: &Client,
    gradient: &TensorHandle, // [heads]
    by_head: &TensorHandle,
) -> Result<TensorHandle, Error> {
    let operand = "gradient of the scale";
    let heads = gradient.shape().iter().product();
    contiguous(client, operand, gradient, &[heads], F32)?;
    let rows = TensorHandle::new_contiguous([heads, 1, 1], gradient.handle.clone(), F32);
    let scaled = scaled(client, operand, &rows, by_head, false)?;
    Ok(TensorHandle::new_contiguous([heads], scaled.handle, F32))
}

/// [`Gradients::scaled`] of one of them, which may be where it was.
pub(crate) fn scaled(
    client: &Client,
    operand: &'static str,
    gradient: &TensorHandle,
    by_head: &TensorHandle,
    in_place: bool,
) -> Result<TensorHandle, Error> {
    let shape = gradient.shape().to_vec();
    let [heads, rows, dim] = shape[..] else {
        return Err(Error::Shape {
            operand,
            got: shape,
            expected: "3 axes".into(),
        });
    };
    if shape.contains(&0) {
        return Err(Error::Empty {
            operand,
            got: shape,
        });
    }
    float_dtype(client, operand, gradient.dtype)?;
    contiguous(client, operand, gradient, &shape, gradient.dtype)?;
    contiguous(client, "factors", by_head, &[heads], F32)?;
    addressable(operand, count(&shape))?;
    let blueprint = Blueprint::new(client, Strategy::Inferred)?.for_elements(heads * rows * dim);
    let vector = widest(blueprint.vector(gradient.dtype), [dim, offset(gradient)]);
    let of_head = rows * dim / vector;
    let out = match in_place {
        true => gradient.clone(),
        false => empty(client, [heads, rows, dim], gradient.dtype),
    };
    let (cubes, cube) = blueprint.elementwise(client, heads * of_head);
    // SAFETY: `contiguous` proved the gradient and the factors, and `out` is as large, or the gradient, each of whose elements is read
    // by the unit that writes it.
    unsafe {
        scale::launch_unchecked(
            client,
            cubes,
            cube,
            vector,
            whole(gradient, vector),
            whole(by_head, 1),
            match in_place {
                true => BufferArg::alias(0, heads * of_head),
                false => whole(&out, vector),
            },
            of_head,
            gradient.dtype,
        );
    }
    Ok(out)
}

#[cube(launch_unchecked)]
fn scale<F: Float, N: Size>(
    gradient: &[Vector<F, N>], // [heads, of_head]
    by_head: &[f32],           // [heads]
    out: &mut [Vector<F, N>],  // [heads, of_head]
    of_head: usize,
    #[define(F)] _dtype: ElemType,
) {
    let mut i = ABSOLUTE_POS;
    while i < out.len() {
        let factor = Vector::<f32, N>::new(by_head[i / of_head]);
        out[i] = narrow::<F, N>(Vector::<f32, N>::cast_from(gradient[i]) * factor);
        i += CUBE_COUNT * CUBE_DIM as usize;
    }
}
