//! A Speech-Commands folder: `DIR/<keyword>/*.wav`, and lists of the clips that are not trained on.

use std::collections::{BTreeSet, HashSet};
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
        // A link to nothing is a clip that is missing.
        let is_file = path.metadata().map_or(true, |found| found.is_file());
        named && !hidden && is_file
    };
    Ok(entries(folder)?.into_iter().filter(is_wav).collect())
}

/// Speech Commands' keywords in the order of the experiment that the three heads come from: the core words, which are its base
/// classes, then three per session.
const SPEECH_COMMANDS: [&str; 35] = [
    "five", "zero", "yes", "seven", "no", "nine", "down", "one", "go", "two", "stop", "six", "on",
    "left", "eight", "right", "off", "four", "three", "up", // the base classes
    "dog", "wow", "house", //
    "marvin", "bird", "happy", //
    "cat", "sheila", "bed", //
    "tree", "backward", "visual", //
    "follow", "learn", "forward",
];

/// Keywords in the order in which they become known: by name, but for those of Speech Commands.
fn ordered(mut keywords: Vec<String>) -> Vec<String> {
    keywords.sort_unstable();
    let place = |keyword: &str| SPEECH_COMMANDS.iter().position(|&known| known == keyword);
    if keywords.len() == SPEECH_COMMANDS.len()
        && keywords.iter().all(|keyword| place(keyword).is_some())
    {
        keywords.sort_by_key(|keyword| place(keyword));
    }
    keywords
}

/// The folders with WAV files, in the order in which they become known. Names with a leading underscore (background noise) are no
/// keywords, nor is what a file system keeps for itself.
pub(super) fn keywords(root: &Path) -> Result<Vec<String>, Error> {
    let mut found = Vec::new();
    for path in entries(root)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let is_own = name.starts_with(['_', '.']) || name == "lost+found";
        if path.is_dir() && !is_own && !wavs(&path)?.is_empty() {
            if path.file_name().and_then(|name| name.to_str()).is_none() {
                return Err(Error::Content {
                    path: path.clone(),
                    reason: "a keyword has a name in UTF-8".into(),
                });
            }
            found.push(name.into_owned());
        }
    }
    Ok(ordered(found))
}

/// The clips that a list names, as `<keyword>/<file>`; `None` if there is no list. Every one must be among the `clips` of a keyword, or
/// one with a misprint would be trained on: but for those of keywords that are not there at all, as in a part of the dataset. Those go to
/// `absent`.
pub(super) fn list(
    root: &Path,
    name: &str,
    keywords: &[String],
    clips: &HashSet<&str>,
    absent: &mut BTreeSet<String>,
) -> Result<Option<HashSet<String>>, Error> {
    let path = root.join(name);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(&path)(error)),
    };
    // Some editors put a mark before the first line.
    let lines = text.trim_start_matches('\u{feff}').lines().map(str::trim);
    let mut named = HashSet::new();
    for line in lines.filter(|line| !line.is_empty()) {
        let clip = line.trim_start_matches("./");
        let wrong = |reason: &str| Error::Content {
            path: path.clone(),
            reason: format!("names {line}, {reason}"),
        };
        let [keyword, file] = clip.split('/').collect::<Vec<_>>()[..] else {
            return Err(wrong("which is not <keyword>/<file>"));
        };
        if [keyword, file]
            .iter()
            .any(|name| ["", ".", ".."].contains(name))
        {
            return Err(wrong("which is not <keyword>/<file>"));
        }
        let is_known = keywords.iter().any(|known| known == keyword);
        if is_known && !clips.contains(clip) {
            return Err(wrong("and there is no such clip"));
        }
        if !is_known {
            absent.insert(keyword.to_owned());
        }
        named.insert(clip.to_owned());
    }
    Ok(Some(named))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speech_commands_begin_with_the_core_words_and_others_go_by_name() {
        let all: Vec<String> = SPEECH_COMMANDS.map(String::from).into();
        let mut by_name = all.clone();
        by_name.sort_unstable();
        by_name.dedup();
        assert_eq!(by_name.len(), 35);
        assert_eq!(ordered(by_name.clone()), all);
        let mut others = all;
        others[0] = "fife".into();
        let mut expected = others.clone();
        expected.sort_unstable();
        assert_eq!(ordered(others), expected);
        assert_eq!(ordered(by_name[3..].to_vec()), by_name[3..]);
    }
}
