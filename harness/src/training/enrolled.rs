//! Keywords that a finished run was taught afterwards, from a few recordings each: their names and the speech head's prototypes of them,
//! in `enrolled.json`.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::json::{read_json, write_json};
use crate::error::Error;
use crate::files::Digest;

/// What `enrolled.json` holds.
#[derive(Serialize, Deserialize)]
struct Record {
    /// Of the network that the recordings went through.
    model: Digest,
    /// `[D]` each.
    prototypes: BTreeMap<String, Vec<f32>>,
}

/// The keywords, by name, with their prototypes.
pub(super) type Enrolled = BTreeMap<String, Vec<f32>>;

fn place(run: &Path) -> PathBuf {
    run.join("enrolled.json")
}

/// Those that the network of this digest was taught, of `dim` numbers each; none if there is no file.
pub(super) fn read(run: &Path, model: &Digest, dim: usize) -> Result<Enrolled, Error> {
    let path = place(run);
    if !path.exists() {
        return Ok(Enrolled::new());
    }
    let record: Record = read_json(&path)?;
    if record.model != *model {
        return Err(Error::Content {
            path,
            reason: "its keywords were taught to another network: remove it".into(),
        });
    }
    let sound = |values: &Vec<f32>| values.len() == dim && values.iter().all(|v| v.is_finite());
    match record.prototypes.values().all(sound) {
        true => Ok(record.prototypes),
        false => Err(Error::damaged(&path)("a prototype is none of this network")),
    }
}

/// Adds one, or puts it in the place of the one of its name; gives how many there are.
pub(super) fn add(
    run: &Path,
    model: Digest,
    keyword: &str,
    prototype: Vec<f32>,
) -> Result<usize, Error> {
    // Nobody else's keyword is lost.
    let folder = File::open(run).map_err(Error::io(run))?;
    folder.lock().map_err(Error::io(run))?;
    let mut prototypes = read(run, &model, prototype.len())?;
    prototypes.insert(keyword.to_owned(), prototype);
    let count = prototypes.len();
    write_json(&place(run), &Record { model, prototypes })?;
    Ok(count)
}
