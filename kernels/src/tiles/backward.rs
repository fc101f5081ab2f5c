//! The gradients of both operands, from the logit gradients of each chunk of classes.

use cubecl::prelude::*;
use cubecl::server::Handle;

use super::Tile;
use super::chunks::{Chunks, GradientChunk};
use super::pack::{RowsOf, ScaleRows, Unfinished, finish_chunk};
use super::product::tile_product;
use super::results::{column_of, place, result_of, row_of};
use super::stage::{Lies, Source};
use crate::Gradients;
use crate::blueprint::cubes_for;
use crate::math::parts::{add_parts, parts_of_sums, slots};
use crate::scale;

/// A backward pass.
pub(crate) struct Backward<'a> {
    pub chunks: &'a Chunks<'a>,
    /// f32 `[heads]`: what the products are multiplied with in the end.
    pub factors: Handle,
    pub scale: f32,
    /// f32 `[heads, rows_padded]`: what a margin adds to the gradient of the scale, over the head's factor.
    pub of_margin: Option<Handle>,
    /// Where the gradients go.
    pub gradients: &'a Gradients,
}

impl Backward<'_> {
    /// Runs; `fill` writes the logit gradients of a chunk, with zeros in the padding. It is told whether their cosines lie
    /// there, as they do in `kept`, the first chunk.
    pub(crate) fn run(&self, mut kept: Option<GradientChunk>, fill: impl Fn(&GradientChunk, bool)) {
        let chunks = self.chunks;
        let sizes = &chunks.problem.sizes;
        let (heads, rows, dim) = (sizes.heads, sizes.rows_padded, sizes.dim_padded);
        let float = size_of::<f32>();
        let step = chunks.backward_step();
        let parts_of = |count: usize, reduced: usize| {
            let elements = heads * count * dim;
            let owners = elements / chunks.tile.side / chunks.tile.side;
            let slabs = reduced / chunks.tile.depth;
            let slots = slots(chunks.client, chunks.tile.stage_bytes());
            parts_of_sums(slots, owners, slabs, elements)
        };
        let for_rows = self.gradients.embeddings.as_ref().map(|grad| {
            let parts = parts_of(rows, step);
            let sums = chunks.client.empty(parts * heads * rows * dim * float);
            (grad, sums, parts)
        });
        let firsts = || (0..sizes.active).step_by(step);
        let for_weights = self.gradients.weights.as_ref().map(|grad| {
            let elements = |first| {
                let (_, padded) = chunks.classes(first, step);
                parts_of(padded, rows) * heads * padded * dim
            };
            // The last chunk may have fewer classes, and more parts.
            let most = firsts().map(elements).max().unwrap_or(0);
            (grad, chunks.client.empty(most * float))
        });
        let mut before = None;
        for first in firsts() {
            let has_cosines = kept.is_some();
            let next = || chunks.gradient_chunk(first, before.take());
            let of = kept.take().unwrap_or_else(next);
            fill(&of, has_cosines);
            let chunk = &of.chunk;
            if let Some((_, sums, parts)) = &for_rows {
                self.product(
                    chunks.values_arg(&of),
                    chunks.weights_arg(chunk),
                    sums,
                    *parts,
                    rows,
                    chunk.padded,
                    first == 0,
                    Lies::Rows,
                );
            }
            if let Some((grad, sums)) = &for_weights {
                let parts = parts_of(chunk.padded, rows);
                self.product(
                    chunks.values_arg(&of),
                    chunks.embeddings_arg(),
                    sums,
                    parts,
                    chunk.padded,
                    rows,
                    true,
                    Lies::Columns,
                );
                add_parts(chunks.client, sums, heads * chunk.padded * dim, parts);
                let last = first + chunk.classes == sizes.active;
                let count = match last {
                    true => chunks.problem.classes - first,
                    false => chunk.classes,
                };
                let classes = Unfinished {
                    rows: RowsOf {
                        operand: &chunks.problem.weights,
                        first,
                        real: chunk.classes,
                        count,
                        dim_padded: dim,
                    },
                    gradient: sums,
                    padded: chunk.padded,
                    factors: &self.factors,
                    of_scale: None,
                };
                finish_chunk(chunks.client, chunks.blueprint, &classes, grad);
            }
            before = Some(of);
        }
        if let Some((grad, sums, parts)) = &for_rows {
            add_parts(chunks.client, sums, heads * rows * dim, *parts);
            let of_scale = self.gradients.scale.as_ref().map(|grad| {
                let rows = ScaleRows {
                    rows: chunks.client.empty(heads * sizes.rows * float),
                    of_margin: self.of_margin.clone(),
                };
                (grad, rows)
            });
            let embeddings = Unfinished {
                rows: RowsOf {
                    operand: &chunks.problem.embeddings,
                    first: 0,
                    real: sizes.rows,
                    count: sizes.rows,
                    dim_padded: dim,
                },
                gradient: sums,
                padded: rows,
                factors: &self.factors,
                of_scale: of_scale.as_ref().map(|(_, rows)| rows),
            };
            finish_chunk(chunks.client, chunks.blueprint, &embeddings, grad);
            if let Some((grad, of_rows)) = &of_scale {
                let (client, blueprint) = (chunks.client, chunks.blueprint);
                scale::launch(
                    client,
                    blueprint,
                    &of_rows.rows,
                    sizes.rows,
                    self.scale,
                    grad,
                );
            }
        }
    }

    /// `out [parts, heads, count, dim] (+)= left · right`, each part over its own share of what is reduced, with
    /// `left [heads, count, reduced]` if it lies in rows and `[heads, reduced, count]` if in columns, and
    /// `right [heads, reduced, dim]`.
    #[allow(clippy::too_many_arguments)] // the product's shape, said once
    fn product(
        &self,
        left: BufferArg,
        right: BufferArg,
        out: &Handle,
        parts: usize,
        count: usize,
        reduced: usize,
        overwrite: bool,
        lies: Lies,
    ) {
        let Chunks { client, tile, .. } = self.chunks;
        let sizes = &self.chunks.problem.sizes;
        let elements = parts * sizes.heads * count * sizes.dim_padded;
        let cubes = elements / tile.side / tile.side;
        // SAFETY: all three are whole tiles, as the arguments say.
        unsafe {
            product::launch_unchecked(
                client,
                cubes_for(client, cubes),
                CubeDim::new_1d(tile.units() as u32),
                tile.vector,
                left,
                right,
                BufferArg::from_raw_parts(out.clone(), elements / 2),
                cubes,
                parts,
                count,
                reduced,
                sizes.dim_padded,
                u32::from(overwrite),
                lies,
                *tile,
                tile.packed,
            );
        }
    }
}

