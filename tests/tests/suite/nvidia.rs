//! The compile proof: what the library launches on NVIDIA GPUs compiles, assembles, fits and does not spill; and what it computes there,
//! emulated.

use std::collections::HashSet;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use protohead_tests::launches::BEYOND_32_BITS;
use protohead_tests::proof::{ARCHITECTURES, Row, toolkit};

/// Every kernel, compiled by a process for each architecture, which knows where the CUDA toolkit is; none where there is no toolkit.
fn rows() -> &'static [Row] {
    static ROWS: OnceLock<Vec<Row>> = OnceLock::new();
    ROWS.get_or_init(compiled)
}

/// The CUDA toolkit's folder, which may be missing where it is not for CI.
fn found_toolkit() -> Option<PathBuf> {
    let found = toolkit();
    if found.is_none() {
        assert!(
            std::env::var_os("CI").is_none(),
            "no CUDA toolkit: scripts/setup.sh --tests should have installed it"
        );
        eprintln!(
            "protohead tests: no CUDA toolkit, so nothing was compiled for NVIDIA GPUs; scripts/setup.sh --tests installs it"
        );
    }
    found
}

fn compiled() -> Vec<Row> {
    if found_toolkit().is_none() {
        return Vec::new();
    }
    let processes = ARCHITECTURES.map(|arch| {
        Command::new(env!("CARGO_BIN_EXE_kernels"))
            .args(["--json", &arch.to_string()])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts")
    });
    let rows = processes.into_iter().flat_map(|process| {
        let output = process.wait_with_output().expect("it ends");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        serde_json::from_slice::<Vec<Row>>(&output.stdout).expect("rows as JSON")
    });
    let rows: Vec<Row> = rows.collect();
    assert!(rows.len() > 100, "only {} kernels", rows.len());
    rows
}

#[test]
fn every_kernel_fits_an_nvidia_gpu_and_spills_next_to_nothing() {
    for row in rows() {
        let of = format!(
            "{} of {} in {} for sm_{}",
            row.kernel, row.op, row.dtype, row.arch
        );
        let Some(assembled) = row.assembled else {
            // A toolkit of the user's own may lack the assembler; what setup.sh installs has it.
            assert!(std::env::var_os("CI").is_none(), "no ptxas for {of}");
            continue;
        };
        // Where the assembler can have one more cube on a multiprocessor for it, it spills a register or two of what streams rows, and
        // eight of the small step, whose vectors come from the caches. Of what multiplies tiles, the forward pass on an A100's tensor
        // cores keeps a number or two in local memory while a tile is multiplied.
        let multiplies = multiplies_tiles(row);
        let spilled = match multiplies || row.wide_loads == 0 {
            true if row.arch == 80 && row.mma > 0 && row.kernel.starts_with("forward") => 12,
            true => 0,
            false if row.op.ends_with("small") => 64,
            false => 16,
        };
        assert!(
            assembled.spilled <= spilled && assembled.stack <= spilled / 2 + 4,
            "{of} spills {} bytes, with {} of local memory",
            assembled.spilled,
            assembled.stack
        );
        // A multiprocessor has 65,536 registers, given out by 256 a plane, and at least one cube has to fit.
        let registers = assembled.registers.next_multiple_of(8) * row.units;
        assert!(
            registers <= 65_536,
            "{of} takes {registers} registers a cube"
        );
        // A cube fits twice, so that one computes while the other waits: all but the plane variant's forward pass, whose sixty-four
        // results a unit are many multiply-adds a wait.
        let of_plane = row.mma + row.wgmma == 0 && multiplies;
        let alone = of_plane && row.kernel.starts_with("forward");
        assert!(
            alone || 2 * registers <= 65_536,
            "{of} takes {registers} registers a cube"
        );
        // What GPUs of compute capability 8.6 and 8.9 give a cube.
        assert!(row.shared <= 99 << 10, "{of} takes {} bytes", row.shared);
        assert!(
            multiplies || row.shared <= 48 << 10,
            "{of} takes {} bytes",
            row.shared
        );
    }
}

/// Whether it is one of the kernels around the tile product.
fn multiplies_tiles(row: &Row) -> bool {
    let of_product = row.op.starts_with("cosine") && !row.op.ends_with("small");
    of_product
        && ["forward_", "logit_gradients_", "product_"]
            .iter()
            .any(|name| row.kernel.starts_with(name))
}

