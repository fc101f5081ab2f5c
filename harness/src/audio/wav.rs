//! WAV files of any rate and channel count, of 8 to 32 bits, become clips of one second, 16 kHz mono. What is behind the first
//! second is not read.

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
    let mut reader = WavReader::open(path)
        .map_err(|error| wrong(format!("no WAV file that is read: {error}")))?;
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
    let channels = usize::from(spec.channels);
    // A little more than a second, for the resampler's filter.
    let rate = spec.sample_rate as usize;
    let wanted = channels * (rate + 2 * block(rate));
    let samples: Result<Vec<f32>, hound::Error> = match (spec.sample_format, spec.bits_per_sample) {
        (SampleFormat::Float, 32) => reader.samples::<f32>().take(wanted).collect(),
        (SampleFormat::Int, bits @ (8 | 16 | 24 | 32)) => {
            let full_scale = (1u32 << (bits - 1)) as f32;
            reader
                .samples::<i32>()
                .take(wanted)
                .map(|sample| sample.map(|value| value as f32 / full_scale))
                .collect()
        }
        (format, bits) => {
            return Err(wrong(format!(
                "{bits}-bit {format:?} samples, expected 8, 16, 24 or 32 bits of Int, or 32 of Float"
            )));
        }
    };
    let samples = samples.map_err(|error| wrong(format!("damaged WAV file: {error}")))?;
    if samples.is_empty() {
        return Err(wrong("a WAV file without samples".into()));
    }
    if samples.iter().any(|sample| !sample.is_finite()) {
        return Err(wrong("a WAV file with samples that are not finite".into()));
    }
    let mono: Vec<f32> = samples
        .chunks_exact(channels)
        .map(|frame| frame.iter().sum::<f32>() / channels as f32)
        .collect();
    let mut clip = resample(mono, rate).map_err(wrong)?;
    clip.resize(CLIP, 0.0);
    Ok(clip)
}

/// 16 kHz of any rate.
pub(crate) fn resample(mono: Vec<f32>, rate: usize) -> Result<Vec<f32>, String> {
    if rate == RATE {
        return Ok(mono);
    }
    let frames = mono.len();
    let input = InterleavedOwned::new_from(mono, 1, frames).map_err(|error| error.to_string())?;
    let mut resampler = Fft::<f32>::new(rate, RATE, block(rate), 1, FixedSync::Both)
        .map_err(|error| format!("cannot resample from {rate} Hz: {error}"))?;
    resampler
        .process_all(&input, frames, None)
        .map(InterleavedOwned::take_data)
        .map_err(|error| format!("cannot resample from {rate} Hz: {error}"))
}

/// Input samples that are resampled together: an even number of what the rates have in common, so that the filter's delay is a
/// whole number of samples.
fn block(rate: usize) -> usize {
    let shared = rate / gcd(rate, RATE);
    shared * 512usize.div_ceil(shared).next_multiple_of(2)
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use hound::{WavSpec, WavWriter};

    use super::*;

    /// What is read of a file of these samples, at 16 kHz.
    fn read<S: hound::Sample>(
        channels: u16,
        bits_per_sample: u16,
        sample_format: SampleFormat,
        samples: impl IntoIterator<Item = S>,
    ) -> Result<Vec<f32>, String> {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        let spec = WavSpec {
            channels,
            sample_rate: 16_000,
            bits_per_sample,
            sample_format,
        };
        let mut writer = WavWriter::create(file.path(), spec).expect("the file is writable");
        for sample in samples {
            writer.write_sample(sample).expect("the file is writable");
        }
        writer.finalize().expect("the file is writable");
        read_clip(file.path()).map_err(|error| error.to_string())
    }

    #[test]
    fn every_depth_gives_the_same_clip_and_silence_fills_it() {
        let quarters = [0, 1, 2, 3, -4];
        let mut expected: Vec<f32> = quarters.iter().map(|&q| q as f32 / 4.0).collect();
        expected.resize(CLIP, 0.0);
        for bits in [8, 16, 24, 32] {
            let samples = quarters.map(|q| q << (bits - 3));
            let clip = read(1, bits, SampleFormat::Int, samples);
            assert_eq!(clip.as_ref(), Ok(&expected), "{bits} bits");
        }
        let floats = quarters.map(|q| q as f32 / 4.0);
        assert_eq!(read(1, 32, SampleFormat::Float, floats), Ok(expected));
    }

    #[test]
    fn channels_are_averaged_and_what_is_behind_a_second_is_left_out() {
        let samples = (0..2 * CLIP as i32 + 10).map(|i| (i % 2) << 14);
        let clip = read(2, 16, SampleFormat::Int, samples).expect("a sound file");
        assert_eq!(clip, vec![0.25; CLIP]);
    }

    #[test]
    fn what_is_behind_a_second_changes_nothing_at_any_rate() {
        for rate in [8_000, 16_000, 22_050, 44_100, 11_026] {
            let sample = |i: usize| ((i * 7919 % 1013) as f32 / 1013.0 - 0.5) * 0.9;
            let clip = |seconds: usize| {
                let samples: Vec<f32> = (0..seconds * rate).map(sample).collect();
                let file = tempfile::NamedTempFile::new().expect("a temporary file");
                let spec = WavSpec {
                    channels: 1,
                    sample_rate: rate as u32,
                    bits_per_sample: 32,
                    sample_format: SampleFormat::Float,
                };
                let mut writer = WavWriter::create(file.path(), spec).expect("writable");
                for &sample in &samples {
                    writer.write_sample(sample).expect("writable");
                }
                writer.finalize().expect("writable");
                let mut whole = resample(samples, rate).expect("resamples");
                whole.resize(CLIP, 0.0);
                (read_clip(file.path()).expect("a sound file"), whole)
            };
            let (first, all) = clip(20);
            assert_eq!(first, all, "{rate} Hz");
        }
    }

    #[test]
    fn what_is_no_sound_is_refused() {
        let refused = |clip: Result<Vec<f32>, String>, says: &str| {
            let said = clip.expect_err(says);
            assert!(said.contains(says), "{said} does not say {says}");
        };
        let none: [i32; 0] = [];
        refused(read(1, 16, SampleFormat::Int, none), "without samples");
        let samples = [0.0, f32::NAN];
        refused(read(1, 32, SampleFormat::Float, samples), "not finite");
    }

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
