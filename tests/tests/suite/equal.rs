//! Millions of classes that are alike: each adds the same number to a row's sums, with the same rounding error.

use protohead::cosine_cross_entropy::{Inputs, Options, forward, forward_backward};
use protohead::{Strategy, Upstream, Variant, Wanted, cosine_logits, cross_entropy};
use protohead_tests::devices::{Run, all_runs};
use protohead_tests::problem::download;

use crate::support::{f32s, labels};

/// A GPU adds in parts, and software Vulkan would take minutes.
fn on_cpus() -> impl Iterator<Item = Run<'static>> {
    let of_units = Strategy::Forced(Variant::Unit);
    all_runs()
        .into_iter()
        .filter(move |run| run.strategy == of_units)
}

/// A row whose classes are all `[1, 0]`.
fn inputs(client: &cubecl::client::Client, classes: usize) -> Inputs {
    let weights: Vec<f32> = [1.0, 0.0].repeat(classes);
    Inputs {
        embeddings: f32s(client, &[0.6, 0.8], &[1, 1, 2]),
        weights: f32s(client, &weights, &[1, classes, 2]),
        labels: labels(client, &[1]),
    }
}

/// In one f32 sum, ones no longer count from 2²⁴ on.
#[test]
fn the_loss_of_twenty_million_equal_classes_is_their_logarithm() {
    const CLASSES: usize = 20_000_000;
    for run in on_cpus() {
        let inputs = inputs(run.client, CLASSES);
        let output = forward(run.client, &inputs, &Options::default()).expect("valid");
        let loss = f64::from(output.read_total(run.client).expect("a class"));
        let truth = (CLASSES as f64).ln();
        // What lse and the logit of 9.6, whose difference the loss is, are rounded by.
        assert!((loss - truth).abs() < 4e-6, "{loss}, expected {truth}");
    }
}

/// The row's gradient is what its class pulls and all together push: nothing, as they are one.
#[test]
fn equal_classes_leave_a_row_where_it_is() {
    const CLASSES: usize = 3_000_000;
    for run in on_cpus() {
        let inputs = inputs(run.client, CLASSES);
        let (options, upstream) = (Options::default(), Upstream::default());
        let step = forward_backward(run.client, &inputs, &options, &upstream, Wanted::EMBEDDINGS);
        let gradient = step.expect("valid").1.embeddings.expect("asked for");
        // Of either side, which is the scale times the sine of the angle.
        let size = 16.0 * 0.8;
        for value in download(run.client, &gradient) {
            assert!(value.abs() < 1e-4 * size, "{value} of {size}");
        }
    }
}

/// The same of `cosine_logits`, given the softmax's gradient.
#[test]
fn gradients_of_equal_classes_logits_leave_a_row_where_it_is() {
    const CLASSES: usize = 3_000_000;
    let mut grad = vec![1.0 / CLASSES as f32; CLASSES];
    grad[1] -= 1.0;
    for run in on_cpus() {
        let Inputs {
            embeddings,
            weights,
            ..
        } = inputs(run.client, CLASSES);
        let inputs = cosine_logits::Inputs {
            embeddings,
            weights,
        };
        let grad = f32s(run.client, &grad, &[1, 1, CLASSES]);
        let options = cosine_logits::Options::default();
        let gradients =
            cosine_logits::backward(run.client, &inputs, &options, &grad, Wanted::EMBEDDINGS);
        let gradient = gradients.expect("valid").embeddings.expect("asked for");
        let size = f64::from(options.scale) * 0.8;
        for value in download(run.client, &gradient) {
            // A block, of 8 to 32 classes, is rounded to the grid of the running sum always the same way: that takes up to 0.2 % of the
            // whole. Of single classes it would be 3 %.
            assert!(value.abs() < 5e-3 * size, "{value} of {size}");
        }
    }
}

/// A few logits of 1 have all others add e⁻¹ each, which no f32 holds.
#[test]
fn the_loss_of_twenty_million_logits_counts_every_one() {
    const CLASSES: usize = 20_000_000;
    let mut logits = vec![0.0; CLASSES];
    logits[..16].fill(1.0);
    for run in on_cpus() {
        let inputs = cross_entropy::Inputs {
            logits: f32s(run.client, &logits, &[1, 1, CLASSES]),
            labels: labels(run.client, &[20]),
        };
        let output = cross_entropy::forward(run.client, &inputs, &Default::default());
        let total = output.expect("valid").read_total(run.client);
        let loss = f64::from(total.expect("a class"));
        let truth = (CLASSES as f64 - 16.0 + 16.0 * 1f64.exp()).ln();
        // The sum of a lane's part, 377, is rounded to the grid of the running sum, of up to 1/8, always the same way: up to 2e-4 of
        // it with the fewest lanes, of which a third was seen. Without parts it would be 1e-2.
        assert!((loss - truth).abs() < 1e-4, "{loss}, expected {truth}");
    }
}
