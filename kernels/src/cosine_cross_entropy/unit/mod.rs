//! The whole step in one launch: a cube of as many units as the CPU has cores, with barriers between the phases.
//!
//! - Labels become targets, and are counted. Each unit packs its own panels of rows.
//! - It carries them through all classes, packing class weights block by block: logits, running softmax, and, if gradients
//!   follow, the exponentials stay in the workspace.
//! - Exponentials become logit gradients, and those the gradients of the unit's own rows.
//! - After a barrier each unit owns classes, and adds all rows to the gradients of their weights.
//!
//! With the exponentials kept, loss and gradients take `6·H·N·D·K` floating-point operations; a backward pass that only
//! has lse multiplies the logits again. The workspace is bounded: what does not fit goes in chunks of rows (and of
//! classes, where nothing is kept). Rows are in the lanes of a vector, so a softmax needs no horizontal step.

mod classes;
mod pack;
mod plan;
mod rows;

use cubecl::prelude::*;
use cubecl::std::tensor::TensorHandle;

use super::launch::{Call, Results};
use crate::Gradients;
use crate::loss::Reduction;
use crate::loss::reduce::STATUS_FIELDS;
use crate::loss::rows::Arriving;
use crate::loss::target::{IGNORED, INVALID, LabelRule, is_class, label_rule, target_of};
use crate::math::span::{Span, share};
use crate::math::sum::Kahan;
use crate::operand::{F32, whole};
use crate::packing::unit::{RowStrides, TILE_VECTORS};
use plan::{HostPlan, Phases, Plan, Problem};

/// A launch that was planned.
pub(super) struct Step<'a> {
    call: &'a Call<'a>,
    arriving: Option<&'a Arriving>,
    gradients: &'a Gradients,
    phases: Phases,
    host: HostPlan,
}

impl<'a> Step<'a> {
    /// Plans the loss, the gradients, or both; none if both are better done in two launches.
    pub(super) fn new(
        call: &'a Call,
        loss: bool,
        arriving: Option<&'a Arriving>,
        gradients: &'a Gradients,
    ) -> Option<Self> {
        let sizes = &call.problem.sizes;
        let phases = Phases {
            loss,
            embeddings: gradients.embeddings.is_some(),
            weights: gradients.weights.is_some(),
            per_row: arriving.is_some_and(|arriving| arriving.per_row),
            mean: call.options.loss.reduction == Reduction::Mean,
        };
        let problem = Problem {
            heads: sizes.heads,
            rows: sizes.rows,
            active: sizes.active,
            stored: call.problem.classes,
            dim: sizes.dim,
            units: call.blueprint.units,
            lanes: call.blueprint.lanes,
            tile_rows: call.blueprint.tile_rows,
            full: call.problem.embeddings.dtype() == F32,
        };
        Some(Self {
            call,
            arriving,
            gradients,
            phases,
            host: HostPlan::new(&problem, phases)?,
        })
    }

    /// Launches it. Without the loss, lse and status of `results` are read, and nothing of it is written.
    pub(super) fn launch(&self, results: &Results) {
        let call = self.call;
        let client = call.client;
        let blueprint = &call.blueprint;
        let sizes = &call.problem.sizes;
        let (embeddings, weights) = (&call.problem.embeddings, &call.problem.weights);
        let loss = &call.options.loss;
        let (count, dim) = blueprint.unit_grid();
        let vector = embeddings
            .vector_size(blueprint)
            .min(weights.vector_size(blueprint));
        let workspace = client.empty(self.host.floats * size_of::<f32>());
        let head_weights = client.create_from_slice(f32::as_bytes(&loss.weights(sizes.heads)));
        let rows_padded = self.host.plan.panels * blueprint.tile();
        let targets = client.empty(rows_padded * size_of::<u32>());
        // SAFETY: a phase that does not run touches none of its buffers, so any buffer will do for them.
        let nothing = || unsafe { BufferArg::from_raw_parts(head_weights.clone(), 1) };
        let optional = |tensor: &Option<TensorHandle>| match tensor {
            Some(tensor) => whole(tensor, vector),
            None => nothing(),
        };
        // SAFETY: `Strided` and `Labels` proved their tensors, `Results` and the gradients have the shapes of their
        // comments, and the plan divides a workspace of as many floats as it was made for.
        unsafe {
            step::launch_unchecked(
                client,
                count,
                dim,
                blueprint.lanes,
                vector,
                embeddings.buffer_arg(vector),
                embeddings.strides_arg(vector),
                weights.buffer_arg(vector),
                weights.strides_arg(vector),
                call.labels.buffer_arg(),
                BufferArg::from_raw_parts(targets, rows_padded),
                match self.arriving {
                    Some(arriving) => {
                        BufferArg::from_raw_parts(arriving.gradient.clone(), arriving.elements)
                    }
                    None => nothing(),
                },
                BufferArg::from_raw_parts(head_weights.clone(), sizes.heads),
                BufferArg::from_raw_parts(workspace, self.host.floats),
                whole(&results.rows.loss, 1),
                whole(&results.rows.lse, 1),
                whole(&results.rows.predictions, 1),
                whole(&results.reduced.loss, 1),
                whole(&results.reduced.total, 1),
                whole(&results.reduced.status, 1),
                optional(&self.gradients.embeddings),
                optional(&self.gradients.weights),
                self.host.plan.launch_arg(),
                label_rule(call.labels.dtype(), sizes.active, loss.ignore_index),
                call.options.scale,
                loss.label_smoothing,
                self.phases,
                blueprint.units,
                self.host.carry_in_gradient,
                blueprint.tile_rows,
                embeddings.dtype(),
                call.labels.dtype(),
            );
        }
    }
}

