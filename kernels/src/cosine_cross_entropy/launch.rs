//! The public forward and backward.

use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::server::Handle;
use cubecl::std::tensor::TensorHandle;
use serde::{Deserialize, Serialize};

use super::margin::Margin;
use super::{small, tiled, unit};
use crate::blueprint::{Blueprint, Strategy, Variant};
use crate::cosine_logits::CosineProblem;
use crate::error::Error;
use crate::gradients::{Gradients, Wanted};
use crate::loss::arriving::Arriving;
use crate::loss::reduce::{self, Reduced};
use crate::loss::{Asked, LossOptions, LossOutput, Saved, Upstream};
use crate::memory::empty;
use crate::operand::{F32, Labels, U32};
use crate::tiles::{Chunks, GradientChunk, Tile};

/// The operands, never modified.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// `[heads, rows, dim]`, f32, f16 or bf16; the last axis packed, the others of any stride.
    pub embeddings: TensorHandle,
    /// `[heads, classes, dim]`, the same dtype.
    pub weights: TensorHandle,
    /// `[rows]`, i32, i64 or u32, contiguous: a class in `0..K` for each row, the same for all heads, or the ignored label. Whether the
    /// buffer holds numbers of this dtype, nobody can check.
    pub labels: TensorHandle,
}

/// Options of [`forward`], [`backward`] and [`forward_backward`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// The factor on the cosines, the inverse temperature: 16 by default. Any finite number, though logits beyond f32 are infinite; more
    /// than 0 with a margin, and not 0 where its gradient is wanted.
    pub scale: f32,
    /// K: only the classes `0..K` take part; all of them if absent.
    pub active: Option<usize>,
    /// Whether the tensor cores of an NVIDIA GPU may round f32 operands to TF32's 10 bits, as in torch's
    /// `backends.cuda.matmul.allow_tf32`. Without it, f32 runs in multiply-adds.
    pub allow_tf32: bool,
    /// What a row's own class has to overcome: nothing by default.
    pub margin: Margin,
    /// Reduction, label smoothing, ignored label, head weights.
    pub loss: LossOptions,
    /// Which variant runs.
    #[serde(skip)]
    pub strategy: Strategy,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            scale: 16.0,
            active: None,
            allow_tf32: false,
            margin: Margin::default(),
            loss: LossOptions::default(),
            strategy: Strategy::Inferred,
        }
    }
}

/// The loss, its `lse` and the predicted classes.
///
/// # Errors
/// Before anything is launched, [`Error::Shape`], [`Error::Empty`], [`Error::Strides`], [`Error::Dtype`], [`Error::Place`],
/// [`Error::ActiveClasses`], [`Error::Option`], [`Error::HeadWeights`] or [`Error::TooLarge`] if operands or options do not fit; with
/// a forced variant also those that say why it cannot run. A bad label is found on the device: its row counts as ignored, and
/// reading the output returns [`Error::Label`].
///
/// # Examples
/// ```no_run
/// use protohead::cosine_cross_entropy::{Inputs, Options, backward, forward};
/// use protohead::{Upstream, Wanted};
///
/// # fn step(client: &cubecl::client::Client, inputs: &Inputs) -> Result<(), protohead::Error> {
/// let options = Options { scale: 16.0, active: Some(20), ..Options::default() };
/// let output = forward(client, inputs, &options)?;
/// println!("loss {}", output.read_total(client)?); // or `check`: every label was a class
/// let gradients = backward(client, inputs, &options, &output, &Upstream::Total(1.0), Wanted::BOTH)?;
/// # Ok(()) }
/// ```
pub fn forward(client: &Client, inputs: &Inputs, options: &Options) -> Result<LossOutput, Error> {
    Call::new(client, inputs, options)?.forward()
}

/// The class of the highest logit of each row, as [`LossOutput::predictions`]: u32 `[heads, rows]`. [`forward`] without labels, whose loss
/// nobody wants; the options of the loss and margins take no part.
///
/// How probable a prediction is, of one head, [`forward`] tells with the predictions as labels under [`Reduction::None`](crate::Reduction),
/// without margin and smoothing: `e^(−loss)`, and its cosine is `(lse − loss) / scale`.
///
/// # Errors
/// As [`forward`], but for what labels and the options of the loss can get wrong.
///
/// # Examples
/// ```no_run
/// use cubecl::std::tensor::TensorHandle;
/// use protohead::cosine_cross_entropy::{Options, predictions};
///
/// # fn classify(client: &cubecl::client::Client, embeddings: &TensorHandle, weights: &TensorHandle) -> Result<(), protohead::Error> {
/// let predicted = predictions(client, embeddings, weights, &Options::default())?;
/// println!("{:?}", protohead::download::<u32>(client, &predicted)?);
/// # Ok(()) }
/// ```
pub fn predictions(
    client: &Client,
    embeddings: &TensorHandle,
    weights: &TensorHandle,
    options: &Options,
) -> Result<TensorHandle, Error> {
    let options = Options {
        margin: Margin::default(),
        loss: LossOptions::default(),
        ..options.clone()
    };
    let call = Call::of_operands(client, embeddings, weights, None, &options)?;
    Ok(call.forward()?.predictions)
}

