//! Slabs that `cp.async` brings to shared memory while earlier ones are multiplied, where kernels may have PTX of our own.

use cubecl::prelude::*;

use super::Tile;
use super::fragments::multiply_fragments;
#[cfg(feature = "cuda")]
use super::ptx::{Operands, register};
use super::stage::{Lies, Source, fetched, first_brought, stashed};

/// Adds the products of all slabs to the results, each plane with fragments of its own.
#[cube]
pub(super) fn add_copied_slabs<E: Float, N: Size>(
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
    // The stages that a slab is copied to and that one is multiplied in. The first turns only copy: in a loop of their own they would
    // have addresses of their own, in registers that all the rest has to do without.
    let mut to = 0usize.runtime();
    let mut from = 0usize.runtime();
    for turn in 0..slabs + ahead {
        let multiplies = turn >= ahead;
        if multiplies {
            // What was copied for later slabs may be on its way.
            await_copies(comptime!(ahead - 1), false);
            sync_cube();
        }
        if turn < slabs {
            // Into the stage of the slab before, which every plane had multiplied before the barrier.
            copy(left_stages, to, left, left_at, turn, left_lies, tile);
            copy(right_stages, to, right, right_at, turn, right_lies, tile);
        }
        end_copies();
        to = next(to, tile);
        if multiplies {
            multiply_fragments(
                results,
                &*left_stages,
                from * comptime!(tile.stage(left_lies)),
                &*right_stages,
                from * comptime!(tile.stage(right_lies)),
                left_lies,
                right_lies,
                tile,
            );
            from = next(from, tile);
        }
    }
    sync_cube();
}

/// The stage after one.
#[cube]
fn next(stage: usize, #[comptime] tile: Tile) -> usize {
    let last = comptime!(tile.stages() - 1);
    select(stage == last, 0, stage + 1)
}

/// Begins to copy this unit's part of a slab into a stage.
#[cube]
pub(super) fn copy<E: Float, N: Size>(
    stages: &mut [E],
    stage: usize,
    source: &[Vector<E, N>],
    at: &Source,
    slab: usize,
    #[comptime] lies: Lies,
    #[comptime] tile: Tile,
) {
    let start = stage * comptime!(tile.stage(lies));
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
            // A slab takes half of each 128 bytes that lie in a row, and the next one the other half.
            let text = "cp.async.cg.shared.global.L2::128B [$0], [$1], 16;";
            register(scope, text, operands);
        }
    })
}

/// What was begun to be copied since the last time is one group.
#[cube]
pub(super) fn end_copies() {
    intrinsic!(|scope| {
        #[cfg(feature = "cuda")]
        register(scope, "cp.async.commit_group;", Operands::default());
    })
}

/// Waits for this unit's copies but the last `groups`, and shows them to `wgmma` if that `reads` them.
#[cube]
pub(super) fn await_copies(#[comptime] groups: usize, #[comptime] reads: bool) {
    intrinsic!(|scope| {
        #[cfg(feature = "cuda")]
        {
            let mut text = format!("cp.async.wait_group {groups};");
            if reads {
                text += "\nfence.proxy.async.shared::cta;";
            }
            register(scope, &text, Operands::default());
        }
    })
}
