//! CubeCL kernels for cosine-classifier heads: many heads at once, at any number of classes, on CubeCL's CPU, CUDA and wgpu devices.
//! Beside its outputs [`cosine_cross_entropy`] takes no memory that grows with `rows × classes`; its page has the numbers.
//!
//! | op | what it does |
//! |---|---|
//! | [`cosine_cross_entropy`] | cosine logits and their softmax cross-entropy, fused: loss, lse, predictions; `dX`, `dW` |
//! | [`cosine_logits`] | the logits themselves, and their gradients |
//! | [`cross_entropy`] | softmax cross-entropy of logits that are in memory |
//! | [`class_means`] | prototype averaging, streamed over batches |
//! | [`reconstruction`] | `1 − mean cos(whole, first + second)` |
//!
//! Float operands are [`TensorHandle`](cubecl::std::tensor::TensorHandle)s of f32, f16 or bf16. All operands of a product have one
//! dtype; sums, losses and the gradients of losses are f32. The last axis of an operand is packed (stride 1), the others may have any
//! stride. Labels are i32, i64 or u32; they and the gradients of losses are contiguous. Inputs are never modified, results are new
//! contiguous tensors, and the same input gives the same bits on the same device.
//!
//! Shapes, strides, dtypes, devices and options are checked before anything is launched, and what does not fit is an [`Error`] with
//! the numbers. The values of labels are only known to the device: a row whose label is not a class counts as ignored, and every
//! function that waits for a result (`check`, `read` and the other `read_…`; in Burn only `check`) returns [`Error::Label`]. Reading raw
//! handles or gradients does not check, so call `check` before you use them.
//!
//! By default the crate links no runtime: turn on `cpu`, `cuda` or `wgpu`. Turn them on here rather than only in `cubecl`, since Burn's
//! functions and the CUDA kernels' own instructions need them. `examples/step.rs` is a whole program.
//!
//! | feature | |
//! |---|---|
//! | `cpu`, `cuda`, `wgpu` | CubeCL's runtimes, and Burn's devices on them |
//! | `burn` | the ops as functions on Burn tensors, with autodiff, and the module `CosineHeads`, in the module `burn`; turns Burn's fusion on |
//! | `burn-unfused` | the same for a Burn that is built without its fusion, which stays off |

// In kernels loops run over ranges: CubeCL compiles no iterator adaptors.
#![allow(clippy::needless_range_loop)]

pub mod class_means;
pub mod cosine_cross_entropy;
pub mod cosine_logits;
pub mod cross_entropy;
pub mod reconstruction;

#[cfg(feature = "burn-unfused")]
pub mod burn;

mod blueprint;
mod error;
mod gradients;
mod loss;
mod math;
mod memory;
mod operand;
mod pace;
mod scale;
mod tiles;
mod transfer;

/// The CubeCL whose clients and tensors the ops take.
pub use cubecl;

pub use blueprint::{Strategy, Variant};
pub use error::Error;
pub use gradients::{Gradients, Wanted};
pub use loss::{LossOptions, LossOutput, LossValues, Reduction, Upstream};
pub use transfer::{download, upload};
