//! Keywords as features: from a Speech-Commands folder, or synthesised.

use std::fs;
use std::path::{Path, PathBuf};

use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::audio::features::{INPUT, INPUTS, extract};
use crate::audio::synthesis::{Speaker, speak, vocabulary};
use crate::audio::wav::read_clip;
use crate::error::Error;
use crate::tensors::write_atomically;

/// How keywords become sessions: base classes first, then ways of shots.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Protocol {
    pub base: usize,
    pub sessions: usize,
    pub ways: usize,
    pub shots: usize,
}

impl Protocol {
    /// 20 base classes and five sessions of three, or as much of it as there are keywords.
    pub(crate) fn for_keywords(keywords: usize) -> Self {
        let ways = 3;
        let sessions = (keywords * 3 / 7 / ways).min(5);
        Self {
            base: keywords - sessions * ways,
            sessions,
            ways,
            shots: 5,
        }
    }

    pub(crate) fn classes(&self) -> usize {
        self.base + self.sessions * self.ways
    }
}

/// Clips of keywords as features.
#[derive(Serialize, Deserialize)]
pub(crate) struct Examples {
    /// `[INPUTS, BANDS, FRAMES]` each.
    pub features: Vec<Vec<f32>>,
    pub labels: Vec<usize>,
}

impl Examples {
    pub(crate) fn len(&self) -> usize {
        self.labels.len()
    }

    /// The places of the examples with a label among `classes`.
    pub(crate) fn of(&self, classes: std::ops::Range<usize>) -> Vec<usize> {
        (0..self.len())
            .filter(|&i| classes.contains(&self.labels[i]))
            .collect()
    }
}

/// Keywords with clips to train on and clips of other voices to test on.
pub(crate) struct Dataset {
    pub keywords: Vec<String>,
    pub train: Examples,
    pub test: Examples,
    /// Mean and deviation of each input over the training clips.
    pub scaling: [(f32, f32); INPUTS],
}

impl Dataset {
    fn new(keywords: Vec<String>, train: Examples, test: Examples) -> Self {
        let scaling = std::array::from_fn(|input| {
            let values = || {
                train.features.iter().flat_map(|f| {
                    f[input * INPUT..(input + 1) * INPUT]
                        .iter()
                        .map(|&v| f64::from(v))
                })
            };
            let count = (train.len() * INPUT) as f64;
            let mean = values().sum::<f64>() / count;
            let variance = values().map(|v| (v - mean).powi(2)).sum::<f64>() / count;
            (mean as f32, variance.sqrt().max(1e-6) as f32)
        });
        Self {
            keywords,
            train,
            test,
            scaling,
        }
    }

    /// Synthesised keywords: `voices` to train on and a quarter as many others to test on, two takes each.
    pub(crate) fn synthetic(seed: u64, keywords: usize, voices: usize) -> Self {
        let words = vocabulary(seed, keywords);
        let make = |first: u64, count: usize| {
            let tasks: Vec<(usize, u64)> = (0..words.len())
                .flat_map(|word| (0..count as u64).map(move |voice| (word, first + voice)))
                .collect();
            let clips: Vec<Vec<f32>> = tasks
                .par_iter()
                .map(|&(word, voice)| {
                    let take = word as u64 * 100_000 + voice;
                    speak(seed, &words[word], &Speaker::new(seed, voice), take)
                })
                .collect();
            Examples {
                features: extract(&clips),
                labels: tasks.iter().map(|&(word, _)| word).collect(),
            }
        };
        let names = (0..keywords).map(|word| format!("word{word:02}")).collect();
        Self::new(names, make(0, voices), make(1_000_000, voices.div_ceil(4)))
    }

    /// A Speech-Commands folder: `DIR/<keyword>/*.wav`, with `testing_list.txt` and `validation_list.txt`.
    /// Features are cached in the folder `cache`, under a name made from everything they depend on.
    pub(crate) fn folder(root: &Path, cache: &Path) -> Result<Self, Error> {
        let wrong = |reason: String| Error::Content {
            path: root.into(),
            reason,
        };
        let keywords = keywords(root)?;
        if keywords.len() < 2 {
            return Err(wrong(format!(
                "{} folders with WAV files, expected a folder a keyword, at least 2",
                keywords.len()
            )));
        }
        let testing = list(&root.join("testing_list.txt"))?;
        let validation = list(&root.join("validation_list.txt"))?;
        let mut train = Vec::new();
        let mut test = Vec::new();
        for (label, keyword) in keywords.iter().enumerate() {
            for path in wavs(&root.join(keyword))? {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                let entry = format!("{keyword}/{name}");
                if testing.contains(&entry) {
                    test.push((path, label));
                } else if !validation.contains(&entry) {
                    train.push((path, label));
                }
            }
        }
        if train.is_empty() || test.is_empty() {
            return Err(wrong(format!(
                "{} training and {} test clips: testing_list.txt must name some of the clips, and not all",
                train.len(),
                test.len()
            )));
        }
        Ok(Self::new(
            keywords,
            cached(&train, cache)?,
            cached(&test, cache)?,
        ))
    }

