//! What the two cross-entropies share: options, targets, reductions and the gradient that arrives.

pub(crate) mod arriving;
mod count;
mod options;
pub(crate) mod reduce;
pub(crate) mod target;

pub(crate) use count::{READ_AHEAD, count_labels};
pub use options::{LossOptions, Reduction};

use cubecl::bytes::Bytes;
use cubecl::client::Client;
use cubecl::ir::{ElemType, IntKind};
use cubecl::prelude::*;
use cubecl::std::tensor::TensorHandle;

use crate::error::Error;
use crate::operand::{F32, Labels, U32, contiguous};
use reduce::STATUS_FIELDS;

/// The gradient that arrives at a loss from above. [`reconstruction`](crate::reconstruction) has no heads: its loss is its total.
#[derive(Clone, Debug)]
pub enum Upstream {
    /// The gradient of the weighted total, `Σ_h α_h · Σ loss[h]`.
    Total(f32),
    /// The gradient of each loss: f32, contiguous, `[heads]`, or `[heads, rows]` under [`Reduction::None`], or `[1]` where there are no heads.
    /// The head weights take no part.
    Loss(TensorHandle),
}

impl Default for Upstream {
    fn default() -> Self {
        Self::Total(1.0)
    }
}

/// The result of a forward pass of a cross-entropy, on the device.
#[must_use = "labels that are no class are only reported by `check` and the `read` functions"]
#[derive(Clone, Debug)]
pub struct LossOutput {
    /// f32, `[heads]`, or `[heads, rows]` under [`Reduction::None`]; without head weights.
    pub loss: TensorHandle,
    /// f32, `[1]`: `Σ_h α_h · Σ loss[h]`.
    pub total: TensorHandle,
    /// f32, `[heads, rows]`: `ln Σ_c e^z` of the logits that the loss sees, with a margin if there is one.
    pub lse: TensorHandle,
    /// u32, `[heads, rows]`: the class of the highest logit, without a margin; of equal ones, the first. A NaN is never the highest, and
    /// of a row of them it is class 0.
    pub predictions: TensorHandle,
    /// u32, `[3]`: rows that count, rows whose label is invalid, the first of these (`u32::MAX − 1` if there is none).
    pub status: TensorHandle,
    saved_lse: TensorHandle,
    labels: TensorHandle,
    asked: Asked,
}

/// What a forward pass was asked, as far as its backward pass must be asked the same.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    pub op: &'static str,
    pub scale: f32, // 1 where the logits are given
    /// Angular and cosine; 0 where there is none.
    pub margins: [f32; 2],
    pub heads: usize,
    pub rows: usize,
    pub active: usize,
    pub ignore_index: i32,
    /// What operands are multiplied in: another's rounding, and probabilities would not add up to 1.
    pub arithmetic: ElemType,
}

impl Asked {
    /// Proves that a backward pass is asked the same.
    fn same(&self, backward: &Self) -> Result<(), Error> {
        same("the op", self.op, backward.op)?;
        same("the number of heads", self.heads, backward.heads)?;
        same("the number of rows", self.rows, backward.rows)?;
        same("scale", self.scale, backward.scale)?;
        let [angular, cosine] = self.margins;
        same("the angular margin", angular, backward.margins[0])?;
        same("the cosine margin", cosine, backward.margins[1])?;
        same("the arithmetic", self.arithmetic, backward.arithmetic)?;
        let option = "the number of active classes";
        same(option, self.active, backward.active)?;
        same("ignore_index", self.ignore_index, backward.ignore_index)
    }
}

fn same<T: PartialEq + ToString>(
    option: &'static str,
    forward: T,
    backward: T,
) -> Result<(), Error> {
    match forward == backward {
        true => Ok(()),
        false => Err(Error::OtherForward {
            option,
            forward: forward.to_string(),
            backward: backward.to_string(),
        }),
    }
}

/// What a backward pass reads of a forward pass.
pub(crate) struct Saved {
    /// f32, `[2, heads, rows]`: lse, and what rounding took from it.
    pub lse: TensorHandle,
    pub status: TensorHandle,
    /// Absent where the options were kept with the tensors, as Burn's are.
    pub asked: Option<Asked>,
}

