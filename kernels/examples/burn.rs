//! The heads as a module of a Burn model: a loss with autodiff, a step down its gradient, prototypes in place of what was trained.
//!
//! ```sh
//! cargo run --release --example burn
//! ```

use burn::tensor::{Device, Distribution, Int, Tensor};
use protohead::LossOptions;
use protohead::burn::CosineHeadsConfig;

const HEADS: usize = 3;
const ROWS: usize = 64;
const DIM: usize = 32;
/// Class weights there are, and those that take part.
const CLASSES: usize = 10;
const ACTIVE: usize = 8;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // The heads run on CubeCL devices; autodiff is what records gradients.
    let device = Device::cpu().autodiff();
    device.seed(1);
    let embeddings = Tensor::<3>::random([HEADS, ROWS, DIM], Distribution::Default, &device);
    let labels: Vec<i32> = (0..ROWS).map(|n| (n % ACTIVE) as i32).collect();
    let labels = Tensor::<1, Int>::from_data(labels.as_slice(), &device);

    let mut heads = CosineHeadsConfig::new(HEADS, CLASSES, DIM)
        .with_active(Some(ACTIVE))
        .init(&device);
    for step in 0..20 {
        let loss = heads.loss(embeddings.clone(), labels.clone(), &LossOptions::default())?;
        // Waits for the device, and tells of labels that are no class.
        loss.heads.check()?;
        println!(
            "step {step:2}: loss {:.4}",
            loss.total.clone().into_scalar::<f32>()
        );
        let gradients = loss.total.backward();
        heads.weight = heads.weight.map(|weight| {
            let slope = weight.grad(&gradients).expect("the weights are trained");
            let slope = Tensor::from_inner(slope);
            (weight - slope.mul_scalar(0.5)).detach().require_grad()
        });
    }

    let (heads, means) =
        heads.replace_prototypes(embeddings, labels, ACTIVE, &Default::default())?;
    means.check()?;
    println!("rows by class: {}", means.counts);
    println!("{heads}");
    Ok(())
}
