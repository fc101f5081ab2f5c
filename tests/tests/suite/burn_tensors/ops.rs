//! The functions: values, gradients of what is tracked, labels.

use burn::tensor::{DType, Device, Tensor, TensorData};
use protohead::burn::{
    cosine_cross_entropy, cosine_cross_entropy_by_row, cosine_logits, cross_entropy,
    cross_entropy_by_row, predictions, reconstruction,
};
use protohead::{
    Error, LossOptions, Reduction, cosine_cross_entropy as fused, cross_entropy as cross_entropy_op,
};
use protohead_reference as reference;

use super::{
    LABELS, SIZES, device_of, devices, labels, near, near_by, numbers, read, rounded, tensor,
};
use crate::support::reserved;

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
        let truth = reference::cosine_cross_entropy_backward(
            &wide(&x),
            &wide(&w),
            &LABELS,
            SIZES,
            reference::Cosine::scaled(16.0),
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
        let dw = read(weights.grad(&gradients).expect("tracked"));
        near("dW", &dw, &truth.weights);
        assert!(embeddings.grad(&gradients).is_none());
    }
}

/// Loss by head, weighed by what arrives: of each dtype, reduction and smoothing, with operands frozen, and in any layout.
#[test]
fn gradients_of_the_loss_by_head_reach_what_is_tracked() {
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
                &rounded(&x, dtype),
                &rounded(&w, dtype),
                &LABELS,
                SIZES,
                reference::Cosine {
                    scale: 16.0,
                    margin: reference::Margin {
                        angular: 0.25,
                        cosine: 0.125,
                        ..reference::Margin::none()
                    },
                },
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
                margin: fused::Margin {
                    angular: 0.25,
                    cosine: 0.125,
                },
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
                ("dX", &embeddings, &truth.embeddings, tracked[0]),
                ("dW", &weights, &truth.weights, tracked[1]),
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
    let truth =
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
                ("dX", &embeddings, &truth.embeddings, tracked[0]),
                ("dW", &weights, &truth.weights, tracked[1]),
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
            label: 1 << 32,
            active: 5,
            rows: 1
        })
    );
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
fn cross_entropy_of_given_logits_by_head_reaches_them() {
    for device in devices() {
        let device = device.autodiff();
        let (z, upstream) = (numbers(3 * 7 * 4, 9), numbers(3, 5));
        let wide = |values: &[f32]| values.iter().map(|&v| f64::from(v)).collect::<Vec<f64>>();
        for (ours, theirs) in [
            (Reduction::Mean, reference::Reduction::Mean),
            (Reduction::Sum, reference::Reduction::Sum),
        ] {
            let options = reference::LossOptions {
                reduction: theirs,
                label_smoothing: 0.1,
                ignore_index: -100,
                head_weights: vec![1.0; 3],
            };
            let truth = reference::cross_entropy(&wide(&z), &LABELS, SIZES, &options);
            let upstreams = reference::Upstream::Loss(wide(&upstream));
            let dz =
                reference::cross_entropy_backward(&wide(&z), &LABELS, SIZES, &options, &upstreams);
            let options = cross_entropy_op::Options {
                loss: LossOptions {
                    reduction: ours,
                    label_smoothing: 0.1,
                    ..Default::default()
                },
                ..Default::default()
            };
            let logits = tensor(&z, [3, 7, 4], &device).require_grad();
            let loss = cross_entropy(logits.clone(), labels(&device), &options).expect("valid");
            near("loss", &read(loss.loss.clone()), &truth.loss);
            let gradients = (loss.loss * tensor(&upstream, [3], &device))
                .sum()
                .backward();
            near("dz", &read(logits.grad(&gradients).expect("tracked")), &dz);
        }
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

/// Whether this is a process of this test's own. If not, it is run in one: what other tests let go of would hide what it holds.
fn alone(test: &str) -> bool {
    const ALONE: &str = "PROTOHEAD_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let output = std::process::Command::new(std::env::current_exe().expect("it runs"))
        .args(["--exact", test])
        .env(ALONE, "1")
        .output()
        .expect("the suite starts");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{said}"
    );
    false
}

/// By how many bytes memory grows on each CPU for as long as what `work` gives is held, of embeddings and tracked class weights, and
/// how many their gradient takes. A GPU has a workspace that hides one.
fn grown<T>(work: impl Fn(Tensor<3>, Tensor<3>, &Device) -> T) -> Vec<(u64, u64)> {
    const CLASSES: usize = 40_000;
    const DIM: usize = 64;
    let of_cpu = |tested: &&protohead_tests::devices::Tested| tested.name == "cpu";
    let grown = |tested: &protohead_tests::devices::Tested| {
        let client = &tested.client;
        let device = device_of(tested).autodiff();
        let weights = tensor(&numbers(CLASSES * DIM, 2), [1, CLASSES, DIM], &device);
        let weights = weights.require_grad();
        let embeddings = tensor(&numbers(7 * DIM, 1), [1, 7, DIM], &device);
        device.sync().expect("the device works");
        client.memory_cleanup().expect("memory can be cleaned up");
        let before = reserved(client);
        let _held = work(embeddings, weights, &device);
        device.sync().expect("the device works");
        let of_weights = (CLASSES * DIM * size_of::<f32>()) as u64;
        (reserved(client).saturating_sub(before), of_weights)
    };
    let all = protohead_tests::devices::devices().iter();
    all.filter(of_cpu).map(grown).collect()
}

/// The gradient of the class weights came with the loss; the backward pass scales it where it is.
#[test]
fn a_training_step_holds_one_gradient_of_the_class_weights() {
    let name = "burn_tensors::ops::a_training_step_holds_one_gradient_of_the_class_weights";
    if !alone(name) {
        return;
    }
    let step = |embeddings, weights: Tensor<3>, device: &Device| {
        let options = fused::Options::default();
        let loss = cosine_cross_entropy(embeddings, weights.clone(), labels(device), &options);
        let loss = loss.expect("valid");
        loss.check().expect("labels are valid");
        let gradients = loss.loss.mul_scalar(2.0).backward();
        let gradient = weights.grad(&gradients).expect("tracked");
        assert_eq!(gradient.dims(), weights.dims());
        (loss.predictions, gradients, gradient)
    };
    for (grown, of_weights) in grown(step) {
        assert!(
            (of_weights..of_weights * 7 / 4).contains(&grown),
            "{grown} bytes more, the gradient is {of_weights}"
        );
    }
}

/// A module that is being trained can be asked for classes without a backward pass.
#[test]
fn predictions_hold_no_gradient_of_the_class_weights() {
    let name = "burn_tensors::ops::predictions_hold_no_gradient_of_the_class_weights";
    if !alone(name) {
        return;
    }
    let three_times = |embeddings: Tensor<3>, weights: Tensor<3>, _: &Device| {
        let options = fused::Options::default();
        [(); 3].map(|()| predictions(embeddings.clone(), weights.clone(), &options).expect("valid"))
    };
    for (grown, of_weights) in grown(three_times) {
        assert!(
            grown < of_weights,
            "{grown} bytes more, a gradient is {of_weights}"
        );
    }
}
