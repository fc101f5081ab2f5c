//! A cube packs a row at a time, and multiplies square tiles of the packed operands through shared memory.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;
use cubecl::std::tensor::TensorHandle;

use super::unit::{EPSILON, RowStrides};
use super::{Layout, Operand, Packed};
use crate::blueprint::{PLANE_SIDE, PLANE_UNITS, cubes_for};
use crate::math::cube::cube_sum;
use crate::operand::{Strided, whole};

pub(super) fn launch(client: &Client, embeddings: &Strided, weights: &Strided, packed: &Packed) {
    // SAFETY: `Strided` proved that its strides stay inside its buffer, `Packed::new` allocated every packed row.
    unsafe {
        pack::launch_unchecked(
            client,
            cubes_for(client, packed.sizes.packed_rows()),
            CubeDim::new_1d(PLANE_UNITS as u32),
            embeddings.buffer_arg(1),
            embeddings.strides_arg(1),
            weights.buffer_arg(1),
            weights.strides_arg(1),
            packed.rows_arg(),
            packed.norms_arg(),
            packed.sizes.launch_arg(),
            embeddings.dtype(),
        );
    }
}

#[cube(launch_unchecked)]
fn pack<F: Float>(
    embeddings: &[F],
    embedding_strides: RowStrides,
    weights: &[F],
    weight_strides: RowStrides,
    rows: &mut [f32],
    norms: &mut [f32],
    layout: Layout,
    #[define(F)] _dtype: ElemType,
) {
    let packed_row = CUBE_POS;
    let weights_start = layout.head_start(0, Operand::Weights);
    if packed_row >= weights_start + layout.heads * layout.active_padded {
        terminate!();
    }
    if packed_row < weights_start {
        pack_row::<F>(
            embeddings,
            &embedding_strides,
            rows,
            norms,
            &layout,
            packed_row,
            packed_row,
            Operand::Embeddings,
        );
    } else {
        pack_row::<F>(
            weights,
            &weight_strides,
            rows,
            norms,
            &layout,
            packed_row,
            packed_row - weights_start,
            Operand::Weights,
        );
    }
}

#[cube]
fn pack_row<F: Float>(
    source: &[F],
    strides: &RowStrides,
    rows: &mut [f32],
    norms: &mut [f32],
    layout: &Layout,
    packed_row: usize,
    operand_row: usize,
    #[comptime] operand: Operand,
) {
    let unit = UNIT_POS as usize;
    let head = operand_row / layout.padded(operand);
    let row = operand_row % layout.padded(operand);
    let real = row < layout.count(operand);
    let at = head * strides.head + row * strides.row;
    let mut squares = 0.0f32.runtime();
    if real {
        let mut d = unit;
        while d < layout.dim {
            let value = f32::cast_from(source[at + d]);
            squares += value * value;
            d += PLANE_UNITS;
        }
    }
    let norm = cube_sum(squares, PLANE_UNITS).sqrt();
    if unit == 0 {
        norms[packed_row] = norm;
    }
    let inverse = 1.0 / max(norm, EPSILON);
    let mut d = unit;
    while d < layout.dim_padded {
        let mut value = 0.0f32.runtime();
        if real && d < layout.dim {
            value = f32::cast_from(source[at + d]) * inverse;
        }
        rows[packed_row * layout.dim_padded + d] = value;
        d += PLANE_UNITS;
    }
}

/// Where a unit's register tile lies in the cube's: rows `y + 16 i`, columns `x + 16 j`.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Place {
    pub x: usize,
    pub y: usize,
}

#[cube]
pub(crate) fn place() -> Place {
    let unit = UNIT_POS as usize;
    Place {
        x: unit % PLANE_SIDE,
        y: unit / PLANE_SIDE,
    }
}

/// `acc[i · micro + j] = owner[y + 16 i] · other[x + 16 j]`, the cosines of two packed tiles.
#[cube]
pub(crate) fn cosines(
    acc: &mut Array<f32>,
    rows: &[f32],
    packed_owner: usize,
    packed_other: usize,
    dim_padded: usize,
    left: &mut [f32],
    right: &mut [f32],
    #[comptime] micro: usize,
) {
    let at = place();
    let tile = comptime!(micro * PLANE_SIDE);
    #[unroll]
    for i in 0..comptime!(micro * micro) {
        acc[i] = 0.0;
    }
    for slab in 0..dim_padded / PLANE_SIDE {
        // Slabs lie step-major, so that the units of a row of the cube read neighbouring columns.
        #[unroll]
        for i in 0..micro {
            let row = at.y + i * PLANE_SIDE;
            let column = slab * PLANE_SIDE + at.x;
            left[at.x * tile + row] = rows[(packed_owner + row) * dim_padded + column];
            right[at.x * tile + row] = rows[(packed_other + row) * dim_padded + column];
        }
        sync_cube();
        for step in 0..PLANE_SIDE {
            rank_one(
                acc,
                &left[0..comptime!(tile * PLANE_SIDE)],
                step * tile + at.y,
                PLANE_SIDE,
                &right[0..comptime!(tile * PLANE_SIDE)],
                step * tile + at.x,
                micro,
            );
        }
        sync_cube();
    }
}

