//! Several cosine heads as one module.

use burn::config::Config;
use burn::module::{Initializer, Module, Param, ParamId};
use burn::tensor::{Device, FloatDType, Int, Tensor};

use super::learnt::{dequantized, value_of};
use super::{
    ClassMeans, ClassSums, CrossEntropy, Margin, class_means, float_dtype, fused_loss,
    given_or_learnt_logits, predictions, reduced, together, total,
};
use crate::{
    Error, LossOptions, Reduction, class_means as means, cosine_cross_entropy as fused,
    cosine_logits as logits,
};

/// Configures [`CosineHeads`].
#[derive(Config, Debug)]
pub struct CosineHeadsConfig {
    /// H
    pub heads: usize,
    /// C
    pub classes: usize,
    /// D
    pub dim: usize,
    /// K: the first classes, which take part; all if absent. 0, or more than C, is refused when the heads are used, not by `init`.
    pub active: Option<usize>,
    /// The factor on the cosines; where it is learnt, what it begins with.
    #[config(default = 16.0)]
    pub scale: f64,
    /// Whether the factor is learnt: a parameter, of which each use reads the value, and so waits for the step before. Uses are refused
    /// on an autodiff device if it gets to 0, and with a margin if it falls below. Where it may, learn its logarithm instead, and call
    /// [`cosine_cross_entropy_with_scale`](super::cosine_cross_entropy_with_scale).
    #[config(default = false)]
    pub learnt_scale: bool,
    /// The angular margin of the loss, in radians: see [`Margin`]. What is out of range is refused when a loss is computed.
    #[config(default = 0.0)]
    pub angular_margin: f64,
    /// Its cosine margin.
    #[config(default = 0.0)]
    pub cosine_margin: f64,
    /// Whether f32 products may round their operands to TF32 on an NVIDIA GPU.
    #[config(default = false)]
    pub allow_tf32: bool,
}

impl CosineHeadsConfig {
    /// Class weights drawn as by torch's `nn.Linear`: uniform in `±1/√D`.
    pub fn init(&self, device: &Device) -> CosineHeads {
        let bound = 1.0 / (self.dim as f64).sqrt();
        CosineHeads {
            weight: Initializer::Uniform {
                min: -bound,
                max: bound,
            }
            .init([self.heads, self.classes, self.dim], device),
            active: self.active.unwrap_or(self.classes),
            learnt_scale: self.learnt_scale.then(|| {
                let value = self.scale;
                Initializer::Constant { value }.init([1], device)
            }),
            scale: self.scale,
            angular_margin: self.angular_margin,
            cosine_margin: self.cosine_margin,
            allow_tf32: self.allow_tf32,
        }
    }
}

/// H cosine heads over the same classes: class weights `[heads, classes, dim]`, of which the first `active` classes
/// take part.
///
/// Embeddings may be of another dtype than the weights, as in mixed precision: logits and losses round the weights to the embeddings'
/// dtype, their gradients and prototypes come in the weights' own.
///
/// # Examples
/// ```no_run
/// use protohead::LossOptions;
/// use protohead::burn::CosineHeadsConfig;
///
/// # fn step(embeddings: burn::tensor::Tensor<3>, labels: burn::tensor::Tensor<1, burn::tensor::Int>) -> Result<(), protohead::Error> {
/// let heads = CosineHeadsConfig::new(3, 35, 256)
///     .with_active(Some(20))
///     .init(&embeddings.device());
/// let loss = heads.loss(embeddings, labels, &LossOptions::default())?;
/// loss.check()?; // waits: were all labels classes?
/// let gradients = loss.total.backward();
/// # Ok(()) }
/// ```
#[derive(Module, Debug)]
pub struct CosineHeads {
    /// `[heads, classes, dim]`
    pub weight: Param<Tensor<3>>,
    /// `[1]`: the factor on the cosines, if it is learnt.
    pub learnt_scale: Option<Param<Tensor<1>>>,
    active: usize,
    scale: f64,
    angular_margin: f64,
    cosine_margin: f64,
    allow_tf32: bool,
}

/// The losses of [`CosineHeads::loss`].
#[must_use = "labels that are no class are only reported by `check`"]
#[derive(Clone, Debug)]
pub struct HeadsLoss {
    /// `[1]`: the weighted sum of the heads' losses.
    pub total: Tensor<1>,
    /// The losses by head, and what came with them.
    pub heads: CrossEntropy<1>,
}

impl HeadsLoss {
    /// Waits, and says whether every label was a class or ignored: [`CrossEntropy::check`] of [`heads`](Self::heads).
    ///
    /// # Errors
    /// [`Error::Label`] with the first row that was not, [`Error::Device`] if the device failed.
    pub fn check(&self) -> Result<(), Error> {
        self.heads.check()
    }
}

