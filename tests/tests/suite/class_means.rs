//! Prototype averaging against the reference.

use cubecl::bytes::Bytes;
use cubecl::client::Client;
use proptest::prelude::*;
use protohead::class_means::{ClassSums, Options};
use protohead::{Error, Strategy, Variant};
use protohead_reference as reference;
use protohead_tests::close::Comparison;
use protohead_tests::devices::{Run, runs, say_agreed};
use protohead_tests::problem::{Dtype, LabelDtype, LabelKind, Problem, download, problem};
use rand::RngExt;

use crate::support::{bytes, config, fails};

fn expected<T: reference::Real>(problem: &Problem, unit: bool) -> (Vec<T>, Vec<u32>) {
    let data = problem.data();
    let of = |values: &[f32]| -> Vec<T> { values.iter().map(|&v| T::of(f64::from(v))).collect() };
    let sizes = problem.reference_sizes();
    let mut sums = reference::ClassSums::zeros(sizes);
    let labels: Vec<i64> = data
        .labels
        .iter()
        .map(|&l| {
            if l == i64::from(problem.ignore_index) {
                -1
            } else {
                l
            }
        })
        .collect();
    sums.add(&of(&data.embeddings), &labels, sizes, unit);
    (
        reference::class_means(&sums, &of(&data.weights), sizes),
        sums.counts,
    )
}

/// Sums of no rows yet, in buffers that hold no number.
fn fresh(client: &Client, sizes: [usize; 3], options: &Options) -> Result<ClassSums, Error> {
    let [heads, classes, dim] = sizes;
    let sums = ClassSums::new(client, heads, classes, dim, options)?;
    for tensor in [sums.sums(), sums.carries(), sums.counts(), sums.status()] {
        let elements = tensor.shape().iter().product();
        let nothing = vec![u32::MAX; elements]; // NaN, as f32
        client.write(&tensor.handle, Bytes::from_elems(nothing));
    }
    Ok(sums)
}

/// How two batches become one state.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    /// One after the other.
    Streamed,
    /// Each has a state, and one is merged into the other.
    Merged,
    /// The state of the first is merged into a new one, which then gets the second.
    Resumed,
}

/// Accumulates the rows in two batches, split at `split`.
fn means(
    run: &Run,
    problem: &Problem,
    unit: bool,
    split: usize,
    way: Way,
) -> Result<(Vec<f64>, Vec<u32>), String> {
    let client = run.client;
    let data = problem.data();
    let (heads, rows, dim, classes, active) = problem.sizes;
    let said = |error: protohead::Error| error.to_string();
    let options = Options {
        normalize: unit,
        ignore_index: problem.ignore_index,
        strategy: run.strategy,
    };
    let fresh = || fresh(client, [heads, active, dim], &options).map_err(said);
    let mut sums = fresh()?;
    let mut other = fresh()?;
    for (first, last) in [(0, split), (split, rows)] {
        if first == last {
            continue;
        }
        let part: Vec<f32> = (0..heads)
            .flat_map(|h| {
                data.embeddings[(h * rows + first) * dim..(h * rows + last) * dim].to_vec()
            })
            .collect();
        let embeddings = problem.upload(client, &part, &[heads, last - first, dim]);
        let labels = problem.upload_labels(client, &data.labels[first..last]);
        if way == Way::Resumed && first > 0 {
            let mut resumed = fresh()?;
            resumed.merge(client, &sums).map_err(said)?;
            sums = resumed;
        }
        let into = if way == Way::Merged && first > 0 {
            &mut other
        } else {
            &mut sums
        };
        let before = bytes(client, &[&embeddings, &labels]);
        into.accumulate(client, &embeddings, &labels)
            .map_err(said)?;
        if bytes(client, &[&embeddings, &labels]) != before {
            return Err("the operands were modified".into());
        }
    }
    if way == Way::Merged {
        sums.merge(client, &other).map_err(said)?;
    }
    let weights = problem.upload(client, &data.weights, &[heads, classes, dim]);
    let before = bytes(client, &[&weights]);
    let means = sums.means(client, &weights).map_err(said)?;
    if bytes(client, &[&weights]) != before {
        return Err("the class weights were modified".into());
    }
    Ok((
        download(client, &means),
        sums.read_counts(client).map_err(said)?,
    ))
}

