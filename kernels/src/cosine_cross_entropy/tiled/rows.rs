//! What a backward pass needs to know of each row: `lse` and its rest, the gradient that arrives, and the target, padded to whole tiles
//! with rows that take no part; and what undoes the scaling of the gradients that arrive.

use cubecl::client::Client;
use cubecl::ir::FloatKind;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::super::launch::Call;
use super::super::margin::F16_SLOPE;
use crate::blueprint::{PLANE_UNITS, cubes_for};
use crate::loss::arriving::{Arrives, Arriving, arriving_at, share_of_row};
use crate::loss::target::{IGNORED, LabelRule, label_rule, target_of};
use crate::loss::{READ_AHEAD, Reduction, Saved};
use crate::math::group::{Group, group_max};
use crate::operand::whole;

/// The padded rows on the device.
pub(in crate::cosine_cross_entropy) struct Rows {
    // f32, [heads, 3, rows_padded]: lse, what rounding took from it, and the gradient that arrives, over the head's largest finite one
    state: Handle,
    targets: Handle, // u32, [rows_padded]
    /// f32, [heads]: what gradients of cosines are multiplied with in the end.
    pub(super) factors: Handle,
    /// f32, [heads, rows_padded], zero: where a margin leaves its part of the gradient of the scale, if both are there.
    pub(super) of_margin: Option<Handle>,
    heads: usize,
    rows_padded: usize,
}

impl Rows {
    pub(super) fn state_arg(&self) -> BufferArg {
        // SAFETY: `gather_rows` allocated exactly this.
        unsafe { BufferArg::from_raw_parts(self.state.clone(), self.heads * 3 * self.rows_padded) }
    }

    pub(super) fn targets_arg(&self) -> BufferArg {
        // SAFETY: as above.
        unsafe { BufferArg::from_raw_parts(self.targets.clone(), self.rows_padded) }
    }

    /// A number that nobody reads or writes where there is no such part.
    pub(super) fn of_margin_arg(&self, client: &Client) -> BufferArg {
        let (handle, count) = match &self.of_margin {
            Some(handle) => (handle.clone(), self.heads * self.rows_padded),
            None => (client.empty(size_of::<f32>()), 1),
        };
        // SAFETY: as above.
        unsafe { BufferArg::from_raw_parts(handle, count) }
    }
}

/// Gathers the rows of `call`, whose forward pass left `saved`.
pub(in crate::cosine_cross_entropy) fn gather_rows(
    call: &Call,
    packed: ElemType,
    saved: &Saved,
    arriving: &Arriving,
    of_scale: bool,
) -> Rows {
    let client = call.client;
    let sizes = &call.problem.sizes;
    let (heads, rows_padded) = (sizes.heads, sizes.rows_padded);
    let loss = &call.options.loss;
    let has_part = of_scale && !call.options.margin.is_none();
    let floats = heads * rows_padded * size_of::<f32>();
    let out = Rows {
        state: client.empty(3 * floats),
        targets: client.empty(rows_padded * size_of::<u32>()),
        factors: client.empty(heads * size_of::<f32>()),
        of_margin: has_part.then(|| client.empty(floats)),
        heads,
        rows_padded,
    };
    // Softmax probabilities of many classes would be subnormal in f16: its exponents are used from the top, less what a slope takes.
    let largest: f32 = match packed {
        F16 if call.options.margin.is_none() => 4096.0,
        F16 => WITH_SLOPES,
        _ => 1.0,
    };
    // SAFETY: every buffer has the length of its comment; the kernel stays below rows and rows_padded.
    unsafe {
        gather::launch_unchecked(
            client,
            cubes_for(client, heads),
            CubeDim::new_1d(PLANE_UNITS as u32),
            whole(&saved.lse, 1),
            call.labels.buffer_arg(),
            whole(&saved.status, 1),
            arriving.buffer_arg(&saved.lse.handle),
            out.state_arg(),
            out.targets_arg(),
            BufferArg::from_raw_parts(out.factors.clone(), heads),
            out.of_margin_arg(client),
            heads,
            sizes.rows,
            rows_padded,
            label_rule(call.labels.dtype(), sizes.active, loss.ignore_index),
            arriving.everywhere,
            call.options.scale / largest,
            largest,
            arriving.arrives,
            loss.reduction == Reduction::Mean,
            has_part,
            Group::cube(&call.blueprint),
            call.labels.dtype(),
        );
    }
    out
}

