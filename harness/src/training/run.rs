//! A training run in a folder: `config.json`, `data.json`, `metrics.jsonl`, `curves.svg`, `checkpoint/`, `model.bpk`,
//! `accuracy.json`, and for a run on files `cache/`. The same configuration on the same CPU gives the same bytes in each; on a GPU
//! Burn's convolutions tune themselves, and another choice sums in another order.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;

use burn::module::Module;
use burn::optim::decay::WeightDecayConfig;
use burn::optim::momentum::MomentumConfig;
use burn::optim::{GradientsParams, ModuleOptimizer, SgdConfig};
use burn::store::ModuleRecord;
use burn::tensor::Bytes;
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};

use super::cache::clear_cache;
use super::config::RunConfig;
use super::data::{Dataset, Protocol};
use super::metrics::{EpochMetrics, draw, write_lines};
use super::network::{Devices, Lambdas, Network, batch};
use super::{record, sessions};
use crate::audio::features::INPUTS;
use crate::error::Error;
use crate::tensors::write_atomically;

/// What a run knows of the clips it was trained on: an evaluation is of the same keywords, scaled alike.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Data {
    keywords: Vec<String>,
    /// Mean and deviation of each input.
    scaling: [(f32, f32); INPUTS],
}

/// A run's folder.
pub(crate) struct Run {
    folder: PathBuf,
    config: RunConfig,
    protocol: Protocol,
    /// Held while it trains.
    _lock: Option<File>,
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<(), Error> {
    let bytes = serde_json::to_vec_pretty(value).map_err(Error::unwritable(path))?;
    write_atomically(path, &bytes)
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, Error> {
    let bytes = fs::read(path).map_err(Error::io(path))?;
    serde_json::from_slice(&bytes).map_err(Error::damaged(path))
}

/// A run's folder that no other process trains in. One that was made for it goes away again with the claim, if no run begins.
pub(crate) struct Claim {
    folder: PathBuf,
    lock: File,
    remove: bool,
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.remove {
            // What was made, and the folders if nothing else has come into them.
            let cache = self.folder.join("cache");
            clear_cache(&cache);
            let _ = fs::remove_dir(cache);
            for name in ["config.json", "data.json"] {
                let _ = fs::remove_file(self.folder.join(name));
            }
            let _ = fs::remove_dir(&self.folder);
        }
    }
}

impl Claim {
    /// Begins a run on these clips, or goes on with it.
    pub(crate) fn begin(mut self, config: RunConfig, dataset: &Dataset) -> Result<Run, Error> {
        let data = Data {
            keywords: dataset.keywords.clone(),
            scaling: dataset.scaling,
        };
        let folder = &self.folder;
        let (data_path, config_path) = (folder.join("data.json"), folder.join("config.json"));
        if has_begun(folder) {
            if read_json::<Data>(&data_path)? != data {
                return Err(Error::Content {
                    path: folder.clone(),
                    reason: "the training clips are not those that the run began with".into(),
                });
            }
        } else {
            write_json(&data_path, &data)?;
            write_json(&config_path, &config)?;
        }
        self.remove = false;
        let lock = self.lock.try_clone().map_err(Error::io(folder))?;
        Ok(Run {
            _lock: Some(lock),
            ..Run::of(folder, config, dataset)
        })
    }
}

/// Whether a run has come as far as to leave something.
fn has_begun(folder: &Path) -> bool {
    let left = [
        "accuracy.json",
        "checkpoint",
        "checkpoint.old",
        "metrics.jsonl",
        "model.bpk",
    ];
    left.iter().any(|name| folder.join(name).exists())
}

impl Run {
    /// Takes a folder for a run of this configuration, to begin there or to go on. Done before the clips are prepared.
    pub(crate) fn claim(folder: &Path, config: &RunConfig, resume: bool) -> Result<Claim, Error> {
        let content = |reason: &str| Error::Content {
            path: folder.into(),
            reason: reason.into(),
        };
        if let Some(parent) = folder.parent() {
            fs::create_dir_all(parent).map_err(Error::io(parent))?;
        }
        let is_new = match fs::create_dir(folder) {
            Ok(()) => true,
            Err(_) if folder.is_dir() => false,
            Err(error) => return Err(Error::io(folder)(error)),
        };
        let lock = File::open(folder).map_err(Error::io(folder))?;
        if let Err(TryLockError::WouldBlock) = lock.try_lock() {
            return Err(content("another process trains in it"));
        }
        let claim = Claim {
            folder: folder.into(),
            lock,
            remove: is_new,
        };
        let begun = has_begun(folder);
        if folder.join("config.json").exists() {
            // Another's is refused as damaged, and left as it is.
            let found = Self::config(folder)?;
            if begun && !resume {
                return Err(content("holds a run already; --resume continues it"));
            }
            if resume && let Some(difference) = config.difference(&found) {
                return Err(content(&difference));
            }
        } else if begun {
            return Err(content("holds a run, but not its config.json"));
        }
        Ok(claim)
    }

