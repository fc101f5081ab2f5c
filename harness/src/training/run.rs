//! A training run in a folder: `config.json`, `data.json`, `metrics.jsonl`, `curves.svg`, `checkpoint/`, `model.bpk`,
//! `prototypes.safetensors`, the digest of both `model.json`, `accuracy.json`, and for a run on files `cache/`; later perhaps
//! `enrolled.json`. The same configuration on the same CPU gives the same bytes in each; on a GPU Burn's convolutions tune themselves, and
//! another choice sums in another order.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::optim::decay::WeightDecayConfig;
use burn::optim::momentum::MomentumConfig;
use burn::optim::{GradientsParams, ModuleOptimizer, SgdConfig};
use burn::store::ModuleRecord;
use burn::tensor::Bytes;
use serde::{Deserialize, Serialize};

use super::cache::probe_moments;
use super::checkpoint::Checkpoint;
use super::config::RunConfig;
use super::data::{Dataset, Moments};
use super::enrolled::Enrolled;
use super::json::{read_json, write_json};
use super::metrics::{EpochMetrics, draw, write_lines};
use super::network::{Devices, Network, VALUES, Weights, batch};
use super::protocol::Protocol;
use super::{classifier, enrolled, record, sessions};
use crate::audio::features::INPUTS;
use crate::error::Error;
use crate::files::{Digest, write_atomically};
use crate::output::{progress, tell};

/// What a run knows of the clips it was trained on: an evaluation is of the same keywords, scaled alike.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Data {
    pub keywords: Vec<String>,
    /// By which inputs are scaled.
    pub scaling: Moments,
    /// Of the features of a clip that is always the same: another version of the program may make others, or not know of this.
    #[serde(default)]
    pub probe: Moments,
    /// The [`VERSION`] that began it.
    #[serde(default)]
    pub version: u32,
    /// The digest of the files; none of what is synthesised.
    pub clips: Option<String>,
}

/// Counts up when equal features lead elsewhere than before: by the network, its training, the choice of shots, or what is reported.
pub(super) const VERSION: u32 = 3;

impl Data {
    pub(super) fn read(run: &Path) -> Result<Self, Error> {
        let path = run.join("data.json");
        let data: Self = read_json(&path)?;
        let sound = |&(mean, deviation): &(f32, f32)| {
            mean.is_finite() && deviation.is_finite() && deviation > 0.0
        };
        match data.scaling.iter().all(sound) {
            true => Ok(data),
            false => Err(Error::damaged(&path)("nothing can be scaled so")),
        }
    }

    /// Whether it is known of other clips than those of this digest; what is synthesised has none.
    pub(super) fn has_others(&self, clips: Option<&str>) -> bool {
        self.clips.is_some() && self.clips.as_deref() != clips
    }

    /// Refuses to go on with a run in a folder that another version of the program began.
    pub(super) fn check_version(&self, run: &Path) -> Result<(), Error> {
        // Machines round differently.
        let near = |a: f32, b: f32| (a - b).abs() < 1e-3;
        let same = (self.probe.iter().zip(probe_moments()?))
            .all(|(then, now)| near(then.0, now.0) && near(then.1, now.1));
        match same && self.version == VERSION {
            true => Ok(()),
            false => Err(Error::Content {
                path: run.into(),
                reason: "the run is of another version of protohead, which computes otherwise"
                    .into(),
            }),
        }
    }

    pub(super) fn write(&self, run: &Path) -> Result<(), Error> {
        write_json(&run.join("data.json"), self)
    }
}

/// What a finished run has left.
pub(crate) struct Finished {
    folder: PathBuf,
    config: RunConfig,
    pub(super) data: Data,
    model: Bytes,
}

