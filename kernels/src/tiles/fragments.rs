//! Fragments of a slab multiplied on tensor cores.

use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::prelude::*;

use super::results::{place, place_of_plane};
use super::stage::{Lies, staged};
use super::{Engine, Tile};

/// `mma.m16n8k16` of 16 bits, or `mma.m16n8k8` of TF32: fragments are two pieces of 16 bytes deep.
#[cube]
pub(super) fn multiply_fragments<E: Float>(
    results: &mut Array<f32>,
    left: &[E],
    left_stage: usize,
    right: &[E],
    right_stage: usize,
    #[comptime] left_lies: Lies,
    #[comptime] right_lies: Lies,
    #[comptime] tile: Tile,
) {
    let at = place(tile);
    let deep = comptime!(2 * tile.piece());
    let mma = MmaDefinition::<E, E, f32>::new(16usize, 8usize, deep);
    let size!(NA) = mma.vector_size(MatrixIdent::A);
    let size!(NC) = mma.vector_size(MatrixIdent::Accumulator);
    let (first_row, first_column) = place_of_plane(&at, tile);
    #[unroll]
    for step in 0..comptime!(tile.depth / deep) {
        let k = step * deep;
        let mut rights = Sequence::<Array<Vector<E, NA>>>::new();
        #[unroll]
        for pair in 0..comptime!(tile.wide() / 2) {
            let column = first_column + pair * 16;
            rights.push(fragments::<E, NA>(
                &mma,
                false,
                right,
                right_stage,
                column,
                k,
                at.lane,
                right_lies,
                tile,
            ));
        }
        #[unroll]
        for i in 0..comptime!(tile.tall()) {
            let row = first_row + i * 16;
            let lefts = fragments::<E, NA>(
                &mma, true, left, left_stage, row, k, at.lane, left_lies, tile,
            );
            #[unroll]
            for j in 0..comptime!(tile.wide()) {
                let pair = rights.index(comptime!(j / 2));
                let mut both = Array::<Vector<E, NA>>::new(2usize);
                both[0] = pair[comptime!(matrix_of_column(j, 0))];
                both[1] = pair[comptime!(matrix_of_column(j, 1))];
                let sums = gather::<NC>(&*results, comptime!((i * tile.wide() + j) * 4));
                let sums = mma.execute(&lefts, &both, &sums);
                scatter::<NC>(results, &sums, comptime!((i * tile.wide() + j) * 4));
            }
        }
    }
}

/// Four matrices of eight rows by a piece of 16 bytes, two down and two deep, of which a unit has a word each: a fragment of the left
/// operand, or two of the right one (PTX ISA, "Matrix fragments for mma"). `ldmatrix` transposes 16 bits only; TF32 that lies in
/// columns is read as scalars.
#[cube]
fn fragments<E: Float, NA: Size>(
    mma: &MmaDefinition<E, E, f32>,
    #[comptime] of_left: bool,
    stages: &[E],
    start: usize,
    row: usize,
    k: usize,
    lane: usize,
    #[comptime] lies: Lies,
    #[comptime] tile: Tile,
) -> Array<Vector<E, NA>> {
    let ident = comptime!(if of_left {
        MatrixIdent::A
    } else {
        MatrixIdent::B
    });
    if comptime!(loads_matrices(lies, tile)) {
        let from = address_of_lane(start, row, k, lane, of_left, lies, tile);
        let transposes = comptime!(lies == Lies::Columns);
        let to = from + comptime!(tile.piece());
        mma.load_matrix::<E, NA>(&stages[from..to], ident, 4usize, transposes)
    } else {
        let mut words = Array::<Vector<E, NA>>::new(4usize);
        #[unroll]
        for word in 0..4usize {
            let from = element_of_lane(start, row, k, lane, word, of_left, lies, tile);
            words[word] = Vector::<E, NA>::cast_from(stages[from]);
        }
        words
    }
}

/// Whether `ldmatrix` brings fragments of a tile that lies so.
fn loads_matrices(lies: Lies, tile: Tile) -> bool {
    lies == Lies::Rows || tile.engine == Engine::Mma
}

/// The matrix that has column fragment `j` of its pair, at the first or the second depth.
fn matrix_of_column(j: usize, depth: usize) -> usize {
    j % 2 * 2 + depth
}

/// The address that a lane gives to `ldmatrix`, which takes those of a matrix from eight lanes in turn. The second matrix is the one
/// below in the left operand, and the next in depth in the right one.
#[cube]
fn address_of_lane(
    start: usize,
    row: usize,
    k: usize,
    lane: usize,
    #[comptime] of_left: bool,
    #[comptime] lies: Lies,
    #[comptime] tile: Tile,
) -> usize {
    let (second, third) = (lane / 8 % 2, lane / 16);
    let (down, deep) = if of_left {
        (second, third)
    } else {
        (third, second)
    };
    let (row, k) = (row + down * 8, k + deep * comptime!(tile.piece()));
    match comptime!(lies) {
        Lies::Rows => staged(start, row + lane % 8, k, lies, tile),
        Lies::Columns => staged(start, row, k + lane % 8, lies, tile),
    }
}

