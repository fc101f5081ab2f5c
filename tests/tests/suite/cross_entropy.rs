//! Cross-entropy of given logits against the reference.

use cubecl::ir::{ElemType, IntKind};
use cubecl::prelude::CubeElement;
use cubecl::std::tensor::TensorHandle;
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;
use protohead::cross_entropy::{Inputs, Options, backward, forward};
use protohead::{LossOptions, Reduction, Upstream};
use protohead_reference as reference;
use protohead_tests::close::{Comparison, Share};
use protohead_tests::devices::{Run, runs, say_agreed};
use protohead_tests::problem::{Data, Dtype, LabelKind, Problem, download, problem};

use crate::support::{bytes, config, f32s, failed_once, fails, labels};

struct Expected<T> {
    forward: reference::CrossEntropy<T>,
    of_total: Vec<T>,
    of_loss: Vec<T>,
}

fn expected<T: reference::Real>(problem: &Problem, data: &Data, logits: &[f32]) -> Expected<T> {
    let of = |values: &[f32]| -> Vec<T> { values.iter().map(|&v| T::of(f64::from(v))).collect() };
    let z = of(logits);
    let sizes = problem.reference_sizes();
    let options = problem.reference_options(data);
    let gradients = |upstream: &reference::Upstream<T>| {
        reference::cross_entropy_backward(&z, &data.labels, sizes, &options, upstream)
    };
    Expected {
        forward: reference::cross_entropy(&z, &data.labels, sizes, &options),
        of_total: gradients(&reference::Upstream::Total(T::of(-0.3))),
        of_loss: gradients(&reference::Upstream::Loss(of(&data.upstream))),
    }
}

fn check(
    run: &Run,
    problem: &Problem,
    data: &Data,
    logits: &[f32],
    truth: &Expected<f64>,
    working: &Expected<f32>,
) -> Result<(), String> {
    let client = run.client;
    let (heads, rows, _, _, active) = problem.sizes;
    let inputs = Inputs {
        logits: problem.upload(client, logits, &[heads, rows, active]),
        labels: problem.upload_labels(client, &data.labels),
    };
    let options = Options {
        loss: problem.options(data),
        strategy: run.strategy,
    };
    let said = |error: protohead::Error| error.to_string();
    let operands = [&inputs.logits, &inputs.labels];
    let before = bytes(client, &operands);
    let output = forward(client, &inputs, &options).map_err(said)?;
    output.read_total(client).map_err(said)?;
    let again = forward(client, &inputs, &options).map_err(said)?;
    let [once, again] = [&output, &again].map(|o| {
        bytes(
            client,
            &[&o.loss, &o.total, &o.lse, &o.predictions, &o.status],
        )
    });
    if once != again {
        return Err("a second forward pass differs".into());
    }
    let float = |name, tensor: &TensorHandle, truth: &[f64], working: &[f32], dtype, magnitude| {
        Comparison {
            name,
            ours: &download(client, tensor),
            truth,
            working,
            dtype,
            magnitude,
            kept: 0.0,
            rounded: 0.0,
            lengths: &[],
        }
        .check()
    };
    let size = f64::from(problem.scale.abs());
    let share = Share::under(problem.reduction, rows);
    let (t, w) = (&truth.forward, &working.forward);
    float(
        "loss",
        &output.loss,
        &t.loss,
        &w.loss,
        Dtype::F32,
        size * share.of_loss,
    )?;
    float(
        "total",
        &output.total,
        &[t.total],
        &[w.total],
        Dtype::F32,
        size * share.of_total * heads as f64,
    )?;
    float("lse", &output.lse, &t.lse, &w.lse, Dtype::F32, size)?;
    if output.read_predictions(client).map_err(said)? != t.predictions {
        return Err("predictions differ".into());
    }
    let loss_gradient = TensorHandle::new_contiguous(
        output.loss.shape().to_vec(),
        client.create_from_slice(f32::as_bytes(&data.upstream)),
        Dtype::F32.elem(),
    );
    for (upstream, truth, working) in [
        (Upstream::Total(-0.3), &truth.of_total, &working.of_total),
        (
            Upstream::Loss(loss_gradient),
            &truth.of_loss,
            &working.of_loss,
        ),
    ] {
        let dz = backward(client, &inputs, &options, &output, &upstream).map_err(said)?;
        // A logit's gradient is at most the row's part in the loss, times what arrives.
        float("dz", &dz, truth, working, problem.dtype, 2.0 * share.of_row)?;
        let again = backward(client, &inputs, &options, &output, &upstream).map_err(said)?;
        if download(client, &dz) != download(client, &again) {
            return Err("dz differs in a second backward".into());
        }
    }
    if bytes(client, &operands) != before {
        return Err("the operands were modified".into());
    }
    Ok(())
}

