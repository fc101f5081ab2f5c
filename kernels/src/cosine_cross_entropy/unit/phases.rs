//! What a launch computes.

use crate::loss::arriving::Arrives;

/// What one launch computes, decided when the kernel is compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Phases {
    /// Loss, lse, predictions and the reductions.
    pub loss: bool,
    /// The gradient of the embeddings.
    pub embeddings: bool,
    /// The gradient of the class weights.
    pub weights: bool,
    /// The gradient of the scale, with that of the embeddings.
    pub scale: bool,
    /// Whom a number of the upstream gradient is for.
    pub arrives: Arrives,
    /// The loss is a mean over the rows that count.
    pub mean: bool,
    /// Labels are smoothed.
    pub smooth: bool,
    /// Heads have weights.
    pub weighted: bool,
    /// A row's own class has a margin to overcome.
    pub margin: bool,
}

impl Phases {
    pub(crate) fn gradients(self) -> bool {
        self.embeddings || self.weights
    }

    /// Whether gradients follow from the exponentials of the loss, with no second product for logits.
    pub(crate) fn at_once(self) -> bool {
        self.loss && self.gradients()
    }

    /// Whether gradients of rows wait for the sums of all class weights, which one unit makes for all.
    pub(crate) fn needs_totals(self) -> bool {
        self.at_once() && self.smooth
    }
}
