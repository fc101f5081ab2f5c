//! What a backward pass needs to know of each row: `lse`, the gradient that arrives, and the target,
//! padded to whole tiles with rows that take no part.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;
use cubecl::std::tensor::TensorHandle;

use super::Upstream;
use super::options::{LossOptions, Reduction};
use super::target::{IGNORED, LabelRule, is_class, label_rule, target_of};
use crate::blueprint::{Blueprint, PLANE_UNITS, Variant, cubes_for};
use crate::error::Error;
use crate::operand::{F32, Labels, contiguous, whole};

/// The padded rows on the device.
pub(crate) struct Rows {
    pub state: Handle, // f32, [heads, 2, rows_padded]: lse, then the gradient that arrives
    pub targets: Handle, // u32, [rows_padded]
    heads: usize,
    rows_padded: usize,
}

impl Rows {
    pub(crate) fn state_arg(&self, lanes: usize) -> BufferArg {
        // SAFETY: `launch` allocated exactly this; rows_padded is a multiple of the lanes.
        unsafe {
            BufferArg::from_raw_parts(
                self.state.clone(),
                self.heads * 2 * self.rows_padded / lanes,
            )
        }
    }

    pub(crate) fn targets_arg(&self, lanes: usize) -> BufferArg {
        // SAFETY: as above.
        unsafe { BufferArg::from_raw_parts(self.targets.clone(), self.rows_padded / lanes) }
    }
}

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
        contiguous("upstream gradient", tensor, shape, F32)?;
        if active == 1 {
            return Ok(by_head(vec![0.0; heads]));
        }
        Ok(Self {
            gradient: tensor.handle.clone(),
            elements: shape.iter().product(),
            per_row,
        })
    }
}

/// Gathers the rows of a loss whose forward pass left `lse [heads, rows]` and `status`.
#[allow(clippy::too_many_arguments)] // one per thing a row's gradient depends on
pub(crate) fn launch(
    client: &Client,
    blueprint: &Blueprint,
    lse: &TensorHandle,
    status: &TensorHandle,
    labels: &Labels,
    active: usize,
    options: &LossOptions,
    arriving: &Arriving,
    rows_padded: usize,
) -> Rows {
    let [heads, rows] = [lse.shape()[0], lse.shape()[1]];
    let float = size_of::<f32>();
    let out = Rows {
        state: client.empty(heads * 2 * rows_padded * float),
        targets: client.empty(rows_padded * float),
        heads,
        rows_padded,
    };
    let (count, dim) = match blueprint.variant {
        Variant::Unit => blueprint.unit_grid(client),
        _ => (
            cubes_for(client, rows_padded.div_ceil(PLANE_UNITS)),
            CubeDim::new_1d(PLANE_UNITS as u32),
        ),
    };
    // SAFETY: every buffer has the length of its comment; the kernel stays below rows and rows_padded.
    unsafe {
        gather::launch_unchecked(
            client,
            count,
            dim,
            whole(lse, 1),
            labels.buffer_arg(),
            whole(status, 1),
            BufferArg::from_raw_parts(arriving.gradient.clone(), arriving.elements),
            out.state_arg(1),
            out.targets_arg(1),
            heads,
            rows,
            rows_padded,
            label_rule(labels.dtype(), active, options.ignore_index),
            arriving.per_row,
            options.reduction == Reduction::Mean,
            labels.dtype(),
        );
    }
    out
}

#[cube(launch_unchecked)]
fn gather<I: Int>(
    lse: &[f32],         // [heads, rows]
    labels: &[I],        // [rows]
    status: &[u32],      // [STATUS_FIELDS]
    gradient: &[f32],    // [heads], or [heads, rows] if per_row
    state: &mut [f32],   // [heads, 2, rows_padded]
    targets: &mut [u32], // [rows_padded]
    heads: usize,
    rows: usize,
    rows_padded: usize,
    rule: LabelRule,
    #[comptime] per_row: bool,
    #[comptime] mean: bool,
    #[define(I)] _label: ElemType,
) {
    let mut share = 1.0f32.runtime();
    if comptime!(mean) {
        share = 1.0 / max(f32::cast_from(status[0]), 1.0);
    }
    let mut row = ABSOLUTE_POS;
    while row < rows_padded {
        let mut target = IGNORED.runtime();
        if row < rows {
            target = target_of::<I>(labels[row], &rule);
        }
        targets[row] = target;
        for head in 0..heads {
            let mut row_lse = 0.0f32.runtime();
            let mut arrived = 0.0f32.runtime();
            if row < rows {
                row_lse = lse[head * rows + row];
                if is_class(target) {
                    if comptime!(per_row) {
                        arrived = gradient[head * rows + row];
                    } else {
                        arrived = gradient[head] * share;
                    }
                }
            }
            state[head * 2 * rows_padded + row] = row_lse;
            state[(head * 2 + 1) * rows_padded + row] = arrived;
        }
        row += CUBE_COUNT * CUBE_DIM as usize;
    }
}
