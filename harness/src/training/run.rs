//! A training run in a folder: `config.json`, `metrics.jsonl`, `curves.svg`, `checkpoint/`, `model.bpk`, `accuracy.json`. The
//! same configuration on the same device gives the same bytes in each.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use burn::module::Module;
use burn::optim::decay::WeightDecayConfig;
use burn::optim::momentum::MomentumConfig;
use burn::optim::{GradientsParams, ModuleOptimizer, SgdConfig};
use burn::store::ModuleRecord;
use burn::tensor::Bytes;
use indicatif::{ProgressBar, ProgressStyle};
use plotters::prelude::*;
use serde::{Deserialize, Serialize};

use super::data::{Dataset, Protocol};
use super::network::{Devices, Lambdas, Network, batch};
use super::{record, sessions};
use crate::error::Error;
use crate::tensors::write_atomically;

/// Everything that decides what a run computes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct RunConfig {
    pub data: Option<PathBuf>,
    pub synthetic_voices: usize,
    pub synthetic_keywords: usize,
    pub epochs: usize,
    pub batch: usize,
    pub tau: usize,
    pub scale: f64,
    pub learning_rate: f64,
    pub lambda: f64,
    pub lambda_shuffled: f64,
    pub seed: u64,
}

impl RunConfig {
    /// What no run can have, whether it was asked for or read from a damaged file.
    pub(crate) fn validate(&self) -> Result<(), String> {
        for (option, value) in [
            ("epochs", self.epochs),
            ("batch", self.batch),
            ("tau", self.tau),
            ("voices", self.synthetic_voices),
        ] {
            if value == 0 {
                return Err(format!("{option} is 0, expected at least 1"));
            }
        }
        if !(2..=200).contains(&self.synthetic_keywords) {
            return Err(format!(
                "keywords is {}, expected 2 to 200",
                self.synthetic_keywords
            ));
        }
        Ok(())
    }
}

/// One line of the metrics. In f32, since a resumed run reads and writes them again: JSON's reader may miss the last bit of an f64.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct EpochMetrics {
    epoch: usize,
    learning_rate: f32,
    loss: f32,
    classification: f32,
    reconstruction: f32,
    accuracy: f32,
}

/// A run's folder.
pub(crate) struct Run {
    folder: PathBuf,
    config: RunConfig,
    protocol: Protocol,
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_path_buf();
    move |source| Error::Io { path, source }
}

fn damaged(path: &Path, reason: impl std::fmt::Display) -> Error {
    Error::Content {
        path: path.into(),
        reason: format!("damaged: {reason}"),
    }
}

fn to_json(value: &impl Serialize) -> Vec<u8> {
    // Plain structs of numbers and strings always serialize.
    serde_json::to_vec_pretty(value).unwrap_or_default()
}

impl Run {
    /// Starts a run in an empty folder, or takes one up that was broken off.
    pub(crate) fn create(
        folder: &Path,
        config: RunConfig,
        keywords: usize,
        resume: bool,
    ) -> Result<Self, Error> {
        fs::create_dir_all(folder).map_err(io(folder))?;
        let path = folder.join("config.json");
        let content = |reason: &str| Error::Content {
            path: folder.into(),
            reason: reason.into(),
        };
        if path.exists() {
            if !resume {
                return Err(content("holds a run already; --resume continues it"));
            }
            if read_config(&path)? != config {
                return Err(content("holds a run with other options than these"));
            }
        } else {
            write_atomically(&path, &to_json(&config))?;
        }
        Ok(Self {
            folder: folder.into(),
            config,
            protocol: Protocol::for_keywords(keywords),
        })
    }

    /// Opens a finished run.
    pub(crate) fn open(folder: &Path) -> Result<RunConfig, Error> {
        read_config(&folder.join("config.json"))
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
                .map_err(|e| damaged(&path, e))?;
            optimizer = self::optimizer()
                .from_bytes(optimizer_bytes)
                .map_err(|e| damaged(&path, e))?;
            metrics = done;
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
            record::model(network.clone().into_record()).map_err(|e| damaged(&path, e))?;
        write_atomically(&path, &bytes)?;
        let table = sessions::evaluate(&network, dataset, self.protocol, config.seed, devices)?;
        write_atomically(&self.folder.join("accuracy.json"), &to_json(&table))?;
        Ok(table)
    }

