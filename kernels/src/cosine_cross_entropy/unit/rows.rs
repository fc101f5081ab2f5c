//! The softmax of a unit's own rows: a panel of them is multiplied with a block of classes, and what comes out is folded.

use cubecl::prelude::*;

use super::phases::Phases;
use super::plan::Plan;
use super::row_gradients;
use crate::cosine_cross_entropy::margin::predicted;
use crate::loss::target::INVALID;
use crate::math::online_softmax::FLOOR;
use crate::math::tile::{Broadcast, Lanes, TILE_VECTORS, accumulate};

/// How far a logit may rise above the base before the base follows. Exponentials up to e⁸ lose nothing in f32, and while the
/// base stands, what was summed under it needs no correction.
const HEADROOM: f32 = 8.0;

/// A block of packed class weights.
#[derive(CubeType, Clone, Copy)]
pub(super) struct ClassBlock {
    /// Its number.
    pub number: usize,
    /// Its first class.
    pub first: usize,
    /// Its classes, padded to whole register tiles.
    pub count: usize,
}

/// An item that is being computed.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Item {
    pub item: usize,
    /// Its place in the chunk.
    pub local: usize,
    /// Its head's place among those of the chunk.
    pub slot: usize,
}

/// Logits of an item's rows with `count` packed class weights from `weights` on, times `scale`, to `out [count, width]`.
#[cube]
pub(super) fn logits<N: Size>(
    workspace: &mut [f32],
    plan: &Plan,
    local: usize,
    weights: usize,
    count: usize,
    out: usize,
    scale: f32,
    #[comptime] tile_rows: usize,
) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let columns = plan.columns_panel(local, width) / lanes;
    let mut start = 0usize.runtime();
    while start < plan.dim_padded {
        let steps = min(plan.depth, plan.dim_padded - start);
        let mut factor = 1.0f32.runtime();
        if start + steps == plan.dim_padded {
            factor = scale;
        }
        let factor = Vector::<f32, N>::new(factor);
        for group in 0..count / tile_rows {
            let at = out / lanes + group * comptime!(tile_rows * TILE_VECTORS);
            let mut tile = Array::<Vector<f32, N>>::new(comptime!(tile_rows * TILE_VECTORS));
            let vectors = workspace.as_vectorized().with_vector_size::<N>();
            if start == 0 {
                #[unroll]
                for i in 0..tile_rows * TILE_VECTORS {
                    tile[i] = Vector::<f32, N>::new(0.0);
                }
            } else {
                #[unroll]
                for i in 0..tile_rows * TILE_VECTORS {
                    tile[i] = vectors[at + i];
                }
            }
            accumulate::<N>(
                &mut tile,
                &*workspace,
                Broadcast {
                    base: weights + group * tile_rows * plan.weight_stride() + start,
                    row_stride: plan.weight_stride(),
                    step_stride: 1,
                },
                vectors,
                Lanes {
                    base: columns + start * TILE_VECTORS,
                    step_stride: TILE_VECTORS,
                },
                steps,
                tile_rows,
                TILE_VECTORS,
            );
            let vectors = workspace.as_vectorized_mut().with_vector_size_mut::<N>();
            #[unroll]
            for i in 0..tile_rows * TILE_VECTORS {
                vectors[at + i] = tile[i] * factor;
            }
        }
        start += steps;
    }
}

/// Rows that have seen no class. One that never sees a logit above [`FLOOR`], as of a NaN, is predicted to be class 0.
#[cube]
pub(super) fn start<N: Size>(
    workspace: &mut [f32],
    bests: &mut [Vector<u32, N>], // [chunk_items, width]
    plan: &Plan,
    local: usize,
) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let state = plan.state(local, width);
    let vectors = workspace.as_vectorized_mut().with_vector_size_mut::<N>();
    for v in 0..TILE_VECTORS {
        vectors[state.peak / lanes + v] = Vector::<f32, N>::new(FLOOR);
        vectors[state.base / lanes + v] = Vector::<f32, N>::new(FLOOR);
        vectors[state.sum / lanes + v] = Vector::<f32, N>::new(0.0);
        vectors[state.target / lanes + v] = Vector::<f32, N>::new(0.0);
        vectors[state.total / lanes + v] = Vector::<f32, N>::new(0.0);
        vectors[state.plain / lanes + v] = Vector::<f32, N>::new(FLOOR);
        bests[local * TILE_VECTORS + v] = Vector::<u32, N>::new(0u32);
    }
}

