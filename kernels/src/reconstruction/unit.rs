//! One unit a row.

use cubecl::prelude::*;
use cubecl::std::tensor::TensorHandle;

use super::launch::{BackwardCall, Call};
use super::row::{Pair, PerOperand, Products, load};
use crate::math::narrow::narrow;
use crate::math::span::meet;
use crate::math::sum::sum_of_unit;
use crate::operand::whole;

pub(super) fn launch_forward(call: &Call, cosines: &TensorHandle, loss: &TensorHandle) {
    let (count, cube) = call.blueprint.unit_grid(call.client);
    let vector = call.vector;
    // SAFETY: `Strided` proved the operands, the cosines are [rows], the loss is [1].
    unsafe {
        forward::launch_unchecked(
            call.client,
            count,
            cube,
            vector,
            call.whole.buffer_arg(vector),
            call.first.buffer_arg(vector),
            call.second.buffer_arg(vector),
            whole(cosines, 1),
            whole(loss, 1),
            call.strides_arg(),
            call.rows,
            call.dim,
            call.blueprint.units,
            call.whole.dtype(),
        );
    }
}

pub(super) fn launch_backward(call: &BackwardCall) {
    let (count, cube) = call.of.blueprint.unit_grid(call.of.client);
    let vector = call.of.vector;
    // SAFETY: `Strided` proved the operands, the gradients that are written are [rows, dim].
    unsafe {
        backward::launch_unchecked(
            call.of.client,
            count,
            cube,
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
            call.grad_whole.is_some(),
            call.grad_part.is_some(),
            call.of.whole.dtype(),
        );
    }
}

/// `whole·part`, `‖whole‖²` and `‖part‖²`, in lanes.
#[derive(CubeType, Clone, Copy)]
struct Sums<N: Size> {
    pub dot: Vector<f32, N>,
    pub whole: Vector<f32, N>,
    pub part: Vector<f32, N>,
}

#[cube]
impl<N: Size> Sums<N> {
    fn new() -> Sums<N> {
        Sums::<N> {
            dot: Vector::<f32, N>::new(0.0),
            whole: Vector::<f32, N>::new(0.0),
            part: Vector::<f32, N>::new(0.0),
        }
    }

    fn add(&mut self, pair: Pair<N>) {
        self.dot = fma(pair.whole, pair.part, self.dot);
        self.whole = fma(pair.whole, pair.whole, self.whole);
        self.part = fma(pair.part, pair.part, self.part);
    }
}

#[cube]
fn products<F: Float, N: Size>(
    whole: &[Vector<F, N>],
    first: &[Vector<F, N>],
    second: &[Vector<F, N>],
    at: &PerOperand,
    dim: usize,
) -> Products {
    let mut sums = Sums::<N>::new();
    for d in 0..dim / N::value() {
        sums.add(load::<F, N>(whole, first, second, at, d));
    }
    Products {
        dot: sums.dot.vector_sum(),
        whole: sums.whole.vector_sum().sqrt(),
        part: sums.part.vector_sum().sqrt(),
    }
}

#[cube(launch_unchecked)]
fn forward<F: Float, N: Size>(
    whole: &[Vector<F, N>],
    first: &[Vector<F, N>],
    second: &[Vector<F, N>],
    cosines: &mut [f32],
    loss: &mut [f32],
    strides: PerOperand,
    rows: usize,
    dim: usize,
    #[comptime] units: usize,
    #[define(F)] _dtype: ElemType,
) {
    let mut row = UNIT_POS as usize;
    while row < rows {
        let of_row = products::<F, N>(whole, first, second, &strides.at(row), dim);
        cosines[row] = of_row.cosine();
        row += CUBE_DIM as usize;
    }
    meet(units);
    if UNIT_POS == 0 {
        let sum = sum_of_unit(&*cosines, 0usize, rows, 0usize, 1usize);
        loss[0] = 1.0 - sum / f32::cast_from(rows as u32);
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
    #[comptime] of_whole: bool,
    #[comptime] of_part: bool,
    #[define(F)] _dtype: ElemType,
) {
    let columns = dim / N::value();
    let share = -upstream[0] / f32::cast_from(rows as u32);
    let mut row = ABSOLUTE_POS;
    while row < rows {
        let at = strides.at(row);
        let of_row = products::<F, N>(whole, first, second, &at, dim);
        let (to_whole, to_part) = (of_row.of_whole(share), of_row.of_part(share));
        for d in 0..columns {
            let pair = load::<F, N>(whole, first, second, &at, d);
            let out = row * columns + d;
            if comptime!(of_whole) {
                let value = to_whole.apply::<N>(pair.whole, pair.part);
                grad_whole[out] = narrow::<F, N>(value);
            }
            if comptime!(of_part) {
                let value = to_part.apply::<N>(pair.part, pair.whole);
                grad_part[out] = narrow::<F, N>(value);
            }
        }
        row += CUBE_COUNT * CUBE_DIM as usize;
    }
}
