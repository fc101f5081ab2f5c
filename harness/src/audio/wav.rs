//! WAV files of any rate, depth and channel count become clips of one second, 16 kHz mono. What is behind the first second is
//! not read, but of pipes.

use std::fs::File;
use std::io::{Cursor, Read, repeat};
use std::path::Path;

use rubato::audioadapter_buffers::owned::InterleavedOwned;
use rubato::{Fft, FixedSync, Resampler};
use symphonia::core::codecs::CodecParameters;
use symphonia::core::codecs::audio::AudioDecoderOptions;
use symphonia::core::formats::{FormatOptions, FormatReader, TrackType};
use symphonia::core::io::{MediaSourceStream, ReadBytes, ReadOnlySource};
use symphonia::default::formats::WavReader;

use super::{CLIP, RATE};
use crate::error::Error;

/// Sample rates that are resampled.
const RATES: std::ops::RangeInclusive<u32> = 1_000..=768_000;
/// A length from here on says that the file was written to a pipe, by a program that did not know it: the samples go to its end.
const UNKNOWN: u64 = 0x7fff_f000;
/// Silence that is read behind the end of such a file, in bytes.
const SILENCE: u64 = 64 << 20;

/// The most that is read of a pipe, in bytes.
const PIPED: u64 = 256 << 20;

/// The first second of a file, padded with silence.
pub(crate) fn read_clip(path: &Path) -> Result<Vec<f32>, Error> {
    let wrong = |reason: String| Error::Content {
        path: path.into(),
        reason,
    };
    let mut file = File::open(path).map_err(Error::io(path))?;
    let metadata = file.metadata().map_err(Error::io(path))?;
    let samples = if metadata.is_file() {
        read_samples(file, metadata.len())
    } else {
        // Nobody knows how long a pipe is.
        let mut all = Vec::new();
        let read = (&mut file).take(PIPED).read_to_end(&mut all);
        read.map_err(Error::io(path))?;
        let bytes = all.len() as u64;
        read_samples(Cursor::new(all), bytes)
    };
    let samples = samples.map_err(wrong)?;
    let channels = samples.channels;
    if samples.interleaved.is_empty() {
        return Err(wrong("a WAV file without samples".into()));
    }
    if samples.interleaved.iter().any(|sample| !sample.is_finite()) {
        return Err(wrong("a WAV file with samples that are not finite".into()));
    }
    let mono: Vec<f32> = samples
        .interleaved
        .chunks_exact(channels)
        .map(|frame| frame.iter().sum::<f32>() / channels as f32)
        .collect();
    let mut clip = resample(mono, samples.rate).map_err(wrong)?;
    clip.resize(CLIP, 0.0);
    Ok(clip)
}

/// What a file begins with.
struct Samples {
    interleaved: Vec<f32>,
    channels: usize,
    rate: usize,
}

