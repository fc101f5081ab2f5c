//! One cube a row.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::std::tensor::TensorHandle;

use super::launch::Problem;
use crate::blueprint::{PLANE_UNITS, cubes_for};
use crate::math::cube::cube_sum;
use crate::operand::whole;
use crate::packing::unit::EPSILON;

pub(super) fn launch_forward(client: &Client, problem: &Problem, cosines: &TensorHandle) {
    // SAFETY: `Strided` proved the operands, the cosines are [rows].
    unsafe {
        forward::launch_unchecked(
            client,
            cubes_for(client, problem.rows),
            CubeDim::new_1d(PLANE_UNITS as u32),
            problem.whole.buffer_arg(1),
            problem.first.buffer_arg(1),
            problem.second.buffer_arg(1),
            whole(cosines, 1),
            problem.whole.row_stride(1),
            problem.first.row_stride(1),
            problem.second.row_stride(1),
            problem.rows,
            problem.dim,
            problem.whole.dtype(),
        );
    }
}

pub(super) fn launch_backward(
    client: &Client,
    problem: &Problem,
    upstream: &TensorHandle,
    grad: &TensorHandle,
    of_whole: bool,
) {
    // SAFETY: `Strided` proved the operands, the gradient is [rows, dim].
    unsafe {
        backward::launch_unchecked(
            client,
            cubes_for(client, problem.rows),
            CubeDim::new_1d(PLANE_UNITS as u32),
            problem.whole.buffer_arg(1),
            problem.first.buffer_arg(1),
            problem.second.buffer_arg(1),
            whole(upstream, 1),
            whole(grad, 1),
            problem.whole.row_stride(1),
            problem.first.row_stride(1),
            problem.second.row_stride(1),
            problem.rows,
            problem.dim,
            of_whole,
            problem.whole.dtype(),
        );
    }
}

/// `whole·part`, `‖whole‖` and `‖part‖` of a row, in every unit.
#[derive(CubeType, Clone, Copy)]
struct Products {
    dot: f32,
    whole: f32,
    part: f32,
}

#[cube]
fn products<F: Float>(
    whole: &[F],
    first: &[F],
    second: &[F],
    whole_at: usize,
    first_at: usize,
    second_at: usize,
    dim: usize,
) -> Products {
    let mut dot = 0.0f32.runtime();
    let mut whole_squares = 0.0f32.runtime();
    let mut part_squares = 0.0f32.runtime();
    let mut d = UNIT_POS as usize;
    while d < dim {
        let w = f32::cast_from(whole[whole_at + d]);
        let p = f32::cast_from(first[first_at + d]) + f32::cast_from(second[second_at + d]);
        dot += w * p;
        whole_squares += w * w;
        part_squares += p * p;
        d += PLANE_UNITS;
    }
    Products {
        dot: cube_sum(dot, PLANE_UNITS),
        whole: cube_sum(whole_squares, PLANE_UNITS).sqrt(),
        part: cube_sum(part_squares, PLANE_UNITS).sqrt(),
    }
}

#[cube(launch_unchecked)]
fn forward<F: Float>(
    whole: &[F],
    first: &[F],
    second: &[F],
    cosines: &mut [f32],
    whole_stride: usize,
    first_stride: usize,
    second_stride: usize,
    rows: usize,
    dim: usize,
    #[define(F)] _dtype: ElemType,
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let of_row = products::<F>(
        whole,
        first,
        second,
        row * whole_stride,
        row * first_stride,
        row * second_stride,
        dim,
    );
    if UNIT_POS == 0 {
        // Divided one after the other: the product of two small norms would underflow.
        cosines[row] = of_row.dot / max(of_row.whole, EPSILON) / max(of_row.part, EPSILON);
    }
}

#[cube(launch_unchecked)]
fn backward<F: Float>(
    whole: &[F],
    first: &[F],
    second: &[F],
    upstream: &[f32],
    grad: &mut [F],
    whole_stride: usize,
    first_stride: usize,
    second_stride: usize,
    rows: usize,
    dim: usize,
    #[comptime] of_whole: bool,
    #[define(F)] _dtype: ElemType,
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let share = -upstream[0] / f32::cast_from(rows as u32);
    let (whole_at, first_at, second_at) =
        (row * whole_stride, row * first_stride, row * second_stride);
    let of_row = products::<F>(whole, first, second, whole_at, first_at, second_at, dim);
    let inverse_whole = 1.0 / max(of_row.whole, EPSILON);
    let inverse_part = 1.0 / max(of_row.part, EPSILON);
    let (norm, inverse, inverse_other) = if comptime!(of_whole) {
        (of_row.whole, inverse_whole, inverse_part)
    } else {
        (of_row.part, inverse_part, inverse_whole)
    };
    let mut projection = of_row.dot * inverse_whole * inverse_part;
    if norm < EPSILON {
        projection = 0.0;
    }
    let away = share * inverse_other;
    let along = -share * projection * inverse;
    let mut d = UNIT_POS as usize;
    while d < dim {
        let w = f32::cast_from(whole[whole_at + d]);
        let p = f32::cast_from(first[first_at + d]) + f32::cast_from(second[second_at + d]);
        let (own, other) = if comptime!(of_whole) { (w, p) } else { (p, w) };
        grad[row * dim + d] = F::cast_from((along * own + away * other) * inverse);
        d += PLANE_UNITS;
    }
}
