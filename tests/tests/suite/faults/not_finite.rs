//! Numbers that are none: what they reach, and what they do not.

use cubecl::client::Client;
use cubecl::std::tensor::TensorHandle;
use protohead::class_means::ClassSums;
use protohead::cosine_cross_entropy::{Inputs, Margin, Options};
use protohead::{LossOptions, Reduction, Upstream, cross_entropy, reconstruction};
use protohead_tests::devices::{fused_runs, runs};
use protohead_tests::problem::{Problem, download};

use crate::support::{all_three, f32s, labels, step};

const BAD: [f32; 3] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];

/// More rows than a panel or a tile holds, more classes than a block; the row that is bad lies in the first head.
const HEADS: usize = 2;
const ROWS: usize = 70;
const DIM: usize = 5;
const CLASSES: usize = 150;
const ROW: usize = 41;

fn problem() -> Problem {
    Problem::plain((HEADS, ROWS, DIM, CLASSES, CLASSES))
}

fn targets(client: &Client) -> TensorHandle {
    let of: Vec<i32> = (0..ROWS).map(|n| (n * 37 % CLASSES) as i32).collect();
    labels(client, &of)
}

fn by_row() -> LossOptions {
    LossOptions {
        reduction: Reduction::None,
        ..LossOptions::default()
    }
}

/// The values of the row [`ROW`] are NaN, and those of the others what they are without it.
fn alone(what: &str, values: &[f64], clean: &[f64], columns: usize) {
    let rows = values.chunks(columns).zip(clean.chunks(columns));
    for (row, (values, clean)) in rows.enumerate() {
        if row == ROW {
            assert!(values.iter().all(|v| v.is_nan()), "{what}: {values:?}");
        } else {
            assert_eq!(values, clean, "{what}, row {row}");
        }
    }
}

#[test]
fn a_row_of_the_fused_op_stays_alone() {
    let data = problem().data();
    for (run, bad, has_margin) in fused_runs(problem().sizes)
        .iter()
        .flat_map(|run| BAD.map(|bad| (run, bad)))
        .flat_map(|(run, bad)| [false, true].map(|has_margin| (run, bad, has_margin)))
    {
        let client = run.client;
        let mut values = data.embeddings.clone();
        values[ROW * DIM + 2] = bad;
        let margin = Margin {
            angular: 0.5,
            cosine: 0.1,
        };
        let options = Options {
            margin: if has_margin {
                margin
            } else {
                Margin::default()
            },
            loss: by_row(),
            strategy: run.strategy,
            ..Options::default()
        };
        let of = |values: &[f32], at_once: bool| {
            let inputs = Inputs {
                embeddings: f32s(client, values, &[HEADS, ROWS, DIM]),
                weights: f32s(client, &data.weights, &[HEADS, CLASSES, DIM]),
                labels: targets(client),
            };
            let (output, gradients) =
                step(client, &inputs, &options, &Upstream::default(), at_once);
            let gradients = all_three(gradients).expect("asked for");
            (
                download(client, &output.loss),
                gradients.map(|gradient| download(client, &gradient)),
                output.read_predictions(client).expect("valid"),
            )
        };
        for at_once in [false, true] {
            let (loss, [dx, dw, ds], mut predicted) = of(&values, at_once);
            let (clean_loss, [clean_dx, clean_dw, clean_ds], mut clean_predicted) =
                of(&data.embeddings, at_once);
            alone(&format!("loss on {run}"), &loss, &clean_loss, 1);
            alone(&format!("dX on {run}"), &dx, &clean_dx, DIM);
            // Every class weight of its own head has a part of it, and none of the other.
            let (reached, other) = dw.split_at(CLASSES * DIM);
            assert!(reached.iter().all(|v| v.is_nan()), "dW on {run}");
            assert_eq!(other, &clean_dw[CLASSES * DIM..], "dW on {run}");
            assert!(ds[0].is_nan(), "ds on {run}: {ds:?}");
            assert_eq!(ds[1], clean_ds[1], "ds on {run}");
            assert_eq!(predicted[ROW], 0, "on {run}: no class is the highest");
            (predicted[ROW], clean_predicted[ROW]) = (0, 0);
            assert_eq!(predicted, clean_predicted, "on {run}");
        }
    }
}

