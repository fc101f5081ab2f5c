//! The softmax of a row in one pass: `lse = peak + ln Σ e^(z − peak)`, with the peak found on the way.
//!
//! A state is folded lane by lane, so that a vector of classes costs no horizontal step; the lanes merge once
//! at the end of a row. Beside the sum it keeps what a loss needs: the class of the peak, the logit of
//! the target, and the sum of all logits (label smoothing's mean).
//!
//! Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).

use cubecl::prelude::*;

/// Below every finite logit: the peak of a lane that has seen none, and the logit of a class that is not there.
pub(crate) const FLOOR: f32 = f32::MIN;

/// The running state of one row, in lanes.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct OnlineSoftmax<N: Size> {
    pub peak: Vector<f32, N>,
    pub sum: Vector<f32, N>,
    pub best: Vector<u32, N>,
    pub target: Vector<f32, N>,
    pub total: Vector<f32, N>,
}

#[cube]
impl<N: Size> OnlineSoftmax<N> {
    /// Of no class yet.
    pub(crate) fn new() -> OnlineSoftmax<N> {
        OnlineSoftmax::<N> {
            peak: Vector::<f32, N>::new(FLOOR),
            sum: Vector::<f32, N>::new(0.0),
            best: Vector::<u32, N>::new(0u32),
            target: Vector::<f32, N>::new(0.0),
            total: Vector::<f32, N>::new(0.0),
        }
    }

    /// Folds in the logits of `classes`.
    pub(crate) fn fold(&mut self, logits: Vector<f32, N>, classes: Vector<u32, N>, target: u32) {
        let hit = classes.equal(&Vector::<u32, N>::new(target));
        let higher = logits.greater_than(&self.peak);
        let peak = max(self.peak, logits);
        self.sum = fma(self.sum, (self.peak - peak).exp(), (logits - peak).exp());
        self.best = select_many(higher, classes, self.best);
        self.target += select_many(hit, logits, Vector::<f32, N>::new(0.0));
        self.total += logits;
        self.peak = peak;
    }

    /// Folds in what another state has seen, of classes that come after. A row in parts loses less than one sum of millions of classes.
    pub(crate) fn merge(&mut self, after: &OnlineSoftmax<N>) {
        let higher = after.peak.greater_than(&self.peak);
        let peak = max(self.peak, after.peak);
        let carried = self.sum * (self.peak - peak).exp();
        self.sum = fma(after.sum, (after.peak - peak).exp(), carried);
        self.best = select_many(higher, after.best, self.best);
        self.target += after.target;
        self.total += after.total;
        self.peak = peak;
    }

    /// The lanes become one row.
    pub(crate) fn finish(&self) -> RowSoftmax {
        let mut row = RowSoftmax {
            peak: self.peak.extract(0usize),
            sum: 0.0f32.runtime(),
            best: self.best.extract(0usize),
            target: self.target.vector_sum(),
            total: self.total.vector_sum(),
        };
        #[unroll]
        for lane in 1..N::value() {
            let peak = self.peak.extract(lane);
            let best = self.best.extract(lane);
            if peak > row.peak || (peak == row.peak && best < row.best) {
                row.peak = peak;
                row.best = best;
            }
        }
        row.sum = (self.sum * (self.peak - Vector::<f32, N>::new(row.peak)).exp()).vector_sum();
        row
    }
}

/// The state of a whole row, or of a unit's part of it.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct RowSoftmax {
    pub peak: f32,
    pub sum: f32,
    pub best: u32,
    pub target: f32,
    pub total: f32,
}

#[cube]
impl RowSoftmax {
    /// Of no class yet.
    pub(crate) fn new() -> RowSoftmax {
        RowSoftmax {
            peak: FLOOR.runtime(),
            sum: 0.0f32.runtime(),
            best: 0u32.runtime(),
            target: 0.0f32.runtime(),
            total: 0.0f32.runtime(),
        }
    }

    /// Folds in the logits of neighbouring classes, of which `first` is the first. One exponential more than there are
    /// logits, and few registers: the units of a GPU make up for the lanes.
    pub(crate) fn fold<N: Size>(&mut self, logits: Vector<f32, N>, first: u32, target: u32) {
        let mut peak = self.peak;
        #[unroll]
        for lane in 0..N::value() {
            let z = logits.extract(lane);
            let class = first + lane as u32;
            if z > peak {
                self.best = class;
            }
            if class == target {
                self.target = z;
            }
            peak = max(peak, z);
        }
        let rest = (logits - Vector::<f32, N>::new(peak)).exp();
        self.sum = fma(self.sum, (self.peak - peak).exp(), rest.vector_sum());
        self.total += logits.vector_sum();
        self.peak = peak;
    }

    /// `ln Σ e^z`
    pub(crate) fn lse(&self) -> f32 {
        self.peak + self.sum.ln()
    }

    /// What rounding took from [`lse`](Self::lse), where the peak is the larger part of it. Without it, a probability `e^(z − lse)` is
    /// wrong by half a unit in the last place of lse: 4e-6 of itself at 64, and all of it at 1e9.
    pub(crate) fn lse_low(&self) -> f32 {
        (self.peak - self.lse()) + self.sum.ln()
    }

    /// `lse − (1 − ε) z[target] − ε · mean(z)`, from the peak, which a sure row's target is: a loss near 0 keeps its digits.
    pub(crate) fn loss(&self, active: u32, smoothing: f32) -> f32 {
        let mean = self.total / f32::cast_from(active);
        let log_sum = self.sum.ln();
        let of_target = (self.peak - self.target) + log_sum;
        let mut loss = (1.0 - smoothing) * of_target;
        // A class that is masked with −∞ has no say where nothing is smoothed.
        if smoothing > 0.0 {
            loss += smoothing * ((self.peak - mean) + log_sum);
        }
        loss
    }
}

/// `upstream · (e^(z − lse) − target)`, the gradient of a logit, with `lse_low` of the row; 0 where nothing arrives, whatever the
/// logit is.
#[cube]
pub(crate) fn logit_gradient<N: Size>(
    logits: Vector<f32, N>,
    lse: Vector<f32, N>,
    lse_low: Vector<f32, N>,
    upstream: Vector<f32, N>,
    hit: Vector<bool, N>,
    active: u32,
    smoothing: f32,
) -> Vector<f32, N> {
    let uniform = Vector::<f32, N>::new(smoothing / f32::cast_from(active));
    let peak = Vector::<f32, N>::new(1.0 - smoothing);
    let zero = Vector::<f32, N>::new(0.0);
    let target = uniform + select_many(hit, peak, zero);
    let gradient = upstream * (((logits - lse) - lse_low).exp() - target);
    select_many(upstream.equal(&zero), zero, gradient)
}
