//! What a user can get wrong, each in one line.

use std::io;
use std::path::{Path, PathBuf};

/// A mistake, or a machine that failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{}: not a safetensors file: {reason}", path.display())]
    Format { path: PathBuf, reason: String },
    #[error("{}: {reason}", path.display())]
    Content { path: PathBuf, reason: String },
    #[error("{}: damaged: {reason}", path.display())]
    Damaged { path: PathBuf, reason: String },
    #[error("{}: cannot be written: {reason}", path.display())]
    Unwritable { path: PathBuf, reason: String },
    #[error(
        "the loss is {loss} at step {step} of epoch {epoch}: try a lower --learning-rate, in another folder"
    )]
    Diverged {
        loss: f32,
        epoch: usize,
        step: usize,
    },
    #[error(
        "the prototypes are not finite after the last step: try a lower --learning-rate, in another folder"
    )]
    DivergedLast,
    #[error("device {name}: {reason}")]
    Device { name: String, reason: String },
    #[error("{0}")]
    Usage(String),
    #[error("{0}")]
    Op(#[from] protohead::Error),
}

impl Error {
    /// Of an action on `path`.
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { path, source }
    }

    /// Of reading `path`.
    pub(crate) fn damaged<E: ToString>(path: &Path) -> impl FnOnce(E) -> Self {
        let path = path.to_path_buf();
        move |reason| Self::Damaged {
            path,
            reason: reason.to_string(),
        }
    }

    /// Of making what is to be written to `path`.
    pub(crate) fn unwritable<E: ToString>(path: &Path) -> impl FnOnce(E) -> Self {
        let path = path.to_path_buf();
        move |reason| Self::Unwritable {
            path,
            reason: reason.to_string(),
        }
    }

    /// What a tensor could not be read with.
    pub(crate) fn of_device(reported: impl std::fmt::Debug) -> Self {
        Self::Op(protohead::Error::device(reported))
    }
}
