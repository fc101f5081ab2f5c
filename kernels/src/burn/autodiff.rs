//! The ops on Burn's autodiff backend: what is saved, and which gradients are registered.

use burn::backend::autodiff::Autodiff;
use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, NodeGuard, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{AutodiffBackend, Backend, TensorMetadata};
use burn::tensor::DType;

use super::ops::{Losses, MaybeGrad, Means, ProtoheadGradOps, ProtoheadOps, SavedRows};
use super::sums::State;
use crate::{Reduction, cosine_cross_entropy as fused, cosine_logits as logits, cross_entropy};

#[derive(Debug)]
struct FusedBackward;

/// What the fused op leaves for its backward pass.
#[derive(Clone, Debug)]
enum FusedState<B: Backend> {
    /// The gradients of each head's loss, which only want the factor that arrives: of the embeddings, the class weights and the scale.
    Gradients([Option<FloatTensor<B>>; 3]),
    /// What they can be computed from.
    Saved {
        embeddings: NodeId,
        weights: NodeId,
        rows: SavedRows<B>,
        options: Box<fused::Options>,
    },
}

/// Of the embeddings, the class weights and, if it is learnt, the scale.
impl<B: Backend + ProtoheadGradOps, const N: usize> Backward<B, N> for FusedBackward {
    type State = FusedState<B>;

    fn backward(
        self,
        ops: Ops<Self::State, N>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let grad = grads.consume::<B>(&ops.node);
        let gradients = match ops.state {
            FusedState::Gradients([embeddings, weights, scale]) => {
                // Not by Burn's multiplication, which tunes itself for seconds, and may end up slow on a CPU.
                let scaled = |gradient| B::protohead_scaled(gradient, grad.clone());
                [
                    embeddings.map(scaled).into(),
                    weights.map(scaled).into(),
                    scale
                        .map(|by_head| B::protohead_product(by_head, grad.clone()))
                        .into(),
                ]
            }
            FusedState::Saved {
                embeddings,
                weights,
                rows,
                options,
            } => B::protohead_fused_backward(
                grad,
                checkpointer.retrieve_node_output(embeddings),
                checkpointer.retrieve_node_output(weights),
                rows,
                *options,
                needed(&ops.parents),
            )
            .into(),
        };
        let parents = ops.parents.map(|node| node.map(|node| node.id));
        register_all::<B, N>(grads, parents, gradients);
    }
}

/// The fused op whose node has these parents.
fn fused_on<B, C, const N: usize>(
    parents: [NodeGuard; N],
    embeddings: FloatTensor<Autodiff<B, C>>,
    weights: FloatTensor<Autodiff<B, C>>,
    labels: IntTensor<B>,
    options: fused::Options,
    need: [bool; 3],
) -> Losses<Autodiff<B, C>>
where
    B: Backend + ProtoheadOps + ProtoheadGradOps,
    C: CheckpointStrategy,
{
    let prepared = <FusedBackward as Backward<B, N>>::prepare::<C>(FusedBackward, parents);
    match prepared.compute_bound().stateful() {
        OpsKind::Tracked(prepared) if at_once(embeddings.primitive().dtype(), &options) => {
            let (losses, of_embeddings, of_weights, of_scale) = B::protohead_fused_at_once(
                embeddings.into_primitive(),
                weights.into_primitive(),
                labels,
                options,
                need,
            );
            let gradients = [of_embeddings, of_weights, of_scale].map(MaybeGrad::computed);
            let state = FusedState::Gradients(gradients);
            tracked(losses, |loss| prepared.finish(state, loss))
        }
        OpsKind::Tracked(mut prepared) => {
            let saved = (
                prepared.checkpoint(&embeddings),
                prepared.checkpoint(&weights),
            );
            let losses = B::protohead_fused(
                embeddings.into_primitive(),
                weights.into_primitive(),
                labels.clone(),
                options.clone(),
            );
            let state = FusedState::Saved {
                embeddings: saved.0,
                weights: saved.1,
                rows: losses.saved(labels),
                options: Box::new(options),
            };
            tracked(losses, |loss| prepared.finish(state, loss))
        }
        OpsKind::UnTracked(prepared) => {
            let losses = B::protohead_fused(
                embeddings.into_primitive(),
                weights.into_primitive(),
                labels,
                options,
            );
            tracked(losses, |loss| prepared.finish(loss))
        }
    }
}

/// Whether gradients are computed with the loss: where each head's loss is one number, and what arrives one factor. Not of
/// less than f32, whose gradients might vanish for want of that factor.
fn at_once(dtype: DType, options: &fused::Options) -> bool {
    dtype == DType::F32 && options.loss.reduction != Reduction::None
}

#[derive(Debug)]
struct TotalBackward;

impl<B: Backend + ProtoheadGradOps> Backward<B, 1> for TotalBackward {
    type State = Vec<f32>;

