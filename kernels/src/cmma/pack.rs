//! Rows on their way in and out: unit-norm copies of the operands, and gradients through the normalization.
//! A plane takes a row.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;
use cubecl::std::tensor::TensorHandle;

use super::{PLANE, UNITS};
use crate::blueprint::{Blueprint, cubes_for};
use crate::math::cube::group_sum;
use crate::operand::{Strided, address_type, whole};
use crate::packing::unit::{EPSILON, RowStrides};

const ROWS: usize = UNITS / PLANE; // of a cube

/// Which rows of an operand a launch takes, and how long they are, in vectors.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
struct Rows {
    heads: usize,
    /// The operand's row that is row 0 here.
    first: usize,
    /// Rows here that are real; the others are zero.
    real: usize,
    /// Rows here of a head.
    count: usize,
    columns: usize,
    columns_padded: usize,
}

/// The row that a plane takes.
#[derive(CubeType, Clone, Copy)]
struct RowOfPlane {
    lane: usize,
    head: usize,
    row: usize,
    /// Its number among all rows of the launch.
    number: usize,
    /// Whether it is a row of the launch at all: the last cube may have planes left over.
    is_there: bool,
    /// Whether the operand has it.
    real: bool,
    /// Where it begins in the operand, in vectors.
    from: usize,
}

#[cube]
impl RowOfPlane {
    fn locate(rows: &Rows, strides: &RowStrides) -> RowOfPlane {
        let at = CUBE_POS * ROWS + UNIT_POS as usize / PLANE;
        let head = at / rows.count;
        let row = at % rows.count;
        RowOfPlane {
            lane: UNIT_POS as usize % PLANE,
            head,
            row,
            number: at,
            is_there: head < rows.heads,
            real: head < rows.heads && row < rows.real,
            from: head * strides.head + (rows.first + row) * strides.row,
        }
    }
}

