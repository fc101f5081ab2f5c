//! A unit owns some columns of every class of a head, and walks the rows once. Linear in the rows, independent
//! of the number of classes.

use cubecl::prelude::*;

use super::launch::AccumulateCall;
use crate::loss::target::{INVALID, LabelRule, is_class, label_rule, target_of};
use crate::operand::whole;
use crate::packing::unit::{EPSILON, RowStrides};

pub(super) fn launch(call: &AccumulateCall) {
    let [heads, rows, dim] = call.embeddings.dims3();
    let classes = call.sums.counts.shape()[0];
    let vector = call.embeddings.vector_size(call.blueprint);
    let rule = label_rule(call.labels.dtype(), classes, call.options.ignore_index);
    let (count, cube) = call.blueprint.unit_grid();
    // One norm a row, where rows are normalized; a single element otherwise.
    let norms = if call.options.normalize {
        heads * rows
    } else {
        1
    };
    let inverse = call.client.empty(norms * size_of::<f32>());
    // SAFETY: `Strided` proved the embeddings, labels have `rows` elements, the sums are [heads, classes, dim].
    unsafe {
        if call.options.normalize {
            inverse_norms::launch_unchecked(
                call.client,
                count.clone(),
                cube,
                vector,
                call.embeddings.buffer_arg(vector),
                call.embeddings.strides_arg(vector),
                BufferArg::from_raw_parts(inverse.clone(), norms),
                heads,
                rows,
                dim,
                call.embeddings.dtype(),
            );
        }
        accumulate::launch_unchecked(
            call.client,
            count,
            cube,
            vector,
            call.embeddings.buffer_arg(vector),
            call.embeddings.strides_arg(vector),
            call.labels.buffer_arg(),
            BufferArg::from_raw_parts(inverse, norms),
            whole(&call.sums.sums, vector),
            whole(&call.sums.carries, vector),
            whole(&call.sums.counts, 1),
            whole(&call.sums.status, 1),
            heads,
            rows,
            dim,
            classes,
            rule,
            call.options.normalize,
            call.embeddings.dtype(),
            call.labels.dtype(),
        );
    }
}

#[cube(launch_unchecked)]
pub(super) fn inverse_norms<F: Float, N: Size>(
    embeddings: &[Vector<F, N>],
    strides: RowStrides,
    inverse: &mut [f32], // [heads, rows]
    heads: usize,
    rows: usize,
    dim: usize,
    #[define(F)] _dtype: ElemType,
) {
    let lanes = N::value();
    let mut at = ABSOLUTE_POS;
    while at < heads * rows {
        let from = at / rows * strides.head + at % rows * strides.row;
        let mut squares = Vector::<f32, N>::new(0.0);
        for d in 0..dim / lanes {
            let value = Vector::<f32, N>::cast_from(embeddings[from + d]);
            squares = fma(value, value, squares);
        }
        inverse[at] = 1.0 / max(squares.vector_sum().sqrt(), EPSILON);
        at += CUBE_COUNT * CUBE_DIM as usize;
    }
}

#[cube(launch_unchecked)]
fn accumulate<F: Float, I: Int, N: Size>(
    embeddings: &[Vector<F, N>],
    strides: RowStrides,
    labels: &[I],
    inverse: &[f32],
    sums: &mut [Vector<f32, N>],
    carries: &mut [Vector<f32, N>],
    counts: &mut [u32],
    status: &mut [u32],
    heads: usize,
    rows: usize,
    dim: usize,
    classes: usize,
    rule: LabelRule,
    #[comptime] normalize: bool,
    #[define(F)] _dtype: ElemType,
    #[define(I)] _label: ElemType,
) {
    let units = CUBE_COUNT * CUBE_DIM as usize;
    let columns = dim / N::value();
    // Each unit takes a contiguous share of the columns of all heads.
    let share = (heads * columns).div_ceil(units);
    let start = ABSOLUTE_POS * share;
    let end = min(start + share, heads * columns);
    let mut from = start;
    while from < end {
        let head = from / columns;
        let first = from % columns;
        let last = min(columns, first + end - from);
        for row in 0..rows {
            let target = target_of::<I>(labels[row], &rule);
            if is_class(target) {
                let source = head * strides.head + row * strides.row;
                let sum = (head * classes + target as usize) * columns;
                for d in first..last {
                    let mut value = Vector::<f32, N>::cast_from(embeddings[source + d]);
                    if comptime!(normalize) {
                        value *= Vector::<f32, N>::new(inverse[head * rows + row]);
                    }
                    let corrected = value - carries[sum + d];
                    let next = sums[sum + d] + corrected;
                    carries[sum + d] = (next - sums[sum + d]) - corrected;
                    sums[sum + d] = next;
                }
            }
        }
        from += last - first;
    }
    if ABSOLUTE_POS == 0 {
        for row in 0..rows {
            let target = target_of::<I>(labels[row], &rule);
            if is_class(target) {
                counts[target as usize] += 1;
            } else if target == INVALID {
                if status[0] == 0 {
                    status[1] = row as u32;
                }
                status[0] += 1;
            }
        }
    }
}
