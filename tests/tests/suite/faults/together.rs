//! Operands that do not go together: kernels are launched unchecked, with sizes that one operand has and the others are to have.

use cubecl::client::Client;
use cubecl::std::tensor::TensorHandle;
use protohead::class_means::{self, ClassSums};
use protohead::{Error, Wanted, cosine_logits, reconstruction};
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
                &format!("embeddings has shape {wrong:?}, expected [2, rows, 5], like the sums"),
            );
        }
        says(add([2, 3, 5]), "labels has shape [4], expected [3]");
        assert_eq!(add([2, 4, 5]), Ok(()));
        let write = |shape: [usize; 3]| sums.means(client, &floats(client, &shape)).map(drop);
        for wrong in [[2, 2, 5], [1, 3, 5], [2, 3, 4]] {
            says(
                write(wrong),
                &format!("class weights has shape {wrong:?}, expected [2, at least 3, 5]"),
            );
        }
        assert_eq!(write([2, 4, 5]), Ok(()));
        for [heads, classes, dim] in [[1, 3, 5], [2, 4, 5], [2, 3, 6]] {
            says(
                sums.merge(client, &of(heads, classes, dim)),
                "class sums has shape [",
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
                "first part has shape [3, 5], expected [4, 5], like the whole",
            ),
            (
                inputs(of([4, 5]), of([4, 4])),
                "second part has shape [4, 4], expected [4, 5], like the whole",
            ),
            (
                inputs(halves(client, &[4, 5]), of([4, 5])),
                "first part has dtype f16, expected",
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
            "class weights has dtype f16, expected",
        );
        let good = inputs(floats(client, &[2, 3, 5]));
        let back = |grad: &TensorHandle| {
            cosine_logits::backward(client, &good, &options, grad, Wanted::BOTH).map(drop)
        };
        for wrong in [[1, 4, 2], [2, 3, 2], [2, 4, 3], [2, 4, 1]] {
            says(
                back(&floats(client, &wrong)),
                &format!("logit gradients has shape {wrong:?}, expected [2, 4, 2]"),
            );
        }
        says(
            back(&halves(client, &[2, 4, 2])),
            "logit gradients has dtype f16, expected",
        );
        assert_eq!(back(&floats(client, &[2, 4, 2])), Ok(()), "on {run}");
    }
}
