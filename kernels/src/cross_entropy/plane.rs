//! One cube a row: its units stride over the classes and merge once.

use cubecl::prelude::*;

use super::launch::{BackwardCall, ForwardCall};
use crate::blueprint::{PLANE_UNITS, cubes_for};
use crate::loss::target::{LabelRule, is_class, label_rule, target_of};
use crate::math::cube::merge_softmax;
use crate::math::lanes::One;
use crate::math::online_softmax::{OnlineSoftmax, logit_gradient};
use crate::operand::whole;
use crate::packing::unit::RowStrides;

pub(super) fn launch_forward(call: &ForwardCall) {
    let [heads, rows, classes] = call.logits.dims3();
    // SAFETY: `Strided` proved the logits, the outputs are [heads, rows], labels have `rows` elements.
    unsafe {
        forward::launch_unchecked(
            call.client,
            cubes_for(call.client, heads * rows),
            CubeDim::new_1d(PLANE_UNITS as u32),
            call.logits.buffer_arg(1),
            call.logits.strides_arg(1),
            call.labels.buffer_arg(),
            whole(call.row_loss, 1),
            whole(call.lse, 1),
            whole(call.predictions, 1),
            heads,
            rows,
            classes,
            label_rule(call.labels.dtype(), classes, call.loss.ignore_index),
            call.loss.label_smoothing,
            call.logits.dtype(),
            call.labels.dtype(),
        );
    }
}

pub(super) fn launch_backward(call: &BackwardCall) {
    let [heads, rows, classes] = call.logits.dims3();
    // SAFETY: `Strided` proved the logits, `Rows` holds every row, `grad` is [heads, rows, classes].
    unsafe {
        backward::launch_unchecked(
            call.client,
            cubes_for(call.client, heads * rows),
            CubeDim::new_1d(PLANE_UNITS as u32),
            call.logits.buffer_arg(1),
            call.logits.strides_arg(1),
            call.rows.state_arg(1),
            call.rows.targets_arg(1),
            whole(call.grad, 1),
            heads,
            rows,
            classes,
            call.smoothing,
            call.logits.dtype(),
        );
    }
}

#[cube(launch_unchecked)]
fn forward<F: Float, I: Int>(
    logits: &[F],
    strides: RowStrides,
    labels: &[I],
    row_loss: &mut [f32],
    lse: &mut [f32],
    predictions: &mut [u32],
    heads: usize,
    rows: usize,
    classes: usize,
    rule: LabelRule,
    smoothing: f32,
    #[define(F)] _dtype: ElemType,
    #[define(I)] _label: ElemType,
) {
    if CUBE_POS >= heads * rows {
        terminate!();
    }
    let unit = UNIT_POS as usize;
    let row = CUBE_POS % rows;
    let from = CUBE_POS / rows * strides.head + row * strides.row;
    let target = target_of::<I>(labels[row], &rule);
    let active = classes as u32;
    let mut values = Shared::<[f32]>::new_slice(PLANE_UNITS);
    let mut bests = Shared::<[u32]>::new_slice(PLANE_UNITS);
    let mut state = OnlineSoftmax::<One>::new();
    let mut class = unit;
    while class < classes {
        state.fold(
            Vector::<f32, One>::new(f32::cast_from(logits[from + class])),
            Vector::<u32, One>::new(class as u32),
            active,
            target,
        );
        class += PLANE_UNITS;
    }
    let softmax = merge_softmax(
        state.finish(),
        0,
        unit,
        &mut values,
        &mut bests,
        PLANE_UNITS,
    );
    if unit == 0 {
        lse[CUBE_POS] = softmax.lse();
        predictions[CUBE_POS] = softmax.best;
        let mut loss = 0.0f32.runtime();
        if is_class(target) {
            loss = softmax.loss(active, smoothing);
        }
        row_loss[CUBE_POS] = loss;
    }
}

#[cube(launch_unchecked)]
fn backward<F: Float>(
    logits: &[F],
    strides: RowStrides,
    state: &[f32],
    targets: &[u32],
    grad: &mut [F],
    heads: usize,
    rows: usize,
    classes: usize,
    smoothing: f32,
    #[define(F)] _dtype: ElemType,
) {
    if CUBE_POS >= heads * rows {
        terminate!();
    }
    let (head, row) = (CUBE_POS / rows, CUBE_POS % rows);
    let from = head * strides.head + row * strides.row;
    let lse = Vector::<f32, One>::new(state[head * 2 * rows + row]);
    let upstream = Vector::<f32, One>::new(state[(head * 2 + 1) * rows + row]);
    let target = Vector::<u32, One>::new(targets[row]);
    let mut class = UNIT_POS as usize;
    while class < classes {
        let gradient = logit_gradient::<One>(
            Vector::<f32, One>::new(f32::cast_from(logits[from + class])),
            lse,
            upstream,
            Vector::<u32, One>::new(class as u32).equal(&target),
            classes as u32,
            smoothing,
        );
        grad[CUBE_POS * classes + class] = F::cast_from(gradient.extract(0usize));
        class += PLANE_UNITS;
    }
}
