//! The first launch: a cube owns a few rows of a head.

use cubecl::prelude::*;

use super::{CLASSES, Sizes, Step};
use crate::Gradients;
use crate::blueprint::{PLANE_UNITS, cubes_for};
use crate::cosine_cross_entropy::launch::RowResults;
use crate::cosine_cross_entropy::margin::{MarginRule, predicted};
use crate::loss::arriving::{Arrives, Arriving, arriving_at, share_of_row};
use crate::loss::target::{LabelRule, is_class, label_rule, target_of};
use crate::loss::{Reduction, count_labels};
use crate::math::group::{Group, group_max, group_softmax, group_sum, member};
use crate::math::lanes::One;
use crate::math::norm::{EPSILON, inverse_norm, projection};
use crate::math::online_softmax::{FLOOR, RowSoftmax, logit_gradient};
use crate::operand::{F32, RowStrides, whole};

/// Rows of a cube.
const OWNED: usize = 4;

/// How a cube's units share the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Plan {
    /// Units of a class while cosines are computed.
    of_class: Group,
    /// Units of a row while its softmax is.
    of_row: Group,
    /// All of them.
    all: Group,
    /// Vectors of columns of a row that a unit keeps while the row's gradient is computed.
    held: usize,
    /// Whether logit gradients are wanted, whether the rows' own are, and the scale's, which comes from these.
    backward: bool,
    of_embeddings: bool,
    of_scale: bool,
    /// Whom a gradient arrives for; that of a head is shared if the loss is a mean.
    arrives: Arrives,
    mean: bool,
    margin: bool,
}

pub(super) fn launch(
    step: &Step,
    arriving: Option<&Arriving>,
    results: &RowResults,
    gradients: &Gradients,
) {
    let call = step.call;
    let sizes = &call.problem.sizes;
    let loss = &call.options.loss;
    let all = Group::cube(&call.blueprint);
    let of_row = Group {
        size: PLANE_UNITS / OWNED,
        exchange: all.exchange,
    };
    let arrived = Arriving::or_nothing(arriving);
    let plan = Plan {
        of_class: Group::of(&call.blueprint, sizes.dim / step.vector),
        of_row,
        held: (sizes.dim / step.vector).div_ceil(of_row.size),
        all,
        backward: arriving.is_some(),
        of_embeddings: gradients.embeddings.is_some(),
        of_scale: gradients.scale.is_some(),
        arrives: arrived.arrives,
        mean: loss.reduction == Reduction::Mean,
        margin: !call.options.margin.is_none(),
    };
    let nothing = call.client.empty(size_of::<f32>());
    // SAFETY: `Strided` proved the operands, labels and row results have `rows` elements a head, and `Step` holds the scratch;
    // without a gradient that arrives, the kernel reads none.
    unsafe {
        rows::launch_unchecked(
            call.client,
            cubes_for(call.client, sizes.heads * sizes.rows.div_ceil(OWNED)),
            CubeDim::new_1d(PLANE_UNITS as u32),
            step.vector,
            call.problem.embeddings.buffer_arg(step.vector),
            call.problem.embeddings.strides_arg(step.vector),
            call.problem.weights.buffer_arg(step.vector),
            call.problem.weights.strides_arg(step.vector),
            call.labels.buffer_arg(),
            arrived.buffer_arg(&nothing),
            whole(&results.lse, 1),
            whole(&results.predictions, 1),
            step.scratch_arg(),
            step.grad_arg(&gradients.embeddings),
            step.sizes_arg(),
            label_rule(call.labels.dtype(), sizes.active, loss.ignore_index),
            call.options.scale,
            loss.label_smoothing,
            call.options.margin.launch_arg(F32),
            arrived.everywhere,
            plan,
            call.problem.embeddings.dtype(),
            call.labels.dtype(),
        );
    }
}

/// Classes that a unit reads before it adds them.
const TOGETHER: usize = 4;

