//! Comparison of tensors: `‖ours − f64‖ ≤ 2 ‖same op in f32 − f64‖ + a stated slack`.

use half::{bf16, f16};

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
        } = self;
        if ours.len() != truth.len() {
            return Err(format!(
                "{name}: {} elements, expected {}",
                ours.len(),
                truth.len()
            ));
        }
        if let Some(i) = ours.iter().position(|v| !v.is_finite()) {
            return Err(format!("{name}[{i}] is {}, expected {}", ours[i], truth[i]));
        }
        let error = norm(ours.iter().zip(*truth).map(|(a, b)| a - b));
        let honest = norm(working.iter().zip(*truth).map(|(&a, b)| f64::from(a) - b));
        let count = (truth.len() as f64).sqrt();
        // Half a unit in the last place of the output's dtype, and of its subnormals, an element.
        let (relative, subnormal) = match dtype {
            Dtype::F32 => (0.0, 0.0),
            Dtype::F16 => (f64::from(f16::EPSILON) / 2.0, 3e-8),
            Dtype::Bf16 => (f64::from(bf16::EPSILON) / 2.0, 0.0),
        };
        // Sums in another order differ by a few rounding errors of f32 (6e-8) of what was summed.
        let bound = 2.0 * honest
            + (1e-6 + relative) * norm(truth.iter().copied())
            + ((4e-7 + kept) * magnitude + subnormal) * count;
        if error <= bound {
            return Ok(());
        }
        let worst = (0..ours.len())
            .max_by(|&a, &b| {
                (ours[a] - truth[a])
                    .abs()
                    .total_cmp(&(ours[b] - truth[b]).abs())
            })
            .unwrap_or(0);
        Err(format!(
            "{name}: error {error:.3e} > {bound:.3e} (norm {:.3e}, f32 reference {honest:.3e}); worst at {worst}: {} for {}",
            norm(truth.iter().copied()),
            ours[worst],
            truth[worst],
        ))
    }
}
