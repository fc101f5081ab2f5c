//! Features of clips, computed once and kept on disk.

use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use indicatif::ProgressBar;
use rayon::prelude::*;

use super::data::{Moments, moments};
use super::folder::entries;
use crate::audio::features::{Extractor, INPUT, INPUTS};
use crate::audio::synthesis::{Speaker, speak, vocabulary};
use crate::audio::wav::{read_clip, resample};
use crate::error::Error;
use crate::files::write_piecewise;
use crate::output::{complain, progress};

/// Counts up when a clip is read otherwise than before.
const CLIP_FORMAT: &[u8] = b"clip 3";
/// Bytes of a clip's features.
const WIDTH: usize = INPUTS * INPUT * size_of::<f32>();

/// Features of files: from the cache, if neither the files nor what is made of them has changed. A cache is named by the
/// content of the files, of which `digests` are, and by the features of a clip that is always the same, and ends with the digest of what is in it.
pub(super) fn cached(
    files: &[PathBuf],
    digests: &[blake3::Hash],
    cache: &Path,
    keep: bool,
) -> Result<Vec<Vec<f32>>, Error> {
    let extractor = Extractor::new();
    let mut hash = blake3::Hasher::new();
    hash.update(CLIP_FORMAT);
    hash.update(&to_bytes(&probe(&extractor)?));
    for digest in digests {
        hash.update(digest.as_bytes());
    }
    let name = cache.join(format!("{}.features", hash.finalize().to_hex()));
    if let Some(features) = read_cache(&name, files.len()) {
        return Ok(features);
    }
    let bar = progress(files.len() as u64);
    bar.set_message("clips");
    let features: Result<Vec<_>, _> = files
        .par_iter()
        .map(|file| extract(&extractor, file, &bar))
        .collect();
    let features = features?;
    bar.finish_and_clear();
    if keep && let Err(error) = write_cache(&name, cache, &features) {
        complain(format_args!(
            "{error}: the features will be computed again next time"
        ));
    }
    Ok(features)
}

/// Features of a file, which takes the bar one step on.
pub(super) fn extract(
    extractor: &Extractor,
    path: &Path,
    bar: &ProgressBar,
) -> Result<Vec<f32>, Error> {
    bar.inc(1);
    let features = extractor.extract(&read_clip(path)?);
    match features.iter().all(|value| value.is_finite()) {
        true => Ok(features),
        false => Err(Error::Content {
            path: path.into(),
            reason: "its samples are too large for a spectrum".into(),
        }),
    }
}

/// Of the content of each file.
pub(super) fn digests(files: &[PathBuf]) -> Result<Vec<blake3::Hash>, Error> {
    let digest = |path: &PathBuf| {
        let mut hash = blake3::Hasher::new();
        let file = File::open(path).map_err(Error::io(path))?;
        hash.update_reader(file).map_err(Error::io(path))?;
        Ok(hash.finalize())
    };
    files.par_iter().map(digest).collect()
}

/// Clip by clip, as all of a large folder's are gigabytes.
fn read_cache(name: &Path, clips: usize) -> Option<Vec<Vec<f32>>> {
    let mut file = BufReader::new(File::open(name).ok()?);
    let mut hash = blake3::Hasher::new();
    let mut bytes = vec![0; WIDTH];
    let mut features = Vec::with_capacity(clips);
    for _ in 0..clips {
        file.read_exact(&mut bytes).ok()?;
        hash.update(&bytes);
        let value = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        features.push(bytes.chunks_exact(4).map(value).collect());
    }
    let mut digest = Vec::new();
    file.read_to_end(&mut digest).ok()?;
    (digest == hash.finalize().as_bytes()).then_some(features)
}

