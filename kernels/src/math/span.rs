//! How the units of a cube divide work (contiguous parts, in order), and meet.

use cubecl::prelude::*;

/// A range of whatever is divided.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Span {
    pub start: usize,
    pub end: usize,
}

/// This unit's part of `count` things from `start` on.
#[cube]
pub(crate) fn share(start: usize, count: usize) -> Span {
    let unit = UNIT_POS as usize;
    let units = CUBE_DIM as usize;
    // Not `count · unit / units`, which passes 32 bits long before `count` does.
    let (each, rest) = (count / units, count % units);
    Span {
        start: start + each * unit + min(unit, rest),
        end: start + each * (unit + 1) + min(unit + 1, rest),
    }
}

/// The units of a launch of one cube wait for each other. Each must call. A unit alone has nobody to wait for, and its launch need
/// not wait for those before it.
#[cube]
pub(crate) fn wait(#[comptime] units: usize) {
    if comptime!(units > 1) {
        sync_cube();
    }
}

/// [`wait`], the first time in a launch.
#[cube]
pub(crate) fn meet(#[comptime] units: usize) {
    let _ = told(0u32.runtime(), units);
}

/// [`wait`], the first time in a launch, and what unit 0 has found.
///
/// The shared memory also has CubeCL wait for the launches before this one: otherwise two launches of different streams could each
/// hold cores that the other is waiting for.
#[cube]
pub(crate) fn told(found: u32, #[comptime] units: usize) -> u32 {
    let mut told = found;
    if comptime!(units > 1) {
        let mut place = Shared::<[u32]>::new_slice(1usize);
        if UNIT_POS == 0 {
            place[0] = found;
        }
        sync_cube();
        told = place[0];
    }
    told
}
