//! Keywords as features: from a Speech-Commands folder, or synthesised.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::audio::features::{Extractor, INPUT, INPUTS};
use crate::audio::synthesis::{Speaker, speak, vocabulary};
use crate::audio::wav::{read_clip, resample};
use crate::error::Error;
use crate::tensors::write_piecewise;

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

    /// Synthesised keywords: `voices` to train on and a quarter as many others to test on, one take each.
    pub(crate) fn synthetic(seed: u64, keywords: usize, voices: usize) -> Self {
        let words = vocabulary(seed, keywords);
        let extractor = Extractor::new();
        let make = |first: u64, count: usize| {
            let tasks: Vec<(usize, u64)> = (0..words.len())
                .flat_map(|word| (0..count as u64).map(move |voice| (word, first + voice)))
                .collect();
            let features = tasks
                .par_iter()
                .map(|&(word, voice)| {
                    let take = (word as u64) << 32 | voice;
                    extractor.extract(&speak(seed, &words[word], &Speaker::new(seed, voice), take))
                })
                .collect();
            Examples {
                features,
                labels: tasks.iter().map(|&(word, _)| word).collect(),
            }
        };
        let names = (0..keywords).map(|word| format!("word{word:02}")).collect();
        Self::new(names, make(0, voices), make(1_000_000, voices.div_ceil(4)))
    }

    /// A Speech-Commands folder: `DIR/<keyword>/*.wav`, with `testing_list.txt` and `validation_list.txt`.
    /// Features are taken from the folder `cache`, and left there if they are to be kept.
    pub(crate) fn folder(root: &Path, cache: &Path, keep: bool) -> Result<Self, Error> {
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
        let testing = list(root, "testing_list.txt", &keywords)?;
        let validation = list(root, "validation_list.txt", &keywords)?;
        let (mut train, mut test) = (Vec::new(), Vec::new());
        for (label, keyword) in keywords.iter().enumerate() {
            let before = [train.len(), test.len()];
            for path in wavs(&root.join(keyword))? {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                let entry = format!("{keyword}/{name}");
                if testing.contains(&entry) {
                    test.push((path, label));
                } else if !validation.contains(&entry) {
                    train.push((path, label));
                }
            }
            let clips = [train.len() - before[0], test.len() - before[1]];
            if clips.contains(&0) {
                return Err(wrong(format!(
                    "keyword {keyword} has {} training and {} test clips: testing_list.txt must name some of them, and not all",
                    clips[0], clips[1]
                )));
            }
        }
        let labels = |clips: &[(PathBuf, usize)]| clips.iter().map(|&(_, label)| label).collect();
        let (train_labels, test_labels) = (labels(&train), labels(&test));
        let trained = train.len();
        let files: Vec<PathBuf> = train
            .into_iter()
            .chain(test)
            .map(|(path, _)| path)
            .collect();
        let mut features = cached(&files, cache, keep)?;
        let test = Examples {
            features: features.split_off(trained),
            labels: test_labels,
        };
        let train = Examples {
            features,
            labels: train_labels,
        };
        Ok(Self::new(keywords, train, test))
    }

    /// The protocol, with as many shots as every keyword has clips for.
    pub(crate) fn protocol(&self) -> Protocol {
        let protocol = Protocol::for_keywords(self.keywords.len());
        let later = protocol.base..protocol.classes();
        let clips = later.map(|class| self.train.of(class..class + 1).len());
        Protocol {
            shots: clips.fold(protocol.shots, usize::min),
            ..protocol
        }
    }

    /// The order in which an epoch visits the base classes' training clips.
    pub(crate) fn order(&self, base: usize, seed: u64, epoch: usize) -> Vec<usize> {
        let mut order = self.train.of(0..base);
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(epoch as u64);
        order.shuffle(&mut rng);
        order
    }

    /// For each example of a batch one of its own class, at random, each once: the class-wise shuffle.
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

