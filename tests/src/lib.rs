//! What the suite is made of: devices to run on, random problems, and comparisons with a reason.

pub mod close;
pub mod devices;
mod emulated;
pub mod emulator;
pub mod fused;
pub mod launches;
pub mod nvidia;
pub mod problem;
pub mod proof;
pub mod rounded;
