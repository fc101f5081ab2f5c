//! Bad input: a typed error with the numbers in it, before anything is launched; bad labels are harmless and reported.

use cubecl::client::Client;
use cubecl::ir::{ElemType, IntKind, UIntKind};
use cubecl::prelude::CubeElement;
use cubecl::std::tensor::TensorHandle;
use protohead::class_means::ClassSums;
use protohead::cosine_cross_entropy::{Inputs, Options, backward, forward};
use protohead::{
    Error, LossOptions, LossOutput, Reduction, Strategy, Upstream, Variant, Wanted, reconstruction,
};
use protohead_tests::devices::{devices, fused_runs, runs};
use protohead_tests::problem::{Dtype, download};

fn floats(client: &Client, shape: &[usize]) -> TensorHandle {
    let count = shape.iter().product();
    let values: Vec<f32> = (0..count)
        .map(|i| ((i * 37 + 11) % 17) as f32 - 8.0)
        .collect();
    TensorHandle::new_contiguous(
        shape.to_vec(),
        client.create_from_slice(f32::as_bytes(&values)),
        Dtype::F32.elem(),
    )
}

fn labels(client: &Client, labels: &[i32]) -> TensorHandle {
    TensorHandle::new_contiguous(
        [labels.len()],
        client.create_from_slice(i32::as_bytes(labels)),
        ElemType::Int(IntKind::I32),
    )
}

fn inputs(client: &Client) -> Inputs {
    Inputs {
        embeddings: floats(client, &[2, 4, 5]),
        weights: floats(client, &[2, 3, 5]),
        labels: labels(client, &[0, 2, 1, 0]),
    }
}

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
        let with = |change: fn(&mut Options)| {
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
            "class weights has shape [2, 3, 6], expected [2, classes, 5] to go with embeddings [2, 4, 5]"
        );
        assert_eq!(
            refused(
                Inputs {
                    weights: floats(client, &[1, 3, 5]),
                    ..good()
                },
                Options::default()
            ),
            "class weights has shape [1, 3, 5], expected [2, classes, 5] to go with embeddings [2, 4, 5]"
        );
        assert_eq!(
            refused(
                Inputs {
                    embeddings: floats(client, &[4, 5]),
                    ..good()
                },
                Options::default()
            ),
            "embeddings has shape [4, 5], expected 3 axes"
        );
        assert_eq!(
            refused(
                Inputs {
                    labels: labels(client, &[0, 1]),
                    ..good()
                },
                Options::default()
            ),
            "labels has shape [2], expected [4]"
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
            "embeddings has shape [2, 4, 0]: every axis must have at least one element"
        );
        let mut unpacked = good();
        unpacked.embeddings.metadata.strides = vec![20, 1, 4].into();
        assert!(
            refused(unpacked, Options::default()).starts_with("embeddings has strides [20, 1, 4]")
        );
        let mut outside = good();
        outside.embeddings.metadata.strides = vec![21, 5, 1].into();
        assert!(refused(outside, Options::default()).contains("in a buffer of 40 elements"));
        let mut integers = good();
        integers.embeddings.dtype = ElemType::UInt(UIntKind::U32);
        assert!(refused(integers, Options::default()).starts_with("embeddings has dtype"));
        assert_eq!(
            with(|o| o.active = Some(4)),
            "4 active classes were asked for, expected between 1 and 3"
        );
        assert_eq!(
            with(|o| o.active = Some(0)),
            "0 active classes were asked for, expected between 1 and 3"
        );
        assert_eq!(
            with(|o| o.scale = f32::NAN),
            "scale is NaN, expected finite"
        );
        assert_eq!(
            with(|o| o.loss.label_smoothing = 1.5),
            "label_smoothing is 1.5, expected between 0 and 1"
        );
        assert_eq!(
            with(|o| o.loss.head_weights = Some(vec![1.0])),
            "1 head weights for 2 heads"
        );
        assert!(ClassSums::new(client, 0, 3, 5, &Default::default()).is_err());
    }
}

