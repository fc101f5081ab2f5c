//! This library, on CUDA where there is a device, otherwise on the CPU.

use std::sync::OnceLock;
use std::time::Instant;

use cubecl::client::Client;
use cubecl::ir::{ElemType, FloatKind, IntKind};
use cubecl::prelude::CubeElement;
use cubecl::std::tensor::TensorHandle;
use half::{bf16, f16};
use protohead::class_means::ClassSums;
use protohead::{Upstream, Wanted};
use protohead::{
    class_means, cosine_cross_entropy as fused, cosine_logits, cross_entropy, reconstruction,
};

use crate::{Answer, Data, Group, Ran, Shape};

/// The device that is measured.
pub(crate) fn client() -> &'static Client {
    static CLIENT: OnceLock<Client> = OnceLock::new();
    CLIENT.get_or_init(|| {
        cubecl::Device::cuda(0)
            .or_else(|_| cubecl::Device::cpu())
            .expect("the benches link a CPU runtime")
            .client()
    })
}

/// Whether that is a CPU.
pub(crate) fn on_cpu() -> bool {
    client().properties().hardware.num_cpu_cores.is_some()
}

/// What is measured, as files are named after it.
pub fn device_name() -> &'static str {
    if on_cpu() { "cpu" } else { "cuda" }
}

/// The dtype of the operands.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Dtype {
    F32,
    F16,
    Bf16,
}

fn upload(values: &[f32], shape: impl Into<Vec<usize>>) -> TensorHandle {
    upload_as(Dtype::F32, values, shape)
}

fn upload_as(dtype: Dtype, values: &[f32], shape: impl Into<Vec<usize>>) -> TensorHandle {
    let narrow = |narrow: fn(f32) -> [u8; 2]| -> Vec<u8> {
        values.iter().flat_map(|&v| narrow(v)).collect()
    };
    let (bytes, kind) = match dtype {
        Dtype::F32 => (f32::as_bytes(values).to_vec(), FloatKind::F32),
        Dtype::F16 => (narrow(|v| f16::from_f32(v).to_le_bytes()), FloatKind::F16),
        Dtype::Bf16 => (narrow(|v| bf16::from_f32(v).to_le_bytes()), FloatKind::BF16),
    };
    TensorHandle::new_contiguous(
        shape.into(),
        client().create_from_slice(&bytes),
        ElemType::Float(kind),
    )
}

fn labels(data: &Data) -> TensorHandle {
    TensorHandle::new_contiguous(
        [data.labels.len()],
        client().create_from_slice(i32::as_bytes(&data.labels)),
        ElemType::Int(IntKind::I32),
    )
}

/// Waits for the tensors, and reads them if they are to be kept.
fn finish(start: Instant, tensors: &[&TensorHandle], keep: bool) -> Ran {
    let handles: Vec<_> = tensors.iter().map(|tensor| &tensor.handle).collect();
    cubecl::future::block_on(client().sync_buffers(handles)).expect("the device works");
    let time = start.elapsed();
    let answer = keep.then(|| -> Answer {
        let read = |tensor: &&TensorHandle| {
            let bytes = client()
                .read_one(tensor.handle.clone())
                .expect("the device works");
            match tensor.dtype {
                ElemType::Float(FloatKind::F16) => bytes
                    .chunks_exact(2)
                    .map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32())
                    .collect(),
                ElemType::Float(FloatKind::BF16) => bytes
                    .chunks_exact(2)
                    .map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32())
                    .collect(),
                _ => f32::from_bytes(&bytes).to_vec(),
            }
        };
        tensors.iter().map(read).collect()
    });
    Ran { time, answer }
}

fn inputs(shape: &Shape, data: &Data, dtype: Dtype) -> fused::Inputs {
    let Shape {
        heads,
        rows,
        dim,
        classes,
        ..
    } = *shape;
    fused::Inputs {
        embeddings: upload_as(dtype, &data.embeddings, [heads, rows, dim]),
        weights: upload_as(dtype, &data.weights, [heads, classes, dim]),
        labels: labels(data),
    }
}

/// Waits for the inputs, so that their copies are not timed.
fn ready(tensors: &[&TensorHandle]) -> Instant {
    let handles: Vec<_> = tensors.iter().map(|tensor| &tensor.handle).collect();
    cubecl::future::block_on(client().sync_buffers(handles)).expect("the device works");
    Instant::now()
}

