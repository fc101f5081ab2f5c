//! Linear prediction by Burg's method: a clip's residual (what prediction leaves) and its formant envelope.
//!
//! Frames of 160 samples, each preceded by `order` samples of memory. Residual: `e[n] = x[n] + Σ a[k] x[n − k]`
//! for the frame's own samples. Formants: `ln |1 / A(e^{jω})|` at 40 frequencies from 0 to just below Nyquist.

use super::mel::{BANDS, FRAMES};
use super::{CLIP, HOP};

/// Coefficients of the predictor.
pub(crate) const ORDER: usize = 16;

/// `[1, a1, .., a_order]` of the predictor that minimizes forward and backward errors together (librosa's `lpc`).
pub(crate) fn burg(signal: &[f64], order: usize) -> Vec<f64> {
    let mut coefficients = vec![0.0; order + 1];
    coefficients[0] = 1.0;
    let mut forward = signal[1..].to_vec();
    let mut backward = signal[..signal.len() - 1].to_vec();
    for i in 0..order {
        let energy: f64 = forward.iter().chain(&backward).map(|v| v * v).sum();
        let dot: f64 = forward.iter().zip(&backward).map(|(f, b)| f * b).sum();
        // Silence predicts nothing.
        let reflection = if energy > f64::MIN_POSITIVE {
            -2.0 * dot / energy
        } else {
            0.0
        };
        let before = coefficients.clone();
        for j in 1..=i + 1 {
            coefficients[j] = before[j] + reflection * before[i + 1 - j];
        }
        let next: Vec<f64> = forward
            .iter()
            .zip(&backward)
            .map(|(f, b)| f + reflection * b)
            .collect();
        for (b, f) in backward.iter_mut().zip(&forward) {
            *b += reflection * f;
        }
        forward = next[1..].to_vec();
        backward.pop();
    }
    coefficients
}

/// Residual `[CLIP]` and formants `[BANDS, FRAMES]` of a clip; the last frame's formants are repeated to fill.
pub(crate) fn analyse(clip: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let mut padded = vec![0.0f64; ORDER];
    padded.extend(clip.iter().take(CLIP).map(|&v| f64::from(v)));
    padded.resize(ORDER + CLIP, 0.0);
    let mut residual = Vec::with_capacity(CLIP);
    let mut formants = vec![0.0f32; BANDS * FRAMES];
    let turns: [[(f64, f64); ORDER + 1]; BANDS] = std::array::from_fn(|band| {
        let omega = std::f64::consts::PI * band as f64 / BANDS as f64;
        std::array::from_fn(|k| (omega * k as f64).sin_cos())
    });
    let frames = CLIP / HOP;
    for t in 0..frames {
        let window = &padded[t * HOP..t * HOP + ORDER + HOP];
        let a = burg(window, ORDER);
        for n in ORDER..ORDER + HOP {
            residual.push((0..=ORDER).map(|k| a[k] * window[n - k]).sum::<f64>() as f32);
        }
        for (band, turns) in turns.iter().enumerate() {
            let (mut re, mut im) = (0.0, 0.0);
            for (value, (sin, cos)) in a.iter().zip(turns) {
                re += value * cos;
                im -= value * sin;
            }
            formants[band * FRAMES + t] = (-0.5 * (re * re + im * im).max(1e-12).ln()) as f32;
        }
    }
    for band in 0..BANDS {
        for t in frames..FRAMES {
            formants[band * FRAMES + t] = formants[band * FRAMES + frames - 1];
        }
    }
    (residual, formants)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn burg_finds_the_filter_that_made_a_signal() {
        // An autoregressive process of order 2, driven by a deterministic noise.
        let mut state = 1u64;
        let mut x = vec![0.0f64; 4000];
        for n in 2..x.len() {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            let noise = (state >> 40) as f64 / (1u64 << 24) as f64 - 0.5;
            x[n] = 1.5 * x[n - 1] - 0.8 * x[n - 2] + noise;
        }
        let a = burg(&x, 2);
        // The estimate's standard error is about 1/√4000 = 0.016.
        assert!(
            (a[1] + 1.5).abs() < 0.05 && (a[2] - 0.8).abs() < 0.05,
            "{a:?}"
        );
    }

    #[test]
    fn silence_has_no_residual_and_flat_formants() {
        let (residual, formants) = analyse(&vec![0.0; CLIP]);
        assert_eq!(residual.len(), CLIP);
        assert!(residual.iter().all(|&v| v == 0.0));
        assert!(formants.iter().all(|&v| v == 0.0));
    }
}
