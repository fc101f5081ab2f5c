//! A unit owns a block of rows (forward, dX) or of classes (dW) and walks the other operand's panels.

use cubecl::prelude::*;

use super::launch::{BackwardCall, ForwardCall};
use crate::loss::target::{LabelRule, is_class, label_rule, target_of};
use crate::math::lanes::{One, iota};
use crate::math::online_softmax::{OnlineSoftmax, SoftmaxRows, logit_gradient};
use crate::operand::whole;
use crate::packing::unit::{
    Scratch, TILE_VECTORS, add_product, clear_gradient, cosines, gradient_vector, scratch_len,
    write_gradients,
};
use crate::packing::{Layout, Operand};

pub(super) fn launch_forward(call: &ForwardCall) {
    let (count, dim) = call.blueprint.unit_grid();
    let sizes = &call.packed.sizes;
    // SAFETY: `Packed` holds whole tiles, the outputs are [heads, rows], labels have `rows` elements.
    unsafe {
        forward::launch_unchecked(
            call.client,
            count,
            dim,
            call.blueprint.lanes,
            call.packed.rows_arg(),
            call.packed.panels_arg(call.blueprint.lanes),
            call.labels.buffer_arg(),
            whole(call.row_loss, 1),
            whole(call.lse, 1),
            whole(call.predictions, 1),
            sizes.launch_arg(),
            label_rule(call.labels.dtype(), sizes.active, call.loss.ignore_index),
            call.scale,
            call.loss.label_smoothing,
            call.blueprint.tile_rows,
            call.labels.dtype(),
        );
    }
}

pub(super) fn launch_backward(call: &BackwardCall) {
    let (count, dim) = call.blueprint.unit_grid();
    let sizes = &call.packed.sizes;
    let lanes = call.blueprint.lanes;
    let vector = gradient_vector(sizes.dim, lanes);
    let scratch = scratch_len(
        call.blueprint.total_units(),
        call.blueprint.tile(),
        sizes.dim_padded,
    );
    let scratch_handle = call.client.empty(scratch * size_of::<f32>());
    // SAFETY: `Packed` and `Rows` hold whole tiles, `grad` is [heads, count ≥ active or rows, dim], and each unit
    // stays in its own part of the scratch.
    unsafe {
        backward::launch_unchecked(
            call.client,
            count,
            dim,
            lanes,
            vector,
            call.packed.rows_arg(),
            call.packed.panels_arg(lanes),
            call.packed.norms_arg(),
            call.rows.state_arg(lanes),
            call.rows.targets_arg(lanes),
            BufferArg::from_raw_parts(scratch_handle, scratch),
            whole(call.grad, vector),
            sizes.launch_arg(),
            call.grad.shape()[1],
            call.scale,
            call.smoothing,
            call.owner,
            call.blueprint.tile_rows,
            call.grad.dtype,
        );
    }
}

#[cube(launch_unchecked)]
fn forward<I: Int, N: Size>(
    rows: &[f32],
    panels: &[Vector<f32, N>],
    labels: &[I],
    row_loss: &mut [f32],
    lse: &mut [f32],
    predictions: &mut [u32],
    layout: Layout,
    rule: LabelRule,
    scale: f32,
    smoothing: f32,
    #[comptime] tile_rows: usize,
    #[define(I)] _label: ElemType,
) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let blocks_per_head = layout.rows_padded / width;
    let groups = comptime!(width / tile_rows);
    let active = layout.active as u32;
    let counted = iota::<N>();
    let scale = Vector::<f32, N>::new(scale);

    let mut states = SoftmaxRows::<N>::new(width);
    let mut targets = Array::<u32>::new(width);

    let mut block = ABSOLUTE_POS;
    while block < layout.heads * blocks_per_head {
        let head = block / blocks_per_head;
        let first = (block % blocks_per_head) * width;
        let packed_row = layout.head_start(head, Operand::Embeddings) + first;
        let packed_class = layout.head_start(head, Operand::Weights);
        for r in 0..width {
            let state = OnlineSoftmax::<N>::new();
            states.set(r, &state);
            targets[r] = u32::MAX;
            if first + r < layout.rows {
                targets[r] = target_of::<I>(labels[first + r], &rule);
            }
        }
        for panel in 0..layout.active_padded / width {
            for group in 0..groups {
                let mut tile = Array::<Vector<f32, N>>::new(tile_rows * TILE_VECTORS);
                cosines::<N>(
                    &mut tile,
                    rows,
                    packed_row + group * tile_rows,
                    panels,
                    packed_class + panel * width,
                    layout.dim_padded,
                    tile_rows,
                );
                #[unroll]
                for r in 0..tile_rows {
                    let row = group * tile_rows + r;
                    let mut state = states.get(row);
                    #[unroll]
                    for v in 0..TILE_VECTORS {
                        let class = (panel * width + v * lanes) as u32;
                        state.fold(
                            tile[r * TILE_VECTORS + v] * scale,
                            counted + Vector::<u32, N>::new(class),
                            active,
                            targets[row],
                        );
                    }
                    states.set(row, &state);
                }
            }
        }
        for r in 0..width {
            if first + r < layout.rows {
                let state = states.get(r);
                let row = state.finish();
                let at = head * layout.rows + first + r;
                lse[at] = row.lse();
                predictions[at] = row.best;
                let mut loss = 0.0f32.runtime();
                if is_class(targets[r]) {
                    loss = row.loss(active, smoothing);
                }
                row_loss[at] = loss;
            }
        }
        block += CUBE_COUNT * CUBE_DIM as usize;
    }
}

