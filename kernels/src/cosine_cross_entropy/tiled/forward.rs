//! Tiles of logits folded into parts of a softmax, and the parts merged.
//!
//! Peaks and exponents are taken of cosines, which are scaled once their difference is known: a class that is the peak has the
//! exponential 1, however a compiler contracts.

use cubecl::prelude::*;

use super::super::launch::{Call, RowResults};
use crate::blueprint::{PLANE_UNITS, cubes_for};
use crate::loss::target::{IGNORED, LabelRule, is_class, label_rule, target_of};
use crate::math::group::{Group, group_softmax, member};
use crate::math::online_softmax::{FLOOR, RowSoftmax};
use crate::operand::whole;
use crate::tiles::{
    ChunkShape, Chunks, Lies, LogitTile, Tile, column_of, place, result_of, row_of,
};

/// Row losses, lse and predictions into `results`.
pub(in crate::cosine_cross_entropy) fn launch_forward(
    call: &Call,
    tile: Tile,
    results: &RowResults,
) {
    let client = call.client;
    let sizes = &call.problem.sizes;
    // The largest logit is that of the largest cosine, or of the smallest. With a scale of 0 every class is alike, and the first is
    // predicted; but one that is not there is none.
    let sign = match call.options.scale {
        0.0 => 0.0,
        scale => scale.signum(),
    };
    let scale = call.options.scale.abs().max(1e-30);
    let chunks = Chunks::new(client, &call.blueprint, tile, &call.problem, sign);
    let row_tiles = sizes.heads * sizes.rows_padded / tile.side;
    // Enough cubes that every multiprocessor has two, and few enough that merging is little of their work.
    let processors = client.properties().hardware.num_streaming_multiprocessors;
    let wanted = 2 * processors.unwrap_or(1) as usize;
    let each = chunks.forward();
    let count = each.len();
    let splits_of = |padded: usize| (wanted / row_tiles).clamp(1, padded / tile.side);
    let parts_of_chunk = splits_of(sizes.active_padded.div_ceil(count));
    let parts = parts_of_chunk * count;
    let elements = sizes.heads * sizes.rows * parts;
    let float = size_of::<f32>();
    let softmax = client.empty(elements * 2 * float);
    let smooth = call.options.loss.label_smoothing != 0.0;
    let summed = if smooth { elements } else { 1 };
    let totals = client.empty(summed * float);
    let best = client.empty(elements * size_of::<u32>());
    let of_target = client.empty(sizes.heads * sizes.rows * float);
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
    for (at, chunk) in each.enumerate() {
        let [softmax, totals, best, of_target] = parts_args();
        // SAFETY: the operands are packed in whole tiles; of all `parts` parts these are some.
        unsafe {
            forward::launch_unchecked(
                client,
                cubes_for(client, row_tiles * parts_of_chunk),
                CubeDim::new_1d(tile.units() as u32),
                tile.vector,
                chunks.embeddings_arg(),
                chunks.weights_arg(&chunk),
                call.labels.buffer_arg(),
                softmax,
                totals,
                best,
                of_target,
                chunks.shape_arg(&chunk),
                at * parts_of_chunk,
                parts_of_chunk,
                parts,
                rule(),
                scale,
                tile,
                smooth,
                tile.packed,
                call.labels.dtype(),
            );
        }
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
            group,
            call.labels.dtype(),
        );
    }
}

