//! Recorded steps. CUDA refuses to record while another thread waits for the device, so they have a process of their own, and
//! one test.

use cubecl::bytes::Bytes;
use cubecl::std::tensor::TensorHandle;
use protohead::cosine_cross_entropy::{Captured, forward_backward};
use protohead::{Gradients, LossOutput, Upstream, Wanted};
use protohead_tests::devices::fused_runs;
use protohead_tests::fused::arguments;
use protohead_tests::problem::{Data, LabelKind, Problem, download, wide};

/// Recorded with some operands and replayed with others, twice: the bits of the call with the others.
#[test]
fn a_captured_step_replays_on_what_its_inputs_hold() {
    let recorded = Problem {
        labels: LabelKind::SomeIgnored,
        smoothing: 0.1,
        margin: (0.3, 0.2),
        weighted: true,
        seed: 11,
        ..Problem::plain((3, 70, 24, 20, 17))
    };
    let fresh = Problem {
        seed: 12,
        ..recorded.clone()
    };
    let data = fresh.data();
    let labels: Vec<i32> = data.labels.iter().map(|&l| l as i32).collect();
    let runs = fused_runs(recorded.sizes).into_iter();
    // The scale's gradient alone comes from another that nobody holds afterwards.
    for (run, wanted) in runs.flat_map(|run| [(run, Wanted::ALL), (run, Wanted::SCALE)]) {
        let client = run.client;
        let (inputs, options) = arguments(&run, &recorded, &recorded.data());
        let upstream = Upstream::Total(0.5);
        let mut step = Captured::new(client, &inputs, &options, &upstream, wanted)
            .expect("the operands are valid");
        let records = ["cuda", "wgpu"].contains(&run.device);
        assert_eq!(step.is_graph(), records, "on {run}");
        let (other, _) = arguments(&run, &fresh, &data);
        let once = |output: &LossOutput, gradients: &Gradients| {
            let download = |gradient: &Option<TensorHandle>| {
                gradient.as_ref().map(|gradient| download(client, gradient))
            };
            (
                output.read_total(client).expect("the labels are valid"),
                output.read_predictions(client).expect("they are"),
                download(&gradients.embeddings),
                download(&gradients.weights),
                download(&gradients.scale),
            )
        };
        let write = |data: &Data, labels: &[i32]| {
            let of = step.inputs();
            client.write(
                &of.embeddings.handle,
                Bytes::from_elems(data.embeddings.clone()),
            );
            client.write(&of.weights.handle, Bytes::from_elems(data.weights.clone()));
            client.write(&of.labels.handle, Bytes::from_elems(labels.to_vec()));
        };
        write(&data, &labels);
        let (output, gradients) =
            forward_backward(client, &other, &options, &upstream, wanted).expect("valid");
        let expected = once(&output, &gradients);
        let asked = [
            expected.2.is_some(),
            expected.3.is_some(),
            expected.4.is_some(),
        ];
        assert_eq!(asked, [wanted.embeddings, wanted.weights, wanted.scale]);
        // What the pools give back must not be what the graph writes to.
        drop((output, gradients, other, inputs));
        let bystander = recorded.upload(client, &data.embeddings, &[3, 70, 24]);
        for _ in 0..2 {
            step.replay().expect("the device replays it");
            assert_eq!(once(step.output(), step.gradients()), expected, "on {run}");
        }
        assert_eq!(
            download(client, &bystander),
            wide(&data.embeddings),
            "on {run}"
        );
    }
}
