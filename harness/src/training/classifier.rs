//! The classifier that a run ends with: its network, and the speech head's prototypes of all keywords, in
//! `prototypes.safetensors` as `prototypes [1,C,D]`; then those of keywords that it was taught.

use std::path::{Path, PathBuf};

use burn::tensor::{Tensor, TensorData};
use indicatif::ProgressBar;
use protohead::burn::{class_means, cosine_logits};
use protohead::cosine_logits::Options;
use rayon::prelude::*;

use super::cache::extract;
use super::network::{Devices, Network};
use super::run::Finished;
use super::sessions::{SPEECH, embeddings};
use crate::audio::features::Extractor;
use crate::error::Error;
use crate::output::progress;
use crate::tensors::{TensorFile, Written};

const NAME: &str = "prototypes";
/// Files whose features are there at once.
const CHUNK: usize = 64;

/// Leaves the prototypes after the last session.
pub(super) fn write(path: &Path, prototypes: Tensor<3>) -> Result<(), Error> {
    let shape = prototypes.dims();
    let values = prototypes.try_into_vec_as::<f32>();
    let mut written = Written::default();
    written.values(NAME, &values.map_err(Error::of_device)?, &shape);
    written.save(path)
}

/// A finished run's.
pub(crate) struct Classifier<'a> {
    finished: &'a Finished,
    devices: &'a Devices,
    network: Network,
    prototypes: Tensor<3>,
    keywords: Vec<String>,
}

/// What a clip is taken for.
pub(crate) struct Prediction<'a> {
    pub keyword: &'a str,
    /// `e^z / Σ e^z` over all keywords.
    pub probability: f32,
}

impl<'a> Classifier<'a> {
    pub(crate) fn new(finished: &'a Finished, devices: &'a Devices) -> Result<Self, Error> {
        let network = finished.network(devices)?;
        let [_, classes, dim] = network.heads.weight.dims();
        let file = TensorFile::open(&finished.prototypes())?;
        let mut values = file.values(NAME, &[1, classes, dim])?;
        let mut keywords = finished.data.keywords.clone();
        for (keyword, prototype) in finished.enrolled(dim)? {
            keywords.push(keyword);
            values.extend(prototype);
        }
        let shape = [1, keywords.len(), dim];
        let device = devices.heads.clone().without_autodiff();
        Ok(Self {
            finished,
            devices,
            network,
            prototypes: Tensor::from_data(TensorData::new(values, shape), &device),
            keywords,
        })
    }

    /// The class mean of the speech in files of one keyword.
    pub(crate) fn prototype(&self, files: &[PathBuf]) -> Result<Vec<f32>, Error> {
        let extractor = Extractor::new();
        let bar = ProgressBar::hidden();
        let features: Result<Vec<Vec<f32>>, Error> = files
            .par_iter()
            .map(|file| extract(&extractor, file, &bar))
            .collect();
        let embedded = self.embed(&features?);
        let [_, rows, dim] = embedded.dims();
        let device = embedded.device();
        let labels = Tensor::zeros([rows], &device);
        let nothing = Tensor::zeros([1, 1, dim], &device);
        let mean = class_means(embedded, nothing, labels, 1, &Default::default())?;
        mean.check()?;
        let values = mean.weights.try_into_vec_as::<f32>();
        values.map_err(Error::of_device)
    }

    /// Embeddings `[1, clips, dim]` of the speech of some clips.
    fn embed(&self, features: &[Vec<f32>]) -> Tensor<3> {
        let rows: Vec<usize> = (0..features.len()).collect();
        let scaling = &self.finished.data.scaling;
        let hidden = ProgressBar::hidden();
        let (network, devices) = (&self.network, self.devices);
        embeddings(network, scaling, features, &rows, SPEECH, devices, &hidden)
    }

    /// Of the keyword in each file: `answer` gets them in order, a chunk of files at a time, or what is wrong with a file.
    pub(crate) fn predict<'k>(
        &'k self,
        files: &[PathBuf],
        mut answer: impl FnMut(&Path, Result<Prediction<'k>, Error>),
    ) -> Result<(), Error> {
        let extractor = Extractor::new();
        let bar = progress(files.len() as u64);
        for files in files.chunks(CHUNK) {
            let extracted: Vec<Result<Vec<f32>, Error>> = files
                .par_iter()
                .map(|file| extract(&extractor, file, &bar))
                .collect();
            let features: Vec<Vec<f32>> = extracted.iter().flatten().cloned().collect();
            let mut predictions = self.predict_features(&features)?.into_iter();
            bar.suspend(|| {
                for (file, extracted) in files.iter().zip(extracted) {
                    let few = || Error::of_device("fewer predictions than files");
                    answer(
                        file,
                        extracted.and_then(|_| predictions.next().ok_or_else(few)),
                    );
                }
            });
        }
        bar.finish_and_clear();
        Ok(())
    }

    fn predict_features(&self, features: &[Vec<f32>]) -> Result<Vec<Prediction<'_>>, Error> {
        if features.is_empty() {
            return Ok(Vec::new());
        }
        let embedded = self.embed(features);
        let options = Options {
            scale: self.network.heads.scale()? as f32,
            ..Options::default()
        };
        let logits = cosine_logits(embedded, self.prototypes.clone(), &options)?
            .try_into_vec_as::<f32>()
            .map_err(Error::of_device)?;
        let keywords = &self.keywords;
        Ok(logits
            .chunks_exact(keywords.len())
            .map(|logits| {
                let best =
                    (1..logits.len()).fold(0, |best, class| match logits[class] > logits[best] {
                        true => class,
                        false => best,
                    });
                let sum: f32 = logits.iter().map(|z| (z - logits[best]).exp()).sum();
                Prediction {
                    keyword: &keywords[best],
                    probability: 1.0 / sum,
                }
            })
            .collect())
    }
}
