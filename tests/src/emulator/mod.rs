//! NVIDIA GPUs' kernels without a GPU: the PTX that is compiled for them, executed as the PTX ISA describes it.
//!
//! Units run one after the other until they have to wait for each other. What a GPU leaves open is decided against the kernel:
//! asynchronous copies land when they are waited for and no earlier, and fresh memory holds NaNs. Beside wrong results, a launch fails
//! if it reads or writes outside of a buffer, if units of a cube touch the same shared memory without a barrier between them, or if
//! cubes touch the same global memory, one of them to write.

mod arithmetic;
mod collective;
mod cube;
mod memory;
mod parse;

pub use memory::{Buffer, Global};
pub use parse::Program;

/// A grid of cubes of a kernel, whose buffers are those that `global` has bound.
///
/// # Errors
/// What the kernel did that it must not, and where.
pub fn launch(
    program: &Program,
    count: [u32; 3],
    units: [u32; 3],
    shared: usize,
    global: &mut Global,
) -> Result<(), String> {
    for z in 0..count[2] {
        for y in 0..count[1] {
            for x in 0..count[0] {
                global.begin_cube();
                cube::Cube::new(program, [x, y, z], count, units, shared, global)
                    .run()
                    .map_err(|reason| format!("cube {:?}: {reason}", [x, y, z]))?;
            }
        }
    }
    Ok(())
}