#[cube(launch_unchecked)]
fn step<F: Float, I: Int, N: Size, M: Size>(
    embeddings: &[Vector<F, M>],
    embedding_strides: RowStrides,
    weights: &[Vector<F, M>],
    weight_strides: RowStrides,
    labels: &[I],         // [rows]
    targets: &mut [u32],  // [rows], padded to whole panels
    upstream: &[f32],     // [heads], or [heads, rows] if per_row
    head_weights: &[f32], // [heads]
    workspace: &mut [f32],
    row_loss: &mut [f32],                 // [heads, rows]
    lse: &mut [f32],                      // [heads, rows]
    predictions: &mut [u32],              // [heads, rows]
    loss: &mut [f32],                     // [heads]
    total: &mut [f32],                    // [1]
    status: &mut [u32],                   // [STATUS_FIELDS]
    grad_embeddings: &mut [Vector<F, M>], // [heads, rows, dim]
    grad_weights: &mut [Vector<F, M>],    // [heads, stored, dim]
    plan: Plan,
    rule: LabelRule,
    scale: f32,
    smoothing: f32,
    #[comptime] phases: Phases,
    #[comptime] units: usize,
    #[comptime] carry_in_gradient: bool,
    #[comptime] tile_rows: usize,
    #[define(F)] _dtype: ElemType,
    #[define(I)] _label: ElemType,
) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let counted = count::<I>(
        labels,
        &rule,
        targets,
        status,
        plan.rows,
        plan.panels * width,
        phases.loss,
        units,
    );
    let mut part = 1.0f32.runtime(); // of a row in the loss
    if comptime!(phases.mean) {
        part = 1.0 / max(f32::cast_from(counted), 1.0);
    }

    let mut start = 0usize.runtime();
    while start < plan.items {
        let chunk = Span {
            start,
            end: min(start + plan.chunk_items, plan.items),
        };
        let mine = share(chunk.start, chunk.end - chunk.start);
        for item in mine.start..mine.end {
            let local = item - chunk.start;
            pack::pack_item::<F, N, M>(
                embeddings,
                &embedding_strides,
                workspace,
                &plan,
                item,
                local,
            );
            if comptime!(phases.gradients()) {
                rows::arriving::<N>(
                    targets.as_vectorized().with_vector_size::<N>(),
                    upstream,
                    &*lse,
                    workspace,
                    &plan,
                    item,
                    local,
                    part * scale,
                    phases,
                );
            }
            if comptime!(phases.embeddings) {
                rows::clear::<N>(workspace, &plan, local);
            }
        }
        if comptime!(phases.loss) {
            let mut at = mine.start;
            while at < mine.end {
                let block = panel_block(&plan, at, mine.end);
                rows::losses::<F, N, M>(
                    weights,
                    &weight_strides,
                    targets.as_vectorized().with_vector_size::<N>(),
                    workspace,
                    row_loss,
                    lse,
                    predictions,
                    &plan,
                    &block,
                    chunk.start,
                    scale,
                    smoothing,
                    phases,
                    tile_rows,
                );
                at = block.end;
            }
        }
        if comptime!(phases.gradients()) {
            let mut first = 0usize.runtime();
            while first < plan.classes {
                let classes = Span {
                    start: first,
                    end: min(first + plan.chunk_classes, plan.classes),
                };
                let mut at = mine.start;
                while at < mine.end {
                    let block = panel_block(&plan, at, mine.end);
                    rows::gradients::<F, N, M>(
                        weights,
                        &weight_strides,
                        targets.as_vectorized().with_vector_size::<N>(),
                        workspace,
                        &plan,
                        &block,
                        &classes,
                        chunk.start,
                        scale,
                        smoothing,
                        phases,
                        tile_rows,
                    );
                    at = block.end;
                }
                if comptime!(phases.weights) {
                    sync_cube();
                    classes::gradients::<F, N, M>(
                        weights,
                        &weight_strides,
                        workspace,
                        grad_weights,
                        &plan,
                        &chunk,
                        &classes,
                        carry_in_gradient,
                        tile_rows,
                    );
                    if classes.end < plan.classes {
                        sync_cube(); // the next classes take the place of these
                    }
                }
                first = classes.end;
            }
        }
        if comptime!(phases.embeddings) {
            for item in mine.start..mine.end {
                let local = item - chunk.start;
                rows::finish::<F, N, M>(&*workspace, grad_embeddings, &plan, item, local);
            }
        }
        sync_cube(); // the next chunk divides the same workspace otherwise
        start = chunk.end;
    }
    if comptime!(phases.weights) {
        classes::clear_inactive::<F, M>(grad_weights, &plan);
    }
    if comptime!(phases.loss) && UNIT_POS == 0 {
        reduce(&*row_loss, head_weights, loss, total, &plan, part);
    }
}

