//! Millions of classes that are all alike: each adds the same number to a row's sums, with the same rounding error.

use protohead::cosine_cross_entropy::{Inputs, Options, forward, forward_backward};
use protohead::{Strategy, Upstream, Variant, Wanted};
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
