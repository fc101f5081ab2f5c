//! `z[h, n, c] = scale · x̂[h, n] · ŵ[h, c]` for `c < active`.

use crate::{Real, Sizes, normalize, normalize_backward};

/// Logits `[heads, rows, active]`.
pub fn cosine_logits<T: Real>(embeddings: &[T], weights: &[T], sizes: Sizes, scale: T) -> Vec<T> {
    let Sizes {
        heads,
        rows,
        dim,
        classes,
        active,
    } = sizes;
    let x = normalize(embeddings, dim).unit;
    let w = normalize(weights, dim).unit;
    let mut logits = Vec::with_capacity(heads * rows * active);
    for h in 0..heads {
        for n in 0..rows {
            for c in 0..active {
                let row = &x[(h * rows + n) * dim..][..dim];
                let class = &w[(h * classes + c) * dim..][..dim];
                logits.push(scale * row.iter().zip(class).map(|(&a, &b)| a * b).sum::<T>());
            }
        }
    }
    logits
}

/// From `grad_logits [heads, rows, active]` to `([heads, rows, dim], [heads, classes, dim])`;
/// the rows `active..classes` of the second are zero.
pub fn cosine_logits_backward<T: Real>(
    embeddings: &[T],
    weights: &[T],
    grad_logits: &[T],
    sizes: Sizes,
    scale: T,
) -> (Vec<T>, Vec<T>) {
    let Sizes {
        heads,
        rows,
        dim,
        classes,
        active,
    } = sizes;
    let x = normalize(embeddings, dim);
    let w = normalize(weights, dim);
    let mut grad_x = vec![T::of(0.0); embeddings.len()];
    let mut grad_w = vec![T::of(0.0); weights.len()];
    for h in 0..heads {
        for n in 0..rows {
            for c in 0..active {
                let g = scale * grad_logits[(h * rows + n) * active + c];
                let row = (h * rows + n) * dim;
                let class = (h * classes + c) * dim;
                for d in 0..dim {
                    grad_x[row + d] += g * w.unit[class + d];
                    grad_w[class + d] += g * x.unit[row + d];
                }
            }
        }
    }
    (
        normalize_backward(&x, &grad_x, dim),
        normalize_backward(&w, &grad_w, dim),
    )
}
