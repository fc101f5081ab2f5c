//! The compile proof: every kernel that the library launches on an NVIDIA GPU, compiled to PTX and assembled by `ptxas`
//! on a machine that has neither GPU nor driver.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use cubecl::ir::FloatKind;
use serde::{Deserialize, Serialize};

use crate::launches::launches;
use crate::nvidia::{Compiled, compiled_by};

/// A100, H100 and B200.
pub const ARCHITECTURES: [u32; 3] = [80, 90, 100];

/// A kernel and what the assembler said of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    /// The op that launched it, with its variant.
    pub op: String,
    /// The operands' dtype.
    pub dtype: String,
    /// The kernel function.
    pub kernel: String,
    /// The architecture: 90 for sm_90.
    pub arch: u32,
    /// Units of a cube.
    pub units: u32,
    /// Shared memory, in bytes.
    pub shared: usize,
    /// What the assembler said, if there is one.
    pub assembled: Option<Assembled>,
    /// Tensor-core products of a plane in the text,
    pub mma: usize,
    /// and of four planes together.
    pub wgmma: usize,
    /// Copies of 16 bytes from global to shared memory in the text.
    pub copies: usize,
    /// Fragment loads in the text.
    pub ldmatrix: usize,
    /// Those of them that transpose.
    pub transposed: usize,
    /// Of a kernel that copies to shared memory, what orders copies and products, and these, in the text's order.
    pub pipeline: Vec<String>,
    /// Loads of 16 bytes from global memory in the text.
    pub wide_loads: usize,
    /// Loads from global memory in the text.
    pub loads: usize,
    /// Multiply-adds of f32 in the text.
    pub fma: usize,
    /// 64-bit multiplications of indices in the text.
    pub wide_indices: usize,
}

/// Of `ptxas --verbose`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Assembled {
    /// 32-bit registers of a unit.
    pub registers: u32,
    /// Bytes of local memory that a unit needs.
    pub stack: u32,
    /// Bytes of registers spilled: stores and loads together.
    pub spilled: u32,
}

/// The CUDA toolkit's folder: where `scripts/setup.sh --tests` puts the parts that are needed, or `CUDA_PATH`, which may have an older
/// assembler.
pub fn toolkit() -> Option<PathBuf> {
    let data = std::env::var_os("XDG_DATA_HOME").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".local/share"),
        PathBuf::from,
    );
    [
        Some(data.join("protohead/cuda/nvidia/cu13")),
        std::env::var_os("CUDA_PATH").map(PathBuf::from),
    ]
    .into_iter()
    .flatten()
    .find(|root| root.join("nvvm/libdevice/libdevice.10.bc").is_file())
}

/// Compiles everything. `CUDA_PATH` has to be set, since exponentials come from the toolkit's device library.
///
/// # Panics
/// If a kernel does not compile or assemble, or its `wgmma` one after the other.
pub fn rows(architectures: &[u32]) -> Vec<Row> {
    let ptxas = toolkit()
        .map(|root| root.join("bin/ptxas"))
        .filter(|path| path.is_file());
    let mut rows = Vec::new();
    for &arch in architectures {
        for (op, dtype, launch) in launches(arch) {
            for compiled in compiled_by(arch, |client| launch(client, dtype)) {
                rows.push(row(op, dtype, &compiled, ptxas.as_deref()));
            }
        }
    }
    rows
}

fn row(op: &str, dtype: FloatKind, compiled: &Compiled, ptxas: Option<&Path>) -> Row {
    let count = |what: &str| compiled.ptx.matches(what).count();
    Row {
        op: op.into(),
        dtype: format!("{dtype:?}").to_lowercase(),
        kernel: compiled.name.clone(),
        arch: compiled.arch,
        units: compiled.dim.iter().product(),
        shared: compiled.shared,
        assembled: ptxas.map(|ptxas| assemble(ptxas, compiled)),
        mma: count("mma.sync."),
        wgmma: count("wgmma.mma_async."),
        copies: count("cp.async.cg.shared.global"),
        ldmatrix: count("ldmatrix.sync."),
        transposed: count("ldmatrix.sync.aligned.m8n8.x4.trans."),
        pipeline: pipeline(&compiled.ptx),
        wide_loads: loads(&compiled.ptx).filter(|line| is_wide(line)).count(),
        loads: loads(&compiled.ptx).count(),
        fma: count("fma.rn.f32"),
        wide_indices: count("mul.lo.s64") + count("mad.lo.s64") + count("shl.b64"),
    }
}

/// Copies, products and barriers, but nothing of a kernel without copies.
fn pipeline(ptx: &str) -> Vec<String> {
    if !ptx.contains("cp.async.") {
        return Vec::new();
    }
    let orders = [
        "cp.async.",
        "mma.sync.",
        "wgmma.",
        "fence.proxy.",
        "bar.sync",
    ];
    let instruction = |line: &str| {
        let line = line.trim().trim_end_matches(';');
        let first = line.split_whitespace().next()?.to_owned();
        let orders = orders.iter().any(|order| line.starts_with(order));
        // How many groups may be on their way belongs to the instruction.
        orders.then(|| match first.contains("wait_group") {
            true => line.to_owned(),
            false => first,
        })
    };
    ptx.lines().filter_map(instruction).collect()
}

fn loads(ptx: &str) -> impl Iterator<Item = &str> {
    ptx.lines().filter(|line| line.contains("ld.global"))
}

/// Whether a load brings 16 bytes or more.
fn is_wide(line: &str) -> bool {
    [
        ".v4.b32", ".v4.u32", ".v4.f32", ".v2.b64", ".v2.u64", ".v8.b16", ".v8.b32", ".v8.f32",
        ".v4.b64",
    ]
    .iter()
    .any(|vector| line.contains(vector))
}

fn assemble(ptxas: &Path, compiled: &Compiled) -> Assembled {
    // The target that the text names: PTX for sm_90 may be for sm_90a.
    let target = compiled
        .ptx
        .lines()
        .find_map(|line| line.strip_prefix(".target "))
        .and_then(|targets| targets.split([',', ' ']).next())
        .expect("PTX names its target");
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(compiled.ptx.as_bytes()).expect("written");
    let output = Command::new(ptxas)
        .args([
            "--verbose",
            "--warn-on-spills",
            "--output-file",
            "/dev/null",
        ])
        .arg(format!("--gpu-name={target}"))
        .arg(file.path())
        .output()
        .expect("ptxas starts");
    let said = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
    let succeeded = output.status.success();
    // As when something touches the sums of products that are on their way.
    let overlaps = !said.contains("wgmma.mma_async instructions are serialized");
    assert!(succeeded && overlaps, "{}: {said}", compiled.name);
    let before = |what: &str| -> u32 {
        said.split(what)
            .next()
            .filter(|_| said.contains(what))
            .and_then(|text| text.split_whitespace().last())
            .and_then(|number| number.parse().ok())
            .unwrap_or_else(|| panic!("no '{what}' in {said}"))
    };
    Assembled {
        registers: before(" registers"),
        stack: before(" bytes stack frame"),
        spilled: before(" bytes spill stores") + before(" bytes spill loads"),
    }
}
