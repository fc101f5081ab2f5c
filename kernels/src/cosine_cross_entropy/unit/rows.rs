//! What a unit does for its own rows: it multiplies a panel of them with a block of classes, and folds what comes out.

use cubecl::prelude::*;

use super::plan::{Phases, Plan};
use crate::loss::target::INVALID;
use crate::math::online_softmax::FLOOR;
use crate::math::tile::{Broadcast, Lanes, accumulate};
use crate::packing::unit::{EPSILON, RowStrides, TILE_VECTORS};

/// How far a logit may rise above the base before the base follows. Exponentials up to e⁸ lose nothing in f32, and while the
/// base stands, what was summed under it needs no correction.
const MARGIN: f32 = 8.0;

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
}

/// Logits of the item's rows with the block, times `scale`, to `out [count, width]`.
#[cube]
pub(super) fn logits<N: Size>(
    workspace: &mut [f32],
    plan: &Plan,
    item: &Item,
    block: &ClassBlock,
    out: usize,
    scale: f32,
    #[comptime] tile_rows: usize,
) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let columns = (plan.columns + item.local * plan.panel(width)) / lanes;
    let weights = plan.packed_weights(block.number, plan.head(item.item));
    let mut start = 0usize.runtime();
    while start < plan.dim_padded {
        let steps = min(plan.depth, plan.dim_padded - start);
        let mut factor = 1.0f32.runtime();
        if start + steps == plan.dim_padded {
            factor = scale;
        }
        let factor = Vector::<f32, N>::new(factor);
        for group in 0..block.count / tile_rows {
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

/// Rows that have seen no class.
#[cube]
pub(super) fn start<N: Size>(workspace: &mut [f32], plan: &Plan, local: usize) {
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
        let higher = (peak - before).greater_than(&Vector::<f32, N>::new(MARGIN));
        let base = select_many(higher, peak, before);
        let factor = (before - base).exp();
        let mut sum = vectors[state.sum / lanes + v] * factor;
        for c in 0..real {
            let e = (vectors[logits + c * TILE_VECTORS] - base).exp();
            vectors[logits + c * TILE_VECTORS] = e;
            sum += e;
        }
        for c in real..block.count {
            vectors[logits + c * TILE_VECTORS] = Vector::<f32, N>::new(0.0);
        }
        vectors[state.sum / lanes + v] = sum;
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
    if comptime!(phases.at_once() && phases.embeddings) && raised {
        rescale::<N>(workspace, plan, item.local, state.lse);
    }
}

/// Multiplies the gradient of each row with its factor from `factors` on.
#[cube]
fn rescale<N: Size>(workspace: &mut [f32], plan: &Plan, local: usize, factors: usize) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let panel = (plan.gradient + local * plan.panel(width)) / lanes;
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
    let weights = plan.packed_weights(block.number, plan.head(item.item));
    let panel = (plan.gradient + item.local * plan.panel(width)) / lanes;
    for b in 0..plan.dim_padded / width {
        for group in 0..comptime!(width / tile_rows) {
            let out =
                panel + b * width * TILE_VECTORS + group * comptime!(tile_rows * TILE_VECTORS);
            let mut tile = Array::<Vector<f32, N>>::new(comptime!(tile_rows * TILE_VECTORS));
            let vectors = workspace.as_vectorized().with_vector_size::<N>();
            #[unroll]
            for i in 0..tile_rows * TILE_VECTORS {
                tile[i] = vectors[out + i];
            }
            accumulate::<N>(
                &mut tile,
                &*workspace,
                Broadcast {
                    base: from + group * tile_rows,
                    row_stride: 1,
                    step_stride: width,
                },
                vectors,
                Lanes {
                    base: (weights + b * width) / lanes,
                    step_stride: plan.weight_stride() / lanes,
                },
                block.count,
                tile_rows,
                TILE_VECTORS,
            );
            let gradient = workspace.as_vectorized_mut().with_vector_size_mut::<N>();
            #[unroll]
            for i in 0..tile_rows * TILE_VECTORS {
                gradient[out + i] = tile[i];
            }
        }
    }
}

/// Adds the block's class weights to the totals of a head.
#[cube]
pub(super) fn add_totals<N: Size>(
    workspace: &mut [f32],
    plan: &Plan,
    head: usize,
    block: &ClassBlock,
) {
    let lanes = N::value();
    let weights = plan.packed_weights(block.number, head) / lanes;
    let totals = (plan.totals + head * plan.dim_padded) / lanes;
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
        let row_lse = vectors[state.base / lanes + v] + vectors[state.sum / lanes + v].ln();
        let mean = vectors[state.total / lanes + v] / classes;
        let target = vectors[state.target / lanes + v];
        let loss = row_lse - (one - smoothing) * target - smoothing * mean;
        let counts = targets[first / lanes + v].less_than(&Vector::<u32, N>::new(INVALID));
        vectors[state.lse / lanes + v] = row_lse;
        vectors[state.loss / lanes + v] = select_many(counts, loss, Vector::<f32, N>::new(0.0));
        #[unroll]
        for lane in 0..lanes {
            if v * lanes + lane < real {
                predictions[head * plan.rows + first + v * lanes + lane] =
                    bests[item.local * TILE_VECTORS + v].extract(lane);
            }
        }
    }
    for r in 0..real {
        let out = head * plan.rows + first + r;
        lse[out] = workspace[state.lse + r];
        row_loss[out] = workspace[state.loss + r];
    }
}

