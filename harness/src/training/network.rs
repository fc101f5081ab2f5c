//! The shared encoder and its three cosine heads, and the loss of a batch.

use std::ops::Range;

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use protohead::LossOptions;
use protohead::burn::{CosineHeads, CosineHeadsConfig, reconstruction};

use super::config::RunConfig;
use super::data::Moments;
use super::encoder::Encoder;
use crate::audio::features::{INPUT, INPUTS};
use crate::audio::mel::{BANDS, FRAMES};
use crate::error::Error;

/// Where the two parts run: the encoder on whichever backend is fastest, the heads on a CubeCL device.
#[derive(Clone)]
pub(crate) struct Devices {
    pub encoder: Device,
    pub heads: Device,
}

/// What is trained.
#[derive(Module, Debug)]
pub(crate) struct Network {
    pub encoder: Encoder,
    pub heads: CosineHeads,
}

/// The loss of a batch and what is reported of it.
pub(crate) struct BatchLoss {
    /// What is minimized.
    pub total: Tensor<1>,
    /// The total; of each head; and of the reconstruction, plain and shuffled, without their weights.
    pub values: [f32; VALUES],
    pub correct: usize,
}

/// The total, the heads' losses and the two reconstruction terms.
pub(crate) const VALUES: usize = 1 + INPUTS + 2;

/// The weights of what the total is the sum of.
#[derive(Clone, Debug)]
pub(crate) struct Weights {
    /// Of the heads.
    pub heads: Vec<f64>,
    /// Of the reconstruction, plain and shuffled.
    pub lambdas: [f64; 2],
}

impl Network {
    pub(crate) fn new(config: &RunConfig, classes: usize, base: usize, devices: &Devices) -> Self {
        let tau = config.tau;
        Self {
            encoder: Encoder::new(tau, &devices.encoder),
            heads: CosineHeadsConfig::new(INPUTS, classes, Encoder::dim(tau))
                .with_active(Some(base))
                .with_scale(config.scale)
                .with_angular_margin(config.angular_margin)
                .with_cosine_margin(config.cosine_margin)
                .init(&devices.heads),
        }
    }

    /// `[inputs, rows, dim]` on the heads' device: all inputs of the rows go through the encoder as one batch.
    pub(crate) fn embed(&self, inputs: Tensor<4>, rows: usize, heads: &Device) -> Tensor<3> {
        let embeddings = self.encoder.forward(inputs);
        let [stacked, dim] = embeddings.dims();
        embeddings
            .reshape([stacked / rows, rows, dim])
            .to_device(heads)
    }

    /// The three cross-entropies plus the two reconstruction terms, weighted.
    pub(crate) fn loss(
        &self,
        inputs: Tensor<4>,
        labels: &[usize],
        partners: &[Vec<usize>; 2],
        weights: &Weights,
        heads: &Device,
    ) -> Result<BatchLoss, Error> {
        let rows = labels.len();
        let embeddings = self.embed(inputs, rows, heads);
        let targets = integers(labels, heads);
        let options = LossOptions {
            head_weights: Some(weights.heads.iter().map(|&weight| weight as f32).collect()),
            ..LossOptions::default()
        };
        let classification = self.heads.loss(embeddings.clone(), targets, &options)?;
        classification.check()?;
        let predictions = classification
            .heads
            .predictions
            .clone()
            .slice([0..1, 0..rows])
            .try_into_vec_as::<i64>()
            .map_err(Error::of_device)?;
        let correct = predictions
            .iter()
            .zip(labels)
            .filter(|&(&p, &l)| p == l as i64)
            .count();
        let dim = embeddings.dims()[2];
        let part = |i: usize| {
            embeddings
                .clone()
                .slice([i..i + 1, 0..rows, 0..dim])
                .reshape([rows, dim])
        };
        let (speech, formant, residual) = (part(0), part(1), part(2));
        let plain = reconstruction(speech.clone(), formant.clone(), residual.clone())?;
        let shuffled = reconstruction(
            speech,
            formant.select(0, integers(&partners[0], heads)),
            residual.select(0, integers(&partners[1], heads)),
        )?;
        let [of_plain, of_shuffled] = weights.lambdas;
        let reconstruction =
            plain.clone().mul_scalar(of_plain) + shuffled.clone().mul_scalar(of_shuffled);
        let total = classification.total + reconstruction;
        let values = [total.clone(), classification.heads.loss, plain, shuffled];
        let values = values.map(Tensor::detach);
        let values = Tensor::cat(values.into(), 0).try_into_vec_as::<f32>();
        let values = values.map_err(Error::of_device)?.try_into();
        Ok(BatchLoss {
            total,
            values: values.map_err(Error::of_device)?,
            correct,
        })
    }
}

fn integers(values: &[usize], device: &Device) -> Tensor<1, Int> {
    let values: Vec<i32> = values.iter().map(|&v| v as i32).collect();
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), device)
}

/// The inputs of some clips, `[inputs · rows, 1, BANDS, FRAMES]`, scaled: all speech, all formants, all residuals, as far as they are
/// among `inputs`.
pub(crate) fn batch(
    scaling: &Moments,
    features: &[Vec<f32>],
    rows: &[usize],
    inputs: Range<usize>,
    device: &Device,
) -> Tensor<4> {
    let mut values = Vec::with_capacity(inputs.len() * rows.len() * INPUT);
    let shape = [inputs.len() * rows.len(), 1, BANDS, FRAMES];
    for input in inputs {
        let (mean, deviation) = scaling[input];
        for &row in rows {
            let values_of = &features[row][input * INPUT..(input + 1) * INPUT];
            values.extend(values_of.iter().map(|v| (v - mean) / deviation));
        }
    }
    Tensor::from_data(TensorData::new(values, shape), device)
}
