//! One file a subcommand.

pub(crate) mod devices;
pub(crate) mod enroll;
pub(crate) mod loss;
pub(crate) mod predict;
pub(crate) mod prototypes;
pub(crate) mod train;
