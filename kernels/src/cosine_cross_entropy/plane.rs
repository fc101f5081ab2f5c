//! A cube owns a square tile's rows (forward, dX) or classes (dW) and walks the other operand's tiles.

use cubecl::prelude::*;
use cubecl::std::tensor::TensorHandle;

use super::launch::{Call, RowResults};
use crate::blueprint::{PLANE_SIDE, PLANE_UNITS, cubes_for};
use crate::loss::rows::Rows;
use crate::loss::target::{LabelRule, is_class, label_rule, target_of};
use crate::math::lanes::One;
use crate::math::merge::merge_softmax;
use crate::math::online_softmax::{OnlineSoftmax, SoftmaxRows, logit_gradient};
use crate::operand::whole;
use crate::packing::plane::{
    add_product, block_pitch, cosines, finish, owned, parts, pitch, place,
};
use crate::packing::{Layout, Operand, Packed};

pub(super) fn launch_forward(call: &Call, packed: &Packed, results: &RowResults) {
    let sizes = &packed.sizes;
    let loss = &call.options.loss;
    // SAFETY: `Packed` holds whole tiles, the outputs are [heads, rows], labels have `rows` elements.
    unsafe {
        forward::launch_unchecked(
            call.client,
            cubes_for(
                call.client,
                sizes.heads * sizes.rows_padded / call.blueprint.tile(),
            ),
            CubeDim::new_1d(PLANE_UNITS as u32),
            packed.rows_arg(1),
            call.labels.buffer_arg(),
            whole(&results.loss, 1),
            whole(&results.lse, 1),
            whole(&results.predictions, 1),
            sizes.launch_arg(),
            label_rule(call.labels.dtype(), sizes.active, loss.ignore_index),
            call.options.scale,
            loss.label_smoothing,
            call.blueprint.micro,
            call.labels.dtype(),
        );
    }
}

/// The gradient of one operand.
pub(super) fn launch_backward(
    call: &Call,
    packed: &Packed,
    rows: &Rows,
    grad: &TensorHandle,
    owner: Operand,
) {
    let sizes = &packed.sizes;
    let (parts, cubes) = parts(call.client, &call.blueprint, sizes, owner);
    let elements = parts * sizes.gradient_len(owner);
    let gradient = call.client.empty(elements * size_of::<f32>());
    // SAFETY: `Packed`, `Rows` and the gradient hold whole tiles.
    unsafe {
        backward::launch_unchecked(
            call.client,
            cubes,
            CubeDim::new_1d(PLANE_UNITS as u32),
            packed.rows_arg(1),
            rows.state_arg(1),
            rows.targets_arg(1),
            BufferArg::from_raw_parts(gradient.clone(), elements),
            sizes.launch_arg(),
            parts,
            call.options.scale,
            call.options.loss.label_smoothing,
            owner,
            call.blueprint.micro,
        );
    }
    finish(
        call.client,
        &call.blueprint,
        packed,
        &gradient,
        parts,
        grad,
        owner,
    );
}