#[test]
fn a_row_of_logits_stays_alone() {
    let clean = problem().uniform(7, HEADS * ROWS * CLASSES);
    let mut values = clean.clone();
    values[ROW * CLASSES + 130] = f32::NAN;
    for run in runs() {
        let client = run.client;
        let options = cross_entropy::Options {
            loss: by_row(),
            strategy: run.strategy,
        };
        let of = |values: &[f32]| {
            let inputs = cross_entropy::Inputs {
                logits: f32s(client, values, &[HEADS, ROWS, CLASSES]),
                labels: targets(client),
            };
            let output = cross_entropy::forward(client, &inputs, &options).expect("valid");
            let upstream = Upstream::default();
            let gradient = cross_entropy::backward(client, &inputs, &options, &output, &upstream)
                .expect("valid");
            [output.loss, gradient].map(|tensor| download(client, &tensor))
        };
        let ([loss, dz], [clean_loss, clean_dz]) = (of(&values), of(&clean));
        alone(&format!("loss on {run}"), &loss, &clean_loss, 1);
        alone(&format!("dz on {run}"), &dz, &clean_dz, CLASSES);
    }
}

#[test]
fn a_row_of_a_reconstruction_stays_alone() {
    let clean = problem().uniform(1, ROWS * DIM);
    let parts = [2, 3].map(|purpose| problem().uniform(purpose, ROWS * DIM));
    for (run, bad) in runs().iter().flat_map(|run| BAD.map(|bad| (run, bad))) {
        let client = run.client;
        let mut values = clean.clone();
        values[ROW * DIM + 2] = bad;
        let options = reconstruction::Options {
            strategy: run.strategy,
        };
        let of = |values: &[f32]| {
            let [first, second] = parts
                .each_ref()
                .map(|part| f32s(client, part, &[ROWS, DIM]));
            let inputs = reconstruction::Inputs {
                whole: f32s(client, values, &[ROWS, DIM]),
                first,
                second,
            };
            let output = reconstruction::forward(client, &inputs, &options).expect("valid");
            let gradients = reconstruction::backward(
                client,
                &inputs,
                &options,
                &Upstream::default(),
                reconstruction::Wanted::ALL,
            )
            .expect("valid");
            let (whole, part) = (gradients.whole, gradients.part);
            [
                output.cosines,
                whole.expect("asked for"),
                part.expect("asked for"),
            ]
            .map(|tensor| download(client, &tensor))
        };
        let ([cosines, whole, part], [clean_cosines, clean_whole, clean_part]) =
            (of(&values), of(&clean));
        alone(&format!("cosines on {run}"), &cosines, &clean_cosines, 1);
        alone(&format!("d whole on {run}"), &whole, &clean_whole, DIM);
        alone(&format!("d part on {run}"), &part, &clean_part, DIM);
    }
}

#[test]
fn a_row_of_class_means_reaches_the_mean_of_its_class_alone() {
    let data = problem().data();
    let classes = 7;
    let of_rows: Vec<i32> = (0..ROWS).map(|n| (n * 5 % classes) as i32).collect();
    for (run, bad) in runs().iter().flat_map(|run| BAD.map(|bad| (run, bad))) {
        let client = run.client;
        let mut values = data.embeddings.clone();
        values[ROW * DIM + 2] = bad;
        for normalize in [false, true] {
            let options = protohead::class_means::Options {
                normalize,
                strategy: run.strategy,
                ..Default::default()
            };
            let of = |values: &[f32]| {
                let mut sums =
                    ClassSums::new(client, HEADS, classes, DIM, &options).expect("valid");
                let embeddings = f32s(client, values, &[HEADS, ROWS, DIM]);
                sums.accumulate(client, &embeddings, &labels(client, &of_rows))
                    .expect("valid");
                let weights = f32s(
                    client,
                    &data.weights[..HEADS * classes * DIM],
                    &[HEADS, classes, DIM],
                );
                download(client, &sums.means(client, &weights).expect("valid"))
            };
            let (means, clean) = (of(&values), of(&data.embeddings));
            let reached = of_rows[ROW] as usize * DIM;
            for (at, (mean, clean)) in means.iter().zip(&clean).enumerate() {
                // Of a row that is not normalized, only the coordinate.
                let is_reached = match normalize {
                    true => (reached..reached + DIM).contains(&at),
                    false => at == reached + 2,
                };
                match is_reached {
                    true if at == reached + 2 => {
                        assert!(!mean.is_finite(), "{at} on {run}: {mean}")
                    }
                    // The row's length is NaN, or infinite, and then the others are none of it.
                    true => assert_eq!(mean.is_nan(), bad.is_nan(), "{at} on {run}: {mean}"),
                    false => assert_eq!(mean, clean, "{at} on {run}"),
                }
            }
        }
    }
}
