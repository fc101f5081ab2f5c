//! `x̂ = x / max(‖x‖₂, EPSILON)`, and the way back: `dx = (dx̂ − x̂ (x̂·dx̂)) / ‖x‖₂`, or `dx̂ / EPSILON` where the norm was clamped.

use cubecl::prelude::*;

/// The norm below which a row is divided by the constant instead, as in torch's `normalize`.
pub(crate) const EPSILON: f32 = 1e-12;

/// What a row of this norm is multiplied with.
#[cube]
pub(crate) fn inverse_norm(norm: f32) -> f32 {
    1.0 / max(norm, EPSILON)
}

/// `along`, the product of a row with its gradient, or nothing where the norm was clamped and the length of the row is free.
#[cube]
pub(crate) fn projection(along: f32, norm: f32) -> f32 {
    let mut projection = along;
    if norm < EPSILON {
        projection = 0.0;
    }
    projection
}
