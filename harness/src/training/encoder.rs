//! BC-ResNet (Kim et al., "Broadcasted residual learning for efficient keyword spotting", 2021): `[batch, 1, 40, 101]`
//! to `[batch, 32 τ]`.

use burn::module::Module;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{BatchNorm, BatchNormConfig, Dropout, DropoutConfig, PaddingConfig2d};
use burn::tensor::activation::{relu, silu};
use burn::tensor::{Device, Tensor};

/// Groups of frequencies that SubSpectralNorm normalizes apart.
const SUB_BANDS: usize = 5;

/// Channels, blocks, frequency stride and time dilation of the four stages, for τ = 1.
const STAGES: [(usize, usize, usize, usize); 4] =
    [(8, 2, 1, 1), (12, 2, 2, 2), (16, 4, 2, 4), (20, 4, 1, 8)];

/// The encoder that the three inputs share.
#[derive(Module, Debug)]
pub(crate) struct Encoder {
    stem: Conv2d,
    stem_norm: BatchNorm,
    blocks: Vec<Block>,
    depthwise: Conv2d,
    pointwise: Conv2d,
    norm: BatchNorm,
}

/// A broadcasted residual block.
#[derive(Module, Debug)]
struct Block {
    transition: Option<Conv2d>,
    transition_norm: Option<BatchNorm>,
    frequency: Conv2d,
    sub_spectral: BatchNorm,
    time: Conv2d,
    time_norm: BatchNorm,
    pointwise: Conv2d,
    dropout: Dropout,
}

impl Encoder {
    pub(crate) fn new(tau: usize, device: &Device) -> Self {
        let mut channels = 16 * tau;
        let stem = Conv2dConfig::new([1, channels], [5, 5])
            .with_stride([2, 1])
            .with_padding(PaddingConfig2d::Explicit(2, 2, 2, 2))
            .with_bias(false)
            .init(device);
        let stem_norm = BatchNormConfig::new(channels).init(device);
        let mut blocks = Vec::new();
        for (width, count, stride, dilation) in STAGES {
            for i in 0..count {
                let stride = if i == 0 { stride } else { 1 };
                blocks.push(Block::new(channels, width * tau, stride, dilation, device));
                channels = width * tau;
            }
        }
        let dim = Self::dim(tau);
        Self {
            stem,
            stem_norm,
            blocks,
            depthwise: Conv2dConfig::new([channels, channels], [5, 5])
                .with_groups(channels)
                .with_padding(PaddingConfig2d::Explicit(0, 2, 0, 2))
                .with_bias(false)
                .init(device),
            pointwise: Conv2dConfig::new([channels, dim], [1, 1])
                .with_bias(false)
                .init(device),
            norm: BatchNormConfig::new(dim).init(device),
        }
    }

    /// D
    pub(crate) fn dim(tau: usize) -> usize {
        32 * tau
    }

    pub(crate) fn forward(&self, spectra: Tensor<4>) -> Tensor<2> {
        let mut x = relu(self.stem_norm.forward(self.stem.forward(spectra)));
        for block in &self.blocks {
            x = block.forward(x);
        }
        let x = self.pointwise.forward(self.depthwise.forward(x));
        let x = relu(self.norm.forward(x));
        x.mean_dim(3).mean_dim(2).flatten::<2>(1, 3)
    }
}

impl Block {
    fn new(from: usize, to: usize, stride: usize, dilation: usize, device: &Device) -> Self {
        let changes = from != to;
        Self {
            transition: changes.then(|| {
                Conv2dConfig::new([from, to], [1, 1])
                    .with_bias(false)
                    .init(device)
            }),
            transition_norm: changes.then(|| BatchNormConfig::new(to).init(device)),
            frequency: Conv2dConfig::new([to, to], [3, 1])
                .with_groups(to)
                .with_stride([stride, 1])
                .with_padding(PaddingConfig2d::Explicit(1, 0, 1, 0))
                .with_bias(false)
                .init(device),
            sub_spectral: BatchNormConfig::new(to * SUB_BANDS).init(device),
            time: Conv2dConfig::new([to, to], [1, 3])
                .with_groups(to)
                .with_dilation([1, dilation])
                .with_padding(PaddingConfig2d::Explicit(0, dilation, 0, dilation))
                .with_bias(false)
                .init(device),
            time_norm: BatchNormConfig::new(to).init(device),
            pointwise: Conv2dConfig::new([to, to], [1, 1])
                .with_bias(false)
                .init(device),
            dropout: DropoutConfig::new(0.1).init(),
        }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let (inner, residual) = match (&self.transition, &self.transition_norm) {
            (Some(transition), Some(norm)) => (relu(norm.forward(transition.forward(x))), None),
            _ => (x.clone(), Some(x)),
        };
        let wide = self.frequency.forward(inner);
        let [batch, channels, bands, frames] = wide.dims();
        let split = [batch, channels * SUB_BANDS, bands / SUB_BANDS, frames];
        let wide = self
            .sub_spectral
            .forward(wide.reshape(split))
            .reshape([batch, channels, bands, frames]);
        // Frequencies averaged, what is learned over time is broadcast back to all of them.
        let narrow = wide.clone().mean_dim(2);
        let narrow = silu(self.time_norm.forward(self.time.forward(narrow)));
        let narrow = self.pointwise.forward(narrow);
        // Channels are dropped whole.
        let ones = Tensor::ones([batch, channels, 1, 1], &narrow.device());
        let out = wide + narrow * self.dropout.forward(ones);
        relu(match residual {
            Some(residual) => out + residual,
            None => out,
        })
    }
}
