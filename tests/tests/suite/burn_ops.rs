//! The ops on Burn tensors: through fusion and autodiff they give the reference's numbers.

use burn::module::Module;
use burn::store::ModuleRecord;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use protohead::burn::{
    CosineHeads, CosineHeadsConfig, cosine_cross_entropy, cosine_cross_entropy_by_row,
    cosine_logits, cross_entropy_by_row, reconstruction,
};
use protohead::{Error, LossOptions, Reduction, cosine_cross_entropy as fused, cross_entropy};
use protohead_reference as reference;

const SIZES: reference::Sizes = reference::Sizes {
    heads: 3,
    rows: 7,
    dim: 6,
    classes: 5,
    active: 4,
};
const LABELS: [i64; 7] = [0, 3, 1, -100, 2, 2, 0];

/// Those that this build and machine have, as Burn's.
fn devices() -> Vec<Device> {
    protohead_tests::devices::devices()
        .iter()
        .map(|device| match device.name {
            #[cfg(feature = "cpu")]
            "cpu" => Device::cpu(),
            #[cfg(feature = "wgpu")]
            "wgpu" => Device::wgpu(burn::tensor::DeviceKind::DefaultDevice),
            #[cfg(feature = "cuda")]
            "cuda" => Device::cuda(0),
            other => panic!("{other} is reached, but the feature protohead-tests/{other} is off"),
        })
        .collect()
}

fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    (0..count)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

fn tensor<const D: usize>(values: &[f32], shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), device)
}

fn labels(device: &Device) -> Tensor<1, Int> {
    let values: Vec<i32> = LABELS.iter().map(|&l| l as i32).collect();
    Tensor::from_data(TensorData::new(values, [LABELS.len()]), device)
}

fn read<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.try_into_vec_as::<f32>().expect("the device works")
}

/// f32 against f64: a few rounding errors of sums of this length.
fn near(name: &str, ours: &[f32], truth: &[f64]) {
    near_by(name, ours, truth, 4e-6);
}

fn near_by(name: &str, ours: &[f32], truth: &[f64], relative: f64) {
    assert_eq!(ours.len(), truth.len(), "{name}");
    let size = truth.iter().map(|v| v * v).sum::<f64>().sqrt();
    let error = ours
        .iter()
        .zip(truth)
        .map(|(&a, b)| (f64::from(a) - b).powi(2))
        .sum::<f64>()
        .sqrt();
    assert!(
        error <= relative * size + 1e-7,
        "{name}: error {error:e} of {size:e}"
    );
}

fn heads(device: &Device, weights: &[f32]) -> CosineHeads {
    let mut heads = CosineHeadsConfig::new(3, 5, 6)
        .with_active(Some(4))
        .init(device);
    let values = tensor(weights, [3, 5, 6], device);
    heads.weight = heads.weight.map(|_| values.require_grad());
    heads
}

#[test]
fn the_module_gives_the_references_loss_gradients_and_prototypes() {
    for device in devices() {
        let device = device.autodiff();
        let (x, w) = (numbers(3 * 7 * 6, 1), numbers(3 * 5 * 6, 2));
        let wide = |values: &[f32]| values.iter().map(|&v| f64::from(v)).collect::<Vec<f64>>();
        let alphas = vec![1.0, 0.5, -2.0];
        let options = reference::LossOptions {
            reduction: reference::Reduction::Mean,
            label_smoothing: 0.0,
            ignore_index: -100,
            head_weights: alphas.clone(),
        };
        let truth =
            reference::cosine_cross_entropy(&wide(&x), &wide(&w), &LABELS, SIZES, 16.0, &options);
        let (dx, dw) = reference::cosine_cross_entropy_backward(
            &wide(&x),
            &wide(&w),
            &LABELS,
            SIZES,
            16.0,
            &options,
            &reference::Upstream::Total(1.0),
        );

        let module = heads(&device, &w);
        let embeddings = tensor(&x, [3, 7, 6], &device).require_grad();
        let loss_options = LossOptions {
            head_weights: Some(alphas.iter().map(|&a| a as f32).collect()),
            ..LossOptions::default()
        };
        let loss = module
            .loss(embeddings.clone(), labels(&device), &loss_options)
            .expect("valid");
        loss.heads.check().expect("labels are valid");
        near("loss", &read(loss.heads.loss.clone()), &truth.loss);
        near("total", &read(loss.total.clone()), &[truth.total]);
        let gradients = loss.total.backward();
        near(
            "dX",
            &read(embeddings.grad(&gradients).expect("tracked")),
            &dx,
        );
        near(
            "dW",
            &read(module.weight.val().grad(&gradients).expect("tracked")),
            &dw,
        );

        let logits = module.forward(embeddings.clone()).expect("valid");
        near(
            "logits",
            &read(logits),
            &reference::cosine_logits(&wide(&x), &wide(&w), SIZES, 16.0),
        );

        let mut sums = reference::ClassSums::zeros(SIZES);
        sums.add(&wide(&x), &LABELS, SIZES, false);
        let means = reference::class_means(&sums, &wide(&w), SIZES);
        let (replaced, means_and_counts) = module
            .replace_prototypes(embeddings, labels(&device), 4, &Default::default())
            .expect("valid");
        near("prototypes", &read(replaced.weight.val()), &means);
        assert_eq!(
            means_and_counts
                .counts
                .try_into_vec_as::<u32>()
                .expect("the device works"),
            sums.counts
        );
    }
}

