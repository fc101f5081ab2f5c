//! A scale that is learnt, and heads that get room for more classes.

use burn::module::{Module, Param};
use burn::optim::{GradientsParams, SgdConfig};
use burn::store::ModuleRecord;
use burn::tensor::{DType, Device, FloatDType, Tensor};
use protohead::burn::{
    CosineHeads, CosineHeadsConfig, cosine_cross_entropy_with_scale, cosine_logits_with_scale,
};
use protohead::cosine_cross_entropy::Options;
use protohead::{Error, LossOptions, Reduction};
use protohead_reference as reference;

use protohead_tests::problem::wide;

use super::{
    LABELS, SCALE, SIZES, devices, labels, margin, near, near_by, numbers, read, rounded, tensor,
};

fn learnt_heads(device: &Device) -> CosineHeads {
    let mut heads = CosineHeadsConfig::new(3, 5, 6)
        .with_active(Some(4))
        .with_scale(SCALE)
        .with_learnt_scale(true)
        .init(device);
    let values = tensor(&numbers(90, 2), [3, 5, 6], device);
    heads.weight = heads
        .weight
        .map(|drawn| values.set_require_grad(drawn.is_require_grad()));
    heads
}

/// The gradient of the scale that arrives with a loss.
fn scale_gradient(module: &CosineHeads, objective: Tensor<1>) -> Option<Vec<f32>> {
    let scale = module.learnt_scale.as_ref().expect("it is learnt").val();
    scale.grad(&objective.backward()).map(read)
}

/// Of the total, of losses by row, and of logits; with operands frozen, and with embeddings of 16 bits.
#[test]
fn a_learnt_scale_gets_the_references_gradient() {
    let (x, w) = (numbers(126, 1), numbers(90, 2));
    let alphas = vec![1.0, 0.5, -2.0];
    let upstream = numbers(84, 5);
    let (margin, cosine) = margin();
    for device in devices() {
        let plain = device.clone();
        let device = device.autodiff();
        let module = learnt_heads(&device).with_margin(margin);
        assert_eq!(module.scale(), Ok(SCALE));
        // Tensor cores round what lies between the products of logits.
        for (dtype, relative) in [(DType::F32, 4e-6), (DType::F16, 1e-3), (DType::BF16, 1e-2)] {
            if !plain.supports_dtype(dtype) {
                continue;
            }
            let (x64, w64) = (rounded(&x, dtype), rounded(&w, dtype));
            let of = |reduction, head_weights: Vec<f64>, upstream| {
                let options = reference::LossOptions {
                    reduction,
                    label_smoothing: 0.1,
                    ignore_index: -100,
                    head_weights,
                };
                let gradients = reference::cosine_cross_entropy_backward(
                    &x64, &w64, &LABELS, SIZES, cosine, &options, &upstream,
                );
                [gradients.scale.iter().sum::<f64>()]
            };
            let total = reference::Upstream::Total(1.0);
            let of_total = of(reference::Reduction::Mean, alphas.clone(), total);
            let by_row = reference::Upstream::Loss(wide(&upstream[..21]));
            let of_rows = of(reference::Reduction::None, vec![1.0; 3], by_row);
            let of_logits =
                reference::cosine_logits_backward(&x64, &w64, &wide(&upstream), SIZES, SCALE);
            let of_logits = [of_logits.scale.iter().sum::<f64>()];
            for tracked in [true, false] {
                let mut module = module.clone();
                if !tracked {
                    module.weight = module.weight.no_grad();
                }
                let embeddings = tensor(&x, [3, 7, 6], &device).cast(FloatDType::from(dtype));
                let embeddings = embeddings.detach().set_require_grad(tracked);
                let with_weights = LossOptions {
                    label_smoothing: 0.1,
                    head_weights: Some(alphas.iter().map(|&a| a as f32).collect()),
                    ..LossOptions::default()
                };
                let options = LossOptions {
                    head_weights: None,
                    ..with_weights.clone()
                };
                let loss = module.loss(embeddings.clone(), labels(&device), &with_weights);
                let ds = scale_gradient(&module, loss.expect("valid").total);
                near_by("ds", &ds.expect("tracked"), &of_total, relative);
                let loss = module.loss_by_row(embeddings.clone(), labels(&device), &options);
                let by_row = tensor(&upstream[..21], [3, 7], &device);
                let objective = (loss.expect("valid").loss * by_row).sum();
                let ds = scale_gradient(&module, objective);
                near_by("ds by row", &ds.expect("tracked"), &of_rows, relative);
                let logits = module.forward(embeddings).expect("valid");
                let upstream = tensor(&upstream, [3, 7, 4], &device);
                let objective = (logits.cast(FloatDType::F32) * upstream).sum();
                let ds = scale_gradient(&module, objective);
                near_by("ds of logits", &ds.expect("tracked"), &of_logits, relative);
            }
        }
    }
}

