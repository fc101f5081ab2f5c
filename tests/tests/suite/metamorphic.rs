//! What must hold between two runs, whatever the numbers are.

use cubecl::client::Client;
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;
use protohead::cosine_cross_entropy::{Inputs, Options};
use protohead::{LossOptions, Reduction, Strategy, Upstream, Variant};
use protohead_tests::devices::{Run, devices, fused_runs, product_runs};
use protohead_tests::problem::{Dtype, LabelKind, Problem, Values, download, problem};

use crate::support::{config, failed_once, reserved, step};

/// Loss by row, predictions, dX and dW of a problem with these numbers, by one call or two.
#[derive(PartialEq, Debug)]
struct Answer {
    loss: Vec<f64>,
    predictions: Vec<u32>,
    dx: Vec<f64>,
    dw: Vec<f64>,
    ds: Vec<f64>,
}

fn answer(
    run: &Run,
    problem: &Problem,
    x: &[f32],
    w: &[f32],
    labels: &[i64],
    together: bool,
) -> Answer {
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
        allow_tf32: false,
        margin: problem.margin(),
        loss: LossOptions {
            reduction: Reduction::None,
            ignore_index: problem.ignore_index,
            ..LossOptions::default()
        },
        strategy: run.strategy,
    };
    let (output, gradients) = step(client, &inputs, &options, &Upstream::default(), together);
    Answer {
        loss: download(client, &output.loss),
        predictions: output.read_predictions(client).expect("labels are valid"),
        dx: download(client, &gradients.embeddings.expect("asked for")),
        dw: download(client, &gradients.weights.expect("asked for")),
        ds: download(client, &gradients.scale.expect("asked for")),
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

fn permuting_classes(mut problem: Problem) -> Result<(), TestCaseError> {
    // All classes active, so that the permutation stays among them.
    problem.sizes.4 = problem.sizes.3;
    problem.dtype = Dtype::F32;
    problem.labels = LabelKind::Classes;
    problem.values = Values::Uniform;
    problem.ignore_index = -100;
    // Whose slope would take what is said of rounding below further.
    problem.margin.0 = 0.0;
    let data = problem.data();
    let (_, rows, dim, classes, _) = problem.sizes;
    let order = reversed(classes);
    let relabelled: Vec<i64> = data
        .labels
        .iter()
        .map(|&l| classes as i64 - 1 - l)
        .collect();
    for run in fused_runs(problem.sizes) {
        if !problem.supported(run.client) {
            continue;
        }
        let straight = answer(
            &run,
            &problem,
            &data.embeddings,
            &data.weights,
            &data.labels,
            false,
        );
        let weights = permuted(&data.weights, classes, dim, &order);
        let turned = answer(
            &run,
            &problem,
            &data.embeddings,
            &weights,
            &relabelled,
            false,
        );
        // lse sums the classes in another order: a few rounding errors of f32 of logits up to the scale. What the projection
        // cancels (everything, for a dim of 1) is a sum of so many over the length of a class weight.
        let scale = f64::from(problem.scale.abs());
        let length = |w: &[f32]| w.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
        let shortest = data
            .weights
            .chunks(dim)
            .map(length)
            .fold(1.0, f64::min)
            .max(1e-12);
        let expected = permuted(&straight.dw, classes, dim, &order);
        let size = expected.iter().map(|v| v.abs()).fold(0.0, f64::max);
        for (a, b) in expected.iter().zip(&turned.dw) {
            prop_assert!(
                (a - b).abs()
                    <= 1e-6 * scale * size + 4e-7 * scale * (rows as f64).sqrt() / shortest,
                "on {run}: {a} became {b}"
            );
        }
    }
    Ok(())
}

#[test]
fn problems_that_failed_once_permute_too() {
    for problem in failed_once() {
        permuting_classes(problem.clone()).unwrap_or_else(|error| panic!("{problem:?}: {error}"));
    }
}

proptest! {
    #![proptest_config(config(12))]

    #[test]
    fn the_same_input_gives_the_same_bits(problem in problem()) {
        let data = problem.data();
        for run in fused_runs(problem.sizes) {
            if problem.supported(run.client) {
                for together in [false, true] {
                    let [once, again] = [(); 2].map(|()| {
                        answer(&run, &problem, &data.embeddings, &data.weights, &data.labels, together)
                    });
                    prop_assert_eq!(&once, &again, "on {}", run);
                    // A small problem takes fewer cores where the variant is not forced, and that changes no bit.
                    if run.strategy == Strategy::Forced(Variant::Unit) {
                        let inferred = Run { strategy: Strategy::Inferred, ..run };
                        let fewer = answer(
                            &inferred, &problem, &data.embeddings, &data.weights, &data.labels, together,
                        );
                        prop_assert_eq!(once, fewer, "on {}", inferred);
                    }
                }
            }
        }
    }

    #[test]
    fn permuting_rows_permutes_results(problem in problem()) {
        let data = problem.data();
        let (_, rows, dim, _, _) = problem.sizes;
        let order = reversed(rows);
        for run in fused_runs(problem.sizes) {
            if !problem.supported(run.client) {
                continue;
            }
            let straight = answer(&run, &problem, &data.embeddings, &data.weights, &data.labels, false);
            let turned = answer(
                &run,
                &problem,
                &permuted(&data.embeddings, rows, dim, &order),
                &data.weights,
                &permuted(&data.labels, rows, 1, &order),
                false,
            );
            // A row's own results do not depend on where it is: the same bits.
            prop_assert_eq!(permuted(&straight.loss, rows, 1, &order), turned.loss, "on {}", run);
            prop_assert_eq!(permuted(&straight.predictions, rows, 1, &order), turned.predictions, "on {}", run);
            prop_assert_eq!(permuted(&straight.dx, rows, dim, &order), turned.dx, "on {}", run);
        }
    }

    #[test]
    fn permuting_classes_permutes_their_gradients(problem in problem()) {
        permuting_classes(problem)?;
    }
}

/// What is small beside the class weights gets no page as large as they are, neither the workspace nor `dX`.
#[test]
fn a_step_of_a_cpu_takes_little_more_than_its_gradients() {
    for run in product_runs() {
        if run.strategy != Strategy::Forced(Variant::Unit) {
            continue;
        }
        let client = run.client;
        let (rows, dim) = (160, 512);
        // A core's own part of the workspace is some 0.4 MiB at this dim, and `dX` 0.3: an eighth of so many classes is more.
        let cores = client.properties().hardware.num_cpu_cores.unwrap_or(1) as usize;
        let classes = 20_000 + 3000 * cores;
        let problem = Problem::plain((1, rows, dim, classes, classes));
        let data = problem.data();
        let inputs = Inputs {
            embeddings: problem.upload(client, &data.embeddings, &[1, rows, dim]),
            weights: problem.upload(client, &data.weights, &[1, classes, dim]),
            labels: problem.upload_labels(client, &data.labels),
        };
        let options = Options {
            strategy: run.strategy,
            ..Options::default()
        };
        let floats = size_of::<f32>() as u64;
        let (of_weights, of_rows) = (
            (classes * dim) as u64 * floats,
            (rows * dim) as u64 * floats,
        );
        client.memory_cleanup().expect("memory can be cleaned up");
        let before = reserved(client);
        let (output, _gradients) = step(client, &inputs, &options, &Upstream::default(), true);
        output.check(client).expect("labels are valid");
        let grown = reserved(client).saturating_sub(before);
        let most = of_weights + of_rows + of_weights / 4;
        assert!(
            grown < most,
            "on {run}: {grown} bytes more, the gradients are {of_weights} and {of_rows}"
        );
    }
}

#[test]
fn the_fused_op_needs_no_memory_that_grows_with_rows_times_classes() {
    for run in product_runs() {
        // A bounded workspace may hold a chunk of logits. In the unit variant [N, K] in f32 is 1.5 GiB here, operands and
        // gradients together 4 MiB. Software Vulkan asks for a smaller shape than a GPU's chunks are: only what stands in for
        // tensor cores takes such small ones.
        let hardware = &run.client.properties().hardware;
        let (size, workspace) = match hardware.num_cpu_cores {
            // 60 MiB, or 8 a core.
            Some(cores) => {
                let more = (u64::from(cores) / 8).max(1);
                (
                    (20_000.0 * (more as f64).sqrt()) as usize,
                    more * (64 << 20),
                )
            }
            // 160 MiB, and 32 for the parts of either gradient. In f32 four chunks, of which the first keeps its cosines.
            None if hardware.num_streaming_multiprocessors.is_some() => (12_800, 224 << 20),
            // Three tiles of 64 classes, in f32.
            None if run.strategy == Strategy::Forced(Variant::Cmma) => {
                (2048, 3 * 64 * 2048 * size_of::<f32>() as u64)
            }
            None => continue,
        };
        let dim = 12;
        let logits = (size * size * size_of::<f32>()) as u64;
        let operands = (4 * size * dim * size_of::<f32>()) as u64;
        // Packed operands and the pool's pages may take as much as the operands a few times over.
        let most = 2 * workspace + 30 * operands;
        assert!(
            logits > 40 * operands && logits > most,
            "the shape does not tell"
        );
        let problem = Problem::plain((1, size, dim, size, size));
        let data = problem.data();
        run.client
            .memory_cleanup()
            .expect("memory can be cleaned up");
        let before = reserved(run.client);
        for together in [false, true] {
            let _kept = answer(
                &run,
                &problem,
                &data.embeddings,
                &data.weights,
                &data.labels,
                together,
            );
        }
        let grown = reserved(run.client).saturating_sub(before);
        assert!(
            grown < most,
            "on {run}: {grown} bytes more, [N, K] is {logits}"
        );
    }
}

/// Of classes with the very same weights the first is predicted, in every tile.
#[test]
fn of_equal_classes_the_first_is_predicted() {
    let mut problem = Problem::plain((2, 75, 40, 123, 123));
    // By which a row's own class is not the highest of its equals any more, but still predicted.
    problem.margin = (0.0, 0.1);
    let data = problem.data();
    let (classes, dim, unlike) = (123, 40, 41);
    let w: Vec<f32> = (0..2 * classes)
        .flat_map(|row| {
            let like = row / classes * classes + row % classes % unlike;
            data.weights[like * dim..][..dim].to_vec()
        })
        .collect();
    let first_only = Problem {
        sizes: (2, 75, 40, 123, unlike),
        ..problem.clone()
    };
    let labels = vec![0; data.labels.len()];
    for run in fused_runs(problem.sizes) {
        for together in [false, true] {
            let of = |problem: &Problem| {
                answer(&run, problem, &data.embeddings, &w, &labels, together).predictions
            };
            assert_eq!(of(&problem), of(&first_only), "on {run}");
        }
    }
}

#[test]
fn a_handle_that_begins_inside_its_allocation_gives_the_same_logits() {
    // Only the CPU: other devices ask for their own alignment of offsets.
    for device in devices().iter().filter(|device| device.name == "cpu") {
        starts_inside(&device.client);
    }
}

fn starts_inside(client: &Client) {
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
