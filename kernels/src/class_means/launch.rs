//! The public state: accumulate, merge, finish.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::std::tensor::TensorHandle;
use serde::{Deserialize, Serialize};

use super::{plane, unit};
use crate::blueprint::{Blueprint, PLANE_UNITS, Strategy, Variant, cubes_for};
use crate::error::Error;
use crate::operand::{F32, Labels, Strided, U32, addressable, empty, whole};
use crate::packing::unit::RowStrides;

/// What is averaged.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Whether rows are normalized first, `x / max(‖x‖₂, 1e-12)`; otherwise the raw embeddings are averaged.
    pub normalize: bool,
    /// Rows with this label are left out and not reported.
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

/// Sums and counts of rows by class, on the device.
#[derive(Clone, Debug)]
pub struct ClassSums {
    /// f32, `[heads, classes, dim]`
    pub sums: TensorHandle,
    /// f32, `[heads, classes, dim]`: what rounding has taken from the sums so far, to be subtracted.
    pub carries: TensorHandle,
    /// u32, `[classes]`
    pub counts: TensorHandle,
    /// u32, `[2]`: rows whose label was neither a class nor ignored, and the first of them in its batch.
    pub status: TensorHandle,
    /// Nothing was added yet: sums and carries are unspecified, and stand for zeros.
    fresh: bool,
}

impl ClassSums {
    /// Of no rows, for `heads × classes × dim`.
    ///
    /// # Errors
    /// [`Error::Empty`] if a size is zero, [`Error::TooLarge`] if the sums pass 32-bit addresses.
    pub fn new(client: &Client, heads: usize, classes: usize, dim: usize) -> Result<Self, Error> {
        let shape = [heads, classes, dim];
        if shape.contains(&0) {
            return Err(Error::Empty {
                operand: "class sums",
                got: shape.to_vec(),
            });
        }
        addressable("class sums", heads as u128 * classes as u128 * dim as u128)?;
        let zeros =
            |count: usize| client.create(cubecl::bytes::Bytes::from_elems(vec![0u32; count]));
        Ok(Self {
            sums: empty(client, shape, F32),
            carries: empty(client, shape, F32),
            counts: TensorHandle::new_contiguous([classes], zeros(classes), U32),
            status: TensorHandle::new_contiguous([2], zeros(2), U32),
            fresh: true,
        })
    }

    fn dims(&self) -> [usize; 3] {
        let shape = self.sums.shape();
        [shape[0], shape[1], shape[2]]
    }

    /// Adds `embeddings [heads, rows, dim]` (f32, f16 or bf16) to the classes that `labels [rows]` name, in row order.
    ///
    /// # Errors
    /// A typed [`Error`] for what the host can see, before anything is launched. A bad label leaves its row out
    /// and is reported by [`read_counts`](Self::read_counts).
    pub fn accumulate(
        &mut self,
        client: &Client,
        embeddings: &TensorHandle,
        labels: &TensorHandle,
        options: &Options,
    ) -> Result<(), Error> {
        let blueprint = Blueprint::new(client, options.strategy)?;
        let embeddings = Strided::float(client, "embeddings", embeddings, 3)?;
        let [heads, rows, dim] = embeddings.dims3();
        let [_, classes, _] = self.dims();
        if self.dims() != [heads, classes, dim] {
            return Err(Error::Shape {
                operand: "embeddings",
                got: embeddings.shape().to_vec(),
                expected: format!(
                    "[{}, rows, {}], like the sums",
                    self.dims()[0],
                    self.dims()[2]
                ),
            });
        }
        let labels = Labels::new(client, labels, rows)?;
        let call = AccumulateCall {
            client,
            blueprint: &blueprint,
            embeddings: &embeddings,
            labels: &labels,
            sums: self,
            fresh: self.fresh,
            options,
        };
        match blueprint.variant {
            Variant::Unit => unit::launch(&call),
            Variant::Plane | Variant::Cmma => plane::launch(&call),
        }
        self.fresh = false;
        Ok(())
    }

    /// Adds what another state has gathered.
    ///
    /// # Errors
    /// [`Error::Shape`] if the states differ in shape.
    pub fn merge(
        &mut self,
        client: &Client,
        other: &Self,
        strategy: Strategy,
    ) -> Result<(), Error> {
        if self.dims() != other.dims() {
            return Err(Error::Shape {
                operand: "class sums",
                got: other.dims().to_vec(),
                expected: format!("{:?}", self.dims()),
            });
        }
        if other.fresh {
            return Ok(());
        }
        let blueprint = Blueprint::new(client, strategy)?;
        let [heads, classes, dim] = self.dims();
        let (count, cube) = elementwise(client, &blueprint, heads * classes * dim);
        // SAFETY: both states have these shapes, proved above.
        unsafe {
            merge::launch_unchecked(
                client,
                count,
                cube,
                whole(&self.sums, 1),
                whole(&self.carries, 1),
                whole(&self.counts, 1),
                whole(&self.status, 1),
                whole(&other.sums, 1),
                whole(&other.carries, 1),
                whole(&other.counts, 1),
                whole(&other.status, 1),
                self.fresh,
            );
        }
        self.fresh = false;
        Ok(())
    }