/// The gradients of the operands and of the scale, from the output of [`forward`]. It can be called more than once.
///
/// Inputs, scale, margin, active classes, ignored label, and on a GPU `allow_tf32` and the variant's arithmetic must be those of the forward
/// pass, which of the inputs is not checked. Reduction, label smoothing and head weights may differ.
///
/// # Errors
/// As [`forward`]; [`Error::OtherForward`] if op, heads, rows, scale, margin, active classes, ignored label or arithmetic are not those
/// of the forward pass; and a typed error if the upstream gradient or `output` does not fit.
pub fn backward(
    client: &Client,
    inputs: &Inputs,
    options: &Options,
    output: &LossOutput,
    upstream: &Upstream,
    wanted: Wanted,
) -> Result<Gradients, Error> {
    backward_from(client, inputs, options, &output.saved(), upstream, wanted)
}

/// [`backward`] from what it reads of the forward pass.
pub(crate) fn backward_from(
    client: &Client,
    inputs: &Inputs,
    options: &Options,
    saved: &Saved,
    upstream: &Upstream,
    wanted: Wanted,
) -> Result<Gradients, Error> {
    let call = Call::new(client, inputs, options)?;
    saved.prove(client, &call.asked())?;
    call.problem
        .check_gradients(client, options.scale, wanted)?;
    let arriving = call.arriving(upstream)?;
    if !wanted.any() {
        return Ok(Gradients::default());
    }
    let gradients = match call.kernels {
        Kernels::Tiled(tile) => {
            let chunks = tiled::backward_chunks(&call, tile);
            call.gpu_backward(&chunks, None, saved, &arriving, wanted)
        }
        Kernels::Small => call.small(Some((&arriving, wanted))).1,
        Kernels::Unit => call.unit_backward(saved, &arriving, wanted)?,
    };
    Ok(gradients.only(wanted))
}

/// [`forward`] and [`backward`] in one, for when the upstream gradient is known beforehand, as it is where the loss itself
/// is minimized.
///
/// It usually computes the logits once, not twice. On a CPU it does as long as their exponentials find a place to wait in: a bounded
/// workspace, a chunk of rows at a time, or the memory of `dW`. On a GPU it does for a small step; and in f32 multiply-adds, if the
/// scale is positive, for the classes that a bounded workspace holds at once, if those are at least a quarter of all. The results agree
/// with those of the two calls up to f32's rounding, not to the bit. `examples/step.rs` is a whole program around it.
///
/// On a CPU the device's threads run on the cores of those who launch and of everybody else. Read something of every step, as
/// [`LossOutput::check`] does: a thread that only fills the queue takes a core from the kernels, as does any other that is busy meanwhile.
///
/// # Errors
/// As [`forward`] and [`backward`].
pub fn forward_backward(
    client: &Client,
    inputs: &Inputs,
    options: &Options,
    upstream: &Upstream,
    wanted: Wanted,
) -> Result<(LossOutput, Gradients), Error> {
    let call = Call::new(client, inputs, options)?;
    let arriving = call.arriving(upstream)?;
    call.forward_backward(&arriving, wanted)
}

/// Which of the folders beside has the kernels.
#[derive(Clone, Copy)]
enum Kernels {
    Unit,
    Tiled(Tile),
    Small,
}

/// A call whose operands are proved.
pub(super) struct Call<'a> {
    pub client: &'a Client,
    pub options: &'a Options,
    kernels: Kernels,
    pub blueprint: Blueprint,
    pub problem: CosineProblem,
    pub labels: Labels,
    pub head_weights: Option<Handle>, // f32, [heads]
}

/// What a forward pass writes for each row.
pub(super) struct RowResults {
    pub loss: TensorHandle,        // [heads, rows], f32
    pub lse: TensorHandle,         // [2, heads, rows], f32: see `Saved`
    pub predictions: TensorHandle, // [heads, rows], u32
}

