//! What Burn's kernels on a CPU call to round f32 to bf16, where the core has no instruction for it: a function that libgcc has since
//! version 13. Code that is compiled while the program runs finds it among the symbols that a program exports; `build.rs` has the
//! linker export this one. The kernels of this library do without it, as the program's own tests show, which does not have it.

/// The nearest bf16, in the lower half of the register that a bf16 is returned in.
#[cfg(target_os = "linux")]
#[unsafe(no_mangle)]
extern "C" fn __truncsfbf2(value: f32) -> f32 {
    f32::from_bits(u32::from(half::bf16::from_f32(value).to_bits()))
}
