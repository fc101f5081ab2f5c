//! Exponentials that wait in the gradients of the class weights, and those that find no place there and are computed again.

use cubecl::prelude::*;

use super::classes::Owned;
use super::margins;
use super::phases::Phases;
use super::plan::Plan;
use super::rows::{self, ClassBlock, Item};
use crate::cosine_cross_entropy::margin::MarginRule;
use crate::math::tile::TILE_VECTORS;

/// Keeps the exponentials `[count, width]` at `from` of an item with a block, in the gradients of its classes.
#[cube]
pub(super) fn keep<F: Float, N: Size, M: Size, P: Size>(
    workspace: &[f32],
    grad: &mut [Vector<F, M>],
    plan: &Plan,
    item: &Item,
    block: &ClassBlock,
    from: usize,
) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let elements = P::value();
    let per_float = comptime!(elements / lanes);
    let vectors = workspace.as_vectorized().with_vector_size::<N>();
    let kept = grad.with_vector_size_mut::<P>();
    for c in 0..min(block.count, plan.active - block.first) {
        let to = plan.kept_in_gradient(item.item, block.first + c, width, per_float) / lanes;
        #[unroll]
        for v in 0..TILE_VECTORS {
            kept[to + v] =
                Vector::<F, P>::reinterpret(vectors[from / lanes + c * TILE_VECTORS + v]);
        }
    }
}

/// The exponentials of an item with the owned classes, from the gradients of these to `[classes, width]` in this unit's own space.
#[cube]
pub(super) fn recall<F: Float, N: Size, M: Size, P: Size>(
    workspace: &mut [f32],
    grad: &[Vector<F, M>],
    plan: &Plan,
    item: usize,
    owned: &Owned,
    #[comptime] tile_rows: usize,
) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let elements = P::value();
    let per_float = comptime!(elements / lanes);
    let to = plan.own_logits() / lanes;
    let vectors = workspace.as_vectorized_mut().with_vector_size_mut::<N>();
    let kept = grad.with_vector_size::<P>();
    for c in 0..owned.groups * tile_rows {
        // Of the classes that fill a tile any number will do.
        let class = min(owned.first + c, plan.active - 1);
        let from = plan.kept_in_gradient(item, class, width, per_float) / lanes;
        #[unroll]
        for v in 0..TILE_VECTORS {
            vectors[to + c * TILE_VECTORS + v] = Vector::<f32, N>::reinterpret(kept[from + v]);
        }
    }
}

/// The same for an item whose exponentials found no place there: from its rows and the class weights once more.
#[cube]
pub(super) fn multiply_again<N: Size>(
    workspace: &mut [f32],
    targets: &[u32], // [rows, padded]
    plan: &Plan,
    item: usize,
    local: usize, // its place in the chunk
    owned: &Owned,
    scale: f32,
    margin: &MarginRule,
    #[comptime] phases: Phases,
    #[comptime] tile_rows: usize,
) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let at = plan.own_logits();
    let count = owned.groups * tile_rows;
    let weights = plan.own_weights(width);
    rows::logits::<N>(workspace, plan, local, weights, count, at, scale, tile_rows);
    if comptime!(phases.margin) {
        margins::apply(
            workspace,
            targets,
            plan,
            item,
            local,
            owned.first,
            count,
            at,
            scale,
            margin,
            false,
            width,
        );
    }
    let vectors = workspace.as_vectorized_mut().with_vector_size_mut::<N>();
    for c in 0..count {
        let block = (owned.first + c) / plan.class_block;
        #[unroll]
        for v in 0..TILE_VECTORS {
            let base = vectors[plan.base(local, block, width) / lanes + v];
            let logit = vectors[at / lanes + c * TILE_VECTORS + v];
            vectors[at / lanes + c * TILE_VECTORS + v] = (logit - base).exp();
        }
    }
}
