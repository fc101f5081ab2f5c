//! Which gradients of a cosine head's operands are computed, and what comes of it.

use cubecl::std::tensor::TensorHandle;

/// The operands whose gradients are computed; what is left out costs nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// That of the embeddings.
    pub embeddings: bool,
    /// That of the class weights.
    pub weights: bool,
}

impl Wanted {
    /// Both: nothing is frozen.
    pub const BOTH: Self = Self {
        embeddings: true,
        weights: true,
    };
    /// That of the embeddings alone: the heads are frozen.
    pub const EMBEDDINGS: Self = Self {
        embeddings: true,
        weights: false,
    };
    /// That of the class weights alone: what made the embeddings is frozen.
    pub const WEIGHTS: Self = Self {
        embeddings: false,
        weights: true,
    };

    pub(crate) fn any(self) -> bool {
        self.embeddings || self.weights
    }
}

/// The gradients of a cosine head's operands that were asked for, contiguous and of the operands' dtype.
#[derive(Clone, Debug, Default)]
pub struct Gradients {
    /// `[heads, rows, dim]`; rows that are ignored have zeros.
    pub embeddings: Option<TensorHandle>,
    /// `[heads, classes, dim]`; the rows `K..classes` have zeros.
    pub weights: Option<TensorHandle>,
}
