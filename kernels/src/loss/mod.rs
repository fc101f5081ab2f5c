//! What the two cross-entropies share: options, targets, reductions and the gradient that arrives.

pub(crate) mod arriving;
mod count;
mod options;
pub(crate) mod reduce;
pub(crate) mod target;

pub(crate) use count::count_labels;
pub use options::{LossOptions, Reduction};

use cubecl::bytes::Bytes;
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
    /// u32, `[3]`: rows that count, rows whose label is invalid, the first of these (`u32::MAX − 1` if there is none).
    pub status: TensorHandle,
    labels: TensorHandle,
    active: usize,
}

/// What a backward pass reads of a forward pass.
pub(crate) struct Saved {
    pub lse: TensorHandle,
    pub status: TensorHandle,
}

impl Saved {
    /// Proves them: they come from a caller.
    pub(crate) fn prove(&self, client: &Client, heads: usize, rows: usize) -> Result<(), Error> {
        contiguous(client, "lse", &self.lse, &[heads, rows], F32)?;
        contiguous(client, "status", &self.status, &[STATUS_FIELDS], U32)
    }
}

/// A [`LossOutput`] on the host.
#[derive(Clone, Debug, PartialEq)]
pub struct LossValues {
    /// `Σ_h α_h · Σ loss[h]`.
    pub total: f32,
    /// `heads` losses, or `heads · rows` under [`Reduction::None`]; without head weights.
    pub loss: Vec<f32>,
    /// `heads · rows` classes.
    pub predictions: Vec<u32>,
    /// How many rows count, which is what [`Reduction::Mean`] divides by: those that are not ignored.
    pub counted: usize,
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

    pub(crate) fn saved(&self) -> Saved {
        Saved {
            lse: self.lse.clone(),
            status: self.status.clone(),
        }
    }

    /// Waits, and says whether every label was a class or ignored.
    ///
    /// # Errors
    /// [`Error::Label`] with the first row that was not, [`Error::Device`] if the device failed.
    pub fn check(&self, client: &Client) -> Result<(), Error> {
        self.read_checked(client, []).map(drop)
    }

    /// Waits once, and reads everything but the `lse`.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn read(&self, client: &Client) -> Result<LossValues, Error> {
        let tensors = [&self.total, &self.loss, &self.predictions];
        let (counted, [total, loss, predictions]) = self.read_checked(client, tensors)?;
        Ok(LossValues {
            total: f32::from_bytes(&total)[0],
            loss: f32::from_bytes(&loss).to_vec(),
            predictions: u32::from_bytes(&predictions).to_vec(),
            counted,
        })
    }

    /// Waits, and reads the total.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn read_total(&self, client: &Client) -> Result<f32, Error> {
        let (_, [total]) = self.read_checked(client, [&self.total])?;
        Ok(f32::from_bytes(&total)[0])
    }

    /// Waits, and reads the loss: `heads` numbers, or `heads · rows` under [`Reduction::None`].
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn read_loss(&self, client: &Client) -> Result<Vec<f32>, Error> {
        let (_, [loss]) = self.read_checked(client, [&self.loss])?;
        Ok(f32::from_bytes(&loss).to_vec())
    }

    /// Waits, and reads the `heads · rows` predictions.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn read_predictions(&self, client: &Client) -> Result<Vec<u32>, Error> {
        let (_, [predictions]) = self.read_checked(client, [&self.predictions])?;
        Ok(u32::from_bytes(&predictions).to_vec())
    }

    /// How many rows count, and some tensors, if every label is a class or ignored.
    fn read_checked<const N: usize>(
        &self,
        client: &Client,
        tensors: [&TensorHandle; N],
    ) -> Result<(usize, [Bytes; N]), Error> {
        contiguous(client, "status", &self.status, &[STATUS_FIELDS], U32)?;
        for tensor in tensors {
            contiguous(client, "a result", tensor, tensor.shape(), tensor.dtype)?;
        }
        let mut handles: Vec<_> = tensors.map(|tensor| tensor.handle.clone()).into();
        handles.push(self.status.handle.clone());
        let mut read = client.read(handles).map_err(Error::device)?;
        let status = read.pop().map(|bytes| u32::from_bytes(&bytes).to_vec());
        let (Some(&[counted, invalid, first]), Ok(values)) = (status.as_deref(), read.try_into())
        else {
            return Err(Error::Device("a read returned too few buffers".into()));
        };
        if invalid == 0 {
            return Ok((counted as usize, values));
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
        let label =
            label.ok_or_else(|| Error::Device(format!("there is no label of row {row}")))?;
        Err(Error::Label {
            row,
            label,
            active: self.active,
            rows: invalid as usize,
        })
    }
}
