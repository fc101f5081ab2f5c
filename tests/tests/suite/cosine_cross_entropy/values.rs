//! Values that random problems miss.

use cubecl::prelude::CubeElement;
use cubecl::std::tensor::TensorHandle;
use protohead::cosine_cross_entropy::{forward, forward_backward};
use protohead::{Reduction, Upstream, Wanted};
use protohead_tests::devices::fused_runs;
use protohead_tests::fused::arguments;
use protohead_tests::problem::{Data, Dtype, LabelDtype, LabelKind, Problem, download};

use super::{apart_and_at_once, check, expected};
use crate::support::{all_three, step};

/// The tolerances are not so wide that anything would do.
#[test]
fn gradients_of_zeros_would_be_noticed_in_every_dtype() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        for (scale, margin, zeroed) in [
            (16.0, (0.0, 0.0), ["dX", "ds at once"]),
            (64.0, (0.0, 0.35), ["dW at once", "ds"]),
            (16.0, (0.5, 0.0), ["dX", "ds"]),
            (64.0, (1.4, 0.1), ["dW at once", "ds at once"]),
        ] {
            let problem = Problem {
                dtype,
                scale,
                margin,
                ..Problem::plain((2, 60, 70, 80, 75))
            };
            let data = problem.data();
            let truth = expected::<f64>(&problem, &data);
            let working = expected::<f32>(&problem, &data);
            for run in fused_runs(problem.sizes) {
                if !problem.supported(run.client) {
                    continue;
                }
                for name in zeroed {
                    let checked = check(&run, &problem, &data, &truth, &working, name);
                    let error = checked.expect_err("zeros are no gradient");
                    assert!(error.starts_with(name), "{name} on {run}: {error}");
                }
            }
        }
    }
}

/// Every row and its class on an axis of their own.
fn each_on_its_axis(data: &mut Data, rows: usize, dim: usize) {
    for values in [&mut data.embeddings, &mut data.weights] {
        values.fill(0.0);
        (0..rows).for_each(|row| values[row * dim + row] = 2.0);
    }
    data.labels = (0..rows as i64).collect();
}

/// Rows that are sure of a class have probabilities of 1 and 0, however large their logits are: one that is right has no gradient, and
/// one that is wrong has that of its two classes.
#[test]
fn a_large_scale_leaves_sure_rows_exact() {
    let (rows, dim) = (8, 16);
    let problem = Problem {
        scale: 1e9,
        ..Problem::plain((1, rows, dim, rows, rows))
    };
    let mut data = problem.data();
    each_on_its_axis(&mut data, rows, dim);
    data.labels[0] = 1;
    for run in fused_runs(problem.sizes) {
        let (inputs, options) = arguments(&run, &problem, &data);
        let upstream = Upstream::Total(rows as f32 / 1e9);
        let mut of_row = vec![0.0; rows * dim];
        of_row[1] = -0.5;
        let mut of_classes = vec![0.0; rows * dim];
        of_classes[dim] = -0.5;
        for gradients in apart_and_at_once(&run, &inputs, &options, &upstream) {
            let [dx, dw] = [gradients.embeddings, gradients.weights]
                .map(|gradient| download(run.client, &gradient.expect("asked for")));
            // The rounding of the upstream gradient, and of its product with the scale.
            for (name, ours, exact) in [("dX", dx, &of_row), ("dW", dw, &of_classes)] {
                assert!(
                    ours.iter().zip(exact).all(|(a, b)| (a - b).abs() < 1e-6),
                    "{name} on {run}: {ours:?}"
                );
            }
        }
    }
}

