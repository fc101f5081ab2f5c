//! What a unit does for its own classes: the gradients of their weights, over all rows of the chunk.

use cubecl::prelude::*;

use super::kept;
use super::pack::pack_class;
use super::phases::Phases;
use super::plan::{InGradient, OWNED_CLASSES, OWNED_PANELS, Plan};
use crate::cosine_cross_entropy::margin::MarginRule;
use crate::math::narrow::narrow;
use crate::math::norm::{inverse_norm, projection};
use crate::math::span::{Span, share};
use crate::math::tile::{Broadcast, Lanes, TILE_VECTORS, add_to};
use crate::operand::RowStrides;

/// Panels of rows whose blocks of columns stay in the first-level cache while a unit's classes are multiplied with them.
const CACHED_PANELS: usize = 4;

/// Adds the rows of the items `chunk` to the gradients of the classes `classes`, in every head that the chunk touches.
#[cube]
pub(super) fn gradients<F: Float, N: Size, M: Size, P: Size>(
    weights: &[Vector<F, M>],
    strides: &RowStrides,
    targets: &[u32], // [rows, padded]
    workspace: &mut [f32],
    grad: &mut [Vector<F, M>],
    plan: &Plan,
    chunk: &Span,
    classes: &Span,
    scale: f32,
    smoothing: f32,
    margin: &MarginRule,
    #[comptime] phases: Phases,
    #[comptime] in_gradient: InGradient,
    #[comptime] tile_rows: usize,
) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let groups = (classes.end - classes.start) / tile_rows;
    // The work of a group is the items of its head in the chunk; each unit takes an equal part of it all.
    let mine = share(0, (chunk.end - chunk.start) * groups);
    let mut before = 0usize.runtime();
    for head in plan.head(chunk.start)..plan.head(chunk.end - 1) + 1 {
        let head_start = head * plan.panels;
        let items = Span {
            start: max(chunk.start, head_start),
            end: min(chunk.end, head_start + plan.panels),
        };
        let each = items.end - items.start;
        let mut group = owned_before(mine.start, before, each, groups);
        let last = owned_before(mine.end, before, each, groups);
        before += each * groups;
        let begins = items.start == head_start;
        let ends = items.end == head_start + plan.panels;
        while group < last {
            // As many groups as fit in this unit's accumulators.
            let owned = Owned {
                first: classes.start + group * tile_rows,
                in_chunk: group * tile_rows,
                groups: min(comptime!(OWNED_CLASSES / tile_rows), last - group),
            };
            let count = owned.groups * tile_rows;
            start::<F, N, M>(
                workspace,
                &*grad,
                plan,
                head,
                owned.first,
                count,
                begins,
                in_gradient,
            );
            if comptime!(in_gradient.some_exponentials()) {
                for r in 0..count {
                    pack_class::<F, M>(
                        weights,
                        strides,
                        workspace,
                        head,
                        owned.first + r,
                        plan.own_weights(width) + r * plan.weight_stride(),
                        plan,
                        width,
                    );
                }
            }
            let mut at = items.start;
            while at < items.end {
                let some = Span {
                    start: at,
                    end: min(at + OWNED_PANELS, items.end),
                };
                gather::<F, N, M, P>(
                    workspace,
                    targets,
                    &*grad,
                    plan,
                    &some,
                    chunk.start,
                    &owned,
                    scale,
                    smoothing,
                    margin,
                    phases,
                    in_gradient,
                    tile_rows,
                );
                add_rows::<N>(workspace, plan, &some, chunk.start, &owned, tile_rows);
                at = some.end;
            }
            for r in 0..count {
                if owned.first + r < plan.active {
                    let row = plan.own_gradient(width) + r * width;
                    let out = (head * plan.stored + owned.first + r) * plan.dim;
                    if ends {
                        finish_row::<F, M>(
                            weights,
                            head * strides.head + (owned.first + r) * strides.row,
                            &*workspace,
                            row,
                            grad,
                            out,
                            plan,
                            width,
                        );
                    } else {
                        carry_row::<F, M>(
                            workspace,
                            row,
                            grad,
                            out,
                            plan,
                            owned.first + r,
                            in_gradient,
                            width,
                        );
                    }
                }
            }
            group += owned.groups;
        }
    }
}

/// The classes that a unit accumulates at once.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Owned {
    pub first: usize,
    /// The first of them, counted in the chunk of classes.
    pub in_chunk: usize,
    /// How many register tiles they are.
    pub groups: usize,
}

/// How many of a head's groups of classes come before `work`, where each is `each` and the head begins at `before`.
#[cube]
fn owned_before(work: usize, before: usize, each: usize, groups: usize) -> usize {
    let into = max(work, before) - before;
    min(into.div_ceil(each), groups)
}