/// What a forward pass writes.
pub(super) struct Results {
    pub rows: RowResults,
    pub reduced: Reduced,
}

impl<'a> Call<'a> {
    pub(super) fn new(
        client: &'a Client,
        inputs: &Inputs,
        options: &'a Options,
    ) -> Result<Self, Error> {
        let Inputs {
            embeddings,
            weights,
            labels,
        } = inputs;
        Self::of_operands(client, embeddings, weights, Some(labels), options)
    }

    /// Without labels, every row's is class 0.
    fn of_operands(
        client: &'a Client,
        embeddings: &TensorHandle,
        weights: &TensorHandle,
        labels: Option<&TensorHandle>,
        options: &'a Options,
    ) -> Result<Self, Error> {
        let dtype = embeddings.dtype;
        let forced_small = options.strategy == Strategy::Forced(Variant::Small);
        let mut blueprint = match forced_small {
            true => Blueprint::small(client)?,
            false => Blueprint::of_product(client, options.strategy, dtype, options.allow_tf32)?,
        };
        let problem = CosineProblem::new(
            client,
            &blueprint,
            embeddings,
            weights,
            options.scale,
            options.active,
        )?;
        let heads = problem.sizes.heads;
        options.loss.validate(heads)?;
        options.margin.validate(options.scale)?;
        let labels = match labels {
            Some(labels) => Labels::new(client, labels, problem.sizes.rows)?,
            None => Labels::zeros(client, problem.sizes.rows),
        };
        if forced_small {
            small::check(&blueprint, &problem)?;
        } else if options.strategy == Strategy::Inferred && blueprint.variant != Variant::Unit {
            let small = Blueprint::small(client);
            if let Ok(small) = small
                && small::check(&small, &problem).is_ok()
            {
                blueprint = small;
            }
        }
        let kernels = match (blueprint.product, blueprint.variant) {
            (Some(tile), _) => Kernels::Tiled(tile),
            (None, Variant::Small) => Kernels::Small,
            (None, _) => Kernels::Unit,
        };
        Ok(Self {
            client,
            options,
            kernels,
            blueprint: blueprint.for_work(problem.operations()),
            problem,
            labels,
            head_weights: options.loss.upload_weights(client),
        })
    }

    pub(super) fn arriving(&self, upstream: &Upstream) -> Result<Arriving, Error> {
        let sizes = &self.problem.sizes;
        Arriving::new(
            self.client,
            upstream,
            &self.options.loss,
            sizes.heads,
            sizes.rows,
            sizes.active,
        )
    }

    fn forward(&self) -> Result<LossOutput, Error> {
        Ok(match self.kernels {
            Kernels::Tiled(tile) => self.gpu_forward(&tiled::forward_chunks(self, tile), None)?,
            Kernels::Small => self.small(None).0,
            Kernels::Unit => self.unit_forward()?,
        })
    }

    fn rows_of(&self, dtype: ElemType) -> TensorHandle {
        let sizes = &self.problem.sizes;
        empty(self.client, [sizes.heads, sizes.rows], dtype)
    }

    fn gradients(&self, wanted: Wanted) -> Gradients {
        self.problem.gradients(self.client, wanted)
    }

    fn output(&self, results: Results) -> LossOutput {
        LossOutput::new(
            results.rows.loss,
            results.reduced,
            results.rows.lse,
            results.rows.predictions,
            &self.labels,
            self.asked(),
            &self.options.loss,
        )
    }

    fn asked(&self) -> Asked {
        let sizes = &self.problem.sizes;
        Asked {
            op: "cosine_cross_entropy",
            scale: self.options.scale,
            margins: [self.options.margin.angular, self.options.margin.cosine],
            heads: sizes.heads,
            rows: sizes.rows,
            active: sizes.active,
            ignore_index: self.options.loss.ignore_index,
            arithmetic: match self.kernels {
                Kernels::Tiled(tile) => tile.packed,
                Kernels::Unit | Kernels::Small => F32,
            },
        }
    }

    fn row_results(&self) -> RowResults {
        let sizes = &self.problem.sizes;
        RowResults {
            loss: self.rows_of(F32),
            lse: empty(self.client, [2, sizes.heads, sizes.rows], F32),
            predictions: self.rows_of(U32),
        }
    }

    fn results(&self) -> Results {
        Results {
            rows: self.row_results(),
            reduced: Reduced::empty(self.client, self.problem.sizes.heads),
        }
    }

