//! What a user can get wrong, each in one line.

use std::path::PathBuf;

/// A mistake, or a machine that failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{}: {source}", path.display())]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{}: not a safetensors file: {reason}", path.display())]
    Format { path: PathBuf, reason: String },
    #[error("{}: {reason}", path.display())]
    Content { path: PathBuf, reason: String },
    #[error("device {name}: {reason}")]
    Device { name: String, reason: String },
    #[error("{0}")]
    Usage(String),
    #[error("{0}")]
    Op(#[from] protohead::Error),
}
