//! The whole step in one launch: a cube of as many units as the CPU has cores, with barriers between the phases.
//!
//! - Labels become targets, and are counted.
//! - Block by block of classes: all units pack the weights of the next block together, and each multiplies its own panels of
//!   rows, which it packs at the first block, with this one. Logits become a running softmax; if gradients follow, their exponentials
//!   are multiplied with the block at once and summed into the rows' gradients, as attention sums its values, and are kept.
//! - At the last block a panel's loss is known: sums become gradients of its rows.
//! - After a barrier each unit owns classes, and adds all rows to the gradients of their weights.
//!
//! With the exponentials kept, loss and gradients take `6·H·N·D·K` floating-point operations; a backward pass that only has lse
//! multiplies the logits again. The workspace is bounded: what does not fit goes in chunks of rows (and of classes, where nothing is
//! kept). Exponentials that would be too many for it wait in the gradient of the class weights, if that has a place for a quarter of
//! them at least; the logits of the others are computed again. Rows are in the lanes of a vector, so a softmax needs no horizontal
//! step. What each product reads over and over stays in the first-level cache. The number of cores changes who computes; the order
//! of a sum only where it decides what fits.

mod classes;
mod cut;
mod kept;
mod launch;
mod margins;
mod pack;
mod phases;
mod plan;
mod row_gradients;
mod rows;
mod targets;

pub(super) use launch::{Outcome, Step};

use cubecl::prelude::*;

use super::margin::MarginRule;
use crate::loss::arriving::share_of_row;
use crate::loss::reduce::{HowReduced, reduce_heads};
use crate::loss::target::LabelRule;
use crate::math::group::Group;
use crate::math::span::{Span, share, wait};
use crate::math::tile::TILE_VECTORS;
use crate::operand::RowStrides;
use crate::scale::sum_rows;
use phases::Phases;
use plan::{InGradient, Plan};
use rows::{ClassBlock, Item};

#[cube(launch_unchecked)]
fn step<
    F: Float,
    I: Int,
    N: Size, // lanes
    M: Size, // elements of an operand that are read together
    P: Size, // elements of a gradient that take the place of N f32 elements
