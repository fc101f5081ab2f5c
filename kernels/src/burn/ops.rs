//! The ops as Burn's backends see them.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, ExtensionType, backend_extension};

#[cfg(feature = "burn")]
use super::specs::{
    class_means_spec, class_sums_spec, cross_entropy_grad_spec, cross_entropy_spec,
    fused_at_once_spec, fused_grad_spec, fused_spec, fused_with_scale_spec, logits_grad_spec,
    logits_spec, logits_with_scale_spec, product_spec, reconstruction_grad_spec,
    reconstruction_spec, scaled_spec, total_grad_spec, total_spec,
};
use super::sums::State;
use crate::{cosine_cross_entropy as fused, cosine_logits as logits, cross_entropy};

/// A gradient that was asked for, or not.
#[derive(ExtensionType)]
#[cfg_attr(feature = "burn", extension_type(fusion))]
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

impl<B: Backend> From<Option<FloatTensor<B>>> for MaybeGrad<B> {
    fn from(gradient: Option<FloatTensor<B>>) -> Self {
        gradient.map_or(Self::Skipped, Self::Computed)
    }
}

/// The results of a cross-entropy.
#[derive(ExtensionType)]
#[cfg_attr(feature = "burn", extension_type(fusion))]
pub(super) struct Losses<B: Backend> {
    pub loss: FloatTensor<B>,
    pub lse: FloatTensor<B>,
    /// `[2, heads, rows]`: lse, in the same buffer, and what rounding took from it.
    pub saved_lse: FloatTensor<B>,
    pub predictions: IntTensor<B>,
    pub status: IntTensor<B>,
}

/// What the backward pass of a cross-entropy reads of the forward pass.
#[derive(Clone, Debug, ExtensionType)]
#[cfg_attr(feature = "burn", extension_type(fusion))]
pub(super) struct SavedRows<B: Backend> {
    pub labels: IntTensor<B>,
    pub lse: FloatTensor<B>,
    pub status: IntTensor<B>,
}

/// The results of class means.
#[derive(ExtensionType)]
#[cfg_attr(feature = "burn", extension_type(fusion))]
pub(super) struct Means<B: Backend> {
    /// Class weights with the means in place.
    pub weights: FloatTensor<B>,
    pub counts: IntTensor<B>,
    pub status: IntTensor<B>,
    /// The status of the sums, which orders the calls.
    pub next: IntTensor<B>,
}

impl<B: Backend> Losses<B> {
    pub(super) fn saved(&self, labels: IntTensor<B>) -> SavedRows<B> {
        SavedRows {
            labels,
            lse: self.saved_lse.clone(),
            status: self.status.clone(),
        }
    }
}

/// The ops, differentiable where the autodiff backend wraps them.
#[backend_extension(
    Cube: cfg(any(feature = "cpu", feature = "cuda", feature = "wgpu")),
    Fusion: cfg(feature = "burn"),
    Autodiff
)]
pub(super) trait ProtoheadOps: Backend {
    #[fusion(meta = fused_spec)]
    #[allow(unused_variables)]
    fn protohead_fused(
        embeddings: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        labels: IntTensor<Self>,
        options: fused::Options,
    ) -> Losses<Self>;

    /// The same, differentiable by `scale [1]` too, whose value the options have.
    #[fusion(meta = fused_with_scale_spec)]
    #[allow(unused_variables)]
    fn protohead_fused_with_scale(
        embeddings: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        labels: IntTensor<Self>,
        options: fused::Options,
    ) -> Losses<Self>;

    /// The weighted sum of the losses by head.
    #[fusion(meta = total_spec)]
    #[allow(unused_variables)]
    fn protohead_total(loss: FloatTensor<Self>, alphas: Vec<f32>) -> FloatTensor<Self>;

    /// Of given logits.
    #[fusion(meta = cross_entropy_spec)]
    #[allow(unused_variables)]
    fn protohead_cross_entropy(
        logits: FloatTensor<Self>,
        labels: IntTensor<Self>,
        options: cross_entropy::Options,
    ) -> Losses<Self>;

    #[fusion(meta = logits_spec)]
    #[allow(unused_variables)]
    fn protohead_logits(
        embeddings: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        options: logits::Options,
    ) -> FloatTensor<Self>;

    /// The same, differentiable by `scale [1]` too, whose value the options have.
    #[fusion(meta = logits_with_scale_spec)]
    #[allow(unused_variables)]
    fn protohead_logits_with_scale(
        embeddings: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        scale: FloatTensor<Self>,
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

    #[fusion(meta = class_means_spec)]
    #[allow(unused_variables)]
    fn protohead_class_means(
        weights: FloatTensor<Self>,
        status: IntTensor<Self>,
        state: State,
    ) -> Means<Self>;
}

/// What the autodiff backend asks of the one that it wraps.
#[backend_extension(Fusion: cfg(feature = "burn"))]
pub(super) trait ProtoheadGradOps: Backend {
    /// The results, and the gradients of each head's loss: of the embeddings, the class weights, and the head's scale, `[heads]`.
    #[fusion(meta = fused_at_once_spec)]
    #[allow(unused_variables)]
    fn protohead_fused_at_once(
        embeddings: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        labels: IntTensor<Self>,
        options: fused::Options,
        need: [bool; 3],
    ) -> (
        Losses<Self>,
        MaybeGrad<Self>,
        MaybeGrad<Self>,
        MaybeGrad<Self>,
    );

    /// The gradients of the embeddings, the class weights, and the scale, `[1]`.
    #[fusion(meta = fused_grad_spec)]
    #[allow(unused_variables)]
    fn protohead_fused_backward(
        grad: FloatTensor<Self>,
        embeddings: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        #[extension_type] saved: SavedRows<Self>,
        options: fused::Options,
        need: [bool; 3],
    ) -> (MaybeGrad<Self>, MaybeGrad<Self>, MaybeGrad<Self>);

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

    /// The sum of the products of two numbers a head, `[1]`.
    #[fusion(meta = product_spec)]
    #[allow(unused_variables)]
    fn protohead_product(by_head: FloatTensor<Self>, with: FloatTensor<Self>) -> FloatTensor<Self>;

    #[fusion(meta = cross_entropy_grad_spec)]
    #[allow(unused_variables)]
    fn protohead_cross_entropy_backward(
        grad: FloatTensor<Self>,
        logits: FloatTensor<Self>,
        #[extension_type] saved: SavedRows<Self>,
        options: cross_entropy::Options,
    ) -> FloatTensor<Self>;

    /// The gradients of the embeddings, the class weights, and the scale, `[1]`.
    #[fusion(meta = logits_grad_spec)]
    #[allow(unused_variables)]
    fn protohead_logits_backward(
        grad: FloatTensor<Self>,
        embeddings: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        options: logits::Options,
        need: [bool; 3],
    ) -> (MaybeGrad<Self>, MaybeGrad<Self>, MaybeGrad<Self>);

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
