//! Tiles of logits folded into parts of a softmax, and the parts merged.
//!
//! Peaks and exponents are taken of cosines, which are scaled once their difference is known: a class that is the peak has the
//! exponential 1, however a compiler contracts.

use cubecl::prelude::*;

use super::super::launch::{Call, RowResults};
use super::super::margin::{MarginRule, predicted};
use super::softmaxes::{Parts, Softmaxes};
use crate::blueprint::{PLANE_UNITS, cubes_for};
use crate::error::Error;
use crate::loss::target::{IGNORED, LabelRule, is_class, label_rule, target_of};
use crate::math::group::{Group, group_softmax, member};
use crate::math::online_softmax::{FLOOR, RowSoftmax};
use crate::math::parts::{parts_that_fill, slots};
use crate::operand::{F32, allocatable, whole};
use crate::tiles::{
    Chunk, ChunkShape, Chunks, Engine, GradientChunk, Lies, LogitTile, Tile, column_of, place,
    replace_in, result_in, result_of, row_of, store_tile,
};

/// The operands of a forward pass: embeddings have the sign of the scale.
pub(in crate::cosine_cross_entropy) fn forward_chunks<'a>(
    call: &'a Call,
    tile: Tile,
) -> Chunks<'a> {
    // The largest logit is that of the largest cosine, or of the smallest. With a scale of 0 every class is alike, and the first is
    // predicted; but one that is not there is none.
    let sign = match call.options.scale {
        0.0 => 0.0,
        scale => scale.signum(),
    };
    Chunks::new(call.client, &call.blueprint, tile, &call.problem, sign)
}

/// Row losses, lse and predictions into `results`, and cosines into `kept`.
///
/// # Errors
/// [`Error::TooLarge`] if a buffer of the device does not hold the softmaxes of all parts, before any is computed.
pub(in crate::cosine_cross_entropy) fn launch_forward(
    call: &Call,
    chunks: &Chunks,
    kept: Option<&GradientChunk>,
    results: &RowResults,
) -> Result<(), Error> {
    let client = call.client;
    let tile = chunks.tile;
    let sizes = &call.problem.sizes;
    let scale = call.options.scale.abs().max(1e-30);
    let row_tiles = sizes.heads * sizes.rows_padded / tile.side;
    let rest = chunks.forward(kept);
    let count = rest.len() + usize::from(kept.is_some());
    let tiles_of_chunk = sizes.active_padded / tile.side / count;
    // What a part leaves behind, three floats a row, is little beside a tile.
    let slots = slots(client, tile.shared_bytes());
    let parts_of_chunk = parts_that_fill(slots, row_tiles, tiles_of_chunk, 0, tiles_of_chunk);
    let parts = parts_of_chunk * count;
    let elements = sizes.heads * sizes.rows * parts;
    allocatable(
        client,
        "softmaxes of parts of rows",
        2 * elements as u128,
        F32,
    )?;
    let float = size_of::<f32>();
    let softmax = client.empty(elements * 2 * float);
    let smooth = call.options.loss.label_smoothing != 0.0;
    let summed = if smooth { elements } else { 1 };
    let totals = client.empty(summed * float);
    let best = client.empty(elements * size_of::<u32>());
    let margin = call.options.margin;
    let has_margin = !margin.is_none();
    let of_target = client.empty(sizes.heads * sizes.rows * 2 * float);
    let parts_args = || {
        // SAFETY: both launches see what was allocated above.
        unsafe {
            [
                BufferArg::from_raw_parts(softmax.clone(), elements),
                BufferArg::from_raw_parts(totals.clone(), summed),
                BufferArg::from_raw_parts(best.clone(), elements),
                BufferArg::from_raw_parts(of_target.clone(), sizes.heads * sizes.rows),
            ]
        }
    };
    let rule = || {
        label_rule(
            call.labels.dtype(),
            sizes.active,
            call.options.loss.ignore_index,
        )
    };
    let one_vector = client.empty(tile.vector * tile.packed.size());
    let launch = |at: usize, chunk: &Chunk, cosines: Option<&GradientChunk>| {
        let [softmax, totals, best, of_target] = parts_args();
        // SAFETY: the operands are packed in whole tiles; of all `parts` parts these are some. What is kept is of this chunk.
        unsafe {
            let cosines_arg = match cosines {
                Some(place) => chunks.values_arg(place),
                None => BufferArg::from_raw_parts(one_vector.clone(), 1),
            };
            forward::launch_unchecked(
                client,
                cubes_for(client, row_tiles * parts_of_chunk),
                CubeDim::new_1d(tile.units() as u32),
                tile.vector,
                chunks.embeddings_arg(),
                chunks.weights_arg(chunk),
                call.labels.buffer_arg(),
                cosines_arg,
                softmax,
                totals,
                best,
                of_target,
                chunks.shape_arg(chunk),
                at * parts_of_chunk,
                parts_of_chunk,
                parts,
                rule(),
                scale,
                margin.launch_arg(tile.packed),
                tile,
                smooth,
                has_margin,
                cosines.is_some(),
                tile.packed,
                call.labels.dtype(),
            );
        }
    };
    if let Some(kept) = kept {
        launch(0, &kept.chunk, Some(kept));
    }
    for (after, chunk) in rest.enumerate() {
        launch(usize::from(kept.is_some()) + after, &chunk, None);
    }
    let group = Group {
        size: parts.next_power_of_two().min(32),
        exchange: call.blueprint.plane,
    };
    let [softmax, totals, best, of_target] = parts_args();
    // SAFETY: every part was written for every row; the results are [heads, rows].
    unsafe {
        merge::launch_unchecked(
            client,
            group.cubes(client, sizes.heads * sizes.rows),
            CubeDim::new_1d(PLANE_UNITS as u32),
            softmax,
            totals,
            best,
            of_target,
            call.labels.buffer_arg(),
            whole(&results.loss, 1),
            whole(&results.lse, 1),
            whole(&results.predictions, 1),
            sizes.heads,
            sizes.rows,
            sizes.active as u32,
            parts,
            rule(),
            call.options.loss.label_smoothing,
            smooth,
            has_margin,
            group,
            call.labels.dtype(),
        );
    }
    Ok(())
}

