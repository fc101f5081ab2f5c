//! The public state: accumulate, merge, finish.

use std::marker::PhantomData;

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::std::tensor::TensorHandle;
use serde::{Deserialize, Serialize};

use super::state::{add_counts, merge, write_means};
use super::{plane, unit};
use crate::blueprint::{Blueprint, Strategy, Variant};
use crate::error::Error;
use crate::loss::target::joined;
use crate::math::group::Group;
use crate::memory::empty;
use crate::operand::{
    F32, Labels, Strided, U32, addressable, allocatable, count, on_device, whole, widest,
};

/// Options of [`ClassSums`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Whether rows are normalized first, `x / max(‖x‖₂, 1e-12)`: then each counts alike in the mean's direction, which is all that a
    /// cosine head takes of it. By default the raw embeddings are averaged, as in prototypical networks.
    pub normalize: bool,
    /// Rows with this label, by default -100, are left out and not reported.
    pub ignore_index: i32,
    /// Which variant runs.
    #[serde(skip)]
    pub strategy: Strategy,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            normalize: false,
            ignore_index: -100,
            strategy: Strategy::Inferred,
        }
    }
}

/// Of a state's status: rows with a bad label, the first of them in its batch, its label in [`halves`](crate::loss::target::halves).
pub(crate) const SUMS_STATUS_FIELDS: usize = 4;

/// Sums and counts of rows by class, on the device. Not [`Clone`], since a copy would share the buffers, and bound to the thread that
/// made it: CubeCL orders only the calls of one thread.
///
/// # Examples
/// ```no_run
/// use cubecl::std::tensor::TensorHandle;
/// use protohead::class_means::{ClassSums, Options};
///
/// # fn prototypes(
/// #     client: &cubecl::client::Client,
/// #     batches: Vec<(TensorHandle, TensorHandle)>,
/// #     weights: TensorHandle,
/// # ) -> Result<(), protohead::Error> {
/// let (heads, active, dim) = (3, 20, 256);
/// let mut sums = ClassSums::new(client, heads, active, dim, &Options::default())?;
/// for (embeddings, labels) in batches {
///     sums.accumulate(client, &embeddings, &labels)?;
/// }
/// println!("rows by class: {:?}", sums.read_counts(client)?);
/// let prototypes = sums.means(client, &weights)?; // of weights [3, 35, 256] the first 20 classes are replaced
/// # Ok(()) }
/// ```
///
/// Other results go to any thread:
/// ```
/// fn moved_to_another_thread<T: Send>() {}
/// moved_to_another_thread::<protohead::LossOutput>();
/// ```
/// ```compile_fail
/// fn moved_to_another_thread<T: Send>() {}
/// moved_to_another_thread::<protohead::class_means::ClassSums>();
/// ```
#[derive(Debug)]
pub struct ClassSums {
    pub(super) sums: TensorHandle,    // f32, [lanes, heads, active, dim]
    pub(super) carries: TensorHandle, // f32, of the same shape: the rounding error of the sums, to be subtracted
    pub(super) counts: TensorHandle,  // u32, [active]
    pub(super) status: TensorHandle,  // u32, [SUMS_STATUS_FIELDS]
    pub(super) options: Options,
    /// Rows that came so far, whether or not they had a class.
    pub(super) rows: usize,
    /// Nothing was added yet: every buffer is unspecified, and stands for zeros. Later the sums of classes without rows still are.
    pub(crate) fresh: bool,
    of_this_thread: PhantomData<*const ()>,
}

/// Proves that 32-bit indices reach the rows of a batch in every head, and one more for each class that has some, as a CPU's sort wants.
pub(crate) fn addressable_batch(heads: usize, rows: usize, classes: usize) -> Result<(), Error> {
    let work = rows as u128 + rows.min(classes) as u128;
    addressable("a batch", heads as u128 * work)
}

impl ClassSums {
    /// Sums of no rows yet, for `heads` × `active` × `dim` (H, K, D): labels are to be in `0..active`.
    ///
    /// # Errors
    /// [`Error::Empty`] if a size is zero, [`Error::TooLarge`] if the sums pass 32-bit addresses or a buffer of the device; a typed
    /// error if the device cannot run the forced variant.
    pub fn new(
        client: &Client,
        heads: usize,
        active: usize,
        dim: usize,
        options: &Options,
    ) -> Result<Self, Error> {
        let shape = Self::shape_of(client, [heads, active, dim], options)?;
        Ok(Self {
            sums: empty(client, shape, F32),
            carries: empty(client, shape, F32),
            counts: empty(client, [active], U32),
            status: empty(client, [SUMS_STATUS_FIELDS], U32),
            options: options.clone(),
            rows: 0,
            fresh: true,
            of_this_thread: PhantomData,
        })
    }

