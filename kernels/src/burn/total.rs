//! The weighted sum of numbers by head. Burn's own sum would tune itself for ten seconds at its first call.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::std::tensor::TensorHandle;

use crate::Error;
use crate::math::sum::Kahan;
use crate::memory::empty;
use crate::operand::{F32, contiguous, whole};

/// `Σ_h α_h · loss_h`, `[1]`, of `loss [heads]` and as many weights.
pub(super) fn forward(
    client: &Client,
    loss: &TensorHandle,
    alphas: &[f32],
) -> Result<TensorHandle, Error> {
    contiguous(client, "loss", loss, &[alphas.len()], F32)?;
    // SAFETY: the loss is proved, and there is a weight for each head.
    Ok(unsafe { sum(client, loss, upload(client, alphas)) })
}

/// `Σ_h a_h · b_h`, `[1]`, of two tensors `[heads]`.
pub(super) fn product(
    client: &Client,
    a: &TensorHandle,
    b: &TensorHandle,
) -> Result<TensorHandle, Error> {
    let heads = a.shape().iter().product();
    contiguous(client, "gradient by head", a, &[heads], F32)?;
    contiguous(client, "upstream gradient", b, &[heads], F32)?;
    // SAFETY: both are proved, and of one length.
    Ok(unsafe { sum(client, a, whole(b, 1)) })
}

/// Of values with a weight for each.
///
/// # Safety
/// The values are contiguous f32, and there is a weight for each.
unsafe fn sum(client: &Client, values: &TensorHandle, weights: BufferArg) -> TensorHandle {
    let out = empty(client, [1], F32);
    // SAFETY: the caller's.
    unsafe {
        total::launch_unchecked(
            client,
            CubeCount::new_single(),
            CubeDim::new_single(),
            whole(values, 1),
            weights,
            whole(&out, 1),
        );
    }
    out
}

/// The gradient of the loss by head, `α_h · grad`, of `grad [1]`.
pub(super) fn backward(
    client: &Client,
    grad: &TensorHandle,
    alphas: &[f32],
) -> Result<TensorHandle, Error> {
    contiguous(client, "gradient of the total", grad, &[1], F32)?;
    let out = empty(client, [alphas.len()], F32);
    // SAFETY: the gradient is proved, and `out` has an element for each weight.
    unsafe {
        spread::launch_unchecked(
            client,
            CubeCount::new_single(),
            CubeDim::new_single(),
            whole(grad, 1),
            upload(client, alphas),
            whole(&out, 1),
        );
    }
    Ok(out)
}

fn upload(client: &Client, alphas: &[f32]) -> BufferArg {
    let handle = client.create_from_slice(f32::as_bytes(alphas));
    // SAFETY: that is what was uploaded.
    unsafe { BufferArg::from_raw_parts(handle, alphas.len()) }
}

#[cube(launch_unchecked)]
fn total(loss: &[f32], alphas: &[f32], out: &mut [f32]) {
    let mut sum = Kahan::new();
    for head in 0..loss.len() {
        sum.add(alphas[head] * loss[head]);
    }
    out[0] = sum.total();
}

#[cube(launch_unchecked)]
fn spread(grad: &[f32], alphas: &[f32], out: &mut [f32]) {
    for head in 0..out.len() {
        out[head] = alphas[head] * grad[0];
    }
}
