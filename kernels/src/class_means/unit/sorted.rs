//! Rows are first sorted by class, stably, then each unit sums the rows of its classes in registers: every embedding is read
//! once, every sum touched once, whatever the number of classes is.
//!
//! Bytes: `4·H·(N + 2K)·D` for f32 (embeddings, sums and carries), and 4·(2N + K) for targets and order.

use cubecl::prelude::*;

use super::{classify, told};
use crate::class_means::launch::AccumulateCall;
use crate::loss::target::{LabelRule, is_class, label_rule};
use crate::math::norm::{inverse_norm, row_norm};
use crate::math::span::share;
use crate::math::sum::KahanLanes;
use crate::operand::{RowStrides, whole};

/// Vectors of columns of a part of the work.
const PART: usize = 16;
/// Vectors of columns that are summed side by side.
const WIDTH: usize = 4;

pub(super) fn launch(call: &AccumulateCall) {
    let client = call.client;
    let [heads, rows, dim] = call.embeddings.dims3();
    let classes = call.sums.counts.shape()[0];
    let vector = call.embeddings.vector_size(call.blueprint);
    let rule = label_rule(call.labels.dtype(), classes, call.sums.options.ignore_index);
    let (count, cube) = call.blueprint.unit_grid(call.client);
    let norms = call.norms();
    let inverse = client.empty(norms * size_of::<f32>());
    let targets = client.empty(rows * size_of::<u32>());
    let order = client.empty(rows * size_of::<u32>());
    let ends = client.empty(classes * size_of::<u32>());
    // SAFETY: `Strided` proved the embeddings, labels have `rows` elements, the sums are [heads, classes, dim].
    unsafe {
        if call.sums.options.normalize {
            inverse_norms::launch_unchecked(
                client,
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
            client,
            count,
            cube,
            vector,
            call.embeddings.buffer_arg(vector),
            call.embeddings.strides_arg(vector),
            call.labels.buffer_arg(),
            BufferArg::from_raw_parts(inverse, norms),
            BufferArg::from_raw_parts(targets, rows),
            BufferArg::from_raw_parts(order, rows),
            BufferArg::from_raw_parts(ends, classes),
            whole(&call.sums.sums, vector),
            whole(&call.sums.carries, vector),
            whole(&call.sums.counts, 1),
            whole(&call.sums.status, 1),
            heads,
            rows,
            dim,
            classes,
            rule,
            call.sums.options.normalize,
            call.sums.fresh,
            call.embeddings.dtype(),
            call.labels.dtype(),
        );
    }
}

#[cube(launch_unchecked)]
fn inverse_norms<F: Float, N: Size>(
    embeddings: &[Vector<F, N>],
    strides: RowStrides,
    inverse: &mut [f32], // [heads, rows]
    heads: usize,
    rows: usize,
    dim: usize,
    #[define(F)] _dtype: ElemType,
) {
    let mine = share(0, heads * rows);
    for at in mine.start..mine.end {
        let from = at / rows * strides.head + at % rows * strides.row;
        inverse[at] = inverse_norm(row_norm::<F, N>(embeddings, from, dim / N::value()));
    }
}

#[cube(launch_unchecked)]
fn accumulate<F: Float, I: Int, N: Size>(
    embeddings: &[Vector<F, N>],
    strides: RowStrides,
    labels: &[I],
    inverse: &[f32],                // [heads, rows], or one element
    targets: &mut [u32],            // [rows]
    order: &mut [u32],              // [rows]
    ends: &mut [u32],               // [classes]
    sums: &mut [Vector<f32, N>],    // [heads, classes, dim]
    carries: &mut [Vector<f32, N>], // [heads, classes, dim]
    counts: &mut [u32],             // [classes]
    status: &mut [u32],             // [2]
    heads: usize,
    rows: usize,
    dim: usize,
    classes: usize,
    rule: LabelRule,
    #[comptime] normalize: bool,
    #[comptime] fresh: bool,
    #[define(F)] _dtype: ElemType,
    #[define(I)] _label: ElemType,
) {
    let mut found = 0u32.runtime();
    if UNIT_POS == 0 {
        found = sort::<I>(
            labels, targets, order, ends, counts, status, rows, classes, &rule,
        );
    }
    let sorted = told(found) as usize;
    let columns = dim / N::value();
    let parts = columns.div_ceil(PART);
    // The work of a class is its rows, and one more for its sums; each unit takes an equal share of it all.
    let work = sorted + classes;
    let mine = share(0, heads * parts * work);
    for part in 0..heads * parts {
        let base = part * work;
        if base < mine.end && base + work > mine.start {
            let head = part / parts;
            let first = part % parts * PART;
            let last = min(first + PART, columns);
            let together = first + (last - first) / WIDTH * WIDTH;
            let mut begin = 0usize.runtime();
            for class in 0..classes {
                let end = ends[class] as usize;
                let at = base + begin + class;
                if at >= mine.start && at < mine.end && (comptime!(fresh) || begin < end) {
                    let sum = (head * classes + class) * columns;
                    let mut column = first;
                    while column < together {
                        add_rows::<F, N>(
                            embeddings, &strides, inverse, &*order, sums, carries, head, column,
                            sum, begin, end, rows, normalize, fresh, WIDTH,
                        );
                        column += WIDTH;
                    }
                    for column in together..last {
                        add_rows::<F, N>(
                            embeddings, &strides, inverse, &*order, sums, carries, head, column,
                            sum, begin, end, rows, normalize, fresh, 1usize,
                        );
                    }
                }
                begin = end;
            }
        }
    }
}

/// `order`: the rows that have a class, class by class; `ends`: where each class ends in it. Gives their number, adds to
/// the counts, and counts the bad labels.
#[cube]
fn sort<I: Int>(
    labels: &[I],
    targets: &mut [u32],
    order: &mut [u32],
    ends: &mut [u32],
    counts: &mut [u32],
    status: &mut [u32],
    rows: usize,
    classes: usize,
    rule: &LabelRule,
) -> u32 {
    for class in 0..classes {
        ends[class] = 0;
    }
    let _good = classify::<I>(labels, targets, ends, status, rows, rule);
    let mut place = 0u32.runtime();
    for class in 0..classes {
        let here = ends[class];
        counts[class] += here;
        ends[class] = place;
        place += here;
    }
    // Each class's place moves on to its end.
    for row in 0..rows {
        let target = targets[row];
        if is_class(target) {
            let at = ends[target as usize];
            order[at as usize] = row as u32;
            ends[target as usize] = at + 1;
        }
    }
    place
}

/// Adds the rows `order[begin..end]` to `count` vectors of columns of a sum, by Kahan.
#[cube]
fn add_rows<F: Float, N: Size>(
    embeddings: &[Vector<F, N>],
    strides: &RowStrides,
    inverse: &[f32],
    order: &[u32],
    sums: &mut [Vector<f32, N>],
    carries: &mut [Vector<f32, N>],
    head: usize,
    first: usize,
    sum: usize,
    begin: usize,
    end: usize,
    rows: usize,
    #[comptime] normalize: bool,
    #[comptime] fresh: bool,
    #[comptime] count: usize,
) {
    let mut total = Array::<Vector<f32, N>>::new(count);
    let mut carry = Array::<Vector<f32, N>>::new(count);
    #[unroll]
    for d in 0..count {
        match comptime!(fresh) {
            true => {
                total[d] = Vector::<f32, N>::new(0.0);
                carry[d] = Vector::<f32, N>::new(0.0);
            }
            false => {
                total[d] = sums[sum + first + d];
                carry[d] = carries[sum + first + d];
            }
        }
    }
    for place in begin..end {
        let row = order[place] as usize;
        let source = head * strides.head + row * strides.row + first;
        #[unroll]
        for d in 0..count {
            let mut value = Vector::<f32, N>::cast_from(embeddings[source + d]);
            if comptime!(normalize) {
                value *= Vector::<f32, N>::new(inverse[head * rows + row]);
            }
            let mut sum = KahanLanes::<N> {
                sum: total[d],
                carry: carry[d],
            };
            sum.add(value);
            total[d] = sum.sum;
            carry[d] = sum.carry;
        }
    }
    #[unroll]
    for d in 0..count {
        sums[sum + first + d] = total[d];
        carries[sum + first + d] = carry[d];
    }
}