/// Folds the block's logits `[count, width]` at `at` into the rows' softmax, and leaves their exponentials `e^(z − base)`.
/// If gradients follow, what was summed under an earlier base is corrected.
#[cube]
pub(super) fn fold<N: Size>(
    workspace: &mut [f32],
    targets: &[Vector<u32, N>],   // [rows, padded]
    bests: &mut [Vector<u32, N>], // [chunk_items, width]
    plan: &Plan,
    item: &Item,
    block: &ClassBlock,
    at: usize,
    #[comptime] phases: Phases,
) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let row = plan.first_row(item.item, width);
    let state = plan.state(item.local, width);
    let real = min(block.count, plan.active - block.first);
    let vectors = workspace.as_vectorized_mut().with_vector_size_mut::<N>();
    let mut raised = false.runtime();
    for v in 0..TILE_VECTORS {
        let logits = at / lanes + v;
        let mut best = bests[item.local * TILE_VECTORS + v];
        let mut peak = vectors[state.peak / lanes + v];
        let mut target = vectors[state.target / lanes + v];
        let target_class = targets[row / lanes + v];
        let mut total = Vector::<f32, N>::new(0.0);
        for c in 0..real {
            let class = Vector::<u32, N>::new((block.first + c) as u32);
            let z = vectors[logits + c * TILE_VECTORS];
            target += select_many(class.equal(&target_class), z, Vector::<f32, N>::new(0.0));
            if comptime!(phases.smooth) {
                total += z;
            }
            best = select_many(z.greater_than(&peak), class, best);
            peak = max(peak, z);
        }
        bests[item.local * TILE_VECTORS + v] = best;
        vectors[state.peak / lanes + v] = peak;
        vectors[state.target / lanes + v] = target;
        if comptime!(phases.smooth) {
            vectors[state.total / lanes + v] += total;
        }

        let before = vectors[state.base / lanes + v];
        let higher = (peak - before).greater_than(&Vector::<f32, N>::new(HEADROOM));
        let base = select_many(higher, peak, before);
        let factor = (before - base).exp();
        let carried = vectors[state.sum / lanes + v] * factor;
        // A sum of sums, which loses less than one of millions of numbers.
        let mut sum = Vector::<f32, N>::new(0.0);
        for c in 0..real {
            let e = (vectors[logits + c * TILE_VECTORS] - base).exp();
            vectors[logits + c * TILE_VECTORS] = e;
            sum += e;
        }
        for c in real..block.count {
            vectors[logits + c * TILE_VECTORS] = Vector::<f32, N>::new(0.0);
        }
        vectors[state.sum / lanes + v] = carried + sum;
        vectors[state.base / lanes + v] = base;
        if comptime!(phases.at_once()) {
            if comptime!(phases.weights) {
                vectors[plan.base(item.local, block.number, width) / lanes + v] = base;
            }
            if comptime!(phases.embeddings) {
                // Idle until the loss is there.
                vectors[state.lse / lanes + v] = factor;
                if factor.vector_sum() != f32::cast_from(lanes as u32) {
                    raised = true;
                }
            }
        }
    }
    if comptime!(phases.at_once() && phases.embeddings) && raised && block.number > 0 {
        row_gradients::rescale::<N>(workspace, plan, item.local, state.lse);
    }
}

