//! The ops as functions on [Burn](https://burn.dev) tensors, differentiable on an autodiff device, and a module to put
//! in a model.
//!
//! They run on CubeCL's devices, with the crate's features `cpu`, `cuda` and `wgpu`. Shapes and options are checked at the call and returned as an [`Error`]. Each operand has at most 2³² − 2²⁴ elements, the
//! padding that kernels add included; on a CPU the embeddings and the active class weights of a product have so many together. Each
//! also fits in one buffer of the device, as its gradient has to. Labels are data on the device: a row whose label is not a class counts
//! as ignored, and only the `check` of what the call returns, and [`ClassSums::check`], report it. The `strategy` of options is ignored: the device picks
//! the variant. Only losses, logits and reconstruction are differentiable.
//!
//! On a CPU, wait for every step, as `check` does: a thread that fills Burn's and CubeCL's queues takes a core from the kernels, and a
//! small step then takes ten times as long.

mod autodiff;
mod checks;
mod cube;
mod heads;
mod learnt;
mod ops;
#[cfg(feature = "burn")]
mod specs;
mod sums;
mod total;

pub use crate::cosine_cross_entropy::Margin;
pub use heads::{CosineHeads, CosineHeadsConfig, HeadsLoss};
pub use sums::{ClassMeans, ClassSums, class_means};

use burn::backend::Dispatch;
use burn::tensor::{DType, Int, Tensor};

use crate::loss::target::joined;
use crate::operand::{F32, allocatable, count};
use crate::{
    Error, LossOptions, Reduction, Strategy, cosine_cross_entropy as fused,
    cosine_logits as logits_op, cross_entropy as cross_entropy_op,
};
use checks::{
    cube_client, float_dtype, head_operands, product_operands, row_labels, sized, storable,
    together,
};
use learnt::{in_f32, learnt};
use ops::{Losses, ProtoheadOps};

/// The result of a cross-entropy.
#[must_use = "labels that are no class are only reported by `check`"]
#[derive(Clone, Debug)]
pub struct CrossEntropy<const D: usize> {
    /// `[heads]`, or `[heads, rows]` without a reduction; f32, without head weights. Differentiable.
    pub loss: Tensor<D>,
    /// `[heads, rows]`, f32: `ln Σ_c e^z` of the logits that the loss sees, with a margin if there is one.
    pub lse: Tensor<2>,
    /// `[heads, rows]`: the class of the highest logit, without a margin.
    pub predictions: Tensor<2, Int>,
    labels: Judged,
}

/// Labels, and what the device found in them.
#[derive(Clone, Debug)]
struct Judged {
    /// Absent of class sums, whose status has the bad label.
    labels: Option<Tensor<1, Int>>,
    /// Of a loss or of class sums, as the device wrote it.
    status: Tensor<1, Int>,
    active: usize,
}

impl Judged {
    fn check(&self) -> Result<(), Error> {
        let read = |tensor: &Tensor<1, Int>| {
            let values = tensor.clone().try_into_vec_as::<i64>();
            values.map_err(Error::device)
        };
        let status = read(&self.status)?;
        let few = || Error::Device("a read returned too few numbers".into());
        let (invalid, row, label) = match (&self.labels, &status[..]) {
            (Some(labels), &[_counted, invalid, row]) => {
                let labels = if invalid > 0 { read(labels)? } else { vec![] };
                (invalid, row, labels.get(row as usize).copied())
            }
            (None, &[invalid, row, low, high]) => {
                (invalid, row, Some(joined(low as u32, high as u32)))
            }
            _ => return Err(few()),
        };
        if invalid == 0 {
            return Ok(());
        }
        Err(Error::Label {
            row: row as usize,
            label: label.ok_or_else(few)?,
            active: self.active,
            rows: invalid as usize,
        })
    }
}

impl<const D: usize> CrossEntropy<D> {
    /// With predictions in the device's own integers.
    fn new(losses: Losses<Dispatch>, labels: Tensor<1, Int>, active: usize) -> Self {
        let int = labels.device().settings().int_dtype;
        Self {
            loss: Tensor::from_dispatch(losses.loss),
            lse: Tensor::from_dispatch(losses.lse),
            predictions: Tensor::<2, Int>::from_dispatch(losses.predictions).cast(int),
            labels: Judged {
                labels: Some(labels),
                status: Tensor::from_dispatch(losses.status),
                active,
            },
        }
    }