/// A row as near to its class as to another has half a probability with each, however large its logits are.
#[test]
fn a_large_scale_leaves_ties_exact() {
    let (heads, rows, dim, classes) = (2, 3, 8, 3);
    let problem = Problem {
        scale: 1e9,
        ..Problem::plain((heads, rows, dim, classes, classes))
    };
    let mut data = problem.data();
    data.embeddings.fill(0.0);
    data.weights.fill(0.0);
    for row in 0..heads * rows {
        data.embeddings[row * dim] = 1.0 + (row % rows) as f32;
    }
    for weights in data.weights.chunks_mut(classes * dim) {
        weights[..2].copy_from_slice(&[3.0, 3.0]);
        weights[dim..dim + 2].copy_from_slice(&[3.0, -3.0]);
        weights[2 * dim] = -1.0;
    }
    data.labels = vec![0, 1, 0];
    let side = 0.5f64.sqrt();
    // A row pulls its own class towards itself with half a probability, and pushes the other with as much: what two rows do to each
    // class, the third undoes but for half.
    let mut of_classes = vec![0.0; classes * dim];
    let pulled = 0.5 * 0.5 / (3.0 * 2f64.sqrt());
    of_classes[..2].copy_from_slice(&[-pulled, pulled]);
    of_classes[dim..dim + 2].copy_from_slice(&[pulled, pulled]);
    for run in fused_runs(problem.sizes) {
        let (inputs, options) = arguments(&run, &problem, &data);
        let upstream = Upstream::Total(rows as f32 / 1e9);
        for gradients in apart_and_at_once(&run, &inputs, &options, &upstream) {
            let [dx, dw] = [gradients.embeddings, gradients.weights]
                .map(|gradient| download(run.client, &gradient.expect("asked for")));
            // The rounding of the upstream gradient, and of its product with the scale.
            for (row, dx) in dx.chunks(dim).enumerate() {
                let row = row % rows;
                let towards = if data.labels[row] == 0 { -side } else { side };
                let exact = towards / (1.0 + row as f64);
                assert!((dx[1] - exact).abs() < 1e-6, "row {row} on {run}: {dx:?}");
                assert!(dx[2..].iter().all(|&v| v == 0.0), "on {run}: {dx:?}");
            }
            for dw in dw.chunks(classes * dim) {
                assert!(
                    dw.iter()
                        .zip(&of_classes)
                        .all(|(a, b)| (a - b).abs() < 1e-6),
                    "on {run}: {dw:?}"
                );
            }
        }
    }
}

/// What is not finite stays in its row's gradient.
#[test]
fn an_infinite_gradient_of_one_row_leaves_the_others_alone() {
    let (heads, rows, dim) = (2, 5, 7);
    let problem = Problem {
        reduction: Reduction::None,
        ..Problem::plain((heads, rows, dim, 6, 6))
    };
    let data = problem.data();
    let mut infinite = data.upstream.clone();
    infinite[rows + 2] = f32::INFINITY;
    for (run, at_once) in fused_runs(problem.sizes)
        .into_iter()
        .flat_map(|run| [false, true].map(|at_once| (run, at_once)))
    {
        let (inputs, options) = arguments(&run, &problem, &data);
        let [plain, spoilt] = [&data.upstream, &infinite].map(|upstream| {
            let upstream = Upstream::Loss(TensorHandle::new_contiguous(
                [heads, rows],
                run.client.create_from_slice(f32::as_bytes(upstream)),
                Dtype::F32.elem(),
            ));
            let (_, gradients) = step(run.client, &inputs, &options, &upstream, at_once);
            download(run.client, &gradients.embeddings.expect("asked for"))
        });
        for (row, (plain, spoilt)) in plain.chunks(dim).zip(spoilt.chunks(dim)).enumerate() {
            let size = plain.iter().fold(0.0, |size: f64, v| size.max(v.abs()));
            // Another gradient may be the largest, which others are rounded beside.
            let close = |(a, b): (&f64, &f64)| (a - b).abs() <= 1e-5 * size;
            let right = match row == rows + 2 {
                true => !spoilt.iter().all(|v| v.is_finite()),
                false => plain.iter().zip(spoilt).all(close),
            };
            assert!(
                right,
                "row {row} on {run}, at once {at_once}: {plain:?}, with an infinite one {spoilt:?}"
            );
        }
    }
}

#[test]
fn a_scale_of_zero_makes_every_class_alike_and_predicts_the_first() {
    let problem = Problem {
        scale: 0.0,
        reduction: Reduction::None,
        ..Problem::plain((2, 19, 40, 90, 70))
    };
    let data = problem.data();
    for run in fused_runs(problem.sizes) {
        let (inputs, options) = arguments(&run, &problem, &data);
        let upstream = Upstream::Total(1.0);
        let done = forward_backward(run.client, &inputs, &options, &upstream, Wanted::BOTH);
        let (output, gradients) = done.expect("the operands are valid");
        let predicted = output.read_predictions(run.client).expect("valid labels");
        assert_eq!(predicted, vec![0; 38], "on {run}");
        for loss in output.read_loss(run.client).expect("valid labels") {
            // A sum of 70 ones, and a logarithm.
            assert!((loss - 70f32.ln()).abs() < 1e-6, "on {run}: {loss}");
        }
        for gradient in [gradients.embeddings, gradients.weights] {
            let gradient = download(run.client, &gradient.expect("asked for"));
            assert!(gradient.iter().all(|&g| g == 0.0), "on {run}: {gradient:?}");
        }
    }
}

