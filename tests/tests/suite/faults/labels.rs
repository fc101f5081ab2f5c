//! What only the device sees: labels that are no class, numbers that are none.

use cubecl::prelude::CubeElement;
use cubecl::std::tensor::TensorHandle;
use protohead::class_means::ClassSums;
use protohead::cosine_cross_entropy::{Inputs, Options, backward, forward};
use protohead::{Error, LossOptions, LossValues, Reduction, Upstream, Wanted};
use protohead_tests::devices::{fused_runs, runs};
use protohead_tests::problem::{Dtype, download};

use super::{floats, inputs, labels};

#[test]
fn a_bad_label_is_reported_and_its_row_counts_as_ignored() {
    for run in fused_runs((2, 4, 5, 3, 3)) {
        let client = run.client;
        let options = Options {
            loss: LossOptions {
                reduction: Reduction::Sum,
                ..LossOptions::default()
            },
            strategy: run.strategy,
            ..Options::default()
        };
        let of = |rows: &[i32]| {
            let inputs = Inputs {
                labels: labels(client, rows),
                ..inputs(client)
            };
            let output = forward(client, &inputs, &options).expect("the host sees nothing wrong");
            let gradients = backward(
                client,
                &inputs,
                &options,
                &output,
                &Upstream::default(),
                Wanted::BOTH,
            )
            .expect("the host sees nothing wrong");
            let [dx, dw] = [gradients.embeddings, gradients.weights]
                .map(|gradient| download(client, &gradient.expect("asked for")));
            (output, dx, dw)
        };
        let (bad, bad_dx, bad_dw) = of(&[0, 3, 1, i32::MIN]);
        let (ignored, dx, dw) = of(&[0, -100, 1, -100]);
        assert_eq!(
            bad.read_total(client),
            Err(Error::Label {
                row: 1,
                label: Some(3),
                active: 3,
                rows: 2
            }),
            "on {run}"
        );
        assert!(ignored.read_total(client).is_ok(), "on {run}");
        assert_eq!(
            download(client, &bad.total),
            download(client, &ignored.total),
            "on {run}"
        );
        assert_eq!((bad_dx, bad_dw), (dx, dw), "on {run}");
    }
}

#[test]
fn a_bad_label_leaves_class_means_untouched_and_is_reported() {
    for run in runs() {
        let client = run.client;
        let options = protohead::class_means::Options {
            strategy: run.strategy,
            ..Default::default()
        };
        let mut sums = ClassSums::new(client, 2, 3, 5, &options).expect("valid");
        sums.accumulate(
            client,
            &floats(client, &[2, 4, 5]),
            &labels(client, &[7, -1, 3, -100]),
        )
        .expect("the host sees nothing wrong");
        let weights = floats(client, &[2, 3, 5]);
        let means = sums.write_means(client, &weights).expect("they fit");
        assert_eq!(
            download(client, &means),
            download(client, &weights),
            "on {run}"
        );
        assert_eq!(
            sums.read_counts(client),
            Err(Error::Label {
                row: 0,
                label: None,
                active: 3,
                rows: 3
            }),
            "on {run}"
        );
        let unit_rows = protohead::class_means::Options {
            normalize: true,
            ..options.clone()
        };
        let other = ClassSums::new(client, 2, 3, 5, &unit_rows).expect("valid");
        assert_eq!(
            sums.merge(client, &other),
            Err(Error::MixedSums { normalized: true })
        );
    }
}

#[test]
fn what_is_read_at_once_is_what_is_read_apart() {
    for run in fused_runs((2, 4, 5, 3, 3)) {
        let client = run.client;
        for reduction in [Reduction::Mean, Reduction::None] {
            let options = Options {
                loss: LossOptions {
                    reduction,
                    head_weights: Some(vec![0.5, 2.0]),
                    ..LossOptions::default()
                },
                strategy: run.strategy,
                ..Options::default()
            };
            let of = |rows: &[i32]| {
                let inputs = Inputs {
                    labels: labels(client, rows),
                    ..inputs(client)
                };
                forward(client, &inputs, &options).expect("the host sees nothing wrong")
            };
            let output = of(&[0, -100, 1, 2]);
            let apart = LossValues {
                total: output.read_total(client).expect("valid"),
                loss: output.read_loss(client).expect("valid"),
                predictions: output.read_predictions(client).expect("valid"),
                counted: 3,
            };
            assert_eq!(output.read(client), Ok(apart), "on {run}");
            let bad = Error::Label {
                row: 3,
                label: Some(3),
                active: 3,
                rows: 1,
            };
            assert_eq!(of(&[0, -100, 1, 3]).read(client), Err(bad), "on {run}");
        }
    }
}

#[test]
fn a_row_that_is_not_finite_stays_alone() {
    let runs = fused_runs((2, 4, 5, 3, 3));
    let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    for (run, bad) in runs.iter().flat_map(|run| bad.map(|bad| (run, bad))) {
        let client = run.client;
        let mut values = vec![0.5f32; 40];
        values
            .iter_mut()
            .enumerate()
            .for_each(|(i, v)| *v += (i % 7) as f32);
        let clean = values.clone();
        values[5 + 2] = bad; // head 0, row 1
        let of = |values: &[f32]| {
            let inputs = Inputs {
                embeddings: TensorHandle::new_contiguous(
                    [2, 4, 5],
                    client.create_from_slice(f32::as_bytes(values)),
                    Dtype::F32.elem(),
                ),
                ..inputs(client)
            };
            let options = Options {
                loss: LossOptions {
                    reduction: Reduction::None,
                    ..LossOptions::default()
                },
                strategy: run.strategy,
                ..Options::default()
            };
            let output = forward(client, &inputs, &options).expect("valid");
            let gradients = backward(
                client,
                &inputs,
                &options,
                &output,
                &Upstream::default(),
                Wanted::EMBEDDINGS,
            )
            .expect("valid");
            (
                download(client, &output.loss),
                download(client, &gradients.embeddings.expect("asked for")),
                output.read_predictions(client).expect("valid"),
            )
        };
        let (loss, dx, mut predicted) = of(&values);
        let (clean_loss, clean_dx, mut clean_predicted) = of(&clean);
        assert_eq!(predicted[1], 0, "on {run}: no class is the highest");
        (predicted[1], clean_predicted[1]) = (0, 0);
        assert_eq!(predicted, clean_predicted, "on {run}");
        for at in 0..8 {
            let row = at * 5..at * 5 + 5;
            if at == 1 {
                assert!(loss[at].is_nan(), "on {run}: loss {loss:?}");
                assert!(dx[row].iter().all(|v| v.is_nan()), "on {run}");
            } else {
                assert_eq!(loss[at], clean_loss[at], "on {run}");
                assert_eq!(dx[row.clone()], clean_dx[row], "on {run}");
            }
        }
    }
}