    /// Waits, and says whether every label was a class or ignored.
    ///
    /// # Errors
    /// [`Error::Label`] with the first row that was not, [`Error::Device`] if the device failed.
    pub fn check(&self) -> Result<(), Error> {
        self.labels.check()
    }

    /// `[1]`: how many rows count, those that are not ignored. [`Reduction::Mean`] divides by it, or by 1 if it is 0, and so should a mean
    /// of losses by row.
    pub fn counted(&self) -> Tensor<1, Int> {
        let int = self.predictions.dtype();
        self.labels.status.clone().slice(0..1).cast(int)
    }
}

/// The loss of each head, `[heads]`: see [`cosine_cross_entropy`](crate::cosine_cross_entropy).
///
/// Of f32 operands that are tracked, the gradients are computed with the loss, in
/// [`forward_backward`](crate::cosine_cross_entropy::forward_backward), and kept until the next backward pass, which scales them; so
/// evaluate on a device without autodiff, as `Module::valid` does. Of f16 and bf16, the backward pass computes them.
///
/// # Errors
/// A typed [`Error`] if shapes, dtypes, devices or options do not fit, the reduction is [`Reduction::None`], or there are head
/// weights: multiply the result by them instead, or use [`CosineHeads::loss`].
pub fn cosine_cross_entropy(
    embeddings: Tensor<3>,
    weights: Tensor<3>,
    labels: Tensor<1, Int>,
    options: &fused::Options,
) -> Result<CrossEntropy<1>, Error> {
    reduced(&options.loss)?;
    fused_loss(embeddings, weights, None, labels, options)
}

/// [`cosine_cross_entropy`] with a scale that is learnt, `scale [1]`, whose value takes the place of the options': to read it, the
/// call waits for what computes it. Its gradient costs what that of the embeddings does.
///
/// # Errors
/// As [`cosine_cross_entropy`]; and if the scale is not one number, or 0 on an autodiff device.
pub fn cosine_cross_entropy_with_scale(
    embeddings: Tensor<3>,
    weights: Tensor<3>,
    scale: Tensor<1>,
    labels: Tensor<1, Int>,
    options: &fused::Options,
) -> Result<CrossEntropy<1>, Error> {
    reduced(&options.loss)?;
    fused_loss(embeddings, weights, Some(scale), labels, options)
}

/// Proves that a loss is one number a head.
fn reduced(options: &LossOptions) -> Result<(), Error> {
    match options.reduction {
        Reduction::None => Err(Error::Reduction {
            got: Reduction::None,
            expected: "Mean or Sum: the function whose name ends with by_row takes none",
        }),
        Reduction::Sum | Reduction::Mean => Ok(()),
    }
}

/// Proves the options of a loss that is returned head by head.
fn unweighted(options: &LossOptions, heads: usize) -> Result<(), Error> {
    options.validate(heads)?;
    match &options.head_weights {
        None => Ok(()),
        Some(_) => Err(Error::HeadWeightsNotTaken),
    }
}

/// The weighted sum of the heads' losses, `[1]`, of `loss [heads]`.
fn total(loss: Tensor<1>, alphas: Vec<f32>) -> Tensor<1> {
    Tensor::from_dispatch(<Dispatch as ProtoheadOps>::protohead_total(
        loss.into_dispatch(),
        alphas,
    ))
}

/// The loss of each row of each head, `[heads, rows]`, 0 where the label is ignored; the options' reduction is ignored. A mean that
/// leaves such rows out divides by [`counted`](CrossEntropy::counted).
///
/// # Errors
/// A typed [`Error`] if shapes, dtypes, devices or options do not fit, or there are head weights: multiply the result by them instead.
pub fn cosine_cross_entropy_by_row(
    embeddings: Tensor<3>,
    weights: Tensor<3>,
    labels: Tensor<1, Int>,
    options: &fused::Options,
) -> Result<CrossEntropy<2>, Error> {
    let mut options = options.clone();
    options.loss.reduction = Reduction::None;
    fused_loss(embeddings, weights, None, labels, &options)
}

