//! Rows on their way in and out: unit-norm copies of the operands, and gradients through the normalization.
//! A group of units takes a row.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;
use cubecl::std::tensor::TensorHandle;

use crate::blueprint::{Blueprint, PLANE_UNITS};
use crate::math::group::{Group, group_sum, member};
use crate::math::norm::{inverse_norm, projection};
use crate::operand::{RowStrides, Strided, address_type, whole};

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

/// The row that a group takes.
#[derive(CubeType, Clone, Copy)]
struct RowOfGroup {
    lane: usize,
    head: usize,
    row: usize,
    /// Its number among all rows of the launch.
    number: usize,
    /// Whether it is a row of the launch at all: the last cube may have groups left over.
    is_there: bool,
    /// Whether the operand has it.
    real: bool,
    /// Where it begins in the operand, in vectors.
    from: usize,
}

#[cube]
impl RowOfGroup {
    fn locate(rows: &Rows, strides: &RowStrides, #[comptime] group: Group) -> RowOfGroup {
        let at = member(group);
        let head = at.group / rows.count;
        let row = at.group % rows.count;
        RowOfGroup {
            lane: at.lane,
            head,
            row,
            number: at.group,
            is_there: head < rows.heads,
            real: head < rows.heads && row < rows.real,
            from: head * strides.head + (rows.first + row) * strides.row,
        }
    }
}

/// Rows of an operand that a launch takes.
pub(super) struct RowsOf<'a> {
    pub operand: &'a Strided,
    /// The operand's rows `first .. first + real` of every head take part,
    pub first: usize,
    pub real: usize,
    /// and the others of so many are zero.
    pub count: usize,
    /// Elements of a row where they are packed.
    pub dim_padded: usize,
}

impl RowsOf<'_> {
    fn launch_arg(&self, vector: usize) -> RowsLaunch {
        let [heads, _, dim] = self.operand.dims3();
        let (columns, padded) = (dim / vector, self.dim_padded / vector);
        RowsLaunch::new(heads, self.first, self.real, self.count, columns, padded)
    }
}

