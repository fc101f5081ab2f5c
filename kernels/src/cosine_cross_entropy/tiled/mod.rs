//! Tiles of logits, on tensor cores or in multiply-adds, folded where they arise.
//!
//! Forward: a cube owns a tile of rows and a part of the chunk's class tiles. It folds each tile of logits into the online
//! softmax of the registers that hold it; the units that share a row merge at the end, and a last launch merges the
//! parts in their order. The number of parts follows from the device and the shapes, so the same device gives the
//! same bits.
//!
//! Backward, a chunk of classes at a time: logits again, turned into logit gradients of the packed operands' dtype in a
//! bounded workspace, which two products take to the operands: `8·H·N·D·K` operations with the forward pass. A row's
//! upstream gradient is divided by its head's largest finite one before it is rounded, and multiplied back in f32.
//!
//! Both at once, in f32 multiply-adds and with a positive scale: the cosines of the first chunk stay where its logit gradients will
//! be, which makes `6·H·N·D·K` operations of it where that chunk has all classes.

mod backward;
mod forward;
mod rows;
mod softmaxes;

pub(super) use backward::{backward_chunks, launch_backward};
pub(super) use forward::{forward_chunks, launch_forward};
pub(super) use rows::gather_rows;