/// The next items, up to `panel_block` and of one head.
#[cube]
fn panel_block(plan: &Plan, start: usize, end: usize) -> Span {
    let head_end = (plan.head(start) + 1) * plan.panels;
    Span {
        start,
        end: min(min(start + plan.panel_block, head_end), end),
    }
}

/// Turns labels into targets, and counts the rows that have one; the status goes out if this launch is to `report`.
/// Every unit must call.
#[cube]
fn count<I: Int>(
    labels: &[I],
    rule: &LabelRule,
    targets: &mut [u32],
    status: &mut [u32],
    rows: usize,
    padded: usize,
    #[comptime] report: bool,
    #[comptime] units: usize,
) -> u32 {
    let unit = UNIT_POS as usize;
    // Shared memory also has the runtime wait for the launches before this one, so that no two launches with
    // barriers, of different streams, can each hold cores that the other is waiting for.
    let mut shared = Shared::<[u32]>::new_slice(comptime!(STATUS_FIELDS * units));
    let mut counted = 0u32.runtime();
    let mut invalid = 0u32.runtime();
    let mut first = INVALID.runtime();
    let mine = share(0, padded);
    for row in mine.start..mine.end {
        let mut target = IGNORED.runtime();
        if row < rows {
            target = target_of::<I>(labels[row], rule);
        }
        targets[row] = target;
        if is_class(target) {
            counted += 1;
        } else if target == INVALID {
            invalid += 1;
            first = min(first, row as u32);
        }
    }
    shared[unit * STATUS_FIELDS] = counted;
    shared[unit * STATUS_FIELDS + 1] = invalid;
    shared[unit * STATUS_FIELDS + 2] = first;
    sync_cube();
    counted = 0;
    invalid = 0;
    first = INVALID;
    for i in 0..units {
        counted += shared[i * STATUS_FIELDS];
        invalid += shared[i * STATUS_FIELDS + 1];
        first = min(first, shared[i * STATUS_FIELDS + 2]);
    }
    if comptime!(report) && unit == 0 {
        status[0] = counted;
        status[1] = invalid;
        status[2] = first;
    }
    counted
}

/// Row losses become head losses and the total.
#[cube]
fn reduce(
    row_loss: &[f32],
    head_weights: &[f32],
    loss: &mut [f32],
    total: &mut [f32],
    plan: &Plan,
    part: f32,
) {
    let mut all = Kahan::new();
    for head in 0..plan.heads {
        let mut sum = Kahan::new();
        for row in 0..plan.rows {
            sum.add(row_loss[head * plan.rows + row]);
        }
        let of_head = sum.total() * part;
        loss[head] = of_head;
        all.add(of_head * head_weights[head]);
    }
    total[0] = all.total();
}
