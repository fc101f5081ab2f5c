//! The ops as Burn's backends see them.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, ExtensionType, backend_extension};

#[cfg(feature = "fusion")]
use super::specs::{
    class_means_spec, class_sums_spec, cross_entropy_grad_spec, cross_entropy_spec,
    fused_at_once_spec, fused_grad_spec, fused_spec, logits_grad_spec, logits_spec,
    reconstruction_grad_spec, reconstruction_spec, scaled_spec, total_grad_spec, total_spec,
};
use super::sums::State;
use crate::{cosine_cross_entropy as fused, cosine_logits as logits, cross_entropy};

/// A gradient that was asked for, or not.
#[derive(ExtensionType)]
#[cfg_attr(feature = "fusion", extension_type(fusion))]
pub(super) enum MaybeGrad<B: Backend> {
    Skipped,
    Computed(FloatTensor<B>),
}

impl<B: Backend> MaybeGrad<B> {
    pub(super) fn computed(self) -> Option<FloatTensor<B>> {
        match self {
            Self::Skipped => None,
            Self::Computed(gradient) => Some(gradient),
        }
    }
}

/// The ops, differentiable where the autodiff backend wraps them.
#[backend_extension(
    Cube: cfg(any(feature = "cpu", feature = "cuda", feature = "wgpu")),
    Fusion: cfg(feature = "fusion"),
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

    /// The weighted sum of the losses by head.
    #[fusion(meta = total_spec)]
    #[allow(unused_variables)]
    fn protohead_total(loss: FloatTensor<Self>, alphas: Vec<f32>) -> FloatTensor<Self>;

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

    /// Adds rows to class sums, which Burn does not see; their status, which orders the calls.
    #[fusion(meta = class_sums_spec)]
    #[allow(unused_variables)]
    fn protohead_class_sums(
        embeddings: FloatTensor<Self>,
        labels: IntTensor<Self>,
        status: IntTensor<Self>,
        state: State,
    ) -> IntTensor<Self>;

    /// Class weights with the means in place, counts, status, and the status that orders the calls.
    #[fusion(meta = class_means_spec)]
    #[allow(unused_variables, clippy::type_complexity)] // one per result
    fn protohead_class_means(
        weights: FloatTensor<Self>,
        status: IntTensor<Self>,
        state: State,
    ) -> (
        FloatTensor<Self>,
        IntTensor<Self>,
        IntTensor<Self>,
        IntTensor<Self>,
    );
}

/// What the autodiff backend asks of the one that it wraps.
#[backend_extension(Fusion: cfg(feature = "fusion"))]
pub(super) trait ProtoheadGradOps: Backend {
    /// Loss, lse, predictions, status, and the gradients of each head's loss.
    #[fusion(meta = fused_at_once_spec)]
    #[allow(unused_variables, clippy::type_complexity)] // one per result
    fn protohead_fused_at_once(
        embeddings: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        labels: IntTensor<Self>,
        options: fused::Options,
        need: [bool; 2],
    ) -> (
        FloatTensor<Self>,
        FloatTensor<Self>,
        IntTensor<Self>,
        IntTensor<Self>,
        MaybeGrad<Self>,
        MaybeGrad<Self>,
    );

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

    #[fusion(meta = total_grad_spec)]
    #[allow(unused_variables)]
    fn protohead_total_backward(grad: FloatTensor<Self>, alphas: Vec<f32>) -> FloatTensor<Self>;

    /// A gradient `[heads, rows, dim]`, each head's times its factor.
    #[fusion(meta = scaled_spec)]
    #[allow(unused_variables)]
    fn protohead_scaled(
        gradient: FloatTensor<Self>,
        by_head: FloatTensor<Self>,
    ) -> FloatTensor<Self>;

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
