//! Keywords that a finished run was taught afterwards, from a few recordings each: their names and the speech head's prototypes of them,
//! in `enrolled.json`.

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::json::{read_json, write_json};
use crate::error::Error;
use crate::files::Digest;

/// The keywords, by name, with their prototypes, `[D]` each.
pub(super) type Enrolled = BTreeMap<String, Vec<f32>>;

/// What `enrolled.json` holds.
#[derive(Serialize, Deserialize)]
struct Record {
    /// Of the network that the recordings went through: to another their prototypes mean nothing.
    model: Digest,
    prototypes: Enrolled,
}

fn place(run: &Path) -> PathBuf {
    run.join("enrolled.json")
}

/// Those that the network of this digest was taught, of `dim` numbers each. None if there is no file; nor if another network was, as
/// where a run was trained again.
pub(super) fn read(run: &Path, model: &Digest, dim: usize) -> Result<Option<Enrolled>, Error> {
    let path = place(run);
    if !path.exists() {
        return Ok(Some(Enrolled::new()));
    }
    let record: Record = read_json(&path)?;
    let sound = |values: &Vec<f32>| values.len() == dim && values.iter().all(|v| v.is_finite());
    match record.model == *model {
        false => Ok(None),
        true if record.prototypes.values().all(sound) => Ok(Some(record.prototypes)),
        true => Err(Error::damaged(&path)("a prototype is none of this network")),
    }
}

/// Adds one, or puts it in the place of the one of its name; gives how many there are. `is_current` says whether the network is the run's.
pub(super) fn add(
    run: &Path,
    model: Digest,
    is_current: impl FnOnce() -> bool,
    keyword: &str,
    prototype: Vec<f32>,
) -> Result<usize, Error> {
    let content = |reason: &str| Error::Content {
        path: run.into(),
        reason: reason.into(),
    };
    // Nobody else's keyword is lost, and no training ends meanwhile.
    let folder = File::open(run).map_err(Error::io(run))?;
    if let Err(TryLockError::WouldBlock) = folder.try_lock() {
        return Err(content("another process trains or teaches in it"));
    }
    if !is_current() {
        return Err(content("it was trained again meanwhile"));
    }
    if !prototype.iter().all(|value| value.is_finite()) {
        return Err(content("its network makes no numbers of these recordings"));
    }
    let mut prototypes = read(run, &model, prototype.len())?.unwrap_or_default();
    prototypes.insert(keyword.to_owned(), prototype);
    let count = prototypes.len();
    write_json(&place(run), &Record { model, prototypes })?;
    Ok(count)
}
