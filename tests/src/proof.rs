//! The compile proof: every kernel that the library launches on an NVIDIA GPU, compiled to PTX and assembled by `ptxas`
//! on a machine that has neither GPU nor driver.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use cubecl::client::Client;
use cubecl::ir::{ElemType, FloatKind, IntKind, UIntKind};
use cubecl::std::tensor::TensorHandle;
use protohead::{Reduction, Strategy, Upstream, Variant, Wanted};
use protohead::{class_means, cosine_cross_entropy, cosine_logits, cross_entropy, reconstruction};
use serde::{Deserialize, Serialize};

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
    /// Of a kernel with `wgmma`, what orders copies and products, in the text's order.
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

/// The CUDA toolkit's folder: `CUDA_PATH`, or where `scripts/setup.sh --tests` puts the parts that are needed.
pub fn toolkit() -> Option<PathBuf> {
    let data = std::env::var_os("XDG_DATA_HOME").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".local/share"),
        PathBuf::from,
    );
    [
        std::env::var_os("CUDA_PATH").map(PathBuf::from),
        Some(data.join("protohead/cuda/nvidia/cu13")),
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
        for (op, dtype, launch) in launches() {
            let only_hopper = op.ends_with("wgmma");
            if only_hopper && arch != 90 {
                continue;
            }
            for compiled in compiled_by(arch, |client| launch(client, dtype)) {
                rows.push(row(op, dtype, &compiled, ptxas.as_deref()));
            }
        }
    }
    rows
}

/// The ops whose class weights, and whose logits, pass 32-bit indices; what they are called where those do not; and the kernels whose
/// indices it is about.
pub const BEYOND_32_BITS: [(&str, &str, [&str; 2]); 2] = [
    (
        "cosine_cross_entropy, 17 million classes",
        "cosine_cross_entropy",
        ["pack", "finish"],
    ),
    (
        "cosine_logits, 5 thousand million",
        "cosine_logits",
        ["forward", "copy"],
    ),
];

type Launch = fn(&Client, FloatKind);

