//! The ops of protohead as plain loops over slices.
//!
//! This crate is what the kernels are checked against, so it is written to be read beside the formulas and
//! for nothing else: no blocking, no vectors, no dependency. Everything is generic over [`Real`]; `f64`
//! gives the truth, and `f32` gives the honest error that the formula has in the working precision.
//!
//! Tensors are row-major slices: embeddings `[heads, rows, dim]`, class weights `[heads, classes, dim]`,
//! logits `[heads, rows, active]`, labels `[rows]`.

mod class_means;
mod cosine_logits;
mod cross_entropy;
mod normalize;
mod real;
mod reconstruction;

pub use class_means::{ClassSums, class_means};
pub use cosine_logits::{cosine_logits, cosine_logits_backward};
pub use cross_entropy::{
    CrossEntropy, LossOptions, Reduction, Upstream, cross_entropy, cross_entropy_backward,
};
pub use normalize::{EPSILON, Normalized, normalize, normalize_backward};
pub use real::Real;
pub use reconstruction::{Reconstruction, reconstruction, reconstruction_backward};

/// The sizes of a problem: `heads`, `rows` (batch), `dim`, stored `classes`, and `active` classes ≤ `classes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// H, the number of independent heads.
    pub heads: usize,
    /// N, the rows of the batch.
    pub rows: usize,
    /// D, the embedding size.
    pub dim: usize,
    /// C, the class weights stored.
    pub classes: usize,
    /// K ≤ C: only the classes `0..K` take part.
    pub active: usize,
}

/// `cross_entropy(cosine_logits(x, w))`, the composition that the fused op must equal.
pub fn cosine_cross_entropy<T: Real>(
    embeddings: &[T],
    weights: &[T],
    labels: &[i64],
    sizes: Sizes,
    scale: T,
    options: &LossOptions<T>,
) -> CrossEntropy<T> {
    let logits = cosine_logits(embeddings, weights, sizes, scale);
    cross_entropy(&logits, labels, sizes, options)
}

/// Gradients of [`cosine_cross_entropy`]: `([heads, rows, dim], [heads, classes, dim])`.
pub fn cosine_cross_entropy_backward<T: Real>(
    embeddings: &[T],
    weights: &[T],
    labels: &[i64],
    sizes: Sizes,
    scale: T,
    options: &LossOptions<T>,
    upstream: &Upstream<T>,
) -> (Vec<T>, Vec<T>) {
    let logits = cosine_logits(embeddings, weights, sizes, scale);
    let grad_logits = cross_entropy_backward(&logits, labels, sizes, options, upstream);
    cosine_logits_backward(embeddings, weights, &grad_logits, sizes, scale)
}