/// `x / max(‖x‖, EPSILON)` of the rows `first .. first + real` of every head, zero-padded to `[heads, count, dim_padded]`.
pub(crate) fn pack_chunk(
    client: &Client,
    blueprint: &Blueprint,
    operand: &Strided,
    first: usize,
    real: usize,
    count: usize,
    dim_padded: usize,
) -> Handle {
    let [heads, _, dim] = operand.dims3();
    let vector = operand.vector_size(blueprint);
    let elements = heads * count * dim_padded;
    let packed = client.empty(elements * operand.dtype().size());
    // SAFETY: `Strided` proved the operand, which has rows up to `first + real`; `packed` has `heads · count` rows.
    unsafe {
        pack::launch_unchecked(
            client,
            cubes_for(client, (heads * count).div_ceil(ROWS)),
            CubeDim::new_1d(UNITS as u32),
            address_type(&[operand.elements(), elements]),
            vector,
            operand.buffer_arg(vector),
            operand.strides_arg(vector),
            BufferArg::from_raw_parts(packed.clone(), elements / vector),
            RowsLaunch::new(heads, first, real, count, dim / vector, dim_padded / vector),
            operand.dtype(),
        );
    }
    packed
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn pack<F: Float, M: Size>(
    source: &[Vector<F, M>],
    strides: RowStrides,
    packed: &mut [Vector<F, M>], // [heads, count, dim_padded]
    rows: Rows,
    #[define(F)] _dtype: ElemType,
) {
    let at = RowOfPlane::locate(&rows, &strides);
    let mut squares = Vector::<f32, M>::new(0.0);
    if at.real {
        let mut d = at.lane;
        while d < rows.columns {
            let value = Vector::<f32, M>::cast_from(source[at.from + d]);
            squares = fma(value, value, squares);
            d += PLANE;
        }
    }
    let norm = group_sum(squares.vector_sum(), UNITS, PLANE).sqrt();
    let inverse = Vector::<f32, M>::new(1.0 / max(norm, EPSILON));
    if at.is_there {
        let mut d = at.lane;
        while d < rows.columns_padded {
            let mut value = Vector::<F, M>::cast_from(Vector::<f32, M>::new(0.0));
            if at.real && d < rows.columns {
                let x = Vector::<f32, M>::cast_from(source[at.from + d]);
                value = Vector::<F, M>::cast_from(x * inverse);
            }
            packed[at.number * rows.columns_padded + d] = value;
            d += PLANE;
        }
    }
}

/// The gradients of rows `first .. first + count` of every head, of which `real` take part and the others get zeros:
/// `factor[head] · (dx̂ − x̂ (x̂·dx̂)) / ‖x‖`, or `factor · dx̂ / EPSILON` where the norm was clamped.
#[allow(clippy::too_many_arguments)] // a range, its gradient, where it goes
pub(super) fn finish_chunk(
    client: &Client,
    blueprint: &Blueprint,
    operand: &Strided,
    first: usize,
    real: usize,
    count: usize,
    gradient: &Handle, // f32, [heads, padded, dim_padded]
    padded: usize,
    dim_padded: usize,
    factors: &Handle,    // f32, [heads]
    grad: &TensorHandle, // [heads, rows of the operand, dim], overwritten
) {
    let [heads, stored, dim] = operand.dims3();
    let vector = operand.vector_size(blueprint);
    let elements = heads * padded * dim_padded;
    // SAFETY: `Strided` proved the operand, whose shape `grad` has; the gradient has whole rows for all that are real.
    unsafe {
        finish::launch_unchecked(
            client,
            cubes_for(client, (heads * count).div_ceil(ROWS)),
            CubeDim::new_1d(UNITS as u32),
            address_type(&[operand.elements(), heads * stored * dim]),
            vector,
            operand.buffer_arg(vector),
            operand.strides_arg(vector),
            BufferArg::from_raw_parts(gradient.clone(), elements / vector),
            BufferArg::from_raw_parts(factors.clone(), heads),
            whole(grad, vector),
            RowsLaunch::new(heads, first, real, count, dim / vector, dim_padded / vector),
            padded,
            stored,
            operand.dtype(),
        );
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn finish<F: Float, M: Size>(
    source: &[Vector<F, M>],
    strides: RowStrides,
    gradient: &[Vector<f32, M>], // [heads, padded, dim_padded]
    factors: &[f32],             // [heads]
    grad: &mut [Vector<F, M>],   // [heads, stored, dim]
    rows: Rows,
    padded: usize,
    stored: usize,
    #[define(F)] _dtype: ElemType,
) {
    let at = RowOfPlane::locate(&rows, &strides);
    let upstream = (at.head * padded + at.row) * rows.columns_padded;
    let mut squares = Vector::<f32, M>::new(0.0);
    let mut along = Vector::<f32, M>::new(0.0);
    if at.real {
        let mut d = at.lane;
        while d < rows.columns {
            let value = Vector::<f32, M>::cast_from(source[at.from + d]);
            squares = fma(value, value, squares);
            along = fma(value, gradient[upstream + d], along);
            d += PLANE;
        }
    }
    let norm = group_sum(squares.vector_sum(), UNITS, PLANE).sqrt();
    let along = group_sum(along.vector_sum(), UNITS, PLANE);
    let inverse = 1.0 / max(norm, EPSILON);
    let mut projection = along * inverse * inverse;
    if norm < EPSILON {
        projection = 0.0;
    }
    if at.is_there {
        let mut factor = 0.0f32.runtime();
        if at.real {
            factor = factors[at.head] * inverse;
        }
        let factor = Vector::<f32, M>::new(factor);
        let projection = Vector::<f32, M>::new(-projection);
        let out = (at.head * stored + rows.first + at.row) * rows.columns;
        let mut d = at.lane;
        while d < rows.columns {
            let mut value = Vector::<f32, M>::new(0.0);
            if at.real {
                let x = Vector::<f32, M>::cast_from(source[at.from + d]);
                value = fma(projection, x, gradient[upstream + d]) * factor;
            }
            grad[out + d] = Vector::<F, M>::cast_from(value);
            d += PLANE;
        }
    }
}
