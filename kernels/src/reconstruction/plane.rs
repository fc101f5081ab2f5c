//! A group of units takes a row.
//!
//! Bytes, for operands of `b` bytes an element: forward reads `3·N·D·b` and writes `4·N`; backward reads `3·N·D·b` and writes
//! `N·D·b` for each gradient, since a row is still in the caches when it is read the second time. Both are what the
//! op needs at least, in loads and stores of 16 bytes wherever rows begin at such, each unit having several on the way.

use cubecl::prelude::*;
use cubecl::std::tensor::TensorHandle;

use super::launch::{BackwardCall, Call};
use super::row::{PerOperand, Products, load};
use crate::blueprint::PLANE_UNITS;
use crate::math::group::{Group, group_sum, member};
use crate::math::sum::{Kahan, sum_of_unit};
use crate::operand::whole;

/// Cubes of a forward launch: enough to fill a GPU, few enough that one cube sums what they found.
const CUBES: usize = 1024;

pub(super) fn launch_forward(call: &Call, cosines: &TensorHandle, loss: &TensorHandle) {
    let vector = call.vector;
    let group = Group::of(call.blueprint, call.dim / vector);
    let cubes = call.rows.div_ceil(group.per_cube()).min(CUBES);
    let partial = call.client.empty(cubes * size_of::<f32>());
    // SAFETY: `Strided` proved the operands, the cosines are [rows], the partial sums [cubes], the loss [1].
    unsafe {
        forward::launch_unchecked(
            call.client,
            CubeCount::new_1d(cubes as u32),
            CubeDim::new_1d(PLANE_UNITS as u32),
            vector,
            call.whole.buffer_arg(vector),
            call.first.buffer_arg(vector),
            call.second.buffer_arg(vector),
            whole(cosines, 1),
            BufferArg::from_raw_parts(partial.clone(), cubes),
            call.strides_arg(),
            call.rows,
            call.dim,
            group,
            call.whole.dtype(),
        );
        one_minus_mean::launch_unchecked(
            call.client,
            CubeCount::new_single(),
            CubeDim::new_1d(PLANE_UNITS as u32),
            BufferArg::from_raw_parts(partial, cubes),
            whole(loss, 1),
            call.rows as u32,
            Group::cube(call.blueprint),
        );
    }
}

pub(super) fn launch_backward(call: &BackwardCall) {
    let vector = call.of.vector;
    let group = Group::of(call.of.blueprint, call.of.dim / vector);
    // SAFETY: `Strided` proved the operands, the gradients that are written are [rows, dim].
    unsafe {
        backward::launch_unchecked(
            call.of.client,
            group.cubes(call.of.client, call.of.rows),
            CubeDim::new_1d(PLANE_UNITS as u32),
            vector,
            call.of.whole.buffer_arg(vector),
            call.of.first.buffer_arg(vector),
            call.of.second.buffer_arg(vector),
            whole(call.upstream, 1),
            call.whole_arg(),
            call.part_arg(),
            call.of.strides_arg(),
            call.of.rows,
            call.of.dim,
            group,
            call.grad_whole.is_some(),
            call.grad_part.is_some(),
            call.of.whole.dtype(),
        );
    }
}

/// The products of the group's row, in each of its units.
#[cube]
fn products<F: Float, N: Size>(
    whole: &[Vector<F, N>],
    first: &[Vector<F, N>],
    second: &[Vector<F, N>],
    at: &PerOperand,
    lane: usize,
    columns: usize, // none where the group has no row
    #[comptime] group: Group,
) -> Products {
    // One register each, whatever the vector: more rows on the way at once.
    let mut dot = 0.0f32.runtime();
    let mut whole_squares = 0.0f32.runtime();
    let mut part_squares = 0.0f32.runtime();
    let mut d = lane;
    while d < columns {
        let pair = load::<F, N>(whole, first, second, at, d);
        dot += (pair.whole * pair.part).vector_sum();
        whole_squares += (pair.whole * pair.whole).vector_sum();
        part_squares += (pair.part * pair.part).vector_sum();
        d += group.size;
    }
    Products {
        dot: group_sum(dot, group),
        whole: group_sum(whole_squares, group).sqrt(),
        part: group_sum(part_squares, group).sqrt(),
    }
}

#[cube(launch_unchecked)]
fn forward<F: Float, N: Size>(
    whole: &[Vector<F, N>],
    first: &[Vector<F, N>],
    second: &[Vector<F, N>],
    cosines: &mut [f32],
    partial: &mut [f32], // [cubes]: the sum of each cube's cosines
    strides: PerOperand,
    rows: usize,
    dim: usize,
    #[comptime] group: Group,
    #[define(F)] _dtype: ElemType,
) {
    let of = member(group);
    let groups = CUBE_COUNT * comptime!(group.per_cube());
    let mut sum = Kahan::new();
    // All groups take as many turns, because they meet at barriers.
    for turn in 0..rows.div_ceil(groups) {
        let row = turn * groups + of.group;
        let mut columns = 0usize.runtime();
        if row < rows {
            columns = dim / N::value();
        }
        let of_row = products::<F, N>(
            whole,
            first,
            second,
            &strides.at(row),
            of.lane,
            columns,
            group,
        );
        if row < rows && of.lane == 0 {
            let cosine = of_row.cosine();
            cosines[row] = cosine;
            sum.add(cosine);
        }
    }
    let all = group_sum(sum.total(), comptime!(group.of_its_cube()));
    if UNIT_POS == 0 {
        partial[CUBE_POS] = all;
    }
}

#[cube(launch_unchecked)]
fn one_minus_mean(partial: &[f32], loss: &mut [f32], rows: u32, #[comptime] group: Group) {
    let sum = sum_of_unit(partial, 0, partial.len(), UNIT_POS as usize, PLANE_UNITS);
    let all = group_sum(sum, group);
    if UNIT_POS == 0 {
        loss[0] = 1.0 - all / f32::cast_from(rows);
    }
}

#[cube(launch_unchecked)]
fn backward<F: Float, N: Size>(
    whole: &[Vector<F, N>],
    first: &[Vector<F, N>],
    second: &[Vector<F, N>],
    upstream: &[f32],
    grad_whole: &mut [Vector<F, N>],
    grad_part: &mut [Vector<F, N>],
    strides: PerOperand,
    rows: usize,
    dim: usize,
    #[comptime] group: Group,
    #[comptime] of_whole: bool,
    #[comptime] of_part: bool,
    #[define(F)] _dtype: ElemType,
) {
    let of = member(group);
    let mut columns = 0usize.runtime();
    if of.group < rows {
        columns = dim / N::value();
    }
    let at = strides.at(of.group);
    let of_row = products::<F, N>(whole, first, second, &at, of.lane, columns, group);
    let share = -upstream[0] / f32::cast_from(rows as u32);
    let to_whole = of_row.of_whole(share);
    let to_part = of_row.of_part(share);
    let mut out = of.group * columns + of.lane;
    let mut d = of.lane;
    while d < columns {
        let pair = load::<F, N>(whole, first, second, &at, d);
        if comptime!(of_whole) {
            let value = to_whole.apply::<N>(pair.whole, pair.part);
            grad_whole[out] = Vector::<F, N>::cast_from(value);
        }
        if comptime!(of_part) {
            let value = to_part.apply::<N>(pair.part, pair.whole);
            grad_part[out] = Vector::<F, N>::cast_from(value);
        }
        out += group.size;
        d += group.size;
    }
}
