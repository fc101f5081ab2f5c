//! The program as its users see it: what it computes, and what it says of damaged input.

mod clips;
mod files;
#[cfg(unix)]
mod limits;
mod predict;
mod speech;
mod training;
mod values;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

fn protohead(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_protohead"))
        .args(arguments)
        .output()
        .expect("the program starts")
}

/// Exit code 2, one line on stderr that contains `says`, and no output.
fn refused(arguments: &[&str], out: &Path, says: &str) {
    let output = protohead(arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {stderr}");
    assert_eq!(
        stderr.trim_end().lines().count(),
        1,
        "{arguments:?}: {stderr}"
    );
    assert!(
        stderr.contains(says),
        "{arguments:?}: {stderr} does not say {says}"
    );
    assert!(!out.exists(), "{arguments:?} left {}", out.display());
    let folder = out.parent().expect("a file is in a folder");
    let left = fs::read_dir(folder)
        .expect("the folder is readable")
        .count();
    assert!(left <= 1, "{arguments:?} left something beside its input");
}
