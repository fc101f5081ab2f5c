//! What a unit does for its own rows: it carries panels of them through all classes.

use cubecl::prelude::*;

use super::pack::pack_classes;
use super::plan::{PANEL_BLOCK, Phases, Plan};
use crate::loss::target::INVALID;
use crate::math::online_softmax::{FLOOR, OnlineSoftmax, SoftmaxRows};
use crate::math::span::Span;
use crate::math::tile::{Broadcast, Lanes, accumulate};
use crate::packing::unit::{EPSILON, RowStrides, TILE_VECTORS};

/// Logits of `tile_rows` packed classes (from row `class` of this unit's blocks on) with an item's panel, to
/// `out [tile_rows, width]`.
#[cube]
fn logits<N: Size>(
    workspace: &mut [f32],
    plan: &Plan,
    local: usize,
    class: usize,
    out: usize,
    scale: f32,
    #[comptime] tile_rows: usize,
) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let columns = (plan.columns + local * plan.panel(width)) / lanes;
    let classes = plan.packed_weights() + class * width;
    let mut tile = Array::<Vector<f32, N>>::new(comptime!(tile_rows * TILE_VECTORS));
    #[unroll]
    for i in 0..tile_rows * TILE_VECTORS {
        tile[i] = Vector::<f32, N>::new(0.0);
    }
    for block in 0..plan.dim_padded / width {
        accumulate::<N>(
            &mut tile,
            &*workspace,
            Broadcast {
                base: classes + block * plan.class_block * width,
                row_stride: width,
                step_stride: 1,
            },
            workspace.as_vectorized().with_vector_size::<N>(),
            Lanes {
                base: columns + block * width * TILE_VECTORS,
                step_stride: TILE_VECTORS,
            },
            width,
            tile_rows,
            TILE_VECTORS,
        );
    }
    let scale = Vector::<f32, N>::new(scale);
    let vectors = workspace.as_vectorized_mut().with_vector_size_mut::<N>();
    #[unroll]
    for i in 0..tile_rows * TILE_VECTORS {
        vectors[out / lanes + i] = tile[i] * scale;
    }
}

