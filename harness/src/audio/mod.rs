//! From sound to features: 16 kHz mono clips of one second, log-mel spectra, and LPC's residual and formants.

pub(crate) mod features;
pub(crate) mod lpc;
pub(crate) mod mel;
pub(crate) mod synthesis;
pub(crate) mod wav;

/// Samples a second.
pub(crate) const RATE: usize = 16_000;
/// Samples of a clip: one second.
pub(crate) const CLIP: usize = RATE;
/// Samples from one frame to the next, of spectra and of formants.
pub(crate) const HOP: usize = 160;
