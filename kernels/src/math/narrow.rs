//! From f32 to the dtype of a result.

use cubecl::frontend::comptime::hardware_properties;
use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;

const INFINITY: u32 = 0x7f80_0000;

/// The nearest values of `F`, ties to even.
///
/// CubeCL's compiler for CPUs leaves f32 to bf16 to a function of the C library, for every lane, where the core has no instruction for
/// it (x86's AVX512-BF16): libgcc before version 13 has none of that name, and the kernel would not link.
/// There the bits are rounded here.
#[cube]
pub(crate) fn narrow<F: Float, N: Size>(values: Vector<f32, N>) -> Vector<F, N> {
    let dtype = elem_type_of::<F>();
    if comptime!(dtype == ElemType::Float(FloatKind::BF16)) {
        let hardware = hardware_properties();
        if comptime!(hardware.num_cpu_cores.is_some()) {
            Vector::<F, N>::reinterpret(upper_halves::<N>(values))
        } else {
            Vector::<F, N>::cast_from(values)
        }
    } else {
        Vector::<F, N>::cast_from(values)
    }
}

/// The bits of the nearest bf16: the upper half of those of f32, one more if the lower half is more than half, or half of an
/// odd one. A NaN stays one.
#[cube]
fn upper_halves<N: Size>(values: Vector<f32, N>) -> Vector<u16, N> {
    let bits = Vector::<u32, N>::reinterpret(values);
    let sixteen = Vector::<u32, N>::new(16u32);
    let upper = bits >> sixteen;
    let odd = upper & Vector::<u32, N>::new(1u32);
    let rounded = (bits + Vector::<u32, N>::new(0x7fffu32) + odd) >> sixteen;
    let magnitude = bits & Vector::<u32, N>::new(0x7fff_ffffu32);
    let is_nan = magnitude.greater_than(&Vector::<u32, N>::new(INFINITY));
    let quiet = upper | Vector::<u32, N>::new(0x40u32);
    Vector::<u16, N>::cast_from(select_many(is_nan, quiet, rounded))
}
