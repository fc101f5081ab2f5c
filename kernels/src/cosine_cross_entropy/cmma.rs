//! Tiles of logits on tensor cores, folded where they arise.
//!
//! Forward: a cube owns a tile of rows and a part of the chunk's class tiles. It folds each tile of logits into the online
//! softmax of the registers that hold it; the units that share a row merge at the end, and a last launch merges the
//! parts in their order. The number of parts follows from the device and the shapes, so the same device gives the
//! same bits.
//!
//! Backward, a chunk of classes at a time: logits again, turned into logit gradients of the operands' dtype in a
//! bounded workspace, which two products take to the operands: `8·H·N·D·K` operations with the forward pass. A row's
//! upstream gradient is divided by its head's largest before it is rounded, and multiplied back in f32.

use cubecl::prelude::*;
use cubecl::server::Handle;

use super::launch::{Call, RowResults};
use crate::Gradients;
use crate::blueprint::{PLANE_UNITS, cubes_for};
use crate::cmma::{
    Backward, Chunk, Chunks, Lies, Source, Tile, UNITS, column_of, place, row_of, tile_product,
};
use crate::loss::rows::Rows;
use crate::loss::target::{LabelRule, is_class, label_rule, target_of};
use crate::math::cube::{cube_max, merge_softmax};
use crate::math::online_softmax::{FLOOR, RowSoftmax};
use crate::operand::whole;

/// Numbers kept of each row in each part, beside the best class: peak, sum, target logit, sum of logits.
const KEPT: usize = 4;