#[cube(launch_unchecked)]
fn backward<F: Float, N: Size, M: Size>(
    rows: &[f32],
    panels: &[Vector<f32, N>],
    norms: &[f32],
    state: &[Vector<f32, N>],
    targets: &[Vector<u32, N>],
    scratch: &mut [f32],
    grad: &mut [Vector<F, M>],
    layout: Layout,
    stored: usize,
    scale: f32,
    smoothing: f32,
    #[comptime] owner: Operand,
    #[comptime] tile_rows: usize,
    #[define(F)] _dtype: ElemType,
) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let other = comptime!(owner.other());
    let blocks_per_head = stored.div_ceil(width);
    let at = Scratch::of_unit(layout.dim_padded, width);

    let mut block = ABSOLUTE_POS;
    while block < layout.heads * blocks_per_head {
        let head = block / blocks_per_head;
        let first = (block % blocks_per_head) * width;
        let packed_owner = layout.head_start(head, owner) + first;
        let packed_other = layout.head_start(head, other);
        if first < layout.count(owner) {
            clear_gradient(scratch, &at, layout.dim_padded, width);
            for panel in 0..layout.padded(other) / width {
                for group in 0..comptime!(width / tile_rows) {
                    let mut tile = Array::<Vector<f32, N>>::new(tile_rows * TILE_VECTORS);
                    cosines::<N>(
                        &mut tile,
                        rows,
                        packed_owner + group * tile_rows,
                        panels,
                        packed_other + panel * width,
                        layout.dim_padded,
                        tile_rows,
                    );
                    block_gradients::<N>(
                        &tile,
                        scratch,
                        at.block + group * tile_rows * width,
                        state,
                        targets,
                        head,
                        first + group * tile_rows,
                        panel * width,
                        &layout,
                        scale,
                        smoothing,
                        owner,
                        tile_rows,
                    );
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
        write_gradients::<F, M>(
            grad,
            &scratch[at.gradient..at.gradient + width * layout.dim_padded],
            rows,
            norms,
            head,
            first,
            stored,
            &layout,
            owner,
            width,
        );
        block += CUBE_COUNT * CUBE_DIM as usize;
    }
}

/// Turns a tile of cosines into `scale ·` logit gradients, and writes it to the scratch block `[width, width]`.
#[cube]
fn block_gradients<N: Size>(
    tile: &Array<Vector<f32, N>>,
    scratch: &mut [f32],
    block_at: usize,
    state: &[Vector<f32, N>],
    targets: &[Vector<u32, N>],
    head: usize,
    first_owner: usize,
    first_other: usize,
    layout: &Layout,
    scale: f32,
    smoothing: f32,
    #[comptime] owner: Operand,
    #[comptime] tile_rows: usize,
) {
    let lanes = N::value();
    let active = layout.active as u32;
    let lse_at = head * 2 * layout.rows_padded / lanes;
    let upstream_at = (head * 2 + 1) * layout.rows_padded / lanes;
    let counted = iota::<N>();
    let scale = Vector::<f32, N>::new(scale);
    let block = scratch.as_vectorized_mut().with_vector_size_mut::<N>();
    #[unroll]
    for v in 0..TILE_VECTORS {
        let offset = first_other + v * lanes;
        #[unroll]
        for r in 0..tile_rows {
            let logits = tile[r * TILE_VECTORS + v] * scale;
            let row = first_owner + r;
            let gradient = match comptime!(owner) {
                // The owner is a row: its lse, upstream gradient and target serve all lanes, which are classes.
                Operand::Embeddings => {
                    let rows_state = state.with_vector_size::<One>();
                    let rows_target = targets.with_vector_size::<One>();
                    let classes = counted + Vector::<u32, N>::new(offset as u32);
                    let target = rows_target[row].extract(0usize);
                    let gradient = logit_gradient::<N>(
                        logits,
                        Vector::<f32, N>::new(rows_state[lse_at * lanes + row].extract(0usize)),
                        Vector::<f32, N>::new(
                            rows_state[upstream_at * lanes + row].extract(0usize),
                        ),
                        classes.equal(&Vector::<u32, N>::new(target)),
                        active,
                        smoothing,
                    );
                    let real = classes.less_than(&Vector::<u32, N>::new(active));
                    select_many(real, gradient, Vector::<f32, N>::new(0.0))
                }
                // The owner is a class: the lanes are rows, each with its own; padded rows have upstream 0.
                Operand::Weights => logit_gradient::<N>(
                    logits,
                    state[lse_at + offset / lanes],
                    state[upstream_at + offset / lanes],
                    targets[offset / lanes].equal(&Vector::<u32, N>::new(row as u32)),
                    active,
                    smoothing,
                ),
            };
            block[block_at / lanes + r * TILE_VECTORS + v] = gradient * scale;
        }
    }
}
