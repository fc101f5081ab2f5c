//! Rows are first sorted by class, stably, then each unit sums the rows of one lane of one class, for a vector of columns.
//!
//! A lane is every `lanes`-th row of its class, counted from the first that the state has ever seen; there are more of them the
//! fewer classes there are, so that a GPU has enough to do. A lane's rows are added in order, and so it makes no difference
//! how they came in batches.
//!
//! Bytes, for embeddings of `b` bytes an element: `H·N·D·b`, each read once, in loads of 16 bytes of which a unit has several on
//! the way; `8·L·H·K'·D` written for sums and carries of the `K'` classes that the batch has rows of (and read, if batches before had
//! some), where `L·H·K·D` is at most 131,072 if `L` is more than 1; and what the sort takes, which has no factor `D`. Normalized
//! rows are read twice.

mod sort;

use cubecl::prelude::*;

use super::launch::AccumulateCall;
use crate::blueprint::{PLANE_UNITS, cubes_for};
use crate::math::group::{Group, group_sum, member};
use crate::math::norm::inverse_norm;
use crate::math::sum::KahanLanes;
use crate::operand::{RowStrides, whole};

/// Rows that a unit has on the way at once.
const AHEAD: usize = 4;

/// Lanes of the sums: with few classes, enough for all units of a GPU.
pub(super) fn lanes([heads, classes, dim]: [usize; 3]) -> usize {
    let elements = heads.saturating_mul(classes).saturating_mul(dim);
    let most = (1 << 17) / elements.max(1);
    1 << most.clamp(1, 16).ilog2()
}

pub(super) fn launch(call: &AccumulateCall) {
    let client = call.client;
    let [heads, rows, dim] = call.embeddings.dims3();
    let [lanes, _, classes, _] = call.sums.shape();
    let vector = call.embeddings.vector_size(call.blueprint);
    let group = Group::of(call.blueprint, dim / vector);
    let cube = CubeDim::new_1d(PLANE_UNITS as u32);
    let sorted = sort::launch(call);
    // A single element where nobody asks for them.
    let norms = match call.sums.options.normalize {
        true => heads * rows,
        false => 1,
    };
    let inverse = client.empty(norms * size_of::<f32>());
    // SAFETY: every buffer has the length named beside it in the kernels; `Strided` proved the embeddings.
    unsafe {
        if call.sums.options.normalize {
            inverse_norms::launch_unchecked(
                client,
                group.cubes(client, norms),
                cube,
                vector,
                call.embeddings.buffer_arg(vector),
                call.embeddings.strides_arg(vector),
                BufferArg::from_raw_parts(inverse.clone(), norms),
                heads,
                rows,
                dim,
                group,
                call.embeddings.dtype(),
            );
        }
        let units = lanes * heads * classes * (dim / vector);
        sum::launch_unchecked(
            client,
            cubes_for(client, units.div_ceil(PLANE_UNITS)),
            cube,
            vector,
            call.embeddings.buffer_arg(vector),
            call.embeddings.strides_arg(vector),
            BufferArg::from_raw_parts(inverse, norms),
            BufferArg::from_raw_parts(sorted.starts, classes + 1),
            BufferArg::from_raw_parts(sorted.order, rows),
            whole(&call.sums.counts, 1),
            whole(&call.sums.sums, vector),
            whole(&call.sums.carries, vector),
            lanes,
            heads,
            rows,
            dim,
            classes,
            call.sums.options.normalize,
            call.embeddings.dtype(),
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
    #[comptime] group: Group,
    #[define(F)] _dtype: ElemType,
) {
    let of = member(group);
    let is_there = of.group < heads * rows;
    let from = of.group / rows * strides.head + of.group % rows * strides.row;
    let mut squares = 0.0f32.runtime();
    if is_there {
        let mut d = of.lane;
        while d < dim / N::value() {
            let value = Vector::<f32, N>::cast_from(embeddings[from + d]);
            squares += (value * value).vector_sum();
            d += group.size;
        }
    }
    let norm = group_sum(squares, group).sqrt();
    if is_there && of.lane == 0 {
        inverse[of.group] = inverse_norm(norm);
    }
}

#[cube(launch_unchecked)]
fn sum<F: Float, N: Size>(
    embeddings: &[Vector<F, N>],
    strides: RowStrides,
    inverse: &[f32],                // [heads, rows] if rows are normalized
    starts: &[u32],                 // [classes + 1]
    order: &[u32],                  // [rows]
    counts: &[u32],                 // [classes], with this batch
    sums: &mut [Vector<f32, N>],    // [lanes, heads, classes, dim]
    carries: &mut [Vector<f32, N>], // [lanes, heads, classes, dim]
    lanes: usize,
    heads: usize,
    rows: usize,
    dim: usize,
    classes: usize,
    #[comptime] normalize: bool,
    #[define(F)] _dtype: ElemType,
) {
    let columns = dim / N::value();
    let at = ABSOLUTE_POS;
    if at >= lanes * heads * classes * columns {
        terminate!();
    }
    let column = at % columns;
    let class = at / columns % classes;
    let head = at / columns / classes % heads;
    let lane = at / columns / classes / heads;
    let start = starts[class] as usize;
    let end = starts[class + 1] as usize;
    if start == end {
        terminate!();
    }
    let from = head * strides.head + column;
    // Rows of the class before this batch: whether it has sums, and which of its rows are the lane's.
    let before = counts[class] as usize - (end - start);
    let mut sum = KahanLanes::<N> {
        sum: Vector::<f32, N>::new(0.0),
        carry: Vector::<f32, N>::new(0.0),
    };
    if before > 0 {
        sum.sum = sums[at];
        sum.carry = carries[at];
    }
    let mut place = start + (lane + lanes - before % lanes) % lanes;
    while place + (AHEAD - 1) * lanes < end {
        let mut values = Array::<Vector<f32, N>>::new(AHEAD);
        #[unroll]
        for i in 0..AHEAD {
            let row = order[place + i * lanes] as usize;
            values[i] = Vector::<f32, N>::cast_from(embeddings[from + row * strides.row]);
            if comptime!(normalize) {
                values[i] *= Vector::<f32, N>::new(inverse[head * rows + row]);
            }
        }
        #[unroll]
        for i in 0..AHEAD {
            sum.add(values[i]);
        }
        place += AHEAD * lanes;
    }
    while place < end {
        let row = order[place] as usize;
        let mut value = Vector::<f32, N>::cast_from(embeddings[from + row * strides.row]);
        if comptime!(normalize) {
            value *= Vector::<f32, N>::new(inverse[head * rows + row]);
        }
        sum.add(value);
        place += lanes;
    }
    sums[at] = sum.sum;
    carries[at] = sum.carry;
}
