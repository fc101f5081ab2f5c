//! The gradient that arrives at a loss, and what of it is a row's.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::Upstream;
use super::options::{LossOptions, Reduction};
use super::target::is_class;
use crate::error::Error;
use crate::operand::{F32, contiguous};

/// The gradient that arrives, as a kernel reads it.
pub(crate) struct Arriving {
    pub gradient: Handle, // f32, [heads], or [heads, rows] if per_row
    pub elements: usize,
    pub per_row: bool,
}

impl Arriving {
    /// Folds the head weights into a total's gradient, or checks the shape of a loss's. With one active class the loss is
    /// constant, and nothing arrives: its gradients are exactly 0.
    pub(crate) fn new(
        client: &Client,
        upstream: &Upstream,
        options: &LossOptions,
        heads: usize,
        rows: usize,
        active: usize,
    ) -> Result<Self, Error> {
        let by_head = |gradients: Vec<f32>| Self {
            gradient: client.create_from_slice(f32::as_bytes(&gradients)),
            elements: heads,
            per_row: false,
        };
        let tensor = match upstream {
            Upstream::Total(_) if active == 1 => return Ok(by_head(vec![0.0; heads])),
            Upstream::Total(gradient) => {
                let weights = options.weights(heads);
                return Ok(by_head(weights.iter().map(|w| w * gradient).collect()));
            }
            Upstream::Loss(tensor) => tensor,
        };
        let per_row = options.reduction == Reduction::None;
        let shape = match per_row {
            true => &[heads, rows][..],
            false => &[heads],
        };
        contiguous(client, "upstream gradient", tensor, shape, F32)?;
        if active == 1 {
            return Ok(by_head(vec![0.0; heads]));
        }
        Ok(Self {
            gradient: tensor.handle.clone(),
            elements: shape.iter().product(),
            per_row,
        })
    }

    pub(crate) fn buffer_arg(&self) -> BufferArg {
        // SAFETY: `new` made or proved so many elements.
        unsafe { BufferArg::from_raw_parts(self.gradient.clone(), self.elements) }
    }
}

/// What a row is of its head's loss: all of it in a sum, one of `counted` in a mean.
#[cube]
pub(crate) fn share_of_row(counted: u32, #[comptime] mean: bool) -> f32 {
    let mut share = 1.0f32.runtime();
    if comptime!(mean) {
        share = 1.0 / max(f32::cast_from(counted), 1.0);
    }
    share
}

/// The gradient that arrives at a row's loss; 0 if its target is no class.
#[cube]
pub(crate) fn arriving_at(
    gradient: &[f32], // [heads], or [heads, rows] if per_row
    head: usize,
    row: usize,
    rows: usize,
    target: u32,
    share: f32,
    #[comptime] per_row: bool,
) -> f32 {
    let mut arrived = 0.0f32.runtime();
    if is_class(target) {
        match comptime!(per_row) {
            true => arrived = gradient[head * rows + row],
            false => arrived = gradient[head] * share,
        }
    }
    arrived
}
