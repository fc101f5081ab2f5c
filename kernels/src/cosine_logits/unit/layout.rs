//! Where things are in the packed buffers, for kernels.

use cubecl::prelude::*;

use crate::cosine_logits::problem::{Sizes, SizesExpand};

/// Which operand a tile belongs to, decided when the kernel is compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Operand {
    /// The embeddings: `rows` of them a head.
    Embeddings,
    /// The class weights: `active` of them a head.
    Weights,
}

impl Operand {
    /// The one it is multiplied with.
    pub(super) fn other(self) -> Self {
        match self {
            Self::Embeddings => Self::Weights,
            Self::Weights => Self::Embeddings,
        }
    }
}

#[cube]
impl Sizes {
    /// How many rows of a head are real.
    pub(super) fn count(&self, #[comptime] operand: Operand) -> usize {
        match comptime!(operand) {
            Operand::Embeddings => self.rows,
            Operand::Weights => self.active,
        }
    }

    /// How many rows of a head are packed.
    pub(super) fn padded(&self, #[comptime] operand: Operand) -> usize {
        match comptime!(operand) {
            Operand::Embeddings => self.rows_padded,
            Operand::Weights => self.active_padded,
        }
    }

    /// The packed row where a head of an operand begins.
    pub(super) fn head_start(&self, head: usize, #[comptime] operand: Operand) -> usize {
        match comptime!(operand) {
            Operand::Embeddings => head * self.rows_padded,
            Operand::Weights => self.heads * self.rows_padded + head * self.active_padded,
        }
    }
}
