//! WAV files of any rate, depth and channel count become clips of one second, 16 kHz mono.

use std::path::Path;

use hound::{SampleFormat, WavReader};
use rubato::audioadapter_buffers::owned::InterleavedOwned;
use rubato::{Fft, FixedSync, Resampler};

use super::{CLIP, RATE};
use crate::error::Error;

/// Sample rates that are resampled.
const RATES: std::ops::RangeInclusive<u32> = 1_000..=768_000;

/// The first second of a file, padded with silence.
pub(crate) fn read_clip(path: &Path) -> Result<Vec<f32>, Error> {
    let wrong = |reason: String| Error::Content {
        path: path.into(),
        reason,
    };
    let mut reader =
        WavReader::open(path).map_err(|error| wrong(format!("not a WAV file: {error}")))?;
    let spec = reader.spec();
    if spec.channels == 0 || !RATES.contains(&spec.sample_rate) {
        return Err(wrong(format!(
            "{} channels at {} Hz, expected at least one at {} to {} Hz",
            spec.channels,
            spec.sample_rate,
            RATES.start(),
            RATES.end()
        )));
    }
    let samples: Result<Vec<f32>, hound::Error> = match spec.sample_format {
        SampleFormat::Float => reader.samples::<f32>().collect(),
        SampleFormat::Int => {
            let full_scale = (1u64 << (spec.bits_per_sample - 1)) as f32;
            reader
                .samples::<i32>()
                .map(|sample| sample.map(|value| value as f32 / full_scale))
                .collect()
        }
    };
    let samples = samples.map_err(|error| wrong(format!("damaged WAV file: {error}")))?;
    if samples.is_empty() {
        return Err(wrong("a WAV file without samples".into()));
    }
    if samples.iter().any(|sample| !sample.is_finite()) {
        return Err(wrong("a WAV file with samples that are not finite".into()));
    }
    let channels = usize::from(spec.channels);
    let mono: Vec<f32> = samples
        .chunks_exact(channels)
        .map(|frame| frame.iter().sum::<f32>() / channels as f32)
        .collect();
    let mut clip = resample(mono, spec.sample_rate as usize).map_err(wrong)?;
    clip.resize(CLIP, 0.0);
    Ok(clip)
}

fn resample(mono: Vec<f32>, rate: usize) -> Result<Vec<f32>, String> {
    if rate == RATE {
        return Ok(mono);
    }
    let frames = mono.len();
    let input = InterleavedOwned::new_from(mono, 1, frames).map_err(|error| error.to_string())?;
    // Blocks of an even number of input samples: the filter's delay is then a whole number of samples.
    let block = rate / gcd(rate, RATE);
    let chunk = block * 512usize.div_ceil(block).next_multiple_of(2);
    let mut resampler = Fft::<f32>::new(rate, RATE, chunk, 1, FixedSync::Both)
        .map_err(|error| format!("cannot resample from {rate} Hz: {error}"))?;
    resampler
        .process_all(&input, frames, None)
        .map(InterleavedOwned::take_data)
        .map_err(|error| format!("cannot resample from {rate} Hz: {error}"))
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tone_keeps_its_frequency_and_level_at_any_rate() {
        for rate in [8_000, 16_000, 22_050, 44_100, 48_000] {
            let tone = |rate: usize, i: usize| {
                (2.0 * std::f64::consts::PI * 440.0 * i as f64 / rate as f64).sin() as f32
            };
            let there =
                resample((0..rate).map(|i| tone(rate, i)).collect(), rate).expect("resamples");
            assert!(
                there.len().abs_diff(RATE) <= 1,
                "{rate} Hz gave {} samples",
                there.len()
            );
            // Away from the edges, where the filter sees silence.
            let error = (2000..14_000)
                .map(|i| (there[i] - tone(RATE, i)).abs())
                .fold(0.0, f32::max);
            assert!(error < 0.01, "{rate} Hz is off by {error}");
        }
    }
}
