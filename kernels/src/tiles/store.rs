//! A tile of results on its way to memory, in whole vectors.

use cubecl::prelude::*;

use super::results::{column_of, place, place_of_plane, result_of, row_of};
use super::{Engine, PLANE, Tile};

/// Rounds the results of a tile into rows of `stride` elements from `first` on. The stage must be free, and have room for two slabs.
#[cube]
pub(crate) fn store_tile<E: Float, N: Size>(
    results: &Array<f32>,
    to: &mut [Vector<E, N>],
    first: usize,
    stride: usize,
    stage: &mut [E],
    #[comptime] tile: Tile,
) {
    if comptime!(tile.engine == Engine::Fma) {
        store_neighbours::<E, N>(results, to, first, stride, tile);
    } else {
        store_fragments::<E, N>(results, to, first, stride, stage, tile);
    }
}

/// Where a unit has four neighbours of a row.
#[cube]
fn store_neighbours<E: Float, N: Size>(
    results: &Array<f32>,
    to: &mut [Vector<E, N>],
    first: usize,
    stride: usize,
    #[comptime] tile: Tile,
) {
    let at = place(tile);
    let vector = comptime!(tile.vector);
    #[unroll]
    for r in 0..comptime!(tile.rows()) {
        let row = first + row_of(&at, r, tile) * stride;
        #[unroll]
        for v in 0..comptime!(tile.columns() / tile.vector) {
            let mut neighbours = Vector::<f32, N>::empty();
            #[unroll]
            for e in 0..vector {
                neighbours.insert(e, results[comptime!(result_of(r, v * vector + e, tile))]);
            }
            let c = comptime!(v * vector);
            let column = column_of(&at, c, tile);
            to[(row + column) / vector] = Vector::<E, N>::cast_from(neighbours);
        }
    }
}

/// Where a unit has pairs, four units the eight of a fragment's row: a plane lays out sixteen rows of its results in the stage, and
/// reads them back in vectors.
#[cube]
fn store_fragments<E: Float, N: Size>(
    results: &Array<f32>,
    to: &mut [Vector<E, N>],
    first: usize,
    stride: usize,
    stage: &mut [E],
    #[comptime] tile: Tile,
) {
    let at = place(tile);
    let vector = comptime!(tile.vector);
    let width = comptime!(tile.side / tile.across);
    // A vector more than a row has: rows then begin in different banks.
    let pitch = comptime!(width + tile.vector);
    let mine = UNIT_POS as usize / PLANE * comptime!(16 * pitch);
    let across = comptime!(width / tile.vector);
    let (first_row, first_column) = place_of_plane(&at, tile);
    // Written a pair at a time, and read back a vector at a time; the rest of an index is known when this is compiled.
    let pair = mine / 2 + at.lane / 4 * comptime!(pitch / 2) + at.lane % 4;
    let read = mine / vector + at.lane / across * comptime!(pitch / tile.vector) + at.lane % across;
    let stride = stride / vector;
    let write = (first + first_column) / vector
        + (first_row + at.lane / across) * stride
        + at.lane % across;
    #[unroll]
    for i in 0..comptime!(tile.tall()) {
        {
            let pairs = stage.as_vectorized_mut().with_vector_size_mut::<Const<2>>();
            #[unroll]
            for half in 0..2usize {
                #[unroll]
                for j in 0..comptime!(tile.wide()) {
                    let mut both = Vector::<f32, Const<2>>::empty();
                    #[unroll]
                    for odd in 0..2usize {
                        let from = comptime!(result_of(2 * i + half, 2 * j + odd, tile));
                        both.insert(odd, results[from]);
                    }
                    pairs[pair + comptime!(half * 4 * pitch + 4 * j)] =
                        Vector::<E, Const<2>>::cast_from(both);
                }
            }
        }
        sync_plane();
        {
            let vectors = stage.as_vectorized().with_vector_size::<N>();
            #[unroll]
            for turn in 0..comptime!(16 * width / tile.vector / PLANE) {
                let rows = comptime!(turn * PLANE / across);
                to[write + comptime!(16 * i + rows) * stride] =
                    vectors[read + comptime!(rows * pitch / tile.vector)];
            }
        }
        sync_plane();
    }
}
