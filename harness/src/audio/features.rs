//! The three inputs of the encoder: log-mel of the speech, its formants, log-mel of its residual.

use rayon::prelude::*;

use super::lpc;
use super::mel::{BANDS, FRAMES, LogMel};

/// Values of one input, `[BANDS, FRAMES]`.
pub(crate) const INPUT: usize = BANDS * FRAMES;
/// Inputs: speech, formant, residual.
pub(crate) const INPUTS: usize = 3;

/// `[INPUTS, BANDS, FRAMES]` of every clip, in order.
pub(crate) fn extract(clips: &[Vec<f32>]) -> Vec<Vec<f32>> {
    let mel = LogMel::new();
    clips
        .par_iter()
        .map(|clip| {
            let (residual, formants) = lpc::analyse(clip);
            let mut all = mel.spectrum(clip);
            all.extend(formants);
            all.extend(mel.spectrum(&residual));
            all
        })
        .collect()
}
