//! Products of tiles on Hopper's tensor cores: four planes together begin `wgmma`, which reads both operands from shared memory.

use cubecl::prelude::*;

use super::Tile;
use super::copied::{await_copies, copy, end_copies};
#[cfg(feature = "cuda")]
use super::ptx::{Operands, register};
use super::stage::{Lies, Source};
#[cfg(feature = "cuda")]
use super::wgmma::multiplication;

/// Rows that one `wgmma` multiplies: sixteen of each of four planes.
pub(super) const ROWS: usize = 64;

/// Adds the products of all slabs to the results.
#[cube]
pub(super) fn add_slabs<E: Float, N: Size>(
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
    let ahead = comptime!(tile.stages() - 1);
    #[unroll]
    for slab in 0..ahead {
        let slab = slab.runtime();
        if slab < slabs {
            copy(left_stages, slab, left, left_at, slab, left_lies, tile);
            copy(right_stages, slab, right, right_at, slab, right_lies, tile);
        }
        end_copies();
    }
    for slab in 0..slabs {
        // What was copied for later slabs may be on its way.
        await_copies(comptime!(ahead - 1), true);
        sync_cube();
        let stage = slab % comptime!(tile.stages());
        let left_stage = stage * comptime!(tile.stage(left_lies));
        let right_stage = stage * comptime!(tile.stage(right_lies));
        let piece = comptime!(tile.piece());
        multiply(
            results,
            &left_stages[left_stage..left_stage + piece],
            &right_stages[right_stage..right_stage + piece],
            left_lies,
            right_lies,
            tile,
        );
        // Into the stage of the slab before, which every plane had multiplied before the barrier.
        let later = slab + ahead;
        let to = later % comptime!(tile.stages());
        if later < slabs {
            copy(left_stages, to, left, left_at, later, left_lies, tile);
            copy(right_stages, to, right, right_at, later, right_lies, tile);
        }
        end_copies();
        await_products(results, tile);
    }
    sync_cube();
}

/// Begins to multiply the slabs that begin there. Nobody may write them, nor touch the results, before [`await_products`].
#[cube]
fn multiply<E: Float>(
    results: &mut Array<f32>,
    left: &[E],
    right: &[E],
    #[comptime] left_lies: Lies,
    #[comptime] right_lies: Lies,
    #[comptime] tile: Tile,
) {
    intrinsic!(|scope| {
        #[cfg(feature = "cuda")]
        {
            // SAFETY: only the address is taken.
            let (left, right) = unsafe {
                (
                    *left.__expand_as_ptr_method(scope),
                    *right.__expand_as_ptr_method(scope),
                )
            };
            let operands = Operands {
                sums: Some((results.__extract_list(scope), tile.results())),
                shared: vec![left.value(scope), right.value(scope)],
                ..Default::default()
            };
            register(
                scope,
                &multiplication(left_lies, right_lies, tile),
                operands,
            );
        }
    })
}

/// Waits for this plane's products. If they ran on, ptxas would move their sums between registers in the loop, and then let no products
/// overlap at all.
#[cube]
fn await_products(results: &mut Array<f32>, #[comptime] tile: Tile) {
    intrinsic!(|scope| {
        #[cfg(feature = "cuda")]
        {
            let operands = Operands {
                sums: Some((results.__extract_list(scope), tile.results())),
                ..Default::default()
            };
            register(scope, "wgmma.wait_group.sync.aligned 0;", operands);
        }
    })
}
