//! What a row's own class has to overcome in the loss, so that others stay farther away.

use cubecl::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::Error;

/// Margins on a row's own class: in the loss its cosine `cos θ` counts as `cos(θ + angular) − cosine`. With `angular` alone that is
/// ArcFace (Deng et al., 2019), with `cosine` alone CosFace (Wang et al., 2018). Without either, the default, nothing changes.
///
/// Where `θ + angular` passes π, `cos θ − angular · sin(angular) − cosine` takes its place, as in ArcFace's own code, so that the loss
/// never falls while θ grows. At `θ = 0`, where an angle has no gradient, its slope counts as that of a sine of 3.5e-4: f32 has no
/// cosine between 1 and that of such an angle. Predictions are those without a margin.
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
    /// At least 0, and finite. CosFace has 0.35.
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
        if !(0.0..=f32::MAX).contains(&self.cosine) {
            let expected = "at least 0 and finite";
            return refused("the cosine margin", self.cosine, expected);
        }
        if !self.is_none() && scale <= 0.0 {
            return refused("scale", scale, "more than 0 where there is a margin");
        }
        Ok(())
    }

    pub(super) fn launch_arg(self) -> MarginRuleLaunch {
        let (across, along) = self.angular.sin_cos();
        MarginRuleLaunch::new(along, across, self.angular * across, self.cosine)
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
}

/// What a cosine counts as, and the derivative of that.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Counted {
    pub cosine: f32,
    pub slope: f32,
}

/// The least sine that a slope is divided by.
const SINE: f32 = 3.5e-4;

#[cube]
impl MarginRule {
    /// What the cosine of a row with its own class counts as.
    pub(super) fn of(&self, cosine: f32) -> Counted {
        let sine = max(1.0 - cosine * cosine, 0.0f32).sqrt();
        let mut counted = Counted {
            cosine: cosine * self.along - sine * self.across - self.cosine,
            slope: self.along + cosine * self.across / max(sine, SINE),
        };
        if cosine < -self.along {
            counted.cosine = cosine - self.beyond - self.cosine;
            counted.slope = 1.0;
        }
        counted
    }
}

/// The predicted class of a row: `best` is that of `peak`, the highest of the logits that the loss sees, among which the `target`'s is
/// less than its `logit`. Of equal ones it is the first.
#[cube]
pub(super) fn predicted(best: u32, peak: f32, target: u32, logit: f32) -> u32 {
    let mut class = best;
    if logit > peak || (logit == peak && target < best) {
        class = target;
    }
    class
}
