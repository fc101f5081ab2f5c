//! The second launch: a cube owns a class of a head, and the last one the losses.

use cubecl::prelude::*;

use super::{Sizes, Step};
use crate::Gradients;
use crate::blueprint::{PLANE_UNITS, cubes_for};
use crate::cosine_cross_entropy::launch::RowResults;
use crate::loss::Reduction;
use crate::loss::reduce::{HowReduced, Reduced, reduce_heads};
use crate::loss::target::INVALID;
use crate::math::group::{Group, group_sum};
use crate::math::norm::{inverse_norm, projection};
use crate::operand::{F32, RowStrides, whole, whole_if_asked};
use crate::scale::sum_rows;

/// How a cube's units share the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Plan {
    /// Units side by side, a vector of columns each; there are more parts of the rows the fewer they are.
    across: usize,
    all: Group,
    of_weights: bool,
    of_scale: bool,
    per_row: bool,
    mean: bool,
    weighted: bool,
}

pub(super) fn launch(step: &Step, results: &RowResults, reduced: &Reduced, gradients: &Gradients) {
    let grad = &gradients.weights;
    let call = step.call;
    let sizes = &call.problem.sizes;
    let reduction = call.options.loss.reduction;
    let plan = Plan {
        across: match grad {
            Some(_) => (sizes.dim / step.vector).next_power_of_two(),
            None => 1,
        },
        all: Group::cube(&call.blueprint),
        of_weights: grad.is_some(),
        of_scale: gradients.scale.is_some(),
        per_row: reduction == Reduction::None,
        mean: reduction == Reduction::Mean,
        weighted: call.head_weights.is_some(),
    };
    let owned = match grad {
        Some(_) => sizes.heads * call.problem.classes,
        None => 0,
    };
    let loss = match reduction {
        Reduction::None => &results.loss,
        Reduction::Sum | Reduction::Mean => &reduced.loss,
    };
    // SAFETY: `Strided` proved the operands, `Step` holds the scratch, losses are [heads, rows] if per_row or else [heads].
    unsafe {
        classes::launch_unchecked(
            call.client,
            cubes_for(call.client, owned + 1),
            CubeDim::new_1d(PLANE_UNITS as u32),
            step.vector,
            call.problem.embeddings.buffer_arg(step.vector),
            call.problem.embeddings.strides_arg(step.vector),
            call.problem.weights.buffer_arg(step.vector),
            call.problem.weights.strides_arg(step.vector),
            step.scratch_arg(),
            match &call.head_weights {
                Some(weights) => BufferArg::from_raw_parts(weights.clone(), sizes.heads),
                None => step.scratch_arg(), // not read
            },
            whole(loss, 1),
            whole(&reduced.total, 1),
            whole(&reduced.status, 1),
            step.grad_arg(grad),
            whole_if_asked(call.client, gradients.scale.as_ref(), F32, 1),
            step.sizes_arg(),
            call.options.scale,
            owned,
            plan,
            call.problem.embeddings.dtype(),
        );
    }
}

/// Rows that a unit reads before it adds them.
const TOGETHER: usize = 8;

