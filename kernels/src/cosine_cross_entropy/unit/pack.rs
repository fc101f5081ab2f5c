//! Rows of an operand, made unit vectors and laid out for products; padding is zero.
//!
//! Embeddings go into *columns*, a panel transposed, where a vector holds one coordinate of several rows, and into *blocks*
//! of `width` columns, row after row. Class weights stay rows; all units pack a block of them together.

use cubecl::prelude::*;

use super::plan::Plan;
use crate::math::norm::{inverse_norm, row_norm};
use crate::math::span::share;
use crate::math::tile::TILE_VECTORS;
use crate::operand::RowStrides;

/// The unit vector of `source[from..from + dim]`, or zeros, to `at` in pieces of `width`, `block_stride` apart; gives the norm.
#[cube]
fn pack_row<F: Float, M: Size>(
    source: &[Vector<F, M>],
    from: usize, // in vectors
    real: bool,
    workspace: &mut [f32],
    at: usize,
    block_stride: usize,
    plan: &Plan,
    #[comptime] width: usize,
) -> f32 {
    let piece = M::value();
    let pieces = comptime!(width / piece);
    let mut norm = 0.0f32.runtime();
    let out = workspace.as_vectorized_mut().with_vector_size_mut::<M>();
    let mut filled = 0usize.runtime();
    if real {
        let count = plan.dim / piece;
        norm = row_norm::<F, M>(source, from, count);
        let inverse = Vector::<f32, M>::new(inverse_norm(norm));
        let whole = plan.dim / width;
        for block in 0..whole {
            #[unroll]
            for j in 0..pieces {
                out[(at + block * block_stride) / piece + j] =
                    Vector::<f32, M>::cast_from(source[from + block * pieces + j]) * inverse;
            }
        }
        for d in whole * pieces..count {
            out[(at + whole * block_stride) / piece + d - whole * pieces] =
                Vector::<f32, M>::cast_from(source[from + d]) * inverse;
        }
        filled = count;
    }
    for d in filled..plan.dim_padded / piece {
        out[(at + d / pieces * block_stride) / piece + d % pieces] = Vector::<f32, M>::new(0.0);
    }
    norm
}

/// Packs an item's rows, into columns and, if `blocks`, into blocks, and keeps their norms.
#[cube]
pub(super) fn pack_item<F: Float, N: Size, M: Size>(
    embeddings: &[Vector<F, M>],
    strides: &RowStrides,
    workspace: &mut [f32],
    plan: &Plan,
    item: usize,
    local: usize,
    #[comptime] blocks: bool,
) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let head = plan.head(item);
    let first = plan.first_row(item, width);
    let columns = plan.columns_panel(local, width);
    let mut to = plan.block_row(local, width);
    let mut stride = plan.block_stride(width);
    if comptime!(!blocks) {
        // Where nobody wants them they are made all the same, in a place that is free now.
        to = plan.own_gradient(width);
        stride = comptime!(width * width);
    }
    for r in 0..width {
        let norm = pack_row::<F, M>(
            embeddings,
            head * strides.head + (first + r) * strides.row,
            first + r < plan.rows,
            workspace,
            to + r * width,
            stride,
            plan,
            width,
        );
        workspace[plan.state(local, width).norms + r] = norm;
    }
    for d in 0..plan.dim_padded {
        let from = to + d / width * stride + d % width;
        #[unroll]
        for v in 0..TILE_VECTORS {
            let mut column = Vector::<f32, N>::empty();
            #[unroll]
            for lane in 0..lanes {
                column.insert(lane, workspace[from + (v * lanes + lane) * width]);
            }
            let out = workspace.as_vectorized_mut().with_vector_size_mut::<N>();
            out[(columns + d * width) / lanes + v] = column;
        }
    }
}

/// Packs this unit's part of the block number `block` of the class weights of the heads `first_head..end_head`; those
/// from `active` on are zero.
#[cube]
pub(super) fn pack_classes<F: Float, M: Size>(
    weights: &[Vector<F, M>],
    strides: &RowStrides,
    workspace: &mut [f32],
    plan: &Plan,
    block: usize,
    first_head: usize,
    end_head: usize,
    #[comptime] width: usize,
) {
    let first = block * plan.class_block;
    let count = min(plan.class_block, plan.classes - first);
    let mine = share(0, (end_head - first_head) * count);
    for i in mine.start..mine.end {
        let head = first_head + i / count;
        let r = i % count;
        pack_class::<F, M>(
            weights,
            strides,
            workspace,
            head,
            first + r,
            plan.packed_weights(block, head - first_head) + r * plan.weight_stride(),
            plan,
            width,
        );
    }
}

/// Packs the weights of a class to `at`, or zeros from `active` on.
#[cube]
pub(super) fn pack_class<F: Float, M: Size>(
    weights: &[Vector<F, M>],
    strides: &RowStrides,
    workspace: &mut [f32],
    head: usize,
    class: usize,
    at: usize,
    plan: &Plan,
    #[comptime] width: usize,
) {
    let _norm = pack_row::<F, M>(
        weights,
        head * strides.head + class * strides.row,
        class < plan.active,
        workspace,
        at,
        width,
        plan,
        width,
    );
}
