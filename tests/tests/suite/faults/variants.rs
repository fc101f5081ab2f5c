//! Variants that a device or a problem does not allow.

use protohead::cosine_cross_entropy::{Inputs, Options, forward};
use protohead::{Strategy, Variant};
use protohead_tests::devices::{VARIANTS, devices};

use super::{floats, inputs, labels};

#[test]
fn a_variant_the_device_cannot_run_is_refused() {
    for device in devices() {
        for variant in VARIANTS {
            let options = Options {
                strategy: Strategy::Forced(variant),
                ..Options::default()
            };
            let result = forward(&device.client, &inputs(&device.client), &options).map(drop);
            let on_cpu = device.client.properties().hardware.num_cpu_cores.is_some();
            let on_hopper = device.variants.contains(&Variant::Wgmma);
            let only = match variant {
                Variant::Unit if !on_cpu => Some("on CPUs only"),
                Variant::Wgmma if !on_hopper => {
                    Some("on NVIDIA GPUs of compute capability 9.0 only, with the `cuda` feature")
                }
                Variant::Plane | Variant::Cmma | Variant::Small if on_cpu => Some("on GPUs only"),
                _ => None,
            };
            let expected = only.map(|only| {
                let name = format!("{variant:?}").to_lowercase();
                format!("the {name} variant runs {only}")
            });
            let told = result.err().map(|error| error.to_string());
            assert_eq!(told, expected, "{variant:?} on {}", device.name);
        }
    }
}

#[test]
fn the_small_variant_is_of_small_problems_of_the_fused_op_only() {
    for device in devices() {
        if !device.variants.contains(&Variant::Small) {
            continue;
        }
        let client = &device.client;
        let strategy = Strategy::Forced(Variant::Small);
        let inputs = Inputs {
            embeddings: floats(client, &[1, 2, 4]),
            weights: floats(client, &[1, 257, 4]),
            labels: labels(client, &[0, 1]),
        };
        let of = |active| {
            let options = Options {
                active: Some(active),
                strategy,
                ..Options::default()
            };
            forward(client, &inputs, &options)
                .map(|_| ())
                .map_err(|error| error.to_string())
        };
        assert_eq!(of(256), Ok(()));
        assert_eq!(
            of(257).expect_err("too many classes"),
            "1 heads × 2 rows × 257 active classes × 4 columns are too many for the small variant, which takes at most \
             4096 rows, 256 classes, 256 vectors of columns and 8388608 of their product"
        );
        let logits = protohead::cosine_logits::Inputs {
            embeddings: inputs.embeddings.clone(),
            weights: inputs.weights.clone(),
        };
        let options = protohead::cosine_logits::Options {
            strategy,
            ..Default::default()
        };
        assert_eq!(
            protohead::cosine_logits::forward(client, &logits, &options)
                .expect_err("no such variant")
                .to_string(),
            "the small variant runs in cosine_cross_entropy only"
        );
    }
}
