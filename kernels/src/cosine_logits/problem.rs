//! The sizes of a cosine head, proved from its operands.

use cubecl::client::Client;
use cubecl::std::tensor::TensorHandle;

use crate::Gradients;
use crate::blueprint::{Blueprint, Variant};
use crate::error::Error;
use crate::operand::{Strided, addressable, empty};
use crate::packing::PackedSizes;

/// Embeddings and class weights that belong together.
pub(crate) struct CosineProblem {
    pub embeddings: Strided,
    pub weights: Strided,
    pub classes: usize,
    pub sizes: PackedSizes,
}

impl CosineProblem {
    pub(crate) fn new(
        client: &Client,
        blueprint: &Blueprint,
        embeddings: &TensorHandle,
        weights: &TensorHandle,
        scale: f32,
        active: Option<usize>,
    ) -> Result<Self, Error> {
        // The cmma variant copies a bounded part of either at a time, with indices as wide as it takes.
        let chunked = blueprint.variant == Variant::Cmma;
        let float = if chunked {
            Strided::of_any_size
        } else {
            Strided::float
        };
        let embeddings = float(client, "embeddings", embeddings, 3)?;
        let weights = float(client, "class weights", weights, 3)?;
        let [heads, rows, dim] = embeddings.dims3();
        let [_, classes, _] = weights.dims3();
        if weights.shape() != [heads, classes, dim] {
            return Err(Error::Shape {
                operand: "class weights",
                got: weights.shape().to_vec(),
                expected: format!(
                    "[{heads}, classes, {dim}] to go with embeddings [{heads}, {rows}, {dim}]"
                ),
            });
        }
        if weights.dtype() != embeddings.dtype() {
            return Err(Error::Dtype {
                operand: "class weights",
                got: weights.dtype(),
                expected: format!("{}, like the embeddings", embeddings.dtype()),
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
        let sizes = PackedSizes::new(heads, rows, active, dim, blueprint);
        let packed = match chunked {
            true => sizes.heads * sizes.rows_padded * sizes.dim_padded,
            false => sizes.elements(),
        };
        addressable("the packed operands", packed as u128)?;
        Ok(Self {
            embeddings,
            weights,
            classes,
            sizes,
        })
    }

    /// Room for the gradients that are asked for.
    pub(crate) fn gradients(&self, client: &Client, embeddings: bool, weights: bool) -> Gradients {
        let dtype = self.embeddings.dtype();
        Gradients {
            embeddings: embeddings.then(|| empty(client, self.embeddings.shape(), dtype)),
            weights: weights.then(|| empty(client, self.weights.shape(), dtype)),
        }
    }
}
