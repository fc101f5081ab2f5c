//! Compiles every kernel for NVIDIA GPUs, with no GPU: a table in Markdown, or `--json` for the test that checks it.
//! Arguments: the architectures (80 90 100 if none).

use protohead_tests::proof::{ARCHITECTURES, rows, toolkit};

fn main() {
    let Some(toolkit) = toolkit() else {
        eprintln!(
            "kernels: no CUDA toolkit at CUDA_PATH; scripts/setup.sh --tests installs the parts that are needed"
        );
        std::process::exit(2);
    };
    // SAFETY: no other thread is there yet. The compiler looks for its device library there.
    unsafe { std::env::set_var("CUDA_PATH", &toolkit) };
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let named: Vec<u32> = arguments.iter().filter_map(|a| a.parse().ok()).collect();
    let rows = rows(if named.is_empty() {
        &ARCHITECTURES
    } else {
        &named
    });
    if arguments.iter().any(|a| a == "--json") {
        println!("{}", serde_json::to_string(&rows).expect("rows are plain"));
        return;
    }
    println!("# Kernels on NVIDIA GPUs\n");
    println!(
        "Compiled by CubeCL's NVPTX backend and assembled by ptxas on a machine without a GPU: what a unit and a cube take,"
    );
    println!(
        "and instructions in the text. The shapes are in `tests/src/launches.rs`; a kernel is listed where it is launched first.\n"
    );
    println!(
        "| kernel | op | dtype | sm | units | registers | spilled | stack | shared | mma | wgmma | ldmatrix | 16-byte loads | 16-byte copies | fma |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|");
    for row in rows {
        let [registers, spilled, stack] = match row.assembled {
            Some(a) => [a.registers, a.spilled, a.stack].map(|n| n.to_string()),
            None => ["", "", ""].map(String::from),
        };
        println!(
            "| {} | {} | {} | {} | {} | {registers} | {spilled} | {stack} | {} | {} | {} | {} | {} of {} | {} | {} |",
            row.kernel,
            row.op,
            row.dtype,
            row.arch,
            row.units,
            row.shared,
            row.mma,
            row.wgmma,
            row.ldmatrix,
            row.wide_loads,
            row.loads,
            row.copies,
            row.fma
        );
    }
}
