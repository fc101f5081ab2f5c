//! Operands that do not go together: kernels are launched unchecked, with sizes that one operand has and the others are to have.

use cubecl::client::Client;
use cubecl::std::tensor::TensorHandle;
use protohead::class_means::{self, ClassSums};
use protohead::cosine_cross_entropy::{Inputs, Options, backward, forward};
use protohead::{
    Error, LossOptions, Reduction, Strategy, Upstream, Variant, Wanted, cosine_logits,
    cross_entropy, reconstruction,
};
use protohead_tests::devices::{product_runs, runs};
use protohead_tests::problem::Dtype;

use super::{floats, labels};

/// What is refused, and how the error begins.
fn says(result: Result<(), Error>, told: &str) {
    let error = result.expect_err(told).to_string();
    assert!(error.starts_with(told), "{error}: not {told}");
}

/// Floats that are said to be f16.
fn halves(client: &Client, shape: &[usize]) -> TensorHandle {
    let mut tensor = floats(client, shape);
    tensor.dtype = Dtype::F16.elem();
    tensor
}

#[test]
fn class_sums_and_what_does_not_go_with_them() {
    for run in runs() {
        let client = run.client;
        let of = |heads, classes, dim| {
            let options = class_means::Options {
                strategy: run.strategy,
                ..Default::default()
            };
            ClassSums::new(client, heads, classes, dim, &options).expect("valid")
        };
        let mut sums = of(2, 3, 5);
        let mut add = |shape: [usize; 3]| {
            let rows = labels(client, &[0, 2, 1, 0]);
            sums.accumulate(client, &floats(client, &shape), &rows)
        };
        for wrong in [[1, 4, 5], [3, 4, 5], [2, 4, 4], [2, 4, 6]] {
            says(
                add(wrong),
                &format!("embeddings: shape {wrong:?}, expected [2, rows, 5], like the sums"),
            );
        }
        says(add([2, 3, 5]), "labels: shape [4], expected [3]");
        assert_eq!(add([2, 4, 5]), Ok(()));
        let write = |shape: [usize; 3]| sums.means(client, &floats(client, &shape)).map(drop);
        for wrong in [[2, 2, 5], [1, 3, 5], [2, 3, 4]] {
            says(
                write(wrong),
                &format!("class weights: shape {wrong:?}, expected [2, at least 3, 5]"),
            );
        }
        assert_eq!(write([2, 4, 5]), Ok(()));
        for [heads, classes, dim] in [[1, 3, 5], [2, 4, 5], [2, 3, 6]] {
            says(
                sums.merge(client, &of(heads, classes, dim)),
                "class sums: shape [",
            );
        }
        // Nothing of it has come through.
        assert_eq!(sums.read_counts(client), Ok(vec![2, 1, 1]), "on {run}");
    }
}

#[test]
fn parts_that_are_not_like_the_whole() {
    for run in runs() {
        let client = run.client;
        let inputs = |first: TensorHandle, second: TensorHandle| reconstruction::Inputs {
            whole: floats(client, &[4, 5]),
            first,
            second,
        };
        let options = reconstruction::Options {
            strategy: run.strategy,
        };
        let of = |shape: [usize; 2]| floats(client, &shape);
        for (inputs, told) in [
            (
                inputs(of([3, 5]), of([4, 5])),
                "first part: shape [3, 5], expected [4, 5], like the whole",
            ),
            (
                inputs(of([4, 5]), of([4, 4])),
                "second part: shape [4, 4], expected [4, 5], like the whole",
            ),
            (
                inputs(halves(client, &[4, 5]), of([4, 5])),
                "first part: dtype f16, expected",
            ),
        ] {
            says(
                reconstruction::forward(client, &inputs, &options).map(drop),
                told,
            );
            let gradients = reconstruction::backward(
                client,
                &inputs,
                &options,
                &Default::default(),
                reconstruction::Wanted::ALL,
            );
            says(gradients.map(drop), told);
        }
    }
}

#[test]
fn operands_of_logits_and_their_gradients() {
    for run in product_runs() {
        let client = run.client;
        let inputs = |weights| cosine_logits::Inputs {
            embeddings: floats(client, &[2, 4, 5]),
            weights,
        };
        let options = cosine_logits::Options {
            active: Some(2),
            strategy: run.strategy,
            ..Default::default()
        };
        says(
            cosine_logits::forward(client, &inputs(halves(client, &[2, 3, 5])), &options).map(drop),
            "class weights: dtype f16, expected",
        );
        let good = inputs(floats(client, &[2, 3, 5]));
        let back = |grad: &TensorHandle| {
            cosine_logits::backward(client, &good, &options, grad, Wanted::BOTH).map(drop)
        };
        for wrong in [[1, 4, 2], [2, 3, 2], [2, 4, 3], [2, 4, 1]] {
            says(
                back(&floats(client, &wrong)),
                &format!("logit gradients: shape {wrong:?}, expected [2, 4, 2]"),
            );
        }
        says(
            back(&halves(client, &[2, 4, 2])),
            "logit gradients: dtype f16, expected",
        );
        assert_eq!(back(&floats(client, &[2, 4, 2])), Ok(()), "on {run}");
    }
}