    /// `[lanes, heads, active, dim]` of a state on this device, if it can be there.
    pub(crate) fn shape_of(
        client: &Client,
        [heads, active, dim]: [usize; 3],
        options: &Options,
    ) -> Result<[usize; 4], Error> {
        let operand = "class sums";
        let shape = [heads, active, dim];
        if shape.contains(&0) {
            return Err(Error::Empty {
                operand,
                got: shape.to_vec(),
            });
        }
        addressable(operand, count(&shape))?;
        let blueprint = Blueprint::new(client, options.strategy)?;
        let lanes = match blueprint.variant {
            Variant::Unit => unit::lanes(blueprint.units, shape),
            _ => plane::lanes(shape),
        };
        let shape = [lanes, heads, active, dim];
        allocatable(client, operand, count(&shape), F32)?;
        Ok(shape)
    }

    /// f32, `[lanes, heads, active, dim]`, unspecified before the first batch, and of classes without rows. Where there are few classes
    /// there are several lanes, so that the whole device has something to do; which of them sums a row depends only on the rows before
    /// it, not on how they came in batches. The sum of a class is that of its lanes.
    pub fn sums(&self) -> &TensorHandle {
        &self.sums
    }

    /// f32, of the shape of the sums, and unspecified where they are: the rounding error of the sums so far. The compensated sum is
    /// `sums − carries`.
    pub fn carries(&self) -> &TensorHandle {
        &self.carries
    }

    /// u32, `[active]`: rows of each class so far; unspecified before the first batch.
    pub fn counts(&self) -> &TensorHandle {
        &self.counts
    }

    /// u32, `[4]`: rows whose label was neither a class nor ignored, the first of them in its batch, and its label, low half first;
    /// unspecified before the first batch.
    pub fn status(&self) -> &TensorHandle {
        &self.status
    }

    fn blueprint(&self, client: &Client) -> Result<Blueprint, Error> {
        on_device(client, "class sums", &self.sums)?;
        Blueprint::new(client, self.options.strategy)
    }

    /// `[lanes, heads, active, dim]`
    pub(super) fn shape(&self) -> [usize; 4] {
        let shape = self.sums.shape();
        [shape[0], shape[1], shape[2], shape[3]]
    }

    fn dims(&self) -> [usize; 3] {
        let [_, heads, active, dim] = self.shape();
        [heads, active, dim]
    }

    /// Adds `embeddings [heads, rows, dim]` (f32, f16 or bf16) to the classes that `labels [rows]` name, in row order.
    ///
    /// # Errors
    /// A typed [`Error`] for what the host can see, before anything is launched. A bad label leaves its row out, and from then on
    /// [`check`](Self::check) and [`read_counts`](Self::read_counts) report it; sums and means are those of the other rows.
    pub fn accumulate(
        &mut self,
        client: &Client,
        embeddings: &TensorHandle,
        labels: &TensorHandle,
    ) -> Result<(), Error> {
        let blueprint = self.blueprint(client)?;
        let embeddings = Strided::float(client, "embeddings", embeddings, 3)?;
        let [heads, rows, dim] = embeddings.dims3();
        let [of_heads, _, of_dim] = self.dims();
        if [heads, dim] != [of_heads, of_dim] {
            return Err(Error::Shape {
                operand: "embeddings",
                got: embeddings.shape().to_vec(),
                expected: format!("[{of_heads}, rows, {of_dim}], like the sums"),
            });
        }
        let labels = Labels::new(client, labels, rows)?;
        let call = AccumulateCall {
            client,
            blueprint: &blueprint,
            embeddings: &embeddings,
            labels: &labels,
            sums: self,
        };
        match blueprint.variant {
            Variant::Unit => unit::launch(&call)?,
            _ => plane::launch(&call),
        }
        self.rows = self.rows.saturating_add(rows);
        self.fresh = false;
        Ok(())
    }

