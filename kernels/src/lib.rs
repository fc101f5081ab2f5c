//! Placeholder.
pub mod class_means;
pub mod cosine_cross_entropy;
pub mod cosine_logits;
pub mod cross_entropy;
pub mod reconstruction;

mod blueprint;
mod error;
mod loss;
mod math;
mod operand;
mod packing;

pub use blueprint::{Strategy, Variant};
pub use error::Error;
pub use loss::{LossOptions, LossOutput, Reduction, Upstream};
pub use packing::Gradients;
