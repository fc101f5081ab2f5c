//! Cross-entropy of cosine logits, with margins on the logit of a row's own class.

use crate::cosine_logits::{operand_gradients, products_by_head};
use crate::cross_entropy::{counts, first_of_highest};
use crate::{
    CrossEntropy, Gradients, LossOptions, Real, Sizes, Upstream, cosine_logits, cross_entropy,
    cross_entropy_backward,
};

/// What a row's own class has to overcome: its cosine `cos θ` counts as `cos(θ + angular) − cosine` in the loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Margin<T> {
    /// In radians, between 0 and π/2: the margin of ArcFace.
    pub angular: T,
    /// At least 0: the margin of CosFace.
    pub cosine: T,
    /// The least sine that derivatives are divided by: at an angle of 0 there is none, and where cosines are rounded none is known.
    pub sine: T,
}

impl<T: Real> Margin<T> {
    /// None.
    pub fn none() -> Self {
        Self {
            angular: T::of(0.0),
            cosine: T::of(0.0),
            sine: T::of(SINE),
        }
    }

    /// What a cosine counts as, and the derivative of that. Where `θ + angular` passes π, and its cosine would rise again, the cosine
    /// loses `angular · sin(angular)` instead, as in ArcFace's own code.
    pub fn of(&self, cosine: T) -> (T, T) {
        let zero = T::of(0.0);
        let (along, across) = (self.angular.cos(), self.angular.sin());
        if cosine < -along {
            return (cosine - self.angular * across - self.cosine, T::of(1.0));
        }
        let square = (T::of(1.0) - cosine) * (T::of(1.0) + cosine);
        let sine = if square > zero { square.sqrt() } else { zero };
        let divisor = if sine > self.sine { sine } else { self.sine };
        let counts_as = cosine * along - sine * across - self.cosine;
        (counts_as, along + cosine * across / divisor)
    }
}

/// The sine of the least angle whose cosine f32 tells from 1.
pub const SINE: f64 = 3.45e-4;

/// How cosines become logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cosine<T> {
    /// What cosines are multiplied with.
    pub scale: T,
    /// Of a row's own class.
    pub margin: Margin<T>,
}

impl<T: Real> Cosine<T> {
    /// Without a margin.
    pub fn scaled(scale: T) -> Self {
        Self {
            scale,
            margin: Margin::none(),
        }
    }

    /// The logits that the loss sees, of `logits [heads, rows, active]`, and the derivative of each row's own, `[heads, rows]`.
    pub fn with_margin(
        &self,
        logits: &[T],
        labels: &[i64],
        sizes: Sizes,
        options: &LossOptions<T>,
    ) -> (Vec<T>, Vec<T>) {
        let mut seen = logits.to_vec();
        let mut slopes = vec![T::of(1.0); sizes.heads * sizes.rows];
        let zero = T::of(0.0);
        if self.margin.angular == zero && self.margin.cosine == zero {
            return (seen, slopes);
        }
        for (at, slope) in slopes.iter_mut().enumerate() {
            let label = labels[at % sizes.rows];
            if counts(label, sizes.active, options) {
                let logit = &mut seen[at * sizes.active + label as usize];
                let (counts_as, derivative) = self.margin.of(*logit / self.scale);
                *logit = self.scale * counts_as;
                *slope = derivative;
            }
        }
        (seen, slopes)
    }

    /// Gradients of the logits themselves, from those of what [`with_margin`](Self::with_margin) made of them.
    pub fn through_margin(
        grad_logits: &mut [T],
        slopes: &[T],
        labels: &[i64],
        sizes: Sizes,
        options: &LossOptions<T>,
    ) {
        for (at, &slope) in slopes.iter().enumerate() {
            let label = labels[at % sizes.rows];
            if counts(label, sizes.active, options) {
                let gradient = &mut grad_logits[at * sizes.active + label as usize];
                *gradient = *gradient * slope;
            }
        }
    }
}

/// `cross_entropy(cosine_logits(x, w))`, the composition that the fused op must equal, with a margin in between; the predictions are
/// those of the logits without it.
pub fn cosine_cross_entropy<T: Real>(
    embeddings: &[T],
    weights: &[T],
    labels: &[i64],
    sizes: Sizes,
    cosine: Cosine<T>,
    options: &LossOptions<T>,
) -> CrossEntropy<T> {
    let logits = cosine_logits(embeddings, weights, sizes, cosine.scale);
    let (seen, _) = cosine.with_margin(&logits, labels, sizes, options);
    let mut out = cross_entropy(&seen, labels, sizes, options);
    out.predictions = logits
        .chunks_exact(sizes.active)
        .map(|row| first_of_highest(row) as u32)
        .collect();
    out
}

/// Gradients of [`cosine_cross_entropy`].
pub fn cosine_cross_entropy_backward<T: Real>(
    embeddings: &[T],
    weights: &[T],
    labels: &[i64],
    sizes: Sizes,
    cosine: Cosine<T>,
    options: &LossOptions<T>,
    upstream: &Upstream<T>,
) -> Gradients<T> {
    let cosines = cosine_logits(embeddings, weights, sizes, T::of(1.0));
    let logits: Vec<T> = cosines.iter().map(|&cos| cosine.scale * cos).collect();
    let (seen, slopes) = cosine.with_margin(&logits, labels, sizes, options);
    let mut gradient = cross_entropy_backward(&seen, labels, sizes, options, upstream);
    // The scale multiplies what margins have made of the cosines.
    let unscaled = Cosine {
        scale: T::of(1.0),
        ..cosine
    };
    let (cosines, _) = unscaled.with_margin(&cosines, labels, sizes, options);
    let of_scale = products_by_head(&gradient, &cosines, sizes.heads);
    Cosine::through_margin(&mut gradient, &slopes, labels, sizes, options);
    let (grad_x, grad_w) = operand_gradients(embeddings, weights, &gradient, sizes, cosine.scale);
    Gradients {
        embeddings: grad_x,
        weights: grad_w,
        scale: of_scale,
    }
}
