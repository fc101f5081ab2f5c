//! `protohead prototypes`

use std::path::PathBuf;

use clap::Args;
use cubecl::prelude::CubeElement;
use cubecl::std::tensor::TensorHandle;
use protohead::class_means::{ClassSums, Options};

use crate::device::DeviceName;
use crate::error::Error;
use crate::files::writable;
use crate::output::say;
use crate::tensors::{TensorFile, Written};

#[derive(Args)]
pub(crate) struct Arguments {
    /// A safetensors file with `embeddings [H,N,D]` (f32, f16 or bf16) and `labels [N]` (i64, i32 or u32).
    input: PathBuf,
    /// Where to write `prototypes [H,K,D]`, in the dtype of the embeddings, and `counts [K]`, i64: a safetensors file. A class without rows
    /// gets zeros.
    #[arg(long)]
    out: PathBuf,
    /// The number of classes K; if absent, one more than the highest label that is not ignored.
    #[arg(long, value_name = "K", allow_negative_numbers = true)]
    classes: Option<usize>,
    /// Rows with this label are left out (the default matches no u32 label).
    #[arg(long, default_value_t = -100, allow_negative_numbers = true)]
    ignore_index: i32,
    /// Normalize each embedding before averaging.
    #[arg(long)]
    normalize: bool,
    /// auto, cpu, cuda, cuda:N or wgpu; auto is the first that works of cuda, cpu, wgpu
    #[arg(long, default_value_t = DeviceName::Auto)]
    device: DeviceName,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Error> {
    let file = TensorFile::open(&arguments.input)?;
    file.is_not(&arguments.out)?;
    writable(&arguments.out)?;
    let classes = match arguments.classes {
        Some(0) => return Err(Error::Usage("--classes is 0, expected at least 1".into())),
        Some(classes) => classes,
        None => file.classes("labels", arguments.ignore_index)?,
    };
    let client = arguments.device.client()?;
    let embeddings = file.floats(&client, "embeddings")?;
    let labels = file.labels(&client, "labels")?;
    let [heads, _, dim] = embeddings.shape().to_vec()[..] else {
        return Err(Error::Content {
            path: arguments.input.clone(),
            reason: format!(
                "embeddings: shape {:?}, expected [H, N, D]",
                embeddings.shape().to_vec()
            ),
        });
    };
    let options = Options {
        normalize: arguments.normalize,
        ignore_index: arguments.ignore_index,
        ..Options::default()
    };
    let refused = |error| file.refused(error);
    // On a CPU, memory that is not there is promised all the same, and its use ends the program.
    let properties = client.properties();
    let means = heads as u128 * classes as u128 * dim as u128;
    let bytes = means * (8 + 4 * embeddings.dtype.size() as u128) + 16 * classes as u128;
    if properties.hardware.num_cpu_cores.is_some()
        && let Some(most) = properties.memory.max_memory()
        && bytes > most.into()
    {
        return Err(Error::Usage(format!(
            "{classes} classes of {heads} × {dim} take {bytes} bytes, the machine has {most}"
        )));
    }
    let mut sums = ClassSums::new(&client, heads, classes, dim, &options).map_err(refused)?;
    sums.accumulate(&client, &embeddings, &labels)
        .map_err(refused)?;
    let counts = sums.read_counts(&client).map_err(refused)?;
    // A class nobody saw has no mean: its prototype is zero, and its count says so.
    let bytes = heads * classes * dim * embeddings.dtype.size();
    let zeros = TensorHandle::new_contiguous(
        [heads, classes, dim],
        client.create_from_slice(u8::as_bytes(&vec![0u8; bytes])),
        embeddings.dtype,
    );
    let means = sums.means(&client, &zeros)?;
    let mut written = Written::default();
    written.floats(&client, "prototypes", &means, means.shape())?;
    written.integers("counts", &counts, &[classes]);
    written.save(&arguments.out)?;
    let unseen = counts.iter().filter(|&&count| count == 0).count();
    say(format_args!(
        "{} rows in {classes} classes, {unseen} of them unseen",
        counts.iter().sum::<u32>()
    ));
    Ok(())
}
