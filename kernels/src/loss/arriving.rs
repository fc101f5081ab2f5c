//! The gradient that arrives at a loss, and what of it is a row's.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::Upstream;
use super::options::{LossOptions, Reduction};
use super::target::is_class;
use crate::error::Error;
use crate::operand::{F32, contiguous};

/// Whom one number of the gradient that arrives is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Arrives {
    /// All heads, as that of a total without head weights: the number itself is given to the kernel, with no buffer to write before.
    Everywhere,
    ByHead,
    ByRow,
}

/// The gradient that arrives, as a kernel reads it.
pub(crate) struct Arriving {
    pub arrives: Arrives,
    /// The number for all heads, if it is one.
    pub everywhere: f32,
    /// f32, [heads] or [heads, rows] otherwise.
    pub tensor: Option<(Handle, usize)>,
}

/// What arrives where no gradient is asked for.
static NOTHING: Arriving = Arriving {
    arrives: Arrives::Everywhere,
    everywhere: 0.0,
    tensor: None,
};

impl Arriving {
    pub(crate) fn or_nothing(arriving: Option<&Self>) -> &Self {
        arriving.unwrap_or(&NOTHING)
    }

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
        let everywhere = |everywhere| Self {
            arrives: Arrives::Everywhere,
            everywhere,
            tensor: None,
        };
        let lies_in = |arrives, handle, elements| Self {
            arrives,
            everywhere: 0.0,
            tensor: Some((handle, elements)),
        };
        let gradient = match upstream {
            Upstream::Total(_) if active == 1 => return Ok(everywhere(0.0)),
            Upstream::Total(gradient) => {
                let Some(weights) = &options.head_weights else {
                    return Ok(everywhere(*gradient));
                };
                let by_head: Vec<f32> = weights.iter().map(|w| w * gradient).collect();
                let handle = client.create_from_slice(f32::as_bytes(&by_head));
                return Ok(lies_in(Arrives::ByHead, handle, heads));
            }
            Upstream::Loss(tensor) => tensor,
        };
        let (arrives, shape) = match options.reduction {
            Reduction::None => (Arrives::ByRow, &[heads, rows][..]),
            _ => (Arrives::ByHead, &[heads][..]),
        };
        contiguous(client, "upstream gradient", gradient, shape, F32)?;
        if active == 1 {
            return Ok(everywhere(0.0));
        }
        let elements = shape.iter().product();
        Ok(lies_in(arrives, gradient.handle.clone(), elements))
    }

    /// The tensor; where there is none, another of f32, that the kernel does not touch.
    pub(crate) fn buffer_arg(&self, other: &Handle) -> BufferArg {
        let (handle, elements) = match &self.tensor {
            Some((handle, elements)) => (handle, *elements),
            None => (other, 1),
        };
        // SAFETY: `new` made or proved so many elements.
        unsafe { BufferArg::from_raw_parts(handle.clone(), elements) }
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
    everywhere: f32,
    tensor: &[f32], // [heads] or [heads, rows], if it does not arrive everywhere
    head: usize,
    row: usize,
    rows: usize,
    target: u32,
    share: f32,
    #[comptime] arrives: Arrives,
) -> f32 {
    let mut arrived = 0.0f32.runtime();
    if is_class(target) {
        match comptime!(arrives) {
            Arrives::Everywhere => arrived = everywhere * share,
            Arrives::ByHead => arrived = tensor[head] * share,
            Arrives::ByRow => arrived = tensor[head * rows + row],
        }
    }
    arrived
}
