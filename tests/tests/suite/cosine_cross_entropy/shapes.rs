//! Shapes that random problems miss, and workspaces that do not hold them.

use protohead::cosine_cross_entropy::forward_backward;
use protohead::{Reduction, Strategy, Upstream, Variant, Wanted};
use protohead_tests::devices::{Run, all_runs, fused_runs};
use protohead_tests::fused::arguments;
use protohead_tests::problem::{Dtype, LabelDtype, LabelKind, Problem, download};

use super::{agrees_on, apart_and_at_once};
use crate::support::{bytes, failed_once, long_rows};

#[test]
fn shapes_that_random_problems_miss_agree_on_gpus() {
    for (variant, sizes) in [
        // A chunk of three tiles of classes and one of a single tile, each in two parts, of which one then has no tile.
        (Variant::Cmma, (1, 40, 19, 250, 245)),
        // Four chunks, of which the first keeps its cosines, and five, of which none does; several tiles of rows.
        (Variant::Cmma, (2, 70, 19, 600, 590)),
        (Variant::Cmma, (2, 9, 19, 800, 790)),
        // More slabs than a GPU has at a time, an odd number of tiles.
        (Variant::Wgmma, (2, 300, 600, 700, 690)),
        (Variant::Wgmma, (1, 140, 130, 200, 190)),
        // Units that keep four vectors of columns of a row.
        (Variant::Small, (2, 9, 1000, 12, 11)),
    ] {
        let margin = (0.3, 0.2);
        for (dtype, margin) in [
            (Dtype::F32, (0.0, 0.0)),
            (Dtype::F16, (0.0, 0.0)),
            (Dtype::F32, margin),
            (Dtype::F16, margin),
        ] {
            let problem = Problem {
                dtype,
                margin,
                labels: LabelKind::SomeIgnored,
                smoothing: 0.1,
                seed: 7,
                ..Problem::plain(sizes)
            };
            let forced = |run: &Run| run.strategy == Strategy::Forced(variant);
            let runs = all_runs().into_iter().filter(forced).collect();
            agrees_on(&problem, runs).unwrap_or_else(|error| panic!("{problem:?}: {error}"));
        }
    }
}

#[test]
fn long_rows_agree_with_the_reference() {
    for problem in long_rows() {
        agrees_on(&problem, fused_runs(problem.sizes))
            .unwrap_or_else(|error| panic!("{problem:?}: {error}"));
    }
}

#[test]
fn problems_that_failed_once_agree_with_the_reference() {
    for problem in failed_once() {
        agrees_on(&problem, fused_runs(problem.sizes))
            .unwrap_or_else(|error| panic!("{problem:?}: {error}"));
    }
}

#[test]
fn shapes_beyond_one_workspace_agree_with_the_reference() {
    let plain = Problem {
        label_dtype: LabelDtype::I64,
        labels: LabelKind::SomeIgnored,
        smoothing: 0.1,
        weighted: true,
        seed: 5,
        ..Problem::plain((1, 1, 1, 1, 1))
    };
    for (sizes, dtype) in [
        // Rows in chunks that split a head; gradients of the weights carried in themselves.
        ((2, 3001, 5, 3003, 3000), Dtype::F32),
        // Rows in chunks that hold whole heads.
        ((3, 1501, 5, 3003, 3000), Dtype::Bf16),
        // More rows than are packed at once; gradients of less than f32 carried beside.
        ((1, 81_000, 3, 4, 3), Dtype::F16),
        // The same, where the chunk that ends a head begins the next.
        ((2, 3968, 1024, 40, 40), Dtype::F16),
        // More heads than have their class weights packed together; both ways to carry gradients.
        ((3000, 33, 3, 9, 8), Dtype::F32),
        ((3000, 33, 3, 9, 8), Dtype::Bf16),
        // Classes in chunks, in a backward pass of its own with 16 lanes.
        ((1, 3, 2, 450_000, 450_000), Dtype::F32),
    ] {
        let problem = Problem {
            sizes,
            dtype,
            margin: match dtype {
                Dtype::F32 => (0.3, 0.2),
                Dtype::F16 | Dtype::Bf16 => (0.0, 0.0),
            },
            ..plain.clone()
        };
        let on_cpu = |run: &Run| run.strategy == Strategy::Forced(Variant::Unit);
        let runs = fused_runs(problem.sizes)
            .into_iter()
            .filter(on_cpu)
            .collect();
        agrees_on(&problem, runs).unwrap_or_else(|error| panic!("{problem:?}: {error}"));
    }
}