fn agrees(problem: &Problem) -> Result<(), TestCaseError> {
    let (heads, rows, _, _, active) = problem.sizes;
    let data = problem.data();
    let logits: Vec<f32> = problem
        .uniform(7, heads * rows * active)
        .iter()
        .map(|z| problem.dtype.round(z * problem.scale))
        .collect();
    let truth = expected::<f64>(problem, &data, &logits);
    let working = expected::<f32>(problem, &data, &logits);
    for run in runs() {
        if problem.supported(run.client) {
            check(&run, problem, &data, &logits, &truth, &working).map_err(fails(&run))?;
            say_agreed("cross_entropy", &run, problem.dtype);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(config(24))]

    #[test]
    fn cross_entropy_agrees_with_the_reference(problem in problem()) {
        agrees(&problem)?;
    }
}

#[test]
fn problems_that_failed_once_agree_with_the_reference() {
    for problem in failed_once() {
        agrees(&problem).unwrap_or_else(|error| panic!("{problem:?}: {error}"));
    }
}

/// So many that whole cubes share a row, and each of their units has several.
#[test]
fn rows_of_many_classes_agree_with_the_reference() {
    for (active, dtype) in [(700, Dtype::F16), (2_500, Dtype::F32), (5_003, Dtype::F32)] {
        let problem = Problem {
            dtype,
            labels: LabelKind::SomeIgnored,
            smoothing: 0.1,
            seed: 12,
            ..Problem::plain((2, 9, 1, active, active))
        };
        agrees(&problem).unwrap_or_else(|error| panic!("{problem:?}: {error}"));
    }
}

/// A softmax does not change when all of its logits rise by the same: here by so much that a unit in the last place of lse is 1/2.
/// The logits are whole numbers, so that f32 holds the shifted ones exactly.
#[test]
fn a_shift_of_all_logits_changes_neither_loss_nor_gradient() {
    const CLASSES: usize = 37;
    let steps = Problem::plain((2, 5, 1, CLASSES, CLASSES)).uniform(3, 2 * 5 * CLASSES);
    let logits: Vec<f32> = steps.iter().map(|z| (z * 4.0).round()).collect();
    let shifted: Vec<f32> = logits.iter().map(|z| z + 4_194_304.0).collect();
    for run in runs() {
        let client = run.client;
        let options = Options {
            strategy: run.strategy,
            ..Options::default()
        };
        let of = |logits: &[f32]| {
            let inputs = Inputs {
                logits: f32s(client, logits, &[2, 5, CLASSES]),
                labels: labels(client, &[0, 7, 36, 2, 19]),
            };
            let output = forward(client, &inputs, &options).expect("the operands are valid");
            let gradient = backward(client, &inputs, &options, &output, &Upstream::default())
                .expect("the operands are valid");
            [output.loss, gradient].map(|tensor| download(client, &tensor))
        };
        let ([loss, dz], [shifted_loss, shifted_dz]) = (of(&logits), of(&shifted));
        // Rounding errors of f32, of losses up to 10 and of probabilities.
        for (a, b) in loss.iter().zip(&shifted_loss) {
            assert!((a - b).abs() < 2e-6, "on {run}: {b} for {a}");
        }
        for (a, b) in dz.iter().zip(&shifted_dz) {
            assert!((a - b).abs() < 2e-7, "on {run}: {b} for {a}");
        }
    }
}

/// A class that is masked with −∞ takes no part: the loss and the gradient of the others alone.
#[test]
fn a_masked_class_takes_no_part() {
    for run in runs() {
        let client = run.client;
        let logits = [0.0f32, 1.0, f32::NEG_INFINITY];
        let inputs = Inputs {
            logits: TensorHandle::new_contiguous(
                [1, 1, 3],
                client.create_from_slice(f32::as_bytes(&logits)),
                Dtype::F32.elem(),
            ),
            labels: TensorHandle::new_contiguous(
                [1],
                client.create_from_slice(i32::as_bytes(&[1])),
                ElemType::Int(IntKind::I32),
            ),
        };
        let options = Options {
            strategy: run.strategy,
            ..Options::default()
        };
        let output = forward(client, &inputs, &options).expect("the operands are valid");
        let total = output.read_total(client).expect("the label is valid");
        let expected = (1.0 + (-1.0f32).exp()).ln();
        assert!((total - expected).abs() < 1e-6, "on {run}: {total}");
        let grad = backward(client, &inputs, &options, &output, &Upstream::Total(1.0))
            .expect("the operands are valid");
        let grad = download(client, &grad);
        let other = 1.0 / (1.0 + 1f64.exp());
        for (ours, truth) in grad.iter().zip([other, -other, 0.0]) {
            assert!((ours - truth).abs() < 1e-6, "on {run}: {grad:?}");
        }
    }
}

/// A loss beyond every number is infinite, as in torch, and not NaN; a row that is ignored has no gradient, whatever it holds.
#[test]
fn an_infinite_loss_and_an_ignored_row_without_a_softmax() {
    let infinity = f32::INFINITY;
    for run in runs() {
        let client = run.client;
        let logits = [0.0, -infinity, 0.0, 0.0, -infinity, -infinity];
        let inputs = Inputs {
            logits: TensorHandle::new_contiguous(
                [1, 3, 2],
                client.create_from_slice(f32::as_bytes(&logits)),
                Dtype::F32.elem(),
            ),
            labels: TensorHandle::new_contiguous(
                [3],
                client.create_from_slice(i32::as_bytes(&[1, 0, -100])),
                ElemType::Int(IntKind::I32),
            ),
        };
        for reduction in [Reduction::Sum, Reduction::Mean] {
            let options = Options {
                loss: LossOptions {
                    reduction,
                    ..LossOptions::default()
                },
                strategy: run.strategy,
            };
            let output = forward(client, &inputs, &options).expect("the operands are valid");
            let total = output.read_total(client).expect("the labels are valid");
            assert_eq!(total, infinity, "{reduction:?} on {run}");
            let grad = backward(client, &inputs, &options, &output, &Upstream::Total(1.0))
                .expect("the operands are valid");
            let grad = download(client, &grad);
            let part = if reduction == Reduction::Mean {
                0.5
            } else {
                1.0
            };
            let expected = [part, -part, -part / 2.0, part / 2.0, 0.0, 0.0];
            for (ours, truth) in grad.iter().zip(expected) {
                assert!((ours - truth).abs() < 1e-6, "on {run}: {grad:?}");
            }
        }
    }
}
