//! Logit gradients of a chunk of classes.

use cubecl::prelude::*;

use super::super::launch::Call;
use super::super::margin::MarginRule;
use super::rows::Rows;
use crate::Gradients;
use crate::blueprint::cubes_for;
use crate::math::lanes::iota;
use crate::math::online_softmax::{FLOOR, logit_gradient};
use crate::tiles::{
    Backward, ChunkShape, Chunks, Engine, GradientChunk, Lies, Tile, column_of, exp_difference,
    place, replace_in, result_in, result_of, row_of, store_tile,
};

/// The operands of a backward pass.
pub(in crate::cosine_cross_entropy) fn backward_chunks<'a>(
    call: &'a Call,
    tile: Tile,
) -> Chunks<'a> {
    Chunks::new(call.client, &call.blueprint, tile, &call.problem, 1.0)
}

/// Gradients from a forward pass's `rows`, and from the cosines that it left in `kept`.
pub(in crate::cosine_cross_entropy) fn launch_backward(
    call: &Call,
    chunks: &Chunks,
    kept: Option<GradientChunk>,
    rows: &Rows,
    gradients: &Gradients,
) {
    let client = call.client;
    let tile = chunks.tile;
    let sizes = &call.problem.sizes;
    let backward = Backward {
        chunks,
        factors: rows.factors.clone(),
        scale: call.options.scale,
        of_margin: rows.of_margin.clone(),
        gradients,
    };
    let options = call.options;
    let has_margin = !options.margin.is_none();
    let of_scale = rows.of_margin.is_some();
    backward.run(kept, |of: &GradientChunk, has_cosines: bool| {
        let elements = sizes.heads * sizes.rows_padded * of.chunk.padded;
        // SAFETY: operands, rows and gradients are whole tiles; only f32 has cosines.
        unsafe {
            if has_cosines {
                let (cubes, units) = call.blueprint.elementwise(client, elements / tile.vector);
                from_cosines::launch_unchecked(
                    client,
                    cubes,
                    units,
                    tile.vector,
                    rows.state_arg(),
                    rows.targets_arg(),
                    chunks.values_arg(of),
                    rows.of_margin_arg(client),
                    chunks.shape_arg(&of.chunk),
                    options.scale,
                    options.loss.label_smoothing,
                    options.margin.launch_arg(tile.packed),
                    has_margin,
                    of_scale,
                );
            } else {
                logit_gradients::launch_unchecked(
                    client,
                    cubes_for(client, elements / tile.side / tile.side),
                    CubeDim::new_1d(tile.units() as u32),
                    tile.vector,
                    chunks.embeddings_arg(),
                    chunks.weights_arg(&of.chunk),
                    rows.state_arg(),
                    rows.targets_arg(),
                    chunks.values_arg(of),
                    rows.of_margin_arg(client),
                    chunks.shape_arg(&of.chunk),
                    options.scale,
                    options.loss.label_smoothing,
                    options.margin.launch_arg(tile.packed),
                    tile,
                    has_margin,
                    of_scale,
                    tile.packed,
                );
            }
        }
    });
}

/// A chunk's cosines become its logit gradients, a vector of classes at a time.
#[cube(launch_unchecked)]
fn from_cosines<N: Size>(
    state: &[f32],                 // [heads, 3, rows_padded]
    targets: &[u32],               // [rows_padded]
    values: &mut [Vector<f32, N>], // [heads, rows_padded, classes]
    of_margin: &mut [f32],         // [heads, rows_padded] if of_scale
    shape: ChunkShape,
    scale: f32,
    smoothing: f32,
    margin: MarginRule,
    #[comptime] has_margin: bool,
    #[comptime] of_scale: bool,
) {
    let columns = shape.classes / N::value();
    let mut at = ABSOLUTE_POS;
    while at < shape.heads * shape.rows_padded * columns {
        let out = at / columns;
        let (head, row) = (out / shape.rows_padded, out % shape.rows_padded);
        let first = (shape.first + at % columns * N::value()) as u32;
        let class = Vector::<u32, N>::new(first) + iota::<N>();
        let lse = state[head * 3 * shape.rows_padded + row];
        let lse_low = state[(head * 3 + 1) * shape.rows_padded + row];
        let arriving = state[(head * 3 + 2) * shape.rows_padded + row];
        let mut cosines = values[at];
        let mut slopes = Vector::<f32, N>::new(1.0);
        let mut beyond = 0.0f32.runtime();
        let target = targets[row] - first;
        if comptime!(has_margin) && target < N::value() as u32 {
            #[unroll]
            for lane in 0..N::value() {
                if target == lane as u32 {
                    let with = margin.of(cosines.extract(lane));
                    beyond = with.value - with.slope * cosines.extract(lane);
                    cosines.insert(lane, with.value);
                    slopes.insert(lane, with.slope);
                }
            }
        }
        // Rounded as it was when lse was: `max` keeps a compiler from contracting.
        let logit = max(cosines * Vector::new(scale), Vector::new(FLOOR));
        let is_target = class.equal(&Vector::new(targets[row]));
        let mut gradient = logit_gradient::<N>(
            logit,
            Vector::new(lse),
            Vector::new(lse_low),
            Vector::new(arriving),
            is_target,
            shape.active as u32,
            smoothing,
        );
        if comptime!(of_scale) && target < N::value() as u32 {
            let own = select_many(is_target, gradient, Vector::new(0.0));
            of_margin[out] = own.vector_sum() * beyond;
        }
        if comptime!(has_margin) {
            gradient *= slopes;
        }
        let is_there = class.less_than(&Vector::new(shape.active as u32));
        values[at] = select_many(is_there, gradient, Vector::new(0.0));
        at += CUBE_COUNT * CUBE_DIM as usize;
    }
}

