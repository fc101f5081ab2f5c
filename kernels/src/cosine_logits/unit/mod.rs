//! One launch of one cube: its units pack the operands and meet; then each owns blocks of rows (forward, dX) or of classes (dW)
//! and walks the other operand's panels. Dependent launches would cost more than a small product.

mod layout;
mod packed;
mod product;

use cubecl::prelude::*;
use cubecl::std::tensor::TensorHandle;

use super::launch::Call;
use super::problem::Sizes;
use crate::Gradients;
use crate::blueprint::Blueprint;
use crate::math::group::Group;
use crate::math::narrow::narrow;
use crate::math::span::wait;
use crate::math::tile::TILE_VECTORS;
use crate::memory::empty;
use crate::operand::{F32, RowStrides, Strided, whole, whole_if_asked, widest};
use crate::scale::sum_rows;
use layout::Operand;
use packed::{Packed, pack};
use product::{Scratch, add_product, clear_gradient, cosines, scratch_len, write_gradients};

pub(super) fn launch_forward(call: &Call, logits: &TensorHandle, scale: f32) {
    let Call {
        client,
        blueprint,
        problem,
    } = call;
    let packed = Packed::empty(client, problem.sizes, true);
    let (count, dim) = blueprint.unit_grid(client);
    let vector = problem.vector_size(blueprint);
    let of_logits = widest(blueprint.lanes, [problem.sizes.active]);
    // SAFETY: `Strided` proved the operands, `Packed` holds whole tiles, `logits` is [heads, rows, active].
    unsafe {
        forward::launch_unchecked(
            client,
            count,
            dim,
            vector,
            blueprint.lanes,
            of_logits,
            problem.embeddings.buffer_arg(vector),
            problem.embeddings.strides_arg(vector),
            problem.weights.buffer_arg(vector),
            problem.weights.strides_arg(vector),
            packed.rows_arg(),
            packed.panels_arg(blueprint.lanes),
            packed.norms_arg(),
            whole(logits, of_logits),
            packed.layout_arg(),
            scale,
            blueprint.units,
            blueprint.tile_rows,
            logits.dtype,
        );
    }
}

/// Floats of workspace that a backward pass takes.
pub(super) fn scratch(blueprint: &Blueprint, sizes: &Sizes) -> u128 {
    scratch_len(blueprint.units, blueprint.tile(), sizes.dim_padded) as u128
}

pub(super) fn launch_backward(call: &Call, upstream: &Strided, scale: f32, gradients: &Gradients) {
    let Call {
        client,
        blueprint,
        problem,
    } = call;
    let packed = Packed::empty(client, problem.sizes, false);
    let dtype = problem.embeddings.dtype();
    let lanes = blueprint.lanes;
    let (count, dim) = blueprint.unit_grid(client);
    let vector = problem.vector_size(blueprint);
    let of_gradient = widest(lanes, [problem.sizes.dim]);
    let scratch = scratch_len(blueprint.units, blueprint.tile(), problem.sizes.dim_padded);
    let scratch_handle = client.empty(scratch * size_of::<f32>());
    let scale_rows = gradients.scale.as_ref().map(|_| {
        let shape = [problem.sizes.heads, problem.sizes.rows];
        empty(client, shape, F32)
    });
    let arg = |tensor: &Option<TensorHandle>, dtype, vector| {
        // SAFETY: all are allocated for this call.
        unsafe { whole_if_asked(client, tensor.as_ref(), dtype, vector) }
    };
    // SAFETY: `Strided` proved operands and upstream, `Packed` holds whole tiles, the gradients are [heads, rows, dim] and
    // [heads, classes, dim] where they are asked for, and each unit stays in its own part of the scratch.
    unsafe {
        backward::launch_unchecked(
            client,
            count,
            dim,
            vector,
            lanes,
            of_gradient,
            problem.embeddings.buffer_arg(vector),
            problem.embeddings.strides_arg(vector),
            problem.weights.buffer_arg(vector),
            problem.weights.strides_arg(vector),
            packed.rows_arg(),
            packed.panels_arg(lanes),
            packed.norms_arg(),
            upstream.buffer_arg(1),
            upstream.strides_arg(1),
            BufferArg::from_raw_parts(scratch_handle, scratch),
            arg(&gradients.embeddings, dtype, of_gradient),
            arg(&gradients.weights, dtype, of_gradient),
            arg(&scale_rows, F32, 1),
            arg(&gradients.scale, F32, 1),
            packed.layout_arg(),
            problem.classes,
            scale,
            gradients.embeddings.is_some(),
            gradients.weights.is_some(),
            gradients.scale.is_some(),
            blueprint.units,
            blueprint.tile_rows,
            dtype,
        );
    }
}

