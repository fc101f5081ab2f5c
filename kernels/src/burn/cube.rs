//! The ops on CubeCL tensors: launch what was validated at the call.

use burn::backend::cubecl::dtype_to_elem_type;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::DType;
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::{cast, into_contiguous, untile};
use burn_cubecl::tensor::CubeTensor;
use cubecl::bytes::Bytes;
use cubecl::client::Client;
use cubecl::ir::Type;
use cubecl::std::tensor::TensorHandle;

use super::ops::{Losses, MaybeGrad, Means, ProtoheadGradOps, ProtoheadOps, SavedRows};
use super::sums::{Kept, State};
use super::total;
use crate::class_means::ClassSums;
use crate::gradients::scaled;
use crate::loss::{LossOutput, Saved};
use crate::operand::REACH;
use crate::{
    Error, Upstream, Wanted, cosine_cross_entropy as fused, cosine_logits as logits, cross_entropy,
    reconstruction,
};

/// The public functions have checked shapes, dtypes, options and sizes before Burn took the op down here, where nothing can be
/// returned; what is left is a bug of this crate, or rows so long that the workspaces of a CPU's many cores pass 32-bit addresses.
fn checked<T>(result: Result<T, Error>) -> T {
    result.unwrap_or_else(|error| panic!("refused after it was checked: {error}"))
}

/// Burn's tensor as the kernels take it: packed along its last axis, and within reach of their indices, as a view of a large tensor
/// need not be.
fn operand(tensor: CubeTensor) -> TensorHandle {
    let tensor = untile(tensor);
    let is_packed = tensor.meta.strides().last() == Some(&1);
    let elements = tensor.handle.size() / tensor.dtype.size() as u64;
    let tensor = if is_packed && elements <= REACH.into() {
        tensor
    } else {
        into_contiguous(tensor)
    };
    handle(tensor)
}

fn handle(tensor: CubeTensor) -> TensorHandle {
    TensorHandle::new(
        tensor.handle.clone(),
        tensor.meta.shape().clone(),
        tensor.meta.strides().clone(),
        Type::from(dtype_to_elem_type(tensor.dtype)),
    )
}

/// Labels in a dtype that the kernels read. What was let through and has to be cast is smaller.
fn labels(tensor: CubeTensor) -> TensorHandle {
    let tensor = match tensor.dtype {
        DType::I32 | DType::I64 | DType::U32 => tensor,
        _ => cast(tensor, DType::I32),
    };
    handle(into_contiguous(tensor))
}

/// What becomes of class sums, made now if this is the first that they see of a device.
fn with_sums<T>(client: &Client, state: &State, then: impl FnOnce(&mut ClassSums) -> T) -> T {
    let mut held = state.sums.lock().expect("no call has failed");
    let sums = held.get_or_insert_with(|| {
        let State {
            heads, active, dim, ..
        } = *state;
        let sums = ClassSums::new(client, heads, active, dim, &state.options);
        Kept(checked(sums))
    });
    then(&mut sums.0)
}

/// A result of the kernels as Burn's tensor, on the device of `like`.
fn tensor(like: &CubeTensor, handle: TensorHandle, dtype: DType) -> CubeTensor {
    CubeTensor::new_contiguous(
        like.client.clone(),
        like.device.clone(),
        handle.shape().clone(),
        handle.handle,
        dtype,
    )
}

fn losses(like: &CubeTensor, output: LossOutput) -> Losses<CubeBackend> {
    let saved = output.saved();
    Losses {
        loss: tensor(like, output.loss, DType::F32),
        lse: tensor(like, output.lse, DType::F32),
        saved_lse: tensor(like, saved.lse, DType::F32),
        predictions: tensor(like, output.predictions, DType::U32),
        status: tensor(like, saved.status, DType::U32),
    }
}

fn wanted([embeddings, weights, scale]: [bool; 3]) -> Wanted {
    Wanted {
        embeddings,
        weights,
        scale,
    }
}

fn gradient(like: &CubeTensor, handle: Option<TensorHandle>) -> MaybeGrad<CubeBackend> {
    handle.map(|handle| tensor(like, handle, like.dtype)).into()
}

/// The gradient of each head's scale.
fn by_head(like: &CubeTensor, handle: Option<TensorHandle>) -> MaybeGrad<CubeBackend> {
    handle.map(|handle| tensor(like, handle, DType::F32)).into()
}

/// The gradient of the scale that all heads share.
fn of_all(like: &CubeTensor, handle: Option<TensorHandle>) -> MaybeGrad<CubeBackend> {
    let sum = |by_head: TensorHandle| {
        let ones = vec![1.0; by_head.shape()[0]];
        checked(total::forward(&like.client, &by_head, &ones))
    };
    by_head(like, handle.map(sum))
}

