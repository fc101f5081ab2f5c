//! `1 − mean_n cos(whole[n], first[n] + second[n])`: how well two parts add up to the whole, in direction.

use crate::{Real, normalize, normalize_backward};

/// The result of a forward pass.
#[derive(Clone, Debug)]
pub struct Reconstruction<T> {
    /// `1 − mean(cosines)`
    pub loss: T,
    /// `[rows]`
    pub cosines: Vec<T>,
}

fn add<T: Real>(a: &[T], b: &[T]) -> Vec<T> {
    a.iter().zip(b).map(|(&a, &b)| a + b).collect()
}

/// Of three `[rows, dim]` tensors.
pub fn reconstruction<T: Real>(
    whole: &[T],
    first: &[T],
    second: &[T],
    dim: usize,
) -> Reconstruction<T> {
    let w = normalize(whole, dim).unit;
    let p = normalize(&add(first, second), dim).unit;
    let cosines: Vec<T> = w
        .chunks_exact(dim)
        .zip(p.chunks_exact(dim))
        .map(|(w, p)| w.iter().zip(p).map(|(&a, &b)| a * b).sum())
        .collect();
    let mean = cosines.iter().copied().sum::<T>() / T::of(cosines.len() as f64);
    Reconstruction {
        loss: T::of(1.0) - mean,
        cosines,
    }
}

/// `(d whole, d part)`; `first` and `second` enter only by their sum, so they share the second gradient.
pub fn reconstruction_backward<T: Real>(
    whole: &[T],
    first: &[T],
    second: &[T],
    dim: usize,
    upstream: T,
) -> (Vec<T>, Vec<T>) {
    let w = normalize(whole, dim);
    let p = normalize(&add(first, second), dim);
    let share = -upstream / T::of((whole.len() / dim) as f64);
    let scaled = |v: &[T]| v.iter().map(|&v| share * v).collect::<Vec<T>>();
    (
        normalize_backward(&w, &scaled(&p.unit), dim),
        normalize_backward(&p, &scaled(&w.unit), dim),
    )
}