fn entries(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
        found.push(entry.map_err(Error::io(folder))?.path());
    }
    found.sort();
    Ok(found)
}

fn wavs(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let is_wav = |path: &PathBuf| {
        let hidden = path.file_name().is_some_and(|name| {
            // Such as the attributes that macOS leaves beside files.
            name.to_string_lossy().starts_with('.')
        });
        let named = path
            .extension()
            .is_some_and(|e| e.eq_ignore_ascii_case("wav"));
        named && !hidden && path.is_file()
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

/// The clips that a list names, as `<keyword>/<file>`; none if there is no list. Clips of what is no keyword may be among them.
fn list(root: &Path, name: &str, keywords: &[String]) -> Result<HashSet<String>, Error> {
    let path = root.join(name);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(HashSet::new()),
        Err(error) => return Err(Error::io(&path)(error)),
    };
    let lines = text
        .lines()
        .map(|line| line.trim().trim_start_matches("./").to_owned());
    let clips: HashSet<String> = lines.filter(|line| !line.is_empty()).collect();
    let is_missing = |clip: &&String| {
        let keyword = clip.split('/').next().unwrap_or_default();
        keywords.iter().any(|known| known == keyword) && !root.join(clip).is_file()
    };
    // The first by name: a set has no order.
    match clips.iter().filter(is_missing).min() {
        Some(clip) => Err(Error::Content {
            path,
            reason: format!("names {clip}, and there is no such file"),
        }),
        None => Ok(clips),
    }
}

/// Counts up when a clip is read otherwise than before.
const CLIP_FORMAT: &[u8] = b"clip 2";
/// Bytes of a clip's features.
const WIDTH: usize = INPUTS * INPUT * size_of::<f32>();

/// Features of files: from the cache, if neither the files nor what is made of them has changed. A cache is named by the
/// content of the files and by the features of a clip that is always the same, and ends with the digest of what is in it.
fn cached(files: &[PathBuf], cache: &Path, keep: bool) -> Result<Vec<Vec<f32>>, Error> {
    let extractor = Extractor::new();
    let mut hash = blake3::Hasher::new();
    hash.update(CLIP_FORMAT);
    hash.update(&to_bytes(&probe(&extractor)?));
    for path in files {
        let content = fs::read(path).map_err(Error::io(path))?;
        hash.update(&(content.len() as u64).to_le_bytes());
        hash.update(&content);
    }
    let name = cache.join(format!("{}.features", hash.finalize().to_hex()));
    if let Some(features) = read_cache(&name, files.len()) {
        return Ok(features);
    }
    let features: Result<Vec<Vec<f32>>, Error> = files
        .par_iter()
        .map(|path| {
            let features = extractor.extract(&read_clip(path)?);
            match features.iter().all(|value| value.is_finite()) {
                true => Ok(features),
                false => Err(Error::Content {
                    path: path.clone(),
                    reason: "its samples are too large for a spectrum".into(),
                }),
            }
        })
        .collect();
    let features = features?;
    if keep && let Err(error) = write_cache(&name, cache, &features) {
        eprintln!("protohead: {error}: the features will be computed again next time");
    }
    Ok(features)
}

/// Clip by clip, as all of a large folder's are gigabytes.
fn read_cache(name: &Path, clips: usize) -> Option<Vec<Vec<f32>>> {
    let mut file = BufReader::new(File::open(name).ok()?);
    let mut hash = blake3::Hasher::new();
    let mut bytes = vec![0; WIDTH];
    let mut features = Vec::with_capacity(clips);
    for _ in 0..clips {
        file.read_exact(&mut bytes).ok()?;
        hash.update(&bytes);
        let value = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        features.push(bytes.chunks_exact(4).map(value).collect());
    }
    let mut digest = Vec::new();
    file.read_to_end(&mut digest).ok()?;
    (digest == hash.finalize().as_bytes()).then_some(features)
}

/// Removes the features that are cached in a folder, and nothing else that someone may have there.
pub(crate) fn clear_cache(cache: &Path) {
    let is_cache = |path: &PathBuf| {
        let digest = path.file_stem().unwrap_or_default().to_string_lossy();
        let hex = digest.chars().all(|c| c.is_ascii_hexdigit());
        path.extension().is_some_and(|e| e == "features") && digest.len() == 64 && hex
    };
    for old in entries(cache)
        .unwrap_or_default()
        .iter()
        .filter(|path| is_cache(path))
    {
        let _ = fs::remove_file(old);
    }
}

/// In place of what else is cached there.
fn write_cache(name: &Path, cache: &Path, features: &[Vec<f32>]) -> Result<(), Error> {
    fs::create_dir_all(cache).map_err(Error::io(cache))?;
    clear_cache(cache);
    write_piecewise(name, |file| {
        let mut hash = blake3::Hasher::new();
        for clip in features {
            let bytes = to_bytes(clip);
            hash.update(&bytes);
            file.write_all(&bytes)?;
        }
        file.write_all(hash.finalize().as_bytes())
    })
}

/// The features of a clip that is always the same: they change with whatever computes features.
fn probe(extractor: &Extractor) -> Result<Vec<f32>, Error> {
    let clip = speak(0, &vocabulary(0, 1)[0], &Speaker::new(0, 0), 0);
    let clip = resample(clip, 22_050).map_err(Error::Usage)?;
    Ok(extractor.extract(&clip))
}

fn to_bytes(values: &[f32]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size_of_val(values));
    bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    bytes
}