#[cube(launch_unchecked)]
fn forward<F: Float, M: Size, N: Size, L: Size>(
    embeddings: &[Vector<F, M>],
    embedding_strides: RowStrides,
    weights: &[Vector<F, M>],
    weight_strides: RowStrides,
    rows: &mut [f32],
    panels: &mut [Vector<f32, N>],
    norms: &mut [f32],
    logits: &mut [Vector<F, L>], // [heads, rows, active]
    layout: Sizes,
    scale: f32,
    #[comptime] units: usize,
    #[comptime] tile_rows: usize,
    #[define(F)] _dtype: ElemType,
) {
    pack::<F, M, N>(
        embeddings,
        &embedding_strides,
        weights,
        &weight_strides,
        rows,
        panels,
        norms,
        &layout,
        true,
        units,
    );
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let piece = L::value();
    let blocks_per_head = layout.rows_padded / width;
    let scale = Vector::<f32, N>::new(scale);
    let mut block = UNIT_POS as usize;
    while block < layout.heads * blocks_per_head {
        let head = block / blocks_per_head;
        let first = (block % blocks_per_head) * width;
        let packed_row = layout.head_start(head, Operand::Embeddings) + first;
        for panel in 0..layout.active_padded / width {
            for group in 0..comptime!(width / tile_rows) {
                let mut tile = Array::<Vector<f32, N>>::new(comptime!(tile_rows * TILE_VECTORS));
                cosines::<N>(
                    &mut tile,
                    &*rows,
                    packed_row + group * tile_rows,
                    &*panels,
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
                            let z = tile[r * TILE_VECTORS + v] * scale;
                            #[unroll]
                            for part in 0..comptime!(lanes / piece) {
                                let class = panel * width + comptime!(v * lanes + part * piece);
                                if class < layout.active {
                                    let mut some = Vector::<f32, L>::empty();
                                    #[unroll]
                                    for i in 0..piece {
                                        some.insert(i, z.extract(comptime!(part * piece + i)));
                                    }
                                    logits[(out + class) / piece] = narrow::<F, L>(some);
                                }
                            }
                        }
                    }
                }
            }
        }
        block += CUBE_DIM as usize;
    }
}

#[cube(launch_unchecked)]
fn backward<F: Float, M: Size, N: Size, L: Size>(
    embeddings: &[Vector<F, M>],
    embedding_strides: RowStrides,
    weights: &[Vector<F, M>],
    weight_strides: RowStrides,
    rows: &mut [f32],
    panels: &mut [Vector<f32, N>],
    norms: &mut [f32],
    upstream: &[F], // [heads, rows, active]
    upstream_strides: RowStrides,
    scratch: &mut [f32],
    grad_embeddings: &mut [Vector<F, L>], // [heads, rows, dim]
    grad_weights: &mut [Vector<F, L>],    // [heads, classes, dim]
    scale_rows: &mut [f32],               // [heads, rows]
    grad_scale: &mut [f32],               // [heads]
    layout: Sizes,
    classes: usize,
    scale: f32,
    #[comptime] of_embeddings: bool,
    #[comptime] of_weights: bool,
    #[comptime] of_scale: bool,
    #[comptime] units: usize,
    #[comptime] tile_rows: usize,
    #[define(F)] _dtype: ElemType,
) {
    pack::<F, M, N>(
        embeddings,
        &embedding_strides,
        weights,
        &weight_strides,
        rows,
        panels,
        norms,
        &layout,
        false,
        units,
    );
    if comptime!(of_embeddings) {
        gradients::<F, N, L>(
            &*rows,
            &*norms,
            upstream,
            &upstream_strides,
            scratch,
            grad_embeddings,
            scale_rows,
            &layout,
            layout.rows,
            scale,
            Operand::Embeddings,
            of_scale,
            tile_rows,
        );
    }
    if comptime!(of_weights) {
        gradients::<F, N, L>(
            &*rows,
            &*norms,
            upstream,
            &upstream_strides,
            scratch,
            grad_weights,
            scale_rows,
            &layout,
            classes,
            scale,
            Operand::Weights,
            false,
            tile_rows,
        );
    }
    if comptime!(of_scale) {
        wait(units);
        if UNIT_POS == 0 {
            sum_rows(
                &*scale_rows,
                0,
                grad_scale,
                layout.heads,
                layout.rows,
                scale,
                Group::ALONE,
            );
        }
    }
}

/// The gradients of the rows of one operand, of which there are `stored` a head: a unit owns a block of them.
#[cube]
fn gradients<F: Float, N: Size, L: Size>(
    rows: &[f32],
    norms: &[f32],
    upstream: &[F],
    upstream_strides: &RowStrides,
    scratch: &mut [f32],
    grad: &mut [Vector<F, L>],
    scale_rows: &mut [f32], // [heads, stored] if of_scale
    layout: &Sizes,
    stored: usize,
    scale: f32,
    #[comptime] owner: Operand,
    #[comptime] of_scale: bool,
    #[comptime] tile_rows: usize,
) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let other = comptime!(owner.other());
    let blocks_per_head = stored.div_ceil(width);
    let at = Scratch::of_unit(layout.dim_padded, width);
    let mut block = UNIT_POS as usize;
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
        write_gradients::<F, L>(
            grad,
            scale_rows,
            &scratch[at.gradient..at.gradient + width * layout.dim_padded],
            rows,
            norms,
            head,
            first,
            stored,
            layout,
            owner,
            of_scale,
            width,
        );
        block += CUBE_DIM as usize;
    }
}
