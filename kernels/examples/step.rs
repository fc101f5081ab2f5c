//! Trains cosine heads on data made up here, without leaving the device: operands go there once, loss and gradients come from one
//! call, a kernel takes the step, and at the end the class weights are replaced by class means.
//!
//! ```sh
//! cargo run --release -p protohead --features cpu --example step
//! ```

use cubecl::prelude::*;
use cubecl::std::tensor::TensorHandle;
use protohead::class_means::{self, ClassSums};
use protohead::cosine_cross_entropy::{Inputs, Options, forward_backward};
use protohead::{Upstream, Wanted, download, upload};

const HEADS: usize = 3;
const ROWS: usize = 64;
const DIM: usize = 32;
/// Class weights there are, and those that take part.
const CLASSES: usize = 10;
const ACTIVE: usize = 8;

/// `weights −= rate · gradient`
#[cube(launch)]
fn descend(weights: &mut [f32], gradient: &[f32], rate: f32) {
    let i = ABSOLUTE_POS;
    if i < weights.len() {
        weights[i] -= rate * gradient[i];
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let client = cubecl::Device::cpu()?.client();

    // Row n of every head belongs to class n % ACTIVE, and looks a little like it.
    let wave = |a: usize, b: usize| ((a * 37 + b * 101) as f32).sin();
    let labels: Vec<i32> = (0..ROWS).map(|n| (n % ACTIVE) as i32).collect();
    let embeddings: Vec<f32> = (0..HEADS * ROWS * DIM)
        .map(|i| wave(i / DIM % ROWS % ACTIVE, i % DIM) + 0.5 * wave(i, 7))
        .collect();
    let weights: Vec<f32> = (0..HEADS * CLASSES * DIM).map(|i| wave(i, 3)).collect();

    let inputs = Inputs {
        embeddings: upload(&client, &embeddings, [HEADS, ROWS, DIM])?,
        weights: upload(&client, &weights, [HEADS, CLASSES, DIM])?,
        labels: upload(&client, &labels, [ROWS])?,
    };
    let options = Options {
        scale: 16.0,
        active: Some(ACTIVE),
        ..Options::default()
    };

    for step in 0..20 {
        // The total of the heads' mean losses, with an upstream gradient of 1. The encoder would get the gradient of the embeddings,
        // if there were one: `Wanted::BOTH`.
        let upstream = Upstream::Total(1.0);
        let (output, gradients) =
            forward_backward(&client, &inputs, &options, &upstream, Wanted::WEIGHTS)?;
        // Waits for the device, and reports labels that are not a class.
        let values = output.read(&client)?;
        let by_head = &values.loss;
        println!(
            "step {step:2}: loss {:.4}, of the heads {by_head:.4?}",
            values.total
        );
        let Some(gradient) = gradients.weights else {
            unreachable!("it is wanted")
        };
        let count = HEADS * CLASSES * DIM;
        // SAFETY: both tensors are contiguous, and have so many elements.
        let argument = |tensor: &TensorHandle| unsafe {
            BufferArg::from_raw_parts(tensor.handle.clone(), count)
        };
        let units = CubeDim::new_1d(64);
        descend::launch(
            &client,
            cubecl::calculate_cube_count_elemwise(&client, count, units),
            units,
            argument(&inputs.weights),
            argument(&gradient),
            0.5,
        );
    }

    let options = class_means::Options::default();
    let mut sums = ClassSums::new(&client, HEADS, ACTIVE, DIM, &options)?;
    sums.accumulate(&client, &inputs.embeddings, &inputs.labels)?;
    let prototypes = sums.means(&client, &inputs.weights)?;
    println!("rows by class: {:?}", sums.read_counts(&client)?);
    let prototypes: Vec<f32> = download(&client, &prototypes)?;
    println!("the first prototype begins {:?}", &prototypes[..4]);
    Ok(())
}
