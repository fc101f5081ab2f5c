//! `results = left · rightᵀ` over a reduced axis, for a tile of each.

use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::prelude::*;

use super::{Engine, PLANE, PLANES_DOWN, Tile};

/// How a tile lies in its row-major matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Lies {
    /// `[side, reduced]`
    Rows,
    /// `[reduced, side]`
    Columns,
}

/// Where a tile begins in its matrix, and from one row of the matrix to the next; in vectors.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Source {
    pub base: usize,
    pub stride: usize,
}

/// Where a unit is: its plane in the cube, and itself in a fragment.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Place {
    pub plane_row: usize,
    pub plane_column: usize,
    pub lane: usize,
    /// Units of the same group have results of the same rows,
    pub group: usize,
    /// each of other columns.
    pub member: usize,
}

#[cube]
pub(crate) fn place(#[comptime] tile: Tile) -> Place {
    place_of(UNIT_POS as usize, tile)
}

#[cube]
fn place_of(unit: usize, #[comptime] tile: Tile) -> Place {
    let plane_row = unit / comptime!(PLANE * tile.across);
    let plane_column = unit / PLANE % tile.across;
    let lane = unit % PLANE;
    let (of_eight, of_four) = if comptime!(tile.engine == Engine::Fma) {
        // A GPU reads 16 bytes of sixteen units at once, not of eight, if every two want the same: neighbours do of rows, and units
        // two apart of columns.
        (lane / 2 % 8, lane / 16 * 2 + lane % 2)
    } else {
        (lane / 4, lane % 4)
    };
    Place {
        plane_row,
        plane_column,
        lane,
        group: plane_row * 8 + of_eight,
        member: plane_column * 4 + of_four,
    }
}

/// The row of the tile that results of row `r` of this unit belong to.
#[cube]
pub(crate) fn row_of(at: &Place, #[comptime] r: usize, #[comptime] tile: Tile) -> usize {
    if comptime!(tile.engine == Engine::Fma) {
        of_four(at.group, r)
    } else {
        let fragment = comptime!(r / 2 * 16 + r % 2 * 8);
        at.plane_row * comptime!(tile.side / PLANES_DOWN) + fragment + at.lane / 4
    }
}

/// The column of the tile that results of column `c` of this unit belong to; an odd one is next to the even one before it.
#[cube]
pub(crate) fn column_of(at: &Place, #[comptime] c: usize, #[comptime] tile: Tile) -> usize {
    if comptime!(tile.engine == Engine::Fma) {
        of_four(at.member, c)
    } else {
        let fragment = comptime!(c / 2 * 8 + c % 2);
        at.plane_column * comptime!(tile.side / tile.across) + fragment + at.lane % 4 * 2
    }
}

/// Where a unit has the result of its row `r` and its column `c`.
pub(crate) fn result_of(r: usize, c: usize, tile: Tile) -> usize {
    (r / 2 * tile.wide() + c / 2) * 4 + r % 2 * 2 + c % 2
}

/// Where the results of a plane's fragments begin: row and column of the tile.
#[cube]
pub(crate) fn place_of_plane(at: &Place, #[comptime] tile: Tile) -> (usize, usize) {
    (
        at.plane_row * comptime!(tile.side / PLANES_DOWN),
        at.plane_column * comptime!(tile.side / tile.across),
    )
}

/// Sixteen units, four neighbours each, and again.
#[cube]
fn of_four(unit: usize, #[comptime] number: usize) -> usize {
    unit * 4 + comptime!(number / 4 * 64 + number % 4)
}

