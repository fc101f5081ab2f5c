//! The gradients of a unit's own rows: sums over the classes, then the targets' part and the normalization.

use cubecl::prelude::*;

use super::margins;
use super::phases::Phases;
use super::plan::Plan;
use super::rows::{ClassBlock, Item};
use crate::cosine_cross_entropy::margin::MarginRule;
use crate::loss::arriving::Arrives;
use crate::loss::target::INVALID;
use crate::math::narrow::narrow;
use crate::math::norm::{inverse_norm, projection, row_norm};
use crate::math::tile::{Broadcast, Lanes, TILE_VECTORS, add_to};
use crate::operand::RowStrides;

/// Sets the gradients of an item's rows to zero.
#[cube]
pub(super) fn clear<N: Size>(workspace: &mut [f32], plan: &Plan, local: usize) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let at = plan.gradient_panel(local, width) / lanes;
    let gradient = workspace.as_vectorized_mut().with_vector_size_mut::<N>();
    for i in 0..plan.panel(width) / lanes {
        gradient[at + i] = Vector::<f32, N>::new(0.0);
    }
}

/// What a backward pass needs of an item's rows, into the workspace: the gradient that arrives, times `factor`, and lse
/// unless the loss of this launch leaves it there. Rows that take no part get 0.
#[cube]
pub(super) fn arriving<N: Size>(
    targets: &[Vector<u32, N>],
    everywhere: f32,
    upstream: &[f32],
    lse: &[f32],
    workspace: &mut [f32],
    plan: &Plan,
    item: &Item,
    factor: f32,
    #[comptime] phases: Phases,
) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let head = plan.head(item.item);
    let first = plan.first_row(item.item, width);
    let state = plan.state(item.local, width);
    for r in 0..width {
        let row = first + r;
        let mut arrived = 0.0f32.runtime();
        let mut row_lse = 0.0f32.runtime();
        let mut row_low = 0.0f32.runtime();
        if row < plan.rows {
            let at = head * plan.rows + row;
            match comptime!(phases.arrives) {
                Arrives::Everywhere => arrived = everywhere * factor,
                Arrives::ByHead => arrived = upstream[head] * factor,
                Arrives::ByRow => arrived = upstream[at] * factor,
            }
            if comptime!(!phases.loss) {
                row_lse = lse[at];
                row_low = lse[plan.heads * plan.rows + at];
            }
        }
        workspace[state.arriving + r] = arrived;
        if comptime!(!phases.loss) {
            workspace[state.lse + r] = row_lse;
            workspace[state.lse_low + r] = row_low;
        }
    }
    let vectors = workspace.as_vectorized_mut().with_vector_size_mut::<N>();
    for v in 0..TILE_VECTORS {
        let at = state.arriving / lanes + v;
        let counts = targets[first / lanes + v].less_than(&Vector::<u32, N>::new(INVALID));
        vectors[at] = select_many(counts, vectors[at], Vector::<f32, N>::new(0.0));
    }
}

/// Multiplies the gradient of each row with its factor from `factors` on.
#[cube]
pub(super) fn rescale<N: Size>(workspace: &mut [f32], plan: &Plan, local: usize, factors: usize) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let panel = plan.gradient_panel(local, width) / lanes;
    for r in 0..width {
        let factor = workspace[factors + r];
        if factor != 1.0 {
            let factor = Vector::<f32, N>::new(factor);
            let vectors = workspace.as_vectorized_mut().with_vector_size_mut::<N>();
            for b in 0..plan.dim_padded / width {
                #[unroll]
                for v in 0..TILE_VECTORS {
                    let at = panel + (b * width + r) * TILE_VECTORS + v;
                    vectors[at] *= factor;
                }
            }
        }
    }
}

/// `gradient[n] += Σ_c g[n, c] ŵ[c]` over the block, for the rows of an item whose `g [count, width]` is at `from`.
#[cube]
pub(super) fn add_classes<N: Size>(
    workspace: &mut [f32],
    plan: &Plan,
    item: &Item,
    block: &ClassBlock,
    from: usize,
    #[comptime] tile_rows: usize,
) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let weights = plan.packed_weights(block.number, item.slot);
    let panel = plan.gradient_panel(item.local, width) / lanes;
    for b in 0..plan.dim_padded / width {
        for group in 0..comptime!(width / tile_rows) {
            let out =
                panel + b * width * TILE_VECTORS + group * comptime!(tile_rows * TILE_VECTORS);
            add_to::<N>(
                workspace,
                out,
                Broadcast {
                    base: from + group * tile_rows,
                    row_stride: 1,
                    step_stride: width,
                },
                Lanes {
                    base: (weights + b * width) / lanes,
                    step_stride: plan.weight_stride() / lanes,
                },
                block.count,
                tile_rows,
                TILE_VECTORS,
                true,
            );
        }
    }
}

/// Adds the block's class weights to the totals of the item's head.
#[cube]
pub(super) fn add_totals<N: Size>(
    workspace: &mut [f32],
    plan: &Plan,
    item: &Item,
    block: &ClassBlock,
) {
    let lanes = N::value();
    let weights = plan.packed_weights(block.number, item.slot) / lanes;
    let totals = (plan.totals + plan.head(item.item) * plan.dim_padded) / lanes;
    let vectors = workspace.as_vectorized_mut().with_vector_size_mut::<N>();
    for d in 0..plan.dim_padded / lanes {
        let mut total = vectors[totals + d];
        if block.number == 0 {
            total = Vector::<f32, N>::new(0.0);
        }
        for c in 0..block.count {
            total += vectors[weights + c * plan.weight_stride() / lanes + d];
        }
        vectors[totals + d] = total;
    }
}

