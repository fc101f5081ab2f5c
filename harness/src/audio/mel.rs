//! Log-mel spectra: n_fft 512, a Hann window of 480, hop 160, 40 bands, `ln(power + 1e-6)`, as BC-ResNet's: torchaudio's
//! `MelSpectrogram` with its defaults (HTK's mel scale, triangles of height 1, frames centred, the clip reflected at both ends).

use std::sync::Arc;

use realfft::{RealFftPlanner, RealToComplex};

use super::{CLIP, HOP, RATE};

const FFT: usize = 512;
const WINDOW: usize = 480;
/// Mel bands.
pub(crate) const BANDS: usize = 40;
/// Frames of a clip.
pub(crate) const FRAMES: usize = CLIP / HOP + 1;

/// What a spectrum needs, made once.
pub(crate) struct LogMel {
    fft: Arc<dyn RealToComplex<f32>>,
    window: Vec<f32>,
    bands: Vec<Vec<f32>>, // [BANDS][FFT / 2 + 1]
}

impl LogMel {
    pub(crate) fn new() -> Self {
        let offset = (FFT - WINDOW) / 2;
        let window = (0..FFT)
            .map(|i| {
                if (offset..offset + WINDOW).contains(&i) {
                    let phase = (i - offset) as f64 / WINDOW as f64;
                    (0.5 - 0.5 * (2.0 * std::f64::consts::PI * phase).cos()) as f32
                } else {
                    0.0
                }
            })
            .collect();
        Self {
            fft: RealFftPlanner::new().plan_fft_forward(FFT),
            window,
            bands: filter_bank(),
        }
    }

    /// `[BANDS, FRAMES]` of a clip.
    pub(crate) fn spectrum(&self, clip: &[f32]) -> Vec<f32> {
        let mut padded = vec![0.0; CLIP + FFT];
        let (start, end) = (FFT / 2, FFT / 2 + CLIP);
        let given = CLIP.min(clip.len());
        padded[start..start + given].copy_from_slice(&clip[..given]);
        for i in 1..=FFT / 2 {
            padded[start - i] = padded[start + i];
            padded[end - 1 + i] = padded[end - 1 - i];
        }
        let mut out = vec![0.0; BANDS * FRAMES];
        let mut frame = self.fft.make_input_vec();
        let mut bins = self.fft.make_output_vec();
        for t in 0..FRAMES {
            for (i, value) in frame.iter_mut().enumerate() {
                *value = padded[t * HOP + i] * self.window[i];
            }
            self.fft
                .process(&mut frame, &mut bins)
                .expect("the buffers are the plan's own, so their lengths fit");
            for (band, filter) in self.bands.iter().enumerate() {
                let power: f32 = bins
                    .iter()
                    .zip(filter)
                    .map(|(bin, f)| bin.norm_sqr() * f)
                    .sum();
                out[band * FRAMES + t] = (power + 1e-6).ln();
            }
        }
        out
    }
}

/// HTK's mel scale.
fn hz_to_mel(hz: f64) -> f64 {
    2595.0 * (1.0 + hz / 700.0).log10()
}

fn mel_to_hz(mel: f64) -> f64 {
    700.0 * (10f64.powf(mel / 2595.0) - 1.0)
}

/// Triangles of height 1.
fn filter_bank() -> Vec<Vec<f32>> {
    let top = hz_to_mel(RATE as f64 / 2.0);
    let edge = |i: usize| mel_to_hz(top * i as f64 / (BANDS + 1) as f64);
    (0..BANDS)
        .map(|band| {
            let (low, centre, high) = (edge(band), edge(band + 1), edge(band + 2));
            (0..=FFT / 2)
                .map(|bin| {
                    let hz = bin as f64 * RATE as f64 / FFT as f64;
                    let rise = (hz - low) / (centre - low);
                    let fall = (high - hz) / (high - centre);
                    rise.min(fall).max(0.0) as f32
                })
                .collect()
        })
        .collect()
}
