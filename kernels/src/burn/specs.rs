//! What fusion may know of the ops' results before anything runs.

use burn::backend::fusion::custom::TensorSpec;
use burn::tensor::{DType, Shape};

use super::ops::{LossesMetadata, MaybeGradMetadata, MeansMetadata, SavedRowsMetadata};
use super::sums::State;
use crate::class_means::SUMS_STATUS_FIELDS;
use crate::loss::reduce::STATUS_FIELDS;
use crate::{Reduction, cosine_cross_entropy as fused, cosine_logits as logits, cross_entropy};

pub(super) fn fused_spec(
    embeddings: &TensorSpec,
    _weights: &TensorSpec,
    _labels: &TensorSpec,
    options: &fused::Options,
) -> LossesMetadata {
    loss_spec(embeddings, options.loss.reduction)
}

pub(super) fn fused_with_scale_spec(
    embeddings: &TensorSpec,
    _weights: &TensorSpec,
    _scale: &TensorSpec,
    _labels: &TensorSpec,
    options: &fused::Options,
) -> LossesMetadata {
    loss_spec(embeddings, options.loss.reduction)
}

pub(super) fn fused_at_once_spec(
    embeddings: &TensorSpec,
    weights: &TensorSpec,
    _labels: &TensorSpec,
    options: &fused::Options,
    need: &[bool; 3],
) -> (
    LossesMetadata,
    MaybeGradMetadata,
    MaybeGradMetadata,
    MaybeGradMetadata,
) {
    let by_head = TensorSpec::new(Shape::new([embeddings.shape[0]]), DType::F32);
    (
        loss_spec(embeddings, options.loss.reduction),
        maybe(need[0], embeddings),
        maybe(need[1], weights),
        maybe(need[2], &by_head),
    )
}

pub(super) fn cross_entropy_spec(
    logits: &TensorSpec,
    _labels: &TensorSpec,
    options: &cross_entropy::Options,
) -> LossesMetadata {
    loss_spec(logits, options.loss.reduction)
}

pub(super) fn cross_entropy_grad_spec(
    _grad: &TensorSpec,
    logits: &TensorSpec,
    _saved: &SavedRowsMetadata,
    _options: &cross_entropy::Options,
) -> TensorSpec {
    logits.clone()
}

/// Of an operand `[heads, rows, ..]`.
pub(super) fn loss_spec(operand: &TensorSpec, reduction: Reduction) -> LossesMetadata {
    let (heads, rows) = (operand.shape[0], operand.shape[1]);
    let by_row = Shape::new([heads, rows]);
    let loss = match reduction {
        Reduction::None => by_row.clone(),
        Reduction::Sum | Reduction::Mean => Shape::new([heads]),
    };
    LossesMetadata {
        loss: TensorSpec::new(loss, DType::F32),
        lse: TensorSpec::new(by_row.clone(), DType::F32),
        saved_lse: TensorSpec::new(Shape::new([2, heads, rows]), DType::F32),
        predictions: TensorSpec::new(by_row, DType::U32),
        status: TensorSpec::new(Shape::new([STATUS_FIELDS]), DType::U32),
    }
}

pub(super) fn logits_spec(
    embeddings: &TensorSpec,
    weights: &TensorSpec,
    options: &logits::Options,
) -> TensorSpec {
    let active = options.active.unwrap_or(weights.shape[1]);
    let shape = Shape::new([embeddings.shape[0], embeddings.shape[1], active]);
    TensorSpec::new(shape, embeddings.dtype)
}

pub(super) fn logits_with_scale_spec(
    embeddings: &TensorSpec,
    weights: &TensorSpec,
    _scale: &TensorSpec,
    options: &logits::Options,
) -> TensorSpec {
    logits_spec(embeddings, weights, options)
}

pub(super) fn reconstruction_spec(
    _whole: &TensorSpec,
    _first: &TensorSpec,
    _second: &TensorSpec,
) -> TensorSpec {
    number()
}

pub(super) fn class_sums_spec(
    _embeddings: &TensorSpec,
    _labels: &TensorSpec,
    _status: &TensorSpec,
    _state: &State,
) -> TensorSpec {
    TensorSpec::new(Shape::new([SUMS_STATUS_FIELDS]), DType::U32)
}

pub(super) fn class_means_spec(
    weights: &TensorSpec,
    _status: &TensorSpec,
    state: &State,
) -> MeansMetadata {
    let status = || TensorSpec::new(Shape::new([SUMS_STATUS_FIELDS]), DType::U32);
    MeansMetadata {
        weights: weights.clone(),
        counts: TensorSpec::new(Shape::new([state.active]), DType::U32),
        status: status(),
        next: status(),
    }
}

pub(super) fn maybe(need: bool, like: &TensorSpec) -> MaybeGradMetadata {
    if need {
        MaybeGradMetadata::Computed(like.clone())
    } else {
        MaybeGradMetadata::Skipped
    }
}

pub(super) fn fused_grad_spec(
    _grad: &TensorSpec,
    embeddings: &TensorSpec,
    weights: &TensorSpec,
    _saved: &SavedRowsMetadata,
    _options: &fused::Options,
    need: &[bool; 3],
) -> (MaybeGradMetadata, MaybeGradMetadata, MaybeGradMetadata) {
    (
        maybe(need[0], embeddings),
        maybe(need[1], weights),
        maybe(need[2], &number()),
    )
}

pub(super) fn logits_grad_spec(
    _grad: &TensorSpec,
    embeddings: &TensorSpec,
    weights: &TensorSpec,
    _options: &logits::Options,
    need: &[bool; 3],
) -> (MaybeGradMetadata, MaybeGradMetadata, MaybeGradMetadata) {
    (
        maybe(need[0], embeddings),
        maybe(need[1], weights),
        maybe(need[2], &number()),
    )
}

pub(super) fn reconstruction_grad_spec(
    _grad: &TensorSpec,
    whole: &TensorSpec,
    first: &TensorSpec,
    _second: &TensorSpec,
    need: &[bool; 2],
) -> (MaybeGradMetadata, MaybeGradMetadata) {
    (maybe(need[0], whole), maybe(need[1], first))
}

pub(super) fn scaled_spec(gradient: &TensorSpec, _by_head: &TensorSpec) -> TensorSpec {
    gradient.clone()
}

pub(super) fn total_spec(_loss: &TensorSpec, _alphas: &[f32]) -> TensorSpec {
    number()
}

pub(super) fn product_spec(_by_head: &TensorSpec, _with: &TensorSpec) -> TensorSpec {
    number()
}

fn number() -> TensorSpec {
    TensorSpec::new(Shape::new([1]), DType::F32)
}

pub(super) fn total_grad_spec(_grad: &TensorSpec, alphas: &[f32]) -> TensorSpec {
    TensorSpec::new(Shape::new([alphas.len()]), DType::F32)
}
