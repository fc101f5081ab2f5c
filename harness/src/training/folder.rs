//! A Speech-Commands folder: `DIR/<keyword>/*.wav`, and lists of the clips that are not trained on.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::Error;

/// What is in a folder, by name.
pub(super) fn entries(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
        found.push(entry.map_err(Error::io(folder))?.path());
    }
    found.sort();
    Ok(found)
}

/// The WAV files in a folder, by name.
pub(super) fn wavs(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let is_wav = |path: &PathBuf| {
        let hidden = path.file_name().is_some_and(|name| {
            // Such as the attributes that macOS leaves beside files.
            name.to_string_lossy().starts_with('.')
        });
        let named = path
            .extension()
            .is_some_and(|e| e.eq_ignore_ascii_case("wav"));
        named && !hidden && path.is_file()
    };
    Ok(entries(folder)?.into_iter().filter(is_wav).collect())
}

/// The folders with WAV files; names with a leading underscore (background noise) are no keywords.
pub(super) fn keywords(root: &Path) -> Result<Vec<String>, Error> {
    let mut found = Vec::new();
    for path in entries(root)? {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if path.is_dir() && !name.starts_with(['_', '.']) && !wavs(&path)?.is_empty() {
            found.push(name);
        }
    }
    Ok(found)
}

/// The clips that a list names, as `<keyword>/<file>`; none if there is no list. Clips of what is no keyword may be among them.
pub(super) fn list(root: &Path, name: &str, keywords: &[String]) -> Result<HashSet<String>, Error> {
    let path = root.join(name);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(HashSet::new()),
        Err(error) => return Err(Error::io(&path)(error)),
    };
    let lines = text
        .lines()
        .map(|line| line.trim().trim_start_matches("./").to_owned());
    let clips: HashSet<String> = lines.filter(|line| !line.is_empty()).collect();
    let is_missing = |clip: &&String| {
        let keyword = clip.split('/').next().unwrap_or_default();
        keywords.iter().any(|known| known == keyword) && !root.join(clip).is_file()
    };
    // The first by name: a set has no order.
    match clips.iter().filter(is_missing).min() {
        Some(clip) => Err(Error::Content {
            path,
            reason: format!("names {clip}, and there is no such file"),
        }),
        None => Ok(clips),
    }
}