>(
    embeddings: &[Vector<F, M>],
    embedding_strides: RowStrides,
    weights: &[Vector<F, M>],
    weight_strides: RowStrides,
    labels: &[I],         // [rows]
    targets: &mut [u32],  // [rows], padded to whole panels
    bests: &mut [u32],    // [chunk_items, width]
    upstream: &[f32],     // [heads] or [heads, rows], if it does not arrive everywhere
    head_weights: &[f32], // [heads] if phases.weighted
    workspace: &mut [f32],
    row_loss: &mut [f32],                 // [heads, rows]
    lse: &mut [f32],                      // [2, heads, rows]
    predictions: &mut [u32],              // [heads, rows]
    loss: &mut [f32],                     // [heads]
    total: &mut [f32],                    // [1]
    status: &mut [u32],                   // [STATUS_FIELDS]
    grad_embeddings: &mut [Vector<F, M>], // [heads, rows, dim]
    grad_weights: &mut [Vector<F, M>],    // [heads, stored, dim]
    scale_rows: &mut [f32],               // [heads, rows]
    grad_scale: &mut [f32],               // [heads]
    plan: Plan,
    rule: LabelRule,
    scale: f32,
    smoothing: f32,
    margin: MarginRule,
    everywhere: f32,
    #[comptime] phases: Phases,
    #[comptime] units: usize,
    #[comptime] in_gradient: InGradient,
    #[comptime] tile_rows: usize,
    #[define(F)] _dtype: ElemType,
    #[define(I)] _label: ElemType,
) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let counted = targets::count::<I>(
        labels,
        &rule,
        targets,
        status,
        plan.rows,
        plan.panels * width,
        phases.loss,
        units,
    );
    let of_row = share_of_row(counted, phases.mean);

    let blocks = plan.classes.div_ceil(plan.class_block);
    let mut start = 0usize.runtime();
    while start < plan.items {
        let mut end = min(start + plan.chunk_items, plan.items);
        if comptime!(phases.weights && in_gradient == InGradient::Nothing)
            && end > (plan.head(start) + 1) * plan.panels
        {
            // What is carried has the place of one head: the chunk that takes it from there leaves none of the next there.
            end = end / plan.panels * plan.panels;
        }
        let chunk = Span { start, end };
        let mine = share(chunk.start, chunk.end - chunk.start);
        let first_head = plan.head(chunk.start);
        let end_head = plan.head(chunk.end - 1) + 1;
        pack::pack_classes::<F, M>(
            weights,
            &weight_strides,
            workspace,
            &plan,
            0,
            first_head,
            end_head,
            width,
        );
        wait(units);
        let mut kept = 0usize.runtime(); // the first class of those that are kept
        for number in 0..blocks {
            if number + 1 < blocks {
                pack::pack_classes::<F, M>(
                    weights,
                    &weight_strides,
                    workspace,
                    &plan,
                    number + 1,
                    first_head,
                    end_head,
                    width,
                );
            }
            let first = number * plan.class_block;
            let block = ClassBlock {
                number,
                first,
                count: min(plan.class_block, plan.classes - first),
            };
            for item in mine.start..mine.end {
                let item = plan.item(item, &chunk);
                if number == 0 {
                    pack::pack_item::<F, N, M>(
                        embeddings,
                        &embedding_strides,
                        workspace,
                        &plan,
                        item.item,
                        item.local,
                        phases.gradients(),
                    );
                    if comptime!(phases.loss) {
                        rows::start::<N>(
                            workspace,
                            bests.as_vectorized_mut().with_vector_size_mut::<N>(),
                            &plan,
                            item.local,
                        );
                    }
                    if comptime!(phases.gradients()) {
                        row_gradients::arriving::<N>(
                            targets.as_vectorized().with_vector_size::<N>(),
                            everywhere,
                            upstream,
                            &*lse,
                            workspace,
                            &plan,
                            &item,
                            of_row * scale,
                            phases,
                        );
                    }
                    if comptime!(phases.embeddings) {
                        row_gradients::clear::<N>(workspace, &plan, item.local);
                    }
                }
                let stay = comptime!(phases.weights && !in_gradient.exponentials());
                let at = match stay {
                    true => plan.logit(item.local, first - kept, width),
                    false => plan.own_logits(),
                };
                rows::logits::<N>(
                    workspace,
                    &plan,
                    item.local,
                    plan.packed_weights(number, item.slot),
                    block.count,
                    at,
                    scale,
                    tile_rows,
                );
                if comptime!(phases.margin) {
                    margins::apply(
                        workspace,
                        &*targets,
                        &plan,
                        item.item,
                        item.local,
                        first,
                        block.count,
                        at,
                        scale,
                        &margin,
                        true,
                        width,
                    );
                }
                if comptime!(phases.loss) {
                    rows::fold::<N>(
                        workspace,
                        targets.as_vectorized().with_vector_size::<N>(),
                        bests.as_vectorized_mut().with_vector_size_mut::<N>(),
                        &plan,
                        &item,
                        &block,
                        at,
                        phases,
                    );
                } else {
                    rows::logit_gradients::<N>(
                        workspace,
                        targets.as_vectorized().with_vector_size::<N>(),
                        &plan,
                        &item,
                        &block,
                        at,
                        smoothing,
                        phases,
                    );
                }
                if comptime!(phases.embeddings) {
                    row_gradients::add_classes::<N>(workspace, &plan, &item, &block, at, tile_rows);
                }
                if comptime!(in_gradient.exponentials()) && plan.is_kept(item.item) {
                    kept::keep::<F, N, M, P>(&*workspace, grad_weights, &plan, &item, &block, at);
                }
                if comptime!(phases.embeddings && phases.needs_totals()) {
                    let head = plan.head(item.item);
                    if item.item == max(chunk.start, head * plan.panels) {
                        row_gradients::add_totals::<N>(workspace, &plan, &item, &block);
                    }
                }
                if number + 1 == blocks {
                    if comptime!(phases.loss) {
                        rows::conclude::<N>(
                            workspace,
                            targets.as_vectorized().with_vector_size::<N>(),
                            bests.as_vectorized().with_vector_size::<N>(),
                            row_loss,
                            lse,
                            predictions,
                            &plan,
                            &item,
                            smoothing,
                            phases,
                        );
                    }
                    if comptime!(phases.embeddings && !phases.needs_totals()) {
                        finish_rows::<F, N, M>(
                            weights,
                            &weight_strides,
                            &*targets,
                            workspace,
                            grad_embeddings,
                            scale_rows,
                            &plan,
                            &item,
                            scale,
                            smoothing,
                            &margin,
                            phases,
                        );
                    }
                }
            }
            wait(units); // this block's place is the next but one's
            if comptime!(phases.weights) {
                let classes = Span {
                    start: kept,
                    end: first + block.count,
                };
                if classes.end - kept == plan.chunk_classes || classes.end == plan.classes {
                    classes::gradients::<F, N, M, P>(
                        weights,
                        &weight_strides,
                        &*targets,
                        workspace,
                        grad_weights,
                        &plan,
                        &chunk,
                        &classes,
                        scale,
                        smoothing,
                        &margin,
                        phases,
                        in_gradient,
                        tile_rows,
                    );
                    kept = classes.end;
                    wait(units); // the next classes take the place of these
                }
            }
        }
        if comptime!(phases.embeddings && phases.needs_totals()) {
            for item in mine.start..mine.end {
                finish_rows::<F, N, M>(
                    weights,
                    &weight_strides,
                    &*targets,
                    workspace,
                    grad_embeddings,
                    scale_rows,
                    &plan,
                    &plan.item(item, &chunk),
                    scale,
                    smoothing,
                    &margin,
                    phases,
                );
            }
        }
        wait(units); // the next chunk divides the same workspace otherwise
        start = chunk.end;
    }
    if comptime!(phases.weights) {
        classes::clear_inactive::<F, M>(grad_weights, &plan);
    }
    if comptime!(phases.loss) && UNIT_POS == 0 {
        reduce_heads(
            &*row_loss,
            0,
            head_weights,
            loss,
            total,
            plan.heads,
            plan.rows,
            f32::cast_from(counted),
            comptime!(HowReduced {
                all: Group::ALONE,
                mean: phases.mean,
                by_head: true,
                weighted: phases.weighted,
            }),
        );
    }
    if comptime!(phases.scale) && UNIT_POS == 0 {
        sum_rows(
            &*scale_rows,
            0,
            grad_scale,
            plan.heads,
            plan.rows,
            scale,
            Group::ALONE,
        );
    }
}

/// The gradients of an item's rows, which have seen all classes.
#[cube]
fn finish_rows<F: Float, N: Size, M: Size>(
    weights: &[Vector<F, M>],
    strides: &RowStrides,
    targets: &[u32], // [rows, padded]
    workspace: &mut [f32],
    grad: &mut [Vector<F, M>], // [heads, rows, dim]
    scale_rows: &mut [f32],    // [heads, rows] if phases.scale
    plan: &Plan,
    item: &Item,
    scale: f32,
    smoothing: f32,
    margin: &MarginRule,
    #[comptime] phases: Phases,
) {
    if comptime!(phases.loss) {
        row_gradients::subtract_targets::<F, N, M>(
            weights, strides, targets, workspace, plan, item, smoothing, phases,
        );
    }
    row_gradients::finish::<F, N, M>(
        &*workspace,
        targets,
        grad,
        scale_rows,
        plan,
        item,
        scale,
        smoothing,
        margin,
        phases,
    );
}
