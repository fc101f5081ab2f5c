//! NVIDIA GPUs' kernels without a GPU: the PTX that is compiled for them, executed as the PTX ISA describes it.
//!
//! Units run one after the other until they have to wait for each other. What a GPU leaves open is decided against the kernel:
//! asynchronous copies land when they are waited for and no earlier, and fresh memory holds NaNs. Beside wrong results, a launch fails
//! if it reads or writes outside of a buffer, or reads what is being copied; and if units of a cube without a barrier between them, or
//! cubes, touch the same memory, one of them to write.

mod arithmetic;
mod collective;
mod cube;
mod instruction;
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A kernel of two buffers, which a unit has in `%rd1` and `%rd2`, with its number in `%r1` and four times that in `%rd3`.
    fn program(body: &str) -> Program {
        let text = format!(
            ".visible .entry k(\n .param .u64 .ptr .global .align 1 k_param_0,\n .param .u64 .ptr .global .align 1 k_param_1,\n .param .align 8 .b8 k_param_2[16]\n)\n{{\n\
             .reg .b32 %r<999>;\n.reg .b64 %rd<9>;\n.reg .pred %p<9>;\nld.param.b64 %rd1, [k_param_0];\nld.param.b64 %rd2, [k_param_1];\nmov.u32 %r1, %tid.x;\nmul.wide.u32 %rd3, %r1, 4;\n\
             {body}\nret;\n}}\n"
        );
        Program::of(&text).expect("known instructions")
    }

    fn run(body: &str, cubes: u32, units: u32) -> Result<Vec<u32>, String> {
        let input: Vec<u8> = (100..164u32).flat_map(u32::to_le_bytes).collect();
        let output = vec![0xff; 256];
        let buffer = |memory| Buffer {
            memory,
            start: 0,
            end: 256,
        };
        // By value: 1, 2, 3 and 4.
        let scalars: Vec<u8> = (1..5u32).flat_map(u32::to_le_bytes).collect();
        let by_value = Buffer {
            memory: 2,
            start: 0,
            end: 16,
        };
        let buffers = vec![buffer(0), buffer(1), by_value];
        let mut global = Global::new(vec![input, output, scalars], buffers);
        launch(
            &program(body),
            [cubes, 1, 1],
            [units, 1, 1],
            1024,
            &mut global,
        )?;
        let written = &global.into_memories()[1];
        let word = |four: &[u8]| u32::from_le_bytes([four[0], four[1], four[2], four[3]]);
        Ok(written.chunks(4).map(word).collect())
    }

    fn refused(body: &str, cubes: u32, units: u32, says: &str) {
        let error = run(body, cubes, units).expect_err(says);
        assert!(error.contains(says), "{error}: not {says}");
    }

    /// Of the unit beside it, whose element a unit takes from shared memory; `between` comes between the two.
    fn neighbours(between: &str) -> String {
        format!(
            "add.s64 %rd4, %rd1, %rd3;\nld.global.nc.b32 %r2, [%rd4];\nst.shared.b32 [%rd3], %r2;\n{between}\n\
             xor.b64 %rd5, %rd3, 4;\nld.shared.b32 %r3, [%rd5];\nadd.s64 %rd6, %rd2, %rd3;\nst.global.b32 [%rd6], %r3;"
        )
    }

    #[test]
    fn shared_memory_needs_a_barrier() {
        let swapped = |count: u32| (0..count).map(|unit| 100 + (unit ^ 1)).collect::<Vec<_>>();
        let found = run(&neighbours("bar.sync 0;"), 1, 64).expect("no race");
        assert_eq!(found, swapped(64));
        let found = run(&neighbours("bar.warp.sync -1;"), 1, 64).expect("no race");
        assert_eq!(found, swapped(64));
        refused(&neighbours(""), 1, 64, " what Access");
        // The other way round: written again after it was read.
        let again = "\nmov.b32 %r9, 1;\nst.shared.b32 [%rd3], %r9;";
        refused(&(neighbours("bar.sync 0;") + again), 1, 64, " what Access");
        // A barrier of a plane is none between planes.
        let far = neighbours("bar.warp.sync -1;").replace("%rd3, 4;\nld", "%rd3, 128;\nld");
        refused(&far, 1, 64, " what Access");
    }

    #[test]
    fn what_is_outside_of_a_buffer_is_not_touched() {
        let load = |at: &str| format!("ld.global.b32 %r2, [%rd1+{at}];");
        assert!(run(&load("252"), 1, 1).is_ok());
        refused(&load("256"), 1, 1, "4 bytes at 256 of buffer 0");
        refused(&load("-4"), 1, 1, "is in no buffer");
        refused(&load("2"), 1, 1, "not aligned");
        refused("st.global.b32 [%rd2+256], %r1;", 1, 1, "of buffer 1");
        refused("st.shared.b32 [cube_shared+1024], %r1;", 1, 1, "of 1024");
    }

    #[test]
    fn scalars_come_by_value() {
        let found = run(
            "ld.param.b32 %r2, [k_param_2+8];\nmov.b64 %rd4, k_param_2;\nld.param.v2.b32 {%r3, %r4}, [%rd4];\n\
             st.global.b32 [%rd2], %r2;\nst.global.b32 [%rd2+4], %r3;\nst.global.b32 [%rd2+8], %r4;",
            1,
            1,
        );
        assert_eq!(found.expect("known instructions")[..3], [3, 1, 2]);
        refused("ld.param.b32 %r2, [k_param_2+16];", 1, 1, "of buffer 2");
    }

    #[test]
    fn cubes_have_results_of_their_own() {
        let store = "mov.u32 %r2, %ctaid.x;\nmul.wide.u32 %rd4, %r2, 4;\nadd.s64 %rd4, %rd2, %rd4;\nst.global.b32 [%rd4], %r2;";
        let found = run(store, 3, 1).expect("no race");
        assert_eq!(found[..4], [0, 1, 2, u32::MAX]);
        refused("st.global.b32 [%rd2], %r1;", 2, 1, "writes what");
        let constant = "st.global.b32 [%rd2], %r1;\nld.global.nc.b32 %r2, [%rd2];";
        refused(constant, 1, 1, "as a constant");
        let constant = "ld.global.nc.b32 %r2, [%rd2];\nst.global.b32 [%rd2], %r1;";
        refused(constant, 1, 1, "as a constant");
    }

    #[test]
    fn copies_are_there_when_they_were_awaited() {
        let copied = |wait: &str| -> Result<[u32; 2], String> {
            let body = format!(
                "cp.async.cg.shared.global.L2::128B [cube_shared], [%rd1], 16;\ncp.async.commit_group;\n\
                 cp.async.cg.shared.global.L2::128B [cube_shared+16], [%rd1+16], 16;\ncp.async.commit_group;\n{wait}\n\
                 ld.shared.b32 %r2, [cube_shared+4];\nld.shared.b32 %r3, [cube_shared+20];\nst.global.v2.b32 [%rd2], {{%r2, %r3}};"
            );
            let found = run(&body, 1, 1)?;
            Ok([found[0], found[1]])
        };
        for early in ["", "cp.async.wait_group 1;"] {
            let error = copied(early).expect_err("one has not landed");
            assert!(error.contains("reads what is being copied"), "{error}");
        }
        assert_eq!(copied("cp.async.wait_group 0;"), Ok([101, 105]));
    }

    #[test]
    fn units_that_are_waited_for_have_to_come() {
        let some = |what: &str| format!("setp.lt.u32 %p1, %r1, 16;\n@%p1 {what}");
        refused(
            &(some("bar.warp.sync -1;") + "\nbar.sync 0;"),
            1,
            32,
            "do not come",
        );
        let halves = some(
            "bra $L1;\nactivemask.b32 %r5;\nbra.uni $L2;\n$L1:\nactivemask.b32 %r5;\n$L2:\n",
        ) + "shfl.sync.bfly.b32 %r3, %r1, 1, 31, %r5;\nadd.s64 %rd6, %rd2, %rd3;\nst.global.b32 [%rd6], %r5;";
        let found = run(&halves, 1, 32).expect("each half goes its way");
        assert_eq!((found[0], found[31]), (0xffff, 0xffff_0000));
        refused(
            "shfl.sync.bfly.b32 %r3, %r1, 16, 31, 65535;",
            1,
            16,
            "takes from 16",
        );
    }

    #[test]
    fn wgmma_reads_what_was_shown_to_it() {
        let registers: Vec<String> = (0..64).map(|d| format!("%r{}", 100 + d)).collect();
        let body = |show: &str| {
            format!(
                "mov.b32 %r2, 0;\nst.shared.b32 [%rd3], %r2;\nst.shared.b32 [%rd3+512], %r2;\n{show}\nbar.sync 0;\nmov.b64 %rd4, 0;\n\
                 wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {{{}}}, %rd4, %rd4, %p1, 1, 1, 0, 0;",
                registers.join(", ")
            )
        };
        assert!(run(&body("fence.proxy.async.shared::cta;"), 1, 128).is_ok());
        refused(&body(""), 1, 128, "has not shown");
    }

    #[test]
    fn what_is_not_known_is_refused() {
        let text = ".entry k(\n)\n{\n sin.approx.f32 %r1, %r2;\n}\n";
        let error = Program::of(text).err().expect("no kernel has it");
        assert!(error.contains("sin.approx.f32 %r1, %r2"), "{error}");
        for wrong in [
            "mov.u32 %r1, %laneid",
            "add.rz.f32 %r1, %r1, %r1",
            "bar.sync 1",
        ] {
            let text = format!(".entry k(\n)\n{{\n.reg .b32 %r<2>;\n{wrong};\n}}\n");
            assert!(Program::of(&text).is_err(), "{wrong}");
        }
    }

    /// Whoever reads last, a write is compared with all that may come before or after it.
    #[test]
    fn reads_by_several_are_not_forgotten() {
        let read = "ld.global.b32 %r2, [%rd2];\n";
        let second = "mov.u32 %r3, %ctaid.x;\nsetp.eq.b32 %p1, %r3, 1;\nsetp.eq.b32 %p2, %r1, 0;\nand.pred %p1, %p1, %p2;\n";
        let of_cubes = format!("{read}bar.sync 0;\n{second}@%p1 st.global.b32 [%rd2], %r1;");
        refused(&of_cubes, 2, 2, " what Access");
        let in_plane = "mov.b32 %r4, 32;\nsetp.eq.b32 %p1, %r1, %r4;\n";
        let of_planes = format!(
            "ld.shared.b32 %r2, [cube_shared];\nbar.warp.sync -1;\n{in_plane}@%p1 st.shared.b32 [cube_shared], %r1;"
        );
        refused(&of_planes, 1, 64, " what Access");
    }
}
