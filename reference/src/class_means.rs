//! Class means (prototypes): `p[h, k] = mean of x[h, n] with y[n] = k`.

use crate::{Real, Sizes, normalize};

/// Sums and counts of rows by class, which add up over batches.
#[derive(Clone, Debug, PartialEq)]
pub struct ClassSums<T> {
    /// `[heads, active, dim]`
    pub sums: Vec<T>,
    /// `[active]`
    pub counts: Vec<u32>,
}

impl<T: Real> ClassSums<T> {
    /// Of no rows at all.
    pub fn zeros(sizes: Sizes) -> Self {
        Self {
            sums: vec![T::of(0.0); sizes.heads * sizes.active * sizes.dim],
            counts: vec![0; sizes.active],
        }
    }

    /// Adds the rows of `embeddings [heads, rows, dim]` whose label is a class; `unit` normalizes each first.
    pub fn add(&mut self, embeddings: &[T], labels: &[i64], sizes: Sizes, unit: bool) {
        let Sizes {
            heads,
            rows,
            dim,
            active,
            ..
        } = sizes;
        let normalized = normalize(embeddings, dim).unit;
        let values = if unit { &normalized[..] } else { embeddings };
        for (n, &label) in labels.iter().enumerate() {
            if !(0..active as i64).contains(&label) {
                continue;
            }
            self.counts[label as usize] += 1;
            for h in 0..heads {
                for d in 0..dim {
                    self.sums[(h * active + label as usize) * dim + d] +=
                        values[(h * rows + n) * dim + d];
                }
            }
        }
    }
}

/// The means, written over the first `active` rows of `weights [heads, classes, dim]`.
/// A class without rows keeps the one it had.
pub fn class_means<T: Real>(sums: &ClassSums<T>, weights: &[T], sizes: Sizes) -> Vec<T> {
    let Sizes {
        heads,
        dim,
        classes,
        active,
        ..
    } = sizes;
    let mut out = weights.to_vec();
    for h in 0..heads {
        for k in 0..active {
            if sums.counts[k] == 0 {
                continue;
            }
            for d in 0..dim {
                out[(h * classes + k) * dim + d] =
                    sums.sums[(h * active + k) * dim + d] / T::of(f64::from(sums.counts[k]));
            }
        }
    }
    out
}