#[test]
fn an_upstream_gradient_by_row_and_frozen_embeddings_are_honoured() {
    for device in devices() {
        let device = device.autodiff();
        let (x, w, upstream) = (numbers(126, 3), numbers(90, 4), numbers(21, 5));
        let wide = |values: &[f32]| values.iter().map(|&v| f64::from(v)).collect::<Vec<f64>>();
        let options = reference::LossOptions {
            reduction: reference::Reduction::None,
            label_smoothing: 0.0,
            ignore_index: -100,
            head_weights: vec![1.0; 3],
        };
        let (_, dw) = reference::cosine_cross_entropy_backward(
            &wide(&x),
            &wide(&w),
            &LABELS,
            SIZES,
            16.0,
            &options,
            &reference::Upstream::Loss(wide(&upstream)),
        );
        let embeddings = tensor(&x, [3, 7, 6], &device);
        let weights = tensor(&w, [3, 5, 6], &device).require_grad();
        let fused_options = fused::Options {
            active: Some(4),
            ..fused::Options::default()
        };
        let loss = cosine_cross_entropy_by_row(
            embeddings.clone(),
            weights.clone(),
            labels(&device),
            &fused_options,
        )
        .expect("valid");
        let gradients = (loss.loss * tensor(&upstream, [3, 7], &device))
            .sum()
            .backward();
        near("dW", &read(weights.grad(&gradients).expect("tracked")), &dw);
        assert!(embeddings.grad(&gradients).is_none());
    }
}

