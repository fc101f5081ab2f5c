//! Lines on standard output and on standard error, and progress beside them.

use std::fmt::{self, Display};
use std::io::{self, ErrorKind, Write, stderr, stdout};
use std::sync::Mutex;
use std::time::Duration;

use indicatif::{HumanDuration, ProgressBar, ProgressState, ProgressStyle};

/// The first line on standard output that was lost, though somebody was there to read it.
static LOST: Mutex<Option<io::Error>> = Mutex::new(None);

/// Prints a line on standard output. Work goes on if it cannot: what was lost is [`lost`].
pub(crate) fn say(line: impl Display) {
    let written = writeln!(stdout().lock(), "{line}");
    // Nobody listening is no mistake.
    if let Err(error) = written
        && error.kind() != ErrorKind::BrokenPipe
        && let Ok(mut lost) = LOST.lock()
    {
        lost.get_or_insert(error);
    }
}

/// Why standard output lost a line, if it did.
pub(crate) fn lost() -> Option<io::Error> {
    LOST.lock().ok()?.take()
}

/// Prints a line on standard error, if it can.
pub(crate) fn tell(line: impl Display) {
    let _ = writeln!(stderr().lock(), "{line}");
}

/// Tells of a mistake or a failure, in one line and not without end, whatever a file or an argument has put into it.
pub(crate) fn complain(what: impl Display) {
    const MOST: usize = 1000;
    let mut line: String = what
        .to_string()
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(MOST + 1)
        .collect();
    if let Some((end, _)) = line.char_indices().nth(MOST) {
        line.truncate(end);
        line.push('…');
    }
    tell(format_args!("protohead: {line}"));
}

/// How long it takes yet, once that can be told.
fn left(state: &ProgressState, out: &mut dyn fmt::Write) {
    let _ = match state.pos() {
        0 => write!(out, "?"),
        _ => write!(out, "{:#}", HumanDuration(state.eta())),
    };
}

/// A bar on stderr, if that is a terminal.
pub(crate) fn progress(steps: u64) -> ProgressBar {
    let bar = ProgressBar::new(steps);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} eta {left}") {
        bar.set_style(style.with_key("left", left));
    }
    bar.enable_steady_tick(Duration::from_millis(500));
    bar
}