#[cube(launch_unchecked)]
fn rows<F: Float, I: Int, N: Size>(
    embeddings: &[Vector<F, N>],
    embedding_strides: RowStrides,
    weights: &[Vector<F, N>],
    weight_strides: RowStrides,
    labels: &[I],            // [rows]
    arriving: &[f32],        // [heads] or [heads, rows], if it does not arrive everywhere
    lse: &mut [f32],         // [2, heads, rows]
    predictions: &mut [u32], // [heads, rows]
    scratch: &mut [f32],
    grad: &mut [Vector<F, N>], // [heads, rows, dim]
    sizes: Sizes,
    rule: LabelRule,
    scale: f32,
    smoothing: f32,
    margin: MarginRule,
    everywhere: f32,
    #[comptime] plan: Plan,
    #[define(F)] _dtype: ElemType,
    #[define(I)] _label: ElemType,
) {
    let blocks = sizes.rows.div_ceil(OWNED);
    if CUBE_POS >= sizes.heads * blocks {
        terminate!();
    }
    let unit = UNIT_POS as usize;
    let head = CUBE_POS / blocks;
    let first = CUBE_POS % blocks * OWNED;
    let columns = sizes.dim / N::value();
    let active = sizes.active;
    let of_weights = head * weight_strides.head;
    let of_embeddings = head * embedding_strides.head;

    // Logits at first, then their gradients: [OWNED, CLASSES]. They are scaled before they are there, so that everybody reads the
    // same bits: a compiler that contracts `z · scale − peak` would give the peak itself another exponential than 1.
    let mut logits = Shared::<[f32]>::new_slice(comptime!(OWNED * CLASSES));
    let mut weight_inverses = Shared::<[f32]>::new_slice(CLASSES);
    let mut norms = Shared::<[f32]>::new_slice(OWNED);

    // The rows' norms.
    let here = member(plan.of_row);
    let own = unit / plan.of_row.size;
    // A row that is not there stands for the last one, and writes nothing.
    let own_row = min(first + own, sizes.rows - 1);
    let is_there = first + own < sizes.rows;
    let mut squares = 0.0f32.runtime();
    let mut d = here.lane;
    while d < columns {
        let x = Vector::<f32, N>::cast_from(
            embeddings[of_embeddings + own_row * embedding_strides.row + d],
        );
        squares += (x * x).vector_sum();
        d += plan.of_row.size;
    }
    let norm = group_sum(squares, plan.of_row).sqrt();
    if here.lane == 0 {
        norms[own] = norm;
    }
    let counted = count_labels::<I>(labels, sizes.rows, &rule, plan.all);
    sync_cube();

    // Cosines: a group takes a class, for all rows of the cube.
    let lane = unit % plan.of_class.size;
    let together = comptime!(plan.of_class.per_cube());
    for turn in 0..active.div_ceil(together) {
        let class = turn * together + unit / plan.of_class.size;
        let mut squares = 0.0f32.runtime();
        let mut dots = Array::<f32>::new(OWNED);
        #[unroll]
        for r in 0..OWNED {
            dots[r] = 0.0;
        }
        if class < active {
            let mut d = lane;
            while d < columns {
                let w = Vector::<f32, N>::cast_from(
                    weights[of_weights + class * weight_strides.row + d],
                );
                squares += (w * w).vector_sum();
                #[unroll]
                for r in 0..OWNED {
                    let row = min(first + r, sizes.rows - 1);
                    let x = Vector::<f32, N>::cast_from(
                        embeddings[of_embeddings + row * embedding_strides.row + d],
                    );
                    dots[r] += (w * x).vector_sum();
                }
                d += plan.of_class.size;
            }
        }
        let norm = group_sum(squares, plan.of_class).sqrt();
        let inverse = inverse_norm(norm);
        if class < active && lane == 0 {
            weight_inverses[class] = inverse;
        }
        #[unroll]
        for r in 0..OWNED {
            let dot = group_sum(dots[r], plan.of_class);
            if class < active && lane == 0 {
                // One after the other: the product of two small norms would underflow.
                logits[r * CLASSES + class] = dot * inverse / max(norms[r], EPSILON) * scale;
            }
        }
    }
    sync_cube();

    // The softmax of each row, and its logit gradients.
    let row_norm = norms[own];
    let row_inverse = inverse_norm(row_norm);
    let target = target_of::<I>(labels[own_row], &rule);
    let mut state = RowSoftmax::new();
    // Of the target, in the unit that has it.
    let mut plain = FLOOR.runtime();
    let mut slope = 1.0f32.runtime();
    let mut class = here.lane;
    while class < active {
        let at = own * CLASSES + class;
        if comptime!(plan.margin) && class as u32 == target {
            plain = logits[at];
            let with = margin.of_logit(plain, scale);
            logits[at] = with.value;
            slope = with.slope;
        }
        let z = Vector::<f32, One>::new(logits[at]);
        state.fold::<One>(z, class as u32, target);
        class += plan.of_row.size;
    }
    let softmax = group_softmax(state, plan.of_row);
    let mut best = softmax.best;
    if comptime!(plan.margin) {
        let plain = group_max(plain, plan.of_row);
        best = predicted(best, softmax.peak, target, plain);
    }
    let out = head * sizes.rows + own_row;
    if is_there && here.lane == 0 {
        lse[out] = softmax.lse();
        lse[sizes.heads * sizes.rows + out] = softmax.lse_low();
        predictions[out] = best;
        let mut loss = 0.0f32.runtime();
        if is_class(target) {
            loss = softmax.loss(active as u32, smoothing);
        }
        scratch[sizes.losses() + out] = loss;
        scratch[sizes.inverse_norms() + out] = row_inverse;
    }
    if CUBE_POS == 0 && unit == 0 {
        scratch[sizes.counted()] = f32::cast_from(counted.classes);
        scratch[sizes.counted() + 1] = f32::cast_from(counted.invalid);
        scratch[sizes.counted() + 2] =
            f32::cast_from(min(counted.first_invalid, sizes.rows as u32));
    }
    let mut of_margin = 0.0f32.runtime();
    if comptime!(plan.backward) {
        let share = share_of_row(counted.classes, plan.mean);
        let upstream = arriving_at(
            everywhere,
            arriving,
            head,
            own_row,
            sizes.rows,
            target,
            share,
            plan.arrives,
        );
        let row_lse = Vector::<f32, One>::new(softmax.lse());
        let row_low = Vector::<f32, One>::new(softmax.lse_low());
        let mut class = here.lane;
        while class < active {
            let at = own * CLASSES + class;
            let gradient = logit_gradient::<One>(
                Vector::<f32, One>::new(logits[at]),
                row_lse,
                row_low,
                Vector::<f32, One>::new(upstream),
                Vector::<u32, One>::new(class as u32).equal(&Vector::<u32, One>::new(target)),
                active as u32,
                smoothing,
            );
            let mut value = gradient.extract(0usize) * scale;
            if comptime!(plan.margin) && class as u32 == target {
                if comptime!(plan.of_scale) {
                    of_margin = value * margin.beyond_slope(plain, scale);
                }
                value *= slope;
            }
            if is_there {
                scratch[out * active + class] = value;
            }
            logits[at] = value * weight_inverses[class];
            class += plan.of_row.size;
        }
        sync_cube();
    }

    // The rows' gradients: a unit keeps the sums of a few vectors of columns, from which the row's own direction is taken.
    if comptime!(plan.of_embeddings) {
        let mut sums = Array::<Vector<f32, N>>::new(comptime!(plan.held));
        let mut along = 0.0f32.runtime();
        #[unroll]
        for i in 0..plan.held {
            let d = here.lane + i * plan.of_row.size;
            let mut sum = Vector::<f32, N>::new(0.0);
            if d < columns {
                let mut class = 0usize.runtime();
                while class < active {
                    // Some classes are on their way at once.
                    let mut ws = Array::<Vector<f32, N>>::new(TOGETHER);
                    #[unroll]
                    for ahead in 0..TOGETHER {
                        let next = min(class + ahead, active - 1);
                        ws[ahead] = Vector::<f32, N>::cast_from(
                            weights[of_weights + next * weight_strides.row + d],
                        );
                    }
                    #[unroll]
                    for ahead in 0..TOGETHER {
                        if class + ahead < active {
                            let gradient = logits[own * CLASSES + class + ahead];
                            sum = fma(Vector::<f32, N>::new(gradient), ws[ahead], sum);
                        }
                    }
                    class += TOGETHER;
                }
                let x = Vector::<f32, N>::cast_from(
                    embeddings[of_embeddings + own_row * embedding_strides.row + d],
                );
                along += (x * sum).vector_sum();
            }
            sums[i] = sum;
        }
        let along = group_sum(along, plan.of_row);
        if comptime!(plan.of_scale) {
            let mut of_row = along * row_inverse;
            if comptime!(plan.margin) {
                of_row += group_sum(of_margin, plan.of_row);
            }
            if is_there && here.lane == 0 {
                scratch[sizes.of_scale() + out] = of_row;
            }
        }
        let along = projection(along, row_norm) * row_inverse * row_inverse;
        #[unroll]
        for i in 0..plan.held {
            let d = here.lane + i * plan.of_row.size;
            if is_there && d < columns {
                let x = Vector::<f32, N>::cast_from(
                    embeddings[of_embeddings + own_row * embedding_strides.row + d],
                );
                let value = fma(Vector::<f32, N>::new(-along), x, sums[i])
                    * Vector::<f32, N>::new(row_inverse);
                grad[out * columns + d] = Vector::<F, N>::cast_from(value);
            }
        }
    }
}