/// Loss by head, weighed by what arrives: of each dtype, reduction and smoothing, with operands frozen, and in any layout.
#[test]
fn gradients_of_the_loss_by_head_reach_what_is_tracked() {
    use protohead::Reduction;
    let (x, w, upstream) = (numbers(126, 3), numbers(90, 4), numbers(3, 5));
    for device in devices() {
        let plain = device.clone();
        let device = device.autodiff();
        for (dtype, reduction, smoothing, tracked, transposed) in [
            (DType::F32, Reduction::Sum, 0.1, [true, true], false),
            (DType::F32, Reduction::Mean, 0.0, [true, false], true),
            (DType::F32, Reduction::Mean, 0.2, [false, true], true),
            (DType::F16, Reduction::Mean, 0.0, [true, true], false),
            (DType::BF16, Reduction::Sum, 0.1, [true, false], true),
        ] {
            if !plain.supports_dtype(dtype) {
                continue;
            }
            let case = format!("{dtype:?} {reduction:?} {tracked:?}");
            let rounded = |values: &[f32]| -> Vec<f64> {
                let round = |&v: &f32| match dtype {
                    DType::F16 => half::f16::from_f32(v).to_f64(),
                    DType::BF16 => half::bf16::from_f32(v).to_f64(),
                    _ => f64::from(v),
                };
                values.iter().map(round).collect()
            };
            let options = reference::LossOptions {
                reduction: match reduction {
                    Reduction::Sum => reference::Reduction::Sum,
                    _ => reference::Reduction::Mean,
                },
                label_smoothing: f64::from(smoothing as f32),
                ignore_index: -100,
                head_weights: vec![1.0; 3],
            };
            let truth = reference::cosine_cross_entropy_backward(
                &rounded(&x),
                &rounded(&w),
                &LABELS,
                SIZES,
                16.0,
                &options,
                &reference::Upstream::Loss(upstream.iter().map(|&v| f64::from(v)).collect()),
            );
            let leaf = |values: &[f32], rows: usize, tracked: bool| {
                let values = tensor(values, [3, rows, 6], &device);
                let values = match transposed {
                    // The same numbers, of which Burn holds another order.
                    true => values.swap_dims(0, 1).add_scalar(0.0).swap_dims(0, 1),
                    false => values,
                };
                values.detach().set_require_grad(tracked)
            };
            let embeddings = leaf(&x, 7, tracked[0]);
            let weights = leaf(&w, 5, tracked[1]);
            let fused_options = fused::Options {
                active: Some(4),
                loss: LossOptions {
                    reduction,
                    label_smoothing: smoothing as f32,
                    ..LossOptions::default()
                },
                ..fused::Options::default()
            };
            let loss = cosine_cross_entropy(
                embeddings.clone().cast(dtype),
                weights.clone().cast(dtype),
                labels(&device),
                &fused_options,
            )
            .expect("valid");
            let gradients = (loss.loss * tensor(&upstream, [3], &device))
                .sum()
                .backward();
            // Beside f32's, one rounding of each element to the operands' dtype.
            let relative = match dtype {
                DType::F16 => 1e-3,
                DType::BF16 => 8e-3,
                _ => 4e-6,
            };
            for (name, leaf, truth, tracked) in [
                ("dX", &embeddings, &truth.0, tracked[0]),
                ("dW", &weights, &truth.1, tracked[1]),
            ] {
                let gradient = leaf.grad(&gradients);
                assert_eq!(gradient.is_some(), tracked, "{name} of {case}");
                if let Some(gradient) = gradient {
                    near_by(
                        &format!("{name} of {case}"),
                        &read(gradient),
                        truth,
                        relative,
                    );
                }
            }
        }
    }
}

#[test]
fn gradients_of_logits_reach_both_operands() {
    let (x, w, upstream) = (numbers(126, 3), numbers(90, 4), numbers(84, 5));
    let wide = |values: &[f32]| values.iter().map(|&v| f64::from(v)).collect::<Vec<f64>>();
    let (dx, dw) =
        reference::cosine_logits_backward(&wide(&x), &wide(&w), &wide(&upstream), SIZES, 16.0);
    for device in devices() {
        let device = device.autodiff();
        for tracked in [[true, true], [true, false], [false, true]] {
            let embeddings = tensor(&x, [3, 7, 6], &device).set_require_grad(tracked[0]);
            let weights = tensor(&w, [3, 5, 6], &device).set_require_grad(tracked[1]);
            let options = protohead::cosine_logits::Options {
                active: Some(4),
                ..Default::default()
            };
            let logits =
                cosine_logits(embeddings.clone(), weights.clone(), &options).expect("valid");
            let gradients = (logits * tensor(&upstream, [3, 7, 4], &device))
                .sum()
                .backward();
            for (name, leaf, truth, tracked) in [
                ("dX", &embeddings, &dx, tracked[0]),
                ("dW", &weights, &dw, tracked[1]),
            ] {
                let gradient = leaf.grad(&gradients);
                assert_eq!(gradient.is_some(), tracked, "{name}");
                if let Some(gradient) = gradient {
                    near(name, &read(gradient), truth);
                }
            }
        }
    }
}

#[test]
fn one_heads_gradient_may_arrive_transposed() {
    for device in devices() {
        let device = device.autodiff();
        let (x, w, upstream) = (numbers(42, 3), numbers(30, 4), numbers(7, 5));
        let by = |transposed: bool| {
            let weights = tensor(&w, [1, 5, 6], &device).require_grad();
            let embeddings = tensor(&x, [1, 7, 6], &device);
            let loss = cosine_cross_entropy_by_row(
                embeddings,
                weights.clone(),
                labels(&device),
                &fused::Options::default(),
            );
            let loss = loss.expect("valid").loss;
            let weighed = match transposed {
                true => loss.swap_dims(0, 1) * tensor(&upstream, [7, 1], &device),
                false => loss * tensor(&upstream, [1, 7], &device),
            };
            let gradients = weighed.sum().backward();
            read(weights.grad(&gradients).expect("tracked"))
        };
        assert_eq!(by(true), by(false));
    }
}

