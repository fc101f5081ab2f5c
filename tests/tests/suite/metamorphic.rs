//! What must hold between two runs, whatever the numbers are.

use cubecl::MemoryScope;
use proptest::prelude::*;
use protohead::cosine_cross_entropy::{Inputs, Options, backward, forward};
use protohead::{LossOptions, Reduction, Upstream};
use protohead_tests::devices::{Run, devices, runs};
use protohead_tests::problem::{Dtype, LabelKind, Problem, Values, download, problem};

use crate::support::config;

/// Loss by row, predictions, dX and dW of a problem with these numbers.
#[derive(PartialEq, Debug)]
struct Answer {
    loss: Vec<f64>,
    predictions: Vec<u32>,
    dx: Vec<f64>,
    dw: Vec<f64>,
}

fn answer(run: &Run, problem: &Problem, x: &[f32], w: &[f32], labels: &[i64]) -> Answer {
    let client = run.client;
    let (heads, _, dim, classes, active) = problem.sizes;
    let rows = labels.len();
    let inputs = Inputs {
        embeddings: problem.upload(client, x, &[heads, rows, dim]),
        weights: problem.upload(client, w, &[heads, classes, dim]),
        labels: problem.upload_labels(client, labels),
    };
    let options = Options {
        scale: problem.scale,
        active: Some(active),
        loss: LossOptions {
            reduction: Reduction::None,
            ignore_index: problem.ignore_index,
            ..LossOptions::default()
        },
        strategy: run.strategy,
    };
    let output = forward(client, &inputs, &options).expect("valid");
    let gradients = backward(
        client,
        &inputs,
        &options,
        &output,
        &Upstream::default(),
        true,
        true,
    )
    .expect("valid");
    Answer {
        loss: download(client, &output.loss),
        predictions: output.read_predictions(client).expect("labels are valid"),
        dx: download(client, &gradients.embeddings.expect("asked for")),
        dw: download(client, &gradients.weights.expect("asked for")),
    }
}

/// Rows of `[outer, count, width]` in another order.
fn permuted<T: Copy>(values: &[T], count: usize, width: usize, order: &[usize]) -> Vec<T> {
    values
        .chunks(count * width)
        .flat_map(|head| {
            order
                .iter()
                .flat_map(|&from| head[from * width..][..width].to_vec())
        })
        .collect()
}

fn reversed(count: usize) -> Vec<usize> {
    (0..count).rev().collect()
}

proptest! {
    #![proptest_config(config(12))]

    #[test]
    fn the_same_input_gives_the_same_bits(problem in problem()) {
        let data = problem.data();
        for run in runs() {
            if problem.supported(run.client) {
                let once = answer(&run, &problem, &data.embeddings, &data.weights, &data.labels);
                let again = answer(&run, &problem, &data.embeddings, &data.weights, &data.labels);
                prop_assert_eq!(once, again, "on {}", run);
            }
        }
    }

    #[test]
    fn permuting_rows_permutes_results(problem in problem()) {
        let data = problem.data();
        let (_, rows, dim, _, _) = problem.sizes;
        let order = reversed(rows);
        for run in runs() {
            if !problem.supported(run.client) {
                continue;
            }
            let straight = answer(&run, &problem, &data.embeddings, &data.weights, &data.labels);
            let turned = answer(
                &run,
                &problem,
                &permuted(&data.embeddings, rows, dim, &order),
                &data.weights,
                &permuted(&data.labels, rows, 1, &order),
            );
            // A row's own results do not depend on where it is: the same bits.
            prop_assert_eq!(permuted(&straight.loss, rows, 1, &order), turned.loss, "on {}", run);
            prop_assert_eq!(permuted(&straight.predictions, rows, 1, &order), turned.predictions, "on {}", run);
            prop_assert_eq!(permuted(&straight.dx, rows, dim, &order), turned.dx, "on {}", run);
        }
    }

    #[test]
    fn permuting_classes_permutes_their_gradients(mut problem in problem()) {
        // All classes active, so that the permutation stays among them.
        problem.sizes.4 = problem.sizes.3;
        problem.dtype = Dtype::F32;
        problem.labels = LabelKind::Classes;
        problem.values = Values::Uniform;
        problem.ignore_index = -100;
        let data = problem.data();
        let (_, _, dim, classes, _) = problem.sizes;
        let order = reversed(classes);
        let relabelled: Vec<i64> = data.labels.iter().map(|&l| classes as i64 - 1 - l).collect();
        for run in runs() {
            if !problem.supported(run.client) {
                continue;
            }
            let straight = answer(&run, &problem, &data.embeddings, &data.weights, &data.labels);
            let weights = permuted(&data.weights, classes, dim, &order);
            let turned = answer(&run, &problem, &data.embeddings, &weights, &relabelled);
            // lse sums the classes in another order: a few rounding errors of f32 of logits up to the scale.
            let scale = f64::from(problem.scale.abs());
            let expected = permuted(&straight.dw, classes, dim, &order);
            let size = expected.iter().map(|v| v.abs()).fold(0.0, f64::max);
            for (a, b) in expected.iter().zip(&turned.dw) {
                prop_assert!((a - b).abs() <= 1e-6 * scale * size + 1e-7 * scale, "on {run}: {a} became {b}");
            }
        }
    }
}

