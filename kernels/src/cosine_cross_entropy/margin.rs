//! What a row's own class has to overcome in the loss, so that others stay farther away.

use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::operand::F32;

/// Margins on a row's own class: in the loss its cosine `cos θ` counts as `cos(θ + angular) − cosine`. With `angular` alone that is
/// ArcFace (Deng et al., 2019), with `cosine` alone CosFace (Wang et al., 2018). Without either, the default, nothing changes.
///
/// Where `θ + angular` passes π, `cos θ − angular · sin(angular) − cosine` takes its place, as in ArcFace's own code, so that the loss
/// never falls while θ grows. At `θ = 0`, where an angle has no gradient, the slope is that of the least angle that a cosine tells from 0:
/// its sine is 3.45e-4, or 1/32 where tensor cores have operands rounded to f16 or TF32, and 1/16 of bf16. Predictions, and rows that do
/// not count, have no margin. The scale must be more than 0.
///
/// # Examples
/// ```
/// use protohead::cosine_cross_entropy::{Margin, Options};
/// let arcface = Options {
///     scale: 64.0,
///     margin: Margin { angular: 0.5, ..Margin::default() },
///     ..Options::default()
/// };
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Margin {
    /// In radians, between 0 and π/2. ArcFace has 0.5.
    pub angular: f32,
    /// Between 0 and 2, as far as cosines can lie apart. CosFace has 0.35.
    pub cosine: f32,
}

impl Margin {
    pub(super) fn is_none(self) -> bool {
        self == Self::default()
    }

    /// Proves the margins of logits that are cosines times `scale`.
    pub(crate) fn validate(self, scale: f32) -> Result<(), Error> {
        let refused = |option, got: f32, expected| {
            Err(Error::Option {
                option,
                got: f64::from(got),
                expected,
            })
        };
        if !(0.0..=std::f32::consts::FRAC_PI_2).contains(&self.angular) {
            return refused("the angular margin", self.angular, "between 0 and π/2");
        }
        if !(0.0..=2.0).contains(&self.cosine) {
            return refused("the cosine margin", self.cosine, "between 0 and 2");
        }
        if !self.is_none() && scale <= 0.0 {
            return refused("scale", scale, "more than 0 where there is a margin");
        }
        Ok(())
    }

    /// For cosines of unit rows that are kept in `dtype`.
    pub(super) fn launch_arg(self, dtype: ElemType) -> MarginRuleLaunch {
        let (across, along) = self.angular.sin_cos();
        let least = match dtype {
            F32 => SINE,
            ElemType::Float(FloatKind::BF16) => BF16_SINE,
            _ => F16_SINE,
        };
        MarginRuleLaunch::new(along, across, self.angular * across, self.cosine, least)
    }
}

/// A [`Margin`] as a kernel reads it.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(super) struct MarginRule {
    /// The cosine of the angular margin,
    along: f32,
    /// its sine,
    across: f32,
    /// and what a cosine loses where the angle would pass π.
    beyond: f32,
    cosine: f32,
    /// The least sine that a slope is divided by.
    least: f32,
}

/// What a cosine, or a logit, counts as, and the derivative of that.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Margined {
    pub value: f32,
    pub slope: f32,
}

/// Sines of the least angles that cosines tell from 0: of f32, of unit rows that are rounded to f16 or TF32, and to bf16.
const SINE: f32 = 3.45e-4;
const F16_SINE: f32 = 1.0 / 32.0;
const BF16_SINE: f32 = 1.0 / 16.0;
/// The most that a slope can be in f16, `√(1 + 32²)`.
pub(super) const F16_SLOPE: f32 = 33.0;

#[cube]
impl MarginRule {
    /// What the cosine of a row with its own class counts as: never for more than it is.
    pub(super) fn of(&self, cosine: f32) -> Margined {
        // Not 1 − cosine², which loses the digits of a small sine.
        let sine = max((1.0 - cosine) * (1.0 + cosine), 0.0f32).sqrt();
        let mut value = cosine * self.along - sine * self.across - self.cosine;
        let mut slope = self.along + cosine * self.across / max(sine, self.least);
        if cosine < -self.along {
            value = cosine - self.beyond - self.cosine;
            slope = 1.0;
        }
        Margined {
            value: min(value, cosine),
            slope,
        }
    }

    /// What a logit's cosine counts as, beside its slope times the cosine itself.
    pub(super) fn beyond_slope(&self, logit: f32, scale: f32) -> f32 {
        let cosine = logit / scale;
        let with = self.of(cosine);
        with.value - with.slope * cosine
    }

    /// [`of`](Self::of) a logit, a cosine times `scale`.
    pub(super) fn of_logit(&self, logit: f32, scale: f32) -> Margined {
        let of_cosine = self.of(logit / scale);
        Margined {
            value: min(of_cosine.value * scale, logit),
            slope: of_cosine.slope,
        }
    }
}

/// The predicted class of a row: `best` is that of `peak`, the highest of the logits that the loss sees, among which the `target`'s is
/// not more than its `logit`. Of equal ones it is the first.
#[cube]
pub(super) fn predicted(best: u32, peak: f32, target: u32, logit: f32) -> u32 {
    let mut class = best;
    if logit > peak || (logit == peak && target < best) {
        class = target;
    }
    class
}
