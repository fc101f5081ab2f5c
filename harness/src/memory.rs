//! The allocator, which ends the program in one line where there is no more memory.

use std::alloc::{GlobalAlloc, Layout};
use std::io::{Write, stderr};

use mimalloc::MiMalloc;

use crate::MISTAKE;
use crate::files::remove_unfinished;

/// MiMalloc: training allocates and frees tensors of megabytes all the time, whose pages glibc gives back each time.
pub(crate) struct Allocator;

// SAFETY: every call is MiMalloc's; a null pointer, which it may return, does not come back.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are those that MiMalloc asks for.
        there(unsafe { MiMalloc.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        there(unsafe { MiMalloc.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as above.
        there(unsafe { MiMalloc.realloc(pointer, layout, size) }, size)
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { MiMalloc.dealloc(pointer, layout) }
    }
}

fn there(pointer: *mut u8, bytes: usize) -> *mut u8 {
    if pointer.is_null() {
        // Standard error has no buffer, and numbers are formatted on the stack.
        let _ = writeln!(
            stderr(),
            "protohead: out of memory: {bytes} bytes more are not there"
        );
        remove_unfinished();
        std::process::exit(MISTAKE.into());
    }
    pointer
}
