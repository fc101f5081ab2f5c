//! The ops of protohead as plain loops over slices.
//!
//! This crate is what the kernels are checked against, so it is written to be read beside the formulas and
//! for nothing else: no blocking, no vectors, no dependency. Everything is generic over [`Real`]; `f64`
//! gives the truth, and `f32` gives the honest error that the formula has in the working precision.
//!
//! Tensors are row-major slices: embeddings `[heads, rows, dim]`, class weights `[heads, classes, dim]`,
//! logits `[heads, rows, active]`, labels `[rows]`.

mod class_means;
mod cosine_cross_entropy;
mod cosine_logits;
mod cross_entropy;
mod normalize;
mod real;
mod reconstruction;

pub use class_means::{ClassSums, class_means};
pub use cosine_cross_entropy::{
    Cosine, Margin, SINE, cosine_cross_entropy, cosine_cross_entropy_backward,
};
pub use cosine_logits::{Gradients, cosine_logits, cosine_logits_backward};
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