#[cube(launch_unchecked)]
fn forward<I: Int>(
    rows: &[f32],
    labels: &[I],
    row_loss: &mut [f32],
    lse: &mut [f32],
    predictions: &mut [u32],
    layout: Layout,
    rule: LabelRule,
    scale: f32,
    smoothing: f32,
    #[comptime] micro: usize,
    #[define(I)] _label: ElemType,
) {
    let tile = comptime!(micro * PLANE_SIDE);
    let pitch = comptime!(pitch(micro));
    let tiles_per_head = layout.rows_padded / tile;
    if CUBE_POS >= layout.heads * tiles_per_head {
        terminate!();
    }
    let head = CUBE_POS / tiles_per_head;
    let first = (CUBE_POS % tiles_per_head) * tile;
    let packed_row = layout.head_start(head, Operand::Embeddings) + first;
    let packed_class = layout.head_start(head, Operand::Weights);
    let active = layout.active as u32;
    let at = place();

    let mut left = Shared::<[f32]>::new_slice(comptime!(pitch * PLANE_SIDE));
    let mut right = Shared::<[f32]>::new_slice(comptime!(pitch * PLANE_SIDE));
    let mut classes = Shared::<[u32]>::new_slice(comptime!(tile * PLANE_SIDE));
    let mut acc = Array::<f32>::new(comptime!(micro * micro));
    let mut states = SoftmaxRows::<One>::new(micro);
    let mut targets = Array::<u32>::new(micro);
    #[unroll]
    for i in 0..micro {
        let state = OnlineSoftmax::<One>::new();
        states.set(i, &state);
        let row = first + at.y + i * PLANE_SIDE;
        targets[i] = u32::MAX;
        if row < layout.rows {
            targets[i] = target_of::<I>(labels[row], &rule);
        }
    }
    for class_tile in 0..layout.active_padded / tile {
        cosines(
            &mut acc,
            rows,
            packed_row,
            packed_class + class_tile * tile,
            layout.dim_padded,
            &mut left,
            &mut right,
            micro,
        );
        #[unroll]
        for i in 0..micro {
            let mut state = states.get(i);
            #[unroll]
            for j in 0..micro {
                let class = (class_tile * tile + at.x + j * PLANE_SIDE) as u32;
                state.fold(
                    Vector::<f32, One>::new(acc[i * micro + j] * scale),
                    Vector::<u32, One>::new(class),
                    active,
                    targets[i],
                );
            }
            states.set(i, &state);
        }
    }
    #[unroll]
    for i in 0..micro {
        let state = states.get(i);
        let merged = merge_softmax(
            state.finish(),
            at.y,
            at.x,
            &mut left,
            &mut classes,
            PLANE_SIDE,
        );
        let row = first + at.y + i * PLANE_SIDE;
        if at.x == 0 && row < layout.rows {
            let out = head * layout.rows + row;
            lse[out] = merged.lse();
            predictions[out] = merged.best;
            let mut loss = 0.0f32.runtime();
            if is_class(targets[i]) {
                loss = merged.loss(active, smoothing);
            }
            row_loss[out] = loss;
        }
    }
}

#[cube(launch_unchecked)]
fn backward(
    rows: &[f32],
    state: &[f32],
    targets: &[u32],
    gradient: &mut [f32], // [parts, heads, padded, dim_padded]
    layout: Layout,
    parts: usize,
    scale: f32,
    smoothing: f32,
    #[comptime] owner: Operand,
    #[comptime] micro: usize,
) {
    let tile = comptime!(micro * PLANE_SIDE);
    let pitch = comptime!(pitch(micro));
    let other = comptime!(owner.other());
    let owned = owned(&layout, parts, owner, tile);
    if !owned.is_there {
        terminate!();
    }
    let (head, first) = (owned.head, owned.first);
    let packed_owner = layout.head_start(head, owner) + first;
    let packed_other = layout.head_start(head, other);
    let lse_at = head * 2 * layout.rows_padded;
    let upstream_at = lse_at + layout.rows_padded;
    let active = layout.active as u32;
    let at = place();

    let mut left = Shared::<[f32]>::new_slice(comptime!(pitch * PLANE_SIDE));
    let mut right = Shared::<[f32]>::new_slice(comptime!(pitch * PLANE_SIDE));
    let mut block = Shared::<[f32]>::new_slice(comptime!(tile * block_pitch(micro)));
    let mut acc = Array::<f32>::new(comptime!(micro * micro));
    for other_tile in owned.from..owned.to {
        cosines(
            &mut acc,
            rows,
            packed_owner,
            packed_other + other_tile * tile,
            layout.dim_padded,
            &mut left,
            &mut right,
            micro,
        );
        #[unroll]
        for i in 0..micro {
            #[unroll]
            for j in 0..micro {
                let in_owner = at.y + i * PLANE_SIDE;
                let in_other = at.x + j * PLANE_SIDE;
                let (row, class) = match comptime!(owner) {
                    Operand::Embeddings => (first + in_owner, other_tile * tile + in_other),
                    Operand::Weights => (other_tile * tile + in_other, first + in_owner),
                };
                let class = class as u32;
                let mut value = 0.0f32.runtime();
                if class < active {
                    let gradient = logit_gradient::<One>(
                        Vector::<f32, One>::new(acc[i * micro + j] * scale),
                        Vector::<f32, One>::new(state[lse_at + row]),
                        Vector::<f32, One>::new(state[upstream_at + row]),
                        Vector::<u32, One>::new(targets[row])
                            .equal(&Vector::<u32, One>::new(class)),
                        active,
                        smoothing,
                    );
                    value = gradient.extract(0usize) * scale;
                }
                block[in_owner * comptime!(block_pitch(micro)) + in_other] = value;
            }
        }
        sync_cube();
        add_product(
            gradient,
            owned.out,
            &block,
            rows,
            packed_other + other_tile * tile,
            layout.dim_padded,
            other_tile == owned.from,
            &mut right,
            micro,
        );
    }
}
