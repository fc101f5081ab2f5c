//! What a backward pass needs to know of each row: `lse`, the gradient that arrives, and the target,
//! padded to whole tiles with rows that take no part.

use cubecl::prelude::*;
use cubecl::server::Handle;

use super::super::launch::Call;
use crate::blueprint::{PLANE_UNITS, cubes_for};
use crate::loss::arriving::{Arrives, Arriving, arriving_at, share_of_row};
use crate::loss::target::{IGNORED, LabelRule, label_rule, target_of};
use crate::loss::{Reduction, Saved};
use crate::operand::whole;

/// The padded rows on the device.
pub(in crate::cosine_cross_entropy) struct Rows {
    state: Handle,   // f32, [heads, 2, rows_padded]: lse, then the gradient that arrives
    targets: Handle, // u32, [rows_padded]
    heads: usize,
    rows_padded: usize,
}

impl Rows {
    pub(super) fn state_arg(&self) -> BufferArg {
        // SAFETY: `gather_rows` allocated exactly this.
        unsafe { BufferArg::from_raw_parts(self.state.clone(), self.heads * 2 * self.rows_padded) }
    }

    pub(super) fn targets_arg(&self) -> BufferArg {
        // SAFETY: as above.
        unsafe { BufferArg::from_raw_parts(self.targets.clone(), self.rows_padded) }
    }
}

/// Gathers the rows of `call`, whose forward pass left `saved`.
pub(in crate::cosine_cross_entropy) fn gather_rows(
    call: &Call,
    saved: &Saved,
    arriving: &Arriving,
) -> Rows {
    let client = call.client;
    let sizes = &call.problem.sizes;
    let (heads, rows_padded) = (sizes.heads, sizes.rows_padded);
    let loss = &call.options.loss;
    let out = Rows {
        state: client.empty(heads * 2 * rows_padded * size_of::<f32>()),
        targets: client.empty(rows_padded * size_of::<u32>()),
        heads,
        rows_padded,
    };
    // SAFETY: every buffer has the length of its comment; the kernel stays below rows and rows_padded.
    unsafe {
        gather::launch_unchecked(
            client,
            cubes_for(client, rows_padded.div_ceil(PLANE_UNITS)),
            CubeDim::new_1d(PLANE_UNITS as u32),
            whole(&saved.lse, 1),
            call.labels.buffer_arg(),
            whole(&saved.status, 1),
            arriving.buffer_arg(&saved.lse.handle),
            out.state_arg(),
            out.targets_arg(),
            heads,
            sizes.rows,
            rows_padded,
            label_rule(call.labels.dtype(), sizes.active, loss.ignore_index),
            arriving.everywhere,
            arriving.arrives,
            loss.reduction == Reduction::Mean,
            call.labels.dtype(),
        );
    }
    out
}

#[cube(launch_unchecked)]
fn gather<I: Int>(
    lse: &[f32],         // [heads, rows]
    labels: &[I],        // [rows]
    status: &[u32],      // [STATUS_FIELDS]
    gradient: &[f32],    // [heads] or [heads, rows], if it does not arrive everywhere
    state: &mut [f32],   // [heads, 2, rows_padded]
    targets: &mut [u32], // [rows_padded]
    heads: usize,
    rows: usize,
    rows_padded: usize,
    rule: LabelRule,
    everywhere: f32,
    #[comptime] arrives: Arrives,
    #[comptime] mean: bool,
    #[define(I)] _label: ElemType,
) {
    let share = share_of_row(status[0], mean);
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
                arrived = arriving_at(
                    everywhere, gradient, head, row, rows, target, share, arrives,
                );
            }
            state[head * 2 * rows_padded + row] = row_lse;
            state[(head * 2 + 1) * rows_padded + row] = arrived;
        }
        row += CUBE_COUNT * CUBE_DIM as usize;
    }
}