/// The module with a learnt scale gives what one with that scale gives, and a step of an optimizer takes it where its gradient says.
#[test]
fn a_learnt_scale_is_used_and_trained() {
    let x = numbers(126, 1);
    for device in devices() {
        let device = device.autodiff();
        let (margin, _) = margin();
        let learnt = learnt_heads(&device).with_margin(margin).with_scale(5.5);
        assert_eq!(learnt.scale(), Ok(5.5));
        let config = learnt.config().with_learnt_scale(false);
        let mut given = config.init(&device);
        given.weight = learnt.weight.clone();
        assert_eq!(given.scale(), Ok(5.5));
        let embeddings = || tensor(&x, [3, 7, 6], &device);
        let step = |heads: &CosineHeads| {
            let loss = heads.loss(embeddings(), labels(&device), &LossOptions::default());
            let loss = loss.expect("valid");
            loss.check().expect("labels are valid");
            let of_weights = heads.weight.val().grad(&loss.total.backward());
            (read(loss.total), read(of_weights.expect("tracked")))
        };
        assert_eq!(step(&learnt), step(&given));
        let logits = |heads: &CosineHeads| read(heads.forward(embeddings()).expect("valid"));
        near("logits", &logits(&learnt), &wide(&logits(&given)));
        let negative = learnt.clone().with_scale(-5.5);
        let predicted = |heads: &CosineHeads| {
            let classes = heads.predict(embeddings()).expect("valid");
            classes.try_into_vec_as::<i64>().expect("the device works")
        };
        assert_eq!(predicted(&learnt), predicted(&given));
        assert_ne!(predicted(&learnt), predicted(&negative));

        let loss = learnt.loss(embeddings(), labels(&device), &LossOptions::default());
        let gradients = loss.expect("valid").total.backward();
        let scale = learnt.learnt_scale.as_ref().expect("it is learnt").val();
        let ds = f64::from(read(scale.grad(&gradients).expect("tracked"))[0]);
        let gradients = GradientsParams::from_grads(gradients, &learnt);
        let trained = SgdConfig::new().init().step(0.5, learnt, gradients);
        let now = trained.scale().expect("the device works");
        assert!((now - (5.5 - 0.5 * ds)).abs() < 1e-5, "{now} after {ds}");
        // What is evaluated has the scale that was learnt.
        assert_eq!(trained.clone().valid().scale(), Ok(now));

        // Frozen, it is used as it is, and nothing arrives.
        let mut frozen = trained;
        frozen.learnt_scale = frozen.learnt_scale.map(|scale| scale.no_grad());
        given = given.with_scale(now);
        given.weight = frozen.weight.clone();
        assert_eq!(step(&frozen), step(&given));
        let loss = frozen.loss_by_row(embeddings(), labels(&device), &LossOptions::default());
        let objective = loss.expect("valid").loss.sum();
        assert_eq!(scale_gradient(&frozen, objective), None);
        let logits = frozen.forward(embeddings()).expect("valid");
        assert_eq!(scale_gradient(&frozen, logits.sum()), None);
    }
}

#[test]
fn a_scale_that_is_none_is_refused() {
    let device = Device::cpu().autodiff();
    let embeddings = || tensor(&numbers(126, 1), [3, 7, 6], &device);
    let weights = || tensor(&numbers(90, 2), [3, 5, 6], &device);
    let with = |scale: Tensor<1>| {
        let options = Options::default();
        let labels = labels(&device);
        cosine_cross_entropy_with_scale(embeddings(), weights(), scale, labels, &options)
            .map(drop)
            .expect_err("must be refused")
            .to_string()
    };
    let of = |values: &[f32]| tensor(values, [values.len()], &device);
    assert_eq!(with(of(&[1.0, 2.0])), "scale: shape [2], expected [1]");
    assert_eq!(
        with(of(&[0.0])),
        "scale is 0, expected not 0 where its gradient is wanted"
    );
    assert_eq!(with(of(&[f32::NAN])), "scale is NaN, expected finite");
    let elsewhere = tensor(&[1.0], [1], &Device::flex().autodiff());
    assert!(with(elsewhere).starts_with("scale: on "));
    let of_logits = |scale: Tensor<1>| {
        let logits = cosine_logits_with_scale(embeddings(), weights(), scale, &Default::default());
        logits.map(drop).expect_err("must be refused").to_string()
    };
    assert_eq!(of_logits(of(&[1.0, 2.0])), "scale: shape [2], expected [1]");
    for scale in [0.0, f64::NAN] {
        let heads = learnt_heads(&device).with_scale(scale);
        let by_row = heads.loss_by_row(embeddings(), labels(&device), &LossOptions::default());
        assert!(matches!(by_row.map(drop), Err(Error::Option { .. })));
        let logits = heads.forward(embeddings());
        assert!(matches!(logits.map(drop), Err(Error::Option { .. })));
    }
    // Where nothing is trained, all classes are alike.
    let untrained = learnt_heads(&device).with_scale(0.0).valid();
    let logits = untrained.forward(embeddings().without_autodiff());
    assert_eq!(read(logits.expect("valid")), [0.0; 84]);
    let mut two = learnt_heads(&device);
    two.learnt_scale = Some(Param::from_tensor(of(&[1.0, 2.0])));
    let logits = two.forward(embeddings());
    assert!(matches!(logits.map(drop), Err(Error::Shape { .. })));
    let none = LossOptions {
        reduction: Reduction::None,
        ..LossOptions::default()
    };
    let reduced = learnt_heads(&device).loss(embeddings(), labels(&device), &none);
    assert!(matches!(reduced.map(drop), Err(Error::Reduction { .. })));
}

