//! What ends the program from outside, and a limit that would.

use std::io;

/// Has SIGINT, SIGTERM and SIGHUP remove what is half-written before they end the program, and a file that passes a limit be an error of
/// the write.
#[cfg(unix)]
pub(crate) fn watch() -> io::Result<()> {
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
    use signal_hook::low_level::emulate_default_handler;

    use crate::files::remove_unfinished_for_good;

    let passed = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(SIGXFSZ, passed)?;
    // What is ignored stays so, as SIGINT is by what a shell runs in the background, and SIGHUP under nohup.
    let heeded = [SIGINT, SIGTERM, SIGHUP]
        .into_iter()
        .filter(|&signal| !is_ignored(signal));
    let mut signals = signal_hook::iterator::Signals::new(heeded)?;
    std::thread::Builder::new().spawn(move || {
        for signal in signals.forever() {
            let _held = remove_unfinished_for_good();
            let _ = emulate_default_handler(signal);
        }
    })?;
    Ok(())
}

#[cfg(unix)]
fn is_ignored(signal: i32) -> bool {
    let mut now = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: no new action is given, and zeros are a sigaction where none is written.
    unsafe {
        libc::sigaction(signal, std::ptr::null(), now.as_mut_ptr());
        now.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

#[cfg(not(unix))]
pub(crate) fn watch() -> io::Result<()> {
    Ok(())
}
