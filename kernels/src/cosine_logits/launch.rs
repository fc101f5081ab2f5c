//! The public forward and backward.

use cubecl::client::Client;
use cubecl::std::tensor::TensorHandle;
use serde::{Deserialize, Serialize};

use super::{CosineProblem, plane, unit};
use crate::Gradients;
use crate::blueprint::{Blueprint, Strategy, Variant};
use crate::error::Error;
use crate::operand::{Strided, addressable, empty};
use crate::packing::{Operand, Packed};

/// The operands, never modified.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// `[heads, rows, dim]`, f32, f16 or bf16; the last axis packed, the others of any stride.
    pub embeddings: TensorHandle,
    /// `[heads, classes, dim]`, the same dtype.
    pub weights: TensorHandle,
}

/// What the logits are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// What cosines are multiplied with: the inverse temperature.
    pub scale: f32,
    /// K: only the classes `0..K` take part; all of them if absent.
    pub active: Option<usize>,
    /// Which variant runs.
    #[serde(skip)]
    pub strategy: Strategy,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            scale: 16.0,
            active: None,
            strategy: Strategy::Inferred,
        }
    }
}

/// The logits `[heads, rows, K]`, contiguous, of the operands' dtype.
///
/// # Errors
/// A typed [`Error`], before anything is launched.
pub fn forward(client: &Client, inputs: &Inputs, options: &Options) -> Result<TensorHandle, Error> {
    let (blueprint, problem) = validate(client, inputs, options)?;
    let sizes = problem.sizes;
    let elements = sizes.heads as u128 * sizes.rows as u128 * sizes.active as u128;
    addressable("logits", elements)?;
    let packed = Packed::new(
        client,
        &problem.embeddings,
        &problem.weights,
        sizes,
        &blueprint,
    );
    let logits = empty(
        client,
        [sizes.heads, sizes.rows, sizes.active],
        problem.embeddings.dtype(),
    );
    match blueprint.variant {
        Variant::Unit => unit::launch_forward(client, &blueprint, &packed, &logits, options.scale),
        Variant::Plane => {
            plane::launch_forward(client, &blueprint, &packed, &logits, options.scale)
        }
    }
    Ok(logits)
}

/// The gradients of the operands from `grad_logits [heads, rows, K]`, of their dtype, the last axis packed.
///
/// A gradient that is not asked for costs nothing.
///
/// # Errors
/// A typed [`Error`], before anything is launched.
pub fn backward(
    client: &Client,
    inputs: &Inputs,
    options: &Options,
    grad_logits: &TensorHandle,
    embeddings: bool,
    weights: bool,
) -> Result<Gradients, Error> {
    let (blueprint, problem) = validate(client, inputs, options)?;
    let sizes = problem.sizes;
    let upstream = Strided::float(client, "logit gradients", grad_logits, 3)?;
    let expected = [sizes.heads, sizes.rows, sizes.active];
    if upstream.shape() != expected {
        return Err(Error::Shape {
            operand: "logit gradients",
            got: upstream.shape().to_vec(),
            expected: format!("{expected:?}"),
        });
    }
    if upstream.dtype() != problem.embeddings.dtype() {
        return Err(Error::Dtype {
            operand: "logit gradients",
            got: upstream.dtype(),
            expected: format!("{}, like the embeddings", problem.embeddings.dtype()),
        });
    }
    let packed = Packed::new(
        client,
        &problem.embeddings,
        &problem.weights,
        sizes,
        &blueprint,
    );
    let gradient = |owner: Operand, count: usize| {
        let grad = empty(
            client,
            [sizes.heads, count, sizes.dim],
            problem.embeddings.dtype(),
        );
        let call = BackwardCall {
            client,
            blueprint: &blueprint,
            packed: &packed,
            upstream: &upstream,
            grad: &grad,
            owner,
            scale: options.scale,
        };
        match blueprint.variant {
            Variant::Unit => unit::launch_backward(&call),
            Variant::Plane => plane::launch_backward(&call),
        }
        grad
    };
    Ok(Gradients {
        embeddings: embeddings.then(|| gradient(Operand::Embeddings, sizes.rows)),
        weights: weights.then(|| gradient(Operand::Weights, problem.classes)),
    })
}

fn validate(
    client: &Client,
    inputs: &Inputs,
    options: &Options,
) -> Result<(Blueprint, CosineProblem), Error> {
    let blueprint = Blueprint::new(client, options.strategy)?;
    let problem = CosineProblem::new(
        client,
        &blueprint,
        &inputs.embeddings,
        &inputs.weights,
        options.scale,
        options.active,
    )?;
    Ok((blueprint, problem))
}

/// A backward launch of either variant, for one operand.
pub(super) struct BackwardCall<'a> {
    pub client: &'a Client,
    pub blueprint: &'a Blueprint,
    pub packed: &'a Packed,
    pub upstream: &'a Strided,  // [heads, rows, active]
    pub grad: &'a TensorHandle, // [heads, count, dim]
    pub owner: Operand,
    pub scale: f32,
}