    /// The configuration of the run in a folder.
    pub(crate) fn config(folder: &Path) -> Result<RunConfig, Error> {
        let path = folder.join("config.json");
        let config: RunConfig = read_json(&path)?;
        config.validate().map_err(Error::damaged(&path))?;
        Ok(config)
    }

    /// The run in a folder, to be evaluated on these clips, which get the scaling of those that it was trained on.
    pub(crate) fn open(
        folder: &Path,
        config: RunConfig,
        dataset: &mut Dataset,
    ) -> Result<Self, Error> {
        let data: Data = read_json(&folder.join("data.json"))?;
        if data.keywords != dataset.keywords {
            return Err(Error::Content {
                path: folder.into(),
                reason: format!(
                    "was trained on the keywords {}, these are {}",
                    data.keywords.join(" "),
                    dataset.keywords.join(" ")
                ),
            });
        }
        dataset.scaling = data.scaling;
        Ok(Self::of(folder, config, dataset))
    }

    fn of(folder: &Path, config: RunConfig, dataset: &Dataset) -> Self {
        Self {
            folder: folder.into(),
            config,
            protocol: dataset.protocol(),
            _lock: None,
        }
    }

    pub(crate) fn protocol(&self) -> Protocol {
        self.protocol
    }

    fn network(&self, devices: &Devices) -> Network {
        let RunConfig { tau, scale, .. } = self.config;
        Network::new(
            tau,
            self.protocol.classes(),
            self.protocol.base,
            scale,
            devices,
        )
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
        let mut network = self.network(devices);
        network.visit(&mut Initialize);
        let mut optimizer = optimizer();
        let mut metrics: Vec<EpochMetrics> = Vec::new();
        if let Some((record, optimizer_bytes, done)) = self.checkpoint()? {
            let path = self.folder.join("checkpoint");
            network = self
                .network(devices)
                .try_load_record(record)
                .map_err(Error::damaged(&path))?;
            optimizer = self::optimizer()
                .from_bytes(optimizer_bytes)
                .map_err(Error::damaged(&path))?;
            metrics = done;
            // The run may have been killed between its checkpoint and these.
            self.report(&metrics)?;
        }
        let rows = dataset.order(self.protocol.base, config.seed, 0).len();
        let steps = rows.div_ceil(config.batch);
        let bar = progress((config.epochs * steps) as u64);
        bar.set_position((metrics.len() * steps) as u64);
        let lambdas = Lambdas {
            plain: config.lambda,
            shuffled: config.lambda_shuffled,
        };
        for epoch in metrics.len()..config.epochs {
            let mut sums = [0.0f64; 3];
            let mut correct = 0;
            let mut rate = 0.0;
            for (i, chosen) in dataset
                .order(self.protocol.base, config.seed, epoch)
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
                let inputs = batch(dataset, &dataset.train, chosen, &devices.encoder);
                let loss = network.loss(inputs, &labels, &partners, lambdas, &devices.heads)?;
                let total: f32 = loss.total.clone().into_scalar();
                if !total.is_finite() {
                    bar.finish_and_clear();
                    return Err(Error::Diverged {
                        loss: total,
                        epoch: epoch + 1,
                        step: i + 1,
                    });
                }
                let weight = chosen.len() as f64 / rows as f64;
                for (sum, value) in
                    sums.iter_mut()
                        .zip([&loss.total, &loss.classification, &loss.reconstruction])
                {
                    *sum += weight * f64::from(value.clone().into_scalar::<f32>());
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
                classification: sums[1] as f32,
                reconstruction: sums[2] as f32,
                accuracy: 100.0 * correct as f32 / rows as f32,
            });
            self.save(&network, &optimizer, &metrics)?;
        }
        bar.finish_and_clear();
        let network = sessions::replace_prototypes(network, dataset, self.protocol, devices)?;
        let path = self.folder.join("model.bpk");
        let (bytes, _) =
            record::model(network.clone().into_record()).map_err(Error::unwritable(&path))?;
        write_atomically(&path, &bytes)?;
        let table = sessions::evaluate(&network, dataset, self.protocol, config.seed, devices)?;
        write_json(&self.folder.join("accuracy.json"), &table)?;
        Ok(table)
    }