#[cube(launch_unchecked)]
fn classes<F: Float, N: Size>(
    embeddings: &[Vector<F, N>],
    embedding_strides: RowStrides,
    weights: &[Vector<F, N>],
    weight_strides: RowStrides,
    scratch: &[f32],
    head_weights: &[f32],      // [heads] if weighted
    loss: &mut [f32],          // [heads], or [heads, rows] if per_row
    total: &mut [f32],         // [1]
    status: &mut [u32],        // [STATUS_FIELDS]
    grad: &mut [Vector<F, N>], // [heads, stored, dim]
    grad_scale: &mut [f32],    // [heads] if of_scale
    sizes: Sizes,
    scale: f32,
    owned: usize, // classes of all heads
    #[comptime] plan: Plan,
    #[define(F)] _dtype: ElemType,
) {
    if CUBE_POS > owned {
        terminate!();
    }
    let unit = UNIT_POS as usize;
    if CUBE_POS == owned {
        let counted = scratch[sizes.counted()];
        if unit == 0 {
            status[0] = u32::cast_from(counted);
            let invalid = u32::cast_from(scratch[sizes.counted() + 1]);
            status[1] = invalid;
            status[2] = INVALID;
            if invalid > 0 {
                status[2] = u32::cast_from(scratch[sizes.counted() + 2]);
            }
        }
        let losses = sizes.losses();
        if comptime!(plan.per_row) {
            let mut at = unit;
            while at < sizes.heads * sizes.rows {
                loss[at] = scratch[losses + at];
                at += PLANE_UNITS;
            }
        }
        reduce_heads(
            scratch,
            losses,
            head_weights,
            loss,
            total,
            sizes.heads,
            sizes.rows,
            counted,
            comptime!(HowReduced {
                all: plan.all,
                mean: plan.mean,
                by_head: !plan.per_row,
                weighted: plan.weighted,
            }),
        );
        if comptime!(plan.of_scale) {
            let of_rows = sizes.of_scale();
            let (heads, rows) = (sizes.heads, sizes.rows);
            sum_rows(scratch, of_rows, grad_scale, heads, rows, scale, plan.all);
        }
    } else if comptime!(plan.of_weights) {
        let columns = sizes.dim / N::value();
        let head = CUBE_POS / sizes.stored;
        let class = CUBE_POS % sizes.stored;
        let d = unit % plan.across;
        let part = unit / plan.across;
        let out = CUBE_POS * columns + d;
        if class >= sizes.active {
            if part == 0 && d < columns {
                grad[out] = Vector::<F, N>::cast_from(Vector::<f32, N>::new(0.0));
            }
        } else {
            let parts = comptime!(PLANE_UNITS / plan.across);
            let from = head * embedding_strides.head + d;
            let mut sum = Vector::<f32, N>::new(0.0);
            if d < columns {
                let mut row = part;
                while row < sizes.rows {
                    // Some rows are on their way at once.
                    let mut factors = Array::<f32>::new(TOGETHER);
                    let mut xs = Array::<Vector<f32, N>>::new(TOGETHER);
                    #[unroll]
                    for i in 0..TOGETHER {
                        let next = min(row + i * parts, sizes.rows - 1);
                        let pair = head * sizes.rows + next;
                        factors[i] = scratch[pair * sizes.active + class]
                            * scratch[sizes.inverse_norms() + pair];
                        xs[i] = Vector::<f32, N>::cast_from(
                            embeddings[from + next * embedding_strides.row],
                        );
                    }
                    #[unroll]
                    for i in 0..TOGETHER {
                        if row + i * parts < sizes.rows {
                            sum = fma(Vector::<f32, N>::new(factors[i]), xs[i], sum);
                        }
                    }
                    row += TOGETHER * parts;
                }
            }
            let mut shared = Shared::<[Vector<f32, N>]>::new_slice(PLANE_UNITS);
            shared[unit] = sum;
            sync_cube();
            let mut w = Vector::<f32, N>::new(0.0);
            if part == 0 && d < columns {
                for other in 1..parts {
                    sum += shared[other * plan.across + d];
                }
                w = Vector::<f32, N>::cast_from(
                    weights[head * weight_strides.head + class * weight_strides.row + d],
                );
            } else {
                sum = Vector::<f32, N>::new(0.0);
            }
            let norm = group_sum((w * w).vector_sum(), plan.all).sqrt();
            let along = group_sum((w * sum).vector_sum(), plan.all);
            let inverse = inverse_norm(norm);
            let projection = projection(along, norm) * inverse * inverse;
            if part == 0 && d < columns {
                let value = fma(Vector::<f32, N>::new(-projection), w, sum)
                    * Vector::<f32, N>::new(inverse);
                grad[out] = Vector::<F, N>::cast_from(value);
            }
        }
    }
}
