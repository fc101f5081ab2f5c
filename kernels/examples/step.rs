//! Trains a cosine head on data made up here: operands go to the device, loss and gradients come from one call, and at the end
//! the class weights are replaced by class means.
//!
//! ```sh
//! cargo run --release --example step
//! ```

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::std::tensor::TensorHandle;
use protohead::class_means::{self, ClassSums};
use protohead::cosine_cross_entropy::{Inputs, Options, forward_backward};
use protohead::{Error, Upstream, Wanted};

const HEADS: usize = 3;
const ROWS: usize = 64;
const DIM: usize = 32;
/// Class weights there are, and those that take part.
const CLASSES: usize = 10;
const ACTIVE: usize = 8;

fn upload(client: &Client, values: &[f32], shape: [usize; 3]) -> TensorHandle {
    let handle = client.create_from_slice(f32::as_bytes(values));
    TensorHandle::new_contiguous(shape, handle, f32::cube_type())
}

fn download(client: &Client, tensor: TensorHandle) -> Result<Vec<f32>, Error> {
    let bytes = client.read_one(tensor.handle);
    let bytes = bytes.map_err(|error| Error::Device(format!("{error:?}")))?;
    Ok(f32::from_bytes(&bytes).to_vec())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let client = cubecl::Device::cpu()?.client();

    // Row n of every head belongs to class n % ACTIVE, and looks a little like it.
    let wave = |a: usize, b: usize| ((a * 37 + b * 101) as f32).sin();
    let labels: Vec<i32> = (0..ROWS).map(|n| (n % ACTIVE) as i32).collect();
    let embeddings: Vec<f32> = (0..HEADS * ROWS * DIM)
        .map(|i| wave(i / DIM % ROWS % ACTIVE, i % DIM) + 0.5 * wave(i, 7))
        .collect();
    let mut weights: Vec<f32> = (0..HEADS * CLASSES * DIM).map(|i| wave(i, 3)).collect();

    let embeddings = upload(&client, &embeddings, [HEADS, ROWS, DIM]);
    let labels = client.create_from_slice(i32::as_bytes(&labels));
    let labels = TensorHandle::new_contiguous([ROWS], labels, i32::cube_type());
    let options = Options {
        scale: 16.0,
        active: Some(ACTIVE),
        ..Options::default()
    };

    for step in 0..20 {
        let inputs = Inputs {
            embeddings: embeddings.clone(),
            weights: upload(&client, &weights, [HEADS, CLASSES, DIM]),
            labels: labels.clone(),
        };
        // The total of the heads' mean losses, with an upstream gradient of 1. No gradient of the embeddings is asked for.
        let upstream = Upstream::Total(1.0);
        let (output, gradients) =
            forward_backward(&client, &inputs, &options, &upstream, Wanted::WEIGHTS)?;
        // Waits for the device, and tells of labels that are no class.
        println!("step {step:2}: loss {:.4}", output.read_total(&client)?);
        if let Some(gradient) = gradients.weights {
            let gradient = download(&client, gradient)?;
            for (weight, slope) in weights.iter_mut().zip(gradient) {
                *weight -= 0.5 * slope;
            }
        }
    }

    let mut sums = ClassSums::new(
        &client,
        HEADS,
        ACTIVE,
        DIM,
        &class_means::Options::default(),
    )?;
    sums.accumulate(&client, &embeddings, &labels)?;
    let weights = upload(&client, &weights, [HEADS, CLASSES, DIM]);
    let prototypes = sums.write_means(&client, &weights)?;
    println!("rows by class: {:?}", sums.read_counts(&client)?);
    let prototypes = download(&client, prototypes)?;
    println!("the first prototype begins {:?}", &prototypes[..4]);
    Ok(())
}
