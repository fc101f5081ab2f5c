//! A cube owns a square tile's rows (forward, dX) or classes (dW) and walks the other operand's tiles.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::std::tensor::TensorHandle;

use super::launch::BackwardCall;
use crate::blueprint::{Blueprint, PLANE_SIDE, PLANE_UNITS, cubes_for};
use crate::operand::{RowStrides, whole};
use crate::packing::plane::{
    add_product, block_pitch, cosines, finish, owned, parts, pitch, place,
};
use crate::packing::{Layout, Operand, Packed};

pub(super) fn launch_forward(
    client: &Client,
    blueprint: &Blueprint,
    packed: &Packed,
    logits: &TensorHandle,
    scale: f32,
) {
    let sizes = &packed.sizes;
    let tile = blueprint.tile();
    let tiles = sizes.heads * (sizes.rows_padded / tile) * (sizes.active_padded / tile);
    // SAFETY: `Packed` holds whole tiles, `logits` is [heads, rows, active].
    unsafe {
        forward::launch_unchecked(
            client,
            cubes_for(client, tiles),
            CubeDim::new_1d(PLANE_UNITS as u32),
            packed.rows_arg(1),
            whole(logits, 1),
            sizes.launch_arg(),
            scale,
            blueprint.micro,
            logits.dtype,
        );
    }
}

pub(super) fn launch_backward(call: &BackwardCall) {
    let sizes = &call.packed.sizes;
    let (parts, cubes) = parts(call.client, call.blueprint, sizes, call.owner);
    let elements = parts * sizes.gradient_len(call.owner);
    let gradient = call.client.empty(elements * size_of::<f32>());
    // SAFETY: `Packed` and the gradient hold whole tiles, `Strided` proved the upstream.
    unsafe {
        backward::launch_unchecked(
            call.client,
            cubes,
            CubeDim::new_1d(PLANE_UNITS as u32),
            call.packed.rows_arg(1),
            call.upstream.buffer_arg(1),
            call.upstream.strides_arg(1),
            BufferArg::from_raw_parts(gradient.clone(), elements),
            sizes.launch_arg(),
            parts,
            call.scale,
            call.owner,
            call.blueprint.micro,
            call.upstream.dtype(),
        );
    }
    finish(
        call.client,
        call.blueprint,
        call.packed,
        &gradient,
        parts,
        call.grad,
        call.owner,
    );
}

#[cube(launch_unchecked)]
fn forward<F: Float>(
    rows: &[f32],
    logits: &mut [F],
    layout: Layout,
    scale: f32,
    #[comptime] micro: usize,
    #[define(F)] _dtype: ElemType,
) {
    let tile = comptime!(micro * PLANE_SIDE);
    let pitch = comptime!(pitch(micro));
    let class_tiles = layout.active_padded / tile;
    let tiles_per_head = class_tiles * (layout.rows_padded / tile);
    if CUBE_POS >= layout.heads * tiles_per_head {
        terminate!();
    }
    let head = CUBE_POS / tiles_per_head;
    let first_row = (CUBE_POS % tiles_per_head) / class_tiles * tile;
    let first_class = (CUBE_POS % class_tiles) * tile;
    let at = place();
    let mut left = Shared::<[f32]>::new_slice(comptime!(pitch * PLANE_SIDE));
    let mut right = Shared::<[f32]>::new_slice(comptime!(pitch * PLANE_SIDE));
    let mut acc = Array::<f32>::new(comptime!(micro * micro));
    cosines(
        &mut acc,
        rows,
        layout.head_start(head, Operand::Embeddings) + first_row,
        layout.head_start(head, Operand::Weights) + first_class,
        layout.dim_padded,
        &mut left,
        &mut right,
        micro,
    );
    #[unroll]
    for i in 0..micro {
        #[unroll]
        for j in 0..micro {
            let row = first_row + at.y + i * PLANE_SIDE;
            let class = first_class + at.x + j * PLANE_SIDE;
            if row < layout.rows && class < layout.active {
                let out = (head * layout.rows + row) * layout.active + class;
                logits[out] = F::cast_from(acc[i * micro + j] * scale);
            }
        }
    }
}

#[cube(launch_unchecked)]
fn backward<F: Float>(
    rows: &[f32],
    upstream: &[F],
    upstream_strides: RowStrides,
    gradient: &mut [f32], // [parts, heads, padded, dim_padded]
    layout: Layout,
    parts: usize,
    scale: f32,
    #[comptime] owner: Operand,
    #[comptime] micro: usize,
    #[define(F)] _dtype: ElemType,
) {
    let tile = comptime!(micro * PLANE_SIDE);
    let pitch = comptime!(pitch(micro));
    let other = comptime!(owner.other());
    let owned = owned(&layout, parts, owner, tile);
    if !owned.is_there {
        terminate!();
    }
    let (head, first) = (owned.head, owned.first);
    let packed_other = layout.head_start(head, other);
    let at = place();
    let mut right = Shared::<[f32]>::new_slice(comptime!(pitch * PLANE_SIDE));
    let mut block = Shared::<[f32]>::new_slice(comptime!(tile * block_pitch(micro)));
    for other_tile in owned.from..owned.to {
        #[unroll]
        for i in 0..micro {
            #[unroll]
            for j in 0..micro {
                let in_owner = at.y + i * PLANE_SIDE;
                let in_other = at.x + j * PLANE_SIDE;
                let (row, class) = match comptime!(owner) {
                    Operand::Embeddings => (first + in_owner, other_tile * tile + in_other),
                    Operand::Weights => (other_tile * tile + in_other, first + in_owner),
                };
                let mut value = 0.0f32.runtime();
                if row < layout.rows && class < layout.active {
                    let from = head * upstream_strides.head + row * upstream_strides.row + class;
                    value = f32::cast_from(upstream[from]) * scale;
                }
                block[in_owner * comptime!(block_pitch(micro)) + in_other] = value;
            }
        }
        sync_cube();
        add_product(
            gradient,
            owned.out,
            &block,
            rows,
            packed_other + other_tile * tile,
            layout.dim_padded,
            other_tile == owned.from,
            &mut right,
            micro,
        );
    }
}
