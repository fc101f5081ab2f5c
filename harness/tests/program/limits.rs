//! Where the machine sets a limit: one line, and nothing half-written is left.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use crate::files::{Tensor, floats, labels, write};
use crate::{protohead, refused};

/// The program with a limit of the shell's.
fn limited(limit: &str, arguments: &[&str]) -> Output {
    Command::new("sh")
        // The least that CubeCL gives the thread of a core.
        .env("CUBECL_CPU_STACK_MB", "16")
        .args(["-c", &format!("ulimit {limit}; exec \"$@\""), "sh"])
        .arg(env!("CARGO_BIN_EXE_protohead"))
        .args(arguments)
        .output()
        .expect("there is a shell")
}

/// Files that are being written in a folder, with what they hold so far.
fn unfinished(folder: &Path) -> Vec<(PathBuf, u64)> {
    let entries = fs::read_dir(folder).expect("the folder is readable");
    entries
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let size = path.metadata().ok()?.len();
            path.to_string_lossy()
                .contains(".protohead-")
                .then_some((path, size))
        })
        .collect()
}

fn one_column(classes: &str) -> (Vec<Tensor<'static>>, [&str; 4]) {
    let tensors = vec![floats("embeddings", &[1, 2, 1]), labels(&[0, 1])];
    (tensors, ["--classes", classes, "--device", "cpu"])
}

#[test]
fn memory_that_is_not_there_is_told_in_one_line() {
    // What the machine has not, and what the process may not have.
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    // Some for the stacks of every core's thread.
    let most = format!("-v {}", 2_500_000 + 20_000 * cores);
    for (classes, limit) in [("4294967295", "-c 0"), ("200000000", &most)] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let [input, out] = ["in", "out"].map(|name| folder.path().join(name));
        let (tensors, options) = one_column(classes);
        write(&input, &tensors);
        let [input, out_name] = [&input, &out].map(|p| p.to_string_lossy().into_owned());
        let arguments = ["prototypes", &input, "--out", &out_name];
        let output = limited(limit, &[&arguments[..], &options].concat());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert_eq!(stderr.trim_end().lines().count(), 1, "{stderr}");
        let told = ["memory", "the machine has", "that fit"];
        assert!(told.iter().any(|told| stderr.contains(told)), "{stderr}");
        assert!(!out.exists() && unfinished(folder.path()).is_empty());
    }
}

#[test]
fn a_file_that_passes_the_limit_is_told_and_not_left() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let [input, out] = ["in", "out"].map(|name| folder.path().join(name));
    let (tensors, options) = one_column("1000");
    write(&input, &tensors);
    let [input, out_name] = [&input, &out].map(|p| p.to_string_lossy().into_owned());
    let arguments = ["prototypes", &input, "--out", &out_name];
    let output = limited("-f 1", &[&arguments[..], &options].concat());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(
        stderr.contains("out: cannot be written: File too large"),
        "{stderr}"
    );
    assert!(!out.exists() && unfinished(folder.path()).is_empty());
}

#[test]
fn a_program_that_is_stopped_while_it_writes_leaves_nothing() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let [input, out] = ["in", "out"].map(|name| folder.path().join(name));
    // 240 MB.
    let (tensors, options) = one_column("20000000");
    write(&input, &tensors);
    let stopped = |signal: &str| {
        let _ = fs::remove_file(&out);
        let mut program = Command::new(env!("CARGO_BIN_EXE_protohead"))
            .arg("prototypes")
            .arg(&input)
            .arg("--out")
            .arg(&out)
            .args(options)
            .spawn()
            .expect("the program starts");
        while !unfinished(folder.path()).iter().any(|&(_, size)| size > 0) {
            if program.try_wait().expect("it runs").is_some() {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let id = program.id().to_string();
        let sent = Command::new("kill").args([signal, &id]).status();
        assert!(sent.expect("there is kill").success());
        let ended = program.wait().expect("it ends");
        assert!(
            unfinished(folder.path()).is_empty(),
            "{signal}: something is left"
        );
        assert!(!ended.success() || out.exists(), "{signal}");
        // Not too late.
        !out.exists()
    };
    for signal in ["-TERM", "-INT"] {
        assert!(
            (0..5).any(|_| stopped(signal)),
            "{signal} came too late five times"
        );
    }
}

#[test]
fn a_name_that_is_too_long_is_refused_before_the_work() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let input = folder.path().join("in");
    write(&input, &one_column("2").0);
    let out = folder.path().join("a".repeat(300));
    let [input, out_name] = [&input, &out].map(|p| p.to_string_lossy().into_owned());
    let arguments = [
        "prototypes",
        &input,
        "--out",
        &out_name,
        "--device",
        "abacus",
    ];
    refused(&arguments, &out, "abacus");
    let arguments = [
        "prototypes",
        &input,
        "--out",
        &out_name,
        "--device",
        "cuda:999",
    ];
    refused(&arguments, &out, "cannot be written: File name too long");
}

#[test]
fn a_misspelt_command_is_guessed() {
    let output = protohead(&["trian"]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert_eq!(stderr.trim_end().lines().count(), 1, "{stderr}");
    assert!(stderr.contains("'train'"), "{stderr}");
}
