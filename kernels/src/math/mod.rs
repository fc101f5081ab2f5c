//! Device helpers shared by the ops: each file is one piece of a formula.

pub(crate) mod group;
pub(crate) mod lanes;
pub(crate) mod narrow;
pub(crate) mod norm;
pub(crate) mod online_softmax;
pub(crate) mod parts;
pub(crate) mod span;
pub(crate) mod sum;
pub(crate) mod tile;