/// What streams rows, by op (any, if it has no name) and kernel: at least one load of 16 bytes a loop over each operand.
const STREAMS: [(&str, &str, usize); 9] = [
    ("reconstruction", "forward", 3),
    ("reconstruction", "backward", 6),
    ("class_means", "sum", 5),
    ("class_means", "merge", 4),
    ("cross_entropy", "forward", 1),
    ("cross_entropy", "backward", 1),
    ("cosine_cross_entropy", "from", 1), // from_cosines
    ("cosine_logits", "copy", 1),
    ("", "pack", 2),
];

fn is_of(row: &Row, &(op, kernel, _): &(&str, &str, usize)) -> bool {
    (op.is_empty() || row.op == op) && row.kernel.split('_').next() == Some(kernel)
}

/// A turn of a loop on tensor cores. A slab's copies are awaited by who made them, and shown to wgmma if that reads them, before all
/// meet; then it is multiplied, and a later slab's copies, four of either operand, take the place of the slab before. What wgmma sums is
/// done with before the next turn.
fn slab(row: &Row) -> Vec<String> {
    let of = |name: &str, times| std::iter::repeat_n(name.to_owned(), times);
    let copies = of("cp.async.cg.shared.global.L2::128B", 8);
    if row.wgmma > 0 {
        // 64 × 128 × 16 each, of 128 × 128 × 32.
        let product = format!(
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.{0}.{0}",
            row.dtype
        );
        return of("cp.async.commit_group", 1)
            .chain(of("wgmma.wait_group.sync.aligned 0", 1))
            .chain(of("cp.async.wait_group 2", 1))
            .chain(of("fence.proxy.async.shared::cta", 1))
            .chain(of("bar.sync", 1))
            .chain(of("wgmma.fence.sync.aligned", 1))
            .chain(of(&product, 4))
            .chain(of("wgmma.commit_group.sync.aligned", 1))
            .chain(copies)
            .collect();
    }
    // A plane's 64 × 64 of the same, 16 × 8 × 16 each; of TF32 half as deep, of slabs half as deep.
    let product = match row.dtype.as_str() {
        "f32" => "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32".to_owned(),
        dtype => format!("mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32"),
    };
    of("cp.async.wait_group 1", 1)
        .chain(of("bar.sync", 1))
        .chain(copies)
        .chain(of("cp.async.commit_group", 1))
        .chain(of(&product, 64))
        .collect()
}

#[test]
fn products_run_on_tensor_cores_and_stream_sixteen_bytes_at_a_time() {
    let rows = rows();
    for row in rows {
        let of = format!(
            "{} of {} in {} for sm_{}",
            row.kernel, row.op, row.dtype, row.arch
        );
        let inferred = row.op == "cosine_cross_entropy" || row.op == "cosine_logits";
        let product = multiplies_tiles(row);
        if (inferred && row.dtype != "f32" || row.op.ends_with("TF32")) && product {
            assert!(row.mma > 0, "{of} has no tensor-core product");
            // Fragments of a slab: sixteen. Those of operands that lie in columns are transposed, which TF32 cannot be, so that it has
            // scalars for them: the right operand of a product for gradients, and both of the weights'.
            let tf32 = row.op.ends_with("TF32");
            let fragments: &[_] = match (row.kernel.starts_with("product_"), tf32) {
                (false, _) => &[(16, 0)],
                (true, false) => &[(16, 8), (16, 16)],
                (true, true) => &[(8, 0), (0, 0)],
            };
            let has = (row.ldmatrix, row.transposed);
            assert!(fragments.contains(&has), "{of} has {has:?} of ldmatrix");
        }
        if row.mma + row.wgmma > 0 {
            let expected = slab(row);
            let turns = row.pipeline.windows(expected.len());
            let loops = turns.filter(|some| *some == expected).count();
            assert_eq!(loops, 1, "{of} has another loop: {:?}", row.pipeline);
            // The first slabs of wgmma are copied before its loop.
            let copies = if row.wgmma > 0 { 4 * 8 } else { 8 };
            assert_eq!(row.copies, copies, "{of} copies elsewhere, too");
        }
        if row.mma + row.wgmma > 0 {
            // Of 128 results a unit: with the device library's exponentials it would be five or more each.
            assert!(row.fma <= 4 * 128, "{of} has {} multiply-adds", row.fma);
        }
        let of_row = STREAMS.iter().find(|stream| is_of(row, stream));
        let streams = of_row.map_or(0, |&(_, _, streams)| streams);
        assert!(
            row.wide_loads >= streams,
            "{of} has {} loads of 16 bytes where {streams} streams are",
            row.wide_loads
        );
    }
    if !rows.is_empty() {
        for (arch, stream) in ARCHITECTURES
            .into_iter()
            .flat_map(|arch| STREAMS.map(|s| (arch, s)))
        {
            let found = rows
                .iter()
                .any(|row| row.arch == arch && is_of(row, &stream));
            assert!(found, "no {stream:?} on sm_{arch}");
        }
        // Forward, logit gradients, dX and dW of the fused op, and logits: in two dtypes.
        let of_hopper = rows.iter().filter(|row| row.wgmma > 0);
        assert!(of_hopper.count() >= 10, "too few kernels with wgmma");
        for arch in ARCHITECTURES {
            let products = rows.iter().filter(|row| row.arch == arch && row.mma > 0);
            // Forward, logit gradients, dX and dW, of the fused op in three dtypes; logits in two.
            assert!(
                products.count() >= 14,
                "sm_{arch} has too few tensor-core kernels"
            );
            // Products for the embeddings and for the weights, of three dtypes.
            let products = rows.iter().filter(|row| {
                row.arch == arch && row.mma > 0 && row.kernel.starts_with("product_")
            });
            let kinds: HashSet<_> = products
                .map(|row| (&row.op, &row.dtype, row.ldmatrix, row.transposed))
                .collect();
            assert_eq!(kinds.len(), 6, "sm_{arch}: {kinds:?}");
            let keeps = |row: &Row| row.arch == arch && row.kernel.starts_with("from_cosines");
            assert!(
                rows.iter().any(keeps),
                "no step on sm_{arch} keeps its cosines"
            );
        }
    }
}

