//! After the base session: prototypes of all three heads become class means; then each incremental session sets the
//! speech head's rows of its new classes to the means of their shots, and accuracy is taken on all classes so far.

use std::ops::Range;

use burn::tensor::{Device, Tensor};
use indicatif::ProgressBar;
use protohead::burn::{ClassSums, class_means, predictions};
use protohead::cosine_cross_entropy::Options;
use serde::Serialize;

use super::data::{Dataset, Examples, Moments};
use super::network::{Devices, Network, batch};
use super::protocol::Protocol;
use crate::audio::features::INPUTS;
use crate::error::Error;
use crate::output::{progress, say};

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

/// The input whose head is evaluated.
pub(super) const SPEECH: Range<usize> = 0..1;

/// Embeddings `[inputs, rows, dim]` of some of the clips whose features these are, by the network as it is evaluated.
pub(super) fn embeddings(
    network: &Network,
    scaling: &Moments,
    features: &[Vec<f32>],
    rows: &[usize],
    inputs: Range<usize>,
    devices: &Devices,
    bar: &ProgressBar,
) -> Tensor<3> {
    let plain = devices.heads.clone().without_autodiff();
    let chunks: Vec<Tensor<3>> = rows
        .chunks(CHUNK)
        .map(|rows| {
            bar.inc(rows.len() as u64);
            let encoder = devices.encoder.clone().without_autodiff();
            let inputs = batch(scaling, features, rows, inputs.clone(), &encoder);
            network.embed(inputs, rows.len(), &plain)
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

/// The share in percent of the validation clips whose classes the speech head predicts by its trained class weights; none without clips.
pub(super) fn validate(
    network: &Network,
    dataset: &Dataset,
    devices: &Devices,
) -> Result<Option<f32>, Error> {
    let clips = &dataset.validation;
    if clips.len() == 0 {
        return Ok(None);
    }
    let network = burn::module::Module::valid(network);
    let rows: Vec<usize> = (0..clips.len()).collect();
    let (scaling, features, bar) = (&dataset.scaling, &clips.features, ProgressBar::hidden());
    let queries = embeddings(&network, scaling, features, &rows, SPEECH, devices, &bar);
    let answers = answers(
        queries,
        speech_weights(&network),
        dataset.protocol.base,
        &clips.labels,
    )?;
    let right = answers.iter().filter(|answer| answer.is_right()).count();
    Ok(Some(100.0 * right as f32 / clips.len() as f32))
}

/// The network with the base classes' prototypes of every head replaced by class means.
pub(crate) fn replace_prototypes(
    network: Network,
    dataset: &Dataset,
    devices: &Devices,
) -> Result<Network, Error> {
    let base = dataset.protocol.base;
    let evaluated = burn::module::Module::valid(&network);
    let rows = dataset.train.of(0..base);
    let device = devices.heads.clone().without_autodiff();
    let [heads, _, dim] = evaluated.heads.weight.dims();
    let mut sums = ClassSums::new(heads, base, dim, &Default::default(), &device)?;
    let bar = progress(rows.len() as u64);
    bar.set_message("prototypes");
    for rows in rows.chunks(CHUNK) {
        let (scaling, features) = (&dataset.scaling, &dataset.train.features);
        let embedded = embeddings(
            &evaluated,
            scaling,
            features,
            rows,
            0..INPUTS,
            devices,
            &bar,
        );
        sums.accumulate(embedded, labels(&dataset.train, rows, &device))?;
    }
    bar.finish_and_clear();
    let (heads, means) = evaluated.heads.replace_prototypes_by(&mut sums)?;
    means.check()?;
    Ok(Network {
        encoder: evaluated.encoder,
        heads,
    })
}

/// Evaluates every session; `network` has its prototypes replaced already. Returns the speech head's prototypes `[1, classes, dim]`
/// after the last, too.
pub(crate) fn evaluate(
    network: &Network,
    dataset: &Dataset,
    devices: &Devices,
) -> Result<(Vec<Accuracy>, Tensor<3>), Error> {
    let protocol = dataset.protocol;
    let device = devices.heads.clone().without_autodiff();
    let tested = dataset.test.of(0..protocol.classes());
    let bar = progress((tested.len() + protocol.sessions * protocol.ways * protocol.shots) as u64);
    bar.set_message("test clips");
    let speech = |examples: &Examples, rows: &[usize]| {
        let (scaling, features) = (&dataset.scaling, &examples.features);
        embeddings(network, scaling, features, rows, SPEECH, devices, &bar)
    };
    let queries = speech(&dataset.test, &tested);
    let asked: Vec<usize> = tested.iter().map(|&row| dataset.test.labels[row]).collect();
    let mut weights = speech_weights(network);
    let mut table = Vec::new();
    for session in 0..=protocol.sessions {
        let known = protocol.base + session * protocol.ways;
        if session > 0 {
            let shots = dataset.train.of(known - protocol.ways..known);
            let embedded = speech(&dataset.train, &shots);
            let targets = labels(&dataset.train, &shots, &device);
            // Only the new classes have shots, so only their rows change.
            let means = class_means(embedded, weights, targets, known, &Default::default())?;
            means.check()?;
            weights = means.weights;
        }
        let answers = answers(queries.clone(), weights.clone(), known, &asked)?;
        table.push(Accuracy::new(session, protocol, &answers));
    }
    bar.finish_and_clear();
    Ok((table, weights))
}

/// The class weights `[1, classes, dim]` of the speech head.
fn speech_weights(network: &Network) -> Tensor<3> {
    let weights = network.heads.weight.val().without_autodiff();
    let [_, classes, dim] = weights.dims();
    weights.slice([SPEECH, 0..classes, 0..dim])
}

/// A clip's label, and the class that was predicted.
#[derive(Clone, Copy)]
struct Answer {
    label: usize,
    predicted: i64,
}

impl Answer {
    fn is_right(&self) -> bool {
        self.label as i64 == self.predicted
    }
}

/// What the speech head says of embeddings with these labels, if it knows the first so many classes.
fn answers(
    queries: Tensor<3>,
    weights: Tensor<3>,
    known: usize,
    labels: &[usize],
) -> Result<Vec<Answer>, Error> {
    let options = Options {
        active: Some(known),
        ..Options::default()
    };
    let predicted = predictions(queries, weights, &options)?
        .try_into_vec_as::<i64>()
        .map_err(Error::of_device)?;
    let answer = |(&label, predicted)| Answer { label, predicted };
    Ok(labels.iter().zip(predicted).map(answer).collect())
}

impl Accuracy {
    /// Labels of later sessions do not count. Every class has a test clip.
    fn new(session: usize, protocol: Protocol, answers: &[Answer]) -> Self {
        let known = protocol.base + session * protocol.ways;
        let share = |range: std::ops::Range<usize>| {
            let asked = || {
                answers
                    .iter()
                    .filter(|answer| range.contains(&answer.label))
            };
            let right = asked().filter(|answer| answer.is_right());
            100.0 * right.count() as f64 / asked().count() as f64
        };
        let seen = share(0..protocol.base);
        let unseen = (session > 0).then(|| share(protocol.base..known));
        Self {
            session,
            classes: known,
            all: share(0..known),
            seen,
            unseen,
            harmonic_mean: unseen.map(|unseen| match seen + unseen > 0.0 {
                true => 2.0 * seen * unseen / (seen + unseen),
                false => 0.0,
            }),
        }
    }
}

/// The table as text.
pub(crate) fn print(table: &[Accuracy]) {
    say(format_args!(
        "{:>7} {:>7} {:>8} {:>8} {:>8} {:>8}",
        "session", "classes", "all", "seen", "unseen", "harmonic"
    ));
    for row in table {
        let number =
            |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |v| format!("{v:.2}"));
        say(format_args!(
            "{:>7} {:>7} {:>8.2} {:>8.2} {:>8} {:>8}",
            row.session,
            row.classes,
            row.all,
            row.seen,
            number(row.unseen),
            number(row.harmonic_mean)
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_accuracy_counts_the_classes_known_so_far() {
        let protocol = Protocol {
            base: 2,
            sessions: 2,
            ways: 1,
            shots: 1,
        };
        let of = |answers: &[(usize, i64)]| -> Vec<Answer> {
            let answer = |&(label, predicted)| Answer { label, predicted };
            answers.iter().map(answer).collect()
        };
        let answers = of(&[(0, 0), (0, 1), (1, 1), (1, 1), (2, 2), (2, 0), (3, 3)]);
        let base = Accuracy::new(0, protocol, &answers);
        assert_eq!((base.classes, base.all, base.seen), (2, 75.0, 75.0));
        assert_eq!((base.unseen, base.harmonic_mean), (None, None));
        let first = Accuracy::new(1, protocol, &answers);
        assert_eq!((first.classes, first.seen), (3, 75.0));
        assert_eq!(
            (first.unseen, first.harmonic_mean),
            (Some(50.0), Some(60.0))
        );
        assert_eq!(first.all, 100.0 * 4.0 / 6.0);
        let none = Accuracy::new(1, protocol, &of(&[(0, 2), (1, 2), (2, 0)]));
        assert_eq!(none.harmonic_mean, Some(0.0));
    }
}
