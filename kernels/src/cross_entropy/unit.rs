//! One unit a row, in the widest vectors that rows start and end on; then one reduces the losses of all.

use cubecl::prelude::*;
use cubecl::server::Handle;

use super::launch::{BackwardCall, ForwardCall};
use crate::loss::Reduction;
use crate::loss::arriving::{Arrives, arriving_at, share_of_row};
use crate::loss::reduce::{HowReduced, Reduced, reduce_rows};
use crate::loss::target::{LabelRule, is_class, label_rule, target_of};
use crate::math::group::Group;
use crate::math::lanes::iota;
use crate::math::narrow::narrow;
use crate::math::online_softmax::{OnlineSoftmax, logit_gradient};
use crate::math::span::meet;
use crate::operand::{RowStrides, whole};

/// Vectors of a row that are summed apart.
const PART: usize = 1024;

pub(super) fn launch_forward(call: &ForwardCall, head_weights: Option<&Handle>) -> Reduced {
    let (count, dim) = call.blueprint.unit_grid(call.client);
    let [heads, rows, classes] = call.logits.dims3();
    let vector = call.logits.vector_size(call.blueprint);
    let reduced = Reduced::empty(call.client, heads);
    // SAFETY: `Strided` proved the logits, the outputs are [heads, rows] or as their comments say, labels have `rows` elements.
    unsafe {
        forward::launch_unchecked(
            call.client,
            count,
            dim,
            vector,
            call.logits.buffer_arg(vector),
            call.logits.strides_arg(vector),
            call.labels.buffer_arg(),
            whole(call.row_loss, 1),
            whole(call.lse, 1),
            whole(call.predictions, 1),
            match head_weights {
                Some(weights) => BufferArg::from_raw_parts(weights.clone(), heads),
                None => whole(call.lse, 1), // not read
            },
            whole(&reduced.loss, 1),
            whole(&reduced.total, 1),
            whole(&reduced.status, 1),
            heads,
            rows,
            classes,
            label_rule(call.labels.dtype(), classes, call.loss.ignore_index),
            call.loss.label_smoothing,
            HowReduced {
                all: Group::ALONE,
                mean: call.loss.reduction == Reduction::Mean,
                by_head: true,
                weighted: head_weights.is_some(),
            },
            call.blueprint.units,
            call.logits.dtype(),
            call.labels.dtype(),
        );
    }
    reduced
}

pub(super) fn launch_backward(call: &BackwardCall) {
    let (count, dim) = call.blueprint.unit_grid(call.client);
    let [heads, rows, classes] = call.logits.dims3();
    let vector = call.logits.vector_size(call.blueprint);
    // SAFETY: `Strided` proved the logits, `Saved` what it has, `grad` is [heads, rows, classes].
    unsafe {
        backward::launch_unchecked(
            call.client,
            count,
            dim,
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
    head_weights: &[f32],    // [heads] if weighted
    loss: &mut [f32],        // [heads]
    total: &mut [f32],       // [1]
    status: &mut [u32],      // [STATUS_FIELDS]
    heads: usize,
    rows: usize,
    classes: usize,
    rule: LabelRule,
    smoothing: f32,
    #[comptime] how: HowReduced,
    #[comptime] units: usize,
    #[define(F)] _dtype: ElemType,
    #[define(I)] _label: ElemType,
) {
    let lanes = N::value();
    let counted = iota::<N>();
    let active = classes as u32;
    let mut at = UNIT_POS as usize;
    while at < heads * rows {
        let row = at % rows;
        let from = at / rows * strides.head + row * strides.row;
        let target = target_of::<I>(labels[row], &rule);
        let mut state = OnlineSoftmax::<N>::new();
        let mut start = 0usize.runtime();
        while start < classes / lanes {
            let end = min(start + PART, classes / lanes);
            let mut part = OnlineSoftmax::<N>::new();
            for v in start..end {
                part.fold(
                    Vector::<f32, N>::cast_from(logits[from + v]),
                    counted + Vector::<u32, N>::new((v * lanes) as u32),
                    target,
                );
            }
            state.merge(&part);
            start = end;
        }
        let softmax = state.finish();
        lse[at] = softmax.lse();
        lse[heads * rows + at] = softmax.lse_low();
        predictions[at] = softmax.best;
        let mut of_row = 0.0f32.runtime();
        if is_class(target) {
            of_row = softmax.loss(active, smoothing);
        }
        row_loss[at] = of_row;
        at += CUBE_DIM as usize;
    }
    meet(units);
    if UNIT_POS == 0 {
        reduce_rows::<I>(
            &*row_loss,
            labels,
            head_weights,
            loss,
            total,
            status,
            heads,
            rows,
            &rule,
            how,
        );
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
    #[define(F)] _dtype: ElemType,
    #[define(I)] _label: ElemType,
) {
    let lanes = N::value();
    let counted = iota::<N>();
    let share = share_of_row(status[0], mean);
    let mut at = ABSOLUTE_POS;
    while at < heads * rows {
        let (head, row) = (at / rows, at % rows);
        let from = head * strides.head + row * strides.row;
        let out = at * classes / lanes;
        let target = target_of::<I>(labels[row], &rule);
        let arrived = arriving_at(
            everywhere, arriving, head, row, rows, target, share, arrives,
        );
        let lse_low = Vector::<f32, N>::new(lse[heads * rows + at]);
        let lse = Vector::<f32, N>::new(lse[at]);
        let upstream = Vector::<f32, N>::new(arrived);
        let target = Vector::<u32, N>::new(target);
        for v in 0..classes / lanes {
            let class = counted + Vector::<u32, N>::new((v * lanes) as u32);
            let gradient = logit_gradient::<N>(
                Vector::<f32, N>::cast_from(logits[from + v]),
                lse,
                lse_low,
                upstream,
                class.equal(&target),
                classes as u32,
                smoothing,
            );
            grad[out + v] = narrow::<F, N>(gradient);
        }
        at += CUBE_COUNT * CUBE_DIM as usize;
    }
}