/// `acc[i, j] += left[left_at + i · left_stride] · right[right_at + 16 j]`
#[cube]
fn rank_one(
    acc: &mut Array<f32>,
    left: &[f32],
    left_at: usize,
    left_stride: usize,
    right: &[f32],
    right_at: usize,
    #[comptime] micro: usize,
) {
    let mut column = Array::<f32>::new(micro);
    #[unroll]
    for j in 0..micro {
        column[j] = right[right_at + j * PLANE_SIDE];
    }
    #[unroll]
    for i in 0..micro {
        let value = left[left_at + i * left_stride];
        #[unroll]
        for j in 0..micro {
            acc[i * micro + j] = fma(value, column[j], acc[i * micro + j]);
        }
    }
}

/// `gradient[o] (+)= Σ_t block[o, t] · other[t]`, for the tile of `other` from `packed_other` on. Every element is
/// read and written by one unit only; the first tile overwrites.
#[cube]
pub(crate) fn add_product(
    gradient: &mut [f32],
    gradient_row: usize,
    block: &[f32],
    rows: &[f32],
    packed_other: usize,
    dim_padded: usize,
    first: bool,
    right: &mut [f32],
    #[comptime] micro: usize,
) {
    let at = place();
    let tile = comptime!(micro * PLANE_SIDE);
    let mut acc = Array::<f32>::new(comptime!(micro * micro));
    for chunk in 0..dim_padded / tile {
        #[unroll]
        for i in 0..comptime!(micro * micro) {
            acc[i] = 0.0;
        }
        for slab in 0..micro {
            #[unroll]
            for j in 0..micro {
                let column = at.x + j * PLANE_SIDE;
                right[at.y * tile + column] = rows[(packed_other + slab * PLANE_SIDE + at.y)
                    * dim_padded
                    + chunk * tile
                    + column];
            }
            sync_cube();
            for step in 0..PLANE_SIDE {
                rank_one(
                    &mut acc,
                    block,
                    at.y * tile + slab * PLANE_SIDE + step,
                    comptime!(tile * PLANE_SIDE),
                    &right[0..comptime!(tile * PLANE_SIDE)],
                    step * tile + at.x,
                    micro,
                );
            }
            sync_cube();
        }
        #[unroll]
        for i in 0..micro {
            #[unroll]
            for j in 0..micro {
                let out = (gradient_row + at.y + i * PLANE_SIDE) * dim_padded
                    + chunk * tile
                    + at.x
                    + j * PLANE_SIDE;
                let mut value = acc[i * micro + j];
                if !first {
                    value += gradient[out];
                }
                gradient[out] = value;
            }
        }
    }
}

/// Takes unit-sphere gradients `[heads, padded, dim_padded]` through the normalization into `grad [heads, stored, dim]`.
pub(crate) fn finish(
    client: &Client,
    packed: &Packed,
    gradient: &Handle,
    grad: &TensorHandle,
    owner: Operand,
) {
    let sizes = &packed.sizes;
    let [heads, stored] = [grad.shape()[0], grad.shape()[1]];
    // SAFETY: the gradient holds every padded row of the owner, `grad` is [heads, stored, dim].
    unsafe {
        finish_rows::launch_unchecked(
            client,
            cubes_for(client, heads * stored),
            CubeDim::new_1d(PLANE_UNITS as u32),
            BufferArg::from_raw_parts(gradient.clone(), sizes.gradient_len(owner)),
            packed.rows_arg(),
            packed.norms_arg(),
            whole(grad, 1),
            sizes.launch_arg(),
            stored,
            owner,
            grad.dtype,
        );
    }
}

#[cube(launch_unchecked)]
fn finish_rows<F: Float>(
    gradient: &[f32],
    rows: &[f32],
    norms: &[f32],
    grad: &mut [F],
    layout: Layout,
    stored: usize,
    #[comptime] owner: Operand,
    #[define(F)] _dtype: ElemType,
) {
    let unit = UNIT_POS as usize;
    if CUBE_POS >= layout.heads * stored {
        terminate!();
    }
    let head = CUBE_POS / stored;
    let row = CUBE_POS % stored;
    let real = row < layout.count(owner);
    let packed_row = layout.head_start(head, owner) + row;
    let unit_at = packed_row * layout.dim_padded;
    let at = (head * layout.padded(owner) + row) * layout.dim_padded;
    let mut along = 0.0f32.runtime();
    let mut norm = 1.0f32.runtime();
    if real {
        norm = norms[packed_row];
        let mut d = unit;
        while d < layout.dim {
            along += rows[unit_at + d] * gradient[at + d];
            d += PLANE_UNITS;
        }
    }
    let mut projection = cube_sum(along, PLANE_UNITS);
    if norm < EPSILON {
        projection = 0.0;
    }
    let inverse = 1.0 / max(norm, EPSILON);
    let mut d = unit;
    while d < layout.dim {
        let mut value = 0.0f32.runtime();
        if real {
            value = (gradient[at + d] - projection * rows[unit_at + d]) * inverse;
        }
        grad[CUBE_POS * layout.dim + d] = F::cast_from(value);
        d += PLANE_UNITS;
    }
}
