//! A tile of results on its way to memory, in whole vectors.

use cubecl::prelude::*;

use super::results::{Place, column_of, place, place_of_plane, result_of, row_of};
use super::{Engine, PLANE, Tile};

/// Rounds the results of a tile into rows of `stride` elements from `first` on. The stage must be free, and have room for [`Tile::stages`] slabs, and before
/// it is used again all planes have to meet.
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
    let stride = stride / comptime!(tile.vector);
    let path = path_of_unit(&at, UNIT_POS as usize / PLANE, first, stride, tile);
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
                    pairs[path.pair + comptime!(further_pair(half, j, tile))] =
                        Vector::<E, Const<2>>::cast_from(both);
                }
            }
        }
        sync_plane();
        {
            let vectors = stage.as_vectorized().with_vector_size::<N>();
            #[unroll]
            for turn in 0..comptime!(turns(tile)) {
                let (rows, read) = comptime!(further_vector(turn, tile));
                to[path.write + comptime!(i * tile.apart() + rows) * stride] =
                    vectors[path.read + read];
            }
        }
        sync_plane();
    }
}

/// The way of a unit's results through the stage: the first pair that it writes, the first vector that it reads there, and where that goes.
/// What is added for further ones is known when this is compiled.
#[derive(CubeType, Clone, Copy)]
struct Path {
    pair: usize,
    read: usize,
    write: usize,
}

/// Elements from a row of a plane's part of the stage to the next: a vector more than it has, so that rows begin in different banks.
fn pitch(tile: Tile) -> usize {
    tile.side / tile.across + tile.vector
}

/// Vectors of a row of a plane's results.
fn across(tile: Tile) -> usize {
    tile.side / tile.across / tile.vector
}

/// Vectors of sixteen rows that a unit moves.
fn turns(tile: Tile) -> usize {
    16 * across(tile) / PLANE
}

/// From a unit's first pair to that of the fragment's upper or lower half in column fragment `j`.
fn further_pair(half: usize, j: usize, tile: Tile) -> usize {
    half * 4 * pitch(tile) + 4 * j
}

/// How many rows further a unit's next vectors are, and how many vectors further in the stage.
fn further_vector(turn: usize, tile: Tile) -> (usize, usize) {
    let rows = turn * PLANE / across(tile);
    (rows, rows * pitch(tile) / tile.vector)
}

#[cube]
fn path_of_unit(
    at: &Place,
    plane: usize,
    first: usize,
    stride: usize, // in vectors
    #[comptime] tile: Tile,
) -> Path {
    let vector = comptime!(tile.vector);
    let mine = plane * comptime!(16 * pitch(tile));
    let (row, column) = (
        at.lane / comptime!(across(tile)),
        at.lane % comptime!(across(tile)),
    );
    let (first_row, first_column) = place_of_plane(at, tile);
    Path {
        pair: mine / 2 + at.lane / 4 * comptime!(pitch(tile) / 2) + at.lane % 4,
        read: mine / vector + row * comptime!(pitch(tile) / tile.vector) + column,
        write: (first + first_column) / vector + (first_row + row) * stride + column,
    }
}

#[cfg(test)]
mod tests {
    use super::super::results::place_of;
    use super::super::{Lies, of_every_engine};
    use super::*;

    /// Every result of a tile gets to its place in the matrix, and nothing else is written.
    #[test]
    fn fragments_of_a_tile_go_where_their_rows_and_columns_are() {
        let on_tensor_cores = |tile: &Tile| tile.engine != Engine::Fma;
        for tile in of_every_engine().into_iter().filter(on_tensor_cores) {
            // The second tile down and the third across, of a matrix of five tiles a row.
            let stride = 5 * tile.side;
            let first = tile.side * stride + 2 * tile.side;
            let place = |unit| place_of(unit, tile);
            let path = |unit| {
                path_of_unit(
                    &place(unit),
                    unit / PLANE,
                    first,
                    stride / tile.vector,
                    tile,
                )
            };
            let mut stage = vec![None; tile.stages() * tile.stage(Lies::Rows)];
            let mut matrix = vec![None; 3 * tile.side * stride];
            for i in 0..tile.tall() {
                for unit in 0..tile.units() {
                    for (half, j) in
                        (0..2).flat_map(|half| (0..tile.wide()).map(move |j| (half, j)))
                    {
                        for odd in 0..2 {
                            let row = row_of(&place(unit), 2 * i + half, tile);
                            let column = column_of(&place(unit), 2 * j + odd, tile);
                            let pair = path(unit).pair + further_pair(half, j, tile);
                            stage[2 * pair + odd] = Some((row, column));
                        }
                    }
                }
                for unit in 0..tile.units() {
                    for turn in 0..turns(tile) {
                        let (rows, read) = further_vector(turn, tile);
                        for e in 0..tile.vector {
                            let to = path(unit).write
                                + (i * tile.apart() + rows) * (stride / tile.vector);
                            let slot = &mut matrix[to * tile.vector + e];
                            assert_eq!(*slot, None, "{tile:?}, unit {unit} writes again");
                            *slot = stage[(path(unit).read + read) * tile.vector + e];
                        }
                    }
                }
            }
            for (at, found) in matrix.into_iter().enumerate() {
                let (row, column) = (at / stride, at % stride);
                let of_tile = |at: usize, tiles: usize| at.checked_sub(tiles * tile.side);
                let expected = of_tile(row, 1).zip(of_tile(column, 2));
                let inside =
                    |(row, column): &(usize, usize)| *row < tile.side && *column < tile.side;
                assert_eq!(
                    found,
                    expected.filter(inside),
                    "{tile:?}: row {row}, column {column}"
                );
            }
        }
    }
}