/// More pairs of a row and a class than 31 bits count.
#[test]
fn two_thousand_million_logits_give_the_loss_and_the_gradients_of_a_uniform_softmax() {
    let (rows, classes) = (46_400, 46_400);
    assert!(rows * classes > 1 << 31);
    uniform_softmax(rows, classes, Variant::Unit);
}

/// A workspace of logits that is larger than the 128 MiB that WebGPU guarantees, which is all that software Vulkan has.
#[test]
fn a_chunk_of_logits_fits_the_buffers_of_any_gpu() {
    let (rows, classes) = (704, 50_000);
    assert!(rows * classes * size_of::<f32>() > 128 << 20);
    uniform_softmax(rows, classes, Variant::Plane);
}

/// All class weights are alike, so that every probability is 1/K.
fn uniform_softmax(rows: usize, classes: usize, variant: Variant) {
    let dim = 2;
    let mut problem = Problem::plain((1, rows, dim, classes, classes));
    problem.reduction = Reduction::Mean;
    let mut data = problem.data();
    for row in data.embeddings.chunks_mut(dim) {
        row.copy_from_slice(&[0.6, 0.8]);
    }
    for row in data.weights.chunks_mut(dim) {
        row.copy_from_slice(&[2.0, 0.0]);
    }
    data.labels.fill(7);
    for run in all_runs()
        .into_iter()
        .filter(|run| run.strategy == Strategy::Forced(variant))
    {
        let client = run.client;
        let (inputs, options) = arguments(&run, &problem, &data);
        let (output, gradients) = forward_backward(
            client,
            &inputs,
            &options,
            &Upstream::Total(1.0),
            Wanted::BOTH,
        )
        .expect("valid");
        // Half a unit in the last place for each of so many additions.
        let rounding = classes as f64 * f64::from(f32::EPSILON) / 2.0;
        let loss = f64::from(output.read_total(client).expect("valid"));
        let expected = (classes as f64).ln();
        assert!((loss - expected).abs() <= rounding, "{loss} on {run}");
        let predictions = output.read_predictions(client).expect("valid");
        assert!(predictions.iter().all(|&class| class == 0), "on {run}");
        let dx = download(client, &gradients.embeddings.expect("asked for"));
        let largest = dx.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
        assert!(
            largest <= 16.0 / rows as f64 * rounding,
            "{largest} on {run}"
        );
        // (probability − 1 at the target) · scale · what of a unit row stands upright on the weight, over its length.
        let upright = 16.0 * 0.8 / 2.0;
        let dw = download(client, &gradients.weights.expect("asked for"));
        for (class, gradient) in dw.chunks(dim).enumerate() {
            let target = if class == 7 { 1.0 } else { 0.0 };
            let expected = upright * (1.0 / classes as f64 - target);
            let error = (gradient[1] - expected).abs();
            let of = expected.abs() * rounding;
            assert!(
                error <= of && gradient[0].abs() <= of,
                "class {class} on {run}: {gradient:?}"
            );
        }
    }
}

