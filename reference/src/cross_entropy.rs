//! Softmax cross-entropy, as `torch.nn.functional.cross_entropy` defines it, per head.

use crate::{Real, Sizes};

/// What becomes of the losses of a head's rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// Each row keeps its own: `[heads, rows]`.
    None,
    /// Their sum: `[heads]`.
    Sum,
    /// Their mean over the rows that count: `[heads]`; 0 if none does.
    Mean,
}

/// The options of a loss.
#[derive(Clone, Debug)]
pub struct LossOptions<T> {
    /// How a head's rows become its loss.
    pub reduction: Reduction,
    /// ε of the target `(1 − ε)·onehot + ε/active`.
    pub label_smoothing: T,
    /// Rows with this label have no loss and no gradient.
    pub ignore_index: i64,
    /// `[heads]`, α of `total = Σ_h α_h · Σ loss[h]`.
    pub head_weights: Vec<T>,
}

/// The gradient that arrives from above.
#[derive(Clone, Debug)]
pub enum Upstream<T> {
    /// Of `total`.
    Total(T),
    /// Of `loss`, with its shape; head weights take no part.
    Loss(Vec<T>),
}

/// The result of a forward pass.
#[derive(Clone, Debug)]
pub struct CrossEntropy<T> {
    /// `[heads]`, or `[heads, rows]` without a reduction.
    pub loss: Vec<T>,
    /// `Σ_h α_h · Σ loss[h]`
    pub total: T,
    /// `[heads, rows]`, `ln Σ_c e^z`
    pub lse: Vec<T>,
    /// `[heads, rows]`, the first class of the highest logit.
    pub predictions: Vec<u32>,
    /// The rows whose label is neither a class nor the ignored one; they count as ignored.
    pub invalid: Vec<usize>,
}

/// Whether a row takes part, by its label: ignored first, so that a class can be ignored.
pub(crate) fn counts<T>(label: i64, active: usize, options: &LossOptions<T>) -> bool {
    label != options.ignore_index && (0..active as i64).contains(&label)
}

/// The class of the highest logit, of equal ones the first.
pub(crate) fn first_of_highest<T: Real>(row: &[T]) -> usize {
    let mut best = 0;
    for c in 1..row.len() {
        if row[c] > row[best] {
            best = c;
        }
    }
    best
}

/// Cross-entropy of `logits [heads, rows, active]`.
pub fn cross_entropy<T: Real>(
    logits: &[T],
    labels: &[i64],
    sizes: Sizes,
    options: &LossOptions<T>,
) -> CrossEntropy<T> {
    let Sizes {
        heads,
        rows,
        active,
        ..
    } = sizes;
    let smoothing = options.label_smoothing;
    let counted = labels
        .iter()
        .filter(|&&label| counts(label, active, options))
        .count();
    let mut out = CrossEntropy {
        loss: Vec::new(),
        total: T::of(0.0),
        lse: Vec::new(),
        predictions: Vec::new(),
        invalid: (0..rows)
            .filter(|&n| {
                labels[n] != options.ignore_index && !(0..active as i64).contains(&labels[n])
            })
            .collect(),
    };
    for h in 0..heads {
        let mut sum = T::of(0.0);
        for n in 0..rows {
            let row = &logits[(h * rows + n) * active..][..active];
            let best = first_of_highest(row);
            let peak = row[best];
            let lse = peak + row.iter().map(|&z| (z - peak).exp()).sum::<T>().ln();
            let loss = if counts(labels[n], active, options) {
                let target = row[labels[n] as usize];
                let mut loss = lse - (T::of(1.0) - smoothing) * target;
                // A class that is masked with −∞ has no say where nothing is smoothed.
                if smoothing > T::of(0.0) {
                    let average = row.iter().copied().sum::<T>() / T::of(active as f64);
                    loss -= smoothing * average;
                }
                loss
            } else {
                T::of(0.0)
            };
            sum += loss;
            if options.reduction == Reduction::None {
                out.loss.push(loss);
            }
            out.lse.push(lse);
            out.predictions.push(best as u32);
        }
        let reduced = match options.reduction {
            Reduction::None | Reduction::Sum => sum,
            Reduction::Mean if counted == 0 => T::of(0.0),
            Reduction::Mean => sum / T::of(counted as f64),
        };
        if options.reduction != Reduction::None {
            out.loss.push(reduced);
        }
        out.total += options.head_weights[h] * reduced;
    }
    out
}

/// The gradient of the logits, `[heads, rows, active]`: `upstream · (softmax(z) − target)`.
pub fn cross_entropy_backward<T: Real>(
    logits: &[T],
    labels: &[i64],
    sizes: Sizes,
    options: &LossOptions<T>,
    upstream: &Upstream<T>,
) -> Vec<T> {
    let Sizes {
        heads,
        rows,
        active,
        ..
    } = sizes;
    let smoothing = options.label_smoothing;
    let lse = cross_entropy(logits, labels, sizes, options).lse;
    let counted = labels
        .iter()
        .filter(|&&label| counts(label, active, options))
        .count();
    let share = match options.reduction {
        Reduction::Mean if counted > 0 => T::of(1.0) / T::of(counted as f64),
        _ => T::of(1.0),
    };
    let mut grad = vec![T::of(0.0); logits.len()];
    for h in 0..heads {
        for n in 0..rows {
            if !counts(labels[n], active, options) {
                continue;
            }
            let arrived = match upstream {
                Upstream::Total(gradient) => *gradient * options.head_weights[h],
                Upstream::Loss(gradients) if options.reduction == Reduction::None => {
                    gradients[h * rows + n]
                }
                Upstream::Loss(gradients) => gradients[h],
            };
            for c in 0..active {
                let at = (h * rows + n) * active + c;
                let probability = (logits[at] - lse[h * rows + n]).exp();
                let hit = if labels[n] == c as i64 {
                    T::of(1.0) - smoothing
                } else {
                    T::of(0.0)
                };
                let target = hit + smoothing / T::of(active as f64);
                grad[at] = arrived * share * (probability - target);
            }
        }
    }
    grad
}
