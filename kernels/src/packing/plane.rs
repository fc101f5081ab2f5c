//! A group of units packs a row, a cube multiplies square tiles of the packed operands through shared memory.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;
use cubecl::std::tensor::TensorHandle;

use super::{Layout, Operand, Packed, PackedSizes};
use crate::blueprint::{Blueprint, PLANE_SIDE, PLANE_UNITS, cubes_for};
use crate::math::group::{Group, group_sum, member};
use crate::math::norm::{inverse_norm, projection};
use crate::math::parts::{add_parts, parts_of_sums};
use crate::operand::{RowStrides, Strided, whole, widest};

pub(super) fn launch(
    client: &Client,
    embeddings: &Strided,
    weights: &Strided,
    packed: &Packed,
    vector: usize,
    blueprint: &Blueprint,
) {
    let sizes = &packed.sizes;
    let group = Group::of(blueprint, sizes.dim_padded / vector);
    // SAFETY: `Strided` proved that its strides stay inside its buffer, `Packed::new` allocated every packed row, whose
    // length is a multiple of every vector.
    unsafe {
        pack::launch_unchecked(
            client,
            group.cubes(client, sizes.packed_rows()),
            CubeDim::new_1d(PLANE_UNITS as u32),
            vector,
            embeddings.buffer_arg(vector),
            embeddings.strides_arg(vector),
            weights.buffer_arg(vector),
            weights.strides_arg(vector),
            packed.rows_arg(vector),
            packed.norms_arg(),
            sizes.launch_arg(),
            group,
            embeddings.dtype(),
        );
    }
}

#[cube(launch_unchecked)]
fn pack<F: Float, M: Size>(
    embeddings: &[Vector<F, M>],
    embedding_strides: RowStrides,
    weights: &[Vector<F, M>],
    weight_strides: RowStrides,
    rows: &mut [Vector<f32, M>],
    norms: &mut [f32],
    layout: Layout,
    #[comptime] group: Group,
    #[define(F)] _dtype: ElemType,
) {
    let of = member(group);
    let weights_start = layout.head_start(0, Operand::Weights);
    let is_there = of.group < weights_start + layout.heads * layout.active_padded;
    let is_weight = of.group >= weights_start;
    let embedding = source_row(&layout, of.group, &embedding_strides, Operand::Embeddings);
    let mut real = embedding.real;
    let mut from = embedding.from;
    if is_weight {
        let weight = source_row(
            &layout,
            of.group - weights_start,
            &weight_strides,
            Operand::Weights,
        );
        real = is_there && weight.real;
        from = weight.from;
    }
    let columns = layout.dim / M::value();
    let columns_padded = layout.dim_padded / M::value();
    let mut squares = 0.0f32.runtime();
    if real {
        let mut d = of.lane;
        while d < columns {
            let value = if is_weight {
                Vector::<f32, M>::cast_from(weights[from + d])
            } else {
                Vector::<f32, M>::cast_from(embeddings[from + d])
            };
            squares += (value * value).vector_sum();
            d += group.size;
        }
    }
    let norm = group_sum(squares, group).sqrt();
    let inverse = Vector::<f32, M>::new(inverse_norm(norm));
    if is_there {
        if of.lane == 0 {
            norms[of.group] = norm;
        }
        let mut d = of.lane;
        while d < columns_padded {
            let mut value = Vector::<f32, M>::new(0.0);
            if real && d < columns {
                value = if is_weight {
                    Vector::<f32, M>::cast_from(weights[from + d])
                } else {
                    Vector::<f32, M>::cast_from(embeddings[from + d])
                } * inverse;
            }
            rows[of.group * columns_padded + d] = value;
            d += group.size;
        }
    }
}

/// Where a packed row comes from.
#[derive(CubeType, Clone, Copy)]
struct SourceRow {
    /// Whether the operand has it, or it is padding.
    real: bool,
    /// Where it begins in the operand, in vectors.
    from: usize,
}

#[cube]
fn source_row(
    layout: &Layout,
    packed: usize,
    strides: &RowStrides,
    #[comptime] operand: Operand,
) -> SourceRow {
    let head = packed / layout.padded(operand);
    let row = packed % layout.padded(operand);
    SourceRow {
        real: row < layout.count(operand),
        from: head * strides.head + row * strides.row,
    }
}

/// The same of a block of logit gradients, of which the two rows that a plane reads at a time lie half the banks apart.
pub(crate) const fn block_pitch(micro: usize) -> usize {
    (micro + 1) * PLANE_SIDE
}

/// The parts in which the gradient of `owner` is summed, and the cubes that do it.
pub(crate) fn parts(
    client: &Client,
    blueprint: &Blueprint,
    sizes: &PackedSizes,
    owner: Operand,
) -> (usize, CubeCount) {
    let tile = blueprint.tile();
    let elements = sizes.gradient_len(owner);
    let owners = elements / sizes.dim_padded / tile;
    let steps = sizes.padded(owner.other()) / tile;
    let parts = parts_of_sums(client, owners, steps, elements);
    (parts, cubes_for(client, parts * owners))
}

/// What a cube of a gradient owns, and the tiles of the other operand that its part has.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Owned {
    /// Whether there is any work for it.
    pub is_there: bool,
    pub head: usize,
    /// The first row of its tile.
    pub first: usize,
    /// The first row of its tile in the parts of the gradient.
    pub out: usize,
    pub from: usize,
    pub to: usize,
}