/// The losses of the items `mine`, all of one head and at most `panel_block` of them. If `phases` keep the exponentials
/// `e^(z − peak)`, they stay in the workspace with their peaks.
#[cube]
pub(super) fn losses<F: Float, N: Size, M: Size>(
    weights: &[Vector<F, M>],
    strides: &RowStrides,
    targets: &[Vector<u32, N>], // [rows, padded]
    workspace: &mut [f32],
    row_loss: &mut [f32],
    lse: &mut [f32],
    predictions: &mut [u32],
    plan: &Plan,
    mine: &Span,
    chunk: usize, // the first item of the chunk
    scale: f32,
    smoothing: f32,
    #[comptime] phases: Phases,
    #[comptime] tile_rows: usize,
) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let head = plan.head(mine.start);
    let count = mine.end - mine.start;
    let groups = plan.classes / tile_rows;
    let mut softmax = SoftmaxRows::<N>::new(comptime!(PANEL_BLOCK * TILE_VECTORS));
    for at in 0..count * TILE_VECTORS {
        let none = OnlineSoftmax::<N>::new();
        softmax.set(at, &none);
    }

    let mut first = 0usize.runtime();
    while first < plan.classes {
        let packed = min(plan.class_block, plan.classes - first);
        pack_classes::<F, M>(
            weights, strides, workspace, plan, head, first, packed, width,
        );
        for group in 0..packed / tile_rows {
            let class = first + group * tile_rows;
            for p in 0..count {
                let local = mine.start + p - chunk;
                let tile = match comptime!(phases.keeps()) {
                    true => plan.logit(local, class, width),
                    false => plan.owned_gradient(), // idle without gradients
                };
                logits::<N>(
                    workspace,
                    plan,
                    local,
                    group * tile_rows,
                    tile,
                    scale,
                    tile_rows,
                );
                let row = plan.first_row(mine.start + p, width);
                let vectors = workspace.as_vectorized_mut().with_vector_size_mut::<N>();
                for v in 0..TILE_VECTORS {
                    let at = p * TILE_VECTORS + v;
                    let tile = tile / lanes + v;
                    let before = softmax.peak[at];
                    let mut peak = before;
                    let mut best = softmax.best[at];
                    let mut target = softmax.target[at];
                    let mut total = softmax.total[at];
                    for r in 0..tile_rows {
                        let class = Vector::<u32, N>::new((class + r) as u32);
                        let real = class.less_than(&Vector::<u32, N>::new(plan.active as u32));
                        let z = vectors[tile + r * TILE_VECTORS];
                        let zero = Vector::<f32, N>::new(0.0);
                        target += select_many(class.equal(&targets[row / lanes + v]), z, zero);
                        total += select_many(real, z, zero);
                        let z = select_many(real, z, Vector::<f32, N>::new(FLOOR));
                        best = select_many(z.greater_than(&peak), class, best);
                        peak = max(peak, z);
                        vectors[tile + r * TILE_VECTORS] = z;
                    }
                    let mut sum = softmax.sum[at] * (before - peak).exp();
                    for r in 0..tile_rows {
                        let e = (vectors[tile + r * TILE_VECTORS] - peak).exp();
                        sum += e;
                        if comptime!(phases.keeps()) {
                            vectors[tile + r * TILE_VECTORS] = e;
                        }
                    }
                    if comptime!(phases.keeps()) {
                        vectors[plan.peak(local, class / tile_rows, groups, width) / lanes + v] =
                            peak;
                    }
                    softmax.peak[at] = peak;
                    softmax.sum[at] = sum;
                    softmax.best[at] = best;
                    softmax.target[at] = target;
                    softmax.total[at] = total;
                }
            }
        }
        first += packed;
    }

    let smoothing = Vector::<f32, N>::new(smoothing);
    let one = Vector::<f32, N>::new(1.0);
    let classes = Vector::<f32, N>::new(f32::cast_from(plan.active as u32));
    for p in 0..count {
        let first = plan.first_row(mine.start + p, width);
        let state = plan.state(mine.start + p - chunk, width);
        let real = min(width, plan.rows - first);
        let vectors = workspace.as_vectorized_mut().with_vector_size_mut::<N>();
        for v in 0..TILE_VECTORS {
            let at = p * TILE_VECTORS + v;
            let row_lse = softmax.peak[at] + softmax.sum[at].ln();
            let mean = softmax.total[at] / classes;
            let loss = row_lse - (one - smoothing) * softmax.target[at] - smoothing * mean;
            let counts = targets[first / lanes + v].less_than(&Vector::<u32, N>::new(INVALID));
            vectors[state.lse / lanes + v] = row_lse;
            vectors[state.loss / lanes + v] = select_many(counts, loss, Vector::<f32, N>::new(0.0));
            #[unroll]
            for lane in 0..lanes {
                if v * lanes + lane < real {
                    predictions[head * plan.rows + first + v * lanes + lane] =
                        softmax.best[at].extract(lane);
                }
            }
        }
        for r in 0..real {
            let out = head * plan.rows + first + r;
            lse[out] = workspace[state.lse + r];
            row_loss[out] = workspace[state.loss + r];
        }
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
    item: usize,
    local: usize,
    factor: f32,
    #[comptime] phases: Phases,
) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let head = plan.head(item);
    let first = plan.first_row(item, width);
    let state = plan.state(local, width);
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

