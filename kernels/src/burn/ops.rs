//! The ops as Burn's backends see them: what is routed, and what fusion may know before anything runs.

use burn::backend::fusion::custom::TensorSpec;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, ExtensionType, backend_extension};
use burn::tensor::{DType, Shape};

use crate::{Reduction, cosine_cross_entropy as fused, cosine_logits as logits, cross_entropy};

/// A gradient that was asked for, or not.
#[derive(ExtensionType)]
#[extension_type(fusion)]
pub(super) enum MaybeGrad<B: Backend> {
    Skipped,
    Computed(FloatTensor<B>),
}

/// The ops, differentiable where the autodiff backend wraps them.
#[backend_extension(
    Cube: cfg(any(feature = "cpu", feature = "cuda", feature = "wgpu")),
    Fusion,
    Autodiff
)]
pub(super) trait ProtoheadOps: Backend {
    /// Loss, lse, predictions, status.
    #[fusion(meta = fused_spec)]
    #[allow(unused_variables)]
    fn protohead_fused(
        embeddings: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        labels: IntTensor<Self>,
        options: fused::Options,
    ) -> (
        FloatTensor<Self>,
        FloatTensor<Self>,
        IntTensor<Self>,
        IntTensor<Self>,
    );

    /// Loss, lse, predictions, status of given logits.
    #[fusion(meta = cross_entropy_spec)]
    #[allow(unused_variables)]
    fn protohead_cross_entropy(
        logits: FloatTensor<Self>,
        labels: IntTensor<Self>,
        options: cross_entropy::Options,
    ) -> (
        FloatTensor<Self>,
        FloatTensor<Self>,
        IntTensor<Self>,
        IntTensor<Self>,
    );

    #[fusion(meta = logits_spec)]
    #[allow(unused_variables)]
    fn protohead_logits(
        embeddings: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        options: logits::Options,
    ) -> FloatTensor<Self>;

    #[fusion(meta = reconstruction_spec)]
    #[allow(unused_variables)]
    fn protohead_reconstruction(
        whole: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
    ) -> FloatTensor<Self>;

    /// Class weights with the means in place, and counts.
    #[fusion(meta = class_means_spec)]
    #[allow(unused_variables)]
    fn protohead_class_means(
        embeddings: FloatTensor<Self>,
        labels: IntTensor<Self>,
        weights: FloatTensor<Self>,
        active: usize,
        normalize: bool,
    ) -> (FloatTensor<Self>, IntTensor<Self>);
}

/// The backward passes, called on the inner backend only.
#[backend_extension(Fusion)]
pub(super) trait ProtoheadGradOps: Backend {
    #[fusion(meta = fused_grad_spec)]
    #[allow(unused_variables, clippy::too_many_arguments)] // one per thing that was saved
    fn protohead_fused_backward(
        grad: FloatTensor<Self>,
        embeddings: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        labels: IntTensor<Self>,
        lse: FloatTensor<Self>,
        status: IntTensor<Self>,
        options: fused::Options,
        need: [bool; 2],
    ) -> (MaybeGrad<Self>, MaybeGrad<Self>);

    #[fusion(meta = cross_entropy_grad_spec)]
    #[allow(unused_variables)]
    fn protohead_cross_entropy_backward(
        grad: FloatTensor<Self>,
        logits: FloatTensor<Self>,
        labels: IntTensor<Self>,
        lse: FloatTensor<Self>,
        status: IntTensor<Self>,
        options: cross_entropy::Options,
    ) -> FloatTensor<Self>;

    #[fusion(meta = logits_grad_spec)]
    #[allow(unused_variables)]
    fn protohead_logits_backward(
        grad: FloatTensor<Self>,
        embeddings: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        options: logits::Options,
        need: [bool; 2],
    ) -> (MaybeGrad<Self>, MaybeGrad<Self>);

    /// Of the whole, and of either part.
    #[fusion(meta = reconstruction_grad_spec)]
    #[allow(unused_variables)]
    fn protohead_reconstruction_backward(
        grad: FloatTensor<Self>,
        whole: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
        need: [bool; 2],
    ) -> (MaybeGrad<Self>, MaybeGrad<Self>);
}

