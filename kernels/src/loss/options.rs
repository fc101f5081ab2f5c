//! The options that every classification loss shares.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;
use serde::{Deserialize, Serialize};

use crate::error::Error;

/// How the losses of a head's rows are reduced (torch's `reduction`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reduction {
    /// Each row keeps its own: `[heads, rows]`.
    None,
    /// Their sum: `[heads]`.
    Sum,
    /// Their mean over the rows that are not ignored: `[heads]`. With every row ignored it is 0, and so are its
    /// gradients (torch gives NaN).
    #[default]
    Mean,
}

/// The options of a cross-entropy, with torch's meaning and defaults.
///
/// The target of a row with label `y` is `(1 − ε)·onehot(y) + ε/K`, where ε is the label smoothing.
///
/// # Examples
/// ```
/// use protohead::{LossOptions, Reduction};
/// let options = LossOptions {
///     reduction: Reduction::Sum,
///     label_smoothing: 0.1,
///     ..LossOptions::default()
/// };
/// assert_eq!(options.ignore_index, -100);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LossOptions {
    /// How a head's rows become its loss: by default the mean.
    pub reduction: Reduction,
    /// ε, between 0 and 1: by default 0.
    pub label_smoothing: f32,
    /// Rows with this label, by default -100, have no loss and no gradient. Their embeddings must be finite: a NaN spreads through the products of the
    /// fused op. It may be the index of a class. A negative one matches no u32 label.
    pub ignore_index: i32,
    /// α of `total = Σ_h α_h · loss_h`, one finite number a head, also 0 or less; all 1 if absent.
    pub head_weights: Option<Vec<f32>>,
}

impl Default for LossOptions {
    fn default() -> Self {
        Self {
            reduction: Reduction::Mean,
            label_smoothing: 0.0,
            ignore_index: -100,
            head_weights: None,
        }
    }
}

impl LossOptions {
    pub(crate) fn validate(&self, heads: usize) -> Result<(), Error> {
        if !(0.0..=1.0).contains(&self.label_smoothing) {
            return Err(Error::Option {
                option: "label_smoothing",
                got: f64::from(self.label_smoothing),
                expected: "between 0 and 1",
            });
        }
        let Some(weights) = &self.head_weights else {
            return Ok(());
        };
        if weights.len() != heads {
            return Err(Error::HeadWeights {
                got: weights.len(),
                heads,
            });
        }
        match weights.iter().find(|weight| !weight.is_finite()) {
            None => Ok(()),
            Some(&weight) => Err(Error::Option {
                option: "head_weights",
                got: f64::from(weight),
                expected: "finite",
            }),
        }
    }

    /// The weight of each head on the device, if they have any: f32, `[heads]`.
    pub(crate) fn upload_weights(&self, client: &Client) -> Option<Handle> {
        let weights = self.head_weights.as_ref();
        weights.map(|weights| client.create_from_slice(f32::as_bytes(weights)))
    }
}