/// Nearly the largest number: a factor of it would be infinite.
#[test]
fn the_largest_scale_gives_the_nearest_class_everything() {
    let (rows, dim) = (5, 5);
    let problem = Problem {
        scale: 3e38,
        reduction: Reduction::None,
        ..Problem::plain((1, rows, dim, rows, rows))
    };
    let mut data = problem.data();
    each_on_its_axis(&mut data, rows, dim);
    let with_margin = Problem {
        margin: (0.5, 0.1),
        ..problem.clone()
    };
    let runs = fused_runs(problem.sizes).into_iter();
    for (run, problem) in runs.flat_map(|run| [(run, &problem), (run, &with_margin)]) {
        let (inputs, options) = arguments(&run, problem, &data);
        let output = forward(run.client, &inputs, &options).expect("the operands are valid");
        let loss = output.read_loss(run.client).expect("the labels are valid");
        assert_eq!(loss, vec![0.0; rows], "on {run}");
        for gradients in apart_and_at_once(&run, &inputs, &options, &Upstream::Total(1.0)) {
            for gradient in all_three(gradients).expect("asked for") {
                let gradient = download(run.client, &gradient);
                assert!(gradient.iter().all(|&g| g == 0.0), "on {run}: {gradient:?}");
            }
        }
    }
}

/// Rows that point exactly at a class weight, exactly away from one, and everywhere between: there is no pole.
#[test]
fn every_angle_between_0_and_180_degrees_agrees_with_the_reference() {
    for (dtype, margin) in [
        (Dtype::F32, (0.0, 0.0)),
        (Dtype::F16, (0.0, 0.0)),
        (Dtype::F32, (0.5, 0.0)),
        (Dtype::F16, (0.5, 0.2)),
        (Dtype::Bf16, (1.4, 0.0)),
    ] {
        for dim in [2, 5] {
            let problem = Problem {
                dtype,
                margin,
                scale: 64.0,
                labels: LabelKind::Classes,
                ..Problem::plain((1, 37, dim, 3, 3))
            };
            let mut data = problem.data();
            let at = |degrees: usize| {
                let (y, x) = (degrees as f64).to_radians().sin_cos();
                let exact = |v: f64| {
                    problem
                        .dtype
                        .round(if v.abs() < 1e-9 { 0.0 } else { v as f32 })
                };
                [exact(x), exact(y)]
            };
            data.embeddings.fill(0.0);
            data.weights.fill(0.0);
            for (row, x) in data.embeddings.chunks_exact_mut(dim).enumerate() {
                x[..2].copy_from_slice(&at(5 * row));
            }
            for (class, w) in data.weights.chunks_exact_mut(dim).enumerate() {
                w[..2].copy_from_slice(&at(90 * class));
            }
            let truth = expected::<f64>(&problem, &data);
            let working = expected::<f32>(&problem, &data);
            for run in fused_runs(problem.sizes) {
                if problem.supported(run.client) {
                    check(&run, &problem, &data, &truth, &working, "")
                        .unwrap_or_else(|error| panic!("{dtype:?}, dim {dim}, on {run}: {error}"));
                }
            }
        }
    }
}

#[test]
fn one_class_has_no_loss_and_no_gradient() {
    let problem = Problem {
        label_dtype: LabelDtype::I64,
        scale: 30.0,
        reduction: Reduction::None,
        smoothing: 0.3,
        seed: 3,
        ..Problem::plain((2, 19, 40, 3, 1))
    };
    let with_margin = Problem {
        margin: (1.4, 0.1),
        ..problem.clone()
    };
    let data = problem.data();
    for (run, problem) in fused_runs(problem.sizes)
        .into_iter()
        .flat_map(|run| [&problem, &with_margin].map(|problem| (run, problem)))
    {
        let (inputs, options) = arguments(&run, problem, &data);
        let output = forward(run.client, &inputs, &options).expect("the operands are valid");
        let loss = output.read_loss(run.client).expect("the labels are valid");
        assert_eq!(loss, vec![0.0; 38], "on {run}");
        for gradients in apart_and_at_once(&run, &inputs, &options, &Upstream::Total(2.0)) {
            for gradient in all_three(gradients).expect("asked for") {
                let gradient = download(run.client, &gradient);
                assert!(gradient.iter().all(|&g| g == 0.0), "on {run}: {gradient:?}");
            }
        }
    }
}
