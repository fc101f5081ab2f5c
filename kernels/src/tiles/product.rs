//! `results = left · rightᵀ` over a reduced axis, for a tile of each.

use cubecl::prelude::*;

use super::copied::add_copied_slabs;
use super::fragments::multiply_fragments;
use super::results::{of_four, place, result_of};
use super::stage::{Lies, Source, fetch, stash};
use super::{Engine, Tile, warpgroup};

/// Multiplies over `slabs` stages' depths. Result `(r, c)` of a unit is at [`result_of`]`(r, c)`: row
/// [`row_of`](super::row_of)`(r)`, column [`column_of`](super::column_of)`(c)`. The stages have room for [`Tile::stages`] slabs each.
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
    if comptime!(tile.engine == Engine::Wgmma) {
        warpgroup::add_slabs(
            results,
            left,
            left_at,
            right,
            right_at,
            slabs,
            left_stages,
            right_stages,
            left_lies,
            right_lies,
            tile,
        );
    } else if comptime!(tile.ptx) {
        add_copied_slabs(
            results,
            left,
            left_at,
            right,
            right_at,
            slabs,
            left_stages,
            right_stages,
            left_lies,
            right_lies,
            tile,
        );
    } else {
        add_slabs(
            results,
            left,
            left_at,
            right,
            right_at,
            slabs,
            left_stages,
            right_stages,
            left_lies,
            right_lies,
            tile,
        );
    }
}

/// While the planes multiply a slab, the next one waits in registers.
#[cube]
fn add_slabs<E: Float, N: Size>(
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
        if comptime!(tile.engine == Engine::Fma) {
            multiply_fma(
                results,
                &*left_stages,
                left_stage,
                &*right_stages,
                right_stage,
                tile,
            );
        } else {
            multiply_fragments(
                results,
                &*left_stages,
                left_stage,
                &*right_stages,
                right_stage,
                left_lies,
                right_lies,
                tile,
            );
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
