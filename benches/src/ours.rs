//! This library, on CUDA where there is a device, otherwise on the CPU.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use cubecl::MemoryScope;
use cubecl::client::Client;
use cubecl::ir::{ElemType, FloatKind, IntKind};
use cubecl::prelude::CubeElement;
use cubecl::std::tensor::TensorHandle;
use half::{bf16, f16};
use protohead::class_means::ClassSums;
use protohead::{Gradients, Strategy, Upstream, Variant, Wanted};
use protohead::{
    class_means, cosine_cross_entropy as fused, cosine_logits, cross_entropy, reconstruction,
};

use crate::{Data, Group, Ran, Shape};

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

/// What the products take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dtype {
    F32,
    /// f32 that may be rounded to TF32.
    Tf32,
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
        Dtype::F32 | Dtype::Tf32 => (f32::as_bytes(values).to_vec(), FloatKind::F32),
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

/// An op with its operands on the device.
pub struct Step {
    operands: Vec<TensorHandle>,
    call: Box<dyn FnMut() -> Vec<TensorHandle>>,
}

impl Step {
    fn new<const N: usize>(
        operands: [&TensorHandle; N],
        call: impl FnMut() -> Vec<TensorHandle> + 'static,
    ) -> Self {
        Self {
            operands: operands.map(TensorHandle::clone).to_vec(),
            call: Box::new(call),
        }
    }

    /// The time of one call, from its operands being there to its results being there, which are read if they are to be kept.
    pub(crate) fn run(mut self, keep: bool) -> Ran {
        wait(&self.operands);
        let start = Instant::now();
        let results = (self.call)();
        wait(&results);
        let time = start.elapsed();
        let answer = keep.then(|| results.iter().map(read).collect());
        Ran { time, answer }
    }

    /// The time of so many calls, of which only the last is waited for.
    pub fn repeat(&mut self, calls: u32) -> Duration {
        wait(&self.operands);
        let start = Instant::now();
        let mut results = Vec::new();
        for _ in 0..calls {
            // What the call before gave goes back first, as a trainer's gradients do.
            results.clear();
            results = (self.call)();
        }
        wait(&results);
        start.elapsed()
    }

    /// Bytes that the device's pools took for the operands, and more of them once a step had run. A pool's page is as large as the
    /// largest tensor so far, whatever it is for.
    pub fn memory(&mut self) -> (u64, u64) {
        let reserved = || {
            client()
                .memory_report(MemoryScope::CurrentStream)
                .usage()
                .bytes_reserved
        };
        wait(&self.operands);
        let before = reserved();
        self.repeat(1);
        (before, reserved() - before)
    }
}

/// Waits for the tensors.
fn wait(tensors: &[TensorHandle]) {
    let handles: Vec<_> = tensors.iter().map(|tensor| &tensor.handle).collect();
    cubecl::future::block_on(client().sync_buffers(handles)).expect("the device works");
}

