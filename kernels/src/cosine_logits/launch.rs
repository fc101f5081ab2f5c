//! The public forward and backward.

use cubecl::client::Client;
use cubecl::std::tensor::TensorHandle;
use serde::{Deserialize, Serialize};

use super::{CosineProblem, tiled, unit};
use crate::blueprint::{Blueprint, Strategy};
use crate::error::Error;
use crate::gradients::{Gradients, Wanted};
use crate::memory::empty;
use crate::operand::{Strided, addressable, addressed, allocatable, count};

/// The operands, never modified.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// `[heads, rows, dim]`, f32, f16 or bf16; the last axis packed, the others of any stride.
    pub embeddings: TensorHandle,
    /// `[heads, classes, dim]`, the same dtype.
    pub weights: TensorHandle,
}

/// Options of [`forward`] and [`backward`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// The factor on the cosines, the inverse temperature: 16 by default. Any finite number.
    pub scale: f32,
    /// K: only the classes `0..K` take part; all of them if absent.
    pub active: Option<usize>,
    /// Whether the tensor cores of an NVIDIA GPU may round f32 operands to TF32's 10 bits, as in torch's
    /// `backends.cuda.matmul.allow_tf32`. Without it, f32 runs in multiply-adds.
    pub allow_tf32: bool,
    /// Which variant runs.
    #[serde(skip)]
    pub strategy: Strategy,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            scale: 16.0,
            active: None,
            allow_tf32: false,
            strategy: Strategy::Inferred,
        }
    }
}

/// The logits `[heads, rows, K]`, contiguous, of the operands' dtype.
///
/// # Errors
/// A typed [`Error`], before anything is launched.
///
/// # Examples
/// ```no_run
/// use protohead::Wanted;
/// use protohead::cosine_logits::{Inputs, Options, backward, forward};
///
/// # fn step(client: &cubecl::client::Client, inputs: &Inputs) -> Result<(), protohead::Error> {
/// let options = Options { scale: 16.0, active: Some(20), ..Options::default() };
/// let logits = forward(client, inputs, &options)?;
/// # let gradient_of_the_logits = logits;
/// let gradients = backward(client, inputs, &options, &gradient_of_the_logits, Wanted::BOTH)?;
/// # Ok(()) }
/// ```
pub fn forward(client: &Client, inputs: &Inputs, options: &Options) -> Result<TensorHandle, Error> {
    let call = Call::new(client, inputs, options)?;
    let sizes = call.problem.sizes;
    let elements = count(&[sizes.heads, sizes.rows, sizes.active]);
    match call.blueprint.product {
        Some(_) => addressed(client, "logits", elements)?,
        None => addressable("logits", elements)?,
    }
    let dtype = call.problem.embeddings.dtype();
    allocatable(client, "logits", elements, dtype)?;
    let logits = empty(client, [sizes.heads, sizes.rows, sizes.active], dtype);
    match call.blueprint.product {
        Some(tile) => tiled::launch_forward(&call, tile, &logits, options.scale),
        None => unit::launch_forward(&call, &logits, options.scale),
    }
    Ok(logits)
}

/// The gradients of the operands and of the scale from `grad_logits [heads, rows, K]`, of the operands' dtype, the last axis packed.
///
/// A gradient of an operand that is not asked for costs nothing; the scale's costs what the embeddings' does.
///
/// # Errors
/// A typed [`Error`], before anything is launched.
pub fn backward(
    client: &Client,
    inputs: &Inputs,
    options: &Options,
    grad_logits: &TensorHandle,
    wanted: Wanted,
) -> Result<Gradients, Error> {
    let call = Call::new(client, inputs, options)?;
    let problem = &call.problem;
    let sizes = problem.sizes;
    let float = match call.blueprint.product {
        Some(_) => Strided::of_any_size,
        None => Strided::float,
    };
    let upstream = float(client, "logit gradients", grad_logits, 3)?;
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
    problem.check_gradients(client, options.scale, wanted)?;
    let gradients = problem.gradients(client, wanted);
    if !wanted.any() {
        return Ok(gradients);
    }
    match call.blueprint.product {
        Some(tile) => tiled::launch_backward(&call, tile, &upstream, options.scale, &gradients),
        None => {
            addressable("the workspace", unit::scratch(&call.blueprint, &sizes))?;
            unit::launch_backward(&call, &upstream, options.scale, &gradients);
        }
    }
    Ok(gradients.only(wanted))
}

/// A call whose operands are proved.
pub(super) struct Call<'a> {
    pub client: &'a Client,
    pub blueprint: Blueprint,
    pub problem: CosineProblem,
}

impl<'a> Call<'a> {
    fn new(client: &'a Client, inputs: &Inputs, options: &Options) -> Result<Self, Error> {
        let dtype = inputs.embeddings.dtype;
        let blueprint = Blueprint::of_product(client, options.strategy, dtype, options.allow_tf32)?;
        let problem = CosineProblem::new(
            client,
            &blueprint,
            &inputs.embeddings,
            &inputs.weights,
            options.scale,
            options.active,
        )?;
        Ok(Self {
            client,
            blueprint: blueprint.for_work(problem.operations()),
            problem,
        })
    }
}