    fn backward(
        self,
        ops: Ops<Self::State, 1>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let grad = grads.consume::<B>(&ops.node);
        let [parent] = ops.parents;
        if let Some(node) = parent {
            let by_head = B::protohead_total_backward(grad, ops.state);
            grads.register::<B>(node.id, by_head);
        }
    }
}

#[derive(Debug)]
struct CrossEntropyBackward;

impl<B: Backend + ProtoheadGradOps> Backward<B, 1> for CrossEntropyBackward {
    type State = (NodeId, SavedRows<B>, cross_entropy::Options);

    fn backward(
        self,
        ops: Ops<Self::State, 1>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let grad = grads.consume::<B>(&ops.node);
        let (logits, rows, options) = ops.state;
        let logits = checkpointer.retrieve_node_output(logits);
        let [parent] = ops.parents;
        if let Some(node) = parent {
            let gradient = B::protohead_cross_entropy_backward(grad, logits, rows, options);
            grads.register::<B>(node.id, gradient);
        }
    }
}

#[derive(Debug)]
struct LogitsBackward;

/// Of the embeddings, the class weights and, if it is learnt, the scale.
impl<B: Backend + ProtoheadGradOps, const N: usize> Backward<B, N> for LogitsBackward {
    type State = (NodeId, NodeId, logits::Options);

    fn backward(
        self,
        ops: Ops<Self::State, N>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let grad = grads.consume::<B>(&ops.node);
        let (embeddings, weights, options) = ops.state;
        let gradients = B::protohead_logits_backward(
            grad,
            checkpointer.retrieve_node_output(embeddings),
            checkpointer.retrieve_node_output(weights),
            options,
            needed(&ops.parents),
        );
        let parents = ops.parents.map(|node| node.map(|node| node.id));
        register_all::<B, N>(grads, parents, gradients.into());
    }
}

/// The logits whose node has these parents.
fn logits_on<B, C, const N: usize>(
    parents: [NodeGuard; N],
    embeddings: FloatTensor<Autodiff<B, C>>,
    weights: FloatTensor<Autodiff<B, C>>,
    options: logits::Options,
) -> FloatTensor<Autodiff<B, C>>
where
    B: Backend + ProtoheadOps + ProtoheadGradOps,
    C: CheckpointStrategy,
{
    let prepared = <LogitsBackward as Backward<B, N>>::prepare::<C>(LogitsBackward, parents);
    match prepared.compute_bound().stateful() {
        OpsKind::Tracked(mut prepared) => {
            let saved = (
                prepared.checkpoint(&embeddings),
                prepared.checkpoint(&weights),
            );
            let out = B::protohead_logits(
                embeddings.into_primitive(),
                weights.into_primitive(),
                options.clone(),
            );
            prepared.finish((saved.0, saved.1, options), out)
        }
        OpsKind::UnTracked(prepared) => prepared.finish(B::protohead_logits(
            embeddings.into_primitive(),
            weights.into_primitive(),
            options,
        )),
    }
}

#[derive(Debug)]
struct ReconstructionBackward;

impl<B: Backend + ProtoheadGradOps> Backward<B, 3> for ReconstructionBackward {
    type State = [NodeId; 3];

    fn backward(
        self,
        ops: Ops<Self::State, 3>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let grad = grads.consume::<B>(&ops.node);
        let [whole, first, second] = ops
            .state
            .map(|id| checkpointer.retrieve_node_output::<FloatTensor<B>>(id));
        let [of_whole, of_first, of_second] = ops.parents;
        let need = [
            of_whole.is_some(),
            of_first.is_some() || of_second.is_some(),
        ];
        let (whole_grad, part_grad) =
            B::protohead_reconstruction_backward(grad, whole, first, second, need);
        register::<B>(grads, of_whole.map(|node| node.id), whole_grad);
        if let MaybeGrad::Computed(gradient) = part_grad {
            for node in [of_first, of_second].into_iter().flatten() {
                grads.register::<B>(node.id, gradient.clone());
            }
        }
    }
}

/// Which gradients the parents of a cosine head wait for: the embeddings, the class weights and, if it is one of them, the scale.
fn needed<T, const N: usize>(parents: &[Option<T>; N]) -> [bool; 3] {
    [0, 1, 2].map(|at| matches!(parents.get(at), Some(Some(_))))
}

/// [`register`] of those.
fn register_all<B: Backend, const N: usize>(
    grads: &mut Gradients,
    parents: [Option<NodeId>; N],
    gradients: [MaybeGrad<B>; 3],
) {
    for (parent, gradient) in parents.into_iter().zip(gradients) {
        register::<B>(grads, parent, gradient);
    }
}

/// Hands a gradient that was computed to the parent that waits for it.
fn register<B: Backend>(grads: &mut Gradients, parent: Option<NodeId>, gradient: MaybeGrad<B>) {
    if let (Some(parent), MaybeGrad::Computed(gradient)) = (parent, gradient) {
        grads.register::<B>(parent, gradient);
    }
}