    /// Evaluates the trained network of the run.
    pub(crate) fn evaluate(
        &self,
        dataset: &Dataset,
        devices: &Devices,
    ) -> Result<Vec<sessions::Accuracy>, Error> {
        let path = self.folder.join("model.bpk");
        let bytes = fs::read(&path).map_err(Error::io(&path))?;
        let record = ModuleRecord::from_bytes(Bytes::from_bytes_vec(bytes))
            .map_err(Error::damaged(&path))?;
        let network = self
            .network(devices)
            .try_load_record(record)
            .map_err(Error::damaged(&path))?;
        sessions::evaluate(
            &network.valid(),
            dataset,
            self.protocol,
            self.config.seed,
            devices,
        )
    }

    /// Writes metrics, curves and a checkpoint, each whole or not at all. The checkpoint is a folder made beside its
    /// place, so that model, optimizer and metrics always belong together.
    fn save(
        &self,
        network: &Network,
        optimizer: &ModuleOptimizer,
        metrics: &[EpochMetrics],
    ) -> Result<(), Error> {
        let place = self.folder.join("checkpoint");
        let beside = self.folder.join("checkpoint.new");
        let old = self.folder.join("checkpoint.old");
        let _ = fs::remove_dir_all(&beside);
        fs::create_dir(&beside).map_err(Error::io(&beside))?;
        // `valid` folds the pending running statistics in: without it the record is one step behind.
        let (model, places) =
            record::model(network.valid().into_record()).map_err(Error::unwritable(&place))?;
        let state = record::optimizer(optimizer, &places).map_err(Error::unwritable(&place))?;
        write_atomically(&beside.join("model.bpk"), &model)?;
        write_atomically(&beside.join("optimizer.bpk"), &state)?;
        write_lines(&beside.join("metrics.jsonl"), metrics)?;
        if place.exists() {
            let _ = fs::remove_dir_all(&old);
            fs::rename(&place, &old).map_err(Error::io(&place))?;
        }
        fs::rename(&beside, &place).map_err(Error::io(&place))?;
        let _ = fs::remove_dir_all(&old);
        self.report(metrics)
    }

    /// Writes metrics and curves for those who follow the run.
    fn report(&self, metrics: &[EpochMetrics]) -> Result<(), Error> {
        write_lines(&self.folder.join("metrics.jsonl"), metrics)?;
        draw(&self.folder.join("curves.svg"), metrics)
    }

    /// The last checkpoint; if the run was killed between two renames, the one before.
    fn checkpoint(&self) -> Result<Option<(ModuleRecord, Bytes, Vec<EpochMetrics>)>, Error> {
        let place = ["checkpoint", "checkpoint.old"]
            .map(|name| self.folder.join(name))
            .into_iter()
            .find(|path| path.exists());
        let Some(place) = place else { return Ok(None) };
        let read = |name: &str| {
            let path = place.join(name);
            fs::read(&path).map_err(Error::io(&path))
        };
        let model = Bytes::from_bytes_vec(read("model.bpk")?);
        let record = ModuleRecord::from_bytes(model).map_err(Error::damaged(&place))?;
        let text = String::from_utf8_lossy(&read("metrics.jsonl")?).into_owned();
        let metrics: Result<Vec<EpochMetrics>, _> =
            text.lines().map(serde_json::from_str).collect();
        let metrics = metrics.map_err(Error::damaged(&place))?;
        Ok(Some((
            record,
            Bytes::from_bytes_vec(read("optimizer.bpk")?),
            metrics,
        )))
    }
}

fn optimizer() -> ModuleOptimizer {
    SgdConfig::new()
        .with_momentum(Some(
            MomentumConfig::new().with_momentum(0.9).with_dampening(0.0),
        ))
        .with_weight_decay(Some(WeightDecayConfig::new(1e-3)))
        .init()
}

fn progress(steps: u64) -> ProgressBar {
    let bar = ProgressBar::new(steps);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} eta {eta}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(500));
    bar
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