#[test]
fn a_handle_shorter_than_its_shape_says_is_refused() {
    for device in devices() {
        let client = &device.client;
        let good = inputs(client);
        let options = Options::default();
        let by_row = Options {
            loss: LossOptions {
                reduction: Reduction::None,
                ..LossOptions::default()
            },
            ..Options::default()
        };
        let short = |shape: &[usize], dtype: Dtype| {
            TensorHandle::new_contiguous(shape.to_vec(), client.empty(4), dtype.elem())
        };
        let refused = |result: Result<(), Error>, says: &str| {
            let error = result.expect_err(says).to_string();
            assert!(error.contains(says), "{error} does not say {says}");
        };
        let step = |inputs: &Inputs, options: &Options, upstream: &Upstream| {
            let output = forward(client, inputs, options)?;
            backward(client, inputs, options, &output, upstream, Wanted::BOTH).map(|_| ())
        };
        let upstream = Upstream::Loss(short(&[2, 4], Dtype::F32));
        refused(step(&good, &by_row, &upstream), "in a buffer of 1 elements");
        let upstream = Upstream::Loss(short(&[2], Dtype::F16));
        refused(
            step(&good, &options, &upstream),
            "upstream gradient has dtype",
        );
        let mut output = forward(client, &good, &options).expect("valid");
        let lse = std::mem::replace(&mut output.lse, short(&[2, 4], Dtype::F32));
        let back = |output: &LossOutput| {
            let upstream = Upstream::default();
            backward(client, &good, &options, output, &upstream, Wanted::BOTH).map(|_| ())
        };
        refused(back(&output), "lse has strides");
        output.lse = lse;
        let status = std::mem::replace(&mut output.status, floats(client, &[1]));
        refused(back(&output), "status has dtype");
        refused(output.read_total(client).map(|_| ()), "status has dtype");
        refused(output.check(client), "status has dtype");
        output.status = status;
        assert_eq!(back(&output), Ok(()));

        let whole = floats(client, &[4, 5]);
        let parts = reconstruction::Inputs {
            whole: whole.clone(),
            first: whole.clone(),
            second: whole,
        };
        let upstream = TensorHandle::new_contiguous([1], client.empty(0), Dtype::F32.elem());
        let gradients = reconstruction::backward(
            client,
            &parts,
            &Default::default(),
            &Upstream::Loss(upstream),
            reconstruction::Wanted::ALL,
        );
        refused(gradients.map(|_| ()), "upstream gradient has strides");

        for offset in [2, 20, 1000] {
            let mut elsewhere = good.clone();
            elsewhere.labels.handle = elsewhere.labels.handle.offset_start(offset);
            refused(
                step(&elsewhere, &options, &Upstream::default()),
                "labels has strides",
            );
            let mut elsewhere = good.clone();
            elsewhere.weights.handle = elsewhere.weights.handle.offset_start(offset);
            refused(
                step(&elsewhere, &options, &Upstream::default()),
                "class weights has strides",
            );
        }
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
                let inputs = protohead::cosine_logits::Inputs {
                    embeddings: of(shape),
                    weights: of([shape[0], 2, shape[2]]),
                };
                let options = protohead::cosine_logits::Options {
                    strategy: Strategy::Forced(variant),
                    ..Default::default()
                };
                let refused = protohead::cosine_logits::forward(client, &inputs, &options);
                let refused = refused.map(|_| ()).expect_err("must be refused");
                assert!(
                    matches!(
                        refused,
                        Error::TooLarge { .. } | Error::NoSuchVariant { .. }
                    ),
                    "{variant:?} on {}: {refused}",
                    device.name
                );
            }
        }
    }
}

#[test]
fn a_variant_the_device_cannot_run_is_refused() {
    for device in devices() {
        for variant in [Variant::Unit, Variant::Plane, Variant::Cmma, Variant::Small] {
            let options = Options {
                strategy: Strategy::Forced(variant),
                ..Options::default()
            };
            let result = forward(&device.client, &inputs(&device.client), &options);
            assert_eq!(
                result.is_ok(),
                device.variants.contains(&variant),
                "{variant:?} on {}",
                device.name
            );
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
            "this op has no small variant: cosine_cross_entropy does"
        );
    }
}

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
        assert!(
            download(client, sums.sums()).iter().all(|&v| v == 0.0),
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
fn a_nan_stays_in_its_row() {
    for run in fused_runs((2, 4, 5, 3, 3)) {
        let client = run.client;
        let mut values = vec![0.5f32; 40];
        values
            .iter_mut()
            .enumerate()
            .for_each(|(i, v)| *v += (i % 7) as f32);
        let clean = values.clone();
        values[5 + 2] = f32::NAN; // head 0, row 1
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