/// Multiplies over `slabs` stages' depths. Result `(r, c)` of a unit is at [`result_of`]`(r, c)`: row
/// [`row_of`]`(r)`, column [`column_of`]`(c)`. The stages have room for two slabs each.
#[cube]
pub(crate) fn tile_product<E: Float, N: Size>(
    results: &mut Array<f32>,
    left: &[Vector<E, N>],
    left_at: &Source,
    right: &[Vector<E, N>],
    right_at: &Source,
    slabs: usize,
    left_stages: &mut [E],
    right_stages: &mut [E],
    #[comptime] left_lies: Lies,
    #[comptime] right_lies: Lies,
    #[comptime] tile: Tile,
) {
    #[unroll]
    for i in 0..comptime!(tile.results()) {
        results[i] = 0.0;
    }
    let mut from_left = Array::<Vector<E, N>>::new(comptime!(tile.brought()));
    let mut from_right = Array::<Vector<E, N>>::new(comptime!(tile.brought()));
    let start = 0usize.runtime();
    fetch(&mut from_left, left, left_at, start, left_lies, tile);
    fetch(&mut from_right, right, right_at, start, right_lies, tile);
    stash(left_stages, &from_left, start, left_lies, tile);
    stash(right_stages, &from_right, start, right_lies, tile);
    sync_cube();
    for slab in 0..slabs {
        let more = slab + 1 < slabs;
        if more {
            fetch(&mut from_left, left, left_at, slab + 1, left_lies, tile);
            fetch(&mut from_right, right, right_at, slab + 1, right_lies, tile);
        }
        let left_stage = slab % 2 * comptime!(tile.stage(left_lies));
        let right_stage = slab % 2 * comptime!(tile.stage(right_lies));
        match comptime!(tile.engine) {
            Engine::Mma | Engine::Tf32 => multiply_fragments(
                results,
                &*left_stages,
                left_stage,
                &*right_stages,
                right_stage,
                left_lies,
                right_lies,
                tile,
            ),
            Engine::Fma => multiply_fma(
                results,
                &*left_stages,
                left_stage,
                &*right_stages,
                right_stage,
                tile,
            ),
        }
        if more {
            // Nobody reads this stage since the last barrier.
            let other = (slab + 1) % 2;
            let left_other = other * comptime!(tile.stage(left_lies));
            let right_other = other * comptime!(tile.stage(right_lies));
            stash(left_stages, &from_left, left_other, left_lies, tile);
            stash(right_stages, &from_right, right_other, right_lies, tile);
        }
        sync_cube();
    }
}

/// This unit's part of a slab, into registers. Neighbouring units take neighbouring vectors.
#[cube]
fn fetch<E: Float, N: Size>(
    into: &mut Array<Vector<E, N>>,
    source: &[Vector<E, N>],
    at: &Source,
    slab: usize,
    #[comptime] lies: Lies,
    #[comptime] tile: Tile,
) {
    let first = first_brought(UNIT_POS as usize, lies, tile);
    #[unroll]
    for p in 0..comptime!(tile.brought()) {
        let v = first + p * comptime!(tile.units());
        if brings(v, p, tile) {
            match comptime!(lies) {
                Lies::Rows => {
                    let across = comptime!(tile.depth / tile.vector);
                    into[p] = source[at.base + v / across * at.stride + slab * across + v % across];
                }
                Lies::Columns => {
                    let across = comptime!(tile.side / tile.vector);
                    let row = slab * comptime!(tile.depth) + v / across;
                    into[p] = source[at.base + row * at.stride + v % across];
                }
            }
        }
    }
}

/// The first vector of a slab that a unit brings; the others are as many further as there are units.
#[cube]
fn first_brought(unit: usize, #[comptime] lies: Lies, #[comptime] tile: Tile) -> usize {
    if comptime!(tile.engine == Engine::Fma || lies == Lies::Columns) {
        unit
    } else {
        // Eight units write 128 bytes at once, two rows of a stage. Neighbouring rows, 80 bytes apart, share banks; of four rows the
        // first and the last but one beyond do not: bits 0 and 2 of the row change places.
        let across = comptime!(tile.depth / tile.vector);
        let row = unit / across;
        unit ^ ((row ^ (row / 4)) % 2 * comptime!(5 * across))
    }
}

/// Whether a stage has this vector: a small one has fewer than there are units.
#[cube]
fn brings(v: usize, #[comptime] p: usize, #[comptime] tile: Tile) -> bool {
    if comptime!((p + 1) * tile.units() <= tile.vectors()) {
        true.runtime()
    } else {
        v < comptime!(tile.vectors())
    }
}