    pub(super) fn forward_backward(
        &self,
        arriving: &Arriving,
        wanted: Wanted,
    ) -> Result<(LossOutput, Gradients), Error> {
        self.problem
            .check_gradients(self.client, self.options.scale, wanted)?;
        let (output, gradients) = match self.kernels {
            Kernels::Tiled(tile) => self.gpu_forward_backward(tile, arriving, wanted)?,
            Kernels::Small => self.small(Some((arriving, wanted))),
            Kernels::Unit => match self.unit_forward_backward(arriving, wanted)? {
                Some(both) => both,
                None => {
                    let output = self.unit_forward()?;
                    let gradients = self.unit_backward(&output.saved(), arriving, wanted)?;
                    (output, gradients)
                }
            },
        };
        Ok((output, gradients.only(wanted)))
    }

    /// Both passes, or the first without gradients: the second alone would have to compute all of the first.
    fn small(&self, backward: Option<(&Arriving, Wanted)>) -> (LossOutput, Gradients) {
        let gradients = backward.map(|(_, wanted)| self.gradients(wanted));
        let gradients = gradients.unwrap_or_default();
        let arriving = backward.map(|(arriving, _)| arriving);
        let results = self.results();
        small::launch(self, arriving, &results.rows, &results.reduced, &gradients);
        (self.output(results), gradients)
    }

    fn unit_forward(&self) -> Result<LossOutput, Error> {
        let results = self.results();
        let none = Gradients::default();
        unit::Step::alone(self, true, None, &none)?.launch(&unit::Outcome::Written(&results));
        Ok(self.output(results))
    }

    fn unit_backward(
        &self,
        saved: &Saved,
        arriving: &Arriving,
        wanted: Wanted,
    ) -> Result<Gradients, Error> {
        let gradients = self.gradients(wanted);
        let step = unit::Step::alone(self, false, Some(arriving), &gradients)?;
        step.launch(&unit::Outcome::Saved(&saved.lse));
        Ok(gradients)
    }

    fn unit_forward_backward(
        &self,
        arriving: &Arriving,
        wanted: Wanted,
    ) -> Result<Option<(LossOutput, Gradients)>, Error> {
        let gradients = self.gradients(wanted);
        let Some(step) = unit::Step::at_once(self, arriving, &gradients)? else {
            return Ok(None);
        };
        let results = self.results();
        step.launch(&unit::Outcome::Written(&results));
        Ok(Some((self.output(results), gradients)))
    }

    fn gpu_forward(
        &self,
        chunks: &Chunks,
        kept: Option<&GradientChunk>,
    ) -> Result<LossOutput, Error> {
        let rows = self.row_results();
        tiled::launch_forward(self, chunks, kept, &rows)?;
        let reduced = reduce::launch(
            self.client,
            &self.blueprint,
            &rows.loss,
            &self.labels,
            self.problem.sizes.active,
            &self.options.loss,
            self.head_weights.as_ref(),
        );
        Ok(self.output(Results { rows, reduced }))
    }

    fn gpu_backward(
        &self,
        chunks: &Chunks,
        kept: Option<GradientChunk>,
        saved: &Saved,
        arriving: &Arriving,
        wanted: Wanted,
    ) -> Gradients {
        let packed = chunks.tile.packed;
        let rows = tiled::gather_rows(self, packed, saved, arriving, wanted.scale);
        let gradients = self.gradients(wanted);
        tiled::launch_backward(self, chunks, kept, &rows, &gradients);
        gradients
    }

    fn gpu_forward_backward(
        &self,
        tile: Tile,
        arriving: &Arriving,
        wanted: Wanted,
    ) -> Result<(LossOutput, Gradients), Error> {
        if !wanted.any() {
            let chunks = tiled::forward_chunks(self, tile);
            return Ok((self.gpu_forward(&chunks, None)?, Gradients::default()));
        }
        if self.options.scale <= 0.0 {
            // The two passes have embeddings of different signs.
            let output = self.gpu_forward(&tiled::forward_chunks(self, tile), None)?;
            let chunks = tiled::backward_chunks(self, tile);
            let gradients = self.gpu_backward(&chunks, None, &output.saved(), arriving, wanted);
            return Ok((output, gradients));
        }
        let chunks = tiled::forward_chunks(self, tile);
        let kept = chunks.keep_first();
        let output = self.gpu_forward(&chunks, kept.as_ref())?;
        let gradients = self.gpu_backward(&chunks, kept, &output.saved(), arriving, wanted);
        Ok((output, gradients))
    }
}