/// On a CPU these classes have exponentials that fit nowhere, and nothing is gained by one launch.
#[test]
fn a_step_whose_exponentials_fit_nowhere_is_a_forward_and_a_backward_pass() {
    // A panel of rows is 8 or more; a workspace has 60 MiB, or 8 MiB a core.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let classes = (cores << 18).max(1 << 21) + 7;
    let problem = Problem::plain((1, 3, 3, classes, classes));
    let data = problem.data();
    for run in fused_runs(problem.sizes) {
        if run.strategy != Strategy::Forced(Variant::Unit) {
            continue;
        }
        let (inputs, options) = arguments(&run, &problem, &data);
        let [apart, at_once] = apart_and_at_once(&run, &inputs, &options, &Upstream::Total(1.0))
            .map(|gradients| {
                let (dx, dw) = (gradients.embeddings, gradients.weights);
                let (dx, dw) = (dx.expect("asked for"), dw.expect("asked for"));
                bytes(run.client, &[&dx, &dw])
            });
        assert!(apart == at_once, "on {run}");
        assert!(apart.iter().flatten().any(|&byte| byte != 0), "on {run}");
    }
}

/// On a CPU exponentials take the place of the gradient of the class weights until that is there. Rows that are ignored, before
/// those that count, take it from them: then all wait in the workspace, or, where classes are too many for that (with 8 lanes or more,
/// and up to 15 cores), the logits of the rows that find no place are computed again.
#[test]
fn exponentials_kept_in_the_gradient_give_the_bits_of_those_kept_elsewhere_or_computed_again() {
    let (none, margin) = ((0.0, 0.0), (0.3, 0.2));
    for (dtype, gap, heads, rows, ignored, dim, active, margin) in [
        (Dtype::F32, 0, 2, 35, 35, 64, 7_001, none),
        (Dtype::F32, 3, 2, 35, 35, 64, 7_001, margin),
        (Dtype::F16, 0, 2, 35, 35, 128, 7_001, margin),
        (Dtype::F16, 3, 2, 35, 35, 128, 7_001, none),
        (Dtype::F32, 0, 1, 50, 40, 64, 500_003, margin),
        (Dtype::Bf16, 0, 2, 25, 20, 64, 500_003, none),
    ] {
        let more = Problem {
            dtype,
            gap,
            margin,
            reduction: Reduction::None,
            smoothing: 0.1,
            weighted: true,
            seed: 5,
            ..Problem::plain((heads, ignored + rows, dim, active + 2, active))
        };
        let mut data = more.data();
        data.labels[..ignored].fill(i64::from(more.ignore_index));
        let mut fewer = more.clone();
        fewer.sizes.1 = rows;
        let mut some = data.clone();
        some.labels.drain(..ignored);
        some.embeddings = (data.embeddings.chunks((ignored + rows) * dim))
            .flat_map(|head| head[ignored * dim..].to_vec())
            .collect();
        for run in fused_runs(more.sizes) {
            if run.strategy != Strategy::Forced(Variant::Unit) {
                continue;
            }
            let [of_more, of_fewer] = [(&more, &data), (&fewer, &some)].map(|(problem, data)| {
                let (inputs, options) = arguments(&run, problem, data);
                let one = Upstream::Total(1.0);
                let (output, gradients) =
                    forward_backward(run.client, &inputs, &options, &one, Wanted::BOTH)
                        .expect("valid");
                let (dx, dw) = (gradients.embeddings, gradients.weights);
                let (dx, dw) = (dx.expect("asked for"), dw.expect("asked for"));
                let [loss, dx, dw] =
                    <[_; 3]>::try_from(bytes(run.client, &[&output.loss, &dx, &dw]))
                        .expect("three");
                // The rows that both have.
                let shared = |values: Vec<u8>| -> Vec<_> {
                    let both = rows * values.len() / (heads * problem.sizes.1);
                    (values.chunks(values.len() / heads))
                        .map(|head| head[head.len() - both..].to_vec())
                        .collect()
                };
                (shared(loss), shared(dx), dw)
            });
            let what = format!("of {dtype:?}, {active} classes, gap {gap}, on {run}");
            assert!(of_more.0 == of_fewer.0, "loss {what}");
            assert!(of_more.1 == of_fewer.1, "dX {what}");
            assert!(of_more.2 == of_fewer.2, "dW {what}");
            assert!(of_more.2.iter().any(|&byte| byte != 0), "dW is zero {what}");
        }
    }
}
