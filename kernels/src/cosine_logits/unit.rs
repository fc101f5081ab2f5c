//! A unit owns a block of rows (forward, dX) or of classes (dW) and walks the other operand's panels.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::std::tensor::TensorHandle;

use super::launch::BackwardCall;
use crate::blueprint::Blueprint;
use crate::operand::{RowStrides, whole, widest};
use crate::packing::unit::{
    Scratch, TILE_VECTORS, add_product, clear_gradient, cosines, scratch_len, write_gradients,
};
use crate::packing::{Layout, Operand, Packed, PackedSizes};

pub(super) fn launch_forward(
    client: &Client,
    blueprint: &Blueprint,
    packed: &Packed,
    logits: &TensorHandle,
    scale: f32,
) {
    let (count, dim) = blueprint.unit_grid(client);
    let vector = widest(blueprint.lanes, [packed.sizes.active]);
    // SAFETY: `Packed` holds whole tiles, `logits` is [heads, rows, active].
    unsafe {
        forward::launch_unchecked(
            client,
            count,
            dim,
            blueprint.lanes,
            vector,
            packed.rows_arg(),
            packed.panels_arg(blueprint.lanes),
            whole(logits, vector),
            packed.sizes.launch_arg(),
            scale,
            blueprint.tile_rows,
            logits.dtype,
        );
    }
}

/// Floats of workspace that a backward pass takes.
pub(super) fn scratch(blueprint: &Blueprint, sizes: &PackedSizes) -> u128 {
    scratch_len(blueprint.units, blueprint.tile(), sizes.dim_padded) as u128
}

pub(super) fn launch_backward(call: &BackwardCall) {
    let (count, dim) = call.blueprint.unit_grid(call.client);
    let sizes = &call.packed.sizes;
    let lanes = call.blueprint.lanes;
    let vector = widest(lanes, [sizes.dim]);
    let scratch = scratch_len(
        call.blueprint.units,
        call.blueprint.tile(),
        sizes.dim_padded,
    );
    let scratch_handle = call.client.empty(scratch * size_of::<f32>());
    // SAFETY: `Packed` holds whole tiles, `Strided` proved the upstream, `grad` is [heads, count, dim], and each
    // unit stays in its own part of the scratch.
    unsafe {
        backward::launch_unchecked(
            call.client,
            count,
            dim,
            lanes,
            vector,
            call.packed.rows_arg(),
            call.packed.norms_arg(),
            call.upstream.buffer_arg(1),
            call.upstream.strides_arg(1),
            BufferArg::from_raw_parts(scratch_handle, scratch),
            whole(call.grad, vector),
            sizes.launch_arg(),
            call.grad.shape()[1],
            call.scale,
            call.owner,
            call.blueprint.tile_rows,
            call.grad.dtype,
        );
    }
}

#[cube(launch_unchecked)]
fn forward<F: Float, N: Size, M: Size>(
    rows: &[f32],
    panels: &[Vector<f32, N>],
    logits: &mut [Vector<F, M>], // [heads, rows, active]
    layout: Layout,
    scale: f32,
    #[comptime] tile_rows: usize,
    #[define(F)] _dtype: ElemType,
) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let piece = M::value();
    let blocks_per_head = layout.rows_padded / width;
    let scale = Vector::<f32, N>::new(scale);
    let mut block = ABSOLUTE_POS;
    while block < layout.heads * blocks_per_head {
        let head = block / blocks_per_head;
        let first = (block % blocks_per_head) * width;
        let packed_row = layout.head_start(head, Operand::Embeddings) + first;
        for panel in 0..layout.active_padded / width {
            for group in 0..comptime!(width / tile_rows) {
                let mut tile = Array::<Vector<f32, N>>::new(comptime!(tile_rows * TILE_VECTORS));
                cosines::<N>(
                    &mut tile,
                    rows,
                    packed_row + group * tile_rows,
                    panels,
                    head * layout.active_padded + panel * width,
                    layout.dim_padded,
                    tile_rows,
                );
                #[unroll]
                for r in 0..tile_rows {
                    let row = first + group * tile_rows + r;
                    if row < layout.rows {
                        let out = (head * layout.rows + row) * layout.active;
                        #[unroll]
                        for v in 0..TILE_VECTORS {
                            let z = Vector::<F, N>::cast_from(tile[r * TILE_VECTORS + v] * scale);
                            #[unroll]
                            for part in 0..comptime!(lanes / piece) {
                                let class = panel * width + comptime!(v * lanes + part * piece);
                                if class < layout.active {
                                    let mut some = Vector::<F, M>::empty();
                                    #[unroll]
                                    for i in 0..piece {
                                        some.insert(i, z.extract(comptime!(part * piece + i)));
                                    }
                                    logits[(out + class) / piece] = some;
                                }
                            }
                        }
                    }
                }
            }
        }
        block += CUBE_COUNT * CUBE_DIM as usize;
    }
}

#[cube(launch_unchecked)]
fn backward<F: Float, N: Size, M: Size>(
    rows: &[f32],
    norms: &[f32],
    upstream: &[F],
    upstream_strides: RowStrides,
    scratch: &mut [f32],
    grad: &mut [Vector<F, M>],
    layout: Layout,
    stored: usize,
    scale: f32,
    #[comptime] owner: Operand,
    #[comptime] tile_rows: usize,
    #[define(F)] _dtype: ElemType,
) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let other = comptime!(owner.other());
    let blocks_per_head = stored.div_ceil(width);
    let at = Scratch::of_unit(layout.dim_padded, width);
    let mut block = ABSOLUTE_POS;
    while block < layout.heads * blocks_per_head {
        let head = block / blocks_per_head;
        let first = (block % blocks_per_head) * width;
        let packed_other = layout.head_start(head, other);
        if first < layout.count(owner) {
            clear_gradient(scratch, &at, layout.dim_padded, width);
            for panel in 0..layout.padded(other) / width {
                for o in 0..width {
                    for t in 0..width {
                        let (row, class) = match comptime!(owner) {
                            Operand::Embeddings => (first + o, panel * width + t),
                            Operand::Weights => (panel * width + t, first + o),
                        };
                        let mut value = 0.0f32.runtime();
                        if row < layout.rows && class < layout.active {
                            let from =
                                head * upstream_strides.head + row * upstream_strides.row + class;
                            value = f32::cast_from(upstream[from]) * scale;
                        }
                        scratch[at.block + o * width + t] = value;
                    }
                }
                add_product::<N>(
                    scratch,
                    &at,
                    rows,
                    packed_other + panel * width,
                    layout.dim_padded,
                    tile_rows,
                );
            }
        }
        write_gradients::<F, M>(
            grad,
            &scratch[at.gradient..at.gradient + width * layout.dim_padded],
            rows,
            norms,
            head,
            first,
            stored,
            &layout,
            owner,
            width,
        );
        block += CUBE_COUNT * CUBE_DIM as usize;
    }
}
