//! Prototype averaging on Burn tensors: streamed over batches, or at once.

use std::marker::PhantomData;
use std::sync::{Arc, Mutex};

use burn::backend::Dispatch;
use burn::tensor::{Device, Int, Tensor};

use super::ops::ProtoheadOps;
use super::{Judged, cube_client, head_operands, row_labels, sized, storable, together};
use crate::class_means::SUMS_STATUS_FIELDS;
use crate::{Error, Strategy, class_means as means};

/// Sums of rows by class, over batches: [`class_means::ClassSums`](crate::class_means::ClassSums) on Burn tensors. Not [`Clone`], since
/// a copy would share the buffers, and bound to the thread that made it: CubeCL orders only the calls of one thread.
///
/// # Examples
/// ```no_run
/// use burn::tensor::{Device, Int, Tensor};
/// use protohead::burn::{ClassSums, CosineHeads};
///
/// # fn prototypes(
/// #     heads: CosineHeads,
/// #     batches: Vec<(Tensor<3>, Tensor<1, Int>)>,
/// #     device: &Device,
/// # ) -> Result<CosineHeads, protohead::Error> {
/// let mut sums = ClassSums::new(3, 20, 256, &Default::default(), device)?;
/// for (embeddings, labels) in batches {
///     sums.accumulate(embeddings, labels)?;
/// }
/// let (heads, means) = heads.replace_prototypes_by(&mut sums)?;
/// means.check()?; // waits: were all labels of all batches classes?
/// # Ok(heads) }
/// ```
///
/// ```compile_fail
/// fn moved_to_another_thread<T: Send>() {}
/// moved_to_another_thread::<protohead::burn::ClassSums>();
/// ```
#[derive(Debug)]
pub struct ClassSums {
    state: State,
    /// What the last call gave, and the next asks for: Burn runs them in this order.
    status: Tensor<1, Int>,
    of_this_thread: PhantomData<*const ()>,
}

/// The sums themselves, which Burn does not see. The first call that reaches a device makes them.
#[derive(Clone, Debug)]
pub(super) struct State {
    pub sums: Arc<Mutex<Option<Kept>>>,
    pub heads: usize,
    pub active: usize,
    pub dim: usize,
    pub options: means::Options,
}

/// Sums on their way through Burn, which wants to send whatever it is given.
#[derive(Debug)]
pub(super) struct Kept(pub means::ClassSums);

// SAFETY: all that is in them can be sent. What binds them to a thread is the order of calls, and the [`ClassSums`] that make these
// calls are bound to theirs.
unsafe impl Send for Kept {}

impl ClassSums {
    /// Sums of no rows yet, for `heads` × `active` × `dim` (H, K, D): labels are to be in `0..active`.
    ///
    /// # Errors
    /// [`Error::Empty`] if a size is zero, [`Error::TooLarge`] if the sums pass 32-bit addresses or a buffer of the device, [`Error::Place`] if the device is not
    /// CubeCL's.
    pub fn new(
        heads: usize,
        active: usize,
        dim: usize,
        options: &means::Options,
        device: &Device,
    ) -> Result<Self, Error> {
        let options = means::Options {
            strategy: Strategy::Inferred,
            ..options.clone()
        };
        means::ClassSums::shape_of(&cube_client(device)?, [heads, active, dim], &options)?;
        Ok(Self {
            state: State {
                sums: Arc::default(),
                heads,
                active,
                dim,
                options,
            },
            // Without autodiff, whatever the device: the means follow the weights.
            status: Tensor::zeros([SUMS_STATUS_FIELDS], &device.clone().without_autodiff()),
            of_this_thread: PhantomData,
        })
    }