fn check(run: &Run, problem: &Problem, unit: bool, split: usize) -> Result<(), String> {
    let (truth, counts) = expected::<f64>(problem, unit);
    let (working, _) = expected::<f32>(problem, unit);
    let whole = means(run, problem, unit, 0, Way::Streamed)?;
    let streamed = means(run, problem, unit, split, Way::Streamed)?;
    let resumed = means(run, problem, unit, split, Way::Resumed)?;
    let merged = means(run, problem, unit, split, Way::Merged)?;
    if whole != streamed || whole != resumed {
        return Err(format!("a batch split at {split} gives other bits"));
    }
    if run.strategy == Strategy::Forced(Variant::Unit) {
        // Where nothing is forced a small batch takes fewer cores.
        let inferred = Run {
            strategy: Strategy::Inferred,
            ..*run
        };
        if whole != means(&inferred, problem, unit, split, Way::Streamed)? {
            return Err("on fewer cores there are other bits".into());
        }
    }
    for (name, (ours, our_counts)) in [("means", &whole), ("merged means", &merged)] {
        if *our_counts != counts {
            return Err(format!(
                "{name}: counts {our_counts:?}, expected {counts:?}"
            ));
        }
        Comparison {
            name,
            ours,
            truth: &truth,
            working: &working,
            dtype: problem.dtype,
            magnitude: 0.0,
            kept: 0.0,
            rounded: 0.0,
            lengths: &[],
        }
        .check()?;
    }
    Ok(())
}

/// Many blocks of rows; more classes than a cube has units; more classes than rows; more heads and columns than lanes.
#[test]
fn many_blocks_of_rows_and_of_classes_agree_with_the_reference() {
    let plain = Problem {
        label_dtype: LabelDtype::I64,
        gap: 3,
        labels: LabelKind::SomeIgnored,
        seed: 9,
        ..Problem::plain((1, 1, 1, 1, 1))
    };
    for (sizes, unit) in [
        ((2, 20_001, 7, 5, 4), false),
        // Most classes have no rows, and of the others most none in both batches.
        ((2, 50, 16, 3_000, 2_900), false),
        ((1, 9_001, 12, 1_000, 999), true),
        ((3, 300, 8, 2_000, 2_000), false),
        ((1, 2_500, 40, 1, 1), true),
        // Sums that no cache holds; columns that fill no vector, and no part of the work.
        ((1, 500, 335, 300, 299), true),
        ((2, 400, 1_040, 70, 64), false),
    ] {
        let problem = Problem {
            sizes,
            ..plain.clone()
        };
        agrees(&problem, unit);
    }
}

fn agrees(problem: &Problem, unit: bool) {
    for run in runs() {
        if problem.supported(run.client) {
            check(&run, problem, unit, problem.sizes.1 / 3)
                .unwrap_or_else(|error| panic!("{problem:?} on {}: {error}", run.device));
            say_agreed("class_means", &run, problem.dtype);
        }
    }
}

/// Too large sums to stream past, in full vectors: several blocks of a class's rows, and columns that are not read side by side.
#[test]
fn sorted_rows_in_vectors_agree_with_the_reference() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        for (sizes, unit, gap) in [
            ((1, 900, 1_024, 40, 36), true, 0),
            ((2, 400, 608, 64, 60), false, 16),
            ((1, 90, 4_112, 9, 9), true, 16),
            ((3, 257, 48, 1_000, 990), true, 0),
        ] {
            let problem = Problem {
                dtype,
                gap,
                labels: LabelKind::SomeIgnored,
                seed: 5,
                ..Problem::plain(sizes)
            };
            agrees(&problem, unit);
        }
    }
}

