//! Rows are first sorted by class, stably, then each unit sums the rows of its classes: every embedding comes from memory once, every
//! sum stays in the cache while its class is summed, whatever the number of classes is. A class is summed by one unit, so one that has
//! most of the rows leaves the others without work.
//!
//! A few rows of a class at a time are read twice, first for their norms, which only load and multiply: that brings them to the cache
//! as fast as memory can; so it is done even where nobody asks for norms.
//!
//! Bytes: `4·H·(N + 2K')·D` for f32 (embeddings, and sums and carries of the `K'` classes that the batch has rows of; these are read
//! besides, if batches before had some), and 4·(2N + K) for targets and order.

use cubecl::prelude::*;

use super::{classify, read_first};
use crate::class_means::launch::{AccumulateCall, addressable_batch};
use crate::error::Error;
use crate::loss::target::{LabelRule, is_class, label_rule};
use crate::math::norm::{no_squares, norm_of};
use crate::math::span::{share, told};
use crate::math::sum::KahanLanes;
use crate::operand::{RowStrides, whole};

/// Elements of the rows that stay in the cache between their two readings.
const BLOCK: usize = 1 << 12;
/// Vectors of columns that are summed side by side.
const WIDTH: usize = 4;

pub(super) fn launch(call: &AccumulateCall) -> Result<(), Error> {
    let client = call.client;
    let [heads, rows, dim] = call.embeddings.dims3();
    let classes = call.sums.counts.shape()[0];
    let vector = call.embeddings.vector_size(call.blueprint);
    addressable_batch(heads, rows, classes)?;
    let rule = label_rule(call.labels.dtype(), classes, call.sums.options.ignore_index);
    let blueprint = call.blueprint.for_elements(heads * (rows + classes) * dim);
    let (count, cube) = blueprint.unit_grid(client);
    let block = (BLOCK / dim).clamp(1, 16);
    let norms = blueprint.units * block;
    // SAFETY: `Strided` proved the embeddings, labels have `rows` elements, the sums are [heads, classes, dim].
    unsafe {
        accumulate::launch_unchecked(
            client,
            count,
            cube,
            vector,
            call.embeddings.buffer_arg(vector),
            call.embeddings.strides_arg(vector),
            call.labels.buffer_arg(),
            BufferArg::from_raw_parts(client.empty(norms * size_of::<f32>()), norms),
            BufferArg::from_raw_parts(client.empty(rows * size_of::<u32>()), rows),
            BufferArg::from_raw_parts(client.empty(rows * size_of::<u32>()), rows),
            BufferArg::from_raw_parts(client.empty(classes * size_of::<u32>()), classes),
            whole(&call.sums.sums, vector),
            whole(&call.sums.carries, vector),
            whole(&call.sums.counts, 1),
            whole(&call.sums.status, 1),
            heads,
            rows,
            dim / vector,
            classes,
            block,
            rule,
            blueprint.units,
            call.sums.options.normalize,
            call.sums.fresh,
            call.embeddings.dtype(),
            call.labels.dtype(),
        );
    }
    Ok(())
}

#[cube(launch_unchecked)]
fn accumulate<F: Float, I: Int, N: Size>(
    embeddings: &[Vector<F, N>],
    strides: RowStrides,
    labels: &[I],
    inverse: &mut [f32],            // [units, block]
    targets: &mut [u32],            // [rows]
    order: &mut [u32],              // [rows]
    ends: &mut [u32],               // [classes]
    sums: &mut [Vector<f32, N>],    // [heads, classes, columns]
    carries: &mut [Vector<f32, N>], // [heads, classes, columns]
    counts: &mut [u32],             // [classes]
    status: &mut [u32],             // [SUMS_STATUS_FIELDS]
    heads: usize,
    rows: usize,
    columns: usize, // vectors of a row
    classes: usize,
    block: usize, // rows
    rule: LabelRule,
    #[comptime] units: usize,
    #[comptime] normalize: bool,
    #[comptime] fresh: bool,
    #[define(F)] _dtype: ElemType,
    #[define(I)] _label: ElemType,
) {
    let mut found = 0u32.runtime();
    if UNIT_POS == 0 {
        found = sort::<I>(
            labels, targets, order, ends, counts, status, rows, classes, &rule, fresh,
        );
    }
    // The work of a class that has rows is these, and one more for its sums; each unit takes an equal share of it all.
    let work = told(found, units) as usize;
    let mine = share(0, heads * work);
    for head in 0..heads {
        let mut at = head * work;
        if at < mine.end && at + work > mine.start {
            let mut begin = 0usize.runtime();
            for class in 0..classes {
                let end = ends[class] as usize;
                if end > begin {
                    if at >= mine.start && at < mine.end {
                        let sum = (head * classes + class) * columns;
                        if counts[class] as usize == end - begin {
                            for d in sum..sum + columns {
                                sums[d] = Vector::<f32, N>::new(0.0);
                                carries[d] = Vector::<f32, N>::new(0.0);
                            }
                        }
                        let mut place = begin;
                        while place < end {
                            let next = min(place + block, end);
                            add_rows::<F, N>(
                                embeddings,
                                head * strides.head,
                                strides.row,
                                inverse,
                                UNIT_POS as usize * block,
                                &order[place..next],
                                sums,
                                carries,
                                sum,
                                columns,
                                normalize,
                            );
                            place = next;
                        }
                    }
                    at += end - begin + 1;
                    begin = end;
                }
            }
        }
    }
}