/// The accumulators begin with zero, or with what earlier chunks carried.
#[cube]
fn start<F: Float, N: Size, M: Size>(
    workspace: &mut [f32],
    grad: &[Vector<F, M>],
    plan: &Plan,
    head: usize,
    first: usize,
    count: usize,
    begins: bool,
    #[comptime] in_gradient: InGradient,
) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let owned = plan.own_gradient(width);
    if begins {
        let out = workspace.as_vectorized_mut().with_vector_size_mut::<N>();
        for i in 0..comptime!(OWNED_CLASSES / lanes) * plan.dim_padded {
            out[owned / lanes + i] = Vector::<f32, N>::new(0.0);
        }
    } else {
        let piece = M::value();
        let pieces = comptime!(width / piece);
        let block = comptime!(OWNED_CLASSES * width / piece);
        let out = workspace.as_vectorized_mut().with_vector_size_mut::<M>();
        for r in 0..count {
            if first + r < plan.active {
                let row = (owned + r * width) / piece;
                for d in 0..plan.dim / piece {
                    let value = match comptime!(in_gradient == InGradient::Sums) {
                        true => {
                            let from = (head * plan.stored + first + r) * plan.dim / piece;
                            Vector::<f32, M>::cast_from(grad[from + d])
                        }
                        false => out[(plan.carry + (first + r) * plan.dim_padded) / piece + d],
                    };
                    out[row + d / pieces * block + d % pieces] = value;
                }
            }
        }
    }
}

/// The logit gradients of some items with the owned classes, to rows of this unit's own: as they were kept, or from their
/// exponentials, `arriving · (e^(z − base) e^(base − lse) − target)`.
#[cube]
fn gather<F: Float, N: Size, M: Size, P: Size>(
    workspace: &mut [f32],
    targets: &[u32], // [rows, padded]
    grad: &[Vector<F, M>],
    plan: &Plan,
    items: &Span,
    chunk: usize, // its first item
    owned: &Owned,
    scale: f32,
    smoothing: f32,
    margin: &MarginRule,
    #[comptime] phases: Phases,
    #[comptime] in_gradient: InGradient,
    #[comptime] tile_rows: usize,
) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let uniform = Vector::<f32, N>::new(smoothing / f32::cast_from(plan.active as u32));
    let peak = Vector::<f32, N>::new(1.0 - smoothing);
    let zero = Vector::<f32, N>::new(0.0);
    let stride = plan.own_stride(width) / lanes;
    for item in items.start..items.end {
        let local = item - chunk;
        if comptime!(in_gradient.exponentials()) {
            if comptime!(in_gradient.some_exponentials()) && !plan.is_kept(item) {
                kept::multiply_again::<N>(
                    workspace, targets, plan, item, local, owned, scale, margin, phases, tile_rows,
                );
            } else {
                kept::recall::<F, N, M, P>(workspace, grad, plan, item, owned, tile_rows);
            }
        }
        let at = match comptime!(in_gradient.exponentials()) {
            true => plan.own_logits() / lanes,
            false => plan.logit(local, owned.in_chunk, width) / lanes,
        };
        let vectors = workspace.as_vectorized_mut().with_vector_size_mut::<N>();
        let state = plan.state(local, width);
        let row = plan.first_row(item, width) / lanes;
        for group in 0..owned.groups {
            let class = owned.first + group * tile_rows;
            let from = at + group * tile_rows * TILE_VECTORS;
            let to = plan.own_rows(width) / lanes
                + group * tile_rows * stride
                + (item - items.start) * TILE_VECTORS;
            #[unroll]
            for v in 0..TILE_VECTORS {
                if comptime!(phases.loss) {
                    let base = plan.base(local, class / plan.class_block, width) / lanes + v;
                    let arrived = vectors[state.arriving / lanes + v];
                    // Not e^(base − lse): rounding an lse costs a sure row the digits of its gradient.
                    let rise = vectors[base] - vectors[state.base / lanes + v];
                    let factor = arrived * rise.exp() / vectors[state.sum / lanes + v];
                    let target_class = targets.as_vectorized().with_vector_size::<N>()[row + v];
                    #[unroll]
                    for r in 0..tile_rows {
                        let of = Vector::<u32, N>::new((class + r) as u32);
                        let target = uniform + select_many(of.equal(&target_class), peak, zero);
                        let e = vectors[from + r * TILE_VECTORS + v];
                        let mut gradient = e * factor - arrived * target;
                        if comptime!(phases.margin) {
                            let slope = vectors[state.slope / lanes + v];
                            gradient =
                                select_many(of.equal(&target_class), gradient * slope, gradient);
                        }
                        vectors[to + r * stride + v] = gradient;
                    }
                } else {
                    #[unroll]
                    for r in 0..tile_rows {
                        vectors[to + r * stride + v] = vectors[from + r * TILE_VECTORS + v];
                    }
                }
            }
        }
    }
}

