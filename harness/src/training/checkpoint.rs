//! What a run needs to go on: model, optimizer and metrics of the last whole epoch, and a digest that says that they belong
//! together.

use std::fs;
use std::path::Path;

use burn::module::Module;
use burn::optim::ModuleOptimizer;
use burn::store::ModuleRecord;
use burn::tensor::Bytes;

use super::json::{read_json, write_json};
use super::metrics::{EpochMetrics, write_lines};
use super::network::Network;
use super::record;
use crate::error::Error;
use crate::files::{Digest, write_atomically};

const MODEL: &str = "model.bpk";
const OPTIMIZER: &str = "optimizer.bpk";
const METRICS: &str = "metrics.jsonl";
const DIGEST: &str = "digest.json";

/// A checkpoint, read.
pub(super) struct Checkpoint {
    pub model: ModuleRecord,
    pub optimizer: Bytes,
    pub metrics: Vec<EpochMetrics>,
}

/// What the files of a checkpoint are together.
fn digest(files: &[Vec<u8>; 3]) -> Digest {
    Digest::of(&files.each_ref().map(Vec::as_slice))
}

/// Removes the checkpoint before the last, which a run that was killed may have left.
pub(super) fn clear_old(run: &Path) {
    if run.join("checkpoint").exists() {
        let _ = fs::remove_dir_all(run.join("checkpoint.old"));
    }
}

fn files(folder: &Path) -> Result<[Vec<u8>; 3], Error> {
    let read = |name| {
        let path = folder.join(name);
        fs::read(&path).map_err(Error::io(&path))
    };
    Ok([read(MODEL)?, read(OPTIMIZER)?, read(METRICS)?])
}

/// Writes a new folder, of what is to come to `place`.
fn write(
    folder: &Path,
    place: &Path,
    network: &Network,
    optimizer: &ModuleOptimizer,
    metrics: &[EpochMetrics],
) -> Result<(), Error> {
    fs::create_dir(folder).map_err(Error::io(folder))?;
    // `valid` folds the pending running statistics in: without it the record is one step behind.
    let (model, places) =
        record::model(network.valid().into_record()).map_err(Error::unwritable(place))?;
    let state = record::optimizer(optimizer, &places).map_err(Error::unwritable(place))?;
    write_atomically(&folder.join(MODEL), &model)?;
    write_atomically(&folder.join(OPTIMIZER), &state)?;
    write_lines(&folder.join(METRICS), metrics)?;
    write_json(&folder.join(DIGEST), &digest(&files(folder)?))
}

impl Checkpoint {
    /// Writes a run's checkpoint, whole or not at all: it is a folder made beside its place.
    pub(super) fn save(
        run: &Path,
        network: &Network,
        optimizer: &ModuleOptimizer,
        metrics: &[EpochMetrics],
    ) -> Result<(), Error> {
        let [place, beside, old] =
            ["checkpoint", "checkpoint.new", "checkpoint.old"].map(|name| run.join(name));
        let _ = fs::remove_dir_all(&beside);
        if let Err(error) = write(&beside, &place, network, optimizer, metrics) {
            // The disk may be full.
            let _ = fs::remove_dir_all(&beside);
            return Err(error);
        }
        if place.exists() {
            let _ = fs::remove_dir_all(&old);
            fs::rename(&place, &old).map_err(Error::io(&place))?;
        }
        fs::rename(&beside, &place).map_err(Error::io(&place))?;
        let _ = fs::remove_dir_all(&old);
        Ok(())
    }

    /// A run's last checkpoint, if there is one; if the run was killed between two renames, the one before.
    pub(super) fn load(run: &Path) -> Result<Option<Self>, Error> {
        let place = ["checkpoint", "checkpoint.old"]
            .map(|name| run.join(name))
            .into_iter()
            .find(|path| path.exists());
        let Some(place) = place else { return Ok(None) };
        let read = files(&place)?;
        if digest(&read) != read_json(&place.join(DIGEST))? {
            let reason = "its files do not belong together";
            return Err(Error::damaged(&place)(reason));
        }
        let [model, optimizer, metrics] = read;
        let metrics: Result<Vec<EpochMetrics>, _> = String::from_utf8_lossy(&metrics)
            .lines()
            .map(serde_json::from_str)
            .collect();
        Ok(Some(Self {
            model: ModuleRecord::from_bytes(Bytes::from_bytes_vec(model))
                .map_err(Error::damaged(&place.join(MODEL)))?,
            optimizer: Bytes::from_bytes_vec(optimizer),
            metrics: metrics.map_err(Error::damaged(&place.join(METRICS)))?,
        }))
    }
}
