//! Cosine logits and their softmax cross-entropy in one op, in memory that does not grow with rows × classes.
//!
//! For head `h`, row `n` with label `y`, and the active classes `c < K`:
//!
//! ```text
//! z[h,n,c] = scale · x̂[h,n] · ŵ[h,c]            x̂ = x / max(‖x‖₂, 1e-12), the same for ŵ
//! lse[h,n] = ln Σ_c e^z
//! ℓ[h,n]   = lse − Σ_c t[n,c] z[h,n,c]            t[n,c] = (1 − ε) [c = y] + ε/K,   ε: label smoothing
//! total    = Σ_h α_h · reduce_n ℓ[h,n]            α_h: a weight for each head
//! ```
//!
//! It is `F.cross_entropy(scale * F.linear(F.normalize(x), F.normalize(w))[:, :K], y)` of PyTorch, per head. With a [`Margin`] the logit
//! of a row's own class is `scale · (cos(θ + m) − m')` instead, where θ is the angle between the two; lse is that of the logits with it,
//! predictions are those of the logits without. Rows that do not count have none. The
//! backward pass multiplies the logits again, a tile at a time, and the saved `lse`, with what rounding took from it, turns them into
//! probabilities:
//!
//! ```text
//! g  = u · (e^(z − lse) − t)
//! dx̂ = scale Σ_c g ŵ_c      dx = (dx̂ − x̂ (x̂·dx̂)) / ‖x‖        (dx̂ / 1e-12 where the norm was clamped)
//! dŵ = scale Σ_n g x̂_n      dw likewise
//! ds = Σ_n Σ_c g · x̂_n · ŵ_c                     the gradient of the scale, of each head
//! ```
//!
//! With a margin `g[y]` is also multiplied by the slope, `cos m + sin m · cos θ / sin θ`, or 1 where `θ + m` passes π; not in `ds`, where
//! the cosine of a row's own class is what it counts as.
//!
//! Of a row whose norm passes f32 (from about 1.8e19 on) logits and gradient are 0 or NaN.
//!
//! `u[h,n]` is what arrives at `ℓ[h,n]`. Of a gradient `G` of the total ([`Upstream::Total`](crate::Upstream)) that is `α_h G`, or
//! `α_h G / M` under a mean over the M rows that count; [`Upstream::Loss`](crate::Upstream) gives the gradient of each loss instead,
//! and α takes no part. It is 0 for rows that are ignored.
//!
//! Memory beside the outputs:
//!
//! | device | |
//! |---|---|
//! | CPU | 60 MiB, or 8 MiB a core if that is more. More only if a panel of rows and 32 classes for each core do not fit; and in f16 and bf16 if a head's rows do not fit: its weight gradients are then carried in f32 |
//! | GPU | 160 MiB for everything with a class axis, or one tile of classes × all rows if that is more; a copy of the embeddings and their gradient in f32, rows and columns padded to whole tiles of 64 or 128; `12·H·N` bytes (`16` with label smoothing) for each part that a row's softmax is found in, and `8·H·N` for the targets' logits; `4·H·N` with the scale's gradient and a margin; up to 32 MiB for either operand where its gradient is summed in parts |
//! | GPU, a small step | the logit gradients, at most 32 MiB |
//!
//! The scale's gradient takes `4·H·N` bytes more, and room for that of the embeddings, whether it is asked for or not.
//!
//! Every output element has one owner that adds in a fixed order, so the same input gives the same bits on the same device.
//!
//! On tensor cores unit rows and logit gradients are rounded to the operands' dtype (or to TF32) between the products, as
//! they are in PyTorch's own ops of that dtype; sums are f32. Everything else is f32 throughout.
//!
//! The cosine head is that of NormFace (Wang et al., 2017), with weights that prototypes can take the place of, as in prototypical
//! networks (Snell et al., 2017); the loss without logits is in the spirit of Cut Cross-Entropy (Wijmans et al., 2024).

mod captured;
mod launch;
mod margin;
mod small;
mod tiled;
mod unit;

pub use captured::Captured;
#[cfg(feature = "burn-unfused")]
pub(crate) use launch::backward_from;
pub use launch::{Inputs, Options, backward, forward, forward_backward, predictions};
pub use margin::Margin;
