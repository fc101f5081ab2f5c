//! Standard output, which whoever reads it may close.

use std::fmt::Display;
use std::io::{ErrorKind, Write, stdout};

/// Prints a line. Nobody listening is no mistake: results are in files, too.
pub(crate) fn say(line: impl Display) {
    if let Err(error) = writeln!(stdout().lock(), "{line}")
        && error.kind() != ErrorKind::BrokenPipe
    {
        eprintln!("protohead: standard output: {error}");
    }
}