/// `gradient[c] += Σ_n g[c, n] x̂[n]` over the rows of `items`, for the owned classes.
#[cube]
fn add_rows<N: Size>(
    workspace: &mut [f32],
    plan: &Plan,
    items: &Span,
    chunk: usize, // its first item
    owned: &Owned,
    #[comptime] tile_rows: usize,
) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    for b in 0..plan.dim_padded / width {
        let mut at = items.start;
        while at < items.end {
            let end = min(at + CACHED_PANELS, items.end);
            let rows = (plan.block_row(at - chunk, width) + b * plan.block_stride(width)) / lanes;
            for group in 0..owned.groups {
                let out = (plan.own_gradient(width) + b * comptime!(OWNED_CLASSES * width)) / lanes
                    + group * comptime!(tile_rows * TILE_VECTORS);
                add_to::<N>(
                    workspace,
                    out,
                    Broadcast {
                        base: plan.own_rows(width)
                            + group * tile_rows * plan.own_stride(width)
                            + (at - items.start) * width,
                        row_stride: plan.own_stride(width),
                        step_stride: 1,
                    },
                    Lanes {
                        base: rows,
                        step_stride: TILE_VECTORS,
                    },
                    (end - at) * width,
                    tile_rows,
                    TILE_VECTORS,
                    // How many rows come at once depends on the chunk, and the sums must not.
                    false,
                );
            }
            at = end;
        }
    }
}

/// Through the normalization of the class weight.
#[cube]
fn finish_row<F: Float, M: Size>(
    weights: &[Vector<F, M>],
    from: usize, // in vectors
    workspace: &[f32],
    row: usize,
    grad: &mut [Vector<F, M>],
    out: usize,
    plan: &Plan,
    #[comptime] width: usize,
) {
    let piece = M::value();
    let pieces = comptime!(width / piece);
    let block = comptime!(OWNED_CLASSES * width / piece);
    let upstream = workspace.as_vectorized().with_vector_size::<M>();
    let row = row / piece;
    let mut squares = Vector::<f32, M>::new(0.0);
    let mut along = Vector::<f32, M>::new(0.0);
    for d in 0..plan.dim / piece {
        let value = Vector::<f32, M>::cast_from(weights[from + d]);
        squares = fma(value, value, squares);
        along = fma(
            value,
            upstream[row + d / pieces * block + d % pieces],
            along,
        );
    }
    let norm = squares.vector_sum().sqrt();
    let inverse = inverse_norm(norm);
    let projection = projection(along.vector_sum(), norm) * inverse * inverse;
    let inverse = Vector::<f32, M>::new(inverse);
    let projection = Vector::<f32, M>::new(-projection);
    for d in 0..plan.dim / piece {
        let value = Vector::<f32, M>::cast_from(weights[from + d]);
        let value = fma(
            projection,
            value,
            upstream[row + d / pieces * block + d % pieces],
        );
        grad[out / piece + d] = narrow::<F, M>(value * inverse);
    }
}

/// Keeps an unfinished row for the next chunk.
#[cube]
fn carry_row<F: Float, M: Size>(
    workspace: &mut [f32],
    row: usize,
    grad: &mut [Vector<F, M>],
    out: usize,
    plan: &Plan,
    class: usize,
    #[comptime] in_gradient: InGradient,
    #[comptime] width: usize,
) {
    let piece = M::value();
    let pieces = comptime!(width / piece);
    let block = comptime!(OWNED_CLASSES * width / piece);
    let space = workspace.as_vectorized_mut().with_vector_size_mut::<M>();
    let row = row / piece;
    for d in 0..plan.dim / piece {
        let value = space[row + d / pieces * block + d % pieces];
        if comptime!(in_gradient == InGradient::Sums) {
            grad[out / piece + d] = narrow::<F, M>(value);
        } else {
            space[(plan.carry + class * plan.dim_padded) / piece + d] = value;
        }
    }
}

/// Stored classes that take no part have zero gradients.
#[cube]
pub(super) fn clear_inactive<F: Float, M: Size>(grad: &mut [Vector<F, M>], plan: &Plan) {
    let piece = M::value();
    let inactive = plan.stored - plan.active;
    let mine = share(0, plan.heads * inactive);
    for i in mine.start..mine.end {
        let row = i / inactive * plan.stored + plan.active + i % inactive;
        for d in 0..plan.dim / piece {
            grad[row * plan.dim / piece + d] =
                Vector::<F, M>::cast_from(Vector::<f32, M>::new(0.0));
        }
    }
}
