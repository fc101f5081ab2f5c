//! Cosine heads in a Burn model: an encoder, an optimizer, a learnt scale, a margin that grows, the accuracy; then prototypes in place of
//! the trained class weights, a new class from five examples, and heads that are saved and loaded.
//!
//! ```sh
//! cargo run --release --example burn
//! ```

use burn::config::Config;
use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::optim::{GradientsParams, SgdConfig};
use burn::tensor::{Device, Distribution, Int, Tensor};
use protohead::LossOptions;
use protohead::burn::{CosineHeads, CosineHeadsConfig, Margin};

const HEADS: usize = 3;
const FEATURES: usize = 40;
const DIM: usize = 32;
/// Classes that are trained, and all that there will be.
const TRAINED: usize = 8;
const CLASSES: usize = TRAINED + 1;

/// One encoder for the inputs of all heads.
#[derive(Module, Debug)]
struct Model {
    encoder: Linear,
    heads: CosineHeads,
}

impl Model {
    /// Embeddings `[HEADS, rows, DIM]` of inputs `[HEADS, rows, FEATURES]`, on the heads' device.
    fn embed(&self, inputs: Tensor<3>) -> Tensor<3> {
        let device = self.heads.weight.val().device();
        self.encoder.forward(inputs).to_device(&device)
    }
}

/// `rows` noisy inputs of the classes in `range`, in turn, and their labels.
fn batch(centers: &Tensor<3>, range: std::ops::Range<usize>, rows: usize) -> (Tensor<3>, Vec<i32>) {
    let labels: Vec<i32> = range.cycle().take(rows).map(|class| class as i32).collect();
    let device = centers.device();
    let chosen = Tensor::<1, Int>::from_data(labels.as_slice(), &device);
    let noise = Distribution::Normal(0.0, 0.7);
    let noise = Tensor::random([HEADS, rows, FEATURES], noise, &device);
    (centers.clone().select(1, chosen) + noise, labels)
}

/// The share of the first head's predictions that are right.
fn accuracy(predictions: Tensor<2, Int>, labels: &[i32]) -> f64 {
    let first = predictions.slice([0..1, 0..labels.len()]);
    let first = first.try_into_vec_as::<i64>().expect("the device works");
    let right = first
        .iter()
        .zip(labels)
        .filter(|&(&p, &l)| p == i64::from(l));
    right.count() as f64 / labels.len() as f64
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // On a GPU both are one device. Beside a CPU's heads an encoder is faster on Burn's flex.
    let (encoder_device, heads_device) = (Device::flex().autodiff(), Device::cpu().autodiff());
    encoder_device.seed(1);
    heads_device.seed(1);
    let on_heads = |labels: &[i32], device: &Device| Tensor::<1, Int>::from_data(labels, device);

    let mut model = Model {
        encoder: LinearConfig::new(FEATURES, DIM).init(&encoder_device),
        heads: CosineHeadsConfig::new(HEADS, TRAINED, DIM)
            .with_learnt_scale(true)
            .init(&heads_device),
    };
    let mut optimizer = SgdConfig::new().init();
    let centers = Tensor::random(
        [HEADS, CLASSES, FEATURES],
        Distribution::Default,
        &encoder_device,
    );
    for step in 0..30 {
        let angular = 0.2 * step as f32 / 29.0;
        model.heads = model.heads.with_margin(Margin {
            angular,
            ..Margin::default()
        });
        let (inputs, labels) = batch(&centers, 0..TRAINED, 64);
        let targets = on_heads(&labels, &heads_device);
        let loss = model
            .heads
            .loss(model.embed(inputs), targets, &LossOptions::default())?;
        // Waits for the device, and reports labels that are not a class.
        loss.check()?;
        if step % 10 == 9 {
            let total: f32 = loss.total.clone().into_scalar();
            let right = accuracy(loss.heads.predictions, &labels);
            let (step, scale) = (step + 1, model.heads.scale()?);
            println!("step {step:2}: loss {total:.3}, accuracy {right:.2}, scale {scale:.2}");
        }
        let gradients = GradientsParams::from_grads(loss.total.backward(), &model);
        model = optimizer.step(0.1, model, gradients);
    }

    // From here on nothing is trained: `valid` leaves autodiff, which would compute gradients with each loss.
    let model = model.valid();
    let centers = centers.without_autodiff();
    let device = model.heads.weight.val().device();
    let (inputs, labels) = batch(&centers, 0..TRAINED, 400);
    let (heads, means) = model.heads.replace_prototypes(
        model.embed(inputs),
        on_heads(&labels, &device),
        TRAINED,
        &Default::default(),
    )?;
    means.check()?;
    // Five examples of a class that was never trained: the rows of the others stay.
    let (shots, labels) = batch(&centers, TRAINED..CLASSES, 5);
    let (heads, means) = heads.with_classes(CLASSES)?.replace_prototypes(
        model.embed(shots),
        on_heads(&labels, &device),
        CLASSES,
        &Default::default(),
    )?;
    means.check()?;
    let heads = heads.with_active(CLASSES)?;
    let (inputs, labels) = batch(&centers, 0..CLASSES, 450);
    // Without labels, and without logits in memory.
    let right = accuracy(heads.predict(model.embed(inputs))?, &labels);
    println!("{CLASSES} classes, one of them from five examples: accuracy {right:.2}");
    // A file of a module holds its parameters alone. What else the heads are, such as how many classes take part by now, is in their
    // configuration.
    let folder = std::env::temp_dir().join("protohead-burn-example");
    std::fs::create_dir_all(&folder)?;
    let [weights, config] = ["heads.bpk", "heads.json"].map(|name| folder.join(name));
    heads.clone().save_file(&weights)?;
    heads.config().save(&config)?;
    let loaded = CosineHeadsConfig::load(&config)?.init(&device);
    let loaded = loaded.try_load_file(&weights)?;
    println!("saved in {}: {}", folder.display(), loaded.config());
    Ok(())
}