/// This unit's part of a slab, from registers into the stage at `start`.
#[cube]
fn stash<E: Float, N: Size>(
    stages: &mut [E],
    from: &Array<Vector<E, N>>,
    start: usize,
    #[comptime] lies: Lies,
    #[comptime] tile: Tile,
) {
    let first = first_brought(UNIT_POS as usize, lies, tile);
    #[unroll]
    for p in 0..comptime!(tile.brought()) {
        let v = first + p * comptime!(tile.units());
        if brings(v, p, tile) {
            if comptime!(tile.engine == Engine::Fma && lies == Lies::Rows) {
                // A step's elements next to each other.
                let across = comptime!(tile.depth / tile.vector);
                let pitch = comptime!(tile.pitch(lies));
                #[unroll]
                for lane in 0..comptime!(tile.vector) {
                    let step = v % across * comptime!(tile.vector) + lane;
                    stages[start + step * pitch + v / across] = from[p].extract(lane);
                }
            } else {
                let to = start + stashed(v, lies, tile);
                if comptime!(tile.views) {
                    let vectors = stages.as_vectorized_mut().with_vector_size_mut::<N>();
                    vectors[to / comptime!(tile.vector)] = from[p];
                } else {
                    #[unroll]
                    for lane in 0..comptime!(tile.vector) {
                        stages[to + lane] = from[p].extract(lane);
                    }
                }
            }
        }
    }
}

/// Where vector `v` of a slab begins in its stage, of rows as the matrix has them.
#[cube]
fn stashed(v: usize, #[comptime] lies: Lies, #[comptime] tile: Tile) -> usize {
    let across = match comptime!(lies) {
        Lies::Rows => comptime!(tile.depth / tile.vector),
        Lies::Columns => comptime!(tile.side / tile.vector),
    };
    v / across * comptime!(tile.pitch(lies)) + v % across * comptime!(tile.vector)
}

/// Where element `(row, k)` of a tile is in its stage.
#[cube]
fn staged(
    start: usize,
    row: usize,
    k: usize,
    #[comptime] lies: Lies,
    #[comptime] tile: Tile,
) -> usize {
    let pitch = comptime!(tile.pitch(lies));
    match comptime!(lies) {
        Lies::Rows => start + row * pitch + k,
        Lies::Columns => start + k * pitch + row,
    }
}

