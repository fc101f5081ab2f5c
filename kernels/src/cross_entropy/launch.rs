//! The public forward and backward.

use cubecl::client::Client;
use cubecl::std::tensor::TensorHandle;
use serde::{Deserialize, Serialize};

use super::{plane, unit};
use crate::blueprint::{Blueprint, Strategy, Variant};
use crate::error::Error;
use crate::loss::arriving::Arriving;
use crate::loss::{Asked, LossOptions, LossOutput, Saved, Upstream, reduce};
use crate::memory::empty;
use crate::operand::{F32, Labels, Strided, U32, addressable, allocatable, count};

/// The operands, never modified.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// `[heads, rows, classes]`, f32, f16 or bf16; the last axis packed, the others of any stride.
    pub logits: TensorHandle,
    /// `[rows]`, i32, i64 or u32, contiguous: a class for each row, the same for all heads, or the ignored label.
    pub labels: TensorHandle,
}

/// Options of [`forward`] and [`backward`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Reduction, label smoothing, ignored label, head weights.
    pub loss: LossOptions,
    /// Which variant runs.
    #[serde(skip)]
    pub strategy: Strategy,
}

/// The loss, its `lse` and the predicted classes.
///
/// # Errors
/// A typed [`Error`] for what the host can see, before anything is launched. A bad label is found on the device:
/// its row counts as ignored, and reading the output returns [`Error::Label`].
///
/// # Examples
/// ```no_run
/// use protohead::Upstream;
/// use protohead::cross_entropy::{Inputs, Options, backward, forward};
///
/// # fn step(client: &cubecl::client::Client, inputs: &Inputs) -> Result<(), protohead::Error> {
/// let options = Options::default();
/// let output = forward(client, inputs, &options)?;
/// println!("loss {}", output.read_total(client)?); // or `check`: every label was a class
/// let gradient = backward(client, inputs, &options, &output, &Upstream::Total(1.0))?;
/// # Ok(()) }
/// ```
pub fn forward(client: &Client, inputs: &Inputs, options: &Options) -> Result<LossOutput, Error> {
    let (blueprint, logits, labels) = validate(client, inputs, options)?;
    let [heads, rows, classes] = logits.dims3();
    let row_loss = empty(client, [heads, rows], F32);
    let lse = empty(client, [2, heads, rows], F32);
    let predictions = empty(client, [heads, rows], U32);
    let head_weights = options.loss.upload_weights(client);
    let call = ForwardCall {
        client,
        blueprint: &blueprint,
        logits: &logits,
        labels: &labels,
        row_loss: &row_loss,
        lse: &lse,
        predictions: &predictions,
        loss: &options.loss,
    };
    let reduced = match blueprint.variant {
        Variant::Unit => unit::launch_forward(&call, head_weights.as_ref()),
        _ => {
            plane::launch_forward(&call);
            reduce::launch(
                client,
                &blueprint,
                &row_loss,
                &labels,
                classes,
                &options.loss,
                head_weights.as_ref(),
            )
        }
    };
    Ok(LossOutput::new(
        row_loss,
        reduced,
        lse,
        predictions,
        &labels,
        asked([heads, rows, classes], &options.loss),
        &options.loss,
    ))
}

/// The gradient of the logits, `[heads, rows, classes]`, contiguous, of their dtype. It can be called more than once.
///
/// # Errors
/// As [`forward`]; [`Error::OtherForward`] if op, heads, rows, classes or ignored label are not those of the forward pass; and a typed
/// [`Error`] if the upstream gradient or `output` does not fit.
pub fn backward(
    client: &Client,
    inputs: &Inputs,
    options: &Options,
    output: &LossOutput,
    upstream: &Upstream,
) -> Result<TensorHandle, Error> {
    backward_from(client, inputs, options, &output.saved(), upstream)
}

/// [`backward`] from what it reads of the forward pass.
pub(crate) fn backward_from(
    client: &Client,
    inputs: &Inputs,
    options: &Options,
    saved: &Saved,
    upstream: &Upstream,
) -> Result<TensorHandle, Error> {
    let (blueprint, logits, labels) = validate(client, inputs, options)?;
    let [heads, rows, classes] = logits.dims3();
    saved.prove(client, &asked([heads, rows, classes], &options.loss))?;
    let arriving = Arriving::new(client, upstream, &options.loss, heads, rows, classes)?;
    let elements = count(logits.shape());
    allocatable(
        client,
        "the gradient of the logits",
        elements,
        logits.dtype(),
    )?;
    let grad = empty(client, [heads, rows, classes], logits.dtype());
    let call = BackwardCall {
        client,
        blueprint: &blueprint,
        logits: &logits,
        labels: &labels,
        saved,
        arriving: &arriving,
        grad: &grad,
        loss: &options.loss,
    };
    match blueprint.variant {
        Variant::Unit => unit::launch_backward(&call),
        _ => plane::launch_backward(&call),
    }
    Ok(grad)
}

fn asked([heads, rows, classes]: [usize; 3], loss: &LossOptions) -> Asked {
    Asked {
        op: "cross_entropy",
        heads,
        rows,
        scale: 1.0,
        margins: [0.0; 2],
        arithmetic: F32,
        active: classes,
        ignore_index: loss.ignore_index,
    }
}

fn validate(
    client: &Client,
    inputs: &Inputs,
    options: &Options,
) -> Result<(Blueprint, Strided, Labels), Error> {
    let blueprint = Blueprint::new(client, options.strategy)?;
    let logits = Strided::float(client, "logits", &inputs.logits, 3)?;
    let [heads, rows, classes] = logits.dims3();
    let row_states = count(&[2, heads, rows]);
    addressable("row states", row_states)?;
    allocatable(client, "row states", row_states, F32)?;
    let blueprint = blueprint.for_elements(heads * rows * classes);
    options.loss.validate(heads)?;
    let labels = Labels::new(client, &inputs.labels, rows)?;
    Ok((blueprint, logits, labels))
}

/// A forward launch of either variant.
pub(super) struct ForwardCall<'a> {
    pub client: &'a Client,
    pub blueprint: &'a Blueprint,
    pub logits: &'a Strided, // [heads, rows, classes]
    pub labels: &'a Labels,
    pub row_loss: &'a TensorHandle,    // [heads, rows], f32
    pub lse: &'a TensorHandle,         // [2, heads, rows], f32: see `Saved`
    pub predictions: &'a TensorHandle, // [heads, rows], u32
    pub loss: &'a LossOptions,
}

/// A backward launch of either variant.
pub(super) struct BackwardCall<'a> {
    pub client: &'a Client,
    pub blueprint: &'a Blueprint,
    pub logits: &'a Strided,
    pub labels: &'a Labels,
    pub saved: &'a Saved,
    pub arriving: &'a Arriving,
    pub grad: &'a TensorHandle, // [heads, rows, classes], the logits' dtype
    pub loss: &'a LossOptions,
}