fn read(tensor: &TensorHandle) -> Vec<f32> {
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

fn operands(inputs: &fused::Inputs) -> [&TensorHandle; 3] {
    [&inputs.embeddings, &inputs.weights, &inputs.labels]
}

/// The variant of the fused op and the logits that `PROTOHEAD_VARIANT` names, where it has these operands on tensor cores; otherwise the
/// inferred one.
fn strategy(dtype: Dtype) -> Strategy {
    let of_16_bits = matches!(dtype, Dtype::F16 | Dtype::Bf16);
    let of_cmma = dtype != Dtype::F32;
    match std::env::var("PROTOHEAD_VARIANT").as_deref() {
        Err(_) => Strategy::Inferred,
        Ok("plane") => Strategy::Forced(Variant::Plane),
        Ok("cmma") if of_cmma => Strategy::Forced(Variant::Cmma),
        Ok("wgmma") if of_16_bits => Strategy::Forced(Variant::Wgmma),
        Ok("cmma" | "wgmma") => Strategy::Inferred,
        Ok(other) => panic!("PROTOHEAD_VARIANT: {other} is none of plane, cmma, wgmma"),
    }
}

fn options(group: Group, shape: &Shape, dtype: Dtype) -> fused::Options {
    fused::Options {
        margin: fused::Margin {
            angular: group.angular_margin(),
            ..fused::Margin::default()
        },
        active: Some(shape.active),
        strategy: strategy(dtype),
        allow_tf32: dtype == Dtype::Tf32,
        ..fused::Options::default()
    }
}

const VALID: &str = "the operands are valid";

fn both(gradients: Gradients) -> [TensorHandle; 2] {
    let asked = "asked for";
    [
        gradients.embeddings.expect(asked),
        gradients.weights.expect(asked),
    ]
}

/// An op; only the fused one takes another dtype than f32.
pub(crate) fn step(group: Group, shape: &Shape, data: &Data, dtype: Dtype) -> Step {
    let client = client();
    let Shape {
        heads,
        rows,
        dim,
        classes,
        active,
        ..
    } = *shape;
    match group {
        Group::CosineLogits => {
            let of = inputs(shape, data, dtype);
            let inputs = cosine_logits::Inputs {
                embeddings: of.embeddings,
                weights: of.weights,
            };
            let options = cosine_logits::Options {
                active: Some(active),
                strategy: strategy(dtype),
                allow_tf32: dtype == Dtype::Tf32,
                ..cosine_logits::Options::default()
            };
            Step::new(
                [&inputs.embeddings.clone(), &inputs.weights.clone()],
                move || vec![cosine_logits::forward(client, &inputs, &options).expect(VALID)],
            )
        }
        Group::CrossEntropy => {
            let inputs = cross_entropy::Inputs {
                logits: upload(&data.logits, [heads, rows, active]),
                labels: labels(data),
            };
            let options = cross_entropy::Options::default();
            Step::new(
                [&inputs.logits.clone(), &inputs.labels.clone()],
                move || {
                    let output = cross_entropy::forward(client, &inputs, &options).expect(VALID);
                    let one = Upstream::default();
                    let grad = cross_entropy::backward(client, &inputs, &options, &output, &one)
                        .expect(VALID);
                    vec![output.total, grad]
                },
            )
        }
        Group::FusedForward => {
            let inputs = inputs(shape, data, dtype);
            let options = options(group, shape, dtype);
            Step::new(operands(&inputs.clone()), move || {
                vec![
                    fused::forward(client, &inputs, &options)
                        .expect(VALID)
                        .total,
                ]
            })
        }
        Group::Fused | Group::Margin => {
            let inputs = inputs(shape, data, dtype);
            let options = options(group, shape, dtype);
            Step::new(operands(&inputs.clone()), move || {
                let one = Upstream::default();
                let (output, gradients) =
                    fused::forward_backward(client, &inputs, &options, &one, Wanted::BOTH)
                        .expect(VALID);
                let [dx, dw] = both(gradients);
                vec![output.total, dx, dw]
            })
        }
        Group::ClassMeans => {
            let embeddings = upload(&data.embeddings, [heads, rows, dim]);
            let weights = upload(&data.weights, [heads, classes, dim]);
            let labels = labels(data);
            let options = class_means::Options::default();
            Step::new(
                [&embeddings.clone(), &weights.clone(), &labels.clone()],
                move || {
                    let mut sums =
                        ClassSums::new(client, heads, active, dim, &options).expect(VALID);
                    sums.accumulate(client, &embeddings, &labels).expect(VALID);
                    vec![sums.means(client, &weights).expect(VALID)]
                },
            )
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
            let of = inputs.clone();
            Step::new([&of.whole, &of.first, &of.second], move || {
                let options = reconstruction::Options::default();
                let output = reconstruction::forward(client, &inputs, &options).expect(VALID);
                let gradients = reconstruction::backward(
                    client,
                    &inputs,
                    &options,
                    &Upstream::default(),
                    reconstruction::Wanted::ALL,
                )
                .expect(VALID);
                let whole = gradients.whole.expect("asked for");
                let parts = gradients.part.expect("asked for");
                vec![output.loss, whole, parts]
            })
        }
    }
}

/// The whole step, recorded before and replayed.
pub(crate) fn captured(shape: &Shape, data: &Data, dtype: Dtype) -> Step {
    let inputs = inputs(shape, data, dtype);
    let one = Upstream::default();
    let options = options(Group::Fused, shape, dtype);
    let mut step =
        fused::Captured::new(client(), &inputs, &options, &one, Wanted::BOTH).expect(VALID);
    Step::new(operands(&inputs.clone()), move || {
        step.replay().expect("the device replays it");
        let [dx, dw] = both(step.gradients().clone());
        vec![step.output().total.clone(), dx, dw]
    })
}

/// Logits, then their cross-entropy.
pub(crate) fn unfused(group: Group, shape: &Shape, data: &Data) -> Step {
    let client = client();
    let of = inputs(shape, data, Dtype::F32);
    let inputs = cosine_logits::Inputs {
        embeddings: of.embeddings.clone(),
        weights: of.weights.clone(),
    };
    let options = cosine_logits::Options {
        active: Some(shape.active),
        ..cosine_logits::Options::default()
    };
    let labels = of.labels.clone();
    Step::new(operands(&of.clone()), move || {
        let on_logits = cross_entropy::Inputs {
            logits: cosine_logits::forward(client, &inputs, &options).expect(VALID),
            labels: labels.clone(),
        };
        let loss_options = cross_entropy::Options::default();
        let output = cross_entropy::forward(client, &on_logits, &loss_options).expect(VALID);
        if group == Group::FusedForward {
            return vec![output.total];
        }
        let one = Upstream::default();
        let dz =
            cross_entropy::backward(client, &on_logits, &loss_options, &output, &one).expect(VALID);
        let gradients = cosine_logits::backward(client, &inputs, &options, &dz, Wanted::BOTH);
        let [dx, dw] = both(gradients.expect(VALID));
        vec![output.total, dx, dw]
    })
}