/// The results with a loss that is tracked, or not; the others never are.
fn tracked<B: Backend, C: CheckpointStrategy>(
    losses: Losses<B>,
    finish: impl FnOnce(FloatTensor<B>) -> FloatTensor<Autodiff<B, C>>,
) -> Losses<Autodiff<B, C>> {
    let constant = <Autodiff<B, C> as AutodiffBackend>::from_inner;
    Losses {
        loss: finish(losses.loss),
        lse: constant(losses.lse),
        saved_lse: constant(losses.saved_lse),
        predictions: losses.predictions,
        status: losses.status,
    }
}

impl<B: Backend + ProtoheadOps + ProtoheadGradOps, C: CheckpointStrategy> ProtoheadOps
    for Autodiff<B, C>
{
    fn protohead_fused(
        embeddings: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        labels: IntTensor<Self>,
        options: fused::Options,
    ) -> Losses<Self> {
        let parents = [embeddings.node(), weights.node()];
        let need = [embeddings.is_tracked(), weights.is_tracked(), false];
        fused_on(parents, embeddings, weights, labels, options, need)
    }

    fn protohead_fused_with_scale(
        embeddings: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        labels: IntTensor<Self>,
        options: fused::Options,
    ) -> Losses<Self> {
        let parents = [embeddings.node(), weights.node(), scale.node()];
        let need = [&embeddings, &weights, &scale].map(|tensor| tensor.is_tracked());
        fused_on(parents, embeddings, weights, labels, options, need)
    }

    fn protohead_total(loss: FloatTensor<Self>, alphas: Vec<f32>) -> FloatTensor<Self> {
        let prepared =
            <TotalBackward as Backward<B, 1>>::prepare::<C>(TotalBackward, [loss.node()]);
        match prepared.compute_bound().stateful() {
            OpsKind::Tracked(prepared) => {
                let total = B::protohead_total(loss.into_primitive(), alphas.clone());
                prepared.finish(alphas, total)
            }
            OpsKind::UnTracked(prepared) => {
                prepared.finish(B::protohead_total(loss.into_primitive(), alphas))
            }
        }
    }

    fn protohead_cross_entropy(
        logits: FloatTensor<Self>,
        labels: IntTensor<Self>,
        options: cross_entropy::Options,
    ) -> Losses<Self> {
        let prepared = <CrossEntropyBackward as Backward<B, 1>>::prepare::<C>(
            CrossEntropyBackward,
            [logits.node()],
        );
        match prepared.compute_bound().stateful() {
            OpsKind::Tracked(mut prepared) => {
                let saved = prepared.checkpoint(&logits);
                let losses = B::protohead_cross_entropy(
                    logits.into_primitive(),
                    labels.clone(),
                    options.clone(),
                );
                let state = (saved, losses.saved(labels), options);
                tracked(losses, |loss| prepared.finish(state, loss))
            }
            OpsKind::UnTracked(prepared) => {
                let losses = B::protohead_cross_entropy(logits.into_primitive(), labels, options);
                tracked(losses, |loss| prepared.finish(loss))
            }
        }
    }

    fn protohead_logits(
        embeddings: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        options: logits::Options,
    ) -> FloatTensor<Self> {
        let parents = [embeddings.node(), weights.node()];
        logits_on::<B, C, _>(parents, embeddings, weights, options)
    }

    fn protohead_logits_with_scale(
        embeddings: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        options: logits::Options,
    ) -> FloatTensor<Self> {
        let parents = [embeddings.node(), weights.node(), scale.node()];
        logits_on::<B, C, _>(parents, embeddings, weights, options)
    }

    fn protohead_reconstruction(
        whole: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let prepared = <ReconstructionBackward as Backward<B, 3>>::prepare::<C>(
            ReconstructionBackward,
            [whole.node(), first.node(), second.node()],
        );
        match prepared.compute_bound().stateful() {
            OpsKind::Tracked(mut prepared) => {
                let saved = [
                    prepared.checkpoint(&whole),
                    prepared.checkpoint(&first),
                    prepared.checkpoint(&second),
                ];
                let out = B::protohead_reconstruction(
                    whole.into_primitive(),
                    first.into_primitive(),
                    second.into_primitive(),
                );
                prepared.finish(saved, out)
            }
            OpsKind::UnTracked(prepared) => prepared.finish(B::protohead_reconstruction(
                whole.into_primitive(),
                first.into_primitive(),
                second.into_primitive(),
            )),
        }
    }

    fn protohead_class_sums(
        embeddings: FloatTensor<Self>,
        labels: IntTensor<Self>,
        status: IntTensor<Self>,
        state: State,
    ) -> IntTensor<Self> {
        B::protohead_class_sums(embeddings.into_primitive(), labels, status, state)
    }

    fn protohead_class_means(
        weights: FloatTensor<Self>,
        status: IntTensor<Self>,
        state: State,
    ) -> Means<Self> {
        let means = B::protohead_class_means(weights.into_primitive(), status, state);
        Means {
            weights: <Self as AutodiffBackend>::from_inner(means.weights),
            counts: means.counts,
            status: means.status,
            next: means.next,
        }
    }
}