#[test]
fn the_output_of_a_forward_pass_with_other_options() {
    for run in product_runs() {
        let client = run.client;
        let inputs = super::inputs(client);
        let options = |change: &dyn Fn(&mut Options)| {
            let mut options = Options {
                scale: 8.0,
                active: Some(2),
                strategy: run.strategy,
                ..Default::default()
            };
            options.loss.ignore_index = 2;
            change(&mut options);
            options
        };
        let output = forward(client, &inputs, &options(&|_| ())).expect("valid");
        let back = |change: &dyn Fn(&mut Options)| {
            let (total, wanted) = (Upstream::Total(1.0), Wanted::BOTH);
            backward(client, &inputs, &options(change), &output, &total, wanted).map(drop)
        };
        says(
            back(&|o| o.scale = 8.5),
            "scale is 8.5, but was 8 in the forward pass",
        );
        says(
            back(&|o| o.margin.angular = 0.5),
            "the angular margin is 0.5, but was 0 in the forward pass",
        );
        says(
            back(&|o| o.margin.cosine = 0.25),
            "the cosine margin is 0.25, but was 0 in the forward pass",
        );
        says(
            back(&|o| o.active = None),
            "the number of active classes is 3, but was 2 in the forward pass",
        );
        says(
            back(&|o| o.loss.ignore_index = -100),
            "ignore_index is -100, but was 2 in the forward pass",
        );
        let differ: &dyn Fn(&mut Options) = &|o| {
            o.loss.reduction = Reduction::Sum;
            o.loss.label_smoothing = 0.1;
            o.loss.head_weights = Some(vec![1.0, 2.0]);
        };
        assert_eq!(back(differ), Ok(()), "on {run}");
        // In 16 bits tiles on tensor cores round, others do not.
        if run.strategy == Strategy::Forced(Variant::Plane)
            && client.properties().supports_type(Dtype::F16.elem())
        {
            let half = |values: usize, shape: &[usize]| {
                let values = client.create_from_slice(&vec![0u8; 2 * values]);
                TensorHandle::new_contiguous(shape.to_vec(), values, Dtype::F16.elem())
            };
            let of_16_bits = Inputs {
                embeddings: half(2 * 4 * 5, &[2, 4, 5]),
                weights: half(2 * 3 * 5, &[2, 3, 5]),
                labels: inputs.labels.clone(),
            };
            let rounding = options(&|o| o.strategy = Strategy::Forced(Variant::Cmma));
            let output = forward(client, &of_16_bits, &options(&|_| ())).expect("valid");
            let (total, wanted) = (Upstream::Total(1.0), Wanted::BOTH);
            says(
                backward(client, &of_16_bits, &rounding, &output, &total, wanted).map(drop),
                "the arithmetic is f16, but was f32 in the forward pass",
            );
        }
        let given = cross_entropy::Inputs {
            logits: floats(client, &[2, 4, 2]),
            labels: inputs.labels.clone(),
        };
        let of_logits = cross_entropy::forward(client, &given, &Default::default());
        let (total, wanted) = (Upstream::Total(1.0), Wanted::BOTH);
        let of_logits = of_logits.expect("valid");
        let fused = options(&|_| ());
        says(
            backward(client, &inputs, &fused, &of_logits, &total, wanted).map(drop),
            "the op is cosine_cross_entropy, but was cross_entropy in the forward pass",
        );
    }
    for run in runs() {
        let client = run.client;
        let inputs = |classes| cross_entropy::Inputs {
            logits: floats(client, &[2, 4, classes]),
            labels: labels(client, &[0, 2, 1, 0]),
        };
        let options = |ignore_index| cross_entropy::Options {
            loss: LossOptions {
                ignore_index,
                ..Default::default()
            },
            strategy: run.strategy,
        };
        let output = cross_entropy::forward(client, &inputs(3), &options(-100)).expect("valid");
        let back = |classes, ignored| {
            let (inputs, options, total) =
                (inputs(classes), options(ignored), Upstream::Total(1.0));
            cross_entropy::backward(client, &inputs, &options, &output, &total).map(drop)
        };
        says(
            back(4, -100),
            "the number of active classes is 4, but was 3 in the forward pass",
        );
        says(
            back(3, 0),
            "ignore_index is 0, but was -100 in the forward pass",
        );
        assert_eq!(back(3, -100), Ok(()), "on {run}");
    }
}