/// `sign · x / max(‖x‖, EPSILON)` of the rows, zero-padded to `[heads, count, dim_padded]` and rounded to `dtype`, into `packed`, which has
/// so many rows at least.
pub(super) fn pack_chunk(
    client: &Client,
    blueprint: &Blueprint,
    rows: &RowsOf,
    sign: f32,
    dtype: ElemType,
    packed: &Handle,
) {
    let operand = rows.operand;
    let [heads, _, dim] = operand.dims3();
    let vector = operand.vector_size(blueprint);
    let group = Group::of(blueprint, dim / vector);
    let elements = heads * rows.count * rows.dim_padded;
    // SAFETY: `Strided` proved the operand, which has rows up to `first + real`; `packed` has `heads · count` rows.
    unsafe {
        pack::launch_unchecked(
            client,
            group.cubes(client, heads * rows.count),
            CubeDim::new_1d(PLANE_UNITS as u32),
            address_type(&[operand.elements(), elements]),
            vector,
            operand.buffer_arg(vector),
            operand.strides_arg(vector),
            BufferArg::from_raw_parts(packed.clone(), elements / vector),
            rows.launch_arg(vector),
            sign,
            group,
            operand.dtype(),
            dtype,
        );
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn pack<F: Float, P: Float, M: Size>(
    source: &[Vector<F, M>],
    strides: RowStrides,
    packed: &mut [Vector<P, M>], // [heads, count, dim_padded]
    rows: Rows,
    sign: f32,
    #[comptime] group: Group,
    #[define(F)] _dtype: ElemType,
    #[define(P)] _of_packed: ElemType,
) {
    let at = RowOfGroup::locate(&rows, &strides, group);
    let mut squares = 0.0f32.runtime();
    if at.real {
        let mut d = at.lane;
        while d < rows.columns {
            let value = Vector::<f32, M>::cast_from(source[at.from + d]);
            squares += (value * value).vector_sum();
            d += group.size;
        }
    }
    let norm = group_sum(squares, group).sqrt();
    let inverse = Vector::<f32, M>::new(inverse_norm(norm) * sign);
    if at.is_there {
        let mut d = at.lane;
        while d < rows.columns_padded {
            let mut value = Vector::<P, M>::cast_from(Vector::<f32, M>::new(0.0));
            if at.real && d < rows.columns {
                let x = Vector::<f32, M>::cast_from(source[at.from + d]);
                value = Vector::<P, M>::cast_from(x * inverse);
            }
            packed[at.number * rows.columns_padded + d] = value;
            d += group.size;
        }
    }
}

/// Rows of an operand and the gradients of their unit rows.
pub(super) struct Unfinished<'a> {
    pub rows: RowsOf<'a>,
    /// f32, `[heads, padded, dim_padded]`
    pub gradient: &'a Handle,
    pub padded: usize,
    /// f32, `[heads]`: what the gradients are multiplied with.
    pub factors: &'a Handle,
    /// What the gradient of the scale wants of them.
    pub of_scale: Option<&'a ScaleRows>,
}

/// What rows have of the gradient of the scale.
pub(super) struct ScaleRows {
    /// f32, `[heads, rows]`: all that they have, times the scale.
    pub rows: Handle,
    /// f32, `[heads, padded]`: what a margin adds, over the head's factor.
    pub of_margin: Option<Handle>,
}

/// The gradients of the rows, through the normalization, into `grad [heads, rows of the operand, dim]`.
pub(super) fn finish_chunk(
    client: &Client,
    blueprint: &Blueprint,
    from: &Unfinished,
    grad: &TensorHandle,
) {
    let (operand, count) = (from.rows.operand, from.rows.count);
    let [heads, stored, dim] = operand.dims3();
    let vector = operand.vector_size(blueprint);
    let group = Group::of(blueprint, dim / vector);
    let columns = from.rows.dim_padded / vector;
    let f32s = |handle: &Handle, count: usize| {
        // SAFETY: every buffer has the length of its comment.
        unsafe { BufferArg::from_raw_parts(handle.clone(), count) }
    };
    let of_margin = from.of_scale.and_then(|scale| scale.of_margin.as_ref());
    // SAFETY: `Strided` proved the operand, whose shape `grad` has; the gradient has whole rows for all that are real; what is not
    // there is neither read nor written.
    unsafe {
        finish::launch_unchecked(
            client,
            group.cubes(client, heads * count),
            CubeDim::new_1d(PLANE_UNITS as u32),
            address_type(&[operand.elements(), heads * stored * dim]),
            vector,
            operand.buffer_arg(vector),
            operand.strides_arg(vector),
            f32s(from.gradient, heads * from.padded * columns),
            f32s(from.factors, heads),
            match of_margin {
                Some(of_margin) => f32s(of_margin, heads * from.padded),
                None => f32s(from.factors, heads),
            },
            match from.of_scale {
                Some(scale) => f32s(&scale.rows, heads * count),
                None => f32s(&client.empty(size_of::<f32>()), 1),
            },
            whole(grad, vector),
            from.rows.launch_arg(vector),
            from.padded,
            stored,
            from.of_scale.is_some(),
            of_margin.is_some(),
            group,
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
    of_margin: &[f32],           // [heads, padded] if has_margin
    scale_rows: &mut [f32],      // [heads, count] if of_scale
    grad: &mut [Vector<F, M>],   // [heads, stored, dim]
    rows: Rows,
    padded: usize,
    stored: usize,
    #[comptime] of_scale: bool,
    #[comptime] has_margin: bool,
    #[comptime] group: Group,
    #[define(F)] _dtype: ElemType,
) {
    let at = RowOfGroup::locate(&rows, &strides, group);
    let upstream = (at.head * padded + at.row) * rows.columns_padded;
    let mut squares = 0.0f32.runtime();
    let mut along = 0.0f32.runtime();
    if at.real {
        let mut d = at.lane;
        while d < rows.columns {
            let value = Vector::<f32, M>::cast_from(source[at.from + d]);
            squares += (value * value).vector_sum();
            along += (value * gradient[upstream + d]).vector_sum();
            d += group.size;
        }
    }
    let norm = group_sum(squares, group).sqrt();
    let along = group_sum(along, group);
    let inverse = inverse_norm(norm);
    if comptime!(of_scale) && at.is_there && at.lane == 0 {
        let mut value = 0.0f32.runtime();
        if at.real {
            value = along * inverse;
            if comptime!(has_margin) {
                value += of_margin[at.head * padded + at.row];
            }
            value *= factors[at.head];
        }
        scale_rows[at.number] = value;
    }
    let projection = projection(along, norm) * inverse * inverse;
    if at.is_there {
        let mut factor = 0.0f32.runtime();
        if at.real {
            factor = factors[at.head];
        }
        let factor = Vector::<f32, M>::new(factor);
        let inverse = Vector::<f32, M>::new(inverse);
        let projection = Vector::<f32, M>::new(-projection);
        let out = (at.head * stored + rows.first + at.row) * rows.columns;
        let mut d = at.lane;
        while d < rows.columns {
            let mut value = Vector::<f32, M>::new(0.0);
            if at.real {
                let x = Vector::<f32, M>::cast_from(source[at.from + d]);
                // One after the other: a large gradient at a short row is not infinite where it is zero.
                value = fma(projection, x, gradient[upstream + d]) * inverse * factor;
            }
            grad[out + d] = Vector::<F, M>::cast_from(value);
            d += group.size;
        }
    }
}