/// `order`: the rows that have a class, class by class; `ends`: where each class ends in it. Gives their number and that of their
/// classes, added; adds to the counts, and counts the bad labels.
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
    #[comptime] fresh: bool,
) -> u32 {
    for class in 0..classes {
        ends[class] = 0;
        if comptime!(fresh) {
            counts[class] = 0;
        }
    }
    let _good = classify::<I>(labels, targets, ends, status, rows, rule, fresh);
    let mut place = 0u32.runtime();
    let mut present = 0u32.runtime();
    for class in 0..classes {
        let here = ends[class];
        counts[class] += here;
        ends[class] = place;
        place += here;
        present += select(here > 0, 1u32, 0u32);
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
    place + present
}

/// Adds rows to the sum that begins at `sum`.
#[cube]
fn add_rows<F: Float, N: Size>(
    embeddings: &[Vector<F, N>],
    source: usize, // where the head's first row begins
    stride: usize, // of rows
    inverse: &mut [f32],
    norms: usize, // where the unit's part of `inverse` begins
    order: &[u32],
    sums: &mut [Vector<f32, N>],
    carries: &mut [Vector<f32, N>],
    sum: usize,
    columns: usize,
    #[comptime] normalize: bool,
) {
    let mut squares = no_squares::<N>();
    for place in 0..order.len() {
        let from = source + order[place] as usize * stride;
        let at = norms + place;
        read_first::<F, N>(
            embeddings,
            from,
            columns,
            &mut squares,
            inverse,
            at,
            normalize,
        );
    }
    if comptime!(!normalize) {
        inverse[norms] = norm_of::<N>(&squares);
    }
    let together = columns / WIDTH * WIDTH;
    let mut column = 0usize.runtime();
    while column < together {
        add_columns::<F, N>(
            embeddings,
            source + column,
            stride,
            &*inverse,
            norms,
            order,
            sums,
            carries,
            sum + column,
            normalize,
            WIDTH,
        );
        column += WIDTH;
    }
    for column in together..columns {
        add_columns::<F, N>(
            embeddings,
            source + column,
            stride,
            &*inverse,
            norms,
            order,
            sums,
            carries,
            sum + column,
            normalize,
            1usize,
        );
    }
}

/// Adds `count` vectors of columns of rows, by Kahan.
#[cube]
fn add_columns<F: Float, N: Size>(
    embeddings: &[Vector<F, N>],
    source: usize,
    stride: usize,
    inverse: &[f32],
    norms: usize,
    order: &[u32],
    sums: &mut [Vector<f32, N>],
    carries: &mut [Vector<f32, N>],
    sum: usize,
    #[comptime] normalize: bool,
    #[comptime] count: usize,
) {
    let mut total = Array::<Vector<f32, N>>::new(count);
    let mut carry = Array::<Vector<f32, N>>::new(count);
    #[unroll]
    for d in 0..count {
        total[d] = sums[sum + d];
        carry[d] = carries[sum + d];
    }
    for place in 0..order.len() {
        let from = source + order[place] as usize * stride;
        #[unroll]
        for d in 0..count {
            let mut value = Vector::<f32, N>::cast_from(embeddings[from + d]);
            if comptime!(normalize) {
                value *= Vector::<f32, N>::new(inverse[norms + place]);
            }
            let mut lane = KahanLanes::<N> {
                sum: total[d],
                carry: carry[d],
            };
            lane.add(value);
            total[d] = lane.sum;
            carry[d] = lane.carry;
        }
    }
    #[unroll]
    for d in 0..count {
        sums[sum + d] = total[d];
        carries[sum + d] = carry[d];
    }
}