#[cube(launch_unchecked)]
fn forward<E: Float, I: Int, N: Size>(
    embeddings: &[Vector<E, N>],             // [heads, rows_padded, dim]
    weights: &[Vector<E, N>],                // [heads, classes, dim]
    labels: &[I],                            // [rows]
    kept: &mut [Vector<E, N>],               // [heads, rows_padded, classes], if `keeps`
    softmax: &mut [Vector<f32, Const<2>>],   // [heads, rows, parts]: peak, sum
    all_logits: &mut [f32],                  // [heads, rows, parts]: their sum, if smooth
    best: &mut [u32],                        // [heads, rows, parts]
    of_target: &mut [Vector<f32, Const<2>>], // [heads, rows], of those that have a target: its logit, and without a margin
    shape: ChunkShape,
    first_part: usize, // of this chunk
    splits: usize,     // of this chunk
    parts: usize,      // of all
    rule: LabelRule,
    scale: f32, // of embeddings that have its sign
    margin: MarginRule,
    #[comptime] tile: Tile,
    #[comptime] smooth: bool,
    #[comptime] has_margin: bool,
    #[comptime] keeps: bool,
    #[define(E)] _dtype: ElemType,
    #[define(I)] _label: ElemType,
) {
    let side = comptime!(tile.side);
    let row_tiles = shape.rows_padded / side;
    // Cubes that run together take other rows and the same classes, which they then share in the cache.
    let split = CUBE_POS / (shape.heads * row_tiles);
    if split >= splits {
        terminate!();
    }
    let head = CUBE_POS / row_tiles % shape.heads;
    let first_row = CUBE_POS % row_tiles * side;
    let class_tiles = shape.classes / side;
    let at = place(tile);
    let stage = comptime!(tile.stages() * tile.stage(Lies::Rows));
    let mut left_stages = Shared::<[E]>::new_aligned_slice(stage, 16usize);
    let mut right_stages = Shared::<[E]>::new_aligned_slice(stage, 16usize);
    let mut results = Array::<f32>::new(comptime!(tile.results()));
    let mut targets = Shared::<[u32]>::new_slice(side);
    let mut softmaxes = Softmaxes::new(tile, smooth);
    let unit = UNIT_POS as usize;
    if unit < side {
        targets[unit] = IGNORED.runtime();
        if first_row + unit < shape.rows {
            targets[unit] = target_of::<I>(labels[first_row + unit], &rule);
        }
    }

    for class_tile in class_tiles * split / splits..class_tiles * (split + 1) / splits {
        let of = LogitTile {
            head,
            first_row,
            in_chunk: class_tile * side,
        };
        shape.cosines::<E, N>(
            &mut results,
            embeddings,
            weights,
            &of,
            &mut left_stages,
            &mut right_stages,
            tile,
        );
        if comptime!(keeps) {
            // Results of multiply-adds don't go through the stage, which the next tile takes at once.
            comptime!(assert!(tile.engine == Engine::Fma));
            let to = (head * shape.rows_padded + first_row) * shape.classes + of.in_chunk;
            store_tile::<E, N>(&results, kept, to, shape.classes, &mut left_stages, tile);
        }
        if comptime!(smooth) {
            softmaxes.add_totals(&results, tile);
        }
        let first_class = shape.first + of.in_chunk;
        if first_class + side > shape.active {
            #[unroll]
            for c in 0..comptime!(tile.columns()) {
                if first_class + column_of(&at, c, tile) >= shape.active {
                    #[unroll]
                    for r in 0..comptime!(tile.rows()) {
                        results[comptime!(result_of(r, c, tile))] = FLOOR;
                    }
                }
            }
        }
        #[unroll]
        for r in 0..comptime!(tile.rows()) {
            // Few tiles have a row's target, so it is looked for apart.
            let row = row_of(&at, r, tile);
            let target = targets[row] - first_class as u32;
            if target < comptime!(tile.side as u32) {
                let own = result_in(&results, &at, r, target, tile);
                if own.is_here {
                    let mut counts_as = own.value;
                    if comptime!(has_margin) {
                        counts_as = margin.of(own.value).value;
                        replace_in(&mut results, &at, r, target, counts_as, tile);
                    }
                    let mut pair = Vector::<f32, Const<2>>::empty();
                    pair.insert(0usize, counts_as * scale);
                    pair.insert(1usize, own.value * scale);
                    of_target[head * shape.rows + first_row + row] = pair;
                }
            }
            softmaxes.fold(r, &results, &at, first_class, scale, tile);
        }
    }
    softmaxes.take_all(tile, smooth);

    let mut shared = Parts::new(tile, smooth);
    #[unroll]
    for r in 0..comptime!(tile.rows()) {
        shared.put(&softmaxes, r, &at, tile, smooth);
        sync_cube();
        let row = first_row + row_of(&at, r, tile);
        if at.member == 0 && row < shape.rows {
            let merged = shared.row(&at, scale, tile, smooth);
            let to = (head * shape.rows + row) * parts + first_part + split;
            let mut pair = Vector::<f32, Const<2>>::empty();
            pair.insert(0usize, max(merged.peak * scale, FLOOR));
            pair.insert(1usize, merged.sum);
            softmax[to] = pair;
            best[to] = merged.best;
            if comptime!(smooth) {
                all_logits[to] = merged.total * scale;
            }
        }
        sync_cube();
    }
}