/// Removes the features that are cached in a folder, and nothing else that someone may have there.
pub(super) fn clear_cache(cache: &Path) {
    let is_cache = |path: &PathBuf| {
        let digest = path.file_stem().unwrap_or_default().to_string_lossy();
        let hex = digest.chars().all(|c| c.is_ascii_hexdigit());
        path.extension().is_some_and(|e| e == "features") && digest.len() == 64 && hex
    };
    for old in entries(cache)
        .unwrap_or_default()
        .iter()
        .filter(|path| is_cache(path))
    {
        let _ = fs::remove_file(old);
    }
}

/// In place of what else is cached there.
fn write_cache(name: &Path, cache: &Path, features: &[Vec<f32>]) -> Result<(), Error> {
    fs::create_dir_all(cache).map_err(Error::io(cache))?;
    clear_cache(cache);
    write_piecewise(name, |file| {
        let mut hash = blake3::Hasher::new();
        for clip in features {
            let bytes = to_bytes(clip);
            hash.update(&bytes);
            file.write_all(&bytes)?;
        }
        file.write_all(hash.finalize().as_bytes())
    })
}

/// The features of a clip that is always the same: they change with whatever computes features.
fn probe(extractor: &Extractor) -> Result<Vec<f32>, Error> {
    let clip = speak(0, &vocabulary(0, 1)[0], &Speaker::new(0, 0), 0);
    let clip = resample(clip, 22_050).map_err(Error::Usage)?;
    Ok(extractor.extract(&clip))
}

/// Of the features of that clip.
pub(super) fn probe_moments() -> Result<Moments, Error> {
    let probe = probe(&Extractor::new())?;
    Ok(moments(std::iter::once(&probe)))
}

fn to_bytes(values: &[f32]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size_of_val(values));
    bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    bytes
}

#[cfg(test)]
mod tests {
    use hound::{SampleFormat, WavSpec, WavWriter};

    use super::*;

    /// A file of two samples.
    fn write_wav(path: &Path, first: i16) {
        let spec = WavSpec {
            channels: 1,
            sample_rate: 16_000,
            bits_per_sample: 16,
            sample_format: SampleFormat::Int,
        };
        let mut writer = WavWriter::create(path, spec).expect("the folder is writable");
        for sample in [first, 100] {
            writer.write_sample(sample).expect("the folder is writable");
        }
        writer.finalize().expect("the folder is writable");
    }

    #[test]
    fn a_cache_is_used_while_it_holds_what_its_files_give() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (file, cache) = (folder.path().join("a.wav"), folder.path().join("cache"));
        let features = || {
            let files = std::slice::from_ref(&file);
            let digests = digests(files).expect("it is there");
            cached(files, &digests, &cache, true).expect("a sound file")
        };
        let caches = || entries(&cache).expect("the cache was made");
        write_wav(&file, 1000);
        let first = features();
        let [name] = &caches()[..] else {
            panic!("one file, one cache")
        };
        // Other values with their digest are taken as they are: it is read.
        let other = vec![vec![0.5; INPUTS * INPUT]];
        let mut bytes = to_bytes(&other[0]);
        bytes.extend(blake3::hash(&bytes).as_bytes());
        fs::write(name, &bytes).expect("the folder is writable");
        assert_eq!(features(), other);
        // Without their digest they are not.
        bytes[0] ^= 1;
        fs::write(name, &bytes).expect("the folder is writable");
        assert_eq!(features(), first);
        write_wav(&file, 2000);
        assert_ne!(features(), first);
        assert_eq!(
            caches().len(),
            1,
            "the new one has taken the old one's place"
        );
        assert_ne!(caches()[0], *name);
    }

    #[test]
    fn only_caches_are_cleared() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let digest = "0a".repeat(32);
        for name in ["notes.txt", "notes.features", &format!("{digest}.features")] {
            fs::write(folder.path().join(name), "").expect("the folder is writable");
        }
        clear_cache(folder.path());
        let left = entries(folder.path()).expect("the folder is readable");
        let names: Vec<_> = left.iter().map(|path| path.file_name()).collect();
        assert_eq!(
            names,
            [Some("notes.features".as_ref()), Some("notes.txt".as_ref())]
        );
    }
}