impl Saved {
    /// Proves them for a backward pass, as they come from a caller.
    pub(crate) fn prove(&self, client: &Client, backward: &Asked) -> Result<(), Error> {
        if let Some(forward) = &self.asked {
            forward.same(backward)?;
        }
        let expected = [2, backward.heads, backward.rows];
        contiguous(client, "saved lse", &self.lse, &expected, F32)?;
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
        saved_lse: TensorHandle,
        predictions: TensorHandle,
        labels: &Labels,
        asked: Asked,
        options: &LossOptions,
    ) -> Self {
        let of_rows = predictions.shape().clone();
        let low = of_rows.num_elements() * size_of::<f32>();
        let lse = saved_lse.handle.clone().offset_end(low as u64);
        Self {
            loss: match options.reduction {
                Reduction::None => row_loss,
                Reduction::Sum | Reduction::Mean => reduced.loss,
            },
            total: reduced.total,
            lse: TensorHandle::new_contiguous(of_rows, lse, F32),
            predictions,
            status: reduced.status,
            saved_lse,
            labels: labels.tensor.clone(),
            asked,
        }
    }

    pub(crate) fn saved(&self) -> Saved {
        Saved {
            lse: self.saved_lse.clone(),
            status: self.status.clone(),
            asked: Some(self.asked),
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
        contiguous(client, "total", &self.total, &[1], F32)?;
        let tensors = [
            (&self.total, F32),
            (&self.loss, F32),
            (&self.predictions, U32),
        ];
        let (counted, [total, loss, predictions]) = self.read_checked(client, tensors)?;
        Ok(LossValues {
            total: values(&total, &self.total)[0],
            loss: values(&loss, &self.loss),
            predictions: values(&predictions, &self.predictions),
            counted,
        })
    }

    /// Waits, and reads the total.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn read_total(&self, client: &Client) -> Result<f32, Error> {
        contiguous(client, "total", &self.total, &[1], F32)?;
        let (_, [total]) = self.read_checked(client, [(&self.total, F32)])?;
        Ok(values(&total, &self.total)[0])
    }

    /// Waits, and reads the loss: `heads` numbers, or `heads · rows` under [`Reduction::None`].
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn read_loss(&self, client: &Client) -> Result<Vec<f32>, Error> {
        let (_, [loss]) = self.read_checked(client, [(&self.loss, F32)])?;
        Ok(values(&loss, &self.loss))
    }

    /// Waits, and reads the `heads · rows` predictions.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn read_predictions(&self, client: &Client) -> Result<Vec<u32>, Error> {
        let tensors = [(&self.predictions, U32)];
        let (_, [predictions]) = self.read_checked(client, tensors)?;
        Ok(values(&predictions, &self.predictions))
    }

    /// How many rows count, and some tensors, if every label is a class or ignored.
    fn read_checked<const N: usize>(
        &self,
        client: &Client,
        tensors: [(&TensorHandle, ElemType); N],
    ) -> Result<(usize, [Bytes; N]), Error> {
        contiguous(client, "status", &self.status, &[STATUS_FIELDS], U32)?;
        for (tensor, dtype) in tensors {
            contiguous(client, "a result", tensor, tensor.shape(), dtype)?;
        }
        let mut handles: Vec<_> = tensors.map(|(tensor, _)| tensor.handle.clone()).into();
        handles.push(self.status.handle.clone());
        let mut read = client.read(handles).map_err(Error::device)?;
        let status: Option<Vec<u32>> = read.pop().map(|bytes| values(&bytes, &self.status));
        let (Some(&[counted, invalid, first]), Ok(read)) = (status.as_deref(), read.try_into())
        else {
            return Err(Error::Device("a read returned too few buffers".into()));
        };
        if invalid == 0 {
            return Ok((counted as usize, read));
        }
        let row = first as usize;
        let labels = client
            .read_one(self.labels.handle.clone())
            .map_err(Error::device)?;
        let of = &self.labels;
        let label: Option<i64> = match of.dtype {
            ElemType::Int(IntKind::I32) => values::<i32>(&labels, of).get(row).map(|&l| l.into()),
            ElemType::Int(_) => values::<i64>(&labels, of).get(row).copied(),
            _ => values::<u32>(&labels, of).get(row).map(|&l| l.into()),
        };
        let label =
            label.ok_or_else(|| Error::Device(format!("there is no label of row {row}")))?;
        Err(Error::Label {
            row,
            label,
            active: self.asked.active,
            rows: invalid as usize,
        })
    }
}

/// The values of a tensor that was proved, of what was read from its buffer, which may hold more.
/// The values of a contiguous tensor, of its buffer's bytes.
pub(crate) fn values<T: CubeElement>(bytes: &[u8], tensor: &TensorHandle) -> Vec<T> {
    let count: usize = tensor.shape().iter().product();
    T::from_bytes(&bytes[..count * size_of::<T>()]).to_vec()
}