/// Row losses, lse and predictions into `results`.
pub(super) fn launch_forward(call: &Call, tile: Tile, results: &RowResults) {
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
                ShapeLaunch::new(
                    sizes.heads,
                    sizes.rows,
                    sizes.rows_padded,
                    sizes.active,
                    chunk.first,
                    chunk.padded,
                    sizes.dim_padded,
                ),
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

/// Gradients from a forward pass's `rows`.
pub(super) fn launch_backward(call: &Call, tile: Tile, rows: &Rows, gradients: &Gradients) {
    let client = call.client;
    let sizes = &call.problem.sizes;
    let dtype = call.problem.embeddings.dtype();
    // Softmax probabilities of many classes would be subnormal in f16: its exponents are used from the top.
    let unit: f32 = match dtype {
        F16 => 4096.0,
        _ => 1.0,
    };
    let factors = client.empty(sizes.heads * size_of::<f32>());
    // SAFETY: `Rows` has [heads, 2, rows_padded] numbers, the factors are [heads].
    unsafe {
        relative::launch_unchecked(
            client,
            cubes_for(client, sizes.heads),
            CubeDim::new_1d(PLANE_UNITS as u32),
            rows.state_arg(1),
            BufferArg::from_raw_parts(factors.clone(), sizes.heads),
            sizes.heads,
            sizes.rows_padded,
            call.options.scale / unit,
            unit,
        );
    }
    let chunks = Chunks::new(client, &call.blueprint, tile, &call.problem);
    let backward = Backward {
        chunks: &chunks,
        factors,
        gradients,
    };
    backward.run(|chunk: &Chunk, logits: &Handle| {
        let elements = sizes.heads * sizes.rows_padded * chunk.padded;
        let cubes = elements / tile.side / tile.side;
        // SAFETY: operands, rows and gradients are whole tiles.
        unsafe {
            logit_gradients::launch_unchecked(
                client,
                cubes_for(client, cubes),
                CubeDim::new_1d(UNITS as u32),
                tile.vector,
                chunks.embeddings_arg(),
                chunks.weights_arg(chunk),
                rows.state_arg(1),
                rows.targets_arg(1),
                BufferArg::from_raw_parts(logits.clone(), elements / 2),
                ShapeLaunch::new(
                    sizes.heads,
                    sizes.rows,
                    sizes.rows_padded,
                    sizes.active,
                    chunk.first,
                    chunk.padded,
                    sizes.dim_padded,
                ),
                call.options.scale,
                call.options.loss.label_smoothing,
                tile,
                dtype,
            );
        }
    });
}

const F16: ElemType = ElemType::Float(cubecl::ir::FloatKind::F16);

/// A chunk's sizes.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
struct Shape {
    heads: usize,
    rows: usize,
    rows_padded: usize,
    active: usize,
    /// The chunk's first class.
    first: usize,
    /// The chunk's classes, padded to whole tiles.
    classes: usize,
    dim: usize,
}

#[cube]
impl Shape {
    /// Where a tile of a head's embeddings begins.
    fn row_tile(&self, head: usize, row: usize, #[comptime] vector: usize) -> Source {
        Source {
            base: (head * self.rows_padded + row) * (self.dim / vector),
            stride: self.dim / vector,
        }
    }

    /// Where a tile of the chunk's class weights begins.
    fn class_tile(&self, head: usize, class: usize, #[comptime] vector: usize) -> Source {
        Source {
            base: (head * self.classes + class) * (self.dim / vector),
            stride: self.dim / vector,
        }
    }
}

#[cube(launch_unchecked)]
fn forward<E: Float, I: Int, N: Size>(
    embeddings: &[Vector<E, N>], // [heads, rows_padded, dim]
    weights: &[Vector<E, N>],    // [heads, classes, dim]
    labels: &[I],                // [rows]
    kept: &mut [f32],            // [heads, parts, KEPT, rows]
    best: &mut [u32],            // [heads, parts, rows]
    shape: Shape,
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

    let mut left_stages =
        Shared::<[E]>::new_aligned_slice(comptime!(2 * tile.stage(Lies::Rows)), 16usize);
    let mut right_stages =
        Shared::<[E]>::new_aligned_slice(comptime!(2 * tile.stage(Lies::Rows)), 16usize);
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
        tile_product::<E, N>(
            &mut results,
            embeddings,
            &shape.row_tile(head, first_row, tile.vector),
            weights,
            &shape.class_tile(head, class_tile * side, tile.vector),
            shape.dim / comptime!(tile.depth),
            &mut left_stages,
            &mut right_stages,
            Lies::Rows,
            Lies::Rows,
            tile,
        );
        let first_class = shape.first + class_tile * side;
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
    let sharing = comptime!(4 * crate::cmma::PLANES_ACROSS);
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

/// A cube divides a head's arriving gradients by the largest of them, and gives the factor that undoes it.
#[cube(launch_unchecked)]
fn relative(
    state: &mut [f32],   // [heads, 2, rows_padded]: lse, then the gradient that arrives
    factors: &mut [f32], // [heads]
    heads: usize,
    rows_padded: usize,
    scale: f32,
    unit: f32,
) {
    let head = CUBE_POS;
    if head >= heads {
        terminate!();
    }
    let first = (head * 2 + 1) * rows_padded;
    let mut largest = 0.0f32.runtime();
    let mut row = UNIT_POS as usize;
    while row < rows_padded {
        largest = max(largest, state[first + row].abs());
        row += PLANE_UNITS;
    }
    let largest = cube_max(largest, PLANE_UNITS);
    let mut inverse = 0.0f32.runtime();
    if largest > 0.0 {
        inverse = unit / largest;
    }
    row = UNIT_POS as usize;
    while row < rows_padded {
        state[first + row] *= inverse;
        row += PLANE_UNITS;
    }
    if UNIT_POS == 0 {
        factors[head] = largest * scale;
    }
}

#[cube(launch_unchecked)]
fn logit_gradients<E: Float, N: Size>(
    embeddings: &[Vector<E, N>],           // [heads, rows_padded, dim]
    weights: &[Vector<E, N>],              // [heads, classes, dim]
    state: &[f32],                         // [heads, 2, rows_padded]
    targets: &[u32],                       // [rows_padded]
    gradients: &mut [Vector<E, Const<2>>], // [heads, rows_padded, classes]
    shape: Shape,
    scale: f32,
    smoothing: f32,
    #[comptime] tile: Tile,
    #[define(E)] _dtype: ElemType,
) {
    let side = comptime!(tile.side);
    let row_tiles = shape.rows_padded / side;
    let class_tiles = shape.classes / side;
    let head = CUBE_POS / (row_tiles * class_tiles);
    if head >= shape.heads {
        terminate!();
    }
    let first_row = CUBE_POS % row_tiles * side;
    let in_chunk = CUBE_POS / row_tiles % class_tiles * side;
    let mut left_stages =
        Shared::<[E]>::new_aligned_slice(comptime!(2 * tile.stage(Lies::Rows)), 16usize);
    let mut right_stages =
        Shared::<[E]>::new_aligned_slice(comptime!(2 * tile.stage(Lies::Rows)), 16usize);
    let mut results = Array::<f32>::new(comptime!(tile.results()));
    tile_product::<E, N>(
        &mut results,
        embeddings,
        &shape.row_tile(head, first_row, tile.vector),
        weights,
        &shape.class_tile(head, in_chunk, tile.vector),
        shape.dim / comptime!(tile.depth),
        &mut left_stages,
        &mut right_stages,
        Lies::Rows,
        Lies::Rows,
        tile,
    );
    let at = place();
    let uniform = smoothing / f32::cast_from(shape.active as u32);
    #[unroll]
    for r in 0..comptime!(2 * tile.tall()) {
        let row = first_row + row_of(&at, comptime!(r / 2), comptime!(r % 2), tile);
        let lse = state[head * 2 * shape.rows_padded + row];
        let arriving = state[(head * 2 + 1) * shape.rows_padded + row];
        let target = targets[row];
        #[unroll]
        for j in 0..comptime!(tile.wide()) {
            let column = in_chunk + column_of(&at, j, 0usize, tile);
            let mut pair = Vector::<f32, Const<2>>::new(0.0);
            #[unroll]
            for odd in 0..2usize {
                let from = comptime!((r / 2 * tile.wide() + j) * 4 + r % 2 * 2 + odd);
                let class = shape.first + column + odd;
                if class < shape.active {
                    let mut wanted = uniform;
                    if class as u32 == target {
                        wanted += 1.0 - smoothing;
                    }
                    let p = (results[from] * scale - lse).exp();
                    pair.insert(odd, arriving * (p - wanted));
                }
            }
            let to = ((head * shape.rows_padded + row) * shape.classes + column) / 2;
            gradients[to] = Vector::<E, Const<2>>::cast_from(pair);
        }
    }
}
