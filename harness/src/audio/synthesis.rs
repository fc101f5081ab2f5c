//! A small source-filter synthesiser: keywords are sequences of phonemes, each a set of formants and a source;
//! speakers differ in pitch, tract length, rate and noise. Deterministic from its seed.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{CLIP, RATE};

/// A phoneme: three formants in Hz, the share of voice in its source, its loudness.
struct Phoneme {
    formants: [f64; 3],
    voiced: f64,
    level: f64,
}

const fn phoneme(f1: f64, f2: f64, f3: f64, voiced: f64, level: f64) -> Phoneme {
    Phoneme {
        formants: [f1, f2, f3],
        voiced,
        level,
    }
}

/// Vowels (Peterson and Barney's means for men), then consonants.
const PHONEMES: [Phoneme; 14] = [
    phoneme(270.0, 2290.0, 3010.0, 1.0, 1.0),  // i
    phoneme(530.0, 1840.0, 2480.0, 1.0, 1.0),  // e
    phoneme(660.0, 1720.0, 2410.0, 1.0, 1.0),  // æ
    phoneme(730.0, 1090.0, 2440.0, 1.0, 1.0),  // a
    phoneme(570.0, 840.0, 2410.0, 1.0, 1.0),   // o
    phoneme(300.0, 870.0, 2240.0, 1.0, 1.0),   // u
    phoneme(490.0, 1350.0, 1690.0, 1.0, 1.0),  // er
    phoneme(640.0, 1190.0, 2390.0, 1.0, 1.0),  // uh
    phoneme(250.0, 1100.0, 2200.0, 1.0, 0.5),  // m
    phoneme(250.0, 1700.0, 2600.0, 1.0, 0.5),  // n
    phoneme(360.0, 1000.0, 2900.0, 1.0, 0.7),  // l
    phoneme(2500.0, 4500.0, 6500.0, 0.0, 0.3), // s
    phoneme(1800.0, 2600.0, 3600.0, 0.0, 0.3), // sh
    phoneme(900.0, 1500.0, 2600.0, 0.0, 0.25), // h
];
const VOWELS: usize = 8;

/// A voice.
pub(crate) struct Speaker {
    pitch: f64,
    tract: f64,
    rate: f64,
    noise: f64,
}

impl Speaker {
    /// The speaker with this number.
    pub(crate) fn new(seed: u64, number: u64) -> Self {
        let mut rng = stream(seed, 1, number);
        Self {
            pitch: rng.random_range(85.0..240.0),
            tract: rng.random_range(0.88..1.15),
            rate: rng.random_range(0.8..1.2),
            noise: rng.random_range(0.001..0.01),
        }
    }
}

fn stream(seed: u64, purpose: u64, number: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ (purpose << 56));
    rng.set_stream(number);
    rng
}

/// Distinct words of two syllables: consonant, vowel, consonant, vowel.
pub(crate) fn vocabulary(seed: u64, words: usize) -> Vec<Vec<usize>> {
    let mut rng = stream(seed, 2, 0);
    let mut found: Vec<Vec<usize>> = Vec::new();
    while found.len() < words {
        let mut word = Vec::new();
        for _ in 0..2 {
            word.push(rng.random_range(VOWELS..PHONEMES.len()));
            word.push(rng.random_range(0..VOWELS));
        }
        // Two words share at most two phonemes in place, so that each can be told from the others.
        let near = |other: &Vec<usize>| other.iter().zip(&word).filter(|(a, b)| a == b).count() > 2;
        if !found.iter().any(near) {
            found.push(word);
        }
    }
    found
}

/// A two-pole resonator, retuned as its formant moves.
#[derive(Clone, Copy, Default)]
struct Resonator {
    y1: f64,
    y2: f64,
}

impl Resonator {
    fn step(&mut self, input: f64, hz: f64, bandwidth: f64) -> f64 {
        let radius = (-std::f64::consts::PI * bandwidth / RATE as f64).exp();
        let angle = 2.0 * std::f64::consts::PI * hz.min(7500.0) / RATE as f64;
        let (b1, b2) = (2.0 * radius * angle.cos(), -radius * radius);
        let out = (1.0 - b1 - b2) * input + b1 * self.y1 + b2 * self.y2;
        (self.y2, self.y1) = (self.y1, out);
        out
    }
}

/// One utterance of `word` by `speaker`, a clip of one second.
pub(crate) fn speak(seed: u64, word: &[usize], speaker: &Speaker, take: u64) -> Vec<f32> {
    let mut rng = stream(seed, 3, take);
    let lengths: Vec<f64> = word
        .iter()
        .map(|_| rng.random_range(0.09..0.15) / speaker.rate * RATE as f64)
        .collect();
    let spoken = lengths.iter().sum::<f64>().min(0.95 * CLIP as f64);
    // Roughly in the middle, as recordings cut to a second are.
    let start = (CLIP as f64 - spoken) * rng.random_range(0.35..0.65);
    let pitch = speaker.pitch * rng.random_range(0.92..1.08);
    let mut clip = vec![0.0f64; CLIP];
    let mut resonators = [Resonator::default(); 3];
    let mut phase = 0.0;
    let mut low = 0.0;
    for n in 0..spoken as usize {
        let (from, to, blend) = place(&lengths, n as f64);
        let (a, b) = (&PHONEMES[word[from]], &PHONEMES[word[to]]);
        let mix = |a: f64, b: f64| a + (b - a) * blend;
        let time = n as f64 / spoken;
        phase += pitch * (1.1 - 0.25 * time) / RATE as f64;
        let pulse = if phase >= 1.0 {
            phase -= 1.0;
            1.0
        } else {
            0.0
        };
        low += 0.3 * (pulse - low); // the glottal pulse's tilt
        let voiced = mix(a.voiced, b.voiced);
        let hiss = rng.random_range(-1.0..1.0);
        let source = voiced * low * 12.0 + (1.0 - voiced) * hiss;
        let mut sound = source * mix(a.level, b.level);
        for (i, resonator) in resonators.iter_mut().enumerate() {
            let hz = mix(a.formants[i], b.formants[i]) * speaker.tract;
            sound = 0.3 * sound + resonator.step(sound, hz, 80.0 + 40.0 * i as f64);
        }
        let fade = (time.min(1.0 - time) * 20.0).min(1.0);
        clip[start as usize + n] = sound * fade;
    }
    let peak = clip.iter().fold(1e-9f64, |peak, v| peak.max(v.abs()));
    clip.iter()
        .map(|v| (0.5 * v / peak + speaker.noise * rng.random_range(-1.0..1.0)) as f32)
        .collect()
}

/// The phonemes around a sample and how far it is from the first to the second: the last third of each glides.
fn place(lengths: &[f64], sample: f64) -> (usize, usize, f64) {
    let mut begin = 0.0;
    for (i, &length) in lengths.iter().enumerate() {
        if sample < begin + length || i + 1 == lengths.len() {
            let next = (i + 1).min(lengths.len() - 1);
            let along = (sample - begin) / length;
            return (i, next, ((along - 2.0 / 3.0) * 3.0).clamp(0.0, 1.0));
        }
        begin += length;
    }
    (0, 0, 0.0)
}
