//! What is refused at a call, and what a bad label is told as.

use burn::module::Module;
use burn::tensor::quantization::QuantScheme;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use protohead::burn::{
    CosineHeads, CosineHeadsConfig, cosine_cross_entropy, cosine_cross_entropy_by_row,
    cross_entropy_by_row, predictions, reconstruction,
};
use protohead::{Error, LossOptions, Reduction, cosine_cross_entropy as fused, cross_entropy};

use super::{heads, labels, numbers, read, tensor};

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
        assert_eq!(refused, Err(Error::HeadWeightsNotTaken));
    }
    let unreduced = fused::Options {
        loss: LossOptions {
            reduction: Reduction::None,
            ..LossOptions::default()
        },
        ..fused::Options::default()
    };
    let of_logits = cross_entropy::Options {
        loss: unreduced.loss.clone(),
        ..cross_entropy::Options::default()
    };
    for refused in [
        cosine_cross_entropy(embeddings(), weights(), labels(&device), &unreduced).map(drop),
        protohead::burn::cross_entropy(embeddings(), labels(&device), &of_logits).map(drop),
    ] {
        assert!(matches!(
            refused,
            Err(Error::Reduction {
                got: Reduction::None,
                ..
            })
        ));
    }
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
        loss.check(),
        Err(Error::Label {
            row: 4,
            label: 9,
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
            label: -1,
            active: 4,
            rows: 2
        })
    );
}

/// Not all of u64 become the i64 that the kernels read.
#[test]
fn labels_of_u64_are_refused_and_smaller_ones_are_widened() {
    let device = Device::cpu();
    let module = heads(&device.clone().autodiff(), &numbers(90, 2)).valid();
    let values = [0i64, 3, 1, 2, 2, 2, 0];
    let loss = |dtype| {
        let labels = Tensor::from_data(TensorData::new(values.to_vec(), [7]), (&device, dtype));
        let embeddings = tensor(&numbers(126, 1), [3, 7, 6], &device);
        let loss = module.loss(embeddings, labels, &LossOptions::default())?;
        loss.check()?;
        Ok(read(loss.total))
    };
    let told = loss(DType::U64).map_err(|error: Error| error.to_string());
    assert_eq!(
        told,
        Err("labels: dtype u64, expected i32, i64 or u32, as far as the device has them".into())
    );
    for dtype in [DType::I8, DType::U8, DType::I16, DType::U32, DType::I64] {
        assert_eq!(loss(dtype), loss(DType::I32), "{dtype:?}");
    }
}

/// Burn itself would panic.
#[test]
fn two_ways_to_checkpoint_gradients_are_refused() {
    let device = Device::cpu().autodiff();
    let module = heads(&device, &numbers(90, 2));
    let checkpointing = Device::cpu().autodiff().gradient_checkpointing();
    let embeddings = tensor(&numbers(126, 1), [3, 7, 6], &checkpointing);
    let refused = |result: Result<(), Error>, named: &str| match result {
        Err(Error::Place {
            operand,
            on,
            expected,
        }) => {
            assert_eq!(operand, named);
            assert_ne!(on, expected);
        }
        other => panic!("{named}: {other:?}"),
    };
    refused(
        module.forward(embeddings.clone()).map(drop),
        "class weights",
    );
    let options = LossOptions::default();
    let loss = module.loss(embeddings.clone(), labels(&checkpointing), &options);
    refused(loss.map(drop), "class weights");
    let weights = tensor(&numbers(90, 2), [3, 5, 6], &checkpointing);
    let loss = cosine_cross_entropy(embeddings, weights, labels(&device), &Default::default());
    refused(loss.map(drop), "labels");
    // The first operand has no gradient to differ in.
    let plain = Device::cpu();
    let frozen = tensor(&numbers(126, 1), [3, 7, 6], &plain);
    let weights = tensor(&numbers(90, 2), [3, 5, 6], &device);
    let labels = labels(&checkpointing);
    let loss = cosine_cross_entropy(frozen, weights, labels, &Default::default());
    refused(loss.map(drop), "labels");
    let part = |device| tensor(&numbers(42, 1), [7, 6], device);
    let loss = reconstruction(part(&plain), part(&device), part(&checkpointing));
    refused(loss.map(drop), "second part");
}

/// A view that takes no memory, of more rows than there is memory for labels.
#[test]
fn predictions_of_too_many_rows_are_refused_before_anything_is_allocated() {
    let device = Device::cpu();
    let rows = tensor(&numbers(6, 1), [1, 1, 6], &device).expand([1, 1 << 30, 6]);
    let weights = tensor(&numbers(30, 2), [1, 5, 6], &device);
    let refused = predictions(rows, weights, &Default::default()).map(drop);
    assert!(
        matches!(refused, Err(Error::TooLarge { .. })),
        "{refused:?}"
    );
}

#[test]
fn quantized_weights_are_dequantized() {
    let device = Device::cpu();
    // Four values are packed in a word.
    let mut quantized = CosineHeadsConfig::new(3, 5, 8).init(&device);
    let scheme = QuantScheme::default();
    quantized.weight = quantized
        .weight
        .map(|weights| weights.quantize_dynamic(&scheme));
    let mut by_hand = quantized.clone();
    by_hand.weight = by_hand.weight.map(Tensor::dequantize);
    assert!(matches!(quantized.weight.val().dtype(), DType::QFloat(_)));
    let logits = |module: &CosineHeads| {
        let embeddings = tensor(&numbers(168, 1), [3, 7, 8], &device);
        read(module.forward(embeddings).expect("valid"))
    };
    assert_eq!(logits(&quantized), logits(&by_hand));
    let shots = || tensor(&numbers(168, 3), [3, 7, 8], &device);
    let prototypes = |module: &CosineHeads| {
        let replaced = module.replace_prototypes(shots(), labels(&device), 4, &Default::default());
        read(replaced.expect("valid").0.weight.val())
    };
    assert_eq!(prototypes(&quantized), prototypes(&by_hand));
    let more = quantized.with_classes(6).expect("more").weight.val();
    let before = read(by_hand.weight.val());
    assert_eq!(read(more.slice([0..3, 0..5, 0..8])), before);
}