    /// Adds what another state of the same device and options has gathered.
    ///
    /// # Errors
    /// [`Error::Place`] if a state is on another device, [`Error::Shape`] if they differ in shape, [`Error::MixedSums`] if only one is
    /// of normalized rows.
    pub fn merge(&mut self, client: &Client, other: &Self) -> Result<(), Error> {
        let blueprint = self.blueprint(client)?;
        on_device(client, "class sums", &other.sums)?;
        if self.shape() != other.shape() {
            return Err(Error::Shape {
                operand: "class sums",
                got: other.shape().to_vec(),
                expected: format!("{:?}", self.shape()),
            });
        }
        let normalized = other.options.normalize;
        if normalized != self.options.normalize {
            return Err(Error::MixedSums { normalized });
        }
        if other.fresh {
            return Ok(());
        }
        let [lanes, heads, active, dim] = self.shape();
        let vector = widest(blueprint.vector(F32), [dim]);
        let elements = lanes * heads * active * dim;
        let blueprint = blueprint.for_elements(elements);
        let (count, cube) = blueprint.elementwise(client, elements / vector);
        // SAFETY: `new` allocated both states, and their shapes are equal.
        unsafe {
            merge::launch_unchecked(
                client,
                count,
                cube,
                vector,
                whole(&self.sums, vector),
                whole(&self.carries, vector),
                whole(&self.counts, 1),
                whole(&other.sums, vector),
                whole(&other.carries, vector),
                whole(&other.counts, 1),
                active,
                dim / vector,
                self.fresh,
            );
            let (per_class, cube) = blueprint.elementwise(client, active);
            // Afterwards, since the sums are told by the counts.
            add_counts::launch_unchecked(
                client,
                per_class,
                cube,
                whole(&self.counts, 1),
                whole(&self.status, 1),
                whole(&other.counts, 1),
                whole(&other.status, 1),
                self.fresh,
            );
        }
        self.rows = self.rows.saturating_add(other.rows);
        self.fresh = false;
        Ok(())
    }

    /// A copy of `weights [heads, stored, dim]`, of their dtype, whose first `active` rows are the class means. A class without rows
    /// keeps its old weights, as do the classes behind. It does not wait, and so says nothing of labels: see [`check`](Self::check).
    ///
    /// # Errors
    /// A typed [`Error`] if the weights do not fit.
    pub fn means(&self, client: &Client, weights: &TensorHandle) -> Result<TensorHandle, Error> {
        let blueprint = self.blueprint(client)?;
        let weights = Strided::float(client, "class weights", weights, 3)?;
        let [lanes, heads, active, dim] = self.shape();
        let [_, stored, _] = weights.dims3();
        if weights.shape() != [heads, stored, dim] || stored < active {
            return Err(Error::Shape {
                operand: "class weights",
                got: weights.shape().to_vec(),
                expected: format!("[{heads}, at least {active}, {dim}]"),
            });
        }
        let means = count(weights.shape());
        allocatable(client, "class weights", means, weights.dtype())?;
        let out = empty(client, [heads, stored, dim], weights.dtype());
        let vector = weights.vector_size(&blueprint);
        let sharing = match blueprint.variant {
            Variant::Unit => 1,
            _ => Group::of(&blueprint, dim / vector).size,
        };
        let blueprint = blueprint.for_elements(heads * (lanes * active + stored) * dim);
        let (count, cube) = blueprint.elementwise(client, heads * stored * sharing);
        // SAFETY: `Strided` proved the weights, the sums are [lanes, heads, active ≤ stored, dim].
        unsafe {
            write_means::launch_unchecked(
                client,
                count,
                cube,
                vector,
                whole(&self.sums, vector),
                whole(&self.carries, vector),
                whole(&self.counts, 1),
                weights.buffer_arg(vector),
                weights.strides_arg(vector),
                whole(&out, vector),
                lanes,
                heads,
                active,
                stored,
                dim / vector,
                sharing,
                self.fresh,
                weights.dtype(),
            );
        }
        Ok(out)
    }

    /// Waits, and says whether every label was a class or ignored.
    ///
    /// # Errors
    /// As [`read_counts`](Self::read_counts).
    pub fn check(&self, client: &Client) -> Result<(), Error> {
        self.read_counts(client).map(drop)
    }

    /// Waits, and reads how many rows each class has had, `[active]`.
    ///
    /// # Errors
    /// [`Error::Label`] if a label was neither a class nor ignored, with its row in the batch that it came in; [`Error::Device`] if the
    /// device failed.
    pub fn read_counts(&self, client: &Client) -> Result<Vec<u32>, Error> {
        on_device(client, "class sums", &self.sums)?;
        if self.fresh {
            return Ok(vec![0; self.dims()[1]]);
        }
        let read = client
            .read(vec![self.counts.handle.clone(), self.status.handle.clone()])
            .map_err(Error::device)?;
        let [counts, status] = [&read[0], &read[1]].map(|bytes| u32::from_bytes(bytes).to_vec());
        if status[0] > 0 {
            return Err(Error::Label {
                row: status[1] as usize,
                label: joined(status[2], status[3]),
                active: self.dims()[1],
                rows: status[0] as usize,
            });
        }
        Ok(counts)
    }
}

/// An accumulation of either variant.
pub(super) struct AccumulateCall<'a> {
    pub client: &'a Client,
    pub blueprint: &'a Blueprint,
    pub embeddings: &'a Strided, // [heads, rows, dim]
    pub labels: &'a Labels,
    pub sums: &'a ClassSums,
}