#[cube(launch_unchecked)]
fn product<E: Float, N: Size>(
    left: &[Vector<E, N>],
    right: &[Vector<E, N>],
    out: &mut [Vector<f32, Const<2>>],
    cubes: usize,
    parts: usize,
    count: usize,
    reduced: usize,
    dim: usize,
    overwrite: u32,
    #[comptime] lies: Lies,
    #[comptime] tile: Tile,
    #[define(E)] _dtype: ElemType,
) {
    if CUBE_POS >= cubes {
        terminate!();
    }
    let vector = comptime!(tile.vector);
    let across = dim / comptime!(tile.side);
    let down = count / comptime!(tile.side);
    let heads = cubes / (parts * across * down);
    let head_of_part = CUBE_POS / (across * down);
    let head = head_of_part % heads;
    let part = head_of_part / heads;
    let slabs = reduced / comptime!(tile.depth);
    let from = slabs * part / parts;
    let to = slabs * (part + 1) / parts;
    // A part may have nothing, and then looks where something is.
    let skipped = min(from, slabs - 1) * comptime!(tile.depth);
    let first = CUBE_POS / across % down * comptime!(tile.side);
    let column = CUBE_POS % across * comptime!(tile.side);
    let left_at = match comptime!(lies) {
        Lies::Rows => Source {
            base: (head * count + first) * (reduced / vector) + skipped / vector,
            stride: reduced / vector,
        },
        Lies::Columns => Source {
            base: (head * reduced + skipped) * (count / vector) + first / vector,
            stride: count / vector,
        },
    };
    let right_at = Source {
        base: (head * reduced + skipped) * (dim / vector) + column / vector,
        stride: dim / vector,
    };
    let mut left_stages =
        Shared::<[E]>::new_aligned_slice(comptime!(tile.stages() * tile.stage(lies)), 16usize);
    let mut right_stages = Shared::<[E]>::new_aligned_slice(
        comptime!(tile.stages() * tile.stage(Lies::Columns)),
        16usize,
    );
    let mut results = Array::<f32>::new(comptime!(tile.results()));
    let pairs = dim / 2;
    // Where the tile goes waits in shared memory: with it in registers a second cube would not fit in some GPUs' multiprocessors.
    let mut goes_to = Shared::<[u32]>::new_slice(1usize);
    if UNIT_POS == 0 {
        goes_to[0] = ((head_of_part * count + first) * pairs + column / 2) as u32;
    }
    tile_product::<E, N>(
        &mut results,
        left,
        &left_at,
        right,
        &right_at,
        to - from,
        &mut left_stages,
        &mut right_stages,
        lies,
        Lies::Columns,
        tile,
    );
    let at = place(tile);
    let to = goes_to[0] as usize;
    #[unroll]
    for r in 0..comptime!(tile.rows()) {
        let row = to + row_of(&at, r, tile) * pairs;
        // All of a row's are read before any is written: one way to memory and back, not one each.
        let mut before = Array::<Vector<f32, Const<2>>>::new(comptime!(tile.wide()));
        #[unroll]
        for j in 0..comptime!(tile.wide()) {
            before[j] = Vector::<f32, Const<2>>::new(0.0);
            if overwrite == 0 {
                before[j] = out[row + column_of(&at, comptime!(2 * j), tile) / 2];
            }
        }
        #[unroll]
        for j in 0..comptime!(tile.wide()) {
            let mut sum = Vector::<f32, Const<2>>::empty();
            sum.insert(0usize, results[comptime!(result_of(r, 2 * j, tile))]);
            sum.insert(1usize, results[comptime!(result_of(r, 2 * j + 1, tile))]);
            out[row + column_of(&at, comptime!(2 * j), tile) / 2] = sum + before[j];
        }
    }
}
