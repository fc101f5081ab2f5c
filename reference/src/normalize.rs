//! `x̂ = x / max(‖x‖₂, 1e-12)`: `torch.nn.functional.normalize(x, p=2, dim=-1)`, gradient included.

use crate::Real;

/// The norm below which a row is divided by the constant instead (torch's `eps`).
pub const EPSILON: f64 = 1e-12;

/// Rows on the unit sphere, and how they got there.
#[derive(Clone, Debug)]
pub struct Normalized<T> {
    /// `[rows, dim]`
    pub unit: Vec<T>,
    /// `[rows]`, `max(‖x‖, EPSILON)`
    pub divisor: Vec<T>,
    /// `[rows]`, whether the divisor is the constant.
    pub clamped: Vec<bool>,
}

/// Normalizes each row of `x [rows, dim]`.
pub fn normalize<T: Real>(x: &[T], dim: usize) -> Normalized<T> {
    let epsilon = T::of(EPSILON);
    let mut out = Normalized {
        unit: Vec::with_capacity(x.len()),
        divisor: Vec::new(),
        clamped: Vec::new(),
    };
    for row in x.chunks_exact(dim) {
        let norm = row.iter().map(|&v| v * v).sum::<T>().sqrt();
        let clamped = norm < epsilon;
        let divisor = if clamped { epsilon } else { norm };
        out.unit.extend(row.iter().map(|&v| v / divisor));
        out.divisor.push(divisor);
        out.clamped.push(clamped);
    }
    out
}

/// `dx = (dx̂ − x̂ (x̂·dx̂)) / ‖x‖`, or `dx̂ / EPSILON` where the norm was clamped (there it is a constant).
pub fn normalize_backward<T: Real>(
    normalized: &Normalized<T>,
    grad_unit: &[T],
    dim: usize,
) -> Vec<T> {
    let mut grad = Vec::with_capacity(grad_unit.len());
    for (row, (unit, upstream)) in normalized
        .unit
        .chunks_exact(dim)
        .zip(grad_unit.chunks_exact(dim))
        .enumerate()
    {
        let along = if normalized.clamped[row] {
            T::of(0.0)
        } else {
            unit.iter().zip(upstream).map(|(&u, &g)| u * g).sum::<T>()
        };
        let divisor = normalized.divisor[row];
        grad.extend(
            unit.iter()
                .zip(upstream)
                .map(|(&u, &g)| (g - u * along) / divisor),
        );
    }
    grad
}