    /// A copy of `weights [heads, stored, dim]` whose first `classes` rows are the class means. A class without
    /// rows keeps its old row, and so do the rows behind.
    ///
    /// # Errors
    /// A typed [`Error`] if the weights do not fit.
    pub fn write_means(
        &self,
        client: &Client,
        weights: &TensorHandle,
        strategy: Strategy,
    ) -> Result<TensorHandle, Error> {
        let blueprint = Blueprint::new(client, strategy)?;
        let weights = Strided::float(client, "class weights", weights, 3)?;
        let [heads, classes, dim] = self.dims();
        let [_, stored, _] = weights.dims3();
        if weights.shape() != [heads, stored, dim] || stored < classes {
            return Err(Error::Shape {
                operand: "class weights",
                got: weights.shape().to_vec(),
                expected: format!("[{heads}, at least {classes}, {dim}]"),
            });
        }
        let out = empty(client, [heads, stored, dim], weights.dtype());
        let vector = match blueprint.variant {
            Variant::Unit => weights.vector_size(&blueprint),
            Variant::Plane | Variant::Cmma => 1,
        };
        let (count, cube) = elementwise(client, &blueprint, heads * stored * dim);
        // SAFETY: `Strided` proved the weights, the sums are [heads, classes ≤ stored, dim].
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
                classes,
                stored,
                dim / vector,
                weights.dtype(),
            );
        }
        Ok(out)
    }

    /// Waits, and reads how many rows each class has had.
    ///
    /// # Errors
    /// [`Error::BadLabel`] if a label was neither a class nor ignored, [`Error::Device`] if the device failed.
    pub fn read_counts(&self, client: &Client) -> Result<Vec<u32>, Error> {
        let read = client
            .read(vec![self.counts.handle.clone(), self.status.handle.clone()])
            .map_err(|error| Error::Device(format!("{error:?}")))?;
        let [counts, status] = [&read[0], &read[1]].map(|bytes| u32::from_bytes(bytes).to_vec());
        if status[0] > 0 {
            return Err(Error::BadLabel {
                row: status[1] as usize,
                classes: self.dims()[1],
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
    /// The sums begin with zeros, whatever is in them.
    pub fresh: bool,
    pub options: &'a Options,
}

fn elementwise(client: &Client, blueprint: &Blueprint, elements: usize) -> (CubeCount, CubeDim) {
    match blueprint.variant {
        Variant::Unit => blueprint.unit_grid(),
        Variant::Plane | Variant::Cmma => (
            cubes_for(client, elements.div_ceil(PLANE_UNITS).min(65_535)),
            CubeDim::new_1d(PLANE_UNITS as u32),
        ),
    }
}

#[cube(launch_unchecked)]
fn merge(
    sums: &mut [f32],
    carries: &mut [f32],
    counts: &mut [u32],
    status: &mut [u32],
    other_sums: &[f32],
    other_carries: &[f32],
    other_counts: &[u32],
    other_status: &[u32],
    #[comptime] fresh: bool,
) {
    let step = CUBE_COUNT * CUBE_DIM as usize;
    let mut i = ABSOLUTE_POS;
    while i < sums.len() {
        if comptime!(fresh) {
            sums[i] = other_sums[i];
            carries[i] = other_carries[i];
        } else {
            let corrected = (other_sums[i] - other_carries[i]) - carries[i];
            let next = sums[i] + corrected;
            carries[i] = (next - sums[i]) - corrected;
            sums[i] = next;
        }
        i += step;
    }
    let mut class = ABSOLUTE_POS;
    while class < counts.len() {
        counts[class] += other_counts[class];
        class += step;
    }
    if ABSOLUTE_POS == 0 && other_status[0] > 0 {
        if status[0] == 0 {
            status[1] = other_status[1];
        }
        status[0] += other_status[0];
    }
}

#[cube(launch_unchecked)]
fn write_means<F: Float, N: Size>(
    sums: &[Vector<f32, N>],    // [heads, classes, dim]
    carries: &[Vector<f32, N>], // [heads, classes, dim]
    counts: &[u32],             // [classes]
    weights: &[Vector<F, N>],   // [heads, stored, dim]
    strides: RowStrides,
    out: &mut [Vector<F, N>], // [heads, stored, dim]
    classes: usize,
    stored: usize,
    columns: usize, // vectors of a row
    #[define(F)] _dtype: ElemType,
) {
    let mut i = ABSOLUTE_POS;
    while i < out.len() {
        let d = i % columns;
        let class = i / columns % stored;
        let head = i / columns / stored;
        let mut value = weights[head * strides.head + class * strides.row + d];
        if class < classes {
            let count = counts[class];
            if count > 0 {
                let at = (head * classes + class) * columns + d;
                let count = Vector::<f32, N>::new(f32::cast_from(count));
                value = Vector::<F, N>::cast_from((sums[at] - carries[at]) / count);
            }
        }
        out[i] = value;
        i += CUBE_COUNT * CUBE_DIM as usize;
    }
}