#[test]
fn the_fused_op_needs_no_memory_that_grows_with_rows_times_classes() {
    // [N, K] in f32 is 16 MiB here; operands and gradients together are 0.4 MiB.
    let (rows, classes, dim) = (2048, 2048, 12);
    let logits = (rows * classes * size_of::<f32>()) as u64;
    for device in devices() {
        for &variant in &device.variants {
            let run = Run {
                device: device.name,
                client: &device.client,
                strategy: protohead::Strategy::Forced(variant),
            };
            let problem = Problem {
                sizes: (1, rows, dim, classes, classes),
                dtype: Dtype::F32,
                label_dtype: protohead_tests::problem::LabelDtype::I32,
                gap: 0,
                values: Values::Uniform,
                labels: LabelKind::Classes,
                scale: 16.0,
                reduction: Reduction::Mean,
                smoothing: 0.0,
                ignore_index: -100,
                weighted: false,
                seed: 1,
            };
            let operands = (2 * (rows + classes) * dim * size_of::<f32>()) as u64;
            assert!(logits > 40 * operands, "the shape does not tell");
            let data = problem.data();
            let reserved = || {
                device
                    .client
                    .memory_report(MemoryScope::CurrentStream)
                    .usage()
                    .bytes_reserved
            };
            device
                .client
                .memory_cleanup()
                .expect("memory can be cleaned up");
            let before = reserved();
            let _kept = answer(
                &run,
                &problem,
                &data.embeddings,
                &data.weights,
                &data.labels,
            );
            let grown = reserved().saturating_sub(before);
            assert!(
                grown < logits,
                "on {run}: {grown} bytes more, [N, K] is {logits}"
            );
        }
    }
}

#[test]
fn a_handle_that_begins_inside_its_allocation_gives_the_same_logits() {
    let Some(device) = devices().iter().find(|device| device.name == "cpu") else {
        return; // other devices ask for their own alignment of offsets
    };
    let client = &device.client;
    let (rows, dim) = (5usize, 32usize);
    let values: Vec<f32> = (0..rows * dim + 3)
        .map(|i| ((i * 37 + 11) % 17) as f32 - 8.0)
        .collect();
    let upload =
        |values: &[f32]| client.create_from_slice(cubecl::prelude::CubeElement::as_bytes(values));
    let inside = upload(&values).offset_start(3 * size_of::<f32>() as u64);
    let logits = |handle| {
        let tensor = cubecl::std::tensor::TensorHandle::new_contiguous(
            [1, rows, dim],
            handle,
            Dtype::F32.elem(),
        );
        let inputs = protohead::cosine_logits::Inputs {
            embeddings: tensor.clone(),
            weights: tensor,
        };
        let logits =
            protohead::cosine_logits::forward(client, &inputs, &Default::default()).expect("valid");
        download(client, &logits)
    };
    let close = |a: &f64, b: &f64| (a - b).abs() < 1e-5;
    assert!(
        logits(inside)
            .iter()
            .zip(&logits(upload(&values[3..])))
            .all(|(a, b)| close(a, b))
    );
}
