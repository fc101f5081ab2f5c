//! Where the machine sets a limit: one line, and nothing half-written is left.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use tempfile::TempDir;

use crate::files::{floats, labels, write};
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

/// Two rows of one column, for `prototypes` of any number of classes, in a folder of their own.
struct Input {
    folder: TempDir,
    file: String,
    out: PathBuf,
}

impl Input {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let [file, out] = ["in", "out"].map(|name| folder.path().join(name));
        write(&file, &[floats("embeddings", &[1, 2, 1]), labels(&[0, 1])]);
        let file = file.to_string_lossy().into_owned();
        Self { folder, file, out }
    }

    fn arguments<'a>(&'a self, out: &'a str, classes: &'a str) -> [&'a str; 8] {
        let device = "cpu";
        [
            "prototypes",
            &self.file,
            "--out",
            out,
            "--classes",
            classes,
            "--device",
            device,
        ]
    }

    /// One line under a limit of the shell's, exit code 2, and nothing left.
    fn refused(&self, classes: &str, limit: &str) -> String {
        let out = self.out.to_string_lossy();
        let output = limited(limit, &self.arguments(&out, classes));
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert_eq!(stderr.trim_end().lines().count(), 1, "{stderr}");
        assert!(!self.out.exists() && unfinished(self.folder.path()).is_empty());
        stderr
    }
}

#[test]
fn memory_that_is_not_there_is_told_in_one_line() {
    // What the machine has not, and what the process may not have.
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    // Some for the stacks of every core's thread.
    let most = format!("-v {}", 2_500_000 + 20_000 * cores);
    for (classes, limit) in [("4294967295", "-c 0"), ("200000000", &most)] {
        let stderr = Input::new().refused(classes, limit);
        let told = ["memory", "the machine has", "that fit"];
        assert!(told.iter().any(|told| stderr.contains(told)), "{stderr}");
    }
}

#[test]
fn a_file_that_passes_the_limit_is_told_and_not_left() {
    let stderr = Input::new().refused("1000", "-f 1");
    let told = "out: cannot be written: File too large";
    assert!(stderr.contains(told), "{stderr}");
}

#[test]
fn a_program_that_is_stopped_while_it_writes_leaves_nothing() {
    let input = Input::new();
    let (folder, out) = (input.folder.path(), &input.out);
    let stopped = |signal: &str| {
        let _ = fs::remove_file(out);
        let mut program = Command::new(env!("CARGO_BIN_EXE_protohead"));
        // 240 MB.
        program.args(input.arguments(&out.to_string_lossy(), "20000000"));
        // Under nohup, or in a script's background, some are ignored, and the program would leave them so.
        let heeded = || {
            for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
                // SAFETY: `signal` may be called between fork and exec.
                unsafe { libc::signal(signal, libc::SIG_DFL) };
            }
            Ok(())
        };
        // SAFETY: as above.
        unsafe { program.pre_exec(heeded) };
        let mut program = program.spawn().expect("the program starts");
        while !unfinished(folder).iter().any(|&(_, size)| size > 0) {
            if program.try_wait().expect("it runs").is_some() {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let id = program.id().to_string();
        let sent = Command::new("kill").args([signal, &id]).status();
        assert!(sent.expect("there is kill").success());
        let ended = program.wait().expect("it ends");
        assert!(unfinished(folder).is_empty(), "{signal}: something is left");
        assert!(!ended.success() || out.exists(), "{signal}");
        // Not too late.
        !out.exists()
    };
    for signal in ["-TERM", "-INT", "-HUP"] {
        assert!(
            (0..5).any(|_| stopped(signal)),
            "{signal} came too late five times"
        );
    }
}

#[test]
fn a_name_that_is_too_long_is_refused_before_the_work() {
    let input = Input::new();
    let out = input.folder.path().join("a".repeat(300));
    let name = out.to_string_lossy();
    let mut arguments = input.arguments(&name, "2");
    arguments[7] = "abacus";
    refused(&arguments, &out, "abacus");
    arguments[7] = "cuda:999";
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