impl ProtoheadOps for CubeBackend {
    fn protohead_fused(
        embeddings: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        rows: IntTensor<Self>,
        options: fused::Options,
    ) -> Losses<Self> {
        let inputs = fused::Inputs {
            embeddings: operand(embeddings.clone()),
            weights: operand(weights),
            labels: labels(rows),
        };
        let output = checked(fused::forward(&embeddings.client, &inputs, &options));
        losses(&embeddings, output)
    }

    fn protohead_fused_with_scale(
        embeddings: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        _scale: FloatTensor<Self>,
        rows: IntTensor<Self>,
        options: fused::Options,
    ) -> Losses<Self> {
        Self::protohead_fused(embeddings, weights, rows, options)
    }

    fn protohead_total(loss: FloatTensor<Self>, alphas: Vec<f32>) -> FloatTensor<Self> {
        let by_head = handle(into_contiguous(loss.clone()));
        let sum = checked(total::forward(&loss.client, &by_head, &alphas));
        tensor(&loss, sum, DType::F32)
    }

    fn protohead_cross_entropy(
        z: FloatTensor<Self>,
        rows: IntTensor<Self>,
        options: cross_entropy::Options,
    ) -> Losses<Self> {
        let inputs = cross_entropy::Inputs {
            logits: operand(z.clone()),
            labels: labels(rows),
        };
        let output = checked(cross_entropy::forward(&z.client, &inputs, &options));
        losses(&z, output)
    }

    fn protohead_logits(
        embeddings: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        options: logits::Options,
    ) -> FloatTensor<Self> {
        let inputs = logits::Inputs {
            embeddings: operand(embeddings.clone()),
            weights: operand(weights),
        };
        let out = checked(logits::forward(&embeddings.client, &inputs, &options));
        tensor(&embeddings, out, embeddings.dtype)
    }

    fn protohead_logits_with_scale(
        embeddings: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        _scale: FloatTensor<Self>,
        options: logits::Options,
    ) -> FloatTensor<Self> {
        Self::protohead_logits(embeddings, weights, options)
    }

    fn protohead_reconstruction(
        whole: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let inputs = reconstruction::Inputs {
            whole: operand(whole.clone()),
            first: operand(first),
            second: operand(second),
        };
        let output = checked(reconstruction::forward(
            &whole.client,
            &inputs,
            &Default::default(),
        ));
        tensor(&whole, output.loss, DType::F32)
    }

    fn protohead_class_sums(
        embeddings: FloatTensor<Self>,
        rows: IntTensor<Self>,
        _status: IntTensor<Self>,
        state: State,
    ) -> IntTensor<Self> {
        let values = operand(embeddings.clone());
        with_sums(&embeddings.client, &state, |sums| {
            checked(sums.accumulate(&embeddings.client, &values, &labels(rows)));
            tensor(&embeddings, sums.status().clone(), DType::U32)
        })
    }

    fn protohead_class_means(
        weights: FloatTensor<Self>,
        _status: IntTensor<Self>,
        state: State,
    ) -> Means<Self> {
        let old = operand(weights.clone());
        with_sums(&weights.client, &state, |sums| {
            let means = checked(sums.means(&weights.client, &old));
            let shared = |handle: &TensorHandle| tensor(&weights, handle.clone(), DType::U32);
            // Copies of what later batches change; before the first there is nothing to copy.
            let now = |handle: &TensorHandle| match sums.fresh {
                true => {
                    let zeros = vec![0u32; handle.shape()[0]];
                    let zeros = weights.client.create(Bytes::from_elems(zeros));
                    let shape = handle.shape().clone();
                    shared(&TensorHandle::new_contiguous(shape, zeros, handle.dtype))
                }
                false => shared(handle).copy(),
            };
            Means {
                weights: tensor(&weights, means, weights.dtype),
                counts: now(sums.counts()),
                status: now(sums.status()),
                next: shared(sums.status()),
            }
        })
    }
}

impl ProtoheadGradOps for CubeBackend {
    fn protohead_fused_at_once(
        embeddings: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        rows: IntTensor<Self>,
        options: fused::Options,
        need: [bool; 3],
    ) -> (
        Losses<Self>,
        MaybeGrad<Self>,
        MaybeGrad<Self>,
        MaybeGrad<Self>,
    ) {
        let inputs = fused::Inputs {
            embeddings: operand(embeddings.clone()),
            weights: operand(weights),
            labels: labels(rows),
        };
        let (output, gradients) = checked(fused::forward_backward(
            &embeddings.client,
            &inputs,
            &options,
            &Upstream::Total(1.0),
            wanted(need),
        ));
        (
            losses(&embeddings, output),
            gradient(&embeddings, gradients.embeddings),
            gradient(&embeddings, gradients.weights),
            by_head(&embeddings, gradients.scale),
        )
    }

