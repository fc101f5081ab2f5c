//! How well two parts add up to the whole, in direction: `1 − mean_n cos(whole[n], first[n] + second[n])` of N rows. It ties the
//! embeddings of a signal's parts to that of the signal.
//!
//! With `u = whole / max(‖whole‖, 1e-12)`, `v` the same of `first + second`, and the gradient `g` that arrives at the loss, backward
//! is `d whole = −g/N (v − u (u·v)) / ‖whole‖` and `d part = −g/N (u − v (u·v)) / ‖first + second‖`; where a norm was
//! clamped it is a constant. The parts enter only by their sum, so they share one gradient.

mod launch;
mod plane;
mod row;
mod unit;

pub use launch::{Gradients, Inputs, Options, Output, Wanted, backward, forward};