impl CosineHeads {
    /// The configuration of these heads. A record holds only the class weights and a scale that is learnt: save this with it, and load
    /// the record into `config.init(device)`.
    pub fn config(&self) -> CosineHeadsConfig {
        let [heads, classes, dim] = self.weight.dims();
        CosineHeadsConfig {
            heads,
            classes,
            dim,
            active: Some(self.active),
            scale: self.scale,
            learnt_scale: self.learnt_scale.is_some(),
            angular_margin: self.angular_margin,
            cosine_margin: self.cosine_margin,
            allow_tf32: self.allow_tf32,
        }
    }

    /// K
    pub fn active(&self) -> usize {
        self.active
    }

    /// The factor on the cosines. Where it is learnt, this waits for what computes it.
    ///
    /// # Errors
    /// [`Error::Device`] if it cannot be read.
    pub fn scale(&self) -> Result<f64, Error> {
        match &self.learnt_scale {
            Some(learnt) => value_of(&learnt.val()).map(f64::from),
            None => Ok(self.scale),
        }
    }

    /// Another factor on the cosines, as where the temperature follows a schedule, from which one that is learnt goes on. What is not
    /// finite is refused at use.
    pub fn with_scale(self, scale: f64) -> Self {
        let learnt_scale = self.learnt_scale.map(|learnt| {
            learnt.map(|before| {
                let now = dequantized(before.clone().detach()).full_like(scale);
                now.set_require_grad(before.is_require_grad())
            })
        });
        Self {
            scale,
            learnt_scale,
            ..self
        }
    }

    /// The margin of the loss.
    pub fn margin(&self) -> Margin {
        Margin {
            angular: self.angular_margin as f32,
            cosine: self.cosine_margin as f32,
        }
    }

    /// Another margin in the loss, as where it grows during training. What is out of range is refused when a loss is computed.
    pub fn with_margin(self, margin: Margin) -> Self {
        Self {
            angular_margin: margin.angular.into(),
            cosine_margin: margin.cosine.into(),
            ..self
        }
    }

    /// Lets another number of classes take part.
    ///
    /// # Errors
    /// [`Error::ActiveClasses`] if there are fewer classes, or none is asked for.
    pub fn with_active(mut self, active: usize) -> Result<Self, Error> {
        let [_, classes, _] = self.weight.dims();
        if active == 0 || active > classes {
            return Err(Error::ActiveClasses { active, classes });
        }
        self.active = active;
        Ok(self)
    }

    /// These heads with room for so many classes: those that there are, and new ones drawn as by [`CosineHeadsConfig::init`], which take
    /// no part before [`with_active`](Self::with_active) says so. The class weights become another parameter, of which an optimizer
    /// knows nothing yet.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are more classes already.
    pub fn with_classes(self, classes: usize) -> Result<Self, Error> {
        let [heads, now, dim] = self.weight.dims();
        if classes < now {
            return Err(Error::Shape {
                operand: "class weights",
                got: vec![heads, classes, dim],
                expected: format!("at least the {now} classes that there are"),
            });
        }
        if classes == now {
            return Ok(self);
        }
        let (_, before, mapper) = self.weight.consume();
        let trained = before.is_require_grad();
        let before = dequantized(before.detach());
        let config = CosineHeadsConfig::new(heads, classes - now, dim);
        let new = config.init(&before.device()).weight.val();
        let new = new.detach().cast(FloatDType::from(before.dtype()));
        let all = Tensor::cat(vec![before, new], 1).detach();
        let all = all.set_require_grad(trained);
        Ok(Self {
            weight: Param::from_mapped_value(ParamId::new(), all, mapper),
            ..self
        })
    }

    /// Logits `[heads, rows, active]` of `embeddings [heads, rows, dim]`.
    ///
    /// # Errors
    /// A typed [`Error`] if the embeddings do not fit.
    pub fn forward(&self, embeddings: Tensor<3>) -> Result<Tensor<3>, Error> {
        let options = logits::Options {
            scale: self.scale as f32,
            active: Some(self.active),
            allow_tf32: self.allow_tf32,
            ..logits::Options::default()
        };
        let weights = self.weights_for(&embeddings)?;
        let scale = self.learnt_scale.as_ref().map(|learnt| learnt.val());
        given_or_learnt_logits(embeddings, weights, scale, &options)
    }

    /// The class of the highest logit of each row, `[heads, rows]`, in memory that does not grow with rows × classes.
    ///
    /// # Errors
    /// A typed [`Error`] if the embeddings do not fit.
    pub fn predict(&self, embeddings: Tensor<3>) -> Result<Tensor<2, Int>, Error> {
        let options = fused::Options {
            scale: self.scale()? as f32,
            ..self.fused_options(LossOptions::default())
        };
        let weights = self.weights_for(&embeddings)?;
        predictions(embeddings, weights, &options)
    }