/// What a backward pass needs of an item's rows, into the workspace: the gradient that arrives, times `factor`, and lse
/// unless the loss of this launch leaves it there. Rows that take no part get 0.
#[cube]
pub(super) fn arriving<N: Size>(
    targets: &[Vector<u32, N>],
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
        if row < plan.rows {
            let at = head * plan.rows + row;
            match comptime!(phases.per_row) {
                true => arrived = upstream[at] * factor,
                false => arrived = upstream[head] * factor,
            }
            if comptime!(!phases.loss) {
                row_lse = lse[at];
            }
        }
        workspace[state.arriving + r] = arrived;
        if comptime!(!phases.loss) {
            workspace[state.lse + r] = row_lse;
        }
    }
    let vectors = workspace.as_vectorized_mut().with_vector_size_mut::<N>();
    for v in 0..TILE_VECTORS {
        let at = state.arriving / lanes + v;
        let counts = targets[first / lanes + v].less_than(&Vector::<u32, N>::new(INVALID));
        vectors[at] = select_many(counts, vectors[at], Vector::<f32, N>::new(0.0));
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
        let arrived = vectors[state.arriving / lanes + v];
        let target_class = targets[row / lanes + v];
        for c in 0..real {
            let class = Vector::<u32, N>::new((block.first + c) as u32);
            let target = uniform + select_many(class.equal(&target_class), peak, zero);
            let z = vectors[at / lanes + c * TILE_VECTORS + v];
            vectors[at / lanes + c * TILE_VECTORS + v] = arrived * ((z - row_lse).exp() - target);
        }
        for c in real..block.count {
            vectors[at / lanes + c * TILE_VECTORS + v] = zero;
        }
    }
}

/// Sets the gradients of an item's rows to zero.
#[cube]
pub(super) fn clear<N: Size>(workspace: &mut [f32], plan: &Plan, local: usize) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let at = (plan.gradient + local * plan.panel(width)) / lanes;
    let gradient = workspace.as_vectorized_mut().with_vector_size_mut::<N>();
    for i in 0..plan.panel(width) / lanes {
        gradient[at + i] = Vector::<f32, N>::new(0.0);
    }
}

/// Sums of exponentials times class weights become gradients of the unit-norm rows:
/// `arriving · (e^(base − lse) Σ_c e_c ŵ_c − (1 − ε) ŵ_y − ε/K Σ_c ŵ_c)`.
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
            let sums = arrived * (workspace[state.base + r] - workspace[state.lse + r]).exp();
            let target = targets[first + r];
            let mut from = 0usize.runtime();
            let mut of_target = 0.0f32.runtime();
            if target < INVALID {
                from = head * strides.head + target as usize * strides.row;
                let mut squares = Vector::<f32, M>::new(0.0);
                for d in 0..plan.dim / piece {
                    let value = Vector::<f32, M>::cast_from(weights[from + d]);
                    squares = fma(value, value, squares);
                }
                let norm = squares.vector_sum().sqrt();
                of_target = -arrived * (1.0 - smoothing) / max(norm, EPSILON);
            }
            let sums = Vector::<f32, M>::new(sums);
            let of_target = Vector::<f32, M>::new(of_target);
            let of_all = Vector::<f32, M>::new(-arrived * uniform);
            let upstream = (plan.gradient + item.local * plan.panel(width) + r * width) / piece;
            let totals = (plan.totals + head * plan.dim_padded) / piece;
            let space = workspace.as_vectorized_mut().with_vector_size_mut::<M>();
            for d in 0..plan.dim / piece {
                let at = upstream + d / pieces * block + d % pieces;
                let mut value = space[at] * sums;
                if comptime!(phases.smooth) {
                    value = fma(space[totals + d], of_all, value);
                }
                let w = Vector::<f32, M>::cast_from(weights[from + d]);
                space[at] = fma(w, of_target, value);
            }
        }
    }
}

/// Through the normalization: `dx = (dx̂ − x̂ (x̂·dx̂)) / ‖x‖`, or `dx̂ / EPSILON` where the norm was clamped.
#[cube]
pub(super) fn finish<F: Float, N: Size, M: Size>(
    workspace: &[f32],
    grad: &mut [Vector<F, M>],
    plan: &Plan,
    item: &Item,
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
            let upstream = (plan.gradient + item.local * plan.panel(width) + r * width) / piece;
            let norm = workspace[plan.state(item.local, width).norms + r];
            let mut along = Vector::<f32, M>::new(0.0);
            for d in 0..plan.dim / piece {
                let x = pieces_of[unit + d / pieces * unit_block + d % pieces];
                let g = pieces_of[upstream + d / pieces * block + d % pieces];
                along = fma(x, g, along);
            }
            let mut projection = along.vector_sum();
            if norm < EPSILON {
                projection = 0.0;
            }
            let inverse = Vector::<f32, M>::new(1.0 / max(norm, EPSILON));
            let projection = Vector::<f32, M>::new(-projection);
            let out = (head * plan.rows + first + r) * plan.dim / piece;
            for d in 0..plan.dim / piece {
                let x = pieces_of[unit + d / pieces * unit_block + d % pieces];
                let g = pieces_of[upstream + d / pieces * block + d % pieces];
                grad[out + d] = Vector::<F, M>::cast_from(fma(projection, x, g) * inverse);
            }
        }
    }
}
