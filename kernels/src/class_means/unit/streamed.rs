//! Chunks of rows go to the lanes of the sums in turn, and each unit adds the rows of its lanes, in order: embeddings come from memory
//! in one stream, and the sums stay in the cache. There are as many lanes as units, but fewer units where a batch is small.
//!
//! A chunk is read twice, first for its norms, which only load and multiply: that brings it to the cache as fast as memory
//! can, where adding row by row would wait for each; so it is done even where nobody asks for norms. Chunks are counted from the
//! first row that the state has ever seen, so that it makes no difference how rows came in batches.
//!
//! Bytes, for embeddings of `b` bytes an element: `b·H·N·D` once from memory, and `16·U·H·K·D` of sums and carries, for `U` units.

use cubecl::prelude::*;

use crate::class_means::launch::AccumulateCall;
use crate::error::Error;
use crate::loss::target::{LabelRule, is_class, label_rule};
use crate::math::norm::{no_squares, norm_of};
use crate::math::span::told;
use crate::math::sum::KahanLanes;
use crate::operand::{RowStrides, addressable, whole};

use super::{classify, read_first};

/// Elements of a chunk's rows, which stay in the cache between their two readings; fewer where many units want some.
const CHUNK: usize = 1 << 16;
const CHUNKS: usize = 1 << 19;
/// Vectors that are added side by side.
const WIDTH: usize = 4;

pub(super) fn launch(call: &AccumulateCall) -> Result<(), Error> {
    let client = call.client;
    let [heads, rows, dim] = call.embeddings.dims3();
    let [lanes, _, classes, _] = call.sums.shape();
    let vector = call.embeddings.vector_size(call.blueprint);
    let chunk = (CHUNK.min(CHUNKS / lanes) / dim).clamp(32, 1024);
    // The first chunk of a batch may be one that was begun.
    addressable("a batch", rows as u128 + (chunk * lanes) as u128)?;
    let blueprint = call.blueprint.for_elements(heads * rows * dim);
    let (count, cube) = blueprint.unit_grid(client);
    // SAFETY: `Strided` proved the embeddings, labels have `rows` elements, the sums are [lanes, heads, classes, dim].
    unsafe {
        accumulate::launch_unchecked(
            client,
            count,
            cube,
            vector,
            call.embeddings.buffer_arg(vector),
            call.embeddings.strides_arg(vector),
            call.labels.buffer_arg(),
            BufferArg::from_raw_parts(client.empty(rows * size_of::<u32>()), rows),
            BufferArg::from_raw_parts(
                client.empty(lanes * chunk * size_of::<f32>()),
                lanes * chunk,
            ),
            whole(&call.sums.sums, vector),
            whole(&call.sums.carries, vector),
            whole(&call.sums.counts, 1),
            whole(&call.sums.status, 1),
            heads,
            rows,
            dim / vector,
            classes,
            chunk,
            lanes,
            call.sums.rows % (chunk * lanes),
            label_rule(call.labels.dtype(), classes, call.sums.options.ignore_index),
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
    targets: &mut [u32],            // [rows]
    inverse: &mut [f32],            // [lanes, chunk]
    sums: &mut [Vector<f32, N>],    // [lanes, heads, classes, columns]
    carries: &mut [Vector<f32, N>], // [lanes, heads, classes, columns]
    counts: &mut [u32],             // [classes]
    status: &mut [u32],             // [SUMS_STATUS_FIELDS]
    heads: usize,
    rows: usize,
    columns: usize, // vectors of a row
    classes: usize,
    chunk: usize,  // rows
    lanes: usize,  // of the sums
    before: usize, // rows since lane 0 began a chunk
    rule: LabelRule,
    #[comptime] units: usize,
    #[comptime] normalize: bool,
    #[comptime] fresh: bool,
    #[define(F)] _dtype: ElemType,
    #[define(I)] _label: ElemType,
) {
    let mut found = 0u32.runtime();
    if UNIT_POS == 0 {
        if comptime!(fresh) {
            for class in 0..classes {
                counts[class] = 0;
            }
        }
        found = classify::<I>(labels, targets, counts, status, rows, &rule, fresh);
    }
    // Places are counted in rows since lane 0 began a chunk.
    let last = before + rows;
    let mut chunks = 0usize.runtime();
    if told(found, units) > 0 {
        chunks = last.div_ceil(chunk);
    }
    let mut lane = UNIT_POS as usize;
    while lane < lanes {
        let of_lane = lane * heads * classes * columns;
        if comptime!(fresh) {
            for i in of_lane..of_lane + heads * classes * columns {
                sums[i] = Vector::<f32, N>::new(0.0);
                carries[i] = Vector::<f32, N>::new(0.0);
            }
        }
        let mut number = lane;
        while number < chunks {
            let start = number * chunk;
            let first = max(start, before) - before;
            let end = max(start + min(chunk, last - start), before) - before;
            for head in 0..heads {
                let source = head * strides.head;
                let mut squares = no_squares::<N>();
                for row in first..end {
                    let from = source + row * strides.row;
                    let at = lane * chunk + row - first;
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
                    inverse[lane * chunk] = norm_of::<N>(&squares);
                }
                for row in first..end {
                    let target = targets[row];
                    if is_class(target) {
                        let from = source + row * strides.row;
                        let sum = of_lane + (head * classes + target as usize) * columns;
                        let mut factor = 1.0f32.runtime();
                        if comptime!(normalize) {
                            factor = inverse[lane * chunk + row - first];
                        }
                        add_row::<F, N>(
                            embeddings, sums, carries, from, sum, columns, factor, normalize,
                        );
                    }
                }
            }
            number += lanes;
        }
        lane += units;
    }
}

/// Adds a row, times `factor` if it is normalized, to a sum.
#[cube]
fn add_row<F: Float, N: Size>(
    embeddings: &[Vector<F, N>],
    sums: &mut [Vector<f32, N>],
    carries: &mut [Vector<f32, N>],
    from: usize,
    to: usize,
    columns: usize,
    factor: f32,
    #[comptime] normalize: bool,
) {
    let together = columns / WIDTH * WIDTH;
    let mut column = 0usize.runtime();
    while column < together {
        #[unroll]
        for d in 0..WIDTH {
            let (from, to) = (from + column + d, to + column + d);
            add::<F, N>(embeddings, sums, carries, from, to, factor, normalize);
        }
        column += WIDTH;
    }
    for d in together..columns {
        add::<F, N>(
            embeddings,
            sums,
            carries,
            from + d,
            to + d,
            factor,
            normalize,
        );
    }
}

/// Adds a vector of an embedding to a sum, by Kahan.
#[cube]
fn add<F: Float, N: Size>(
    embeddings: &[Vector<F, N>],
    sums: &mut [Vector<f32, N>],
    carries: &mut [Vector<f32, N>],
    from: usize,
    to: usize,
    factor: f32,
    #[comptime] normalize: bool,
) {
    let mut value = Vector::<f32, N>::cast_from(embeddings[from]);
    if comptime!(normalize) {
        value *= Vector::<f32, N>::new(factor);
    }
    let mut sum = KahanLanes::<N> {
        sum: sums[to],
        carry: carries[to],
    };
    sum.add(value);
    sums[to] = sum.sum;
    carries[to] = sum.carry;
}
