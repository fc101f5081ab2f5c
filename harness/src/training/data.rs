//! Keywords as features: from a Speech-Commands folder, or synthesised.

use std::collections::{BTreeSet, HashSet};
use std::path::{Path, PathBuf};

use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::cache::{cached, digests};
use super::folder::{keywords, list, wavs};
use super::protocol::{Asked, Protocol};
use crate::audio::features::{Extractor, INPUT, INPUTS};
use crate::audio::synthesis::{Speaker, speak, vocabulary};
use crate::error::Error;
use crate::output::{progress, tell};

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

/// Mean and deviation of each input of some clips' features.
pub(super) type Moments = [(f32, f32); INPUTS];

pub(super) fn moments<'a>(clips: impl Iterator<Item = &'a Vec<f32>> + Clone) -> Moments {
    std::array::from_fn(|input| {
        let values = || {
            let of_input = |clip: &'a Vec<f32>| &clip[input * INPUT..(input + 1) * INPUT];
            clips.clone().flat_map(of_input).map(|&v| f64::from(v))
        };
        let count = values().count() as f64;
        let mean = values().sum::<f64>() / count;
        let variance = values().map(|v| (v - mean).powi(2)).sum::<f64>() / count;
        (mean as f32, variance.sqrt().max(1e-6) as f32)
    })
}

/// Keywords with clips to train on and clips of other voices to test on.
pub(crate) struct Dataset {
    pub keywords: Vec<String>,
    pub protocol: Protocol,
    /// Of later classes, their shots.
    pub train: Examples,
    /// Of base classes only; there may be none.
    pub validation: Examples,
    pub test: Examples,
    /// Of the base classes' training clips: of the others no more is known than their shots.
    pub scaling: Moments,
    /// The digest of the files, with what they are for; none of what is synthesised.
    pub clips: Option<String>,
}

impl Dataset {
    fn new(
        keywords: Vec<String>,
        protocol: Protocol,
        [train, validation, test]: [Examples; 3],
        clips: Option<String>,
    ) -> Self {
        let rows = train.of(0..protocol.base);
        let scaling = moments(rows.iter().map(|&row| &train.features[row]));
        Self {
            keywords,
            protocol,
            train,
            validation,
            test,
            scaling,
            clips,
        }
    }

    /// Synthesised keywords: `voices` to train on, a quarter as many others to test on, and an eighth for validation, one take each.
    pub(crate) fn synthetic(
        seed: u64,
        keywords: usize,
        voices: usize,
        asked: Asked,
    ) -> Result<Self, String> {
        let protocol = Protocol::new(asked, keywords)?.with_shots_of(&vec![voices; keywords]);
        let words = vocabulary(seed, keywords);
        let extractor = Extractor::new();
        let make = |tasks: Vec<(usize, u64)>| {
            let bar = progress(tasks.len() as u64);
            bar.set_message("clips");
            let features = tasks
                .par_iter()
                .map(|&(word, voice)| {
                    bar.inc(1);
                    let take = (word as u64) << 32 | voice;
                    extractor.extract(&speak(seed, &words[word], &Speaker::new(seed, voice), take))
                })
                .collect();
            bar.finish_and_clear();
            Examples {
                features,
                labels: tasks.iter().map(|&(word, _)| word).collect(),
            }
        };
        let trained = |word| {
            let drawn = protocol.drawn(word, voices, seed).into_iter();
            drawn.map(move |voice| (word, voice as u64))
        };
        let others = |word, first, count| (0..count as u64).map(move |n| (word, first + n));
        let tested = |word| others(word, 1_000_000, voices.div_ceil(4));
        let validated = |word| others(word, 2_000_000, voices.div_ceil(8));
        let examples = [
            make((0..keywords).flat_map(trained).collect()),
            make((0..protocol.base).flat_map(validated).collect()),
            make((0..keywords).flat_map(tested).collect()),
        ];
        let keywords = synthetic_keywords(keywords);
        Ok(Self::new(keywords, protocol, examples, None))
    }

    /// Features of clips are taken from the folder `cache`, and left there if they are to be kept.
    pub(crate) fn of_clips(clips: Clips, cache: &Path, keep: bool) -> Result<Self, Error> {
        let mut features = cached(&clips.files, &clips.digests, cache, keep)?.into_iter();
        let mut labels = clips.labels.into_iter();
        let examples = clips.counts.map(|count| Examples {
            features: features.by_ref().take(count).collect(),
            labels: labels.by_ref().take(count).collect(),
        });
        if let Some(first) = clips.absent.first() {
            let more = match clips.absent.len() - 1 {
                0 => String::new(),
                more => format!(" and {more} more"),
            };
            tell(format_args!(
                "left out what the lists name of keywords that are not here: {first}{more}"
            ));
        }
        let digest = Some(clips.digest);
        Ok(Self::new(clips.keywords, clips.protocol, examples, digest))
    }