#[cube(launch_unchecked)]
fn forward<E: Float, I: Int, N: Size>(
    embeddings: &[Vector<E, N>],           // [heads, rows_padded, dim]
    weights: &[Vector<E, N>],              // [heads, classes, dim]
    labels: &[I],                          // [rows]
    softmax: &mut [Vector<f32, Const<2>>], // [heads, rows, parts]: peak, sum
    all_logits: &mut [f32],                // [heads, rows, parts]: their sum, if smooth
    best: &mut [u32],                      // [heads, rows, parts]
    of_target: &mut [f32],                 // [heads, rows]: the logit, of those that have a target
    shape: ChunkShape,
    first_part: usize, // of this chunk
    splits: usize,     // of this chunk
    parts: usize,      // of all
    rule: LabelRule,
    scale: f32, // of embeddings that have its sign
    #[comptime] tile: Tile,
    #[comptime] smooth: bool,
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
    let owned = comptime!(2 * tile.tall()); // rows of which this unit holds results
    let columns = comptime!(2 * tile.wide()); // of each
    let stage = comptime!(2 * tile.stage(Lies::Rows));
    let mut left_stages = Shared::<[E]>::new_aligned_slice(stage, 16usize);
    let mut right_stages = Shared::<[E]>::new_aligned_slice(stage, 16usize);
    let mut results = Array::<f32>::new(comptime!(tile.results()));
    let unit = UNIT_POS as usize;
    let mut targets = Shared::<[u32]>::new_slice(side);
    let mut peaks = Array::<f32>::new(owned);
    let mut sums = Array::<f32>::new(owned);
    let mut bests = Array::<u32>::new(owned);
    let mut totals = Array::<f32>::new(owned);
    #[unroll]
    for r in 0..owned {
        peaks[r] = FLOOR;
        sums[r] = 0.0;
        bests[r] = 0u32.runtime();
        totals[r] = 0.0;
    }
    let room = comptime!((tile.stowed() * tile.units()).max(1));
    let mut stowed_peaks = Shared::<[f32]>::new_slice(room);
    let mut stowed_sums = Shared::<[f32]>::new_slice(room);
    let mut stowed_bests = Shared::<[u32]>::new_slice(room);
    let mut stowed_totals = Shared::<[f32]>::new_slice(comptime!(if smooth { room } else { 1 }));
    #[unroll]
    for r in 0..comptime!(tile.stowed()) {
        let slot = comptime!(r * tile.units()) + unit;
        stowed_peaks[slot] = peaks[r];
        stowed_sums[slot] = sums[r];
        stowed_bests[slot] = bests[r];
        if comptime!(smooth) {
            stowed_totals[slot] = totals[r];
        }
    }
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
        let first_class = shape.first + of.in_chunk;
        if comptime!(smooth) {
            // A class that is not there has a cosine of 0 still.
            #[unroll]
            for r in 0..owned {
                let mut total = results[comptime!(result_of(r, 0, tile))];
                #[unroll]
                for c in 1..columns {
                    total += results[comptime!(result_of(r, c, tile))];
                }
                if comptime!(tile.stowed() > 0) {
                    stowed_totals[comptime!(r * tile.units()) + unit] += total;
                } else {
                    totals[r] += total;
                }
            }
        }
        if first_class + side > shape.active {
            #[unroll]
            for c in 0..columns {
                if first_class + column_of(&at, c, tile) >= shape.active {
                    #[unroll]
                    for r in 0..owned {
                        results[comptime!(result_of(r, c, tile))] = FLOOR;
                    }
                }
            }
        }
        #[unroll]
        for r in 0..owned {
            let slot = comptime!(r * tile.units()) + unit;
            if comptime!(tile.stowed() > 0) {
                peaks[r] = stowed_peaks[slot];
                sums[r] = stowed_sums[slot];
                bests[r] = stowed_bests[slot];
            }
            // Few tiles have a row's target, and few its best class so far: what is seldom is looked for apart.
            let row = row_of(&at, r, tile);
            let target = targets[row] - first_class as u32;
            if target < comptime!(tile.side as u32) {
                #[unroll]
                for c in 0..columns {
                    if column_of(&at, c, tile) as u32 == target {
                        of_target[head * shape.rows + first_row + row] =
                            results[comptime!(result_of(r, c, tile))] * scale;
                    }
                }
            }
            let mut top = results[comptime!(result_of(r, 0, tile))];
            #[unroll]
            for c in 1..columns {
                top = max(top, results[comptime!(result_of(r, c, tile))]);
            }
            if top > peaks[r] {
                sums[r] *= ((peaks[r] - top) * scale).exp();
                peaks[r] = top;
                let mut best_column = 0u32.runtime();
                #[unroll]
                for back in 1..=columns {
                    // The first of equal classes is found last.
                    let c = comptime!(columns - back);
                    let is_top = results[comptime!(result_of(r, c, tile))] == top;
                    best_column = select(is_top, column_of(&at, c, tile) as u32, best_column);
                }
                bests[r] = first_class as u32 + best_column;
            }
            let mut sum = sums[r];
            #[unroll]
            for c in 0..columns {
                sum += ((results[comptime!(result_of(r, c, tile))] - peaks[r]) * scale).exp();
            }
            sums[r] = sum;
            if comptime!(tile.stowed() > 0) {
                stowed_peaks[slot] = peaks[r];
                stowed_sums[slot] = sums[r];
                stowed_bests[slot] = bests[r];
            }
        }
    }
    #[unroll]
    for r in 0..comptime!(tile.stowed()) {
        let slot = comptime!(r * tile.units()) + unit;
        peaks[r] = stowed_peaks[slot];
        sums[r] = stowed_sums[slot];
        bests[r] = stowed_bests[slot];
        if comptime!(smooth) {
            totals[r] = stowed_totals[slot];
        }
    }

    // The units of a row: four of each plane across.
    let sharing = comptime!(4 * tile.across);
    let mut shared_peaks = Shared::<[f32]>::new_slice(comptime!(tile.units()));
    let mut shared_sums = Shared::<[f32]>::new_slice(comptime!(tile.units()));
    let mut shared_bests = Shared::<[u32]>::new_slice(comptime!(tile.units()));
    let mut shared_totals =
        Shared::<[f32]>::new_slice(comptime!(if smooth { tile.units() } else { 1 }));
    let first = at.group * sharing;
    let slot = first + at.member;
    #[unroll]
    for r in 0..owned {
        shared_peaks[slot] = peaks[r];
        shared_sums[slot] = sums[r];
        shared_bests[slot] = bests[r];
        if comptime!(smooth) {
            shared_totals[slot] = totals[r];
        }
        sync_cube();
        let row = first_row + row_of(&at, r, tile);
        if at.member == 0 && row < shape.rows {
            let mut peak = shared_peaks[first];
            let mut best_class = shared_bests[first];
            for other in first + 1..first + sharing {
                let other_peak = shared_peaks[other];
                let other_best = shared_bests[other];
                if other_peak > peak || (other_peak == peak && other_best < best_class) {
                    peak = other_peak;
                    best_class = other_best;
                }
            }
            let mut sum = 0.0f32.runtime();
            let mut total = 0.0f32.runtime();
            for other in first..first + sharing {
                sum += shared_sums[other] * ((shared_peaks[other] - peak) * scale).exp();
                if comptime!(smooth) {
                    total += shared_totals[other];
                }
            }
            let to = (head * shape.rows + row) * parts + first_part + split;
            let mut pair = Vector::<f32, Const<2>>::empty();
            pair.insert(0usize, max(peak * scale, FLOOR));
            pair.insert(1usize, sum);
            softmax[to] = pair;
            best[to] = best_class;
            if comptime!(smooth) {
                all_logits[to] = total * scale;
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
    of_target: &[f32],                 // [heads, rows]: the logit, of those that have a target
    labels: &[I],                      // [rows]
    row_loss: &mut [f32],              // [heads, rows]
    lse: &mut [f32],                   // [heads, rows]
    predictions: &mut [u32],           // [heads, rows]
    heads: usize,
    rows: usize,
    active: u32,
    parts: usize,
    rule: LabelRule,
    smoothing: f32,
    #[comptime] smooth: bool,
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
        predictions[out] = merged.best;
        let mut loss = 0.0f32.runtime();
        if is_class(target_of::<I>(labels[out % rows], &rule)) {
            merged.target = of_target[out];
            loss = merged.loss(active, smoothing);
        }
        row_loss[out] = loss;
    }
}
