//! Vectors that count.

use cubecl::prelude::*;

/// A vector of one, for the variants that work on scalars.
pub(crate) type One = Const<1>;

/// `[0, 1, 2, ..]`
#[cube]
pub(crate) fn iota<N: Size>() -> Vector<u32, N> {
    let mut counted = Vector::<u32, N>::new(0u32);
    #[unroll]
    for lane in 0..N::value() {
        counted.insert(lane, lane as u32);
    }
    counted
}