    /// With the scale that is given; one that is learnt goes beside them.
    fn fused_options(&self, loss: LossOptions) -> fused::Options {
        fused::Options {
            scale: self.scale as f32,
            active: Some(self.active),
            allow_tf32: self.allow_tf32,
            margin: self.margin(),
            loss,
            ..fused::Options::default()
        }
    }

    fn weights_for(&self, embeddings: &Tensor<3>) -> Result<Tensor<3>, Error> {
        let weights = dequantized(self.weight.val());
        together("class weights", &weights.device(), &embeddings.device())?;
        float_dtype("embeddings", embeddings)?;
        let dtype = embeddings.dtype();
        Ok(match dtype == weights.dtype() {
            true => weights,
            false => weights.cast(FloatDType::from(dtype)),
        })
    }

    /// The cross-entropy of each head and their weighted sum, in memory that does not grow with rows × classes.
    ///
    /// On an autodiff device f32 gradients are computed with the loss, and kept until the next backward pass. Evaluate with
    /// `Module::valid`, which computes none.
    ///
    /// # Errors
    /// A typed [`Error`] if the operands do not fit, or the reduction is `None`: see [`loss_by_row`](Self::loss_by_row).
    pub fn loss(
        &self,
        embeddings: Tensor<3>,
        labels: Tensor<1, Int>,
        options: &LossOptions,
    ) -> Result<HeadsLoss, Error> {
        let [count, _, _] = self.weight.dims();
        options.validate(count)?;
        let unweighted = self.fused_options(LossOptions {
            head_weights: None,
            ..options.clone()
        });
        reduced(&unweighted.loss)?;
        let heads = self.fused(embeddings, labels, &unweighted)?;
        let alphas = options.head_weights.clone();
        let alphas = alphas.unwrap_or_else(|| vec![1.0; count]);
        let total = total(heads.loss.clone(), alphas);
        Ok(HeadsLoss { total, heads })
    }

    /// The loss of each row of each head, `[heads, rows]`, to be reduced otherwise than [`loss`](Self::loss) does: see
    /// [`cosine_cross_entropy_by_row`](super::cosine_cross_entropy_by_row). The gradients are computed in the backward pass.
    ///
    /// # Errors
    /// A typed [`Error`] if the operands do not fit, or there are head weights: multiply the result by them instead.
    pub fn loss_by_row(
        &self,
        embeddings: Tensor<3>,
        labels: Tensor<1, Int>,
        options: &LossOptions,
    ) -> Result<CrossEntropy<2>, Error> {
        let mut options = self.fused_options(options.clone());
        options.loss.reduction = Reduction::None;
        self.fused(embeddings, labels, &options)
    }

    fn fused<const D: usize>(
        &self,
        embeddings: Tensor<3>,
        labels: Tensor<1, Int>,
        options: &fused::Options,
    ) -> Result<CrossEntropy<D>, Error> {
        let weights = self.weights_for(&embeddings)?;
        let scale = self.learnt_scale.as_ref().map(|learnt| learnt.val());
        fused_loss(embeddings, weights, scale, labels, options)
    }

    /// These heads with the first `active` class weights of every head replaced by the means of `embeddings [heads, rows, dim]` by label. A class
    /// without rows keeps its weights, so you can pass examples of new classes only. The returned [`ClassMeans`] counts the rows of each
    /// class, and [`check`](ClassMeans::check) reports bad labels. How many classes take part in logits and losses stays as it is: see
    /// [`with_active`](Self::with_active). An optimizer keeps what it knows of the old weights, such as their momentum.
    ///
    /// # Errors
    /// A typed [`Error`] if the operands do not fit.
    pub fn replace_prototypes(
        &self,
        embeddings: Tensor<3>,
        labels: Tensor<1, Int>,
        active: usize,
        options: &means::Options,
    ) -> Result<(Self, ClassMeans), Error> {
        let weight = dequantized(self.weight.val().detach());
        let replacement = class_means(embeddings, weight, labels, active, options)?;
        Ok((self.replaced_by(&replacement), replacement))
    }

    /// [`replace_prototypes`](Self::replace_prototypes) with the means of what came in batches.
    ///
    /// # Errors
    /// A typed [`Error`] if the sums do not fit.
    pub fn replace_prototypes_by(&self, sums: &mut ClassSums) -> Result<(Self, ClassMeans), Error> {
        let replacement = sums.means(dequantized(self.weight.val().detach()))?;
        Ok((self.replaced_by(&replacement), replacement))
    }

    fn replaced_by(&self, replacement: &ClassMeans) -> Self {
        let trained = self.weight.val().is_require_grad();
        let means = replacement.weights.clone().detach();
        let means = means.set_require_grad(trained);
        Self {
            weight: self.weight.clone().map(|_| means),
            ..self.clone()
        }
    }
}
