//! The base session, prototype replacement, and the incremental sessions.

mod cache;
mod checkpoint;
pub(crate) mod claim;
pub(crate) mod classifier;
pub(crate) mod config;
pub(crate) mod data;
mod encoder;
mod enrolled;
mod folder;
mod json;
mod metrics;
pub(crate) mod network;
pub(crate) mod protocol;
mod record;
pub(crate) mod run;
pub(crate) mod sessions;