impl Finished {
    /// Of the run in a folder.
    pub(crate) fn read(folder: &Path) -> Result<Self, Error> {
        let config = Run::config(folder)?;
        let [path, prototypes, digest] = results(folder);
        if [&path, &prototypes, &digest]
            .iter()
            .any(|file| !file.exists())
        {
            return Err(Error::Content {
                path: folder.into(),
                reason: format!(
                    "the run is not finished: train --resume --out {} continues it",
                    folder.display()
                ),
            });
        }
        let read = |path: &Path| fs::read(path).map_err(Error::io(path));
        let model = read(&path)?;
        if Digest::of(&[&model, &read(&prototypes)?]) != read_json(&digest)? {
            let reason = "model.bpk and prototypes.safetensors are not those that were written";
            return Err(Error::damaged(folder)(reason));
        }
        let data = Data::read(folder)?;
        data.check_version(folder)?;
        Ok(Self {
            folder: folder.into(),
            config,
            data,
            model: Bytes::from_bytes_vec(model),
        })
    }

    /// Evaluates the trained network on clips that were [accepted](Self::accept), scaled as those that it was trained on.
    pub(crate) fn evaluate(
        &self,
        dataset: &mut Dataset,
        devices: &Devices,
    ) -> Result<Vec<sessions::Accuracy>, Error> {
        dataset.scaling = self.data.scaling;
        let network = self.network(devices)?;
        let (table, _) = sessions::evaluate(&network, dataset, devices)?;
        Ok(table)
    }

    /// Refuses what is no name of a keyword that could be taught.
    pub(crate) fn can_enroll(&self, keyword: &str) -> Result<(), Error> {
        let is_name = !keyword.is_empty() && keyword.trim() == keyword;
        if !is_name || keyword.contains(char::is_control) {
            return Err(Error::Usage(format!("{keyword:?} is no keyword")));
        }
        if keyword.ends_with(".wav") || Path::new(keyword).is_file() {
            return Err(Error::Usage(format!(
                "{keyword} is a file, expected a keyword before the files"
            )));
        }
        match self.data.keywords.iter().any(|known| known == keyword) {
            true => Err(Error::Usage(format!(
                "the run was trained with {keyword}: only other keywords can be taught"
            ))),
            false => Ok(()),
        }
    }

    /// Teaches a keyword, and says how many the run knows now.
    pub(crate) fn enroll(&self, keyword: &str, prototype: Vec<f32>) -> Result<usize, Error> {
        let model = Digest::of(&[&self.model]);
        let [path, ..] = results(&self.folder);
        let is_current = || fs::read(path).is_ok_and(|now| now == self.model[..]);
        let taught = enrolled::add(&self.folder, model, is_current, keyword, prototype)?;
        Ok(self.data.keywords.len() + taught)
    }

    /// The keywords that the run was taught, with prototypes of so many numbers; tells of those that another network was.
    pub(super) fn enrolled(&self, dim: usize) -> Result<Enrolled, Error> {
        let known = enrolled::read(&self.folder, &Digest::of(&[&self.model]), dim)?;
        Ok(known.unwrap_or_else(|| {
            tell("the keywords of enrolled.json were taught to another network, and take no part");
            Enrolled::new()
        }))
    }

    /// Where the prototypes after the last session are.
    pub(super) fn prototypes(&self) -> PathBuf {
        let [_, prototypes, _] = results(&self.folder);
        prototypes
    }

    pub(crate) fn config(&self) -> &RunConfig {
        &self.config
    }

    /// The trained network, with the base classes' prototypes.
    pub(super) fn network(&self, devices: &Devices) -> Result<Network, Error> {
        let [path, ..] = results(&self.folder);
        let record = ModuleRecord::from_bytes(self.model.clone()).map_err(Error::damaged(&path))?;
        let protocol = Protocol::new(self.config.protocol, self.data.keywords.len())
            .map_err(Error::damaged(&self.folder.join("config.json")))?;
        let network = network(&self.config, protocol, devices);
        let network = network
            .try_load_record(record)
            .map_err(Error::damaged(&path))?;
        Ok(network.valid())
    }

    /// Refuses other keywords than the run's, and tells of other clips.
    pub(crate) fn accept(&self, keywords: &[String], clips: Option<&str>) -> Result<(), Error> {
        if self.data.keywords != keywords {
            return Err(Error::Usage(format!(
                "the run was trained on the keywords {}, these are {}",
                self.data.keywords.join(" "),
                keywords.join(" ")
            )));
        }
        if self.data.has_others(clips) {
            tell("these clips are not those that the run was trained with");
        }
        Ok(())
    }
}

