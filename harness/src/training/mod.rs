//! The base session, prototype replacement, and the incremental sessions.

pub(crate) mod data;
mod encoder;
pub(crate) mod network;
mod record;
pub(crate) mod run;
pub(crate) mod sessions;