fn fused_loss<const D: usize>(
    embeddings: Tensor<3>,
    weights: Tensor<3>,
    scale: Option<Tensor<1>>,
    labels: Tensor<1, Int>,
    options: &fused::Options,
) -> Result<CrossEntropy<D>, Error> {
    let [heads, rows, _] = embeddings.dims();
    let mut options = options.clone();
    if let Some(scale) = &scale {
        options.scale = learnt(scale, &embeddings, &weights)?;
    }
    options.strategy = Strategy::Inferred;
    let active = product_operands(
        &embeddings,
        &weights,
        options.scale,
        options.active,
        options.allow_tf32,
    )?;
    unweighted(&options.loss, heads)?;
    options.margin.validate(options.scale)?;
    row_labels(&labels, rows, &embeddings.device())?;
    // The embeddings may have no gradient, and so nothing that the labels differ from.
    together("labels", &labels.device(), &weights.device())?;
    let (x, w) = (embeddings.into_dispatch(), weights.into_dispatch());
    let y = labels.clone().into_dispatch();
    let results = match scale {
        None => Dispatch::protohead_fused(x, w, y, options),
        Some(scale) => {
            let scale = in_f32(scale).into_dispatch();
            Dispatch::protohead_fused_with_scale(x, w, scale, y, options)
        }
    };
    Ok(CrossEntropy::new(results, labels, active))
}

/// The class of the highest logit of each row, `[heads, rows]`, in memory that does not grow with rows × classes. The options of the
/// loss and margins take no part.
///
/// # Errors
/// A typed [`Error`] if shapes, dtypes, devices or options do not fit.
pub fn predictions(
    embeddings: Tensor<3>,
    weights: Tensor<3>,
    options: &fused::Options,
) -> Result<Tensor<2, Int>, Error> {
    let [_, rows, _] = embeddings.dims();
    let options = fused::Options {
        margin: fused::Margin::default(),
        loss: LossOptions::default(),
        ..options.clone()
    };
    let (scale, active, tf32) = (options.scale, options.active, options.allow_tf32);
    product_operands(&embeddings, &weights, scale, active, tf32)?;
    // The loss finds them, whatever the labels are.
    let labels = Tensor::zeros([rows], (&embeddings.device(), DType::I32));
    // A parameter that is only detached still has a gradient computed, and kept for a backward pass that never comes.
    let [embeddings, weights] = [embeddings, weights].map(|t| t.detach().set_require_grad(false));
    Ok(cosine_cross_entropy(embeddings, weights, labels, &options)?.predictions)
}

/// The loss of each head, `[heads]`, of given `logits [heads, rows, classes]`: see [`cross_entropy`](crate::cross_entropy).
///
/// # Errors
/// A typed [`Error`] if shapes, dtypes, devices or options do not fit, the reduction is [`Reduction::None`], or there are head
/// weights: multiply the result by them instead.
pub fn cross_entropy(
    logits: Tensor<3>,
    labels: Tensor<1, Int>,
    options: &cross_entropy_op::Options,
) -> Result<CrossEntropy<1>, Error> {
    reduced(&options.loss)?;
    given_loss(logits, labels, options.clone())
}

/// The loss of each row of each head, `[heads, rows]`, of given logits, as [`cosine_cross_entropy_by_row`] has it.
///
/// # Errors
/// A typed [`Error`] if shapes, dtypes, devices or options do not fit, or there are head weights: multiply the result by them instead.
pub fn cross_entropy_by_row(
    logits: Tensor<3>,
    labels: Tensor<1, Int>,
    options: &cross_entropy_op::Options,
) -> Result<CrossEntropy<2>, Error> {
    let mut options = options.clone();
    options.loss.reduction = Reduction::None;
    given_loss(logits, labels, options)
}