    /// The order in which an epoch visits the base classes' training clips.
    pub(crate) fn order(&self, base: usize, seed: u64, epoch: usize) -> Vec<usize> {
        let mut order = self.train.of(0..base);
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(epoch as u64);
        order.shuffle(&mut rng);
        order
    }

    /// For each example of a batch another of its own class, at random: the class-wise shuffle.
    pub(crate) fn partners(labels: &[usize], seed: u64, draw: usize) -> Vec<usize> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(1 << 32 | draw as u64);
        let mut partners: Vec<usize> = (0..labels.len()).collect();
        for i in (1..labels.len()).rev() {
            // Fisher and Yates among the rows of the class so far.
            let same: Vec<usize> = (0..=i).filter(|&j| labels[j] == labels[i]).collect();
            partners.swap(i, same[rng.random_range(0..same.len())]);
        }
        partners
    }
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_path_buf();
    move |source| Error::Io { path, source }
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(io(folder))? {
        found.push(entry.map_err(io(folder))?.path());
    }
    found.sort();
    Ok(found)
}

fn wavs(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let is_wav = |path: &PathBuf| {
        path.extension()
            .is_some_and(|e| e.eq_ignore_ascii_case("wav"))
    };
    Ok(entries(folder)?.into_iter().filter(is_wav).collect())
}

/// The folders with WAV files; names with a leading underscore (background noise) are no keywords.
fn keywords(root: &Path) -> Result<Vec<String>, Error> {
    let mut found = Vec::new();
    for path in entries(root)? {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if path.is_dir() && !name.starts_with(['_', '.']) && !wavs(&path)?.is_empty() {
            found.push(name);
        }
    }
    Ok(found)
}

fn list(path: &Path) -> Result<std::collections::HashSet<String>, Error> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(text.lines().map(|line| line.trim().to_owned()).collect()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Default::default()),
        Err(source) => Err(Error::Io {
            path: path.into(),
            source,
        }),
    }
}

/// Features of files: from the cache if nothing that made them has changed.
fn cached(files: &[(PathBuf, usize)], cache: &Path) -> Result<Examples, Error> {
    let mut hash = blake3::Hasher::new();
    hash.update(
        concat!(
            "features of protohead ",
            env!("CARGO_PKG_VERSION"),
            ", layout 1"
        )
        .as_bytes(),
    );
    for (path, _) in files {
        hash.update(path.to_string_lossy().as_bytes());
        hash.update(&fs::read(path).map_err(io(path))?);
    }
    let labels = files.iter().map(|&(_, label)| label).collect();
    let name = cache.join(format!("{}.features", hash.finalize().to_hex()));
    let width = INPUTS * INPUT * size_of::<f32>();
    if let Ok(bytes) = fs::read(&name)
        && bytes.len() == files.len() * width
    {
        let value = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        let features = bytes
            .chunks_exact(width)
            .map(|clip| clip.chunks_exact(4).map(value).collect())
            .collect();
        return Ok(Examples { features, labels });
    }
    let clips: Result<Vec<_>, Error> = files.par_iter().map(|(path, _)| read_clip(path)).collect();
    let features = extract(&clips?);
    let bytes: Vec<u8> = features
        .iter()
        .flatten()
        .flat_map(|v| v.to_le_bytes())
        .collect();
    fs::create_dir_all(cache).map_err(io(cache))?;
    write_atomically(&name, &bytes)?;
    Ok(Examples { features, labels })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partners_are_a_permutation_within_each_class() {
        let labels = [0, 1, 0, 2, 1, 0, 0, 1];
        let mut partners = Dataset::partners(&labels, 7, 3);
        for (i, &j) in partners.iter().enumerate() {
            assert_eq!(labels[i], labels[j]);
        }
        partners.sort_unstable();
        assert_eq!(partners, (0..labels.len()).collect::<Vec<_>>());
    }

    #[test]
    fn the_protocol_of_35_keywords_is_20_base_classes_and_five_sessions_of_three() {
        let protocol = Protocol::for_keywords(35);
        assert_eq!(
            (protocol.base, protocol.sessions, protocol.ways),
            (20, 5, 3)
        );
        for keywords in 2..40 {
            let protocol = Protocol::for_keywords(keywords);
            assert_eq!(protocol.classes(), keywords);
            assert!(protocol.base >= 2);
        }
    }
}