/// What the largest gradient of a logit becomes in f16 where slopes multiply it.
const WITH_SLOPES: f32 = 1024.0;
const _: () = assert!(WITH_SLOPES * F16_SLOPE < 65504.0); // f16's largest

const F16: ElemType = ElemType::Float(FloatKind::F16);

/// A cube gathers the rows of a head, and divides what arrives by the largest finite gradient.
#[cube(launch_unchecked)]
fn gather<I: Int>(
    lse: &[f32],           // [2, heads, rows]
    labels: &[I],          // [rows]
    status: &[u32],        // [STATUS_FIELDS]
    gradient: &[f32],      // [heads] or [heads, rows], if it does not arrive everywhere
    state: &mut [f32],     // [heads, 3, rows_padded]
    targets: &mut [u32],   // [rows_padded]
    factors: &mut [f32],   // [heads]
    of_margin: &mut [f32], // [heads, rows_padded] if has_part
    heads: usize,
    rows: usize,
    rows_padded: usize,
    rule: LabelRule,
    everywhere: f32,
    factor: f32,  // of what a head's largest gradient was
    becomes: f32, // what it becomes
    #[comptime] arrives: Arrives,
    #[comptime] mean: bool,
    #[comptime] has_part: bool,
    #[comptime] group: Group,
    #[define(I)] _label: ElemType,
) {
    let head = CUBE_POS;
    if head >= heads {
        terminate!();
    }
    let share = share_of_row(status[0], mean);
    let of_lse = head * 3 * rows_padded;
    let of_low = of_lse + rows_padded;
    let of_arriving = of_low + rows_padded;
    let mut largest = 0.0f32.runtime();
    let mut first = UNIT_POS as usize;
    while first < rows_padded {
        let mut some = Array::<I>::new(READ_AHEAD);
        let mut some_lse = Array::<f32>::new(READ_AHEAD);
        let mut some_low = Array::<f32>::new(READ_AHEAD);
        #[unroll]
        for i in 0..READ_AHEAD {
            let row = min(first + i * PLANE_UNITS, rows - 1);
            some[i] = labels[row];
            some_lse[i] = lse[head * rows + row];
            some_low[i] = lse[(heads + head) * rows + row];
        }
        #[unroll]
        for i in 0..READ_AHEAD {
            let row = first + i * PLANE_UNITS;
            if row < rows_padded {
                let mut target = IGNORED.runtime();
                let mut row_lse = 0.0f32.runtime();
                let mut row_low = 0.0f32.runtime();
                let mut arrived = 0.0f32.runtime();
                if row < rows {
                    target = target_of::<I>(some[i], &rule);
                    row_lse = some_lse[i];
                    row_low = some_low[i];
                    arrived = arriving_at(
                        everywhere, gradient, head, row, rows, target, share, arrives,
                    );
                }
                if head == 0 {
                    targets[row] = target;
                }
                state[of_lse + row] = row_lse;
                state[of_low + row] = row_low;
                state[of_arriving + row] = arrived;
                if comptime!(has_part) {
                    of_margin[head * rows_padded + row] = 0.0;
                }
                // An infinite one is its own row's matter.
                if arrived.abs() <= f32::MAX {
                    largest = max(largest, arrived.abs());
                }
            }
        }
        first += READ_AHEAD * PLANE_UNITS;
    }
    let largest = group_max(largest, group);
    let mut inverse = 0.0f32.runtime();
    // What is next to nothing has no inverse, and counts as nothing.
    if largest > 0.0 && becomes / largest <= f32::MAX {
        inverse = becomes / largest;
    }
    first = UNIT_POS as usize;
    while first < rows_padded {
        let mut some = Array::<f32>::new(READ_AHEAD);
        #[unroll]
        for i in 0..READ_AHEAD {
            let row = first + i * PLANE_UNITS;
            some[i] = 0.0;
            if row < rows_padded {
                some[i] = state[of_arriving + row];
            }
        }
        #[unroll]
        for i in 0..READ_AHEAD {
            let row = first + i * PLANE_UNITS;
            if row < rows_padded {
                state[of_arriving + row] = some[i] * inverse;
            }
        }
        first += READ_AHEAD * PLANE_UNITS;
    }
    if UNIT_POS == 0 {
        factors[head] = largest * factor;
    }
}
