//! Operands and options that the host can see to be wrong.

use cubecl::ir::{ElemType, IntKind, UIntKind};
use cubecl::std::tensor::TensorHandle;
use protohead::class_means::ClassSums;
use protohead::cosine_cross_entropy::{Inputs, Options, backward, forward, forward_backward};
use protohead::{
    Error, Gradients, Strategy, Upstream, Wanted, cosine_logits, cross_entropy, reconstruction,
};
use protohead_tests::devices::devices;
use protohead_tests::problem::{Dtype, download};

use super::{floats, inputs, labels};

#[test]
fn what_the_host_can_see_is_a_typed_error() {
    for device in devices() {
        let client = &device.client;
        let good = || inputs(client);
        let refused = |inputs: Inputs, options: Options| {
            forward(client, &inputs, &options)
                .expect_err("must be refused")
                .to_string()
        };
        let with = |change: &dyn Fn(&mut Options)| {
            let mut options = Options::default();
            change(&mut options);
            refused(good(), options)
        };
        assert_eq!(
            refused(
                Inputs {
                    weights: floats(client, &[2, 3, 6]),
                    ..good()
                },
                Options::default()
            ),
            "class weights: shape [2, 3, 6], expected [2, classes, 5] to go with embeddings [2, 4, 5]"
        );
        assert_eq!(
            refused(
                Inputs {
                    weights: floats(client, &[1, 3, 5]),
                    ..good()
                },
                Options::default()
            ),
            "class weights: shape [1, 3, 5], expected [2, classes, 5] to go with embeddings [2, 4, 5]"
        );
        assert_eq!(
            refused(
                Inputs {
                    embeddings: floats(client, &[4, 5]),
                    ..good()
                },
                Options::default()
            ),
            "embeddings: shape [4, 5], expected 3 axes"
        );
        assert_eq!(
            refused(
                Inputs {
                    labels: labels(client, &[0, 1]),
                    ..good()
                },
                Options::default()
            ),
            "labels: shape [2], expected [4]"
        );
        let empty = TensorHandle::new_contiguous([2, 4, 0], client.empty(4), Dtype::F32.elem());
        assert_eq!(
            refused(
                Inputs {
                    embeddings: empty,
                    ..good()
                },
                Options::default()
            ),
            "embeddings: shape [2, 4, 0], every axis must have at least one element"
        );
        let mut unpacked = good();
        unpacked.embeddings.metadata.strides = vec![20, 1, 4].into();
        assert!(
            refused(unpacked, Options::default()).starts_with("embeddings: strides [20, 1, 4]")
        );
        let mut outside = good();
        outside.embeddings.metadata.strides = vec![21, 5, 1].into();
        assert!(refused(outside, Options::default()).contains("in a buffer of 40 elements"));
        let mut few = good();
        few.embeddings.metadata.strides = vec![1].into();
        assert!(refused(few, Options::default()).starts_with("embeddings: strides [1]"));
        let mut integers = good();
        integers.embeddings.dtype = ElemType::UInt(UIntKind::U32);
        assert!(refused(integers, Options::default()).starts_with("embeddings: dtype"));
        assert_eq!(
            with(&|o| o.active = Some(4)),
            "4 active classes were asked for, expected between 1 and 3"
        );
        assert_eq!(
            with(&|o| o.active = Some(0)),
            "0 active classes were asked for, expected between 1 and 3"
        );
        assert_eq!(
            with(&|o| o.scale = f32::NAN),
            "scale is NaN, expected finite"
        );
        assert_eq!(
            with(&|o| o.loss.label_smoothing = 1.5),
            "label_smoothing is 1.5, expected between 0 and 1"
        );
        for (angular, got) in [(-0.5, "-0.5"), (1.6, "1.6"), (f32::NAN, "NaN")] {
            assert_eq!(
                with(&|o| o.margin.angular = angular),
                format!("the angular margin is {got}, expected between 0 and π/2")
            );
        }
        for (cosine, got) in [(-0.5, "-0.5"), (f32::INFINITY, "inf"), (f32::NAN, "NaN")] {
            assert_eq!(
                with(&|o| o.margin.cosine = cosine),
                format!("the cosine margin is {got}, expected between 0 and 2")
            );
        }
        for scale in [0.0, -2.0] {
            let both = |o: &mut Options| (o.margin.cosine, o.scale) = (0.5, scale);
            assert_eq!(
                with(&both),
                format!("scale is {scale}, expected more than 0 where there is a margin")
            );
        }
        assert_eq!(
            with(&|o| o.loss.head_weights = Some(vec![1.0])),
            "1 head weights for 2 heads"
        );
        assert_eq!(
            with(&|o| o.loss.head_weights = Some(vec![1.0, f32::NAN])),
            "head_weights is NaN, expected finite"
        );
        assert!(ClassSums::new(client, 0, 3, 5, &Default::default()).is_err());
    }
}

