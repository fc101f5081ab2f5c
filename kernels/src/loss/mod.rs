//! What the two cross-entropies share: options, targets, reductions and the rows of a backward pass.

mod count;
mod options;
pub(crate) mod reduce;
pub(crate) mod rows;
pub(crate) mod target;

pub(crate) use count::count_labels;
pub use options::{LossOptions, Reduction};

use cubecl::client::Client;
use cubecl::ir::{ElemType, IntKind};
use cubecl::prelude::*;
use cubecl::std::tensor::TensorHandle;

use crate::error::Error;
use crate::operand::{F32, Labels, U32, contiguous};
use reduce::STATUS_FIELDS;

/// The gradient that arrives at a loss from above. A loss without heads is its own total.
#[derive(Clone, Debug)]
pub enum Upstream {
    /// Of the weighted total, `Σ_h α_h · Σ loss[h]`.
    Total(f32),
    /// Of the loss: f32, contiguous, `[heads]`, or `[heads, rows]` under [`Reduction::None`], or `[1]` where there are no heads.
    /// The head weights take no part.
    Loss(TensorHandle),
}

impl Default for Upstream {
    fn default() -> Self {
        Self::Total(1.0)
    }
}

/// The result of a forward pass of a cross-entropy, on the device.
#[derive(Clone, Debug)]
pub struct LossOutput {
    /// f32, `[heads]`, or `[heads, rows]` under [`Reduction::None`]; without head weights.
    pub loss: TensorHandle,
    /// f32, `[1]`: `Σ_h α_h · Σ loss[h]`.
    pub total: TensorHandle,
    /// f32, `[heads, rows]`: `ln Σ_c e^z`, for the backward pass.
    pub lse: TensorHandle,
    /// u32, `[heads, rows]`: the class of the highest logit, the first of them.
    pub predictions: TensorHandle,
    /// u32, `[3]`: rows that count, rows whose label is invalid, the first of these.
    pub status: TensorHandle,
    labels: TensorHandle,
    active: usize,
}

impl LossOutput {
    pub(crate) fn new(
        row_loss: TensorHandle,
        reduced: reduce::Reduced,
        lse: TensorHandle,
        predictions: TensorHandle,
        labels: &Labels,
        active: usize,
        options: &LossOptions,
    ) -> Self {
        Self {
            loss: match options.reduction {
                Reduction::None => row_loss,
                Reduction::Sum | Reduction::Mean => reduced.loss,
            },
            total: reduced.total,
            lse,
            predictions,
            status: reduced.status,
            labels: labels.tensor.clone(),
            active,
        }
    }

    /// Proves what a backward pass reads: the fields are the caller's.
    pub(crate) fn prove(&self, heads: usize, rows: usize) -> Result<(), Error> {
        contiguous("lse", &self.lse, &[heads, rows], F32)?;
        contiguous("status", &self.status, &[STATUS_FIELDS], U32)
    }

    /// What a backward pass reads of a forward pass whose other results are elsewhere.
    #[cfg(feature = "burn")]
    pub(crate) fn saved(lse: TensorHandle, status: TensorHandle, labels: &TensorHandle) -> Self {
        Self {
            loss: lse.clone(),
            total: lse.clone(),
            predictions: lse.clone(),
            lse,
            status,
            labels: labels.clone(),
            active: 0,
        }
    }

    /// Waits, and says whether every label was a class or ignored.
    ///
    /// # Errors
    /// [`Error::Label`] with the first row that was not, [`Error::Device`] if the device failed.
    pub fn check(&self, client: &Client) -> Result<(), Error> {
        self.read_checked(client, &self.status).map(drop)
    }

    /// Waits, and reads the total.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn read_total(&self, client: &Client) -> Result<f32, Error> {
        Ok(self.read(client, &self.total)?[0])
    }

    /// Waits, and reads the loss: `heads` numbers, or `heads · rows` under [`Reduction::None`].
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn read_loss(&self, client: &Client) -> Result<Vec<f32>, Error> {
        self.read(client, &self.loss)
    }

    /// Waits, and reads the `heads · rows` predictions.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn read_predictions(&self, client: &Client) -> Result<Vec<u32>, Error> {
        let bytes = self.read_checked(client, &self.predictions)?;
        Ok(u32::from_bytes(&bytes).to_vec())
    }

    fn read(&self, client: &Client, tensor: &TensorHandle) -> Result<Vec<f32>, Error> {
        let bytes = self.read_checked(client, tensor)?;
        Ok(f32::from_bytes(&bytes).to_vec())
    }

    fn read_checked(
        &self,
        client: &Client,
        tensor: &TensorHandle,
    ) -> Result<cubecl::bytes::Bytes, Error> {
        let handles = vec![tensor.handle.clone(), self.status.handle.clone()];
        contiguous("status", &self.status, &[STATUS_FIELDS], U32)?;
        let mut read = client.read(handles).map_err(Error::device)?;
        let status = read.pop().map(|bytes| u32::from_bytes(&bytes).to_vec());
        let (Some(&[_, invalid, first]), Some(value)) = (status.as_deref(), read.pop()) else {
            return Err(Error::Device("a read returned too few buffers".into()));
        };
        if invalid == 0 {
            return Ok(value);
        }
        let row = first as usize;
        let labels = client
            .read_one(self.labels.handle.clone())
            .map_err(Error::device)?;
        let label = match self.labels.dtype {
            ElemType::Int(IntKind::I32) => i32::from_bytes(&labels).get(row).map(|&l| l.into()),
            ElemType::Int(_) => i64::from_bytes(&labels).get(row).copied(),
            _ => u32::from_bytes(&labels).get(row).map(|&l| l.into()),
        };
        Err(Error::Label {
            row,
            label,
            active: self.active,
            rows: invalid as usize,
        })
    }
}