    /// The order in which an epoch visits the base classes' training clips.
    pub(crate) fn order(&self, seed: u64, epoch: usize) -> Vec<usize> {
        let mut order = self.train.of(0..self.protocol.base);
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

/// The names of synthesised keywords.
pub(crate) fn synthetic_keywords(count: usize) -> Vec<String> {
    (0..count).map(|word| format!("word{word:02}")).collect()
}

/// The clips of a Speech-Commands folder that take part, before anything is made of them.
pub(crate) struct Clips {
    pub keywords: Vec<String>,
    protocol: Protocol,
    /// Those to train on, for validation, and to test on.
    files: Vec<PathBuf>,
    labels: Vec<usize>,
    /// How many there are of each.
    counts: [usize; 3],
    /// Of the content of each.
    digests: Vec<blake3::Hash>,
    /// Of all, with what they are for.
    pub digest: String,
    /// Keywords of which the lists name clips, but which are not here.
    absent: BTreeSet<String>,
}

impl Clips {
    /// Those of `DIR/<keyword>/*.wav`, with `testing_list.txt` and `validation_list.txt`; of later classes, shots that are drawn from the
    /// seed.
    pub(crate) fn find(root: &Path, seed: u64, asked: Asked) -> Result<Self, Error> {
        let wrong = |reason: String| Error::Content {
            path: root.into(),
            reason,
        };
        let keywords = keywords(root)?;
        if keywords.len() < 2 {
            return Err(wrong(format!(
                "folders with WAV files: {}, expected a folder a keyword, at least 2",
                keywords.len()
            )));
        }
        let protocol = Protocol::new(asked, keywords.len()).map_err(wrong)?;
        let mut clips = Vec::new();
        for (label, keyword) in keywords.iter().enumerate() {
            for path in wavs(&root.join(keyword))? {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                clips.push((format!("{keyword}/{name}"), path, label));
            }
        }
        let there: HashSet<&str> = clips.iter().map(|(entry, ..)| entry.as_str()).collect();
        let mut absent = BTreeSet::new();
        let mut of = |name: &str| list(root, name, &keywords, &there, &mut absent);
        let testing = of("testing_list.txt")?.ok_or_else(|| {
            wrong("there is no testing_list.txt, which names the test clips".into())
        })?;
        let validation = of("validation_list.txt")?.unwrap_or_default();
        // By class: to train on, for validation, to test on.
        let mut split = vec![[const { Vec::new() }; 3]; keywords.len()];
        for (entry, path, label) in clips.iter().cloned() {
            let place = match (testing.contains(&entry), validation.contains(&entry)) {
                (true, _) => 2,
                (false, true) => 1,
                (false, false) => 0,
            };
            split[label][place].push(path);
        }
        for (keyword, files) in keywords.iter().zip(&split) {
            let [trained, validated, tested] = files.each_ref().map(Vec::len);
            if trained == 0 || tested == 0 {
                return Err(wrong(format!(
                    "keyword {keyword} has {trained} clips to train on, {tested} in testing_list.txt and {validated} in \
                     validation_list.txt: some must be for training, and some in testing_list.txt"
                )));
            }
        }
        let trained: Vec<usize> = split.iter().map(|[train, ..]| train.len()).collect();
        let protocol = protocol.with_shots_of(&trained);
        for (class, [train, validation, _]) in split.iter_mut().enumerate() {
            let drawn = protocol.drawn(class, train.len(), seed);
            *train = drawn.into_iter().map(|i| train[i].clone()).collect();
            if class >= protocol.base {
                validation.clear();
            }
        }
        let (mut files, mut labels, mut counts) = (Vec::new(), Vec::new(), [0; 3]);
        for (place, count) in counts.iter_mut().enumerate() {
            for (class, of_class) in split.iter_mut().enumerate() {
                let of_class = std::mem::take(&mut of_class[place]);
                *count += of_class.len();
                labels.extend(std::iter::repeat_n(class, of_class.len()));
                files.extend(of_class);
            }
        }
        let digests = digests(&files)?;
        let mut all = blake3::Hasher::new();
        for (i, (digest, &label)) in digests.iter().zip(&labels).enumerate() {
            let place = u8::from(i >= counts[0]) + u8::from(i >= counts[0] + counts[1]);
            all.update(&[place]);
            all.update(&(label as u64).to_le_bytes());
            all.update(digest.as_bytes());
        }
        Ok(Self {
            keywords,
            protocol,
            files,
            labels,
            counts,
            digests,
            digest: all.finalize().to_hex().to_string(),
            absent,
        })
    }
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

    /// Else the base session would know of clips that come later.
    #[test]
    fn inputs_are_scaled_by_what_the_base_classes_are_trained_on() {
        let scaling = |later: f32| {
            let examples = || Examples {
                features: (0..7)
                    .map(|label| vec![if label < 4 { label as f32 } else { later }; INPUTS * INPUT])
                    .collect(),
                labels: (0..7).collect(),
            };
            let protocol = Protocol::new(Asked::default(), 7).expect("no number of base classes");
            let examples = [(); 3].map(|()| examples());
            Dataset::new(synthetic_keywords(7), protocol, examples, None).scaling
        };
        let (mean, deviation) = (1.5, 1.25f32.sqrt());
        assert_eq!(scaling(100.0), [(mean, deviation); INPUTS]);
        assert_eq!(scaling(-3.0), scaling(100.0));
    }
}
