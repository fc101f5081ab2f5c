//! Lines on standard output, which whoever reads it may close, and progress beside them.

use std::fmt::Display;
use std::io::{ErrorKind, Write, stdout};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// Prints a line. Nobody listening is no mistake: results are in files, too.
pub(crate) fn say(line: impl Display) {
    if let Err(error) = writeln!(stdout().lock(), "{line}")
        && error.kind() != ErrorKind::BrokenPipe
    {
        eprintln!("protohead: standard output: {error}");
    }
}

/// A bar on stderr, if that is a terminal.
pub(crate) fn progress(steps: u64) -> ProgressBar {
    let bar = ProgressBar::new(steps);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} eta {eta}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(500));
    bar
}
