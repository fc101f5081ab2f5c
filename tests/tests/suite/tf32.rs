//! f32 operands that a GPU may round to TF32.

use cubecl::ir::{ElemType, FloatKind};
use protohead::cosine_cross_entropy::forward_backward;
use protohead::{Strategy, Upstream, Variant, Wanted, cosine_logits};
use protohead_reference as reference;
use protohead_tests::devices::{Run, product_runs};
use protohead_tests::fused::arguments;
use protohead_tests::problem::{Data, Problem, download, wide};

/// Ten bits of a unit row's numbers stay, of which tensor cores may cut the rest instead of rounding it.
const KEPT: f64 = 1.0 / 1024.0;

/// Logits, the total loss and the gradients of the operands and the scale.
fn answers(run: &Run, problem: &Problem, data: &Data, allow_tf32: bool) -> [Vec<f64>; 5] {
    let client = run.client;
    let (inputs, options) = arguments(run, problem, data);
    let logits = cosine_logits::forward(
        client,
        &cosine_logits::Inputs {
            embeddings: inputs.embeddings.clone(),
            weights: inputs.weights.clone(),
        },
        &cosine_logits::Options {
            scale: options.scale,
            active: options.active,
            allow_tf32,
            strategy: run.strategy,
        },
    );
    let options = protohead::cosine_cross_entropy::Options {
        allow_tf32,
        ..options
    };
    let upstream = Upstream::Total(1.0);
    let (output, gradients) =
        forward_backward(client, &inputs, &options, &upstream, Wanted::ALL).expect("valid");
    let read = |gradient: &Option<_>| download(client, gradient.as_ref().expect("asked for"));
    [
        download(client, &logits.expect("valid")),
        vec![f64::from(output.read_total(client).expect("valid labels"))],
        read(&gradients.embeddings),
        read(&gradients.weights),
        read(&gradients.scale),
    ]
}

/// Where the device has TF32, answers are as near as ten bits are, and others than without; elsewhere the permission changes no bit.
#[test]
fn tf32_is_as_near_as_its_bits_and_only_where_it_is_allowed() {
    for sizes in [(2, 37, 45, 33, 31), (1, 300, 520, 700, 700)] {
        let problem = Problem::plain(sizes);
        let data = problem.data();
        let (x, w) = (wide(&data.embeddings), wide(&data.weights));
        let (sizes, scale) = (problem.reference_sizes(), f64::from(problem.scale));
        let options = problem.reference_options(&data);
        let cosine = problem.cosine();
        let loss =
            reference::cosine_cross_entropy(&x, &w, &data.labels, sizes, cosine, &options).total;
        let upstream = reference::Upstream::Total(1.0);
        let gradients = reference::cosine_cross_entropy_backward(
            &x,
            &w,
            &data.labels,
            sizes,
            cosine,
            &options,
            &upstream,
        );
        let truth = [
            reference::cosine_logits(&x, &w, sizes, scale),
            vec![loss],
            gradients.embeddings,
            gradients.weights,
            gradients.scale,
        ];
        // A cosine loses `KEPT` of each row at most. A loss moves by two logits; a softmax, and with it a gradient, by the factor that
        // two logits make, and its other rows are rounded once more.
        let logit = 2.0 * KEPT * scale;
        let heads = sizes.heads as f64;
        let gradient = 2.0 * logit + 4.0 * KEPT;
        for run in product_runs() {
            let plain = answers(&run, &problem, &data, false);
            let allowed = answers(&run, &problem, &data, true);
            if !has_tf32(&run) {
                assert_eq!(plain, allowed, "on {run}");
                continue;
            }
            assert_ne!(plain[0], allowed[0], "on {run}: TF32 took no part");
            let largest = |ours: &[f64], truth: &[f64]| {
                let errors = ours.iter().zip(truth).map(|(a, b)| (a - b).abs());
                errors.fold(0.0, f64::max)
            };
            for values in &allowed {
                assert!(values.iter().all(|value| value.is_finite()), "on {run}");
            }
            let relative = |ours: &[f64], truth: &[f64]| {
                let of = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
                let error = of(&mut ours.iter().zip(truth).map(|(a, b)| a - b));
                (error / of(&mut truth.iter().copied())).sqrt()
            };
            for (name, error, bound) in [
                ("logits", largest(&allowed[0], &truth[0]), logit),
                ("loss", largest(&allowed[1], &truth[1]), 2.0 * logit * heads),
                ("dX", relative(&allowed[2], &truth[2]), gradient),
                ("dW", relative(&allowed[3], &truth[3]), gradient),
                ("ds", relative(&allowed[4], &truth[4]), gradient),
            ] {
                assert!(
                    error <= bound,
                    "on {run}: {name} is off by {error:e} of {bound:e}"
                );
            }
        }
    }
}

/// Whether this run may use tensor cores that take TF32.
fn has_tf32(run: &Run) -> bool {
    let tf32 = ElemType::Float(FloatKind::TF32);
    let matmul = &run.client.properties().features.matmul;
    let of_products = [Variant::Cmma, Variant::Wgmma].map(Strategy::Forced);
    of_products.contains(&run.strategy) && matmul.mma.iter().any(|mma| mma.a_type == tf32)
}
