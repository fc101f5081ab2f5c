//! One unit a row.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::std::tensor::TensorHandle;

use super::launch::Problem;
use crate::blueprint::Blueprint;
use crate::operand::whole;
use crate::packing::unit::EPSILON;

fn vector_size(blueprint: &Blueprint, problem: &Problem) -> usize {
    [&problem.whole, &problem.first, &problem.second]
        .map(|operand| operand.vector_size(blueprint))
        .into_iter()
        .fold(blueprint.lanes, usize::min)
}

pub(super) fn launch_forward(
    client: &Client,
    blueprint: &Blueprint,
    problem: &Problem,
    cosines: &TensorHandle,
) {
    let (count, cube) = blueprint.unit_grid();
    let vector = vector_size(blueprint, problem);
    // SAFETY: `Strided` proved the operands, the cosines are [rows].
    unsafe {
        forward::launch_unchecked(
            client,
            count,
            cube,
            vector,
            problem.whole.buffer_arg(vector),
            problem.first.buffer_arg(vector),
            problem.second.buffer_arg(vector),
            whole(cosines, 1),
            problem.whole.row_stride(vector),
            problem.first.row_stride(vector),
            problem.second.row_stride(vector),
            problem.rows,
            problem.dim,
            problem.whole.dtype(),
        );
    }
}

pub(super) fn launch_backward(
    client: &Client,
    blueprint: &Blueprint,
    problem: &Problem,
    upstream: &TensorHandle,
    grad: &TensorHandle,
    of_whole: bool,
) {
    let (count, cube) = blueprint.unit_grid();
    let vector = vector_size(blueprint, problem);
    // SAFETY: `Strided` proved the operands, the gradient is [rows, dim].
    unsafe {
        backward::launch_unchecked(
            client,
            count,
            cube,
            vector,
            problem.whole.buffer_arg(vector),
            problem.first.buffer_arg(vector),
            problem.second.buffer_arg(vector),
            whole(upstream, 1),
            whole(grad, vector),
            problem.whole.row_stride(vector),
            problem.first.row_stride(vector),
            problem.second.row_stride(vector),
            problem.rows,
            problem.dim,
            of_whole,
            problem.whole.dtype(),
        );
    }
}

/// `whole·part`, `‖whole‖` and `‖part‖` of a row.
#[derive(CubeType, Clone, Copy)]
struct Products {
    dot: f32,
    whole: f32,
    part: f32,
}

#[cube]
fn products<F: Float, N: Size>(
    whole: &[Vector<F, N>],
    first: &[Vector<F, N>],
    second: &[Vector<F, N>],
    whole_at: usize,
    first_at: usize,
    second_at: usize,
    dim: usize,
) -> Products {
    let mut dot = Vector::<f32, N>::new(0.0);
    let mut whole_squares = Vector::<f32, N>::new(0.0);
    let mut part_squares = Vector::<f32, N>::new(0.0);
    for d in 0..dim / N::value() {
        let w = Vector::<f32, N>::cast_from(whole[whole_at + d]);
        let p = Vector::<f32, N>::cast_from(first[first_at + d])
            + Vector::<f32, N>::cast_from(second[second_at + d]);
        dot = fma(w, p, dot);
        whole_squares = fma(w, w, whole_squares);
        part_squares = fma(p, p, part_squares);
    }
    Products {
        dot: dot.vector_sum(),
        whole: whole_squares.vector_sum().sqrt(),
        part: part_squares.vector_sum().sqrt(),
    }
}

#[cube(launch_unchecked)]
fn forward<F: Float, N: Size>(
    whole: &[Vector<F, N>],
    first: &[Vector<F, N>],
    second: &[Vector<F, N>],
    cosines: &mut [f32],
    whole_stride: usize,
    first_stride: usize,
    second_stride: usize,
    rows: usize,
    dim: usize,
    #[define(F)] _dtype: ElemType,
) {
    let mut row = ABSOLUTE_POS;
    while row < rows {
        let of_row = products::<F, N>(
            whole,
            first,
            second,
            row * whole_stride,
            row * first_stride,
            row * second_stride,
            dim,
        );
        // Divided one after the other: the product of two small norms would underflow.
        cosines[row] = of_row.dot / max(of_row.whole, EPSILON) / max(of_row.part, EPSILON);
        row += CUBE_COUNT * CUBE_DIM as usize;
    }
}

#[cube(launch_unchecked)]
fn backward<F: Float, N: Size>(
    whole: &[Vector<F, N>],
    first: &[Vector<F, N>],
    second: &[Vector<F, N>],
    upstream: &[f32],
    grad: &mut [Vector<F, N>],
    whole_stride: usize,
    first_stride: usize,
    second_stride: usize,
    rows: usize,
    dim: usize,
    #[comptime] of_whole: bool,
    #[define(F)] _dtype: ElemType,
) {
    let lanes = N::value();
    let share = -upstream[0] / f32::cast_from(rows as u32);
    let mut row = ABSOLUTE_POS;
    while row < rows {
        let (whole_at, first_at, second_at) =
            (row * whole_stride, row * first_stride, row * second_stride);
        let of_row = products::<F, N>(whole, first, second, whole_at, first_at, second_at, dim);
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
        let away = Vector::<f32, N>::new(share * inverse_other);
        let along = Vector::<f32, N>::new(-share * projection * inverse);
        for d in 0..dim / lanes {
            let w = Vector::<f32, N>::cast_from(whole[whole_at + d]);
            let p = Vector::<f32, N>::cast_from(first[first_at + d])
                + Vector::<f32, N>::cast_from(second[second_at + d]);
            let (own, other) = if comptime!(of_whole) { (w, p) } else { (p, w) };
            let value = fma(along, own, away * other) * Vector::<f32, N>::new(inverse);
            grad[row * dim / lanes + d] = Vector::<F, N>::cast_from(value);
        }
        row += CUBE_COUNT * CUBE_DIM as usize;
    }
}
