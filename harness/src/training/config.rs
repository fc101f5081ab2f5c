//! Everything that decides what a run computes.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::protocol::Asked;
use crate::audio::features::INPUTS;
use crate::device::DeviceName;

/// Where the clips come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub(crate) enum Source {
    /// A Speech-Commands folder.
    Folder(PathBuf),
    /// The synthesiser.
    Synthetic { keywords: usize, voices: usize },
}

/// The options of a run. What runs of other versions did not have has a default, so that they are told to be such.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct RunConfig {
    pub source: Source,
    #[serde(default)]
    pub protocol: Asked,
    pub epochs: usize,
    pub batch: usize,
    pub tau: usize,
    pub scale: f64,
    #[serde(default)]
    pub angular_margin: f64,
    #[serde(default)]
    pub cosine_margin: f64,
    pub learning_rate: f64,
    #[serde(default)]
    pub momentum: f64,
    #[serde(default)]
    pub weight_decay: f64,
    /// Of the speech, the formant and the residual head's loss.
    #[serde(default = "alike")]
    pub head_weights: Vec<f64>,
    pub lambda: f64,
    pub lambda_shuffled: f64,
    pub seed: u64,
    /// The one that the run began on: another gives other bits.
    pub device: DeviceName,
}

impl RunConfig {
    /// What no run can have, whether it was asked for or read from a damaged file.
    pub(crate) fn validate(&self) -> Result<(), String> {
        let (keywords, voices) = match &self.source {
            Source::Folder(path) if path.to_str().is_none() => {
                return Err(format!(
                    "data is {}, expected a path in UTF-8",
                    path.display()
                ));
            }
            Source::Folder(_) => (2, 1),
            &Source::Synthetic { keywords, voices } => (keywords, voices),
        };
        for (option, value, least, most) in [
            ("epochs", self.epochs, 1, 1_000_000),
            ("batch", self.batch, 1, 1_000_000),
            ("tau", self.tau, 1, 64),
            ("voices", voices, 1, 10_000),
            ("keywords", keywords, 2, 200),
            ("base", self.protocol.base.unwrap_or(2), 2, 1_000_000),
            ("ways", self.protocol.ways, 1, 1_000_000),
            ("shots", self.protocol.shots, 1, 1_000_000),
        ] {
            if !(least..=most).contains(&value) {
                return Err(format!("{option} is {value}, expected {least} to {most}"));
            }
        }
        for (option, value, most) in [
            ("scale", self.scale, 1e6),
            ("angular-margin", self.angular_margin, 1.57),
            ("cosine-margin", self.cosine_margin, 2.0),
            ("learning-rate", self.learning_rate, 1e6),
            ("momentum", self.momentum, 1.0),
            ("weight-decay", self.weight_decay, 1e6),
            ("lambda", self.lambda, 1e6),
            ("lambda-shuffled", self.lambda_shuffled, 1e6),
        ] {
            if !(0.0..=most).contains(&value) {
                return Err(format!("{option} is {value}, expected 0 to {most}"));
            }
        }
        for (option, value) in [("scale", self.scale), ("learning-rate", self.learning_rate)] {
            if value == 0.0 {
                return Err(format!("{option} is 0: nothing would be learnt"));
            }
        }
        let weights = &self.head_weights;
        if weights.len() != INPUTS || !weights.iter().all(|weight| (0.0..=1e6).contains(weight)) {
            let given = joined(weights);
            return Err(format!(
                "head-weights is {given}, expected {INPUTS} numbers of 0 to 1000000, for speech, formant and residual"
            ));
        }
        Ok(())
    }

    /// The first option in which the run that was begun differs, as the user is told. Not where its files were: they tell themselves
    /// whether they are the same.
    pub(crate) fn difference(&self, begun: &Self) -> Option<String> {
        let moved = matches!(
            (&self.source, &begun.source),
            (Source::Folder(_), Source::Folder(_))
        );
        let begun = begun.options();
        self.options().into_iter().find_map(|(option, asked)| {
            let (_, begun) = begun.iter().find(|(name, _)| *name == option)?;
            let differ = *begun != asked && !(moved && option == "data");
            differ.then(|| format!("holds a run with --{option} {begun}, not {asked}"))
        })
    }

    /// As they are on the command line.
    fn options(&self) -> Vec<(&'static str, String)> {
        let mut options = match &self.source {
            Source::Folder(folder) => vec![("data", folder.display().to_string())],
            Source::Synthetic { keywords, voices } => vec![
                ("data", "none but synthesised keywords".into()),
                ("keywords", keywords.to_string()),
                ("voices", voices.to_string()),
            ],
        };
        let base = self.protocol.base;
        options.extend([
            (
                "base",
                base.map_or("not given".into(), |base| base.to_string()),
            ),
            ("ways", self.protocol.ways.to_string()),
            ("shots", self.protocol.shots.to_string()),
            ("epochs", self.epochs.to_string()),
            ("batch", self.batch.to_string()),
            ("tau", self.tau.to_string()),
            ("scale", self.scale.to_string()),
            ("angular-margin", self.angular_margin.to_string()),
            ("cosine-margin", self.cosine_margin.to_string()),
            ("learning-rate", self.learning_rate.to_string()),
            ("momentum", self.momentum.to_string()),
            ("weight-decay", self.weight_decay.to_string()),
            ("head-weights", joined(&self.head_weights)),
            ("lambda", self.lambda.to_string()),
            ("lambda-shuffled", self.lambda_shuffled.to_string()),
            ("seed", self.seed.to_string()),
            ("device", self.device.to_string()),
        ]);
        options
    }
}

fn alike() -> Vec<f64> {
    vec![1.0; INPUTS]
}

/// As on the command line.
fn joined(values: &[f64]) -> String {
    let values: Vec<String> = values.iter().map(f64::to_string).collect();
    values.join(",")
}
