//! The module `CosineHeads`.

use burn::module::Module;
use burn::store::ModuleRecord;
use burn::tensor::{DType, Device, FloatDType, Int, Tensor, TensorData};
use protohead::burn::{ClassMeans, ClassSums, CosineHeads, CosineHeadsConfig};
use protohead::{Error, LossOptions, Reduction};
use protohead_reference as reference;

use super::{
    LABELS, SCALE, SIZES, devices, heads, labels, labels_of, margin, near, numbers, read, tensor,
};

#[test]
fn the_module_gives_the_references_loss_gradients_and_prototypes() {
    for device in devices() {
        let device = device.autodiff();
        let (x, w) = (numbers(3 * 7 * 6, 1), numbers(3 * 5 * 6, 2));
        let wide = |values: &[f32]| values.iter().map(|&v| f64::from(v)).collect::<Vec<f64>>();
        let alphas = vec![1.0, 0.5, -2.0];
        // Every option is another than its default.
        let options = reference::LossOptions {
            reduction: reference::Reduction::Sum,
            label_smoothing: 0.1,
            ignore_index: -7,
            head_weights: alphas.clone(),
        };
        let judged = LABELS.map(|label| if label == -100 { -7 } else { label });
        let (x64, w64) = (wide(&x), wide(&w));
        let (margin, cosine) = margin();
        let truth = reference::cosine_cross_entropy(&x64, &w64, &judged, SIZES, cosine, &options);
        let truths = reference::cosine_cross_entropy_backward(
            &x64,
            &w64,
            &judged,
            SIZES,
            cosine,
            &options,
            &reference::Upstream::Total(1.0),
        );

        let module = heads(&device, &w).with_margin(margin);
        let embeddings = tensor(&x, [3, 7, 6], &device).require_grad();
        let loss_options = LossOptions {
            reduction: Reduction::Sum,
            label_smoothing: 0.1,
            ignore_index: -7,
            head_weights: Some(alphas.iter().map(|&a| a as f32).collect()),
        };
        let judged = |device: &Device| labels_of(&judged, device);
        // Of both ways: tracked, the gradients come with the loss.
        for module in [module.clone().valid(), module.clone()] {
            let place = module.weight.val().device();
            let embeddings = tensor(&x, [3, 7, 6], &place);
            let loss = module.loss(embeddings.clone(), judged(&place), &loss_options);
            let loss = loss.expect("valid");
            loss.check().expect("labels are valid");
            near("loss", &read(loss.heads.loss), &truth.loss);
            near("total", &read(loss.total), &[truth.total]);
            near("lse", &read(loss.heads.lse), &truth.lse);
            assert_eq!(predicted(loss.heads.predictions), truth.predictions);
            let predictions = module.predict(embeddings.clone()).expect("valid");
            assert_eq!(predicted(predictions), truth.predictions);
            let refused = module.loss_by_row(embeddings.clone(), judged(&place), &loss_options);
            assert_eq!(refused.map(drop).err(), Some(Error::HeadWeightsNotTaken));
            let unweighted = LossOptions {
                head_weights: None,
                ..loss_options.clone()
            };
            let by_row = module.loss_by_row(embeddings, judged(&place), &unweighted);
            let by_row = by_row.expect("valid");
            assert_eq!(predicted(by_row.counted()), [6]);
            near("losses by row", &read(by_row.loss.sum_dim(1)), &truth.loss);
        }
        let loss = module
            .loss(embeddings.clone(), judged(&device), &loss_options)
            .expect("valid");
        let gradients = loss.total.backward();
        near(
            "dX",
            &read(embeddings.grad(&gradients).expect("tracked")),
            &truths.embeddings,
        );
        near(
            "dW",
            &read(module.weight.val().grad(&gradients).expect("tracked")),
            &truths.weights,
        );

        let logits = module.forward(embeddings.clone()).expect("valid");
        near(
            "logits",
            &read(logits),
            &reference::cosine_logits(&x64, &w64, SIZES, SCALE),
        );

        let mut sums = reference::ClassSums::zeros(SIZES);
        sums.add(&x64, &LABELS, SIZES, true);
        let means = reference::class_means(&sums, &w64, SIZES);
        let mean_options = protohead::class_means::Options {
            normalize: true,
            ignore_index: -7,
            ..Default::default()
        };
        let (replaced, means_and_counts) = module
            .replace_prototypes(embeddings, judged(&device), 4, &mean_options)
            .expect("valid");
        means_and_counts.check().expect("labels are valid");
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

/// The weights are what they would be rounded by hand; their gradient and the prototypes keep the weights' dtype.
#[test]
fn embeddings_of_another_dtype_round_the_weights() {
    for device in devices() {
        for (dtype, float) in [
            (DType::F16, FloatDType::F16),
            (DType::BF16, FloatDType::BF16),
        ] {
            if device.supports_dtype(dtype) {
                weights_are_rounded(&device.clone().autodiff(), dtype, float);
            }
        }
    }
}

fn weights_are_rounded(device: &Device, dtype: DType, float: FloatDType) {
    let rounded = |tensor: Tensor<3>| tensor.cast(float);
    let module = heads(device, &numbers(90, 2));
    let mut by_hand = heads(device, &numbers(90, 2));
    by_hand.weight = by_hand.weight.map(|w| rounded(w).detach().require_grad());
    let embeddings = rounded(tensor(&numbers(126, 1), [3, 7, 6], device));

    let run = |module: &CosineHeads| {
        let logits = module.forward(embeddings.clone()).expect("valid");
        let options = LossOptions::default();
        let loss = module.loss(embeddings.clone(), labels(device), &options);
        let loss = loss.expect("valid");
        let gradients = loss.total.backward();
        let dw = module.weight.val().grad(&gradients).expect("tracked");
        (read(logits), read(loss.total), dw)
    };
    let (logits, loss, dw) = run(&module);
    let (logits_by_hand, loss_by_hand, dw_by_hand) = run(&by_hand);
    assert_eq!(logits, logits_by_hand);
    assert_eq!(loss, loss_by_hand);
    assert_eq!(dw.dtype(), DType::F32);
    assert_eq!(dw_by_hand.dtype(), dtype);
    assert_eq!(read(dw), read(dw_by_hand.cast(FloatDType::F32)));

    let prototypes = |embeddings: Tensor<3>| {
        let module = heads(device, &numbers(90, 2));
        let replaced =
            module.replace_prototypes(embeddings, labels(device), 4, &Default::default());
        replaced.expect("valid").0.weight.val()
    };
    let wide = embeddings.clone().cast(FloatDType::F32);
    assert_eq!(prototypes(embeddings.clone()).dtype(), DType::F32);
    assert_eq!(read(prototypes(embeddings)), read(prototypes(wide)));
}

/// Batches that nobody waits for are summed in order, to the bits of all rows at once, and what was read between stays as it was.
#[test]
fn prototypes_over_batches_are_those_of_all_rows_at_once() {
    for device in devices() {
        let trained = heads(&device.clone().autodiff(), &numbers(90, 2));
        for module in [trained.valid(), trained] {
            let device = module.weight.val().device();
            let embeddings = tensor(&numbers(126, 1), [3, 7, 6], &device);
            let options = Default::default();
            let (at_once, _) = module
                .replace_prototypes(embeddings.clone(), labels(&device), 4, &options)
                .expect("valid");
            let mut sums = ClassSums::new(3, 4, 6, &options, &device).expect("valid");
            let (untouched, nothing) = module.replace_prototypes_by(&mut sums).expect("valid");
            let mut between = None;
            for (first, last) in [(0, 3), (3, 4), (4, 7)] {
                // Halved and doubled, so that Burn has something of its own to put between.
                let rows = embeddings.clone().slice([0..3, first..last, 0..6]) * 0.5;
                let few = labels(&device).slice(first..last);
                sums.accumulate(rows * 2.0, few).expect("valid");
                if first == 0 {
                    let weights = module.weight.val() * 0.5;
                    between = Some(sums.means(weights * 2.0).expect("valid"));
                }
            }
            let (over_batches, means) = module.replace_prototypes_by(&mut sums).expect("valid");
            means.check().expect("labels are valid");
            let counts = |means: &ClassMeans| read_counts(means.counts.clone());
            assert_eq!(read(over_batches.weight.val()), read(at_once.weight.val()));
            assert_eq!(counts(&means), [2, 1, 2, 1]);
            assert_eq!(counts(&between.expect("it was asked for")), [1, 1, 0, 1]);
            assert_eq!(read(untouched.weight.val()), read(module.weight.val()));
            assert_eq!(counts(&nothing), [0; 4]);
        }
        // Sums of a device with autodiff, prototypes of a module without, and the other way round.
        let trained = heads(&device.clone().autodiff(), &numbers(90, 2));
        let embeddings = tensor(&numbers(126, 1), [3, 7, 6], &device);
        for (module, device) in [
            (trained.valid(), device.clone().autodiff()),
            (trained, device.clone()),
        ] {
            let trained = module.weight.val().is_require_grad();
            let mut sums = ClassSums::new(3, 4, 6, &Default::default(), &device).expect("valid");
            sums.accumulate(embeddings.clone(), labels(&device))
                .expect("valid");
            let (replaced, _) = module.replace_prototypes_by(&mut sums).expect("valid");
            assert_eq!(replaced.weight.val().is_require_grad(), trained);
            assert_eq!(replaced.weight.val().device().is_autodiff(), trained);
        }
    }
}

/// A bad label of any batch is told by the means, by its row in the batch.
#[test]
fn bad_labels_and_shapes_over_batches_are_told() {
    let device = Device::cpu();
    let module = heads(&device.clone().autodiff(), &numbers(90, 2)).valid();
    let mut sums = ClassSums::new(3, 4, 6, &Default::default(), &device).expect("valid");
    for values in [vec![0, 1, 2], vec![3, -9 << 40, -1], vec![0, 0, 7]] {
        let values = TensorData::new::<i64, _>(values, [3]);
        let labels: Tensor<1, Int> = Tensor::from_data(values, (&device, DType::I64));
        let rows = tensor(&numbers(3 * 3 * 6, 1), [3, 3, 6], &device);
        sums.accumulate(rows, labels).expect("shapes fit");
    }
    let told = Err(Error::Label {
        row: 1,
        label: -9 << 40,
        active: 4,
        rows: 3,
    });
    assert_eq!(sums.check(), told);
    let means = sums.means(module.weight.val()).expect("shapes fit");
    assert_eq!(means.check(), told);
    assert_eq!(read_counts(means.counts), [3, 1, 1, 1]);

    let three = |classes, dim| tensor(&numbers(3 * classes * dim, 1), [3, classes, dim], &device);
    let labels = Tensor::from_data(TensorData::new(vec![0i32, 1, 2], [3]), &device);
    for (rows, labels) in [
        (three(3, 5), labels.clone()),
        (three(4, 6), labels.clone()),
        (tensor(&numbers(36, 1), [2, 3, 6], &device), labels),
    ] {
        let refused = sums.accumulate(rows, labels);
        assert!(matches!(refused, Err(Error::Shape { .. })), "{refused:?}");
    }
    for weights in [three(3, 6), three(5, 5)] {
        let refused = sums.means(weights).map(drop);
        assert!(matches!(refused, Err(Error::Shape { .. })), "{refused:?}");
    }
    let nothing = ClassSums::new(3, 0, 6, &Default::default(), &device).map(drop);
    assert!(matches!(nothing, Err(Error::Empty { .. })), "{nothing:?}");
    let elsewhere = ClassSums::new(3, 4, 6, &Default::default(), &Device::flex()).map(drop);
    assert!(
        matches!(elsewhere, Err(Error::Place { .. })),
        "{elsewhere:?}"
    );
}

fn predicted<const D: usize>(classes: Tensor<D, Int>) -> Vec<u32> {
    let read = classes.try_into_vec_as::<i64>();
    let read = read.expect("the device works").into_iter();
    read.map(|class| class as u32).collect()
}

fn read_counts(counts: Tensor<1, Int>) -> Vec<u32> {
    counts.try_into_vec_as::<u32>().expect("the device works")
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
fn the_modules_record_saves_and_loads() {
    let device = Device::cpu();
    let config = CosineHeadsConfig::new(3, 5, 6)
        .with_scale(8.0)
        .with_angular_margin(0.5)
        .with_cosine_margin(0.25)
        .with_allow_tf32(true);
    let saved = config.init(&device).with_active(4).expect("it has five");
    let bytes = saved
        .clone()
        .into_record()
        .into_bytes()
        .expect("a record has bytes");
    let record = ModuleRecord::from_bytes(bytes).expect("the bytes are a record");
    // What a record leaves out is in the configuration.
    assert_eq!(saved.clone().with_scale(9.5).config().scale, 9.5);
    let config = saved.config();
    let CosineHeadsConfig {
        heads,
        classes,
        dim,
        active,
        scale,
        learnt_scale,
        angular_margin,
        cosine_margin,
        allow_tf32,
    } = config;
    assert!(!learnt_scale);
    assert_eq!([heads, classes, dim], [3, 5, 6]);
    assert_eq!((active, scale, allow_tf32), (Some(4), 8.0, true));
    assert_eq!((angular_margin, cosine_margin), (0.5, 0.25));
    let loaded = config
        .init(&device)
        .try_load_record(record)
        .expect("it fits");
    assert_eq!(read(saved.weight.val()), read(loaded.weight.val()));
}