#[cfg(test)]
mod tests {
    use hound::{SampleFormat, WavSpec, WavWriter};

    use super::*;

    /// A file of two samples.
    fn write_wav(path: &Path, first: i16) {
        let spec = WavSpec {
            channels: 1,
            sample_rate: 16_000,
            bits_per_sample: 16,
            sample_format: SampleFormat::Int,
        };
        let mut writer = WavWriter::create(path, spec).expect("the folder is writable");
        for sample in [first, 100] {
            writer.write_sample(sample).expect("the folder is writable");
        }
        writer.finalize().expect("the folder is writable");
    }

    #[test]
    fn a_cache_is_used_while_it_holds_what_its_files_give() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (file, cache) = (folder.path().join("a.wav"), folder.path().join("cache"));
        let features = || cached(std::slice::from_ref(&file), &cache, true).expect("a sound file");
        let caches = || entries(&cache).expect("the cache was made");
        write_wav(&file, 1000);
        let first = features();
        let [name] = &caches()[..] else {
            panic!("one file, one cache")
        };
        // Other values with their digest are taken as they are: it is read.
        let other = vec![vec![0.5; INPUTS * INPUT]];
        let mut bytes = to_bytes(&other[0]);
        bytes.extend(blake3::hash(&bytes).as_bytes());
        fs::write(name, &bytes).expect("the folder is writable");
        assert_eq!(features(), other);
        // Without their digest they are not.
        bytes[0] ^= 1;
        fs::write(name, &bytes).expect("the folder is writable");
        assert_eq!(features(), first);
        write_wav(&file, 2000);
        assert_ne!(features(), first);
        assert_eq!(
            caches().len(),
            1,
            "the new one has taken the old one's place"
        );
        assert_ne!(caches()[0], *name);
    }

    #[test]
    fn only_caches_are_cleared() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let digest = "0a".repeat(32);
        for name in ["notes.txt", "notes.features", &format!("{digest}.features")] {
            fs::write(folder.path().join(name), "").expect("the folder is writable");
        }
        clear_cache(folder.path());
        let left = entries(folder.path()).expect("the folder is readable");
        let names: Vec<_> = left.iter().map(|path| path.file_name()).collect();
        assert_eq!(
            names,
            [Some("notes.features".as_ref()), Some("notes.txt".as_ref())]
        );
    }

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