/// `mma.m16n8k16` of 16 bits, or `mma.m16n8k8` of TF32: fragments are two pieces of 16 bytes deep.
#[cube]
fn multiply_fragments<E: Float>(
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
            let of = MatrixIdent::B;
            rights.push(fragments::<E, NA>(
                &mma,
                of,
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
            let of = MatrixIdent::A;
            let lefts =
                fragments::<E, NA>(&mma, of, left, left_stage, row, k, at.lane, left_lies, tile);
            #[unroll]
            for j in 0..comptime!(tile.wide()) {
                let pair = rights.index(comptime!(j / 2));
                let mut both = Array::<Vector<E, NA>>::new(2usize);
                both[0] = pair[comptime!(j % 2 * 2)];
                both[1] = pair[comptime!(j % 2 * 2 + 1)];
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
    #[comptime] of: MatrixIdent,
    stages: &[E],
    start: usize,
    row: usize,
    k: usize,
    lane: usize,
    #[comptime] lies: Lies,
    #[comptime] tile: Tile,
) -> Array<Vector<E, NA>> {
    let piece = comptime!(tile.piece());
    // Of the left operand the second matrix is down, of the right one it is deep.
    let of_left = comptime!(of == MatrixIdent::A);
    if comptime!(lies == Lies::Rows || tile.engine == Engine::Mma) {
        let (second, third) = (lane / 8 % 2, lane / 16);
        let (down, deep) = if of_left {
            (second, third)
        } else {
            (third, second)
        };
        let (row, k) = (row + down * 8, k + deep * piece);
        let from = match comptime!(lies) {
            Lies::Rows => staged(start, row + lane % 8, k, lies, tile),
            Lies::Columns => staged(start, row, k + lane % 8, lies, tile),
        };
        let transposes = comptime!(lies == Lies::Columns);
        mma.load_matrix::<E, NA>(&stages[from..from + piece], of, 4usize, transposes)
    } else {
        let mut words = Array::<Vector<E, NA>>::new(4usize);
        #[unroll]
        for word in 0..4usize {
            let (second, third) = comptime!((word % 2, word / 2));
            let (down, deep) = comptime!(if of_left {
                (second, third)
            } else {
                (third, second)
            });
            let (row, k) = (row + lane / 4 + down * 8, k + lane % 4 + deep * piece);
            let from = staged(start, row, k, lies, tile);
            words[word] = Vector::<E, NA>::cast_from(stages[from]);
        }
        words
    }
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

/// Steps of multiply-adds whose elements may be read ahead.
const STEPS_AHEAD: usize = 2;

/// Multiply-adds: a step at a time, a unit multiplies its rows' elements with its columns'.
#[cube]
fn multiply_fma<E: Float>(
    results: &mut Array<f32>,
    left: &[E],
    left_stage: usize,
    right: &[E],
    right_stage: usize,
    #[comptime] tile: Tile,
) {
    let at = place(tile);
    let rows = comptime!(tile.rows());
    let columns = comptime!(tile.columns());
    let pitch = comptime!(tile.pitch(Lies::Rows));
    #[unroll]
    for step in 0..comptime!(tile.depth) {
        if comptime!(tile.views && step > 0 && step % STEPS_AHEAD == 0) {
            // A compiler would read all steps' elements ahead, into registers that a second cube needs.
            sync_plane();
        }
        let mut of_rows = Array::<f32>::new(rows);
        let mut of_columns = Array::<f32>::new(columns);
        let start = step * pitch;
        fours(&mut of_rows, left, left_stage + start, at.group, rows, tile);
        fours(
            &mut of_columns,
            right,
            right_stage + start,
            at.member,
            columns,
            tile,
        );
        #[unroll]
        for r in 0..rows {
            #[unroll]
            for c in 0..columns {
                let out = comptime!(result_of(r, c, tile));
                results[out] = fma(of_rows[r], of_columns[c], results[out]);
            }
        }
    }
}

/// The elements [`of_four`] of a step that begins at `start`.
#[cube]
fn fours<E: Float>(
    into: &mut Array<f32>,
    stages: &[E],
    start: usize,
    unit: usize,
    #[comptime] count: usize,
    #[comptime] tile: Tile,
) {
    if comptime!(tile.views) {
        let vectors = stages.as_vectorized().with_vector_size::<Const<4>>();
        #[unroll]
        for four in 0..comptime!(count / 4) {
            let vector = vectors[start / 4 + unit + comptime!(four * 16)];
            #[unroll]
            for e in 0..4usize {
                into[comptime!(four * 4 + e)] = f32::cast_from(vector.extract(e));
            }
        }
    } else {
        #[unroll]
        for number in 0..count {
            into[number] = f32::cast_from(stages[start + of_four(unit, number)]);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use cubecl::ir::{ElemType, FloatKind};

    use super::*;

    fn tiles() -> [Tile; 4] {
        let tile = |engine, kind: FloatKind, is_known| {
            let packed = ElemType::Float(kind);
            Tile::with_vectors(engine, packed, 16 / packed.size(), is_known)
        };
        [
            tile(Engine::Mma, FloatKind::BF16, true),
            tile(Engine::Tf32, FloatKind::TF32, true),
            tile(Engine::Fma, FloatKind::F32, true),
            tile(Engine::Fma, FloatKind::F32, false),
        ]
    }

    /// The tiles of tensor cores, in both ways to lie.
    fn stages() -> impl Iterator<Item = (Tile, Lies)> {
        let on_tensor_cores = tiles()
            .into_iter()
            .filter(|tile| tile.engine != Engine::Fma);
        on_tensor_cores.flat_map(|tile| [Lies::Rows, Lies::Columns].map(|lies| (tile, lies)))
    }

    #[test]
    fn every_result_has_one_owner_and_a_group_shares_its_rows() {
        for tile in tiles() {
            let mut owned = HashSet::new();
            let mut rows_of_groups = HashMap::new();
            for unit in 0..tile.units() {
                let at = place_of(unit, tile);
                let rows: Vec<_> = (0..tile.rows()).map(|r| row_of(&at, r, tile)).collect();
                for &row in &rows {
                    let columns = (0..tile.columns()).map(|c| column_of(&at, c, tile));
                    assert!(
                        columns
                            .into_iter()
                            .all(|column| owned.insert((row, column)))
                    );
                }
                let of_group = rows_of_groups
                    .entry(at.group)
                    .or_insert_with(|| rows.clone());
                assert_eq!(*of_group, rows, "{tile:?}, unit {unit}");
                assert!(at.member < tile.sharing());
            }
            assert_eq!(owned.len(), tile.side * tile.side, "{tile:?}");
            assert_eq!(rows_of_groups.len() * tile.sharing(), tile.units());
        }
    }

    #[test]
    fn every_two_units_read_the_same_for_multiply_adds() {
        for tile in tiles()
            .into_iter()
            .filter(|tile| tile.engine == Engine::Fma)
        {
            for unit in 0..tile.units() {
                let at = place_of(unit, tile);
                assert_eq!(at.group, place_of(unit ^ 1, tile).group);
                assert_eq!(at.member, place_of(unit ^ 2, tile).member);
            }
        }
    }

    fn brought_by(unit: usize, tile: Tile, lies: Lies) -> impl Iterator<Item = usize> {
        let first = first_brought(unit, lies, tile);
        (0..tile.brought()).map(move |p| first + p * tile.units())
    }

    /// The four banks of the 16 bytes from an element on.
    fn banks(element: usize, tile: Tile) -> [usize; 4] {
        let first = element * tile.packed.size() / 4;
        [0, 1, 2, 3].map(|word| (first + word) % 32)
    }

    fn all_banks_once(elements: impl Iterator<Item = usize>, tile: Tile) -> bool {
        let mut used: Vec<_> = elements.flat_map(|element| banks(element, tile)).collect();
        used.sort();
        used == Vec::from_iter(0..32)
    }

    #[test]
    fn every_vector_is_brought_once() {
        for (tile, lies) in stages() {
            let mut all: Vec<_> = (0..tile.units())
                .flat_map(|unit| brought_by(unit, tile, lies))
                .collect();
            all.sort();
            assert_eq!(all, Vec::from_iter(0..tile.vectors()), "{tile:?} {lies:?}");
        }
    }

    /// A GPU writes and reads 16 bytes of eight units at a time, as long as they are in different banks.
    #[test]
    fn eight_units_write_to_all_banks() {
        for (tile, lies) in stages() {
            for first in (0..tile.units()).step_by(8) {
                for p in 0..tile.brought() {
                    let of_unit = |unit| brought_by(unit, tile, lies).nth(p).unwrap();
                    let eight = (first..first + 8).map(|unit| stashed(of_unit(unit), lies, tile));
                    assert!(all_banks_once(eight, tile), "{tile:?} {lies:?} {first} {p}");
                }
            }
        }
    }

    #[test]
    fn ldmatrix_reads_eight_rows_from_all_banks() {
        for (tile, lies) in
            stages().filter(|(tile, lies)| tile.engine == Engine::Mma || *lies == Lies::Rows)
        {
            for row in (0..tile.side).step_by(8) {
                for k in (0..tile.depth).step_by(tile.piece()) {
                    let eight = (0..8).map(|of_eight| match lies {
                        Lies::Rows => staged(0, row + of_eight, k, lies, tile),
                        Lies::Columns => staged(0, row, k + of_eight, lies, tile),
                    });
                    assert!(all_banks_once(eight, tile), "{tile:?} {lies:?} {row} {k}");
                }
            }
        }
    }
}
