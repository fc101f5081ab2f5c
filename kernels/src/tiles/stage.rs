//! A tile on its way to shared memory, a slab at a time.

use cubecl::prelude::*;

use super::{Engine, Tile};

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

/// This unit's part of a slab, into registers. Neighbouring units take neighbouring vectors.
#[cube]
pub(super) fn fetch<E: Float, N: Size>(
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
            into[p] = source[fetched(v, at, slab, lies, tile)];
        }
    }
}

/// Where vector `v` of a slab is in its matrix.
#[cube]
pub(super) fn fetched(
    v: usize,
    at: &Source,
    slab: usize,
    #[comptime] lies: Lies,
    #[comptime] tile: Tile,
) -> usize {
    match comptime!(lies) {
        Lies::Rows => {
            let across = comptime!(tile.depth / tile.vector);
            at.base + v / across * at.stride + slab * across + v % across
        }
        Lies::Columns => {
            let across = comptime!(tile.side / tile.vector);
            let row = slab * comptime!(tile.depth) + v / across;
            at.base + row * at.stride + v % across
        }
    }
}

/// The first vector of a slab that a unit brings; the next ones follow at a distance of `tile.units()`.
#[cube]
pub(super) fn first_brought(unit: usize, #[comptime] lies: Lies, #[comptime] tile: Tile) -> usize {
    if comptime!(matches!(tile.engine, Engine::Fma | Engine::Wgmma) || lies == Lies::Columns) {
        unit
    } else {
        // Eight units write 128 bytes at once, two rows of a stage. Neighbouring rows, 80 bytes apart, share banks, and rows four apart do
        // not. So bits 0 and 2 of the row change places.
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
pub(super) fn stash<E: Float, N: Size>(
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
pub(super) fn stashed(v: usize, #[comptime] lies: Lies, #[comptime] tile: Tile) -> usize {
    let across = match comptime!(lies) {
        Lies::Rows => comptime!(tile.depth / tile.vector),
        Lies::Columns => comptime!(tile.side / tile.vector),
    };
    if comptime!(tile.engine == Engine::Wgmma) {
        v % across * comptime!(tile.pitch(lies)) + v / across * comptime!(tile.vector)
    } else {
        v / across * comptime!(tile.pitch(lies)) + v % across * comptime!(tile.vector)
    }
}

/// Where element `(row, k)` of a tile is in its stage.
#[cube]
pub(super) fn staged(
    start: usize,
    row: usize,
    k: usize,
    #[comptime] lies: Lies,
    #[comptime] tile: Tile,
) -> usize {
    let pitch = comptime!(tile.pitch(lies));
    let (outer, inner) = match comptime!(lies) {
        Lies::Rows => (row, k),
        Lies::Columns => (k, row),
    };
    if comptime!(tile.engine == Engine::Wgmma) {
        let piece = comptime!(tile.piece());
        start + inner / piece * pitch + outer * piece + inner % piece
    } else {
        start + outer * pitch + inner
    }
}

/// Slabs in shared memory without a GPU.
#[cfg(test)]
pub(super) mod emulated {
    use super::*;

    /// An element of either operand: small and whole, so that sums are exact.
    pub(in crate::tiles) fn element(row: usize, k: usize) -> f32 {
        ((row * 7 + k * 5 + row * k) % 97) as f32 - 48.0
    }

    /// A slab in shared memory, as the units bring it.
    pub(in crate::tiles) fn stage(lies: Lies, tile: Tile) -> Vec<f32> {
        let mut stage = vec![f32::NAN; tile.stage(lies)];
        for unit in 0..tile.units() {
            for p in 0..tile.brought() {
                let v = first_brought(unit, lies, tile) + p * tile.units();
                for lane in 0..tile.vector {
                    let along = v * tile.vector + lane;
                    stage[stashed(v, lies, tile) + lane] = match lies {
                        Lies::Rows => element(along / tile.depth, along % tile.depth),
                        Lies::Columns => element(along % tile.side, along / tile.side),
                    };
                }
            }
        }
        stage
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tiles::of_every_engine;

    /// The tiles of tensor cores, in both ways to lie.
    fn stages() -> impl Iterator<Item = (Tile, Lies)> {
        let on_tensor_cores = of_every_engine()
            .into_iter()
            .filter(|tile| tile.engine != Engine::Fma);
        on_tensor_cores.flat_map(|tile| [Lies::Rows, Lies::Columns].map(|lies| (tile, lies)))
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
    fn tensor_cores_read_eight_rows_from_all_banks() {
        for (tile, lies) in
            stages().filter(|(tile, lies)| tile.engine != Engine::Tf32 || *lies == Lies::Rows)
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