#[test]
fn a_label_is_judged_before_it_is_narrowed() {
    let device = Device::cpu();
    let embeddings = tensor(&numbers(126, 1), [3, 7, 6], &device);
    let weights = tensor(&numbers(90, 2), [3, 5, 6], &device);
    let far = vec![0i64, 1, 2, 3, 1 << 32, 0, 0];
    let far = Tensor::from_data(TensorData::new(far, [7]), (&device, DType::I64));
    let loss = cosine_cross_entropy_by_row(embeddings, weights, far, &fused::Options::default());
    assert_eq!(
        loss.expect("shapes fit").check(),
        Err(Error::Label {
            row: 4,
            label: Some(1 << 32),
            active: 5,
            rows: 1
        })
    );
}

#[test]
fn prototypes_of_frozen_heads_stay_frozen() {
    let device = Device::cpu().autodiff();
    for trained in [true, false] {
        let heads = heads(&device, &numbers(90, 2));
        let heads = if trained { heads } else { heads.no_grad() };
        let embeddings = tensor(&numbers(126, 1), [3, 7, 6], &device);
        let (heads, _) = heads
            .replace_prototypes(embeddings, labels(&device), 4, &Default::default())
            .expect("valid");
        assert_eq!(heads.weight.val().is_require_grad(), trained);
    }
}

#[test]
fn cross_entropy_of_given_logits_reaches_them() {
    for device in devices() {
        let device = device.autodiff();
        let (z, upstream) = (numbers(3 * 7 * 4, 9), numbers(21, 5));
        let wide = |values: &[f32]| values.iter().map(|&v| f64::from(v)).collect::<Vec<f64>>();
        let options = reference::LossOptions {
            reduction: reference::Reduction::None,
            label_smoothing: 0.0,
            ignore_index: -100,
            head_weights: vec![1.0; 3],
        };
        let truth = reference::cross_entropy(&wide(&z), &LABELS, SIZES, &options);
        let dz = reference::cross_entropy_backward(
            &wide(&z),
            &LABELS,
            SIZES,
            &options,
            &reference::Upstream::Loss(wide(&upstream)),
        );
        let logits = tensor(&z, [3, 7, 4], &device).require_grad();
        let loss = cross_entropy_by_row(logits.clone(), labels(&device), &Default::default())
            .expect("valid");
        near("loss", &read(loss.loss.clone()), &truth.loss);
        let gradients = (loss.loss * tensor(&upstream, [3, 7], &device))
            .sum()
            .backward();
        near("dz", &read(logits.grad(&gradients).expect("tracked")), &dz);
    }
}

#[test]
fn reconstruction_reaches_all_three_parts() {
    for device in devices() {
        let device = device.autodiff();
        let values = [6, 7, 8].map(|seed| numbers(20, seed));
        let [whole, first, second] = values
            .each_ref()
            .map(|v| tensor(v, [4, 5], &device).require_grad());
        let loss = reconstruction(whole.clone(), first.clone(), second.clone()).expect("valid");
        let gradients = loss.mul_scalar(3.0).backward();
        let wide = values.map(|v| v.iter().map(|&v| f64::from(v)).collect::<Vec<f64>>());
        let (of_whole, of_part) =
            reference::reconstruction_backward(&wide[0], &wide[1], &wide[2], 5, 3.0);
        near(
            "d whole",
            &read(whole.grad(&gradients).expect("tracked")),
            &of_whole,
        );
        near(
            "d first",
            &read(first.grad(&gradients).expect("tracked")),
            &of_part,
        );
        near(
            "d second",
            &read(second.grad(&gradients).expect("tracked")),
            &of_part,
        );
    }
}

#[test]
fn the_modules_record_saves_and_loads() {
    let device = Device::cpu();
    let saved = CosineHeadsConfig::new(3, 5, 6).init(&device);
    let bytes = saved
        .clone()
        .into_record()
        .into_bytes()
        .expect("a record has bytes");
    let record = ModuleRecord::from_bytes(bytes).expect("the bytes are a record");
    let loaded = CosineHeadsConfig::new(3, 5, 6)
        .init(&device)
        .try_load_record(record)
        .expect("it fits");
    assert_eq!(read(saved.weight.val()), read(loaded.weight.val()));
}

