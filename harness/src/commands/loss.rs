//! `protohead loss`

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use cubecl::client::Client;
use cubecl::future::block_on;
use protohead::cosine_cross_entropy::{Captured, Inputs, Margin, Options, forward_backward};
use protohead::{LossOptions, Reduction, Upstream, Wanted};

use crate::device::DeviceName;
use crate::error::Error;
use crate::files::writable;
use crate::output::say;
use crate::tensors::{TensorFile, Written};

/// `--reduction`
#[derive(Clone, Copy, ValueEnum)]
enum ReductionName {
    Mean,
    Sum,
    None,
}

#[derive(Args)]
pub(crate) struct Arguments {
    /// A safetensors file with `embeddings [H,N,D]` and `prototypes [H,C,D]` (f32, f16 or bf16), and `labels [N]` (i64, i32 or u32).
    input: PathBuf,
    /// Where to write the results, a safetensors file: `loss [H]` (`[H,N]` without a reduction), `total []` (their sum, weighted by
    /// `--head-weights`), `lse [H,N]` (ln Σ eᶻ of the logits), `predictions [H,N]`, and the gradients of `total`: `grad_embeddings [H,N,D]`
    /// and `grad_prototypes [H,C,D]`, in the dtype of the input, and `grad_scale [H]`, of each head, unless the scale is 0; all else is
    /// f32, predictions are i64.
    #[arg(long)]
    out: PathBuf,
    /// The factor on the cosines: the inverse temperature.
    #[arg(long, default_value_t = 16.0, allow_hyphen_values = true)]
    scale: f32,
    /// In radians, 0 to π/2: what is added to the angle between a row and its own class in the loss (ArcFace); the scale is more than 0, then.
    #[arg(
        long,
        value_name = "M",
        default_value_t = 0.0,
        allow_hyphen_values = true
    )]
    angular_margin: f32,
    /// What is taken from the cosine of a row with its own class in the loss (CosFace).
    #[arg(
        long,
        value_name = "M",
        default_value_t = 0.0,
        allow_hyphen_values = true
    )]
    cosine_margin: f32,
    /// Only the first K classes take part.
    #[arg(long, value_name = "K", allow_negative_numbers = true)]
    active: Option<usize>,
    /// What becomes of the losses of a head's rows; the mean is over the rows that are not ignored, and 0 if all are.
    #[arg(long, value_enum, default_value_t = ReductionName::Mean)]
    reduction: ReductionName,
    /// The share of the target that is spread over the classes that take part, 0 to 1.
    #[arg(
        long,
        value_name = "E",
        default_value_t = 0.0,
        allow_hyphen_values = true
    )]
    label_smoothing: f32,
    /// The label of rows that are left out (the default matches no u32 label).
    #[arg(long, value_name = "I", default_value_t = -100, allow_negative_numbers = true)]
    ignore_index: i32,
    /// A weight for each head, separated by commas, for `total` and the gradients.
    #[arg(
        long,
        value_name = "A,B,..",
        value_delimiter = ',',
        allow_hyphen_values = true
    )]
    head_weights: Option<Vec<f32>>,
    /// f32 products may round their operands to TF32 on an NVIDIA GPU.
    #[arg(long)]
    allow_tf32: bool,
    /// Also times so many steps of loss and gradients: launched as a recorded graph where the device records graphs.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    repeat: Option<NonZeroUsize>,
    /// auto, cpu, cuda, cuda:N or wgpu; auto is the first that works of cuda, cpu, wgpu
    #[arg(long, default_value_t = DeviceName::Auto)]
    device: DeviceName,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Error> {
    let file = TensorFile::open(&arguments.input)?;
    file.is_not(&arguments.out)?;
    writable(&arguments.out)?;
    let client = arguments.device.client()?;
    let inputs = Inputs {
        embeddings: file.floats(&client, "embeddings")?,
        weights: file.floats(&client, "prototypes")?,
        labels: file.labels(&client, "labels")?,
    };
    let options = Options {
        scale: arguments.scale,
        active: arguments.active,
        allow_tf32: arguments.allow_tf32,
        margin: Margin {
            angular: arguments.angular_margin,
            cosine: arguments.cosine_margin,
        },
        loss: LossOptions {
            reduction: match arguments.reduction {
                ReductionName::Mean => Reduction::Mean,
                ReductionName::Sum => Reduction::Sum,
                ReductionName::None => Reduction::None,
            },
            label_smoothing: arguments.label_smoothing,
            ignore_index: arguments.ignore_index,
            head_weights: arguments.head_weights.clone(),
        },
        ..Options::default()
    };
    let upstream = Upstream::Total(1.0);
    let wanted = match options.scale {
        0.0 => Wanted::BOTH,
        _ => Wanted::ALL,
    };
    let (output, gradients) = forward_backward(&client, &inputs, &options, &upstream, wanted)
        .map_err(|error| file.refused(error))?;
    let total = output
        .read_total(&client)
        .map_err(|error| file.refused(error))?;
    let mut written = Written::default();
    written.floats(&client, "loss", &output.loss, output.loss.shape())?;
    written.floats(&client, "total", &output.total, &[])?;
    written.floats(&client, "lse", &output.lse, output.lse.shape())?;
    let predictions = output.read_predictions(&client)?;
    written.integers("predictions", &predictions, output.predictions.shape());
    for (name, gradient) in [
        ("grad_embeddings", gradients.embeddings),
        ("grad_prototypes", gradients.weights),
        ("grad_scale", gradients.scale),
    ] {
        if let Some(gradient) = gradient {
            written.floats(&client, name, &gradient, gradient.shape())?;
        }
    }
    let timed = match arguments.repeat {
        Some(steps) => {
            let step = Captured::new(&client, &inputs, &options, &upstream, wanted)?;
            Some((step.is_graph(), median(&client, step, steps)?))
        }
        None => None,
    };
    written.save(&arguments.out)?;
    say(format_args!("total {total}"));
    if let Some((is_graph, time)) = timed {
        let how = if is_graph { " as a graph" } else { "" };
        let milliseconds = time.as_secs_f64() * 1e3;
        say(format_args!("step{how} {milliseconds:.3} ms"));
    }
    Ok(())
}

/// The median time of so many steps, each waited for, after one that is not counted.
fn median(client: &Client, mut step: Captured, steps: NonZeroUsize) -> Result<Duration, Error> {
    let mut replay = || {
        let start = Instant::now();
        step.replay()?;
        block_on(client.sync()).map_err(Error::of_device)?;
        Ok::<_, Error>(start.elapsed())
    };
    replay()?;
    let times: Result<Vec<Duration>, Error> = (0..steps.get()).map(|_| replay()).collect();
    let mut times = times?;
    times.sort_unstable();
    Ok(times[times.len() / 2])
}
