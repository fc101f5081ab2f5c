//! The public forward and backward.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::std::tensor::TensorHandle;
use serde::{Deserialize, Serialize};

use super::row::PerOperandLaunch;
use super::{plane, unit};
use crate::blueprint::{Blueprint, Strategy, Variant};
use crate::error::Error;
use crate::loss::Upstream;
use crate::memory::empty;
use crate::operand::{F32, Strided, allocatable, contiguous, count, whole_if_asked};
use crate::transfer::download;

/// The operands, never modified: `[rows, dim]`, f32, f16 or bf16, the last axis packed.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// What the parts should point to.
    pub whole: TensorHandle,
    /// One part.
    pub first: TensorHandle,
    /// The other.
    pub second: TensorHandle,
}

/// Options of [`forward`] and [`backward`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Which variant runs.
    #[serde(skip)]
    pub strategy: Strategy,
}

/// Which gradients to compute; one that is left out costs nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The gradient of the whole.
    pub whole: bool,
    /// The gradient of the parts: both have the same.
    pub part: bool,
}

impl Wanted {
    /// Of all three.
    pub const ALL: Self = Self {
        whole: true,
        part: true,
    };
}

/// The result of a forward pass, on the device.
#[derive(Clone, Debug)]
pub struct Output {
    /// f32, `[1]`: `1 − mean(cosines)`
    pub loss: TensorHandle,
    /// f32, `[rows]`
    pub cosines: TensorHandle,
}

impl Output {
    /// Waits, and reads the loss.
    ///
    /// # Errors
    /// [`Error::Device`] if the device failed; a typed [`Error`] if `loss` was replaced by what is no loss.
    pub fn read_loss(&self, client: &Client) -> Result<f32, Error> {
        contiguous(client, "loss", &self.loss, &[1], F32)?;
        Ok(download(client, &self.loss)?[0])
    }
}

/// The gradients that were asked for, contiguous, of the operands' dtype.
#[derive(Clone, Debug, Default)]
pub struct Gradients {
    /// `[rows, dim]`
    pub whole: Option<TensorHandle>,
    /// `[rows, dim]`: of each of the parts.
    pub part: Option<TensorHandle>,
}

/// The loss and the cosine of each row.
///
/// # Errors
/// A typed [`Error`], before anything is launched.
///
/// # Examples
/// ```no_run
/// use protohead::Upstream;
/// use protohead::reconstruction::{Inputs, Options, Wanted, backward, forward};
///
/// # fn step(client: &cubecl::client::Client, inputs: &Inputs) -> Result<(), protohead::Error> {
/// let options = Options::default();
/// println!("loss {}", forward(client, inputs, &options)?.read_loss(client)?);
/// let gradients = backward(client, inputs, &options, &Upstream::Total(1.0), Wanted::ALL)?;
/// # Ok(()) }
/// ```
pub fn forward(client: &Client, inputs: &Inputs, options: &Options) -> Result<Output, Error> {
    let blueprint = blueprint(client, inputs, options)?;
    let call = Call::new(client, &blueprint, inputs)?;
    allocatable(client, "the cosines", call.rows as u128, F32)?;
    let output = Output {
        loss: empty(client, [1], F32),
        cosines: empty(client, [call.rows], F32),
    };
    let launch = match blueprint.variant {
        Variant::Unit => unit::launch_forward,
        _ => plane::launch_forward,
    };
    launch(&call, &output.cosines, &output.loss);
    Ok(output)
}