/// Sums of exponentials times class weights become gradients of the unit-norm rows:
/// `arriving · (Σ_c e_c ŵ_c / Σ_c e_c − (1 − ε) ŵ_y − ε/K Σ_c ŵ_c)`. With a margin the target's part, `p_y − (1 − ε) − ε/K`, counts
/// as many times as its slope says.
#[cube]
pub(super) fn subtract_targets<F: Float, N: Size, M: Size>(
    weights: &[Vector<F, M>],
    strides: &RowStrides,
    targets: &[u32], // [rows, padded]
    workspace: &mut [f32],
    plan: &Plan,
    item: &Item,
    smoothing: f32,
    #[comptime] phases: Phases,
) {
    let piece = M::value();
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let pieces = comptime!(width / piece);
    let block = comptime!(width * width / piece);
    let head = plan.head(item.item);
    let first = plan.first_row(item.item, width);
    let state = plan.state(item.local, width);
    let uniform = smoothing / f32::cast_from(plan.active as u32);
    for r in 0..width {
        if first + r < plan.rows {
            let arrived = workspace[state.arriving + r];
            let sums = arrived / workspace[state.sum + r];
            let target = targets[first + r];
            let mut from = 0usize.runtime();
            let mut of_target = 0.0f32.runtime();
            if target < INVALID {
                from = head * strides.head + target as usize * strides.row;
                let norm = row_norm::<F, M>(weights, from, plan.dim / piece);
                let mut own = smoothing - 1.0;
                if comptime!(phases.margin) {
                    let below = workspace[state.target + r] - workspace[state.lse + r];
                    let probability = (below - workspace[state.lse_low + r]).exp();
                    let slope = workspace[state.slope + r];
                    own += (slope - 1.0) * (probability + own - uniform);
                }
                of_target = arrived * own * inverse_norm(norm);
            }
            let sums = Vector::<f32, M>::new(sums);
            let of_target = Vector::<f32, M>::new(of_target);
            let of_all = Vector::<f32, M>::new(-arrived * uniform);
            let upstream = (plan.gradient_panel(item.local, width) + r * width) / piece;
            let totals = (plan.totals + head * plan.dim_padded) / piece;
            let space = workspace.as_vectorized_mut().with_vector_size_mut::<M>();
            for d in 0..plan.dim / piece {
                let at = upstream + d / pieces * block + d % pieces;
                let mut value = space[at] * sums;
                if comptime!(phases.smooth) {
                    value = fma(space[totals + d], of_all, value);
                }
                if target < INVALID {
                    let w = Vector::<f32, M>::cast_from(weights[from + d]);
                    value = fma(w, of_target, value);
                }
                space[at] = value;
            }
        }
    }
}

/// Through the normalization, to the gradients of the rows, and to what they have of the gradient of the scale.
#[cube]
pub(super) fn finish<F: Float, N: Size, M: Size>(
    workspace: &[f32],
    targets: &[u32], // [rows, padded]
    grad: &mut [Vector<F, M>],
    scale_rows: &mut [f32], // [heads, rows] if phases.scale
    plan: &Plan,
    item: &Item,
    scale: f32,
    smoothing: f32,
    margin: &MarginRule,
    #[comptime] phases: Phases,
) {
    let piece = M::value();
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let pieces = comptime!(width / piece);
    let block = comptime!(width * width / piece);
    let head = plan.head(item.item);
    let first = plan.first_row(item.item, width);
    let pieces_of = workspace.as_vectorized().with_vector_size::<M>();
    let unit_block = plan.block_stride(width) / piece;
    for r in 0..width {
        if first + r < plan.rows {
            let unit = (plan.block_row(item.local, width) + r * width) / piece;
            let upstream = (plan.gradient_panel(item.local, width) + r * width) / piece;
            let norm = workspace[plan.state(item.local, width).norms + r];
            let mut along = Vector::<f32, M>::new(0.0);
            for d in 0..plan.dim / piece {
                let x = pieces_of[unit + d / pieces * unit_block + d % pieces];
                let g = pieces_of[upstream + d / pieces * block + d % pieces];
                along = fma(x, g, along);
            }
            let along = along.vector_sum();
            let number = head * plan.rows + first + r;
            if comptime!(phases.scale) {
                let mut of_row = along;
                if comptime!(phases.margin) {
                    let own = margins::own_class(
                        workspace,
                        targets[first + r],
                        plan,
                        item.local,
                        r,
                        scale,
                        smoothing,
                        margin,
                        width,
                    );
                    of_row += own;
                }
                scale_rows[number] = of_row;
            }
            let inverse = Vector::<f32, M>::new(inverse_norm(norm));
            let projection = Vector::<f32, M>::new(-projection(along, norm));
            let out = number * plan.dim / piece;
            for d in 0..plan.dim / piece {
                let x = pieces_of[unit + d / pieces * unit_block + d % pieces];
                let g = pieces_of[upstream + d / pieces * block + d % pieces];
                grad[out + d] = narrow::<F, M>(fma(projection, x, g) * inverse);
            }
        }
    }
}