/// A second of a file of so many bytes, and a little more, for the resampler's filter.
fn read_samples(file: impl Read + Send + Sync + 'static, bytes: u64) -> Result<Samples, String> {
    let unread = |error| format!("no WAV file that is read: {error}");
    let endless = ReadOnlySource::new(file.chain(repeat(0).take(SILENCE)));
    let stream = MediaSourceStream::new(Box::new(endless), Default::default());
    let mut reader = WavReader::try_new(stream, FormatOptions::default()).map_err(unread)?;
    let track = reader.default_track(TrackType::Audio);
    let Some((track, Some(CodecParameters::Audio(parameters)))) =
        track.map(|track| (track, &track.codec_params))
    else {
        return Err("a WAV file without sound".into());
    };
    let channels = parameters.channels.as_ref().map_or(0, |all| all.count());
    let rate = parameters.sample_rate.unwrap_or(0);
    if channels == 0 || !RATES.contains(&rate) {
        return Err(format!(
            "{channels} channels at {rate} Hz, expected at least one at {} to {} Hz",
            RATES.start(),
            RATES.end()
        ));
    }
    // A frame has eight bytes a channel at most.
    let frames = track.num_frames.unwrap_or(u64::MAX);
    let is_known = frames < UNKNOWN / (8 * channels as u64);
    let mut decoder = symphonia::default::get_codecs()
        .make_audio_decoder(parameters, &AudioDecoderOptions::default())
        .map_err(unread)?;
    let rate = rate as usize;
    let wanted = channels * (rate + 2 * block(rate));
    let mut interleaved = Vec::new();
    let mut packet_samples: Vec<f32> = Vec::new();
    let damaged = |error| format!("damaged WAV file: {error}");
    while interleaved.len() < wanted
        && let Some(packet) = reader.next_packet().map_err(damaged)?
    {
        let decoded = decoder.decode(&packet).map_err(damaged)?;
        decoded.copy_to_vec_interleaved(&mut packet_samples);
        interleaved.extend_from_slice(&packet_samples);
    }
    interleaved.truncate(wanted);
    let end = Box::new(reader).into_inner().pos();
    if is_known && end > bytes {
        return Err("damaged WAV file: it ends before its samples do".into());
    }
    Ok(Samples {
        interleaved,
        channels,
        rate,
    })
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
    use hound::{SampleFormat, WavSpec, WavWriter};

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

    /// A file of these bytes.
    fn read_bytes(bytes: &[u8]) -> Result<Vec<f32>, String> {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        std::fs::write(file.path(), bytes).expect("the file is writable");
        read_clip(file.path()).map_err(|error| error.to_string())
    }

    /// A file of one channel at 16 kHz whose data is said to have so many bytes, with chunks between that few programs read.
    fn with_chunks(format: u16, bits: u16, data: &[u8], length: u32) -> Vec<u8> {
        let mut bytes = b"RIFF\xff\xff\xff\xffWAVEfmt \x10\0\0\0".to_vec();
        bytes.extend(format.to_le_bytes());
        bytes.extend(1u16.to_le_bytes());
        bytes.extend(16_000u32.to_le_bytes());
        bytes.extend((16_000 * u32::from(bits) / 8).to_le_bytes());
        bytes.extend((bits / 8).to_le_bytes());
        bytes.extend(bits.to_le_bytes());
        // Of odd lengths, and so each followed by a byte that is no part of it.
        bytes.extend(b"junk\x05\0\0\0abcde\0");
        bytes.extend(b"LIST\x10\0\0\0INFOISFT\x03\0\0\0abc\0");
        bytes.extend(b"data");
        bytes.extend(length.to_le_bytes());
        bytes.extend(data);
        bytes
    }

    #[test]
    fn what_programs_write_to_pipes_is_read_to_its_end() {
        let data: Vec<u8> = [8192i16, -16384]
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect();
        // Two samples and silence, or what was said instead.
        let is_read = |bytes: &[u8]| match read_bytes(bytes) {
            Ok(clip) => {
                assert_eq!(clip.len(), CLIP);
                let is_silent = clip[2..].iter().all(|&sample| sample == 0.0);
                assert_eq!((&clip[..2], is_silent), (&[0.25, -0.5][..], true));
            }
            Err(said) => panic!("{said}"),
        };
        for length in [4, 0x7fff_f000, u32::MAX] {
            is_read(&with_chunks(1, 16, &data, length));
        }
        let doubles: Vec<u8> = [0.25f64, -0.5]
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect();
        is_read(&with_chunks(3, 64, &doubles, 16));
        let cut = read_bytes(&with_chunks(1, 16, &data, 6)).map(|_| ());
        let said = cut.expect_err("two bytes are missing");
        assert!(said.contains("ends before its samples do"), "{said}");
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
            for (i, &value) in there.iter().enumerate().take(14_000).skip(2000) {
                let error = (value - tone(RATE, i)).abs();
                assert!(error < 0.01, "{rate} Hz is off by {error} at {i}");
            }
        }
    }

    /// Frequencies above half the new rate would come back as others.
    #[test]
    fn what_16_khz_cannot_hold_is_taken_out_and_what_it_can_is_kept() {
        for rate in [22_050, 44_100, 48_000] {
            for (hz, expected) in [(7_000.0, 0.5f64.sqrt()), (9_000.0, 0.0), (10_500.0, 0.0)] {
                let tone = (0..rate)
                    .map(|i| {
                        (2.0 * std::f64::consts::PI * hz * i as f64 / rate as f64).sin() as f32
                    })
                    .collect();
                let there = resample(tone, rate).expect("resamples");
                let middle = &there[2000..14_000];
                let power: f64 = middle.iter().map(|&v| f64::from(v).powi(2)).sum();
                let level = (power / middle.len() as f64).sqrt();
                assert!(
                    (level - expected).abs() < 0.01,
                    "{hz} Hz at {rate} has a level of {level}"
                );
            }
        }
    }
}
