//! The reference, in f64.

use std::time::Instant;

use protohead_reference as reference;

use crate::{Data, Group, Ran, Shape};

pub(crate) fn run(group: Group, shape: &Shape, data: &Data, keep: bool) -> Ran {
    let wide = |values: &[f32]| -> Vec<f64> { values.iter().map(|&v| f64::from(v)).collect() };
    let narrow = |values: &[f64]| -> Vec<f32> { values.iter().map(|&v| v as f32).collect() };
    let (x, w, z) = (
        wide(&data.embeddings),
        wide(&data.weights),
        wide(&data.logits),
    );
    let labels: Vec<i64> = data.labels.iter().map(|&l| i64::from(l)).collect();
    let sizes = reference::Sizes {
        heads: shape.heads,
        rows: shape.rows,
        dim: shape.dim,
        classes: shape.classes,
        active: shape.active,
    };
    let options = reference::LossOptions {
        reduction: reference::Reduction::Mean,
        label_smoothing: 0.0,
        ignore_index: -100,
        head_weights: vec![1.0; shape.heads],
    };
    let mut cosine = reference::Cosine::scaled(16.0);
    cosine.margin.angular = f64::from(group.angular_margin());
    let one = reference::Upstream::Total(1.0);
    let start = Instant::now();
    let answer = match group {
        Group::CosineLogits => vec![reference::cosine_logits(&x, &w, sizes, 16.0)],
        Group::CrossEntropy => {
            let loss = reference::cross_entropy(&z, &labels, sizes, &options);
            let grad = reference::cross_entropy_backward(&z, &labels, sizes, &options, &one);
            vec![vec![loss.total], grad]
        }
        Group::FusedForward => {
            let loss = reference::cosine_cross_entropy(&x, &w, &labels, sizes, cosine, &options);
            vec![vec![loss.total]]
        }
        Group::Fused | Group::Margin => {
            let loss = reference::cosine_cross_entropy(&x, &w, &labels, sizes, cosine, &options);
            let gradients = reference::cosine_cross_entropy_backward(
                &x, &w, &labels, sizes, cosine, &options, &one,
            );
            vec![vec![loss.total], gradients.embeddings, gradients.weights]
        }
        Group::ClassMeans => {
            let mut sums = reference::ClassSums::zeros(sizes);
            sums.add(&x, &labels, sizes, false);
            vec![reference::class_means(&sums, &w, sizes)]
        }
        Group::Reconstruction => {
            let part = |i: usize| &x[i * shape.rows * shape.dim..][..shape.rows * shape.dim];
            let loss = reference::reconstruction(part(0), part(1), part(2), shape.dim);
            let (whole, parts) =
                reference::reconstruction_backward(part(0), part(1), part(2), shape.dim, 1.0);
            vec![vec![loss.loss], whole, parts]
        }
    };
    let time = start.elapsed();
    Ran {
        time,
        answer: keep.then(|| answer.iter().map(|part| narrow(part)).collect()),
    }
}
