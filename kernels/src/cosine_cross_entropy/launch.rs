//! The public forward and backward.

use cubecl::client::Client;
use cubecl::std::tensor::TensorHandle;
use serde::{Deserialize, Serialize};

use super::{plane, unit};
use crate::Gradients;
use crate::blueprint::{Blueprint, Strategy, Variant};
use crate::cosine_logits::CosineProblem;
use crate::error::Error;
use crate::loss::{LossOptions, LossOutput, Upstream, reduce, rows};
use crate::operand::{F32, Labels, U32, empty};
use crate::packing::{Operand, Packed};

/// The operands, never modified.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// `[heads, rows, dim]`, f32, f16 or bf16; the last axis packed, the others of any stride.
    pub embeddings: TensorHandle,
    /// `[heads, classes, dim]`, the same dtype.
    pub weights: TensorHandle,
    /// `[rows]`, i32, i64 or u32.
    pub labels: TensorHandle,
}

/// What the loss is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// What cosines are multiplied with: the inverse temperature.
    pub scale: f32,
    /// K: only the classes `0..K` take part; all of them if absent.
    pub active: Option<usize>,
    /// Reduction, label smoothing, ignored label, head weights.
    pub loss: LossOptions,
    /// Which variant runs.
    #[serde(skip)]
    pub strategy: Strategy,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            scale: 16.0,
            active: None,
            loss: LossOptions::default(),
            strategy: Strategy::Inferred,
        }
    }
}

/// The loss, its `lse` and the predicted classes.
///
/// # Errors
/// A typed [`Error`] for what the host can see, before anything is launched. A bad label is found on the device:
/// its row counts as ignored, and reading the output returns [`Error::Label`].
///
/// # Examples
/// ```no_run
/// use cubecl::std::tensor::TensorHandle;
/// use protohead::cosine_cross_entropy::{Inputs, Options, backward, forward};
/// use protohead::Upstream;
///
/// # fn step(embeddings: TensorHandle, weights: TensorHandle, labels: TensorHandle) -> Result<(), protohead::Error> {
/// let client = cubecl::Device::default().client();
/// let inputs = Inputs { embeddings, weights, labels };
/// let options = Options { scale: 16.0, active: Some(20), ..Options::default() };
/// let output = forward(&client, &inputs, &options)?;
/// let gradients = backward(&client, &inputs, &options, &output, &Upstream::Total(1.0), true, true)?;
/// println!("loss {}", output.read_total(&client)?);
/// # Ok(()) }
/// ```
pub fn forward(client: &Client, inputs: &Inputs, options: &Options) -> Result<LossOutput, Error> {
    let blueprint = Blueprint::new(client, options.strategy)?;
    let (problem, labels) = validate(client, &blueprint, inputs, options)?;
    let sizes = problem.sizes;
    let packed = Packed::new(
        client,
        &problem.embeddings,
        &problem.weights,
        sizes,
        &blueprint,
    );
    let row_loss = empty(client, [sizes.heads, sizes.rows], F32);
    let lse = empty(client, [sizes.heads, sizes.rows], F32);
    let predictions = empty(client, [sizes.heads, sizes.rows], U32);
    let call = ForwardCall {
        client,
        blueprint: &blueprint,
        packed: &packed,
        labels: &labels,
        row_loss: &row_loss,
        lse: &lse,
        predictions: &predictions,
        scale: options.scale,
        loss: &options.loss,
    };
    match blueprint.variant {
        Variant::Unit => unit::launch_forward(&call),
        Variant::Plane => plane::launch_forward(&call),
    }
    let reduced = reduce::launch(
        client,
        &blueprint,
        &row_loss,
        &labels,
        sizes.active,
        &options.loss,
    );
    Ok(LossOutput::new(
        row_loss,
        reduced,
        lse,
        predictions,
        &labels,
        sizes.active,
        &options.loss,
    ))
}

/// The gradients of the operands, from a [`forward`] with the same inputs and options. May be called again.
///
/// A gradient that is not asked for costs nothing.
///
/// # Errors
/// As [`forward`]; and [`Error::Shape`] if the upstream gradient or `output` does not fit.
pub fn backward(
    client: &Client,
    inputs: &Inputs,
    options: &Options,
    output: &LossOutput,
    upstream: &Upstream,
    embeddings: bool,
    weights: bool,
) -> Result<Gradients, Error> {
    let blueprint = Blueprint::new(client, options.strategy)?;
    let (problem, labels) = validate(client, &blueprint, inputs, options)?;
    let sizes = problem.sizes;
    let saved = output.lse.shape().to_vec();
    if saved != [sizes.heads, sizes.rows] {
        return Err(Error::Shape {
            operand: "lse",
            got: saved,
            expected: format!("[{}, {}]", sizes.heads, sizes.rows),
        });
    }
    let rows = rows::launch(
        client,
        &blueprint,
        &output.lse,
        &output.status,
        &labels,
        sizes.active,
        &options.loss,
        upstream,
        sizes.rows_padded,
    )?;
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
            rows: &rows,
            grad: &grad,
            owner,
            scale: options.scale,
            smoothing: options.loss.label_smoothing,
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
    blueprint: &Blueprint,
    inputs: &Inputs,
    options: &Options,
) -> Result<(CosineProblem, Labels), Error> {
    let problem = CosineProblem::new(
        client,
        blueprint,
        &inputs.embeddings,
        &inputs.weights,
        options.scale,
        options.active,
    )?;
    options.loss.validate(problem.sizes.heads)?;
    let labels = Labels::new(client, &inputs.labels, problem.sizes.rows)?;
    Ok((problem, labels))
}

/// A forward launch of either variant.
pub(super) struct ForwardCall<'a> {
    pub client: &'a Client,
    pub blueprint: &'a Blueprint,
    pub packed: &'a Packed,
    pub labels: &'a Labels,
    pub row_loss: &'a TensorHandle,    // [heads, rows], f32
    pub lse: &'a TensorHandle,         // [heads, rows], f32
    pub predictions: &'a TensorHandle, // [heads, rows], u32
    pub scale: f32,
    pub loss: &'a LossOptions,
}

/// A backward launch of either variant, for one operand.
pub(super) struct BackwardCall<'a> {
    pub client: &'a Client,
    pub blueprint: &'a Blueprint,
    pub packed: &'a Packed,
    pub rows: &'a rows::Rows,
    pub grad: &'a TensorHandle, // [heads, count, dim], the operands' dtype
    pub owner: Operand,
    pub scale: f32,
    pub smoothing: f32,
}
