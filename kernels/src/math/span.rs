//! How the units of a cube divide work: contiguous parts, in order.

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