#[cube(launch_unchecked)]
fn logit_gradients<E: Float, N: Size>(
    embeddings: &[Vector<E, N>],    // [heads, rows_padded, dim]
    weights: &[Vector<E, N>],       // [heads, classes, dim]
    state: &[f32],                  // [heads, 3, rows_padded]
    targets: &[u32],                // [rows_padded]
    gradients: &mut [Vector<E, N>], // [heads, rows_padded, classes]
    of_margin: &mut [f32],          // [heads, rows_padded] if of_scale
    shape: ChunkShape,
    scale: f32,
    smoothing: f32,
    margin: MarginRule,
    #[comptime] tile: Tile,
    #[comptime] has_margin: bool,
    #[comptime] of_scale: bool,
    #[define(E)] _dtype: ElemType,
) {
    let of = shape.tile_of_cube(tile);
    if of.head >= shape.heads {
        terminate!();
    }
    let stage = comptime!(tile.stages() * tile.stage(Lies::Rows));
    let mut left_stages = Shared::<[E]>::new_aligned_slice(stage, 16usize);
    let mut right_stages = Shared::<[E]>::new_aligned_slice(stage, 16usize);
    let mut results = Array::<f32>::new(comptime!(tile.results()));
    shape.cosines::<E, N>(
        &mut results,
        embeddings,
        weights,
        &of,
        &mut left_stages,
        &mut right_stages,
        tile,
    );
    let at = place(tile);
    let columns = comptime!(tile.columns());
    let uniform = smoothing / f32::cast_from(shape.active as u32);
    let first_class = shape.first + of.in_chunk;
    #[unroll]
    for r in 0..comptime!(tile.rows()) {
        let row = of.first_row + row_of(&at, r, tile);
        let lse = state[of.head * 3 * shape.rows_padded + row];
        let lse_low = state[(of.head * 3 + 1) * shape.rows_padded + row];
        let arriving = state[(of.head * 3 + 2) * shape.rows_padded + row];
        // Where nothing arrives, nothing goes on, whatever the logits are.
        if arriving == 0.0 {
            #[unroll]
            for c in 0..columns {
                results[comptime!(result_of(r, c, tile))] = 0.0;
            }
        } else {
            // Few tiles have a row's target, so it is looked for apart.
            let target = targets[row] - first_class as u32;
            let has_target = target < comptime!(tile.side as u32);
            let mut cosine = 0.0f32.runtime();
            let mut is_here = false.runtime();
            if comptime!(has_margin) && has_target {
                let own = result_in(&results, &at, r, target, tile);
                cosine = own.value;
                is_here = own.is_here;
            }
            #[unroll]
            for c in 0..columns {
                let from = comptime!(result_of(r, c, tile));
                results[from] =
                    of_another_class(results[from], scale, lse, lse_low, arriving, uniform, tile);
            }
            if has_target {
                if comptime!(has_margin) {
                    let with = margin.of(cosine);
                    let other =
                        of_another_class(with.value, scale, lse, lse_low, arriving, uniform, tile);
                    let gradient = other - arriving * (1.0 - smoothing);
                    if comptime!(of_scale) && is_here {
                        let beyond = with.value - with.slope * cosine;
                        of_margin[of.head * shape.rows_padded + row] = gradient * beyond;
                    }
                    let gradient = gradient * with.slope;
                    replace_in(&mut results, &at, r, target, gradient, tile);
                } else {
                    #[unroll]
                    for c in 0..columns {
                        if column_of(&at, c, tile) as u32 == target {
                            let from = comptime!(result_of(r, c, tile));
                            results[from] -= arriving * (1.0 - smoothing);
                        }
                    }
                }
            }
        }
    }
    if first_class + comptime!(tile.side) > shape.active {
        #[unroll]
        for c in 0..columns {
            let class = first_class + column_of(&at, c, tile);
            if class >= shape.active {
                #[unroll]
                for r in 0..comptime!(tile.rows()) {
                    results[comptime!(result_of(r, c, tile))] = 0.0;
                }
            }
        }
    }
    let first = (of.head * shape.rows_padded + of.first_row) * shape.classes + of.in_chunk;
    store_tile::<E, N>(
        &results,
        gradients,
        first,
        shape.classes,
        &mut left_stages,
        tile,
    );
}

/// `arriving · (e^(scale · cosine − lse − lse_low) − uniform)`, the gradient of a logit whose class is not the target. The logit is
/// rounded as it was when lse was.
#[cube]
fn of_another_class(
    cosine: f32,
    scale: f32,
    lse: f32,
    lse_low: f32,
    arriving: f32,
    uniform: f32,
    #[comptime] tile: Tile,
) -> f32 {
    if comptime!(tile.engine == Engine::Fma) {
        // `max` keeps a compiler from contracting.
        let logit = max(cosine * scale, FLOOR);
        arriving * (exp_difference(logit - lse, lse_low, tile) - uniform)
    } else {
        // Two instructions less for each of a unit's 128 results, rounded to 16 bits or TF32 in the end. CubeCL's compiler for NVIDIA keeps
        // this `fma`; others might see the product in it.
        let logit = fma(cosine, scale, 0.0);
        let p = exp_difference(logit - lse, lse_low, tile);
        fma(arriving, p, -(arriving * uniform))
    }
}
