//! The three inputs of the encoder: log-mel of the speech, its formants, log-mel of its residual.

use super::lpc;
use super::mel::{BANDS, FRAMES, LogMel};

/// Values of one input, `[BANDS, FRAMES]`.
pub(crate) const INPUT: usize = BANDS * FRAMES;
/// Inputs: speech, formant, residual.
pub(crate) const INPUTS: usize = 3;

/// `[INPUTS, BANDS, FRAMES]` of clips.
pub(crate) struct Extractor {
    mel: LogMel,
}

impl Extractor {
    pub(crate) fn new() -> Self {
        Self { mel: LogMel::new() }
    }

    pub(crate) fn extract(&self, clip: &[f32]) -> Vec<f32> {
        let (residual, formants) = lpc::analyse(clip);
        let mut all = self.mel.spectrum(clip);
        all.extend(formants);
        all.extend(self.mel.spectrum(&residual));
        all
    }
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::*;

    /// Against librosa and scipy, see tests/goldens/make_goldens.py. Log spectra are compared where they matter: an error of
    /// 1e-3 in the logarithm is 0.1 % of the power. The transforms run in f32.
    #[test]
    fn features_are_those_of_librosa_and_scipy() {
        let bytes = include_bytes!("../../tests/goldens/audio.safetensors");
        let file = SafeTensors::deserialize(bytes).expect("goldens are safetensors");
        let golden = |name: &str| -> Vec<f32> {
            file.tensor(name)
                .expect("the golden is there")
                .data()
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect()
        };
        let near = |name: &str, ours: &[f32], limit: f32| {
            let theirs = golden(name);
            assert_eq!(ours.len(), theirs.len(), "{name}");
            assert!(ours.iter().all(|v| v.is_finite()), "{name}");
            let worst = ours
                .iter()
                .zip(&theirs)
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f32::max);
            assert!(worst <= limit, "{name} is off by {worst}");
        };
        let clip = golden("clip");
        let all = Extractor::new().extract(&clip);
        near("log_mel", &all[..INPUT], 1e-3);
        near("formants", &all[INPUT..2 * INPUT], 1e-3);
        near("residual_log_mel", &all[2 * INPUT..], 1e-3);
        near("residual", &lpc::analyse(&clip).0, 1e-5);
    }
}