/// Where a lane's element of matrix `word` is, in TF32.
#[cube]
fn element_of_lane(
    start: usize,
    row: usize,
    k: usize,
    lane: usize,
    #[comptime] word: usize,
    #[comptime] of_left: bool,
    #[comptime] lies: Lies,
    #[comptime] tile: Tile,
) -> usize {
    let (down, deep) = comptime!(if of_left {
        (word % 2, word / 2)
    } else {
        (word / 2, word % 2)
    });
    let (row, k) = (row + down * 8, k + deep * comptime!(tile.piece()));
    staged(start, row + lane / 4, k + lane % 4, lies, tile)
}

#[cube]
fn gather<NC: Size>(results: &Array<f32>, #[comptime] first: usize) -> Array<Vector<f32, NC>> {
    let mut sums = Array::<Vector<f32, NC>>::new(2usize);
    #[unroll]
    for half in 0..2usize {
        let mut sum = Vector::<f32, NC>::empty();
        sum.insert(0usize, results[comptime!(first + 2 * half)]);
        sum.insert(1usize, results[comptime!(first + 2 * half + 1)]);
        sums[half] = sum;
    }
    sums
}

#[cube]
fn scatter<NC: Size>(
    results: &mut Array<f32>,
    sums: &Array<Vector<f32, NC>>,
    #[comptime] first: usize,
) {
    #[unroll]
    for half in 0..2usize {
        results[comptime!(first + 2 * half)] = sums[half].extract(0usize);
        results[comptime!(first + 2 * half + 1)] = sums[half].extract(1usize);
    }
}

#[cfg(test)]
mod tests {
    use super::super::results::{column_of, place_of, result_of, row_of};
    use super::super::stage::emulated::{element, stage};
    use super::super::{PLANE, of_every_engine};
    use super::*;

    /// Four matrices of eight rows by 16 bytes, of which each lane gets a word: a neighbour or two of row `lane / 4` (PTX ISA, "ldmatrix").
    fn matrices(
        stage: &[f32],
        row: usize,
        k: usize,
        of_left: bool,
        lies: Lies,
        tile: Tile,
    ) -> Vec<Vec<Vec<f32>>> {
        let piece = tile.piece();
        let mut matrices = vec![vec![vec![f32::NAN; piece]; 8]; 4];
        let address = |lane| address_of_lane(0, row, k, lane, of_left, lies, tile);
        for lane in 0..PLANE {
            for matrix in 0..4 {
                for e in 0..piece / 4 {
                    let column = lane % 4 * (piece / 4) + e;
                    let from = match lies {
                        _ if !loads_matrices(lies, tile) => {
                            element_of_lane(0, row, k, lane, matrix, of_left, lies, tile)
                        }
                        Lies::Rows => address(matrix * 8 + lane / 4) + column,
                        Lies::Columns => address(matrix * 8 + column) + lane / 4,
                    };
                    matrices[matrix][lane / 4][column] = stage[from];
                }
            }
        }
        matrices
    }

    /// What tensor cores do, on the addresses that the kernel gives them. That its text has these instructions, transposed or not, is for
    /// the compile proof; only their execution needs an NVIDIA GPU.
    #[test]
    fn emulated_tensor_cores_multiply_two_tiles() {
        for tile in of_every_engine()
            .into_iter()
            .filter(|tile| matches!(tile.engine, Engine::Mma | Engine::Tf32))
        {
            for left_lies in [Lies::Rows, Lies::Columns] {
                for right_lies in [Lies::Rows, Lies::Columns] {
                    let left = stage(left_lies, tile);
                    let right = stage(right_lies, tile);
                    for unit in 0..tile.units() {
                        check_unit(unit, &left, left_lies, &right, right_lies, tile);
                    }
                }
            }
        }
    }

    /// The results of one unit, whose lane has rows `lane / 4` and columns `lane % 4 · 2` of its plane's fragments.
    fn check_unit(
        unit: usize,
        left: &[f32],
        left_lies: Lies,
        right: &[f32],
        right_lies: Lies,
        tile: Tile,
    ) {
        let at = place_of(unit, tile);
        let (first_row, first_column) = place_of_plane(&at, tile);
        let deep = 2 * tile.piece();
        let mut results = vec![0.0; tile.results()];
        for k in (0..tile.depth).step_by(deep) {
            for i in 0..tile.tall() {
                let lefts = matrices(left, first_row + i * 16, k, true, left_lies, tile);
                for j in 0..tile.wide() {
                    let pair = first_column + j / 2 * 16;
                    let rights = matrices(right, pair, k, false, right_lies, tile);
                    for result in 0..4 {
                        // Of the left fragment the second matrix is below, and the third is deeper.
                        let product = |depth: usize| -> f32 {
                            let row = &lefts[result / 2 + 2 * depth][at.lane / 4];
                            let column =
                                &rights[matrix_of_column(j, depth)][at.lane % 4 * 2 + result % 2];
                            row.iter().zip(column).map(|(a, b)| a * b).sum()
                        };
                        results[(i * tile.wide() + j) * 4 + result] += product(0) + product(1);
                    }
                }
            }
        }
        for r in 0..tile.rows() {
            for c in 0..tile.columns() {
                let (row, column) = (row_of(&at, r, tile), column_of(&at, c, tile));
                let product = |k| element(row, k) * element(column, k);
                let expected: f32 = (0..tile.depth).map(product).sum();
                assert_eq!(
                    results[result_of(r, c, tile)],
                    expected,
                    "{tile:?}, unit {unit}"
                );
            }
        }
    }
}
