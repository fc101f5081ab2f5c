//! The sizes of a cosine head, proved from its operands.

use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::std::tensor::TensorHandle;

use crate::blueprint::Blueprint;
use crate::error::Error;
use crate::gradients::{Gradients, Wanted};
use crate::memory::{empty, empty_beside};
use crate::operand::{F32, Strided, addressable, addressed, allocatable, count};
use crate::scale;

/// Embeddings and class weights that belong together.
pub(crate) struct CosineProblem {
    pub embeddings: Strided,
    pub weights: Strided,
    pub classes: usize,
    pub sizes: Sizes,
}

/// Its sizes, and what whole tiles make of them.
#[derive(CubeType, CubeLaunch, Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub heads: usize,
    pub rows: usize,
    pub rows_padded: usize,
    pub active: usize,
    pub active_padded: usize,
    pub dim: usize,
    pub dim_padded: usize,
}

impl Sizes {
    pub(crate) fn new(
        [heads, rows, dim]: [usize; 3],
        active: usize,
        blueprint: &Blueprint,
    ) -> Self {
        let padded = |size: usize| size.next_multiple_of(blueprint.tile());
        Self {
            heads,
            rows,
            rows_padded: padded(rows),
            active,
            active_padded: padded(active),
            dim,
            dim_padded: padded(dim),
        }
    }

    /// Refuses operands that are too large once they are packed.
    pub(crate) fn check_packed(&self, client: &Client, blueprint: &Blueprint) -> Result<(), Error> {
        // On a GPU a bounded part of the class weights is packed at a time.
        let chunked = blueprint.product.is_some();
        let rows = match chunked {
            true => self.rows_padded,
            false => self.rows_padded + self.active_padded,
        };
        let packed = count(&[self.heads, rows, self.dim_padded]);
        addressable("the packed operands", packed)?;
        if chunked {
            // The sums of their gradient are as many, in f32. What has a class axis comes in chunks.
            allocatable(client, "the packed embeddings", packed, F32)?;
        }
        Ok(())
    }
}

impl CosineProblem {
    /// Of the logits: `2·H·N·D·K`.
    pub(crate) fn operations(&self) -> usize {
        let sizes = &self.sizes;
        [sizes.heads, sizes.rows, sizes.dim, sizes.active]
            .iter()
            .fold(2, |all: usize, &size| all.saturating_mul(size))
    }

    pub(crate) fn new(
        client: &Client,
        blueprint: &Blueprint,
        embeddings: &TensorHandle,
        weights: &TensorHandle,
        scale: f32,
        active: Option<usize>,
    ) -> Result<Self, Error> {
        // On a GPU a bounded part of either is copied at a time, with indices as wide as it takes.
        let chunked = blueprint.product.is_some();
        let float = if chunked {
            Strided::of_any_size
        } else {
            Strided::float
        };
        let embeddings = float(client, "embeddings", embeddings, 3)?;
        let weights = float(client, "class weights", weights, 3)?;
        let [_, classes, _] = weights.dims3();
        let active = active_classes(embeddings.dims3(), weights.dims3(), scale, active)?;
        same_dtype(weights.dtype(), embeddings.dtype())?;
        // Every variant packs all embeddings, and numbers classes in 32 bits.
        addressable("embeddings", count(embeddings.shape()))?;
        addressable("active classes", active as u128)?;
        // Their gradient is stored whole, whatever the strides of the class weights are.
        addressed(client, "class weights", count(weights.shape()))?;
        let sizes = Sizes::new(embeddings.dims3(), active, blueprint);
        sizes.check_packed(client, blueprint)?;
        Ok(Self {
            embeddings,
            weights,
            classes,
            sizes,
        })
    }

    /// The widest vector, up to the blueprint's, that every row of both starts and ends on.
    pub(crate) fn vector_size(&self, blueprint: &Blueprint) -> usize {
        self.embeddings
            .vector_size(blueprint)
            .min(self.weights.vector_size(blueprint))
    }

    /// Refuses gradients that no buffer holds, since they are stored whole, whatever the strides of the operands are; and that of a scale
    /// from which it cannot be found.
    pub(crate) fn check_gradients(
        &self,
        client: &Client,
        scale: f32,
        wanted: Wanted,
    ) -> Result<(), Error> {
        let dtype = self.embeddings.dtype();
        scale::validate(scale, wanted)?;
        let wanted = wanted.computed();
        if wanted.embeddings {
            let elements = count(self.embeddings.shape());
            allocatable(client, "the gradient of the embeddings", elements, dtype)?;
        }
        if wanted.weights {
            let elements = count(self.weights.shape());
            allocatable(client, "the gradient of the class weights", elements, dtype)?;
        }
        Ok(())
    }

    /// Room for the gradients that are asked for, and for what they come from.
    pub(crate) fn gradients(&self, client: &Client, wanted: Wanted) -> Gradients {
        let dtype = self.embeddings.dtype();
        let room = |shape| empty_beside(client, shape, dtype, self.largest_operand());
        let wanted = wanted.computed();
        Gradients {
            embeddings: wanted.embeddings.then(|| room(self.embeddings.shape())),
            weights: wanted.weights.then(|| room(self.weights.shape())),
            scale: wanted.scale.then(|| empty(client, [self.sizes.heads], F32)),
        }
    }

    /// Bytes of the larger operand.
    pub(crate) fn largest_operand(&self) -> usize {
        let elements = |operand: &Strided| operand.shape().iter().product::<usize>();
        elements(&self.embeddings).max(elements(&self.weights)) * self.embeddings.dtype().size()
    }
}

/// K, of embeddings and class weights of these shapes, if they go together.
pub(crate) fn active_classes(
    embeddings: [usize; 3],
    weights: [usize; 3],
    scale: f32,
    active: Option<usize>,
) -> Result<usize, Error> {
    let [heads, _, dim] = embeddings;
    let [_, classes, _] = weights;
    if weights != [heads, classes, dim] {
        return Err(Error::Shape {
            operand: "class weights",
            got: weights.to_vec(),
            expected: format!("[{heads}, classes, {dim}] to go with embeddings {embeddings:?}"),
        });
    }
    if !scale.is_finite() {
        return Err(Error::Option {
            option: "scale",
            got: f64::from(scale),
            expected: "finite",
        });
    }
    let active = active.unwrap_or(classes);
    if active == 0 || active > classes {
        return Err(Error::ActiveClasses { active, classes });
    }
    Ok(active)
}

/// Refuses class weights of another dtype than the embeddings'.
pub(crate) fn same_dtype(weights: ElemType, embeddings: ElemType) -> Result<(), Error> {
    if weights != embeddings {
        return Err(Error::Dtype {
            operand: "class weights",
            got: weights,
            expected: format!("{embeddings}, like the embeddings"),
        });
    }
    Ok(())
}
