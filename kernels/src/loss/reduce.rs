//! Row losses become head losses and the total, and the labels are counted; one cube, in a fixed order.
//!
//! Sums carry Kahan's compensation: a mean over a hundred thousand rows keeps f32's precision.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;
use cubecl::std::tensor::TensorHandle;

use super::count_labels;
use super::options::{LossOptions, Reduction};
use super::target::{LabelRule, label_rule};
use crate::blueprint::{Blueprint, Variant};
use crate::math::group::Group;
use crate::math::sum::Kahan;
use crate::operand::{F32, Labels, U32, empty, whole};

/// Fields of the status: rows that count, rows with a bad label, the first of those.
pub(crate) const STATUS_FIELDS: usize = 3;

/// What the reduction leaves behind.
pub(crate) struct Reduced {
    pub loss: TensorHandle,   // [heads], f32
    pub total: TensorHandle,  // [1], f32
    pub status: TensorHandle, // [STATUS_FIELDS], u32
}

impl Reduced {
    pub(crate) fn empty(client: &Client, heads: usize) -> Self {
        Self {
            loss: empty(client, [heads], F32),
            total: empty(client, [1], F32),
            status: empty(client, [STATUS_FIELDS], U32),
        }
    }
}

/// Reduces `row_loss [heads, rows]`.
pub(crate) fn launch(
    client: &Client,
    blueprint: &Blueprint,
    row_loss: &TensorHandle,
    labels: &Labels,
    active: usize,
    options: &LossOptions,
    head_weights: &Handle, // f32, [heads]
) -> Reduced {
    let [heads, rows] = [row_loss.shape()[0], row_loss.shape()[1]];
    let reduced = Reduced::empty(client, heads);
    let all = match blueprint.variant {
        Variant::Unit => Group {
            size: 1,
            exchange: 1,
        },
        _ => Group::cube(blueprint),
    };
    // SAFETY: every buffer has the length that its comment says, and the kernel stays inside heads × rows.
    unsafe {
        reduce::launch_unchecked(
            client,
            CubeCount::new_single(),
            CubeDim::new_1d(all.size as u32),
            whole(row_loss, 1),
            labels.buffer_arg(),
            BufferArg::from_raw_parts(head_weights.clone(), heads),
            whole(&reduced.loss, 1),
            whole(&reduced.total, 1),
            whole(&reduced.status, 1),
            heads,
            rows,
            label_rule(labels.dtype(), active, options.ignore_index),
            all,
            options.reduction == Reduction::Mean,
            labels.dtype(),
        );
    }
    reduced
}

#[cube(launch_unchecked)]
fn reduce<I: Int>(
    row_loss: &[f32],   // [heads, rows]
    labels: &[I],       // [rows]
    weights: &[f32],    // [heads]
    loss: &mut [f32],   // [heads]
    total: &mut [f32],  // [1]
    status: &mut [u32], // [STATUS_FIELDS]
    heads: usize,
    rows: usize,
    rule: LabelRule,
    #[comptime] all: Group,
    #[comptime] mean: bool,
    #[define(I)] _label: ElemType,
) {
    let counted = count_labels::<I>(labels, rows, &rule, all);
    if UNIT_POS == 0 {
        status[0] = counted.classes;
        status[1] = counted.invalid;
        status[2] = counted.first_invalid;
    }
    reduce_heads(
        row_loss,
        0,
        weights,
        loss,
        total,
        heads,
        rows,
        f32::cast_from(counted.classes),
        all.size,
        mean,
        true,
    );
}

/// The losses `[heads, rows]` from `first` on, to each head's loss if `by_head`, and to the total. One cube of so many units;
/// `counted` is the rows that are not ignored.
#[cube]
#[allow(clippy::too_many_arguments)] // what a reduction reads and writes
pub(crate) fn reduce_heads(
    row_loss: &[f32],
    first: usize,
    weights: &[f32],   // [heads]
    loss: &mut [f32],  // [heads]
    total: &mut [f32], // [1]
    heads: usize,
    rows: usize,
    counted: f32,
    #[comptime] units: usize,
    #[comptime] mean: bool,
    #[comptime] by_head: bool,
) {
    let unit = UNIT_POS as usize;
    let mut partial = Shared::<[f32]>::new_slice(units);
    let mut all = Kahan::new();
    for head in 0..heads {
        let mut sum = Kahan::new();
        let mut row = unit;
        while row < rows {
            sum.add(row_loss[first + head * rows + row]);
            row += units;
        }
        partial[unit] = sum.total();
        if comptime!(units > 1) {
            sync_cube();
        }
        if unit == 0 {
            let mut of_head = Kahan::new();
            for i in 0..units {
                of_head.add(partial[i]);
            }
            let mut reduced = of_head.total();
            if comptime!(mean) {
                reduced /= max(counted, 1.0);
            }
            if comptime!(by_head) {
                loss[head] = reduced;
            }
            all.add(reduced * weights[head]);
        }
        if comptime!(units > 1) {
            sync_cube();
        }
    }
    if unit == 0 {
        total[0] = all.total();
    }
}