/// The trained network of a run, the prototypes after its last session, and the digest of both, which is written last.
fn results(run: &Path) -> [PathBuf; 3] {
    ["model.bpk", "prototypes.safetensors", "model.json"].map(|name| run.join(name))
}

/// A run's folder.
pub(crate) struct Run {
    folder: PathBuf,
    config: RunConfig,
    /// Held while it trains.
    _lock: File,
}

impl Run {
    /// The configuration of the run in a folder.
    pub(crate) fn config(folder: &Path) -> Result<RunConfig, Error> {
        let path = folder.join("config.json");
        let config: RunConfig = read_json(&path)?;
        config.validate().map_err(Error::damaged(&path))?;
        Ok(config)
    }

    /// The run in a folder, which no other process trains while this one has `lock`.
    pub(super) fn locked(folder: &Path, config: RunConfig, lock: File) -> Self {
        Self {
            folder: folder.into(),
            config,
            _lock: lock,
        }
    }

    /// Trains what epochs are left, replaces the prototypes, and evaluates every session.
    pub(crate) fn train(
        &self,
        dataset: &Dataset,
        devices: &Devices,
    ) -> Result<Vec<sessions::Accuracy>, Error> {
        let config = &self.config;
        devices.encoder.seed(config.seed);
        devices.heads.seed(config.seed);
        let mut network = network(config, dataset.protocol, devices);
        network.visit(&mut Initialize);
        let mut optimizer = optimizer(config);
        let mut metrics: Vec<EpochMetrics> = Vec::new();
        if let Some(checkpoint) = Checkpoint::load(&self.folder)? {
            let path = self.folder.join("checkpoint");
            network = self::network(config, dataset.protocol, devices)
                .try_load_record(checkpoint.model)
                .map_err(Error::damaged(&path))?;
            optimizer = self::optimizer(config)
                .from_bytes(checkpoint.optimizer)
                .map_err(Error::damaged(&path))?;
            metrics = checkpoint.metrics;
            // The run may have been killed between its checkpoint and these.
            self.report(&metrics)?;
        }
        let rows = dataset.order(config.seed, 0).len();
        let steps = rows.div_ceil(config.batch);
        let bar = progress((config.epochs * steps) as u64);
        bar.set_position((metrics.len() * steps) as u64);
        // What was done before says nothing of the pace.
        bar.tick();
        bar.reset_eta();
        bar.set_message(format!("epoch {}", metrics.len() + 1));
        let weights = Weights {
            heads: config.head_weights.clone(),
            lambdas: [config.lambda, config.lambda_shuffled],
        };
        for epoch in metrics.len()..config.epochs {
            let mut sums = [0.0f64; VALUES];
            let mut correct = 0;
            let mut rate = 0.0;
            for (i, chosen) in dataset
                .order(config.seed, epoch)
                .chunks(config.batch)
                .enumerate()
            {
                let step = epoch * steps + i;
                // Dropout draws from here, so that a resumed run draws the same.
                devices.encoder.seed(config.seed.wrapping_add(step as u64));
                let labels: Vec<usize> = chosen
                    .iter()
                    .map(|&row| dataset.train.labels[row])
                    .collect();
                let partners = [2 * step, 2 * step + 1]
                    .map(|draw| Dataset::partners(&labels, config.seed, draw));
                let device = &devices.encoder;
                let features = &dataset.train.features;
                let inputs = batch(&dataset.scaling, features, chosen, 0..INPUTS, device);
                let loss = network.loss(inputs, &labels, &partners, &weights, &devices.heads)?;
                let [total, ..] = loss.values;
                if !total.is_finite() {
                    bar.finish_and_clear();
                    return Err(Error::Diverged {
                        loss: total,
                        epoch: epoch + 1,
                        step: i + 1,
                    });
                }
                let weight = chosen.len() as f64 / rows as f64;
                for (sum, value) in sums.iter_mut().zip(loss.values) {
                    *sum += weight * f64::from(value);
                }
                correct += loss.correct;
                let along = step as f64 / (config.epochs * steps) as f64;
                rate = config.learning_rate * 0.5 * (1.0 + (std::f64::consts::PI * along).cos());
                let gradients = GradientsParams::from_grads(loss.total.backward(), &network);
                network = optimizer.step(rate, network, gradients);
                bar.inc(1);
                bar.set_message(format!(
                    "epoch {} loss {:.3}",
                    epoch + 1,
                    sums[0] * rows as f64 / ((i * config.batch + chosen.len()) as f64)
                ));
            }
            metrics.push(EpochMetrics {
                epoch: epoch + 1,
                learning_rate: rate as f32,
                loss: sums[0] as f32,
                speech: sums[1] as f32,
                formant: sums[2] as f32,
                residual: sums[3] as f32,
                reconstruction: sums[4] as f32,
                reconstruction_shuffled: sums[5] as f32,
                accuracy: 100.0 * correct as f32 / rows as f32,
                validation_accuracy: sessions::validate(&network, dataset, devices)?,
            });
            Checkpoint::save(&self.folder, &network, &optimizer, &metrics)?;
            self.report(&metrics)?;
            if bar.is_hidden()
                && let Some(last) = metrics.last()
            {
                let validation = last.validation_accuracy;
                let validation =
                    validation.map_or(String::new(), |v| format!(", validation {v:.1} %"));
                tell(format_args!(
                    "epoch {} of {}: loss {:.3}, accuracy {:.1} %{validation}",
                    last.epoch, config.epochs, last.loss, last.accuracy
                ));
            }
        }
        bar.finish_and_clear();
        let network = sessions::replace_prototypes(network, dataset, devices)?;
        // What the last step did, no loss has shown.
        let trained = network.heads.weight.val().try_into_vec_as::<f32>();
        let trained = trained.map_err(Error::of_device)?;
        if !trained.iter().all(|weight| weight.is_finite()) {
            return Err(Error::DivergedLast);
        }
        let [path, prototypes_path, digest] = results(&self.folder);
        let (bytes, _) =
            record::model(network.clone().into_record()).map_err(Error::unwritable(&path))?;
        let (table, prototypes) = sessions::evaluate(&network, dataset, devices)?;
        // Until the new digest is there, none is: the run is not finished.
        let _ = fs::remove_file(&digest);
        write_atomically(&path, &bytes)?;
        classifier::write(&prototypes_path, prototypes)?;
        let written = fs::read(&prototypes_path).map_err(Error::io(&prototypes_path))?;
        write_json(&digest, &Digest::of(&[&bytes, &written]))?;
        write_json(&self.folder.join("accuracy.json"), &table)?;
        Ok(table)
    }

    /// Writes metrics and curves for those who follow the run.
    fn report(&self, metrics: &[EpochMetrics]) -> Result<(), Error> {
        write_lines(&self.folder.join("metrics.jsonl"), metrics)?;
        draw(&self.folder.join("curves.svg"), metrics)
    }
}

/// A network as a run begins with it.
fn network(config: &RunConfig, protocol: Protocol, devices: &Devices) -> Network {
    Network::new(config, protocol.classes(), protocol.base, devices)
}

fn optimizer(config: &RunConfig) -> ModuleOptimizer {
    SgdConfig::new()
        .with_momentum(Some(
            MomentumConfig::new()
                .with_momentum(config.momentum)
                .with_dampening(0.0),
        ))
        .with_weight_decay(Some(WeightDecayConfig::new(config.weight_decay as f32)))
        .init()
}

/// Draws every parameter now, in the order of the fields: parameters are lazy.
struct Initialize;

impl burn::module::ModuleVisitor for Initialize {
    fn visit_float<const D: usize>(
        &mut self,
        param: &burn::module::Param<burn::tensor::Tensor<D>>,
    ) {
        let _ = param.val();
    }
}