/// Adds what the classes `classes` of the chunk give to the gradients of the items `mine`, all of one head and at most
/// `panel_block` of them, and leaves the logit gradients in the workspace.
#[cube]
pub(super) fn gradients<F: Float, N: Size, M: Size>(
    weights: &[Vector<F, M>],
    strides: &RowStrides,
    targets: &[Vector<u32, N>], // [rows, padded]
    workspace: &mut [f32],
    plan: &Plan,
    mine: &Span,
    classes: &Span,
    chunk: usize,
    scale: f32,
    smoothing: f32,
    #[comptime] phases: Phases,
    #[comptime] tile_rows: usize,
) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let head = plan.head(mine.start);
    let count = mine.end - mine.start;
    let groups = plan.classes / tile_rows;
    let uniform = Vector::<f32, N>::new(smoothing / f32::cast_from(plan.active as u32));
    let peak_target = Vector::<f32, N>::new(1.0 - smoothing);
    let zero = Vector::<f32, N>::new(0.0);
    let mut first = classes.start;
    while first < classes.end {
        let packed = min(plan.class_block, classes.end - first);
        if comptime!(phases.embeddings || !phases.loss) {
            pack_classes::<F, M>(
                weights, strides, workspace, plan, head, first, packed, width,
            );
        }
        for group in 0..packed / tile_rows {
            let class = first + group * tile_rows;
            for p in 0..count {
                let local = mine.start + p - chunk;
                let tile = plan.logit(local, class - classes.start, width);
                if comptime!(!phases.loss) {
                    logits::<N>(
                        workspace,
                        plan,
                        local,
                        group * tile_rows,
                        tile,
                        scale,
                        tile_rows,
                    );
                }
                let row = plan.first_row(mine.start + p, width);
                let state = plan.state(local, width);
                let vectors = workspace.as_vectorized_mut().with_vector_size_mut::<N>();
                for v in 0..TILE_VECTORS {
                    let tile = tile / lanes + v;
                    let row_lse = vectors[state.lse / lanes + v];
                    let arrived = vectors[state.arriving / lanes + v];
                    let target_of = targets[row / lanes + v];
                    let mut factor = arrived;
                    if comptime!(phases.loss) {
                        let peak = plan.peak(local, class / tile_rows, groups, width) / lanes + v;
                        factor = arrived * (vectors[peak] - row_lse).exp();
                    }
                    for r in 0..tile_rows {
                        let class = Vector::<u32, N>::new((class + r) as u32);
                        let hit = class.equal(&target_of);
                        let target = uniform + select_many(hit, peak_target, zero);
                        let at = tile + r * TILE_VECTORS;
                        if comptime!(phases.loss) {
                            vectors[at] = vectors[at] * factor - arrived * target;
                        } else {
                            vectors[at] = arrived * ((vectors[at] - row_lse).exp() - target);
                        }
                    }
                }
            }
        }
        if comptime!(phases.embeddings) {
            for p in 0..count {
                add_classes::<N>(
                    workspace,
                    plan,
                    mine.start + p - chunk,
                    first - classes.start,
                    packed,
                    tile_rows,
                );
            }
        }
        first += packed;
    }
}

/// `gradient[n] += Σ_c g[c, n] ŵ[c]` over the packed classes, for the rows of an item.
#[cube]
fn add_classes<N: Size>(
    workspace: &mut [f32],
    plan: &Plan,
    local: usize,
    first: usize, // in the chunk
    packed: usize,
    #[comptime] tile_rows: usize,
) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let block = comptime!(width * width);
    let weights = plan.packed_weights();
    let logits = plan.logit(local, first, width);
    for b in 0..plan.dim_padded / width {
        for group in 0..comptime!(width / tile_rows) {
            let out = (plan.gradient + local * plan.panel(width) + b * block) / lanes
                + group * comptime!(tile_rows * TILE_VECTORS);
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
                    base: logits + group * tile_rows,
                    row_stride: 1,
                    step_stride: width,
                },
                vectors,
                Lanes {
                    base: (weights + b * plan.class_block * width) / lanes,
                    step_stride: TILE_VECTORS,
                },
                packed,
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

/// Through the normalization: `dx = (dx̂ − x̂ (x̂·dx̂)) / ‖x‖`, or `dx̂ / EPSILON` where the norm was clamped.
#[cube]
pub(super) fn finish<F: Float, N: Size, M: Size>(
    workspace: &[f32],
    grad: &mut [Vector<F, M>],
    plan: &Plan,
    item: usize,
    local: usize,
) {
    let piece = M::value();
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let pieces = comptime!(width / piece);
    let block = comptime!(width * width / piece);
    let head = plan.head(item);
    let first = plan.first_row(item, width);
    let pieces_of = workspace.as_vectorized().with_vector_size::<M>();
    for r in 0..width {
        if first + r < plan.rows {
            let unit = (plan.blocks + local * plan.panel(width) + r * width) / piece;
            let upstream = (plan.gradient + local * plan.panel(width) + r * width) / piece;
            let norm = workspace[plan.state(local, width).norms + r];
            let mut along = Vector::<f32, M>::new(0.0);
            for d in 0..plan.dim / piece {
                let at = d / pieces * block + d % pieces;
                along = fma(pieces_of[unit + at], pieces_of[upstream + at], along);
            }
            let mut projection = along.vector_sum();
            if norm < EPSILON {
                projection = 0.0;
            }
            let inverse = Vector::<f32, M>::new(1.0 / max(norm, EPSILON));
            let projection = Vector::<f32, M>::new(-projection);
            let out = (head * plan.rows + first + r) * plan.dim / piece;
            for d in 0..plan.dim / piece {
                let at = d / pieces * block + d % pieces;
                let value = fma(projection, pieces_of[unit + at], pieces_of[upstream + at]);
                grad[out + d] = Vector::<F, M>::cast_from(value * inverse);
            }
        }
    }
}
