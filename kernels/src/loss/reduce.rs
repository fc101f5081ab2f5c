//! Row losses become head losses and the total, and the labels are counted; one cube, in a fixed order.
//!
//! Each unit's sum carries Kahan's compensation, and those of the units are added in a tree: a mean over a hundred thousand rows
//! keeps f32's precision.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;
use cubecl::std::tensor::TensorHandle;

use super::count_labels;
use super::options::{LossOptions, Reduction};
use super::target::{LabelRule, label_rule};
use crate::blueprint::Blueprint;
use crate::math::group::{Group, group_sum};
use crate::math::sum::{Kahan, sum_of_unit};
use crate::memory::empty;
use crate::operand::{F32, Labels, U32, whole};

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

/// Reduces `row_loss [heads, rows]` on a GPU; on a CPU the launch that finds the losses does.
pub(crate) fn launch(
    client: &Client,
    blueprint: &Blueprint,
    row_loss: &TensorHandle,
    labels: &Labels,
    active: usize,
    options: &LossOptions,
    head_weights: Option<&Handle>, // f32, [heads]
) -> Reduced {
    let [heads, rows] = [row_loss.shape()[0], row_loss.shape()[1]];
    let reduced = Reduced::empty(client, heads);
    let all = Group::cube(blueprint);
    // SAFETY: every buffer has the length that its comment says, and the kernel stays inside heads × rows.
    unsafe {
        reduce::launch_unchecked(
            client,
            CubeCount::new_single(),
            CubeDim::new_1d(all.size as u32),
            whole(row_loss, 1),
            labels.buffer_arg(),
            match head_weights {
                Some(weights) => BufferArg::from_raw_parts(weights.clone(), heads),
                None => whole(row_loss, 1), // not read
            },
            whole(&reduced.loss, 1),
            whole(&reduced.total, 1),
            whole(&reduced.status, 1),
            heads,
            rows,
            label_rule(labels.dtype(), active, options.ignore_index),
            HowReduced {
                all,
                mean: options.reduction == Reduction::Mean,
                by_head: true,
                weighted: head_weights.is_some(),
            },
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
    #[comptime] how: HowReduced,
    #[define(I)] _label: ElemType,
) {
    reduce_rows::<I>(
        row_loss, labels, weights, loss, total, status, heads, rows, &rule, how,
    );
}

/// The losses of all rows, and the labels. All units of `how.all` must call.
#[cube]
pub(crate) fn reduce_rows<I: Int>(
    row_loss: &[f32],   // [heads, rows]
    labels: &[I],       // [rows]
    weights: &[f32],    // [heads] if weighted
    loss: &mut [f32],   // [heads]
    total: &mut [f32],  // [1]
    status: &mut [u32], // [STATUS_FIELDS]
    heads: usize,
    rows: usize,
    rule: &LabelRule,
    #[comptime] how: HowReduced,
) {
    let counted = count_labels::<I>(labels, rows, rule, how.all);
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
        how,
    );
}

/// How losses of rows become losses of heads and the total.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct HowReduced {
    /// The units of the cube.
    pub all: Group,
    pub mean: bool,
    /// Whether the heads' losses are wanted beside the total.
    pub by_head: bool,
    /// Whether heads have weights.
    pub weighted: bool,
}

/// The losses `[heads, rows]` from `first` on, to each head's loss and to the total. All units of `how.all` must call;
/// `counted` is the rows that are not ignored.
#[cube]
#[allow(clippy::too_many_arguments)] // what a reduction reads and writes
pub(crate) fn reduce_heads(
    row_loss: &[f32],
    first: usize,
    weights: &[f32],   // [heads] if weighted
    loss: &mut [f32],  // [heads] if by_head
    total: &mut [f32], // [1]
    heads: usize,
    rows: usize,
    counted: f32,
    #[comptime] how: HowReduced,
) {
    let mut all = Kahan::new();
    for head in 0..heads {
        let unit = UNIT_POS as usize % how.all.size;
        let sum = sum_of_unit(row_loss, first + head * rows, rows, unit, how.all.size);
        let mut reduced = group_sum(sum, how.all);
        if comptime!(how.mean) {
            reduced /= max(counted, 1.0);
        }
        if comptime!(how.by_head) && UNIT_POS == 0 {
            loss[head] = reduced;
        }
        match comptime!(how.weighted) {
            true => all.add(reduced * weights[head]),
            false => all.add(reduced),
        }
    }
    if UNIT_POS == 0 {
        total[0] = all.total();
    }
}
