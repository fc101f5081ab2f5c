//! Products of tiles on Hopper's tensor cores: four planes together begin `wgmma`, which reads both operands from shared memory, while
//! `cp.async` brings later slabs there.

use cubecl::prelude::*;

use super::Tile;
#[cfg(feature = "cuda")]
use super::ptx::{Operands, PtxOp};
use super::stage::{Lies, Source, fetched, first_brought, stashed};
#[cfg(feature = "cuda")]
use super::wgmma::multiplication;

/// Rows that one `wgmma` multiplies: sixteen of each of four planes.
pub(super) const ROWS: usize = 64;
/// Slabs in shared memory: one that is multiplied, and later ones on their way.
pub(super) const STAGES: usize = 4;
const AHEAD: usize = STAGES - 1;

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
    #[unroll]
    for slab in 0..AHEAD {
        let slab = slab.runtime();
        if slab < slabs {
            copy(left_stages, left, left_at, slab, left_lies, tile);
            copy(right_stages, right, right_at, slab, right_lies, tile);
        }
        end_copies();
    }
    for slab in 0..slabs {
        // What was copied for later slabs may be on its way.
        await_copies(comptime!(AHEAD - 1));
        sync_cube();
        let stage = slab % comptime!(STAGES);
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
        let later = slab + comptime!(AHEAD);
        if later < slabs {
            copy(left_stages, left, left_at, later, left_lies, tile);
            copy(right_stages, right, right_at, later, right_lies, tile);
        }
        end_copies();
        // Left to run on, its sums would be moved between registers in the loop, and ptxas would not let products overlap at all.
        await_products(results, tile);
    }
    sync_cube();
}

/// Begins to copy this unit's part of a slab into its stage.
#[cube]
fn copy<E: Float, N: Size>(
    stages: &mut [E],
    source: &[Vector<E, N>],
    at: &Source,
    slab: usize,
    #[comptime] lies: Lies,
    #[comptime] tile: Tile,
) {
    let start = slab % comptime!(STAGES) * comptime!(tile.stage(lies));
    let first = first_brought(UNIT_POS as usize, lies, tile);
    #[unroll]
    for p in 0..comptime!(tile.brought()) {
        let v = first + p * comptime!(tile.units());
        let from = fetched(v, at, slab, lies, tile);
        let to = start + stashed(v, lies, tile);
        copy_piece(
            &mut stages[to..to + comptime!(tile.piece())],
            &source[from..from + 1],
        );
    }
}

/// Puts an operation of PTX into the kernel.
#[cfg(feature = "cuda")]
fn register(scope: &Scope, text: &str, operands: Operands) {
    let op = PtxOp::new(scope.ctx_mut(), text.to_owned(), operands);
    scope.register(&op);
}

/// Begins to copy 16 bytes from global to shared memory.
#[cube]
fn copy_piece<E: Float, N: Size>(to: &mut [E], from: &[Vector<E, N>]) {
    intrinsic!(|scope| {
        #[cfg(feature = "cuda")]
        {
            // SAFETY: only the address is taken.
            let (to, from) = unsafe {
                (
                    *to.__expand_as_mut_ptr_method(scope),
                    *from.__expand_as_ptr_method(scope),
                )
            };
            let operands = Operands {
                shared: vec![to.value(scope)],
                global: vec![from.value(scope)],
                ..Default::default()
            };
            register(scope, "cp.async.cg.shared.global [$0], [$1], 16;", operands);
        }
    })
}

/// What was begun to be copied since the last time is one group.
#[cube]
fn end_copies() {
    intrinsic!(|scope| {
        #[cfg(feature = "cuda")]
        register(scope, "cp.async.commit_group;", Operands::default());
    })
}

/// Waits for this unit's copies but the last `groups`, and shows them to `wgmma`.
#[cube]
fn await_copies(#[comptime] groups: usize) {
    intrinsic!(|scope| {
        #[cfg(feature = "cuda")]
        {
            let text = format!("cp.async.wait_group {groups};\nfence.proxy.async.shared::cta;");
            register(scope, &text, Operands::default());
        }
    })
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

/// Waits for this plane's products.
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