    fn protohead_fused_backward(
        grad: FloatTensor<Self>,
        embeddings: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        rows: SavedRows<Self>,
        options: fused::Options,
        need: [bool; 3],
    ) -> (MaybeGrad<Self>, MaybeGrad<Self>, MaybeGrad<Self>) {
        let inputs = fused::Inputs {
            embeddings: operand(embeddings.clone()),
            weights: operand(weights),
            labels: labels(rows.labels),
        };
        let saved = Saved {
            lse: handle(rows.lse),
            status: handle(rows.status),
            asked: None,
        };
        let gradients = checked(fused::backward_from(
            &embeddings.client,
            &inputs,
            &options,
            &saved,
            &Upstream::Loss(handle(into_contiguous(grad))),
            wanted(need),
        ));
        (
            gradient(&embeddings, gradients.embeddings),
            gradient(&embeddings, gradients.weights),
            of_all(&embeddings, gradients.scale),
        )
    }

    fn protohead_product(by_head: FloatTensor<Self>, with: FloatTensor<Self>) -> FloatTensor<Self> {
        let [a, b] = [by_head.clone(), with].map(|tensor| handle(into_contiguous(tensor)));
        let sum = checked(total::product(&by_head.client, &a, &b));
        tensor(&by_head, sum, DType::F32)
    }

    fn protohead_total_backward(grad: FloatTensor<Self>, alphas: Vec<f32>) -> FloatTensor<Self> {
        let arrived = handle(into_contiguous(grad.clone()));
        let by_head = checked(total::backward(&grad.client, &arrived, &alphas));
        tensor(&grad, by_head, DType::F32)
    }

    fn protohead_scaled(
        gradient: FloatTensor<Self>,
        by_head: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        // Mostly nobody else has it: a second one would double the memory of the largest tensors of a step.
        let in_place = gradient.can_mut();
        let unscaled = handle(into_contiguous(gradient.clone()));
        let by_head = handle(into_contiguous(by_head));
        let operand = "gradient";
        let scaled = scaled(&gradient.client, operand, &unscaled, &by_head, in_place);
        tensor(&gradient, checked(scaled), gradient.dtype)
    }

    fn protohead_cross_entropy_backward(
        grad: FloatTensor<Self>,
        z: FloatTensor<Self>,
        rows: SavedRows<Self>,
        options: cross_entropy::Options,
    ) -> FloatTensor<Self> {
        let inputs = cross_entropy::Inputs {
            logits: operand(z.clone()),
            labels: labels(rows.labels),
        };
        let saved = Saved {
            lse: handle(rows.lse),
            status: handle(rows.status),
            asked: None,
        };
        let upstream = Upstream::Loss(handle(into_contiguous(grad)));
        let gradient = checked(cross_entropy::backward_from(
            &z.client, &inputs, &options, &saved, &upstream,
        ));
        tensor(&z, gradient, z.dtype)
    }

    fn protohead_logits_backward(
        grad: FloatTensor<Self>,
        embeddings: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        options: logits::Options,
        need: [bool; 3],
    ) -> (MaybeGrad<Self>, MaybeGrad<Self>, MaybeGrad<Self>) {
        let inputs = logits::Inputs {
            embeddings: operand(embeddings.clone()),
            weights: operand(weights),
        };
        let gradients = checked(logits::backward(
            &embeddings.client,
            &inputs,
            &options,
            &operand(grad),
            wanted(need),
        ));
        (
            gradient(&embeddings, gradients.embeddings),
            gradient(&embeddings, gradients.weights),
            of_all(&embeddings, gradients.scale),
        )
    }

    fn protohead_reconstruction_backward(
        grad: FloatTensor<Self>,
        whole: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
        need: [bool; 2],
    ) -> (MaybeGrad<Self>, MaybeGrad<Self>) {
        let inputs = reconstruction::Inputs {
            whole: operand(whole.clone()),
            first: operand(first),
            second: operand(second),
        };
        let gradients = checked(reconstruction::backward(
            &whole.client,
            &inputs,
            &Default::default(),
            &Upstream::Loss(handle(into_contiguous(grad))),
            reconstruction::Wanted {
                whole: need[0],
                part: need[1],
            },
        ));
        (
            gradient(&whole, gradients.whole),
            gradient(&whole, gradients.part),
        )
    }
}