#[test]
fn a_stride_of_zero_does_not_wrap_a_size() {
    for device in devices() {
        let client = &device.client;
        let of = |shape: [usize; 3]| {
            let mut tensor = floats(client, &[1, 1, 64]);
            tensor.metadata.shape = shape.to_vec().into();
            tensor.metadata.strides = vec![0, 0, 1].into();
            tensor
        };
        for shape in [
            [1 << 31, 1 << 26, 64],
            [1 << 63, 1 << 63, 4],
            [1, usize::MAX, 64],
        ] {
            for &variant in &device.variants {
                let inputs = cosine_logits::Inputs {
                    embeddings: of(shape),
                    weights: of([shape[0], 2, shape[2]]),
                };
                let options = cosine_logits::Options {
                    strategy: Strategy::Forced(variant),
                    ..Default::default()
                };
                let refused = cosine_logits::forward(client, &inputs, &options);
                let refused = refused.map(|_| ()).expect_err("must be refused");
                assert!(
                    matches!(
                        refused,
                        Error::TooLarge { .. }
                            | Error::NoVariant {
                                variant: "small",
                                ..
                            }
                    ),
                    "{variant:?} on {}: {refused}",
                    device.name
                );
            }
        }
    }
}

#[test]
fn gradients_that_cannot_be_scaled_are_refused() {
    for device in devices() {
        let client = &device.client;
        let scaled = |tensor: TensorHandle| {
            let gradients = Gradients {
                embeddings: Some(tensor),
                ..Gradients::default()
            };
            let error = gradients.scaled(client, &floats(client, &[2])).map(drop);
            error.expect_err("must be refused")
        };
        let mut integers = floats(client, &[2, 4, 5]);
        integers.dtype = ElemType::Int(IntKind::I32);
        assert!(matches!(scaled(integers), Error::Dtype { .. }));
        let empty = TensorHandle::new_contiguous([2, 0, 5], client.empty(4), Dtype::F32.elem());
        assert!(matches!(scaled(empty), Error::Empty { .. }));
        let mut huge = floats(client, &[2, 4, 5]);
        huge.metadata.shape = vec![1usize << 40, 1 << 30, 1].into();
        huge.metadata.strides = vec![0, 0, 1].into();
        assert!(matches!(scaled(huge), Error::Strides { .. }));
        let of_scale = |scale: TensorHandle| {
            let gradients = Gradients {
                scale: Some(scale),
                ..Gradients::default()
            };
            let error = gradients.scaled(client, &floats(client, &[2])).map(drop);
            error.expect_err("must be refused").to_string()
        };
        let three = of_scale(floats(client, &[3]));
        assert_eq!(three, "factors: shape [2], expected [3]");
        let two = of_scale(floats(client, &[2, 1]));
        assert_eq!(two, "gradient of the scale: shape [2, 1], expected [2]");
    }
}

/// It is found from a product that has the scale as a factor.
#[test]
fn the_gradient_of_a_scale_of_zero_is_refused() {
    for device in devices() {
        let client = &device.client;
        let inputs = inputs(client);
        let options = Options {
            scale: 0.0,
            ..Options::default()
        };
        let total = Upstream::default();
        for wanted in [Wanted::ALL, Wanted::SCALE] {
            let both = forward_backward(client, &inputs, &options, &total, wanted).map(drop);
            let output = forward(client, &inputs, &options).expect("valid");
            let back = backward(client, &inputs, &options, &output, &total, wanted).map(drop);
            let logits = cosine_logits::Inputs {
                embeddings: inputs.embeddings.clone(),
                weights: inputs.weights.clone(),
            };
            let of_logits = cosine_logits::Options {
                scale: 0.0,
                ..Default::default()
            };
            let grad = floats(client, &[2, 4, 3]);
            let alone = cosine_logits::backward(client, &logits, &of_logits, &grad, wanted);
            for refused in [both, back, alone.map(drop)] {
                let error = refused.expect_err("must be refused").to_string();
                assert!(error.contains("scale is 0"), "{error}");
            }
        }
        let both = forward_backward(client, &inputs, &options, &total, Wanted::BOTH);
        let (output, gradients) = both.expect("a scale of zero has gradients of zero");
        output.check(client).expect("valid labels");
        let dx = gradients.embeddings.expect("asked for");
        assert!(download(client, &dx).iter().all(|&value| value == 0.0));
    }
}

