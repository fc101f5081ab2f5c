//! Cosine logits, for those who want them in memory: `z[h,n,c] = scale · x̂[h,n] · ŵ[h,c]` for `c < K`.
//!
//! It is `scale * F.linear(F.normalize(x), F.normalize(w))[:, :K]` of PyTorch, per head. Backward, from `dz`:
//!
//! ```text
//! dx̂ = scale Σ_c dz ŵ_c      dx = (dx̂ − x̂ (x̂·dx̂)) / ‖x‖        (dx̂ / 1e-12 where the norm was clamped)
//! dŵ = scale Σ_n dz x̂_n      dw likewise
//! ds = Σ_n Σ_c dz · x̂_n · ŵ_c                    the gradient of the scale, of each head
//! ```
//!
//! Memory beside the outputs: on a CPU f32 copies of the embeddings and of the active class weights, rows and columns padded to whole
//! tiles (of the class weights two in the forward pass); on a GPU what [`cosine_cross_entropy`](crate::cosine_cross_entropy) takes, but
//! for what it keeps by row. The scale's gradient takes `4·H·N` bytes more, and room for that of the embeddings.

mod launch;
mod problem;
mod tiled;
mod unit;

pub use launch::{Inputs, Options, backward, forward};
pub(crate) use problem::CosineProblem;
#[cfg(feature = "burn-unfused")]
pub(crate) use problem::{Sizes, active_classes, same_dtype};
