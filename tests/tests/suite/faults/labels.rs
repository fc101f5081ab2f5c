//! What only the device sees: labels that are no class.

use protohead::class_means::ClassSums;
use protohead::cosine_cross_entropy::{Inputs, Options, forward};
use protohead::{Error, LossOptions, LossOutput, LossValues, Reduction, Upstream, cross_entropy};
use protohead_tests::devices::{Run, fused_runs, runs};
use protohead_tests::problem::{LabelDtype, download};

use super::{floats, inputs};
use crate::support::{all_three, labels, step};

/// A class that is just too high, and a label that is as far from one as can be.
const BAD: [i32; 4] = [0, 3, 1, i32::MIN];
/// The same without them.
const IGNORED: [i32; 4] = [0, -100, 1, -100];

/// Whether reading the result of [`BAD`] labels is an error, and its loss that of [`IGNORED`] ones.
fn reported_and_ignored(run: &Run, bad: &LossOutput, ignored: &LossOutput) {
    let client = run.client;
    let error = Error::Label {
        row: 1,
        label: 3,
        active: 3,
        rows: 2,
    };
    assert_eq!(bad.read_total(client), Err(error), "on {run}");
    assert!(ignored.read_total(client).is_ok(), "on {run}");
    let totals = [bad, ignored].map(|output| download(client, &output.total));
    assert_eq!(totals[0], totals[1], "on {run}");
}

fn summed() -> LossOptions {
    LossOptions {
        reduction: Reduction::Sum,
        ..LossOptions::default()
    }
}

#[test]
fn a_bad_label_is_reported_and_its_row_counts_as_ignored() {
    for run in fused_runs((2, 4, 5, 3, 3)) {
        let client = run.client;
        let options = Options {
            loss: summed(),
            strategy: run.strategy,
            ..Options::default()
        };
        let of = |rows: &[i32], at_once: bool| {
            let inputs = Inputs {
                labels: labels(client, rows),
                ..inputs(client)
            };
            let (output, gradients) =
                step(client, &inputs, &options, &Upstream::default(), at_once);
            let gradients = all_three(gradients).expect("asked for");
            let gradients = gradients.map(|gradient| download(client, &gradient));
            (output, gradients)
        };
        for at_once in [false, true] {
            let (bad, of_bad) = of(&BAD, at_once);
            let (ignored, of_ignored) = of(&IGNORED, at_once);
            reported_and_ignored(&run, &bad, &ignored);
            assert_eq!(of_bad, of_ignored, "on {run}");
        }
    }
}

#[test]
fn a_bad_label_of_given_logits_is_reported_and_its_row_counts_as_ignored() {
    for run in runs() {
        let client = run.client;
        let options = cross_entropy::Options {
            loss: summed(),
            strategy: run.strategy,
        };
        let of = |rows: &[i32]| {
            let inputs = cross_entropy::Inputs {
                logits: floats(client, &[2, 4, 3]),
                labels: labels(client, rows),
            };
            let output = cross_entropy::forward(client, &inputs, &options)
                .expect("the host sees nothing wrong");
            let upstream = Upstream::default();
            let gradient = cross_entropy::backward(client, &inputs, &options, &output, &upstream)
                .expect("the host sees nothing wrong");
            (output, download(client, &gradient))
        };
        let (bad, of_bad) = of(&BAD);
        let (ignored, of_ignored) = of(&IGNORED);
        reported_and_ignored(&run, &bad, &ignored);
        assert_eq!(of_bad, of_ignored, "on {run}");
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
        let means = sums.means(client, &weights).expect("they fit");
        assert_eq!(
            download(client, &means),
            download(client, &weights),
            "on {run}"
        );
        let bad = Error::Label {
            row: 0,
            label: 7,
            active: 3,
            rows: 3,
        };
        assert_eq!(sums.check(client), Err(bad.clone()), "on {run}");
        assert_eq!(sums.read_counts(client), Err(bad), "on {run}");
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

/// The first of several batches, of blocks of rows that are sorted apart, and of states that are merged; rows are streamed or sorted.
#[test]
fn the_first_bad_label_of_class_means_is_told_in_every_dtype() {
    const ROWS: usize = 5000;
    for (run, classes) in runs()
        .into_iter()
        .flat_map(|run| [3, 40_000].map(|classes| (run, classes)))
    {
        let client = run.client;
        let options = protohead::class_means::Options {
            strategy: run.strategy,
            ..Default::default()
        };
        for (dtype, first, later) in [
            (LabelDtype::I32, i64::from(i32::MIN), -1),
            (LabelDtype::I32, i64::from(i32::MAX), -1),
            (LabelDtype::I64, -(1 << 40) - 3, 1 << 33),
            (LabelDtype::I64, (1 << 40) + 1, i64::MIN),
            (LabelDtype::U32, i64::from(u32::MAX), 40_000),
            // What the ignored label would be if u32 could hold it.
            (LabelDtype::U32, i64::from(-100i32 as u32), 40_000),
        ] {
            if !client.properties().supports_type(dtype.elem()) {
                continue;
            }
            let mut sums = ClassSums::new(client, 1, classes, 2, &options).expect("valid");
            let add = |sums: &mut ClassSums, bad: &[(usize, i64)]| {
                let mut rows = vec![1; ROWS];
                for &(row, label) in bad {
                    rows[row] = label;
                }
                let rows = dtype.upload(client, &rows);
                sums.accumulate(client, &floats(client, &[1, ROWS, 2]), &rows)
                    .expect("the host sees nothing wrong");
            };
            let told = |row, rows| {
                Err(Error::Label {
                    row,
                    label: first,
                    active: classes,
                    rows,
                })
            };
            add(&mut sums, &[]);
            assert!(sums.read_counts(client).is_ok(), "on {run}");
            add(
                &mut sums,
                &[(3333, first), (3334, later), (3333 + 256, later)],
            );
            assert_eq!(sums.read_counts(client), told(3333, 3), "on {run}");
            add(&mut sums, &[(0, later)]);
            assert_eq!(sums.read_counts(client), told(3333, 4), "on {run}");
            let mut merged = ClassSums::new(client, 1, classes, 2, &options).expect("valid");
            merged.merge(client, &sums).expect("alike");
            assert_eq!(merged.read_counts(client), told(3333, 4), "on {run}");
            let mut other = ClassSums::new(client, 1, classes, 2, &options).expect("valid");
            add(&mut other, &[(7, later)]);
            merged.merge(client, &other).expect("alike");
            assert_eq!(merged.read_counts(client), told(3333, 5), "on {run}");
            let mut clean = ClassSums::new(client, 1, classes, 2, &options).expect("valid");
            add(&mut clean, &[]);
            clean.merge(client, &sums).expect("alike");
            assert_eq!(clean.read_counts(client), told(3333, 4), "on {run}");
        }
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
                label: 3,
                active: 3,
                rows: 1,
            };
            assert_eq!(of(&[0, -100, 1, 3]).read(client), Err(bad), "on {run}");
        }
    }
}