#[test]
fn what_is_beyond_32_bit_indices_gets_kernels_with_64_bit_ones() {
    let rows = rows();
    if rows.is_empty() {
        return;
    }
    for arch in ARCHITECTURES {
        for (of_many, of_some, kernels) in BEYOND_32_BITS {
            for (name, dtype) in kernels
                .map(|name| ["f32", "f16", "bf16"].map(|dtype| (name, dtype)))
                .into_iter()
                .flatten()
            {
                let indices = |op: &str| {
                    let of = |row: &&Row| {
                        row.op == op
                            && row.arch == arch
                            && row.dtype == dtype
                            && row.kernel.starts_with(name)
                    };
                    rows.iter().find(of).map(|row| row.wide_indices)
                };
                let narrow = indices(of_some).expect("compiled");
                let wide = indices(of_many).expect("compiled again");
                assert!(
                    wide > narrow,
                    "{name} for sm_{arch}: {wide} 64-bit index operations, {narrow} before"
                );
            }
        }
    }
}

/// Tests of the suite that an emulated GPU passes in seconds, of every op in every variant.
const EMULATED: [&str; 14] = [
    "class_means::class_means_agree_with_the_reference",
    "class_means::sorted_rows_in_vectors_agree_with_the_reference",
    "cosine_cross_entropy::shapes::shapes_beyond_one_workspace_agree_with_the_reference",
    "cosine_cross_entropy::the_fused_op_agrees_with_the_reference",
    "cosine_cross_entropy::values::every_angle_between_0_and_180_degrees_agrees_with_the_reference",
    "cosine_logits::logits_and_their_gradients_agree_with_the_reference",
    "cosine_logits::problems_that_failed_once_agree_with_the_reference",
    "cross_entropy::cross_entropy_agrees_with_the_reference",
    "faults::labels::a_bad_label_is_reported_and_its_row_counts_as_ignored",
    "goldens::class_means_are_those_of_the_loop_in_pytorch",
    "goldens::reconstruction_does_what_pytorch_does",
    "metamorphic::permuting_rows_permutes_results",
    "reconstruction::reconstruction_agrees_with_the_reference",
    "tf32::tf32_is_as_near_as_its_bits_and_only_where_it_is_allowed",
];

/// The suite again, in a process that knows where the CUDA toolkit is.
#[test]
fn an_emulated_hopper_gpu_passes_the_suite() {
    let Some(toolkit) = found_toolkit() else {
        return;
    };
    let output = Command::new(std::env::current_exe().expect("it runs"))
        .args(EMULATED)
        .arg("--exact")
        // There all variants of all devices are wanted.
        .env_remove("CI")
        .env("CUDA_PATH", toolkit)
        .env("PROTOHEAD_DEVICES", "sm_90")
        .env("PROPTEST_CASES", "3")
        .output()
        .expect("the suite starts");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}");
    let passed = format!("{} passed", EMULATED.len());
    assert!(said.contains(&passed), "{said}");
    let told = String::from_utf8_lossy(&output.stderr);
    let runs = "sm_90 runs [Plane, Cmma, Wgmma, Small] in [F32, F16, Bf16]";
    assert!(told.contains(runs), "{told}");
}
