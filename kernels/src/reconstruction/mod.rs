//! How well two parts add up to the whole, in direction: `1 − mean_n cos(whole[n], first[n] + second[n])`.
//!
//! With `u = whole / max(‖whole‖, 1e-12)` and `v` the same of `first + second`, backward is
//! `d whole = −g/N (v − u (u·v)) / ‖whole‖` and `d part = −g/N (u − v (u·v)) / ‖first + second‖`; where a norm was
//! clamped it is a constant. The parts enter only by their sum, so they share one gradient.

mod launch;
mod plane;
mod row;
mod unit;

pub use launch::{Gradients, Inputs, Options, Output, Wanted, backward, forward};
