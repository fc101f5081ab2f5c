//! `z[h, n, c] = scale · x̂[h, n] · ŵ[h, c]` for `c < active`.

use crate::{Real, Sizes, normalize, normalize_backward};

/// Gradients of what a cosine head is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct Gradients<T> {
    /// `[heads, rows, dim]`
    pub embeddings: Vec<T>,
    /// `[heads, classes, dim]`; the rows `active..classes` are zero.
    pub weights: Vec<T>,
    /// `[heads]`: of the scale, as if each head had its own.
    pub scale: Vec<T>,
}

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

/// From `grad_logits [heads, rows, active]`.
pub fn cosine_logits_backward<T: Real>(
    embeddings: &[T],
    weights: &[T],
    grad_logits: &[T],
    sizes: Sizes,
    scale: T,
) -> Gradients<T> {
    let cosines = cosine_logits(embeddings, weights, sizes, T::of(1.0));
    let of_scale = products_by_head(grad_logits, &cosines, sizes.heads);
    let (grad_x, grad_w) = operand_gradients(embeddings, weights, grad_logits, sizes, scale);
    Gradients {
        embeddings: grad_x,
        weights: grad_w,
        scale: of_scale,
    }
}

/// Those of embeddings and class weights.
pub(crate) fn operand_gradients<T: Real>(
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

/// The sums of `a · b`, head by head.
pub(crate) fn products_by_head<T: Real>(a: &[T], b: &[T], heads: usize) -> Vec<T> {
    let of_head = a.len() / heads;
    let head = |h: usize| h * of_head..(h + 1) * of_head;
    let product = |h| a[head(h)].iter().zip(&b[head(h)]).map(|(&a, &b)| a * b);
    (0..heads).map(|h| product(h).sum()).collect()
}