    /// Adds `embeddings [heads, rows, dim]` (f32, f16 or bf16) to the classes that `labels [rows]` name. A row whose label is no class
    /// is left out, and [`check`](Self::check) tells.
    ///
    /// # Errors
    /// A typed [`Error`] if shapes, dtypes or devices do not fit.
    pub fn accumulate(
        &mut self,
        embeddings: Tensor<3>,
        labels: Tensor<1, Int>,
    ) -> Result<(), Error> {
        let [heads, rows, dim] = embeddings.dims();
        if [heads, dim] != [self.state.heads, self.state.dim] {
            return Err(Error::Shape {
                operand: "embeddings",
                got: embeddings.dims().to_vec(),
                expected: format!(
                    "[{}, rows, {}], like the sums",
                    self.state.heads, self.state.dim
                ),
            });
        }
        sized("embeddings", &embeddings.dims())?;
        storable("embeddings", &embeddings)?;
        means::addressable_batch(heads, rows, self.state.active)?;
        let device = self.status.device();
        together("embeddings", &embeddings.device(), &device)?;
        row_labels(&labels, rows, &device)?;
        let status = <Dispatch as ProtoheadOps>::protohead_class_sums(
            embeddings.without_autodiff().into_dispatch(),
            labels.without_autodiff().into_dispatch(),
            self.status.clone().into_dispatch(),
            self.state.clone(),
        );
        self.status = Tensor::from_dispatch(status);
        Ok(())
    }

    /// Waits, and says whether every label so far was a class or ignored.
    ///
    /// # Errors
    /// [`Error::Label`] with the first row that was not, counted in its batch; [`Error::Device`] if the device failed.
    pub fn check(&self) -> Result<(), Error> {
        let judged = Judged {
            labels: None,
            status: self.status.clone(),
            active: self.state.active,
        };
        judged.check()
    }

    /// `weights [heads, classes, dim]` with the means so far in place of the first `active` rows. A class without rows keeps its old row.
    /// Not differentiable.
    ///
    /// # Errors
    /// A typed [`Error`] if shapes, dtypes or devices do not fit.
    pub fn means(&mut self, weights: Tensor<3>) -> Result<ClassMeans, Error> {
        let State {
            heads, active, dim, ..
        } = self.state;
        let [_, classes, _] = weights.dims();
        if weights.dims() != [heads, classes, dim] || classes < active {
            return Err(Error::Shape {
                operand: "class weights",
                got: weights.dims().to_vec(),
                expected: format!("[{heads}, at least {active}, {dim}]"),
            });
        }
        sized("class weights", &weights.dims())?;
        storable("class weights", &weights)?;
        let device = self.status.device();
        together("class weights", &weights.device(), &device)?;
        let means = <Dispatch as ProtoheadOps>::protohead_class_means(
            weights.into_dispatch(),
            self.status.clone().into_dispatch(),
            self.state.clone(),
        );
        self.status = Tensor::<1, Int>::from_dispatch(means.next).without_autodiff();
        Ok(ClassMeans {
            weights: Tensor::from_dispatch(means.weights),
            counts: Tensor::<1, Int>::from_dispatch(means.counts).cast(device.settings().int_dtype),
            labels: Judged {
                labels: None,
                status: Tensor::from_dispatch(means.status),
                active,
            },
        })
    }
}

/// The result of [`class_means`] and [`ClassSums::means`].
#[must_use = "labels that are no class are only reported by `check`"]
#[derive(Clone, Debug)]
pub struct ClassMeans {
    /// `[heads, classes, dim]`: the class weights with the means in place.
    pub weights: Tensor<3>,
    /// `[active]`: how many rows each class had.
    pub counts: Tensor<1, Int>,
    labels: Judged,
}

impl ClassMeans {
    /// Waits, and says whether every label was a class or ignored; a row whose label was neither is left out.
    ///
    /// # Errors
    /// [`Error::Label`] with the first row that was not: of [`ClassSums`] the row in its batch; [`Error::Device`] if the device
    /// failed.
    pub fn check(&self) -> Result<(), Error> {
        self.labels.check()
    }
}

/// The means of `embeddings [heads, rows, dim]` by class, over the first `active` rows of `weights [heads, classes, dim]`: see
/// [`class_means`](crate::class_means). Not differentiable. Embeddings and weights may differ in dtype. For rows in batches there is
/// [`ClassSums`].
///
/// # Errors
/// A typed [`Error`] if shapes, dtypes or devices do not fit.
pub fn class_means(
    embeddings: Tensor<3>,
    weights: Tensor<3>,
    labels: Tensor<1, Int>,
    active: usize,
    options: &means::Options,
) -> Result<ClassMeans, Error> {
    head_operands(&embeddings, &weights, 1.0, Some(active))?;
    let [heads, _, dim] = embeddings.dims();
    let mut sums = ClassSums::new(heads, active, dim, options, &embeddings.device())?;
    sums.accumulate(embeddings, labels)?;
    sums.means(weights)
}
