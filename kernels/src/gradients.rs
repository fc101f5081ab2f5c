//! Which gradients of a cosine head's operands are computed, and what comes of it.

use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::std::tensor::TensorHandle;

use crate::blueprint::{Blueprint, Strategy};
use crate::error::Error;
use crate::math::narrow::narrow;
use crate::memory::empty;
use crate::operand::{F32, addressable, contiguous, count, float_dtype, offset, whole, widest};

/// Which gradients to compute. The product for one that is left out is skipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The gradient of the embeddings.
    pub embeddings: bool,
    /// The gradient of the class weights.
    pub weights: bool,
}

impl Wanted {
    /// Both: nothing is frozen.
    pub const BOTH: Self = Self {
        embeddings: true,
        weights: true,
    };
    /// The embeddings' alone: the heads are frozen.
    pub const EMBEDDINGS: Self = Self {
        embeddings: true,
        weights: false,
    };
    /// The class weights' alone: what made the embeddings is frozen.
    pub const WEIGHTS: Self = Self {
        embeddings: false,
        weights: true,
    };

    pub(crate) fn any(self) -> bool {
        self.embeddings || self.weights
    }
}

/// The gradients of a cosine head's operands that were asked for, contiguous and of the operands' dtype.
#[derive(Clone, Debug, Default)]
pub struct Gradients {
    /// `[heads, rows, dim]`; rows that are ignored have zeros, if their embeddings are finite.
    pub embeddings: Option<TensorHandle>,
    /// `[heads, classes, dim]`; the rows `K..classes` have zeros.
    pub weights: Option<TensorHandle>,
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
        Ok(Self {
            embeddings: scaled("gradient of the embeddings", &self.embeddings)?,
            weights: scaled("gradient of the class weights", &self.weights)?,
        })
    }
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
    let (out, out_arg) = if in_place {
        (gradient.clone(), BufferArg::alias(0, heads * of_head))
    } else {
        let out = empty(client, [heads, rows, dim], gradient.dtype);
        let arg = whole(&out, vector);
        (out, arg)
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
            out_arg,
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
