//! The base session, prototype replacement, and the incremental sessions.

pub(crate) mod config;
pub(crate) mod data;
mod encoder;
mod metrics;
pub(crate) mod network;
mod record;
pub(crate) mod run;
pub(crate) mod sessions;
