//! Tiles of logits folded into parts of a softmax, and the parts merged.

use cubecl::prelude::*;

use super::super::launch::{Call, RowResults};
use crate::blueprint::{PLANE_UNITS, cubes_for};
use crate::cmma::{
    ChunkShape, Chunks, Lies, LogitTile, PLANES_ACROSS, Tile, UNITS, column_of, place, row_of,
};
use crate::loss::target::{LabelRule, is_class, label_rule, target_of};
use crate::math::merge::merge_softmax;
use crate::math::online_softmax::{FLOOR, RowSoftmax};
use crate::operand::whole;

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
    // Enough cubes that every multiprocessor has one, and the last wave is not nearly empty.
    let processors = client.properties().hardware.num_streaming_multiprocessors;
    let wanted = 4 * processors.unwrap_or(1) as usize;
    let each = chunks.forward();
    let count = each.len();
    let splits_of = |padded: usize| (wanted / row_tiles).clamp(1, padded / tile.side);
    let parts_of_chunk = splits_of(sizes.active_padded.div_ceil(count));
    let parts = parts_of_chunk * count;
    let kept = client.empty(sizes.heads * parts * KEPT * sizes.rows * size_of::<f32>());
    let best = client.empty(sizes.heads * parts * sizes.rows * size_of::<u32>());
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
                BufferArg::from_raw_parts(kept.clone(), sizes.heads * parts * KEPT * sizes.rows),
                BufferArg::from_raw_parts(best.clone(), sizes.heads * parts * sizes.rows),
                chunks.shape_arg(&chunk),
                at * parts_of_chunk,
                parts_of_chunk,
                parts,
                rule(),
                call.options.scale,
                tile,
                call.options.loss.label_smoothing != 0.0,
                call.problem.embeddings.dtype(),
                call.labels.dtype(),
            );
        }
    }
    // SAFETY: every part was written for every row; the results are [heads, rows].
    unsafe {
        merge::launch_unchecked(
            client,
            cubes_for(client, (sizes.heads * sizes.rows).div_ceil(PLANE_UNITS)),
            CubeDim::new_1d(PLANE_UNITS as u32),
            BufferArg::from_raw_parts(kept, sizes.heads * parts * KEPT * sizes.rows),
            BufferArg::from_raw_parts(best, sizes.heads * parts * sizes.rows),
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
            call.labels.dtype(),
        );
    }
}

#[cube(launch_unchecked)]
fn forward<E: Float, I: Int, N: Size>(
    embeddings: &[Vector<E, N>], // [heads, rows_padded, dim]
    weights: &[Vector<E, N>],    // [heads, classes, dim]
    labels: &[I],                // [rows]
    kept: &mut [f32],            // [heads, parts, KEPT, rows]
    best: &mut [u32],            // [heads, parts, rows]
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
        for r in 0..owned {
            let before = peaks[r];
            let mut peak = before;
            let mut best_class = bests[r];
            #[unroll]
            for c in 0..comptime!(2 * tile.wide()) {
                let from = comptime!((r / 2 * tile.wide() + c / 2) * 4 + r % 2 * 2 + c % 2);
                let class = first_class + column_of(&at, comptime!(c / 2), comptime!(c % 2), tile);
                let mut z = results[from] * scale;
                if class as u32 == targets[r] {
                    target_logits[r] = z;
                }
                if class >= shape.active {
                    z = FLOOR;
                } else if comptime!(smooth) {
                    totals[r] += z;
                }
                best_class = select(z > peak, class as u32, best_class);
                peak = max(peak, z);
                results[from] = z;
            }
            let mut sum = sums[r] * (before - peak).exp();
            #[unroll]
            for c in 0..comptime!(2 * tile.wide()) {
                let from = comptime!((r / 2 * tile.wide() + c / 2) * 4 + r % 2 * 2 + c % 2);
                sum += (results[from] - peak).exp();
            }
            peaks[r] = peak;
            sums[r] = sum;
            bests[r] = best_class;
        }
    }

    // The units of a row: four of each plane across.
    let sharing = comptime!(4 * PLANES_ACROSS);
    let mut values = Shared::<[f32]>::new_slice(UNITS);
    let mut classes = Shared::<[u32]>::new_slice(UNITS);
    let group = at.plane_row * 8 + at.lane / 4;
    let member = at.plane_column * 4 + at.lane % 4;
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
            group,
            member,
            &mut values,
            &mut classes,
            sharing,
        );
        let row = first_row + row_of(&at, comptime!(r / 2), comptime!(r % 2), tile);
        if member == 0 && row < shape.rows {
            let part = head * parts + first_part + split;
            kept[(part * KEPT) * shape.rows + row] = merged.peak;
            kept[(part * KEPT + 1) * shape.rows + row] = merged.sum;
            kept[(part * KEPT + 2) * shape.rows + row] = merged.target;
            kept[(part * KEPT + 3) * shape.rows + row] = merged.total;
            best[part * shape.rows + row] = merged.best;
        }
    }
}

/// A unit merges a row's parts, in order.
#[cube(launch_unchecked)]
fn merge<I: Int>(
    kept: &[f32],            // [heads, parts, KEPT, rows]
    best: &[u32],            // [heads, parts, rows]
    labels: &[I],            // [rows]
    row_loss: &mut [f32],    // [heads, rows]
    lse: &mut [f32],         // [heads, rows]
    predictions: &mut [u32], // [heads, rows]
    heads: usize,
    rows: usize,
    active: u32,
    parts: usize,
    rule: LabelRule,
    smoothing: f32,
    #[define(I)] _label: ElemType,
) {
    let at = ABSOLUTE_POS;
    if at >= heads * rows {
        terminate!();
    }
    let head = at / rows;
    let row = at % rows;
    let first = head * parts;
    let mut merged = RowSoftmax {
        peak: kept[first * KEPT * rows + row],
        sum: 0.0f32.runtime(),
        best: best[first * rows + row],
        target: 0.0f32.runtime(),
        total: 0.0f32.runtime(),
    };
    for part in 1..parts {
        let peak = kept[(first + part) * KEPT * rows + row];
        // Parts are in the order of their classes: of equal peaks the first class stays.
        if peak > merged.peak {
            merged.peak = peak;
            merged.best = best[(first + part) * rows + row];
        }
    }
    for part in 0..parts {
        let from = (first + part) * KEPT * rows + row;
        merged.sum += kept[from + rows] * (kept[from] - merged.peak).exp();
        merged.target += kept[from + 2 * rows];
        merged.total += kept[from + 3 * rows];
    }
    lse[at] = merged.lse();
    predictions[at] = merged.best;
    let mut loss = 0.0f32.runtime();
    if is_class(target_of::<I>(labels[row], &rule)) {
        loss = merged.loss(active, smoothing);
    }
    row_loss[at] = loss;
}