#[test]
fn a_state_without_rows_changes_nothing() {
    let problem = Problem::plain((2, 5, 6, 9, 4));
    let data = problem.data();
    for run in runs() {
        let client = run.client;
        let options = Options {
            strategy: run.strategy,
            ..Options::default()
        };
        let fresh = || fresh(client, [2, 4, 6], &options).expect("valid");
        let weights = problem.upload(client, &data.weights, &[2, 9, 6]);
        let mut sums = fresh();
        sums.merge(client, &fresh()).expect("alike");
        let means = sums.means(client, &weights).expect("they fit");
        assert_eq!(
            download(client, &means),
            download(client, &weights),
            "{run}"
        );
        assert_eq!(sums.read_counts(client), Ok(vec![0; 4]), "{run}");

        let embeddings = problem.upload(client, &data.embeddings, &[2, 5, 6]);
        let labels = problem.upload_labels(client, &[3, 0, 9, 3, 3]);
        let mut other = fresh();
        other
            .accumulate(client, &embeddings, &labels)
            .expect("it fits");
        sums.merge(client, &other).expect("alike");
        let of =
            |sums: &ClassSums| download(client, &sums.means(client, &weights).expect("they fit"));
        assert_eq!(of(&sums), of(&other), "{run}");
        for sums in [sums, other] {
            let said = sums.read_counts(client);
            assert!(
                matches!(
                    said,
                    Err(Error::Label {
                        row: 2,
                        rows: 1,
                        ..
                    })
                ),
                "{run}: {said:?}"
            );
        }
    }
}

/// Means of two neighbours lie half way between them, and go to the even one; what is no number stays none.
#[test]
fn means_are_rounded_to_the_nearest_and_ties_to_even() {
    for (dtype, infinity) in [(Dtype::F16, 0x7c00u16), (Dtype::Bf16, 0x7f80)] {
        let value = |bits: u16| match dtype {
            Dtype::F16 => half::f16::from_bits(bits).to_f32(),
            _ => half::bf16::from_bits(bits).to_f32(),
        };
        // Every pattern of a normal number but the largest, and the next; a NaN last. Sums of the largest bf16 pass f32, and are infinite in
        // the truth as well.
        let smallest = infinity & infinity.wrapping_neg();
        let mut lower: Vec<u16> = (smallest..infinity - 1).collect();
        lower.extend(lower.clone().iter().map(|bits| bits | 0x8000));
        let mut rows: Vec<f32> = lower.iter().map(|&bits| value(bits)).collect();
        rows.push(f32::NAN);
        rows.extend(lower.iter().map(|&bits| value(bits + 1)));
        rows.push(1.0);
        let dim = lower.len() + 1;
        let truth: Vec<f32> = (0..dim)
            .map(|d| dtype.round((rows[d] + rows[dim + d]) / 2.0))
            .collect();
        let problem = Problem {
            dtype,
            ..Problem::plain((1, 2, dim, 1, 1))
        };
        for run in runs() {
            if !problem.supported(run.client) {
                continue;
            }
            let client = run.client;
            let options = Options {
                strategy: run.strategy,
                ..Options::default()
            };
            let mut sums = fresh(client, [1, 1, dim], &options).expect("valid");
            let embeddings = problem.upload(client, &rows, &[1, 2, dim]);
            let labels = problem.upload_labels(client, &[0, 0]);
            sums.accumulate(client, &embeddings, &labels)
                .expect("valid");
            let weights = problem.upload(client, &vec![0.0; dim], &[1, 1, dim]);
            let means = sums.means(client, &weights).expect("valid");
            for (d, (&truth, ours)) in truth.iter().zip(download(client, &means)).enumerate() {
                let same = f64::from(truth) == ours || truth.is_nan() && ours.is_nan();
                assert!(
                    same,
                    "on {run}, {dtype:?}: the mean of {} and {} is {ours}, not {truth}",
                    rows[d],
                    rows[dim + d]
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(config(16))]

    #[test]
    fn class_means_agree_with_the_reference(problem in problem()) {
        let mut rng = problem.rng(9);
        let unit = rng.random();
        let split = rng.random_range(0..problem.sizes.1);
        for run in runs() {
            if problem.supported(run.client) {
                check(&run, &problem, unit, split).map_err(fails(&run))?;
            }
        }
    }
}
