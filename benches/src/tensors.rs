//! On Burn tensors: the same maths in Burn's ops, as Burn runs them fastest (head by head, in contiguous matrices), and this library's
//! module through Burn's autodiff.

use std::time::Instant;

use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, IndexingUpdateOp, Int, Tensor, TensorData};

use protohead::LossOptions;
use protohead::burn::CosineHeadsConfig;

use crate::{Answer, Data, Group, Ran, Shape};

/// The device that our ops run on.
pub(crate) fn cube() -> Device {
    #[cfg(feature = "cuda")]
    if cubecl::Device::cuda(0).is_ok() {
        return Device::cuda(0);
    }
    Device::cpu()
}

/// Burn's CPU backend that is no CubeCL.
pub(crate) fn flex() -> Device {
    Device::flex()
}

fn matrix(values: &[f32], shape: [usize; 2], device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), device)
}

fn heads(values: &[f32], shape: [usize; 2], device: &Device) -> Vec<Tensor<2>> {
    let width = shape[0] * shape[1];
    if values.is_empty() {
        return Vec::new();
    }
    values
        .chunks(width)
        .map(|head| matrix(head, shape, device))
        .collect()
}

fn normalize(x: Tensor<2>) -> Tensor<2> {
    let norm = (x.clone() * x.clone()).sum_dim(1).sqrt().clamp_min(1e-12);
    x / norm
}

fn cosines(x: Tensor<2>, w: Tensor<2>) -> Tensor<2> {
    normalize(x)
        .matmul(normalize(w).transpose())
        .mul_scalar(SCALE)
}

const SCALE: f32 = 16.0;

/// ArcFace's margin, of angles that stay below π with it.
fn with_margin(logits: Tensor<2>, labels: Tensor<2, Int>, margin: f32) -> Tensor<2> {
    let own = logits.clone().gather(1, labels.clone()).div_scalar(SCALE);
    let sine = (own.clone() * own.clone()).neg().add_scalar(1.0).sqrt();
    let lost = own.mul_scalar(margin.cos() - 1.0) - sine.mul_scalar(margin.sin());
    logits.scatter(1, labels, lost.mul_scalar(SCALE), IndexingUpdateOp::Add)
}

fn mean_loss(logits: Tensor<2>, labels: Tensor<2, Int>) -> Tensor<1> {
    log_softmax(logits, 1).gather(1, labels).mean().neg()
}

fn cosine(a: Tensor<2>, b: Tensor<2>) -> Tensor<2> {
    (normalize(a) * normalize(b)).sum_dim(1)
}

fn read<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.try_into_vec_as::<f32>().expect("the device works")
}

fn joined(parts: Vec<Tensor<2>>) -> Vec<f32> {
    parts.into_iter().flat_map(read).collect()
}

