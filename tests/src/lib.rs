//! What the suite is made of: devices to run on, random problems, and comparisons with a reason.

pub mod close;
pub mod devices;
mod dtype;
mod emulated;
pub mod emulator;
pub mod fused;
pub mod launches;
pub mod nvidia;
pub mod problem;
pub mod proof;
pub mod rounded;

/// The README's programs: all compile, and those that need no GPU run.
#[cfg(all(doctest, feature = "fusion", feature = "cpu", feature = "cuda"))]
#[doc = include_str!("../../README.md")]
mod readme {}
