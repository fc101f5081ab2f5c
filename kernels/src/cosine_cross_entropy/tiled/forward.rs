//! Tiles of logits folded into parts of a softmax, and the parts merged.

use cubecl::prelude::*;

use super::super::launch::{Call, RowResults};
use crate::blueprint::{PLANE_UNITS, cubes_for};
use crate::loss::target::{LabelRule, is_class, label_rule, target_of};
use crate::math::group::{Group, group_softmax, member};
use crate::math::merge::merge_softmax;
use crate::math::online_softmax::{FLOOR, RowSoftmax};
use crate::operand::whole;
use crate::tiles::{
    ChunkShape, Chunks, Lies, LogitTile, PLANES_ACROSS, Tile, UNITS, column_of, place, result_of,
    row_of,
};

/// Numbers kept of each row in each part, beside the best class: peak, sum, target logit, sum of logits.
const KEPT: usize = 4;

/// Row losses, lse and predictions into `results`.
pub(in crate::cosine_cross_entropy) fn launch_forward(
    call: &Call,
    tile: Tile,
    results: &RowResults,
) {
    let client = call.client;
    let sizes = &call.problem.sizes;
    let chunks = Chunks::new(client, &call.blueprint, tile, &call.problem);
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
    let kept = client.empty(elements * KEPT * size_of::<f32>());
    let best = client.empty(elements * size_of::<u32>());
    let rule = || {
        label_rule(
            call.labels.dtype(),
            sizes.active,
            call.options.loss.ignore_index,
        )
    };
    for (at, chunk) in each.enumerate() {
        // SAFETY: the operands are packed in whole tiles; `kept` and `best` have `parts` parts, of which these are some.
        unsafe {
            forward::launch_unchecked(
                client,
                cubes_for(client, row_tiles * parts_of_chunk),
                CubeDim::new_1d(UNITS as u32),
                tile.vector,
                chunks.embeddings_arg(),
                chunks.weights_arg(&chunk),
                call.labels.buffer_arg(),
                BufferArg::from_raw_parts(kept.clone(), elements),
                BufferArg::from_raw_parts(best.clone(), elements),
                chunks.shape_arg(&chunk),
                at * parts_of_chunk,
                parts_of_chunk,
                parts,
                rule(),
                call.options.scale,
                tile,
                call.options.loss.label_smoothing != 0.0,
                tile.packed,
                call.labels.dtype(),
            );
        }
    }
    let group = Group {
        size: parts.next_power_of_two().min(32),
        exchange: call.blueprint.plane,
    };
    // SAFETY: every part was written for every row; the results are [heads, rows].
    unsafe {
        merge::launch_unchecked(
            client,
            group.cubes(client, sizes.heads * sizes.rows),
            CubeDim::new_1d(PLANE_UNITS as u32),
            BufferArg::from_raw_parts(kept, elements),
            BufferArg::from_raw_parts(best, elements),
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
    kept: &mut [Vector<f32, Const<KEPT>>], // [heads, rows, parts]
    best: &mut [u32],                      // [heads, rows, parts]
    shape: ChunkShape,
    first_part: usize, // of this chunk
    splits: usize,     // of this chunk
    parts: usize,      // of all
    rule: LabelRule,
    scale: f32,
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
    let at = place();
    let owned = comptime!(2 * tile.tall()); // rows of which this unit holds results
    let columns = comptime!(2 * tile.wide()); // of each

    let stage = comptime!(2 * tile.stage(Lies::Rows));
    let mut left_stages = Shared::<[E]>::new_aligned_slice(stage, 16usize);
    let mut right_stages = Shared::<[E]>::new_aligned_slice(stage, 16usize);
    let mut results = Array::<f32>::new(comptime!(tile.results()));
    let mut peaks = Array::<f32>::new(owned);
    let mut sums = Array::<f32>::new(owned);
    let mut bests = Array::<u32>::new(owned);
    let mut target_logits = Array::<f32>::new(owned);
    let mut totals = Array::<f32>::new(owned);
    let mut targets = Array::<u32>::new(owned);
    #[unroll]
    for r in 0..owned {
        peaks[r] = FLOOR;
        sums[r] = 0.0;
        bests[r] = 0u32.runtime();
        target_logits[r] = 0.0;
        totals[r] = 0.0;
        let row = first_row + row_of(&at, comptime!(r / 2), comptime!(r % 2), tile);
        targets[r] = u32::MAX.runtime();
        if row < shape.rows {
            targets[r] = target_of::<I>(labels[row], &rule);
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
        #[unroll]
        for i in 0..comptime!(tile.results()) {
            results[i] *= scale;
        }
        if comptime!(smooth) {
            #[unroll]
            for r in 0..owned {
                #[unroll]
                for c in 0..columns {
                    if first_class + column_of(&at, comptime!(c / 2), comptime!(c % 2), tile)
                        < shape.active
                    {
                        totals[r] += results[comptime!(result_of(r, c, tile))];
                    }
                }
            }
        }
        if first_class + side > shape.active {
            #[unroll]
            for c in 0..columns {
                if first_class + column_of(&at, comptime!(c / 2), comptime!(c % 2), tile)
                    >= shape.active
                {
                    #[unroll]
                    for r in 0..owned {
                        results[comptime!(result_of(r, c, tile))] = FLOOR;
                    }
                }
            }
        }
        #[unroll]
        for r in 0..owned {
            // Few tiles have a row's target, and few its best class so far: what is seldom is looked for apart.
            let target = targets[r] - first_class as u32;
            if target < comptime!(tile.side as u32) {
                #[unroll]
                for c in 0..columns {
                    if column_of(&at, comptime!(c / 2), comptime!(c % 2), tile) as u32 == target {
                        target_logits[r] = results[comptime!(result_of(r, c, tile))];
                    }
                }
            }
            let mut top = results[comptime!(result_of(r, 0, tile))];
            #[unroll]
            for c in 1..columns {
                top = max(top, results[comptime!(result_of(r, c, tile))]);
            }
            if top > peaks[r] {
                sums[r] *= (peaks[r] - top).exp();
                peaks[r] = top;
                #[unroll]
                for back in 1..=columns {
                    // The first of equal classes is found last.
                    let c = comptime!(columns - back);
                    let class =
                        first_class + column_of(&at, comptime!(c / 2), comptime!(c % 2), tile);
                    let is_top = results[comptime!(result_of(r, c, tile))] == top;
                    bests[r] = select(is_top, class as u32, bests[r]);
                }
            }
            let mut sum = sums[r];
            #[unroll]
            for c in 0..columns {
                sum += (results[comptime!(result_of(r, c, tile))] - peaks[r]).exp();
            }
            sums[r] = sum;
        }
    }

    // The units of a row: four of each plane across.
    let sharing = comptime!(4 * PLANES_ACROSS);
    let mut values = Shared::<[f32]>::new_slice(UNITS);
    let mut classes = Shared::<[u32]>::new_slice(UNITS);
    #[unroll]
    for r in 0..owned {
        let merged = merge_softmax(
            RowSoftmax {
                peak: peaks[r],
                sum: sums[r],
                best: bests[r],
                target: target_logits[r],
                total: totals[r],
            },
            at.group,
            at.member,
            &mut values,
            &mut classes,
            sharing,
        );
        let row = first_row + row_of(&at, comptime!(r / 2), comptime!(r % 2), tile);
        if at.member == 0 && row < shape.rows {
            let to = (head * shape.rows + row) * parts + first_part + split;
            let mut numbers = Vector::<f32, Const<KEPT>>::empty();
            numbers.insert(0usize, merged.peak);
            numbers.insert(1usize, merged.sum);
            numbers.insert(2usize, merged.target);
            numbers.insert(3usize, merged.total);
            kept[to] = numbers;
            best[to] = merged.best;
        }
    }
}

/// A group merges a row's parts.
#[cube(launch_unchecked)]
fn merge<I: Int>(
    kept: &[Vector<f32, Const<KEPT>>], // [heads, rows, parts]
    best: &[u32],                      // [heads, rows, parts]
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
        let numbers = kept[out * parts + part];
        let peak = numbers.extract(0usize);
        let sum = numbers.extract(1usize);
        // Parts are in the order of their classes: of equal peaks the first class stays.
        if peak > state.peak {
            state.sum *= (state.peak - peak).exp();
            state.peak = peak;
            state.best = best[out * parts + part];
        }
        state.sum += sum * (peak - state.peak).exp();
        state.target += numbers.extract(2usize);
        state.total += numbers.extract(3usize);
        part += group.size;
    }
    let merged = group_softmax(state, group);
    if is_there && of.lane == 0 {
        lse[out] = merged.lse();
        predictions[out] = merged.best;
        let mut loss = 0.0f32.runtime();
        if is_class(target_of::<I>(labels[out % rows], &rule)) {
            loss = merged.loss(active, smoothing);
        }
        row_loss[out] = loss;
    }
}