#[cube]
pub(crate) fn owned(
    layout: &Layout,
    parts: usize,
    #[comptime] owner: Operand,
    #[comptime] tile: usize,
) -> Owned {
    let tiles = layout.padded(owner) / tile;
    let part = CUBE_POS / (layout.heads * tiles);
    let head = CUBE_POS / tiles % layout.heads;
    let first = CUBE_POS % tiles * tile;
    let steps = layout.padded(comptime!(owner.other())) / tile;
    Owned {
        is_there: part < parts,
        head,
        first,
        out: (part * layout.heads + head) * layout.padded(owner) + first,
        from: steps * part / parts,
        to: steps * (part + 1) / parts,
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

/// Elements from one row of a tile in shared memory to the next: one more than a row has, so that units that go down a column
/// fall into different banks.
pub(crate) const fn pitch(micro: usize) -> usize {
    micro * PLANE_SIDE + 1
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
    let pitch = comptime!(pitch(micro));
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
            left[at.x * pitch + row] = rows[(packed_owner + row) * dim_padded + column];
            right[at.x * pitch + row] = rows[(packed_other + row) * dim_padded + column];
        }
        sync_cube();
        for step in 0..PLANE_SIDE {
            rank_one(
                acc,
                &left[0..comptime!(pitch * PLANE_SIDE)],
                step * pitch + at.y,
                PLANE_SIDE,
                &right[0..comptime!(pitch * PLANE_SIDE)],
                step * pitch + at.x,
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
    let pitch = comptime!(pitch(micro));
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
                right[at.y * pitch + column] = rows[(packed_other + slab * PLANE_SIDE + at.y)
                    * dim_padded
                    + chunk * tile
                    + column];
            }
            sync_cube();
            for step in 0..PLANE_SIDE {
                rank_one(
                    &mut acc,
                    block,
                    at.y * comptime!(block_pitch(micro)) + slab * PLANE_SIDE + step,
                    comptime!(block_pitch(micro) * PLANE_SIDE),
                    &right[0..comptime!(pitch * PLANE_SIDE)],
                    step * pitch + at.x,
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

/// Adds the parts of unit-sphere gradients `[parts, heads, padded, dim_padded]`, and takes them through the normalization into
/// `grad [heads, stored, dim]`.
pub(crate) fn finish(
    client: &Client,
    blueprint: &Blueprint,
    packed: &Packed,
    gradient: &Handle,
    parts: usize,
    grad: &TensorHandle,
    owner: Operand,
) {
    let sizes = &packed.sizes;
    add_parts(client, gradient, sizes.gradient_len(owner), parts);
    let [heads, stored] = [grad.shape()[0], grad.shape()[1]];
    let vector = widest(blueprint.vector(grad.dtype), [sizes.dim]);
    let group = Group::of(blueprint, sizes.dim / vector);
    // SAFETY: the gradient holds every padded row of the owner, `grad` is [heads, stored, dim].
    unsafe {
        finish_rows::launch_unchecked(
            client,
            group.cubes(client, heads * stored),
            CubeDim::new_1d(PLANE_UNITS as u32),
            vector,
            BufferArg::from_raw_parts(gradient.clone(), sizes.gradient_len(owner) / vector),
            packed.rows_arg(vector),
            packed.norms_arg(),
            whole(grad, vector),
            sizes.launch_arg(),
            stored,
            owner,
            group,
            grad.dtype,
        );
    }
}

#[cube(launch_unchecked)]
fn finish_rows<F: Float, M: Size>(
    gradient: &[Vector<f32, M>],
    rows: &[Vector<f32, M>],
    norms: &[f32],
    grad: &mut [Vector<F, M>],
    layout: Layout,
    stored: usize,
    #[comptime] owner: Operand,
    #[comptime] group: Group,
    #[define(F)] _dtype: ElemType,
) {
    let of = member(group);
    let head = of.group / stored;
    let row = of.group % stored;
    let is_there = head < layout.heads;
    let real = is_there && row < layout.count(owner);
    let columns = layout.dim / M::value();
    let columns_padded = layout.dim_padded / M::value();
    let packed_row = layout.head_start(head, owner) + row;
    let unit_at = packed_row * columns_padded;
    let at = (head * layout.padded(owner) + row) * columns_padded;
    let mut along = 0.0f32.runtime();
    let mut norm = 1.0f32.runtime();
    if real {
        norm = norms[packed_row];
    }
    let inverse = inverse_norm(norm);
    if real {
        let mut d = of.lane;
        while d < columns {
            along += (rows[unit_at + d] * gradient[at + d]).vector_sum();
            d += group.size;
        }
    }
    let projection = Vector::<f32, M>::new(projection(group_sum(along, group), norm));
    let inverse = Vector::<f32, M>::new(inverse);
    let mut d = of.lane;
    if real {
        while d < columns {
            let value = (gradient[at + d] - projection * rows[unit_at + d]) * inverse;
            grad[of.group * columns + d] = Vector::<F, M>::cast_from(value);
            d += group.size;
        }
    } else if is_there {
        while d < columns {
            grad[of.group * columns + d] = Vector::<F, M>::cast_from(Vector::<f32, M>::new(0.0));
            d += group.size;
        }
    }
}