#[test]
fn a_learnt_scale_is_saved_and_loaded() {
    let device = Device::cpu();
    let saved = learnt_heads(&device.clone().autodiff())
        .valid()
        .with_scale(3.25);
    let bytes = saved.clone().into_record().into_bytes();
    let record = ModuleRecord::from_bytes(bytes.expect("a record has bytes"));
    let config = saved.config().with_scale(SCALE);
    assert!(config.learnt_scale);
    let loaded = config.init(&device);
    assert_eq!(loaded.scale(), Ok(SCALE));
    let loaded = loaded.try_load_record(record.expect("the bytes are a record"));
    let loaded = loaded.expect("it is of such heads");
    assert_eq!(loaded.scale(), Ok(3.25));
    assert_eq!(read(loaded.weight.val()), read(saved.weight.val()));
}

/// Those that there were stay as they are, new ones take part once they are asked for, and prototypes take their places.
#[test]
fn heads_get_room_for_more_classes() {
    for device in devices() {
        for device in [device.clone(), device.autodiff()] {
            let before = learnt_heads(&device);
            let tracked = before.weight.val().is_require_grad();
            let after = before.clone().with_classes(9).expect("more");
            assert_eq!(after.weight.dims(), [3, 9, 6]);
            assert_eq!(after.active(), 4);
            assert_eq!(after.weight.val().is_require_grad(), tracked);
            assert_ne!(after.weight.id, before.weight.id);
            let frozen = before.clone().no_grad().with_classes(9).expect("more");
            assert!(!frozen.weight.val().is_require_grad());
            if tracked {
                let again = before
                    .clone()
                    .valid()
                    .with_classes(9)
                    .expect("more")
                    .train();
                assert!(again.weight.val().is_require_grad());
                let frozen = frozen.valid().with_classes(10).expect("more").train();
                assert!(!frozen.weight.val().is_require_grad());
            }
            let of_old = after.weight.val().slice([0..3, 0..5, 0..6]);
            assert_eq!(read(of_old), read(before.weight.val()));
            let new = read(after.weight.val().slice([0..3, 5..9, 0..6]));
            assert!(new.iter().all(|v| v.abs() <= 1.0 / 6f32.sqrt()));
            assert!(new.iter().any(|&v| v != new[0]));
            let embeddings = || tensor(&numbers(126, 1), [3, 7, 6], &device);
            let loss = |heads: &CosineHeads| {
                let loss = heads.loss(embeddings(), labels(&device), &LossOptions::default());
                read(loss.expect("valid").total)
            };
            assert_eq!(loss(&after), loss(&before));
            let shots = (LABELS.map(|label| if label == 3 { 8 } else { -100 })).to_vec();
            let shots = super::labels_of(&shots, &device);
            let means = after.replace_prototypes(embeddings(), shots, 9, &Default::default());
            let (replaced, means) = means.expect("valid");
            means.check().expect("labels are valid");
            let replaced = replaced.with_active(9).expect("there are nine");
            let predicted = replaced.predict(embeddings()).expect("valid");
            let predicted = predicted.try_into_vec_as::<i64>();
            assert_eq!(predicted.expect("the device works")[1], 8);
            let refused = replaced.with_classes(8).map(drop);
            assert!(matches!(refused, Err(Error::Shape { .. })), "{refused:?}");
        }
    }
}
