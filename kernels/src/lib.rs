//! CubeCL kernels for cosine-classifier heads: many heads at once, at any number of classes, on any CubeCL device,
//! in memory that does not grow with rows × classes.
//!
//! | op | what it does |
//! |---|---|
//! | [`cosine_cross_entropy`] | cosine logits and their softmax cross-entropy, fused: loss, lse, predictions; `dX`, `dW` |
//! | [`cosine_logits`] | the logits themselves, and their gradients |
//! | [`cross_entropy`] | softmax cross-entropy of logits that are in memory |
//! | [`class_means`] | prototype averaging, streamed over batches |
//! | [`reconstruction`] | `1 − mean cos(whole, first + second)` |
//!
//! Operands are [`TensorHandle`](cubecl::std::tensor::TensorHandle)s of f32, f16 or bf16, accumulated in f32; the last
//! axis is packed, the others have any stride. Inputs are never modified, results are new contiguous tensors,
//! and the same input gives the same bits on the same device. What the host can see is a typed [`Error`] before
//! anything is launched; labels are data, and a bad one is reported when a result is read.
//!
//! The crate links no runtime of its own accord: turn on `cpu`, `cuda` or `wgpu`, here or in `cubecl`.
//!
//! | feature | |
//! |---|---|
//! | `cpu`, `cuda`, `wgpu` | CubeCL's runtimes; the functions on Burn tensors reach the devices whose features are on here |
//! | `burn` | the ops as functions on Burn tensors, with autodiff, and the module `CosineHeads`, in the module `burn` |
//! | `fusion` | the same under Burn's fusion: on where Burn's is |

// In kernels loops run over ranges: CubeCL compiles no iterator adaptors.
#![allow(clippy::needless_range_loop)]

pub mod class_means;
pub mod cosine_cross_entropy;
pub mod cosine_logits;
pub mod cross_entropy;
pub mod reconstruction;

#[cfg(feature = "burn")]
pub mod burn;

mod blueprint;
mod error;
mod gradients;
mod loss;
mod math;
mod operand;
mod packing;
mod tiles;

/// The CubeCL whose clients and tensors the ops take.
pub use cubecl;

pub use blueprint::{Strategy, Variant};
pub use error::Error;
pub use gradients::{Gradients, Wanted};
pub use loss::{LossOptions, LossOutput, Reduction, Upstream};
