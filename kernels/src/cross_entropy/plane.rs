//! A group of units takes a row: they stride over the classes in vectors, and merge once.

use cubecl::prelude::*;

use super::launch::{BackwardCall, ForwardCall};
use crate::blueprint::PLANE_UNITS;
use crate::loss::Reduction;
use crate::loss::arriving::{Arrives, arriving_at, share_of_row};
use crate::loss::target::{LabelRule, is_class, label_rule, target_of};
use crate::math::group::{Group, group_softmax, member};
use crate::math::lanes::iota;
use crate::math::online_softmax::{RowSoftmax, logit_gradient};
use crate::operand::{RowStrides, whole};

pub(super) fn launch_forward(call: &ForwardCall) {
    let [heads, rows, classes] = call.logits.dims3();
    let vector = call.logits.vector_size(call.blueprint);
    let group = Group::of(call.blueprint, classes / vector);
    // SAFETY: `Strided` proved the logits, the outputs are as the kernel's comments say, labels have `rows` elements.
    unsafe {
        forward::launch_unchecked(
            call.client,
            group.cubes(call.client, heads * rows),
            CubeDim::new_1d(PLANE_UNITS as u32),
            vector,
            call.logits.buffer_arg(vector),
            call.logits.strides_arg(vector),
            call.labels.buffer_arg(),
            whole(call.row_loss, 1),
            whole(call.lse, 1),
            whole(call.predictions, 1),
            heads,
            rows,
            classes,
            label_rule(call.labels.dtype(), classes, call.loss.ignore_index),
            call.loss.label_smoothing,
            group,
            call.logits.dtype(),
            call.labels.dtype(),
        );
    }
}

pub(super) fn launch_backward(call: &BackwardCall) {
    let [heads, rows, classes] = call.logits.dims3();
    let vector = call.logits.vector_size(call.blueprint);
    let group = Group::of(call.blueprint, classes / vector);
    // SAFETY: `Strided` proved the logits, `Saved` what it has, `grad` is [heads, rows, classes].
    unsafe {
        backward::launch_unchecked(
            call.client,
            group.cubes(call.client, heads * rows),
            CubeDim::new_1d(PLANE_UNITS as u32),
            vector,
            call.logits.buffer_arg(vector),
            call.logits.strides_arg(vector),
            whole(&call.saved.lse, 1),
            call.labels.buffer_arg(),
            whole(&call.saved.status, 1),
            call.arriving.buffer_arg(&call.saved.lse.handle),
            whole(call.grad, vector),
            heads,
            rows,
            classes,
            label_rule(call.labels.dtype(), classes, call.loss.ignore_index),
            call.loss.label_smoothing,
            call.arriving.everywhere,
            call.arriving.arrives,
            call.loss.reduction == Reduction::Mean,
            group,
            call.logits.dtype(),
            call.labels.dtype(),
        );
    }
}

#[cube(launch_unchecked)]
fn forward<F: Float, I: Int, N: Size>(
    logits: &[Vector<F, N>], // [heads, rows, classes] at its strides
    strides: RowStrides,
    labels: &[I],            // [rows]
    row_loss: &mut [f32],    // [heads, rows]
    lse: &mut [f32],         // [2, heads, rows]
    predictions: &mut [u32], // [heads, rows]
    heads: usize,
    rows: usize,
    classes: usize,
    rule: LabelRule,
    smoothing: f32,
    #[comptime] group: Group,
    #[define(F)] _dtype: ElemType,
    #[define(I)] _label: ElemType,
) {
    let of = member(group);
    let out = of.group;
    let row = out % rows;
    let from = out / rows * strides.head + row * strides.row;
    let active = classes as u32;
    let mut target = 0u32.runtime();
    let mut columns = 0usize.runtime();
    if out < heads * rows {
        target = target_of::<I>(labels[row], &rule);
        columns = classes / N::value();
    }
    let mut state = RowSoftmax::new();
    let mut d = of.lane;
    while d < columns {
        let z = Vector::<f32, N>::cast_from(logits[from + d]);
        state.fold::<N>(z, (d * N::value()) as u32, target);
        d += group.size;
    }
    let softmax = group_softmax(state, group);
    if out < heads * rows && of.lane == 0 {
        lse[out] = softmax.lse();
        lse[heads * rows + out] = softmax.lse_low();
        predictions[out] = softmax.best;
        let mut loss = 0.0f32.runtime();
        if is_class(target) {
            loss = softmax.loss(active, smoothing);
        }
        row_loss[out] = loss;
    }
}

#[cube(launch_unchecked)]
fn backward<F: Float, I: Int, N: Size>(
    logits: &[Vector<F, N>],
    strides: RowStrides,
    lse: &[f32],      // [2, heads, rows]
    labels: &[I],     // [rows]
    status: &[u32],   // [STATUS_FIELDS]
    arriving: &[f32], // [heads] or [heads, rows], if it does not arrive everywhere
    grad: &mut [Vector<F, N>],
    heads: usize,
    rows: usize,
    classes: usize,
    rule: LabelRule,
    smoothing: f32,
    everywhere: f32,
    #[comptime] arrives: Arrives,
    #[comptime] mean: bool,
    #[comptime] group: Group,
    #[define(F)] _dtype: ElemType,
    #[define(I)] _label: ElemType,
) {
    let of = member(group);
    if of.group >= heads * rows {
        terminate!();
    }
    let (head, row) = (of.group / rows, of.group % rows);
    let from = head * strides.head + row * strides.row;
    let target = target_of::<I>(labels[row], &rule);
    let share = share_of_row(status[0], mean);
    let arrived = arriving_at(
        everywhere, arriving, head, row, rows, target, share, arrives,
    );
    let lse_low = Vector::<f32, N>::new(lse[heads * rows + of.group]);
    let lse = Vector::<f32, N>::new(lse[of.group]);
    let upstream = Vector::<f32, N>::new(arrived);
    let target = Vector::<u32, N>::new(target);
    let columns = classes / N::value();
    let lanes = iota::<N>();
    let mut d = of.lane;
    while d < columns {
        let class = Vector::<u32, N>::new((d * N::value()) as u32) + lanes;
        let gradient = logit_gradient::<N>(
            Vector::<f32, N>::cast_from(logits[from + d]),
            lse,
            lse_low,
            upstream,
            class.equal(&target),
            classes as u32,
            smoothing,
        );
        grad[of.group * columns + d] = Vector::<F, N>::cast_from(gradient);
        d += group.size;
    }
}