/// The rows have seen all classes: their losses, lse and predictions.
#[cube]
pub(super) fn conclude<N: Size>(
    workspace: &mut [f32],
    targets: &[Vector<u32, N>], // [rows, padded]
    bests: &[Vector<u32, N>],   // [chunk_items, width]
    row_loss: &mut [f32],
    lse: &mut [f32],
    predictions: &mut [u32],
    plan: &Plan,
    item: &Item,
    smoothing: f32,
    #[comptime] phases: Phases,
) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let smoothing = Vector::<f32, N>::new(smoothing);
    let one = Vector::<f32, N>::new(1.0);
    let classes = Vector::<f32, N>::new(f32::cast_from(plan.active as u32));
    let head = plan.head(item.item);
    let first = plan.first_row(item.item, width);
    let state = plan.state(item.local, width);
    let real = min(width, plan.rows - first);
    let vectors = workspace.as_vectorized_mut().with_vector_size_mut::<N>();
    for v in 0..TILE_VECTORS {
        let peak = vectors[state.peak / lanes + v];
        let of_peak = (vectors[state.base / lanes + v] - peak).exp();
        let log_sum = (vectors[state.sum / lanes + v] * of_peak).ln();
        let mean = vectors[state.total / lanes + v] / classes;
        let target = vectors[state.target / lanes + v];
        // From the peak, which a sure row's target is: a loss near 0 keeps its digits.
        let of_target = (peak - target) + log_sum;
        let loss = (one - smoothing) * of_target + smoothing * ((peak - mean) + log_sum);
        let counts = targets[first / lanes + v].less_than(&Vector::<u32, N>::new(INVALID));
        let row_lse = peak + log_sum;
        vectors[state.lse / lanes + v] = row_lse;
        vectors[state.lse_low / lanes + v] = (peak - row_lse) + log_sum;
        vectors[state.loss / lanes + v] = select_many(counts, loss, Vector::<f32, N>::new(0.0));
        #[unroll]
        for lane in 0..lanes {
            if v * lanes + lane < real {
                let mut best = bests[item.local * TILE_VECTORS + v].extract(lane);
                if comptime!(phases.margin) {
                    let target = targets[first / lanes + v].extract(lane);
                    let plain = vectors[state.plain / lanes + v].extract(lane);
                    best = predicted(best, peak.extract(lane), target, plain);
                }
                predictions[head * plan.rows + first + v * lanes + lane] = best;
            }
        }
    }
    for r in 0..real {
        let out = head * plan.rows + first + r;
        lse[out] = workspace[state.lse + r];
        lse[plan.heads * plan.rows + out] = workspace[state.lse_low + r];
        row_loss[out] = workspace[state.loss + r];
    }
}

/// Turns the block's logits `[count, width]` at `at` into logit gradients, with the lse of an earlier launch.
#[cube]
pub(super) fn logit_gradients<N: Size>(
    workspace: &mut [f32],
    targets: &[Vector<u32, N>], // [rows, padded]
    plan: &Plan,
    item: &Item,
    block: &ClassBlock,
    at: usize,
    smoothing: f32,
    #[comptime] phases: Phases,
) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let uniform = Vector::<f32, N>::new(smoothing / f32::cast_from(plan.active as u32));
    let peak = Vector::<f32, N>::new(1.0 - smoothing);
    let zero = Vector::<f32, N>::new(0.0);
    let row = plan.first_row(item.item, width);
    let state = plan.state(item.local, width);
    let real = min(block.count, plan.active - block.first);
    let vectors = workspace.as_vectorized_mut().with_vector_size_mut::<N>();
    for v in 0..TILE_VECTORS {
        let row_lse = vectors[state.lse / lanes + v];
        let row_low = vectors[state.lse_low / lanes + v];
        let arrived = vectors[state.arriving / lanes + v];
        let target_class = targets[row / lanes + v];
        for c in 0..real {
            let class = Vector::<u32, N>::new((block.first + c) as u32);
            let target = uniform + select_many(class.equal(&target_class), peak, zero);
            let z = vectors[at / lanes + c * TILE_VECTORS + v];
            let probability = ((z - row_lse) - row_low).exp();
            let mut gradient = arrived * (probability - target);
            if comptime!(phases.margin) {
                let slope = vectors[state.slope / lanes + v];
                gradient = select_many(class.equal(&target_class), gradient * slope, gradient);
            }
            vectors[at / lanes + c * TILE_VECTORS + v] = gradient;
        }
        for c in real..block.count {
            vectors[at / lanes + c * TILE_VECTORS + v] = zero;
        }
    }
}