/// The gradients of the operands.
///
/// # Errors
/// A typed [`Error`], before anything is launched.
pub fn backward(
    client: &Client,
    inputs: &Inputs,
    options: &Options,
    upstream: &Upstream,
    wanted: Wanted,
) -> Result<Gradients, Error> {
    let blueprint = blueprint(client, inputs, options)?;
    let call = Call::new(client, &blueprint, inputs)?;
    let upstream = match upstream {
        Upstream::Total(gradient) => {
            let handle = client.create_from_slice(f32::as_bytes(&[*gradient]));
            &TensorHandle::new_contiguous([1], handle, F32)
        }
        Upstream::Loss(tensor) => {
            contiguous(client, "upstream gradient", tensor, &[1], F32)?;
            tensor
        }
    };
    let shape = [call.rows, call.dim];
    let dtype = call.whole.dtype();
    if wanted.whole || wanted.part {
        allocatable(client, "a gradient", count(&shape), dtype)?;
    }
    let gradients = Gradients {
        whole: wanted.whole.then(|| empty(client, shape, dtype)),
        part: wanted.part.then(|| empty(client, shape, dtype)),
    };
    if wanted.whole || wanted.part {
        let call = BackwardCall {
            of: &call,
            upstream,
            grad_whole: gradients.whole.as_ref(),
            grad_part: gradients.part.as_ref(),
        };
        match blueprint.variant {
            Variant::Unit => unit::launch_backward(&call),
            _ => plane::launch_backward(&call),
        }
    }
    Ok(gradients)
}

fn blueprint(client: &Client, inputs: &Inputs, options: &Options) -> Result<Blueprint, Error> {
    let elements = count(inputs.whole.shape()).try_into();
    Ok(Blueprint::new(client, options.strategy)?.for_elements(elements.unwrap_or(usize::MAX)))
}

/// A call whose operands are proved.
pub(super) struct Call<'a> {
    pub client: &'a Client,
    pub blueprint: &'a Blueprint,
    pub whole: Strided,
    pub first: Strided,
    pub second: Strided,
    pub rows: usize,
    pub dim: usize,
    /// Elements of a vector, on which every row of each operand begins.
    pub vector: usize,
}

impl<'a> Call<'a> {
    fn new(client: &'a Client, blueprint: &'a Blueprint, inputs: &Inputs) -> Result<Self, Error> {
        let whole = Strided::float(client, "whole", &inputs.whole, 2)?;
        let part = |operand, tensor| {
            let part = Strided::float(client, operand, tensor, 2)?;
            if part.shape() != whole.shape() {
                return Err(Error::Shape {
                    operand,
                    got: part.shape().to_vec(),
                    expected: format!("{:?}, like the whole", whole.shape()),
                });
            }
            if part.dtype() != whole.dtype() {
                return Err(Error::Dtype {
                    operand,
                    got: part.dtype(),
                    expected: format!("{}, like the whole", whole.dtype()),
                });
            }
            Ok(part)
        };
        let first = part("first part", &inputs.first)?;
        let second = part("second part", &inputs.second)?;
        let [rows, dim] = [whole.shape()[0], whole.shape()[1]];
        let vector = whole
            .vector_size(blueprint)
            .min(first.vector_size(blueprint))
            .min(second.vector_size(blueprint));
        Ok(Self {
            client,
            blueprint,
            whole,
            first,
            second,
            rows,
            dim,
            vector,
        })
    }

    pub(super) fn strides_arg(&self) -> PerOperandLaunch {
        PerOperandLaunch::new(
            self.whole.row_stride(self.vector),
            self.first.row_stride(self.vector),
            self.second.row_stride(self.vector),
        )
    }
}

/// A backward launch of either variant.
pub(super) struct BackwardCall<'a> {
    pub of: &'a Call<'a>,
    pub upstream: &'a TensorHandle,           // f32, [1]
    pub grad_whole: Option<&'a TensorHandle>, // [rows, dim]
    pub grad_part: Option<&'a TensorHandle>,  // [rows, dim]
}

impl BackwardCall<'_> {
    pub(super) fn whole_arg(&self) -> BufferArg {
        self.grad_arg(self.grad_whole)
    }

    pub(super) fn part_arg(&self) -> BufferArg {
        self.grad_arg(self.grad_part)
    }

    fn grad_arg(&self, grad: Option<&TensorHandle>) -> BufferArg {
        // SAFETY: `backward` allocated the gradient.
        unsafe { whole_if_asked(self.of.client, grad, self.of.whole.dtype(), self.of.vector) }
    }
}
