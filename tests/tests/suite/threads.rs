//! Two threads on one device, each with launches of its own on the way.

use std::sync::mpsc::channel;
use std::time::Duration;

use protohead::class_means::{ClassSums, Options as MeansOptions};
use protohead::cosine_cross_entropy::{Inputs, Options, forward_backward};
use protohead::{Strategy, Upstream, Variant, Wanted};
use protohead_tests::devices::devices;
use protohead_tests::problem::{Problem, download};

/// Launches on the way at once.
const LAUNCHES: usize = 200;
/// Far longer than they take.
const PATIENCE: Duration = Duration::from_secs(120);

/// The units of a launch meet at barriers, so two launches must never each hold a core that the other is waiting for.
#[test]
fn launches_of_two_threads_end_and_give_the_bits_of_one() {
    let problem = Problem::plain((3, 130, 48, 20, 20));
    let data = problem.data();
    for device in devices() {
        let client = &device.client;
        let embeddings = problem.upload(client, &data.embeddings, &[3, 130, 48]);
        let weights = problem.upload(client, &data.weights, &[3, 20, 48]);
        let labels = problem.upload_labels(client, &data.labels);
        let means = {
            let (client, embeddings, weights, labels) = (
                client.clone(),
                embeddings.clone(),
                weights.clone(),
                labels.clone(),
            );
            move || {
                let mut sums = ClassSums::new(&client, 3, 20, 48, &MeansOptions::default())
                    .expect("the sizes are valid");
                for _ in 0..LAUNCHES {
                    sums.accumulate(&client, &embeddings, &labels)
                        .expect("the operands are valid");
                }
                download(&client, &sums.means(&client, &weights).expect("they fit"))
            }
        };
        let losses = {
            let client = client.clone();
            // Forced, it takes all cores of a CPU.
            let options = Options {
                strategy: match client.properties().hardware.num_cpu_cores {
                    Some(_) => Strategy::Forced(Variant::Unit),
                    None => Strategy::Inferred,
                },
                ..Options::default()
            };
            let inputs = Inputs {
                embeddings,
                weights,
                labels,
            };
            move || {
                let mut gradient = Vec::new();
                for launch in 0..LAUNCHES {
                    let (_, gradients) = forward_backward(
                        &client,
                        &inputs,
                        &options,
                        &Upstream::default(),
                        Wanted::WEIGHTS,
                    )
                    .expect("the operands are valid");
                    if launch + 1 == LAUNCHES {
                        gradient = download(&client, &gradients.weights.expect("asked for"));
                    }
                }
                gradient
            }
        };
        let expected = [means(), losses()];
        let (done, ended) = channel();
        let other = done.clone();
        std::thread::spawn(move || done.send((0, means())));
        std::thread::spawn(move || other.send((1, losses())));
        for _ in 0..2 {
            let (which, answer) = ended
                .recv_timeout(PATIENCE)
                .unwrap_or_else(|error| panic!("launches on {} did not end: {error}", device.name));
            assert!(answer == expected[which], "other bits on {}", device.name);
        }
    }
}
