//! The gradient of the scale, of each head's: `Σ_n Σ_c g[h,n,c] · cos[h,n,c]`, where `g` are the gradients of the logits.
//!
//! A unit row times its own gradient, `x̂ · dx̂`, is that sum over the classes times the scale, and the way back through the
//! normalization wants it anyway. A margin makes of the cosine of a row's own class something else, `ψ`, and what `dx̂` has of it is
//! `g ψ' cos`; so `g (ψ − ψ' cos)` is added. Each variant leaves that for its rows, and here they are summed.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;
use cubecl::std::tensor::TensorHandle;

use crate::blueprint::Blueprint;
use crate::error::Error;
use crate::gradients::Wanted;
use crate::math::group::{Group, group_sum};
use crate::math::sum::sum_of_unit;
use crate::operand::whole;

/// Proves that the gradient can be found, if it is wanted.
pub(crate) fn validate(scale: f32, wanted: Wanted) -> Result<(), Error> {
    if wanted.scale && scale == 0.0 {
        return Err(Error::Option {
            option: "scale",
            got: 0.0,
            expected: "not 0 where its gradient is wanted",
        });
    }
    Ok(())
}

/// Sums what rows have, on a GPU; on a CPU the launch that finds it does.
pub(crate) fn launch(
    client: &Client,
    blueprint: &Blueprint,
    of_rows: &Handle, // f32, [heads, rows]
    rows: usize,
    scale: f32,
    grad: &TensorHandle, // [heads], f32
) {
    let heads = grad.shape()[0];
    let all = Group::cube(blueprint);
    // SAFETY: both have the length of their comments, in which the kernel stays.
    unsafe {
        reduce::launch_unchecked(
            client,
            CubeCount::new_single(),
            CubeDim::new_1d(all.size as u32),
            BufferArg::from_raw_parts(of_rows.clone(), heads * rows),
            whole(grad, 1),
            heads,
            rows,
            scale,
            all,
        );
    }
}

#[cube(launch_unchecked)]
fn reduce(
    of_rows: &[f32],  // [heads, rows]
    grad: &mut [f32], // [heads]
    heads: usize,
    rows: usize,
    scale: f32,
    #[comptime] all: Group,
) {
    sum_rows(of_rows, 0, grad, heads, rows, scale, all);
}

/// The gradients of the heads' scale, from what their rows have, `[heads, rows]` from `first` on, times the scale. All units of `all`
/// must call.
#[cube]
pub(crate) fn sum_rows(
    of_rows: &[f32],
    first: usize,
    grad: &mut [f32], // [heads]
    heads: usize,
    rows: usize,
    scale: f32,
    #[comptime] all: Group,
) {
    for head in 0..heads {
        let unit = UNIT_POS as usize % all.size;
        let sum = sum_of_unit(of_rows, first + head * rows, rows, unit, all.size);
        let sum = group_sum(sum, all);
        if UNIT_POS == 0 {
            grad[head] = sum / scale;
        }
    }
}
