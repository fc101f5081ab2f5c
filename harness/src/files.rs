//! Files that are written whole or not at all: beside their place, then renamed; and their digests.

use std::fs;
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// Writes `bytes` to a temporary file in the same folder, then renames it to `path`, which is a new file or takes the place of
/// one: never of a device or a pipe. Its permissions are those of any new file.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    write_piecewise(path, |file| file.write_all(bytes))
}

/// [`write_atomically`] of what `write` writes.
pub(crate) fn write_piecewise(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(), Error> {
    let failed = |error: io::Error| Error::unwritable(path)(cause(&error));
    let place = place(path)?;
    let mut unfinished = unfinished(path, &place)?;
    let mut buffered = BufWriter::new(&mut unfinished.file);
    write(&mut buffered).map_err(failed)?;
    buffered.flush().map_err(failed)?;
    drop(buffered);
    let file = unfinished.file;
    file.as_file().sync_all().map_err(failed)?;
    file.persist(&place).map_err(|error| failed(error.error))?;
    Ok(())
}

/// The files that are being written.
static BEING_WRITTEN: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// A file that is being written, gone when it is dropped.
struct Unfinished {
    // First, so that it is gone before its mark.
    file: tempfile::NamedTempFile,
    _mark: Mark,
}

/// While it lives, a file is among those that are being written.
struct Mark(PathBuf);

impl Drop for Mark {
    fn drop(&mut self) {
        if let Ok(mut files) = BEING_WRITTEN.lock() {
            files.retain(|path| *path != self.0);
        }
    }
}

/// Removes what is half-written, where memory runs out and nothing is dropped.
pub(crate) fn remove_unfinished() {
    // This thread may hold it.
    if let Ok(files) = BEING_WRITTEN.try_lock() {
        remove(&files);
    }
}

/// The same, for as long as the result is held: no other file is begun.
pub(crate) fn remove_unfinished_for_good() -> impl Sized {
    let files = BEING_WRITTEN.lock();
    if let Ok(files) = &files {
        remove(files);
    }
    files
}

fn remove(files: &[PathBuf]) {
    for path in files {
        let _ = fs::remove_file(path);
    }
}

/// Of an error, what the system said: with the name of a temporary file, it would name one that the user has never heard of.
fn cause(error: &io::Error) -> String {
    let text = error.to_string();
    let end = text.find(" at path ").unwrap_or(text.len());
    text[..end].to_owned()
}

/// Says whether a file could be written to `path`, before anything is done for it.
pub(crate) fn writable(path: &Path) -> Result<(), Error> {
    unfinished(path, &place(path)?)?;
    Ok(())
}

/// Where what is written to `path` goes: a link leads to its file.
fn place(path: &Path) -> Result<PathBuf, Error> {
    let unwritable = Error::unwritable(path);
    if path.as_os_str().as_encoded_bytes().ends_with(b"/") || path.file_name().is_none() {
        return Err(unwritable("it names a folder".into()));
    }
    if let Err(error) = fs::symlink_metadata(path)
        && error.kind() == ErrorKind::InvalidFilename
    {
        return Err(unwritable(cause(&error)));
    }
    let place = match path.is_symlink() {
        true => match fs::canonicalize(path) {
            Ok(place) => place,
            Err(error) => return Err(unwritable(format!("a link to no file: {error}"))),
        },
        false => path.into(),
    };
    match place.exists() && !place.is_file() {
        true => Err(unwritable("it is there, and no file".into())),
        false => Ok(place),
    }
}

/// What the names of files begin with that are being written.
const UNFINISHED: &str = ".protohead-";

/// Whether a file was being written.
pub(crate) fn is_unfinished(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().starts_with(UNFINISHED)
}

/// A file in the folder of `place`.
fn unfinished(path: &Path, place: &Path) -> Result<Unfinished, Error> {
    let folder = match place.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let is_folder = fs::metadata(folder).map(|folder| folder.is_dir());
    if !is_folder.map_err(|error| Error::unwritable(path)(of_folder(folder, &error)))? {
        let reason = format!("{} is no folder", folder.display());
        return Err(Error::unwritable(path)(reason));
    }
    let mut builder = tempfile::Builder::new();
    builder.prefix(UNFINISHED);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    // Not between the file and its mark.
    let mut files = BEING_WRITTEN.lock().map_err(Error::unwritable(path))?;
    let file = builder.tempfile_in(folder);
    let file = file.map_err(|error| Error::unwritable(path)(cause(&error)))?;
    files.push(file.path().into());
    let _mark = Mark(file.path().into());
    Ok(Unfinished { file, _mark })
}

fn of_folder(folder: &Path, error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::NotFound => format!("there is no folder {}", folder.display()),
        _ => error.to_string(),
    }
}

/// The digest of some files, in a file of its own beside them.
#[derive(PartialEq, Serialize, Deserialize)]
pub(crate) struct Digest {
    blake3: String,
}

impl Digest {
    pub(crate) fn of(files: &[&[u8]]) -> Self {
        let mut hash = blake3::Hasher::new();
        for file in files {
            hash.update(&(file.len() as u64).to_le_bytes());
            hash.update(file);
        }
        Self {
            blake3: hash.finalize().to_hex().to_string(),
        }
    }
}