/// Runs an op; only the fused one takes another dtype than f32.
pub(crate) fn run(group: Group, shape: &Shape, data: &Data, dtype: Dtype, keep: bool) -> Ran {
    let client = client();
    let Shape {
        heads,
        rows,
        dim,
        classes,
        active,
        ..
    } = *shape;
    let options = fused::Options {
        active: Some(active),
        ..fused::Options::default()
    };
    let valid = "the operands are valid";
    match group {
        Group::CosineLogits => {
            let inputs = inputs(shape, data, dtype);
            let inputs = cosine_logits::Inputs {
                embeddings: inputs.embeddings,
                weights: inputs.weights,
            };
            let start = ready(&[&inputs.embeddings, &inputs.weights]);
            let options = cosine_logits::Options {
                active: Some(active),
                ..cosine_logits::Options::default()
            };
            let logits = cosine_logits::forward(client, &inputs, &options).expect(valid);
            finish(start, &[&logits], keep)
        }
        Group::CrossEntropy => {
            let inputs = cross_entropy::Inputs {
                logits: upload(&data.logits, [heads, rows, active]),
                labels: labels(data),
            };
            let options = cross_entropy::Options::default();
            let start = ready(&[&inputs.logits, &inputs.labels]);
            let output = cross_entropy::forward(client, &inputs, &options).expect(valid);
            let one = Upstream::default();
            let grad =
                cross_entropy::backward(client, &inputs, &options, &output, &one).expect(valid);
            finish(start, &[&output.total, &grad], keep)
        }
        Group::FusedForward => {
            let inputs = inputs(shape, data, dtype);
            let start = ready(&[&inputs.embeddings, &inputs.weights, &inputs.labels]);
            let output = fused::forward(client, &inputs, &options).expect(valid);
            finish(start, &[&output.total], keep)
        }
        Group::Fused => {
            let inputs = inputs(shape, data, dtype);
            let start = ready(&[&inputs.embeddings, &inputs.weights, &inputs.labels]);
            let one = Upstream::default();
            let (output, gradients) =
                fused::forward_backward(client, &inputs, &options, &one, Wanted::BOTH)
                    .expect(valid);
            let dx = gradients.embeddings.expect("asked for");
            let dw = gradients.weights.expect("asked for");
            finish(start, &[&output.total, &dx, &dw], keep)
        }
        Group::ClassMeans => {
            let embeddings = upload(&data.embeddings, [heads, rows, dim]);
            let weights = upload(&data.weights, [heads, classes, dim]);
            let labels = labels(data);
            let start = ready(&[&embeddings, &weights, &labels]);
            let options = class_means::Options::default();
            let mut sums = ClassSums::new(client, heads, active, dim, &options).expect(valid);
            sums.accumulate(client, &embeddings, &labels).expect(valid);
            let means = sums.write_means(client, &weights).expect(valid);
            finish(start, &[&means], keep)
        }
        Group::Reconstruction => {
            let part = |i: usize| {
                upload(
                    &data.embeddings[i * rows * dim..][..rows * dim],
                    [rows, dim],
                )
            };
            let inputs = reconstruction::Inputs {
                whole: part(0),
                first: part(1),
                second: part(2),
            };
            let start = ready(&[&inputs.whole, &inputs.first, &inputs.second]);
            let output =
                reconstruction::forward(client, &inputs, &Default::default()).expect(valid);
            let gradients = reconstruction::backward(
                client,
                &inputs,
                &Default::default(),
                &Upstream::default(),
                reconstruction::Wanted::ALL,
            )
            .expect(valid);
            let whole = gradients.whole.expect("asked for");
            let parts = gradients.part.expect("asked for");
            finish(start, &[&output.loss, &whole, &parts], keep)
        }
    }
}

pub(crate) fn run_captured(shape: &Shape, data: &Data, keep: bool) -> Ran {
    let client = client();
    let inputs = inputs(shape, data, Dtype::F32);
    let options = fused::Options {
        active: Some(shape.active),
        ..fused::Options::default()
    };
    let one = Upstream::default();
    let mut step = fused::Captured::new(client, &inputs, &options, &one, Wanted::BOTH)
        .expect("the operands are valid");
    let start = ready(&[&inputs.embeddings, &inputs.weights, &inputs.labels]);
    step.replay().expect("the device replays it");
    let gradients = step.gradients();
    let dx = gradients.embeddings.as_ref().expect("asked for");
    let dw = gradients.weights.as_ref().expect("asked for");
    finish(start, &[&step.output().total, dx, dw], keep)
}

pub(crate) fn run_unfused(group: Group, shape: &Shape, data: &Data, keep: bool) -> Ran {
    let client = client();
    let valid = "the operands are valid";
    let of = inputs(shape, data, Dtype::F32);
    let inputs = cosine_logits::Inputs {
        embeddings: of.embeddings,
        weights: of.weights,
    };
    let options = cosine_logits::Options {
        active: Some(shape.active),
        ..cosine_logits::Options::default()
    };
    let start = ready(&[&inputs.embeddings, &inputs.weights, &of.labels]);
    let on_logits = cross_entropy::Inputs {
        logits: cosine_logits::forward(client, &inputs, &options).expect(valid),
        labels: of.labels,
    };
    let loss_options = cross_entropy::Options::default();
    let output = cross_entropy::forward(client, &on_logits, &loss_options).expect(valid);
    if group == Group::FusedForward {
        return finish(start, &[&output.total], keep);
    }
    let one = Upstream::default();
    let dz =
        cross_entropy::backward(client, &on_logits, &loss_options, &output, &one).expect(valid);
    let gradients =
        cosine_logits::backward(client, &inputs, &options, &dz, Wanted::BOTH).expect(valid);
    let dx = gradients.embeddings.expect("asked for");
    let dw = gradients.weights.expect("asked for");
    finish(start, &[&output.total, &dx, &dw], keep)
}