#[test]
fn a_strategy_that_the_device_cannot_run_takes_no_part() {
    let device = Device::cpu();
    let embeddings = tensor(&numbers(126, 1), [3, 7, 6], &device);
    let weights = tensor(&numbers(90, 2), [3, 5, 6], &device);
    let by = |strategy| {
        let options = fused::Options {
            active: Some(4),
            strategy,
            ..fused::Options::default()
        };
        let loss = cosine_cross_entropy_by_row(
            embeddings.clone(),
            weights.clone(),
            labels(&device),
            &options,
        );
        read(loss.expect("valid").loss)
    };
    let forced = protohead::Strategy::Forced(protohead::Variant::Plane);
    assert_eq!(by(protohead::Strategy::Inferred), by(forced));
}

#[test]
fn what_does_not_fit_is_refused_at_the_call() {
    let device = Device::cpu();
    let module = heads(&device.clone().autodiff(), &numbers(90, 2));
    let wrong = tensor(&numbers(3 * 7 * 4, 1), [3, 7, 4], &device);
    assert!(matches!(
        module.forward(wrong),
        Err(Error::Shape {
            operand: "class weights",
            ..
        })
    ));
    assert_eq!(
        module.clone().with_active(6).map(|_| ()),
        Err(Error::ActiveClasses {
            active: 6,
            classes: 5
        })
    );
    let weighted = fused::Options {
        loss: LossOptions {
            head_weights: Some(vec![1.0, 2.0, 3.0]),
            ..LossOptions::default()
        },
        ..fused::Options::default()
    };
    let embeddings = || tensor(&numbers(126, 1), [3, 7, 6], &device);
    let weights = || tensor(&numbers(90, 2), [3, 5, 6], &device);
    let summed = cosine_cross_entropy(embeddings(), weights(), labels(&device), &weighted);
    let by_row = cosine_cross_entropy_by_row(embeddings(), weights(), labels(&device), &weighted);
    let of_logits = cross_entropy_by_row(
        embeddings(),
        labels(&device),
        &cross_entropy::Options {
            loss: weighted.loss.clone(),
            ..cross_entropy::Options::default()
        },
    );
    for refused in [summed.map(drop), by_row.map(drop), of_logits.map(drop)] {
        assert!(matches!(
            refused,
            Err(Error::Shape {
                operand: "head weights",
                ..
            })
        ));
    }
    let unreduced = fused::Options {
        loss: LossOptions {
            reduction: Reduction::None,
            ..LossOptions::default()
        },
        ..fused::Options::default()
    };
    assert!(matches!(
        cosine_cross_entropy(embeddings(), weights(), labels(&device), &unreduced),
        Err(Error::Reduction {
            got: Reduction::None,
            ..
        })
    ));
    let elsewhere = labels(&Device::flex());
    let embeddings = tensor(&numbers(126, 1), [3, 7, 6], &device);
    assert!(matches!(
        module.loss(embeddings, elsewhere, &LossOptions::default()),
        Err(Error::Place {
            operand: "labels",
            ..
        })
    ));
    let bad: Tensor<1, Int> =
        Tensor::from_data(TensorData::new(vec![0i32, 1, 2, 3, 9, 0, 0], [7]), &device);
    let embeddings = tensor(&numbers(126, 1), [3, 7, 6], &device);
    let loss = module
        .loss(embeddings, bad, &LossOptions::default())
        .expect("shapes fit");
    assert_eq!(
        loss.heads.check(),
        Err(Error::Label {
            row: 4,
            label: Some(9),
            active: 4,
            rows: 1
        })
    );
    let embeddings = tensor(&numbers(126, 1), [3, 7, 6], &device);
    let bad = Tensor::from_data(TensorData::new(vec![0i32, -1, 2, 7, 1, 0, 0], [7]), &device);
    let (_, means) = module
        .replace_prototypes(embeddings, bad, 4, &Default::default())
        .expect("shapes fit");
    assert_eq!(
        means.check(),
        Err(Error::Label {
            row: 1,
            label: Some(-1),
            active: 4,
            rows: 2
        })
    );
}