#[test]
fn a_tensor_of_another_device_is_refused() {
    for device in devices() {
        let client = &device.client;
        let there = |shape: &[usize]| {
            let mut tensor = floats(client, shape);
            tensor.handle.service.device.index_id += 1;
            tensor
        };
        let refused = |result: Result<(), Error>, named: &str| match result {
            Err(Error::Place { operand, .. }) => assert_eq!(operand, named),
            other => panic!("{named}: {other:?}"),
        };
        let good = inputs(client);
        let options = Options::default();
        let step = |inputs: &Inputs, upstream: &Upstream| {
            let output = forward(client, inputs, &options)?;
            backward(client, inputs, &options, &output, upstream, Wanted::BOTH).map(|_| ())
        };
        let total = Upstream::default();
        let mut elsewhere = good.clone();
        elsewhere.embeddings = there(&[2, 4, 5]);
        refused(step(&elsewhere, &total), "embeddings");
        let mut elsewhere = good.clone();
        elsewhere.weights = there(&[2, 3, 5]);
        refused(step(&elsewhere, &total), "class weights");
        let mut elsewhere = good.clone();
        elsewhere.labels.handle.service.device.index_id += 1;
        refused(step(&elsewhere, &total), "labels");
        refused(
            step(&good, &Upstream::Loss(there(&[2]))),
            "upstream gradient",
        );
        let mut output = forward(client, &good, &options).expect("valid");
        output.status.handle.service.device.index_id += 1;
        refused(output.check(client), "status");
        let back = backward(client, &good, &options, &output, &total, Wanted::BOTH);
        refused(back.map(|_| ()), "status");

        let logits = cosine_logits::Inputs {
            embeddings: good.embeddings.clone(),
            weights: good.weights.clone(),
        };
        let grad = there(&[2, 4, 3]);
        let back =
            cosine_logits::backward(client, &logits, &Default::default(), &grad, Wanted::BOTH);
        refused(back.map(|_| ()), "logit gradients");
        let given = cross_entropy::Inputs {
            logits: grad,
            labels: good.labels.clone(),
        };
        let loss = cross_entropy::forward(client, &given, &Default::default());
        refused(loss.map(|_| ()), "logits");
        let parts = reconstruction::Inputs {
            whole: floats(client, &[4, 5]),
            first: floats(client, &[4, 5]),
            second: there(&[4, 5]),
        };
        let loss = reconstruction::forward(client, &parts, &Default::default());
        refused(loss.map(|_| ()), "second part");
        let gradients = Gradients {
            embeddings: Some(floats(client, &[2, 4, 5])),
            ..Gradients::default()
        };
        refused(
            gradients.scaled(client, &there(&[2])).map(|_| ()),
            "factors",
        );

        let sums = || ClassSums::new(client, 2, 3, 5, &Default::default()).expect("valid");
        refused(
            sums().accumulate(client, &there(&[2, 4, 5]), &good.labels),
            "embeddings",
        );
        let means = sums().means(client, &there(&[2, 3, 5]));
        refused(means.map(|_| ()), "class weights");
        for other in devices() {
            if other.client.service_id() == client.service_id() {
                continue;
            }
            let stranger = &other.client;
            refused(
                sums().accumulate(
                    stranger,
                    &floats(stranger, &[2, 4, 5]),
                    &labels(stranger, &[0; 4]),
                ),
                "class sums",
            );
            refused(sums().read_counts(stranger).map(|_| ()), "class sums");
            let mut merged = ClassSums::new(stranger, 2, 3, 5, &Default::default()).expect("valid");
            refused(merged.merge(stranger, &sums()), "class sums");
        }
    }
}
