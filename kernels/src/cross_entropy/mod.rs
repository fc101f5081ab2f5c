//! Softmax cross-entropy of logits that are in memory.
//!
//! ```text
//! lse[h,n] = ln Σ_c e^z[h,n,c]
//! ℓ[h,n]   = lse − Σ_c t[n,c] z[h,n,c]            t[n,c] = (1 − ε) [c = y] + ε/K,   ε: label smoothing
//! total    = Σ_h α_h · reduce_n ℓ[h,n]            α_h: a weight for each head
//! dz       = u · (e^(z − lse) − t)                u[h,n]: what arrives at ℓ[h,n], 0 for rows that are ignored
//! ```
//!
//! It is `torch.nn.functional.cross_entropy` per head. The logits are read once forward and once backward,
//! and never written. What rounding took from lse is saved beside it, so that a shift of all logits changes nothing.

mod launch;
mod plane;
mod unit;

#[cfg(feature = "burn-unfused")]
pub(crate) use launch::backward_from;
pub use launch::{Inputs, Options, backward, forward};
