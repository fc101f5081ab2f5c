//! After the base session: prototypes of all three heads become class means; then each incremental session sets the
//! speech head's rows of its new classes to the means of their shots, and accuracy is taken on all classes so far.

use burn::tensor::{Device, Tensor};
use protohead::burn::{class_means, cosine_logits};
use protohead::cosine_logits::Options;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::data::{Dataset, Examples, Protocol};
use super::network::{Devices, Network, batch};
use crate::error::Error;

/// Clips that go through the encoder at once.
const CHUNK: usize = 64;

/// Accuracies in percent after a session.
#[derive(Debug, Serialize)]
pub(crate) struct Accuracy {
    pub session: usize,
    pub classes: usize,
    pub all: f64,
    pub seen: f64,
    pub unseen: Option<f64>,
    pub harmonic_mean: Option<f64>,
}

/// Embeddings `[INPUTS, rows, dim]` of examples, by the network as it is evaluated.
fn embeddings(
    network: &Network,
    dataset: &Dataset,
    examples: &Examples,
    rows: &[usize],
    devices: &Devices,
) -> Tensor<3> {
    let plain = devices.heads.clone().without_autodiff();
    let chunks: Vec<Tensor<3>> = rows
        .chunks(CHUNK)
        .map(|rows| {
            let inputs = batch(
                dataset,
                examples,
                rows,
                &devices.encoder.clone().without_autodiff(),
            );
            network.embed(inputs, &plain)
        })
        .collect();
    Tensor::cat(chunks, 1)
}

fn labels(examples: &Examples, rows: &[usize], device: &Device) -> Tensor<1, burn::tensor::Int> {
    let values: Vec<i32> = rows
        .iter()
        .map(|&row| examples.labels[row] as i32)
        .collect();
    Tensor::from_data(values.as_slice(), device)
}

/// The network with the base classes' prototypes of every head replaced by class means.
pub(crate) fn replace_prototypes(
    network: Network,
    dataset: &Dataset,
    protocol: Protocol,
    devices: &Devices,
) -> Result<Network, Error> {
    let evaluated = burn::module::Module::valid(&network);
    let rows = dataset.train.of(0..protocol.base);
    let device = devices.heads.clone().without_autodiff();
    let embedded = embeddings(&evaluated, dataset, &dataset.train, &rows, devices);
    let targets = labels(&dataset.train, &rows, &device);
    let (heads, _counts) = evaluated
        .heads
        .replace_prototypes(embedded, targets, protocol.base)?;
    Ok(Network {
        encoder: evaluated.encoder,
        heads,
    })
}

/// Evaluates every session; `network` has its prototypes replaced already.
pub(crate) fn evaluate(
    network: &Network,
    dataset: &Dataset,
    protocol: Protocol,
    seed: u64,
    devices: &Devices,
) -> Result<Vec<Accuracy>, Error> {
    let device = devices.heads.clone().without_autodiff();
    let tested = dataset.test.of(0..protocol.classes());
    let speech = |embedded: Tensor<3>| {
        let [_, rows, dim] = embedded.dims();
        embedded.slice([0..1, 0..rows, 0..dim])
    };
    let queries = speech(embeddings(
        network,
        dataset,
        &dataset.test,
        &tested,
        devices,
    ));
    let mut weights = network.heads.weight.val().without_autodiff();
    let [_, classes, dim] = weights.dims();
    weights = weights.slice([0..1, 0..classes, 0..dim]);
    let mut table = Vec::new();
    for session in 0..=protocol.sessions {
        let known = protocol.base + session * protocol.ways;
        if session > 0 {
            let shots = shots(dataset, known - protocol.ways..known, protocol.shots, seed);
            let embedded = speech(embeddings(
                network,
                dataset,
                &dataset.train,
                &shots,
                devices,
            ));
            let targets = labels(&dataset.train, &shots, &device);
            // Only the new classes have shots, so only their rows change.
            (weights, _) = class_means(embedded, targets, weights, known, false)?;
        }
        let options = Options {
            scale: 1.0,
            active: Some(known),
            ..Options::default()
        };
        let logits = cosine_logits(queries.clone(), weights.clone(), &options)?;
        let predicted = logits
            .argmax(2)
            .try_into_vec_as::<i64>()
            .map_err(|error| protohead::Error::Device(format!("{error:?}")))?;
        let share = |range: std::ops::Range<usize>| {
            let of_range: Vec<bool> = tested
                .iter()
                .zip(&predicted)
                .filter(|(row, _)| range.contains(&dataset.test.labels[**row]))
                .map(|(&row, &class)| dataset.test.labels[row] as i64 == class)
                .collect();
            100.0 * of_range.iter().filter(|&&hit| hit).count() as f64
                / of_range.len().max(1) as f64
        };
        let seen = share(0..protocol.base);
        let unseen = (session > 0).then(|| share(protocol.base..known));
        table.push(Accuracy {
            session,
            classes: known,
            all: share(0..known),
            seen,
            unseen,
            harmonic_mean: unseen.map(|unseen| {
                if seen + unseen > 0.0 {
                    2.0 * seen * unseen / (seen + unseen)
                } else {
                    0.0
                }
            }),
        });
    }
    Ok(table)
}

/// `count` training clips of each class, drawn from the seed.
fn shots(
    dataset: &Dataset,
    classes: std::ops::Range<usize>,
    count: usize,
    seed: u64,
) -> Vec<usize> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0x5407);
    let mut chosen = Vec::new();
    for class in classes {
        let mut rows = dataset.train.of(class..class + 1);
        rows.shuffle(&mut rng);
        rows.truncate(count);
        chosen.extend(rows);
    }
    chosen
}

/// The table as text.
pub(crate) fn print(table: &[Accuracy]) {
    println!(
        "{:>7} {:>7} {:>8} {:>8} {:>8} {:>8}",
        "session", "classes", "all", "seen", "unseen", "harmonic"
    );
    for row in table {
        let number =
            |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |v| format!("{v:.2}"));
        println!(
            "{:>7} {:>7} {:>8.2} {:>8.2} {:>8} {:>8}",
            row.session,
            row.classes,
            row.all,
            row.seen,
            number(row.unseen),
            number(row.harmonic_mean)
        );
    }
}
