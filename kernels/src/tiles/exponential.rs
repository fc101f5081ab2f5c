//! `e^x` at the end of a tile, where it takes most of the instructions.

use std::f32::consts::LOG2_E;

use cubecl::prelude::*;

use super::Tile;
#[cfg(feature = "cuda")]
use super::ptx::Ex2Op;

/// `e^(x · scale)`, and 1 where `x` is 0. Where operands are rounded to 16 bits or TF32 anyway, in two instructions instead of eight. They
/// round the exponent differently: that is some `|x · scale|` units in the last place, which counts least where the result is smallest.
#[cube]
pub(crate) fn exp_scaled(x: f32, scale: f32, #[comptime] tile: Tile) -> f32 {
    if comptime!(tile.ptx) {
        // The largest scales would become infinite.
        power_of_two(x * min(scale * LOG2_E, f32::MAX))
    } else {
        (x * scale).exp()
    }
}

/// `e^(x − y)`, with as many instructions as [`exp_scaled`].
#[cube]
pub(crate) fn exp_difference(x: f32, y: f32, #[comptime] tile: Tile) -> f32 {
    if comptime!(tile.ptx) {
        power_of_two(fma(x, LOG2_E, -(y * LOG2_E)))
    } else {
        (x - y).exp()
    }
}

/// `2^x` by `ex2`.
#[cube]
fn power_of_two(x: f32) -> f32 {
    intrinsic!(|scope| {
        #[cfg(feature = "cuda")]
        {
            let op = Ex2Op::new(scope.ctx_mut(), x.read_value(scope));
            scope.register_with_result(&op).into()
        }
        #[cfg(not(feature = "cuda"))]
        unreachable!("no tile has PTX without CUDA")
    })
}
