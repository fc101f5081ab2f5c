//! Softmax cross-entropy of logits that are in memory.
//!
//! ```text
//! lse[h,n] = ln Σ_c e^z[h,n,c]
//! ℓ[h,n]   = lse − (1 − ε) z[y] − ε/K Σ_c z          ε: label smoothing
//! total    = Σ_h α_h · reduce_n ℓ[h,n]
//! dz       = upstream · (e^(z − lse) − target)
//! ```
//!
//! It is `torch.nn.functional.cross_entropy` per head. The logits are read once forward and once backward,
//! and never written.

mod launch;
mod plane;
mod unit;

pub use launch::{Inputs, Options, backward, forward};
