//! A run's folder, taken for one process.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use super::cache::{clear_cache, probe_moments};
use super::checkpoint::clear_old;
use super::config::RunConfig;
use super::data::Dataset;
use super::folder::entries;
use super::json::{read_json, write_json};
use super::run::{Data, Run, VERSION};
use crate::error::Error;
use crate::files::{is_unfinished, writable};

/// A run's folder that no other process trains in. What was made for it goes away again with the claim, if no run begins.
pub(crate) struct Claim {
    folder: PathBuf,
    lock: File,
    /// The folders that were made, from the run's own outwards.
    made: Vec<PathBuf>,
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.made.first() == Some(&self.folder) {
            // What was made, and the folders if nothing else has come into them.
            let cache = self.folder.join("cache");
            clear_cache(&cache);
            let _ = fs::remove_dir(cache);
            for name in ["config.json", "data.json"] {
                let _ = fs::remove_file(self.folder.join(name));
            }
        }
        for folder in &self.made {
            let _ = fs::remove_dir(folder);
        }
    }
}

/// What a run leaves once it has come so far that it goes on.
const BEGUN: [&str; 7] = [
    "accuracy.json",
    "checkpoint",
    "checkpoint.old",
    "metrics.jsonl",
    "model.bpk",
    "model.json",
    "prototypes.safetensors",
];
/// What else it writes, after its configuration.
const WRITTEN: [&str; 4] = ["checkpoint.new", "curves.svg", "data.json", "enrolled.json"];

fn has_begun(folder: &Path) -> bool {
    BEGUN.iter().any(|name| folder.join(name).exists())
}

/// Removes what a run that was killed has left half-written.
fn clear_unfinished(run: &Path) {
    for folder in [run, &run.join("cache")] {
        for path in entries(folder).unwrap_or_default() {
            if is_unfinished(&path) {
                let _ = fs::remove_file(path);
            }
        }
    }
}

impl Claim {
    /// Takes a folder for a run of this configuration, to begin there or to go on. Done before the clips are prepared.
    pub(crate) fn new(folder: &Path, config: &RunConfig, resume: bool) -> Result<Self, Error> {
        let content = |reason: &str| Error::Content {
            path: folder.into(),
            reason: reason.into(),
        };
        if fs::symlink_metadata(folder).is_ok() && !folder.is_dir() {
            return Err(content("it is there, and no folder"));
        }
        let missing = |path: &&Path| !path.as_os_str().is_empty() && !path.exists();
        let made: Vec<PathBuf> = folder
            .ancestors()
            .take_while(missing)
            .map(Path::to_path_buf)
            .collect();
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let lock = File::open(folder).map_err(Error::io(folder))?;
        if let Err(TryLockError::WouldBlock) = lock.try_lock() {
            return Err(content("another process trains in it"));
        }
        let claim = Self {
            folder: folder.into(),
            lock,
            made,
        };
        let begun = has_begun(folder);
        if folder.join("config.json").exists() {
            // Another's is refused as damaged, and left as it is.
            let found = Run::config(folder)?;
            if begun && !resume {
                return Err(content("holds a run already; --resume continues it"));
            }
            if resume && let Some(difference) = config.difference(&found) {
                return Err(content(&difference));
            }
        } else if let Some(name) =
            (BEGUN.iter().chain(&WRITTEN)).find(|name| folder.join(name).exists())
        {
            // Somebody else's, perhaps.
            return Err(content(&format!(
                "holds {name}, but no config.json of a run"
            )));
        }
        writable(&folder.join("config.json"))?;
        Ok(claim)
    }

    /// Refuses clips that are not those of the run that goes on, before anything is made of them.
    pub(crate) fn accept(&self, keywords: &[String], clips: Option<&str>) -> Result<(), Error> {
        if !has_begun(&self.folder) {
            return Ok(());
        }
        let begun = Data::read(&self.folder)?;
        begun.check_version(&self.folder)?;
        if begun.has_others(clips) || begun.keywords != keywords {
            return Err(Error::Content {
                path: self.folder.clone(),
                reason: "the clips are not those that the run began with".into(),
            });
        }
        Ok(())
    }

    /// Begins a run on clips that were [accepted](Self::accept), or goes on with it.
    pub(crate) fn begin(mut self, config: RunConfig, dataset: &mut Dataset) -> Result<Run, Error> {
        let mut data = Data {
            keywords: dataset.keywords.clone(),
            scaling: dataset.scaling,
            probe: probe_moments()?,
            version: VERSION,
            clips: dataset.clips.clone(),
        };
        let folder = &self.folder;
        let config_path = folder.join("config.json");
        if has_begun(folder) {
            let begun = Data::read(folder)?;
            // Another machine may round otherwise.
            data.scaling = begun.scaling;
            data.probe = begun.probe;
            dataset.scaling = begun.scaling;
            if begun != data {
                data.write(folder)?;
            }
            // The clips may have come to another place.
            if read_json::<RunConfig>(&config_path)? != config {
                write_json(&config_path, &config)?;
            }
        } else {
            write_json(&config_path, &config)?;
            data.write(folder)?;
        }
        clear_unfinished(folder);
        clear_old(folder);
        self.made.clear();
        let lock = self.lock.try_clone().map_err(Error::io(&self.folder))?;
        Ok(Run::locked(&self.folder, config, lock))
    }
}
