//! Comparison of tensors: `‖ours − f64‖ ≤ 2 ‖same op in f32 − f64‖ + a stated slack`.
//!
//! In f16 whatever lies beyond the largest finite value counts as that value: a gradient of a row of zeros is a sum times 1e12, and
//! infinite even if rounding is all that is left of the sum.

use half::{bf16, f16};
use protohead::Reduction;

use crate::problem::Dtype;

/// A tensor that came back, and what it should have been.
pub struct Comparison<'a> {
    /// How the message names it.
    pub name: &'a str,
    /// What the device computed, widened.
    pub ours: &'a [f64],
    /// The reference in f64.
    pub truth: &'a [f64],
    /// The reference in f32: the error that the formula has in the working precision.
    pub working: &'a [f32],
    /// The dtype that ours was rounded to.
    pub dtype: Dtype,
    /// The size that an element would have without cancellation; rounding is relative to it.
    pub magnitude: f64,
    /// How far an element may be off, relative to the magnitude, because what the op keeps between its products is rounded.
    pub kept: f64,
    /// How far it may be off relative to the tensor itself, where `working` is rounded like ours but some of the roundings may fall
    /// to the other side.
    pub rounded: f64,
    /// Of the rows whose gradient this is, from [`lengths`]; empty for anything else. A gradient is as large as its row is short,
    /// so each is compared times its row's length, and a short row does not hide what the others got.
    pub lengths: &'a [f64],
}

/// How many rows' worth of loss is in each result under a reduction.
pub struct Share {
    /// In a head's loss.
    pub of_loss: f64,
    /// In a head's part of the total.
    pub of_total: f64,
    /// In what arrives at a row.
    pub of_row: f64,
}

impl Share {
    /// Of so many rows.
    pub fn under(reduction: Reduction, rows: usize) -> Self {
        let rows = rows as f64;
        let (of_loss, of_total, of_row) = match reduction {
            Reduction::Mean => (1.0, 1.0, 1.0 / rows),
            Reduction::Sum => (rows, rows, 1.0),
            Reduction::None => (1.0, rows, 1.0),
        };
        Self {
            of_loss,
            of_total,
            of_row,
        }
    }
}

/// The length of each row, where normalization clamps it.
pub fn lengths<T: Copy + Into<f64>>(values: &[T], dim: usize) -> Vec<f64> {
    values
        .chunks(dim)
        .map(|row| norm(row.iter().map(|&v| v.into())).max(1e-12))
        .collect()
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|v| v * v).sum::<f64>().sqrt()
}

impl Comparison<'_> {
    /// Compares, and says by how much it failed.
    ///
    /// # Errors
    /// A message with the numbers.
    pub fn check(&self) -> Result<(), String> {
        let Self {
            name,
            ours,
            truth,
            working,
            dtype,
            magnitude,
            kept,
            rounded,
            lengths,
        } = self;
        let elements = truth.len();
        if ours.len() != elements {
            return Err(format!(
                "{name}: {} elements, expected {elements}",
                ours.len()
            ));
        }
        let (largest, may_overflow) = match dtype {
            Dtype::F16 => (f16::MAX.to_f64(), true),
            Dtype::F32 | Dtype::Bf16 => (f64::INFINITY, false),
        };
        let wrong = |v: &f64| v.is_nan() || v.is_infinite() && !may_overflow;
        if let Some(i) = ours.iter().position(wrong) {
            return Err(format!("{name}[{i}] is {}, expected {}", ours[i], truth[i]));
        }
        let held = |v: f64| v.clamp(-largest, largest);
        let (ours, truth) = (|i: usize| held(ours[i]), |i: usize| held(truth[i]));
        let working = |i: usize| held(f64::from(working[i]));
        let columns = elements / lengths.len().max(1);
        let length = |i: usize| lengths.get(i / columns).copied().unwrap_or(1.0);
        let all = 0..elements;
        let error = norm(all.clone().map(|i| (ours(i) - truth(i)) * length(i)));
        let honest = norm(all.clone().map(|i| (working(i) - truth(i)) * length(i)));
        let size = norm(all.clone().map(|i| truth(i) * length(i)));
        let count = (elements as f64).sqrt();
        // Half a unit in the last place of the output's dtype, and of its subnormals, an element.
        let (relative, subnormal) = match dtype {
            Dtype::F32 => (0.0, 0.0),
            Dtype::F16 => (f64::from(f16::EPSILON) / 2.0, 3e-8),
            Dtype::Bf16 => (f64::from(bf16::EPSILON) / 2.0, 0.0),
        };
        // Sums in another order differ by a few rounding errors of f32 (6e-8) of what was summed.
        let bound = 2.0 * honest
            + (1e-6 + relative + rounded) * size
            + (4e-7 + kept) * magnitude * count
            + subnormal * norm(all.clone().map(length));
        if error <= bound {
            return Ok(());
        }
        let off = |i: usize| ((ours(i) - truth(i)) * length(i)).abs();
        let worst = all.max_by(|&a, &b| off(a).total_cmp(&off(b))).unwrap_or(0);
        Err(format!(
            "{name}: error {error:.3e} > {bound:.3e} (norm {size:.3e}, f32 reference {honest:.3e}); worst at {worst}: {} for {}",
            ours(worst),
            truth(worst),
        ))
    }
}