    /// Evaluates the trained network of the run.
    pub(crate) fn evaluate(
        &self,
        dataset: &Dataset,
        devices: &Devices,
    ) -> Result<Vec<sessions::Accuracy>, Error> {
        let path = self.folder.join("model.bpk");
        let bytes = fs::read(&path).map_err(io(&path))?;
        let record = ModuleRecord::from_bytes(Bytes::from_bytes_vec(bytes))
            .map_err(|e| damaged(&path, e))?;
        let network = self
            .network(devices)
            .try_load_record(record)
            .map_err(|e| damaged(&path, e))?;
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
        fs::create_dir(&beside).map_err(io(&beside))?;
        // `valid` folds the pending running statistics in: without it the record is one step behind.
        let (model, places) =
            record::model(network.valid().into_record()).map_err(|e| damaged(&place, e))?;
        let state = record::optimizer(optimizer, &places).map_err(|e| damaged(&place, e))?;
        write_atomically(&beside.join("model.bpk"), &model)?;
        write_atomically(&beside.join("optimizer.bpk"), &state)?;
        let lines: String = metrics
            .iter()
            .map(|line| serde_json::to_string(line).unwrap_or_default() + "\n")
            .collect();
        write_atomically(&beside.join("metrics.jsonl"), lines.as_bytes())?;
        if place.exists() {
            let _ = fs::remove_dir_all(&old);
            fs::rename(&place, &old).map_err(io(&place))?;
        }
        fs::rename(&beside, &place).map_err(io(&place))?;
        let _ = fs::remove_dir_all(&old);
        write_atomically(&self.folder.join("metrics.jsonl"), lines.as_bytes())?;
        self.draw(metrics)
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
            fs::read(&path).map_err(io(&path))
        };
        let model = Bytes::from_bytes_vec(read("model.bpk")?);
        let record = ModuleRecord::from_bytes(model).map_err(|e| damaged(&place, e))?;
        let text = String::from_utf8_lossy(&read("metrics.jsonl")?).into_owned();
        let metrics: Result<Vec<EpochMetrics>, _> =
            text.lines().map(serde_json::from_str).collect();
        let metrics = metrics.map_err(|e| damaged(&place, e))?;
        Ok(Some((
            record,
            Bytes::from_bytes_vec(read("optimizer.bpk")?),
            metrics,
        )))
    }

    /// Loss and accuracy over the epochs as a picture.
    fn draw(&self, metrics: &[EpochMetrics]) -> Result<(), Error> {
        let path = self.folder.join("curves.svg");
        let mut picture = String::new();
        {
            let area = SVGBackend::with_string(&mut picture, (800, 600)).into_drawing_area();
            plot(&area, metrics).map_err(|error| damaged(&path, error))?;
        }
        write_atomically(&path, picture.as_bytes())
    }
}

fn plot(
    area: &DrawingArea<SVGBackend, plotters::coord::Shift>,
    metrics: &[EpochMetrics],
) -> Result<(), Box<dyn std::error::Error>> {
    area.fill(&WHITE)?;
    let highest = metrics
        .iter()
        .map(|m| f64::from(m.loss))
        .fold(0.1, f64::max);
    for (half, name, top, value) in [
        (
            0,
            "loss",
            highest,
            (|m| f64::from(m.loss)) as fn(&EpochMetrics) -> f64,
        ),
        (1, "training accuracy, %", 100.0, |m| f64::from(m.accuracy)),
    ] {
        let panels = area.split_evenly((2, 1));
        let mut chart = ChartBuilder::on(&panels[half])
            .caption(name, ("sans-serif", 18))
            .margin(10)
            .x_label_area_size(30)
            .y_label_area_size(50)
            .build_cartesian_2d(0.0..metrics.len().max(1) as f64, 0.0..top)?;
        chart.configure_mesh().x_desc("epoch").draw()?;
        chart.draw_series(LineSeries::new(
            metrics.iter().map(|m| (m.epoch as f64, value(m))),
            &BLUE,
        ))?;
    }
    area.present()?;
    Ok(())
}

fn read_config(path: &Path) -> Result<RunConfig, Error> {
    let bytes = fs::read(path).map_err(io(path))?;
    let config: RunConfig = serde_json::from_slice(&bytes).map_err(|error| damaged(path, error))?;
    config.validate().map_err(|reason| damaged(path, reason))?;
    Ok(config)
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
