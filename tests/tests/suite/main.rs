//! The equivalence suite: every op, on every device this build and machine can reach, in every variant it runs,
//! against the reference. `PROPTEST_CASES` raises the number of random problems. A failure prints the smallest that it found as
//! `PROTOHEAD_PROBLEM='…'`: with that before its command, `cargo test` tries this problem alone.

mod burn_tensors;
mod class_means;
mod cosine_cross_entropy;
mod cosine_logits;
mod cross_entropy;
mod equal;
mod faults;
mod goldens;
mod libgcc;
mod metamorphic;
mod nvidia;
mod reconstruction;
mod support;
mod tf32;
mod threads;
mod transfer;