/// Every op in every variant that inference picks on these devices, that is their fallback, or that can be forced.
fn launches() -> Vec<(&'static str, FloatKind, Launch)> {
    let ops: [(&'static str, Launch); 13] = [
        ("cosine_cross_entropy, small", small),
        ("cosine_cross_entropy", |client, dtype| {
            fused(client, dtype, Strategy::Inferred, false)
        }),
        ("cosine_cross_entropy, TF32", |client, dtype| {
            fused(client, dtype, Strategy::Inferred, true)
        }),
        ("cosine_cross_entropy, plane", |client, dtype| {
            fused(client, dtype, Strategy::Forced(Variant::Plane), false);
        }),
        ("cosine_cross_entropy, wgmma", |client, dtype| {
            fused(client, dtype, Strategy::Forced(Variant::Wgmma), false);
        }),
        (BEYOND_32_BITS[0].0, many_classes),
        ("cosine_logits", |client, dtype| {
            logits(client, dtype, false)
        }),
        ("cosine_logits, TF32", |client, dtype| {
            logits(client, dtype, true)
        }),
        ("cosine_logits, wgmma", |client, dtype| {
            let options = cosine_logits::Options {
                strategy: Strategy::Forced(Variant::Wgmma),
                ..Default::default()
            };
            logits_of(client, dtype, [2, 1024, 3000], &options);
        }),
        (BEYOND_32_BITS[1].0, many_logits),
        ("cross_entropy", on_logits),
        ("class_means", means),
        ("reconstruction", reconstruct),
    ];
    let mut launches = Vec::new();
    for (op, launch) in ops {
        for dtype in [FloatKind::F32, FloatKind::F16, FloatKind::BF16] {
            let is_of = match op {
                _ if op.ends_with("TF32") => dtype == FloatKind::F32,
                _ if op.ends_with("wgmma") => dtype != FloatKind::F32,
                _ => true,
            };
            if is_of {
                launches.push((op, dtype, launch));
            }
        }
    }
    launches
}

/// A tensor without bytes.
pub fn tensor(client: &Client, shape: &[usize], dtype: ElemType) -> TensorHandle {
    let elements: usize = shape.iter().product();
    TensorHandle::new_contiguous(shape.to_vec(), client.empty(elements * dtype.size()), dtype)
}

const F32: ElemType = ElemType::Float(FloatKind::F32);
const LABELS: ElemType = ElemType::Int(IntKind::I64);
const VALID: &str = "the operands are valid";

fn fused(client: &Client, dtype: FloatKind, strategy: Strategy, allow_tf32: bool) {
    let float = ElemType::Float(dtype);
    let [embeddings, weights] = [1024, 3000].map(|rows| tensor(client, &[2, rows, 256], float));
    for (labels, reduction) in labels_and_reductions(dtype) {
        let inputs = cosine_cross_entropy::Inputs {
            embeddings: embeddings.clone(),
            weights: weights.clone(),
            labels: tensor(client, &[1024], labels),
        };
        let mut options = cosine_cross_entropy::Options {
            strategy,
            allow_tf32,
            ..Default::default()
        };
        options.loss.reduction = reduction;
        if reduction == Reduction::None {
            options.loss.label_smoothing = 0.1;
        }
        let output = cosine_cross_entropy::forward(client, &inputs, &options).expect(VALID);
        let upstream = Upstream::Total(1.0);
        cosine_cross_entropy::backward(client, &inputs, &options, &output, &upstream, Wanted::BOTH)
            .expect(VALID);
        // In f32 the forward pass is another then, which leaves its cosines.
        if float == F32 && labels == LABELS && !allow_tf32 {
            let both = cosine_cross_entropy::forward_backward;
            both(client, &inputs, &options, &upstream, Wanted::BOTH).expect(VALID);
        }
    }
}

fn small(client: &Client, dtype: FloatKind) {
    let float = ElemType::Float(dtype);
    let [embeddings, weights] = [128, 35].map(|rows| tensor(client, &[3, rows, 256], float));
    for (labels, reduction) in labels_and_reductions(dtype) {
        let inputs = cosine_cross_entropy::Inputs {
            embeddings: embeddings.clone(),
            weights: weights.clone(),
            labels: tensor(client, &[128], labels),
        };
        let mut options = cosine_cross_entropy::Options {
            active: Some(20),
            ..Default::default()
        };
        options.loss.reduction = reduction;
        if reduction == Reduction::None {
            options.loss.label_smoothing = 0.1;
        }
        cosine_cross_entropy::forward(client, &inputs, &options).expect(VALID);
        let upstream = Upstream::Total(1.0);
        for wanted in [Wanted::BOTH, Wanted::EMBEDDINGS, Wanted::WEIGHTS] {
            let both = cosine_cross_entropy::forward_backward(
                client, &inputs, &options, &upstream, wanted,
            );
            let (output, gradients) = both.expect(VALID);
            if reduction == Reduction::Mean {
                gradients.scaled(client, &output.loss).expect(VALID);
            }
        }
    }
}

/// The dtypes of labels that an op is launched with: in f32 all.
fn labels_beside(dtype: FloatKind) -> Vec<ElemType> {
    match dtype {
        FloatKind::F32 => vec![
            LABELS,
            ElemType::Int(IntKind::I32),
            ElemType::UInt(UIntKind::U32),
        ],
        _ => vec![LABELS],
    }
}

fn labels_and_reductions(dtype: FloatKind) -> impl Iterator<Item = (ElemType, Reduction)> {
    labels_beside(dtype)
        .into_iter()
        .flat_map(|labels| [Reduction::Mean, Reduction::None].map(|reduction| (labels, reduction)))
}

fn many_classes(client: &Client, dtype: FloatKind) {
    let float = ElemType::Float(dtype);
    // 4.4 · 10⁹ elements, and no byte of them anywhere.
    let inputs = cosine_cross_entropy::Inputs {
        embeddings: tensor(client, &[1, 512, 256], float),
        weights: tensor(client, &[1, 17_000_000, 256], float),
        labels: tensor(client, &[512], LABELS),
    };
    let options = cosine_cross_entropy::Options {
        active: Some(1000),
        ..Default::default()
    };
    let output = cosine_cross_entropy::forward(client, &inputs, &options).expect(VALID);
    let upstream = Upstream::Total(1.0);
    cosine_cross_entropy::backward(client, &inputs, &options, &output, &upstream, Wanted::BOTH)
        .expect(VALID);
}

fn logits(client: &Client, dtype: FloatKind, allow_tf32: bool) {
    let options = cosine_logits::Options {
        allow_tf32,
        ..Default::default()
    };
    logits_of(client, dtype, [2, 1024, 3000], &options);
}

fn many_logits(client: &Client, dtype: FloatKind) {
    logits_of(client, dtype, [1, 50_000, 100_000], &Default::default());
}

fn logits_of(
    client: &Client,
    dtype: FloatKind,
    [heads, rows, classes]: [usize; 3],
    options: &cosine_logits::Options,
) {
    let float = ElemType::Float(dtype);
    let inputs = cosine_logits::Inputs {
        embeddings: tensor(client, &[heads, rows, 256], float),
        weights: tensor(client, &[heads, classes, 256], float),
    };
    let z = cosine_logits::forward(client, &inputs, options).expect(VALID);
    cosine_logits::backward(client, &inputs, options, &z, Wanted::BOTH).expect(VALID);
}

fn on_logits(client: &Client, dtype: FloatKind) {
    for labels in labels_beside(dtype) {
        let inputs = cross_entropy::Inputs {
            logits: tensor(client, &[2, 1024, 3000], ElemType::Float(dtype)),
            labels: tensor(client, &[1024], labels),
        };
        let options = cross_entropy::Options::default();
        let output = cross_entropy::forward(client, &inputs, &options).expect(VALID);
        cross_entropy::backward(client, &inputs, &options, &output, &Upstream::Total(1.0))
            .expect(VALID);
    }
}

fn means(client: &Client, dtype: FloatKind) {
    let float = ElemType::Float(dtype);
    for normalize in [false, true] {
        for labels in labels_beside(dtype) {
            means_of(client, float, labels, normalize, 20);
        }
    }
    // More than a cube has units.
    means_of(client, float, LABELS, false, 300);
}

fn means_of(client: &Client, float: ElemType, labels: ElemType, normalize: bool, classes: usize) {
    let options = class_means::Options {
        normalize,
        ..Default::default()
    };
    let embeddings = tensor(client, &[2, 1024, 256], float);
    let labels = tensor(client, &[1024], labels);
    let sums = || class_means::ClassSums::new(client, 2, classes, 256, &options).expect(VALID);
    let (mut first, mut second) = (sums(), sums());
    for sums in [&mut first, &mut second] {
        sums.accumulate(client, &embeddings, &labels).expect(VALID);
    }
    first.accumulate(client, &embeddings, &labels).expect(VALID);
    first.merge(client, &second).expect(VALID);
    let weights = tensor(client, &[2, classes + 15, 256], float);
    first.write_means(client, &weights).expect(VALID);
}

fn reconstruct(client: &Client, dtype: FloatKind) {
    let part = || tensor(client, &[1024, 256], ElemType::Float(dtype));
    let inputs = reconstruction::Inputs {
        whole: part(),
        first: part(),
        second: part(),
    };
    reconstruction::forward(client, &inputs, &Default::default()).expect(VALID);
    reconstruction::backward(
        client,
        &inputs,
        &Default::default(),
        &Upstream::default(),
        reconstruction::Wanted::ALL,
    )
    .expect(VALID);
}

fn row(op: &str, dtype: FloatKind, compiled: &Compiled, ptxas: Option<&Path>) -> Row {
    let count = |what: &str| compiled.ptx.matches(what).count();
    Row {
        op: op.into(),
        dtype: format!("{dtype:?}").to_lowercase(),
        kernel: compiled.name.clone(),
        arch: compiled.arch,
        units: compiled.units,
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

/// Copies, products and barriers, but nothing of a kernel without `wgmma`.
fn pipeline(ptx: &str) -> Vec<String> {
    if !ptx.contains("wgmma.mma_async.") {
        return Vec::new();
    }
    let orders = ["cp.async.", "wgmma.", "fence.proxy.", "bar.sync"];
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
