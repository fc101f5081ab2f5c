//! The public forward and backward.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::std::tensor::TensorHandle;

use super::{plane, unit};
use crate::blueprint::{Blueprint, PLANE_UNITS, Strategy, Variant};
use crate::error::Error;
use crate::math::sum::Kahan;
use crate::operand::{F32, Strided, empty, whole};

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

/// The result of a forward pass, on the device.
#[derive(Clone, Debug)]
pub struct Output {
    /// f32, `[1]`: `1 − mean(cosines)`
    pub loss: TensorHandle,
    /// f32, `[rows]`
    pub cosines: TensorHandle,
}

/// The gradients that were asked for, contiguous, of the operands' dtype.
#[derive(Clone, Debug)]
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
pub fn forward(client: &Client, inputs: &Inputs, strategy: Strategy) -> Result<Output, Error> {
    let blueprint = Blueprint::new(client, strategy)?;
    let problem = Problem::new(client, inputs)?;
    let cosines = empty(client, [problem.rows], F32);
    match blueprint.variant {
        Variant::Unit => unit::launch_forward(client, &blueprint, &problem, &cosines),
        Variant::Plane | Variant::Cmma => plane::launch_forward(client, &problem, &cosines),
    }
    let loss = empty(client, [1], F32);
    let units = match blueprint.variant {
        Variant::Unit => 1,
        Variant::Plane | Variant::Cmma => PLANE_UNITS,
    };
    // SAFETY: one cube reads `rows` cosines and writes one loss.
    unsafe {
        one_minus_mean::launch_unchecked(
            client,
            CubeCount::new_single(),
            CubeDim::new_1d(units as u32),
            whole(&cosines, 1),
            whole(&loss, 1),
            units,
        );
    }
    Ok(Output { loss, cosines })
}

/// The gradients of the operands; `upstream` is f32, `[1]`.
///
/// # Errors
/// A typed [`Error`], before anything is launched.
pub fn backward(
    client: &Client,
    inputs: &Inputs,
    upstream: &TensorHandle,
    strategy: Strategy,
    whole: bool,
    part: bool,
) -> Result<Gradients, Error> {
    let blueprint = Blueprint::new(client, strategy)?;
    let problem = Problem::new(client, inputs)?;
    if upstream.shape().to_vec() != [1] || upstream.dtype != F32 {
        return Err(Error::Shape {
            operand: "upstream gradient",
            got: upstream.shape().to_vec(),
            expected: "f32 [1]".into(),
        });
    }
    let shape = [problem.rows, problem.dim];
    let dtype = problem.whole.dtype();
    let gradients = Gradients {
        whole: whole.then(|| empty(client, shape, dtype)),
        part: part.then(|| empty(client, shape, dtype)),
    };
    for (of_whole, grad) in [(true, &gradients.whole), (false, &gradients.part)] {
        let Some(grad) = grad else { continue };
        match blueprint.variant {
            Variant::Unit => {
                unit::launch_backward(client, &blueprint, &problem, upstream, grad, of_whole);
            }
            Variant::Plane | Variant::Cmma => {
                plane::launch_backward(client, &problem, upstream, grad, of_whole)
            }
        }
    }
    Ok(gradients)
}

/// Three operands that belong together.
pub(super) struct Problem {
    pub whole: Strided,
    pub first: Strided,
    pub second: Strided,
    pub rows: usize,
    pub dim: usize,
}

impl Problem {
    fn new(client: &Client, inputs: &Inputs) -> Result<Self, Error> {
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
        Ok(Self {
            whole,
            first,
            second,
            rows,
            dim,
        })
    }
}

#[cube(launch_unchecked)]
fn one_minus_mean(cosines: &[f32], loss: &mut [f32], #[comptime] units: usize) {
    let unit = UNIT_POS as usize;
    let rows = cosines.len();
    let mut partial = Shared::<[f32]>::new_slice(units);
    let mut sum = Kahan::new();
    let mut row = unit;
    while row < rows {
        sum.add(cosines[row]);
        row += units;
    }
    partial[unit] = sum.total();
    if comptime!(units > 1) {
        sync_cube();
    }
    if unit == 0 {
        let mut all = Kahan::new();
        for i in 0..units {
            all.add(partial[i]);
        }
        loss[0] = 1.0 - all.total() / f32::cast_from(rows as u32);
    }
}
