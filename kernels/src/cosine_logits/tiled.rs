//! A cube computes a tile of logits; the backward pass copies a chunk of logit gradients into whole tiles
//! and multiplies them with both operands.

use cubecl::prelude::*;
use cubecl::std::tensor::TensorHandle;

use super::launch::Call;
use crate::Gradients;
use crate::blueprint::{PLANE_UNITS, cubes_for};
use crate::operand::{RowStrides, Strided, address_type, whole, widest};
use crate::tiles::{
    Backward, ChunkShape, Chunks, GradientChunk, Lies, Tile, column_of, place, result_of, row_of,
};

pub(super) fn launch_forward(call: &Call, tile: Tile, logits: &TensorHandle, scale: f32) {
    let client = call.client;
    let sizes = &call.problem.sizes;
    let elements = sizes.heads * sizes.rows * sizes.active;
    let together = widest(tile.neighbours(), [sizes.active]);
    let chunks = Chunks::new(client, &call.blueprint, tile, &call.problem, 1.0);
    for chunk in chunks.forward(None) {
        let cubes = sizes.heads * (sizes.rows_padded / tile.side) * (chunk.padded / tile.side);
        // SAFETY: the operands are packed in whole tiles, `logits` is [heads, rows, active].
        unsafe {
            forward::launch_unchecked(
                client,
                cubes_for(client, cubes),
                CubeDim::new_1d(tile.units() as u32),
                address_type(&[elements]),
                tile.vector,
                together,
                chunks.embeddings_arg(),
                chunks.weights_arg(&chunk),
                whole(logits, together),
                chunks.shape_arg(&chunk),
                scale,
                tile,
                tile.packed,
                logits.dtype,
            );
        }
    }
}

pub(super) fn launch_backward(
    call: &Call,
    tile: Tile,
    upstream: &Strided,
    scale: f32,
    gradients: &Gradients,
) {
    let client = call.client;
    let sizes = &call.problem.sizes;
    let factors = client.create_from_slice(f32::as_bytes(&vec![scale; sizes.heads]));
    let chunks = Chunks::new(client, &call.blueprint, tile, &call.problem, 1.0);
    let backward = Backward {
        chunks: &chunks,
        factors,
        scale,
        of_margin: None,
        gradients,
    };
    let vector = upstream.vector_size(&call.blueprint);
    backward.run(None, |GradientChunk { chunk, values }, _| {
        let elements = sizes.heads * sizes.rows_padded * chunk.padded / vector;
        // SAFETY: `Strided` proved the upstream, the copy has whole tiles.
        unsafe {
            copy::launch_unchecked(
                client,
                cubes_for(client, elements.div_ceil(PLANE_UNITS)),
                CubeDim::new_1d(PLANE_UNITS as u32),
                address_type(&[upstream.elements()]),
                vector,
                upstream.buffer_arg(vector),
                upstream.strides_arg(vector),
                BufferArg::from_raw_parts(values.clone(), elements),
                sizes.heads,
                sizes.rows,
                sizes.rows_padded,
                chunk.first / vector,
                chunk.classes / vector,
                chunk.padded / vector,
                upstream.dtype(),
                tile.packed,
            );
        }
    });
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn forward<E: Float, F: Float, N: Size, M: Size>(
    embeddings: &[Vector<E, N>], // [heads, rows_padded, dim]
    weights: &[Vector<E, N>],    // [heads, classes, dim]
    logits: &mut [Vector<F, M>], // [heads, rows, active]
    shape: ChunkShape,
    scale: f32,
    #[comptime] tile: Tile,
    #[define(E)] _packed: ElemType,
    #[define(F)] _dtype: ElemType,
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
    // Results next to each other, if so many divide the classes: then all of them are classes, or none.
    let together = M::value();
    #[unroll]
    for r in 0..comptime!(tile.rows()) {
        let row = of.first_row + row_of(&at, r, tile);
        #[unroll]
        for first in 0..comptime!(tile.columns() / together) {
            let c = comptime!(first * together);
            let class = shape.first + of.in_chunk + column_of(&at, c, tile);
            if row < shape.rows && class < shape.active {
                let mut some = Vector::<f32, M>::empty();
                #[unroll]
                for e in 0..together {
                    some.insert(e, results[comptime!(result_of(r, c + e, tile))] * scale);
                }
                logits[((of.head * shape.rows + row) * shape.active + class) / together] =
                    Vector::<F, M>::cast_from(some);
            }
        }
    }
}

/// A chunk of the upstream gradient, zero-padded to whole tiles.
#[cube(launch_unchecked, address_type = "dynamic")]
fn copy<F: Float, E: Float, N: Size>(
    upstream: &[Vector<F, N>], // [heads, rows, active]
    strides: RowStrides,
    logits: &mut [Vector<E, N>], // [heads, rows_padded, padded] at least
    heads: usize,
    rows: usize,
    rows_padded: usize,
    first: usize,   // in vectors
    classes: usize, // in vectors
    padded: usize,  // in vectors
    #[define(F)] _dtype: ElemType,
    #[define(E)] _packed: ElemType,
) {
    let at = ABSOLUTE_POS;
    let class = at % padded;
    let row = at / padded % rows_padded;
    let head = at / padded / rows_padded;
    // Not by the length of a buffer that is as large as the largest chunk.
    if head >= heads {
        terminate!();
    }
    let mut value = Vector::<E, N>::new(E::new(0.0));
    if row < rows && class < classes {
        value = Vector::<E, N>::cast_from(
            upstream[head * strides.head + row * strides.row + first + class],
        );
    }
    logits[at] = value;
}