fn given_loss<const D: usize>(
    logits: Tensor<3>,
    labels: Tensor<1, Int>,
    mut options: cross_entropy_op::Options,
) -> Result<CrossEntropy<D>, Error> {
    let client = cube_client(&logits.device())?;
    let [heads, rows, active] = logits.dims();
    sized("logits", &logits.dims())?;
    storable("logits", &logits)?;
    // What a backward pass knows of each row.
    let row_states = [2, heads, rows];
    sized("row states", &row_states)?;
    allocatable(&client, "row states", count(&row_states), F32)?;
    options.strategy = Strategy::Inferred;
    unweighted(&options.loss, heads)?;
    row_labels(&labels, rows, &logits.device())?;
    let results = <Dispatch as ProtoheadOps>::protohead_cross_entropy(
        logits.into_dispatch(),
        labels.clone().into_dispatch(),
        options,
    );
    Ok(CrossEntropy::new(results, labels, active))
}

/// Logits `[heads, rows, K]`: see [`cosine_logits`](crate::cosine_logits).
///
/// # Errors
/// A typed [`Error`] if shapes, dtypes, devices or options do not fit.
pub fn cosine_logits(
    embeddings: Tensor<3>,
    weights: Tensor<3>,
    options: &logits_op::Options,
) -> Result<Tensor<3>, Error> {
    given_or_learnt_logits(embeddings, weights, None, options)
}

/// [`cosine_logits`] with a scale that is learnt, as [`cosine_cross_entropy_with_scale`] has it.
///
/// # Errors
/// As [`cosine_logits`]; and if the scale is not one number, or 0 on an autodiff device.
pub fn cosine_logits_with_scale(
    embeddings: Tensor<3>,
    weights: Tensor<3>,
    scale: Tensor<1>,
    options: &logits_op::Options,
) -> Result<Tensor<3>, Error> {
    given_or_learnt_logits(embeddings, weights, Some(scale), options)
}

fn given_or_learnt_logits(
    embeddings: Tensor<3>,
    weights: Tensor<3>,
    scale: Option<Tensor<1>>,
    options: &logits_op::Options,
) -> Result<Tensor<3>, Error> {
    let mut options = options.clone();
    if let Some(scale) = &scale {
        options.scale = learnt(scale, &embeddings, &weights)?;
    }
    options.strategy = Strategy::Inferred;
    let active = product_operands(
        &embeddings,
        &weights,
        options.scale,
        options.active,
        options.allow_tf32,
    )?;
    let [heads, rows, _] = embeddings.dims();
    let shape = [heads, rows, active];
    sized("logits", &shape)?;
    let client = cube_client(&embeddings.device())?;
    let dtype = float_dtype("embeddings", &embeddings)?;
    allocatable(&client, "logits", count(&shape), dtype)?;
    let (x, w) = (embeddings.into_dispatch(), weights.into_dispatch());
    Ok(Tensor::from_dispatch(match scale {
        None => Dispatch::protohead_logits(x, w, options),
        Some(scale) => {
            let scale = in_f32(scale).into_dispatch();
            Dispatch::protohead_logits_with_scale(x, w, scale, options)
        }
    }))
}

/// `1 − mean_n cos(whole, first + second)`, `[1]`, of `[rows, dim]` tensors: see [`reconstruction`](crate::reconstruction).
///
/// # Errors
/// A typed [`Error`] if shapes, dtypes or devices do not fit.
pub fn reconstruction(
    whole: Tensor<2>,
    first: Tensor<2>,
    second: Tensor<2>,
) -> Result<Tensor<1>, Error> {
    cube_client(&whole.device())?;
    for (operand, part) in [("first part", &first), ("second part", &second)] {
        if part.dims() != whole.dims() {
            return Err(Error::Shape {
                operand,
                got: part.dims().to_vec(),
                expected: format!("{:?}, like the whole", whole.dims()),
            });
        }
        together(operand, &part.device(), &whole.device())?;
        if float_dtype(operand, part)? != float_dtype("whole", &whole)? {
            return Err(Error::Dtype {
                operand,
                got: float_dtype(operand, part)?,
                expected: format!("{}, like the whole", float_dtype("whole", &whole)?),
            });
        }
    }
    // The whole may have no gradient, and so nothing that the parts differ from.
    together("second part", &second.device(), &first.device())?;
    sized("whole", &whole.dims())?;
    storable("whole", &whole)?;
    Ok(Tensor::from_dispatch(
        <Dispatch as ProtoheadOps>::protohead_reconstruction(
            whole.into_dispatch(),
            first.into_dispatch(),
            second.into_dispatch(),
        ),
    ))
}