/// A group merges a row's parts.
#[cube(launch_unchecked)]
fn merge<I: Int>(
    softmax: &[Vector<f32, Const<2>>], // [heads, rows, parts]: peak, sum
    all_logits: &[f32],                // [heads, rows, parts]: their sum, if smooth
    best: &[u32],                      // [heads, rows, parts]
    of_target: &[Vector<f32, Const<2>>], // [heads, rows], of those that have a target: its logit, and without a margin
    labels: &[I],                        // [rows]
    row_loss: &mut [f32],                // [heads, rows]
    lse: &mut [f32],                     // [2, heads, rows]
    predictions: &mut [u32],             // [heads, rows]
    heads: usize,
    rows: usize,
    active: u32,
    parts: usize,
    rule: LabelRule,
    smoothing: f32,
    #[comptime] smooth: bool,
    #[comptime] has_margin: bool,
    #[comptime] group: Group,
    #[define(I)] _label: ElemType,
) {
    let of = member(group);
    let out = of.group;
    let is_there = out < heads * rows;
    let mut part = of.lane;
    let mut to = 0usize.runtime();
    if is_there {
        to = parts;
    }
    let mut state = RowSoftmax::new();
    while part < to {
        let pair = softmax[out * parts + part];
        let peak = pair.extract(0usize);
        // Parts are in the order of their classes: of equal peaks the first class stays.
        if peak > state.peak {
            state.sum *= (state.peak - peak).exp();
            state.peak = peak;
            state.best = best[out * parts + part];
        }
        state.sum += pair.extract(1usize) * (peak - state.peak).exp();
        if comptime!(smooth) {
            state.total += all_logits[out * parts + part];
        }
        part += group.size;
    }
    let mut merged = group_softmax(state, group);
    if is_there && of.lane == 0 {
        lse[out] = merged.lse();
        lse[heads * rows + out] = merged.lse_low();
        let mut loss = 0.0f32.runtime();
        let target = target_of::<I>(labels[out % rows], &rule);
        if is_class(target) {
            merged.target = of_target[out].extract(0usize);
            if comptime!(has_margin) {
                let plain = of_target[out].extract(1usize);
                merged.best = predicted(merged.best, merged.peak, target, plain);
                // In this order a single class is its own mean.
                merged.total = merged.total - plain + merged.target;
            }
            loss = merged.loss(active, smoothing);
        }
        row_loss[out] = loss;
        predictions[out] = merged.best;
    }
}