/// Runs on `device`, and waits for everything that was asked for.
pub(crate) fn run(device: &Device, group: Group, shape: &Shape, data: &Data, keep: bool) -> Ran {
    let tracked = device.clone().autodiff();
    let on = match group {
        Group::CrossEntropy | Group::Fused | Group::Margin | Group::Reconstruction => &tracked,
        _ => device,
    };
    let Shape {
        rows,
        dim,
        classes,
        active,
        ..
    } = *shape;
    let track = |tensors: Vec<Tensor<2>>| -> Vec<Tensor<2>> {
        match group {
            Group::CrossEntropy | Group::Fused | Group::Margin | Group::Reconstruction => {
                tensors.into_iter().map(Tensor::require_grad).collect()
            }
            _ => tensors,
        }
    };
    let xs = track(heads(&data.embeddings, [rows, dim], on));
    let ws = track(heads(&data.weights, [classes, dim], on));
    let zs = track(heads(&data.logits, [rows, active], on));
    let flat: Tensor<1, Int> = Tensor::from_data(TensorData::new(data.labels.clone(), [rows]), on);
    let labels: Tensor<2, Int> = flat.clone().reshape([rows, 1]);
    on.sync().expect("the device works");

    let start = Instant::now();
    let first_classes = |w: &Tensor<2>| w.clone().slice([0..active, 0..dim]);
    let (loss, gradients): (Option<Tensor<1>>, Vec<Vec<Tensor<2>>>) = match group {
        Group::CosineLogits => {
            let logits = xs
                .iter()
                .zip(&ws)
                .map(|(x, w)| cosines(x.clone(), first_classes(w)))
                .collect();
            (None, vec![logits])
        }
        Group::CrossEntropy => {
            let losses = zs.iter().map(|z| mean_loss(z.clone(), labels.clone()));
            let loss = losses.reduce(|a, b| a + b).expect("a head");
            let grads = loss.clone().backward();
            let dz = zs
                .iter()
                .map(|z| z.grad(&grads).expect("tracked"))
                .collect();
            (Some(loss.inner()), vec![dz])
        }
        Group::FusedForward | Group::Fused | Group::Margin => {
            let losses = xs.iter().zip(&ws).map(|(x, w)| {
                let logits = cosines(x.clone(), first_classes(w));
                let logits = match group {
                    Group::Margin => with_margin(logits, labels.clone(), group.angular_margin()),
                    _ => logits,
                };
                mean_loss(logits, labels.clone())
            });
            let loss = losses.reduce(|a, b| a + b).expect("a head");
            if group == Group::FusedForward {
                (Some(loss), Vec::new())
            } else {
                let grads = loss.clone().backward();
                let of = |tensors: &[Tensor<2>]| {
                    let grad = |t: &Tensor<2>| t.grad(&grads).expect("tracked");
                    tensors.iter().map(grad).collect()
                };
                let gradients = vec![of(&xs), of(&ws)];
                (Some(loss.inner()), gradients)
            }
        }
        Group::ClassMeans => {
            let ones = Tensor::<1>::ones([rows], on);
            let counts = Tensor::<1>::zeros([active], on).select_assign(
                0,
                flat.clone(),
                ones,
                IndexingUpdateOp::Add,
            );
            let counts = counts.reshape([active, 1]);
            let means = xs.iter().zip(&ws).map(|(x, w)| {
                let sums = Tensor::<2>::zeros([active, dim], on).select_assign(
                    0,
                    flat.clone(),
                    x.clone(),
                    IndexingUpdateOp::Add,
                );
                let means = sums / counts.clone().clamp_min(1.0);
                let seen = counts.clone().greater_elem(0.0).repeat_dim(1, dim);
                let means = first_classes(w).mask_where(seen, means);
                if active == classes {
                    means
                } else {
                    Tensor::cat(vec![means, w.clone().slice([active..classes, 0..dim])], 0)
                }
            });
            (None, vec![means.collect()])
        }
        Group::Reconstruction => {
            let parts = xs[1].clone() + xs[2].clone();
            let loss = cosine(xs[0].clone(), parts).mean().neg().add_scalar(1.0);
            let grads = loss.clone().backward();
            let grad = |i: usize| vec![xs[i].grad(&grads).expect("tracked")];
            (Some(loss.inner()), vec![grad(0), grad(1)])
        }
    };
    // Results are still held: a lazy device computes them now.
    device.sync().expect("the device works");
    let time = start.elapsed();
    let answer = keep.then(|| {
        let mut answer: Answer = loss.map(read).into_iter().collect();
        answer.extend(gradients.into_iter().map(joined));
        answer
    });
    Ran { time, answer }
}

/// The loss of this library's module and its gradients, and waits for them.
pub(crate) fn run_through_burn(shape: &Shape, data: &Data, keep: bool) -> Ran {
    let device = cube().autodiff();
    let tensor = |values: &[f32], rows: usize| {
        let shape = [shape.heads, rows, shape.dim];
        Tensor::<3>::from_data(TensorData::new(values.to_vec(), shape), &device).require_grad()
    };
    let embeddings = tensor(&data.embeddings, shape.rows);
    let mut heads = CosineHeadsConfig::new(shape.heads, shape.classes, shape.dim)
        .with_active(Some(shape.active))
        .init(&device);
    let weights = tensor(&data.weights, shape.classes);
    heads.weight = heads.weight.map(|_| weights);
    let labels = TensorData::new(data.labels.clone(), [shape.rows]);
    let labels: Tensor<1, Int> = Tensor::from_data(labels, &device);
    device.sync().expect("the device works");

    let start = Instant::now();
    let loss = heads.loss(embeddings.clone(), labels, &LossOptions::default());
    let loss = loss.expect("the operands are valid").total;
    let gradients = loss.clone().backward();
    let grad = |of: &Tensor<3>| of.grad(&gradients).expect("tracked");
    let gradients = [grad(&embeddings), grad(&heads.weight.val())];
    device.sync().expect("the device works");
    let time = start.elapsed();
    let answer = keep.then(|| {
        let mut answer: Answer = vec![read(loss.inner())];
        answer.extend(gradients.map(read));
        answer
    });
    Ran { time, answer }
}
