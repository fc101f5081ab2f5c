//! Cosine logits and their softmax cross-entropy in one op, in memory that does not grow with rows × classes.
//!
//! For head `h`, row `n` with label `y`, and the active classes `c < K`:
//!
//! ```text
//! z[h,n,c] = scale · x̂[h,n] · ŵ[h,c]            x̂ = x / max(‖x‖₂, 1e-12), the same for ŵ
//! lse[h,n] = ln Σ_c e^z
//! ℓ[h,n]   = lse − (1 − ε) z[y] − ε/K Σ_c z       ε: label smoothing
//! total    = Σ_h α_h · reduce_n ℓ[h,n]
//! ```
//!
//! It is `F.cross_entropy(scale * F.linear(F.normalize(x), F.normalize(w))[:, :K], y)` of PyTorch, per head. The
//! backward pass rebuilds the logits a tile at a time from the saved `lse`:
//!
//! ```text
//! g  = upstream · (e^(z − lse) − target)
//! dx̂ = scale Σ_c g ŵ_c      dx = (dx̂ − x̂ (x̂·dx̂)) / ‖x‖        (dx̂ / 1e-12 where the norm was clamped)
//! dŵ = scale Σ_n g x̂_n      dw likewise
//! ```
//!
//! Memory beside the outputs:
//!
//! - plane and cmma: a copy of the embeddings (plane: in f32; cmma: in their dtype), their gradient in f32, both with rows and
//!   columns padded to whole tiles of 64 or 128; `12·H·N` bytes for each of the parts that a row's softmax is found in (some a chunk
//!   of classes; `16` with label smoothing), and 160 MiB for what has a class axis, a chunk of classes at
//!   a time; more only where a single tile of classes with all rows is more. Where few cubes would own gradients, they are summed in
//!   parts by more: up to 32 MiB for either operand.
//! - unit: a workspace of 60 MiB, or 8 MiB a core where there are many, through which the operands go in chunks; more only where a
//!   panel of rows and 32 classes for each core are more (f16 and bf16 gradients of a head with more rows than fit are carried in f32 beside it).
//! - small: the logit gradients, at most 32 MiB.
//!
//! Nothing else grows with `N·K`. Every output element has one owner that adds in a fixed order, so the same input gives the same
//! bits on the same device.
//!
//! On tensor cores unit rows and logit gradients are rounded to the operands' dtype (or to TF32) between the products, as
//! they are in PyTorch's own ops of that dtype; sums are f32. The other variants keep f32 throughout.

mod captured;
mod launch;
mod small;
mod tiled;
mod unit;

pub use captured::Captured;
pub use launch::{Inputs, Options, backward, forward, forward_backward};