fn fused_spec(
    embeddings: &TensorSpec,
    _weights: &TensorSpec,
    _labels: &TensorSpec,
    options: &fused::Options,
) -> (TensorSpec, TensorSpec, TensorSpec, TensorSpec) {
    loss_spec(embeddings, options.loss.reduction)
}

fn cross_entropy_spec(
    logits: &TensorSpec,
    _labels: &TensorSpec,
    options: &cross_entropy::Options,
) -> (TensorSpec, TensorSpec, TensorSpec, TensorSpec) {
    loss_spec(logits, options.loss.reduction)
}

fn cross_entropy_grad_spec(
    _grad: &TensorSpec,
    logits: &TensorSpec,
    _labels: &TensorSpec,
    _lse: &TensorSpec,
    _status: &TensorSpec,
    _options: &cross_entropy::Options,
) -> TensorSpec {
    logits.clone()
}

/// Of an operand `[heads, rows, ..]`.
fn loss_spec(
    operand: &TensorSpec,
    reduction: Reduction,
) -> (TensorSpec, TensorSpec, TensorSpec, TensorSpec) {
    let (heads, rows) = (operand.shape[0], operand.shape[1]);
    let by_row = Shape::new([heads, rows]);
    let loss = match reduction {
        Reduction::None => by_row.clone(),
        Reduction::Sum | Reduction::Mean => Shape::new([heads]),
    };
    (
        TensorSpec::new(loss, DType::F32),
        TensorSpec::new(by_row.clone(), DType::F32),
        TensorSpec::new(by_row, DType::U32),
        TensorSpec::new(Shape::new([3]), DType::U32),
    )
}

fn logits_spec(
    embeddings: &TensorSpec,
    weights: &TensorSpec,
    options: &logits::Options,
) -> TensorSpec {
    let active = options.active.unwrap_or(weights.shape[1]);
    let shape = Shape::new([embeddings.shape[0], embeddings.shape[1], active]);
    TensorSpec::new(shape, embeddings.dtype)
}

fn reconstruction_spec(
    _whole: &TensorSpec,
    _first: &TensorSpec,
    _second: &TensorSpec,
) -> TensorSpec {
    TensorSpec::new(Shape::new([1]), DType::F32)
}

fn class_means_spec(
    _embeddings: &TensorSpec,
    _labels: &TensorSpec,
    weights: &TensorSpec,
    active: &usize,
    _normalize: &bool,
) -> (TensorSpec, TensorSpec) {
    (
        weights.clone(),
        TensorSpec::new(Shape::new([*active]), DType::U32),
    )
}

fn maybe(need: bool, like: &TensorSpec) -> MaybeGradMetadata {
    if need {
        MaybeGradMetadata::Computed(like.clone())
    } else {
        MaybeGradMetadata::Skipped
    }
}

#[allow(clippy::too_many_arguments)] // one per argument of the op
fn fused_grad_spec(
    _grad: &TensorSpec,
    embeddings: &TensorSpec,
    weights: &TensorSpec,
    _labels: &TensorSpec,
    _lse: &TensorSpec,
    _status: &TensorSpec,
    _options: &fused::Options,
    need: &[bool; 2],
) -> (MaybeGradMetadata, MaybeGradMetadata) {
    (maybe(need[0], embeddings), maybe(need[1], weights))
}

fn logits_grad_spec(
    _grad: &TensorSpec,
    embeddings: &TensorSpec,
    weights: &TensorSpec,
    _options: &logits::Options,
    need: &[bool; 2],
) -> (MaybeGradMetadata, MaybeGradMetadata) {
    (maybe(need[0], embeddings), maybe(need[1], weights))
}

fn reconstruction_grad_spec(
    _grad: &TensorSpec,
    whole: &TensorSpec,
    first: &TensorSpec,
    _second: &TensorSpec,
    need: &[bool; 2],
) -> (MaybeGradMetadata, MaybeGradMetadata) {
    (maybe(need[0], whole), maybe(need[1], first))
}
