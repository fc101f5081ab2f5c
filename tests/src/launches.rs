//! What the compile proof launches: every op at shapes that reach all of its kernels.

use cubecl::client::Client;
use cubecl::ir::{ElemType, FloatKind, IntKind, UIntKind};
use cubecl::std::tensor::TensorHandle;
use protohead::{Reduction, Strategy, Upstream, Variant, Wanted};
use protohead::{class_means, cosine_cross_entropy, cosine_logits, cross_entropy, reconstruction};

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

/// Launches an op on operands of a dtype.
pub type Launch = fn(&Client, FloatKind);

/// Every op in every variant that inference picks on this architecture, that is their fallback, or that can be forced.
pub fn launches(arch: u32) -> Vec<(&'static str, FloatKind, Launch)> {
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
                _ if op.ends_with("wgmma") => arch == 90 && dtype != FloatKind::F32,
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
fn tensor(client: &Client, shape: &[usize], dtype: ElemType) -> TensorHandle {
    let elements: usize = shape.iter().product();
    TensorHandle::new_contiguous(shape.to_vec(), client.empty(elements * dtype.size()), dtype)
}

const F32: ElemType = ElemType::Float(FloatKind::F32);
const LABELS: ElemType = ElemType::Int(IntKind::I64);
const VALID: &str = "the operands are valid";

fn fused(client: &Client, dtype: FloatKind, strategy: Strategy, allow_tf32: bool) {
    let float = ElemType::Float(dtype);
    let [embeddings, weights] = [1024, 3000].map(|rows| tensor(client, &[2, rows, 256], float));
    for (labels, reduction, angular) in losses(dtype) {
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
        options.margin.angular = angular;
        if reduction == Reduction::None {
            options.loss.label_smoothing = 0.1;
        }
        let output = cosine_cross_entropy::forward(client, &inputs, &options).expect(VALID);
        let upstream = Upstream::Total(1.0);
        // The scale's gradient changes the last kernel, and with a margin those of the logits' gradients.
        for wanted in [Wanted::BOTH, Wanted::ALL] {
            cosine_cross_entropy::backward(client, &inputs, &options, &output, &upstream, wanted)
                .expect(VALID);
        }
        // In f32 the forward pass is another then, which leaves its cosines.
        if float == F32 && labels == LABELS && !allow_tf32 {
            let both = cosine_cross_entropy::forward_backward;
            let _ = both(client, &inputs, &options, &upstream, Wanted::ALL).expect(VALID);
        }
    }
}

fn small(client: &Client, dtype: FloatKind) {
    let float = ElemType::Float(dtype);
    let [embeddings, weights] = [128, 35].map(|rows| tensor(client, &[3, rows, 256], float));
    for (labels, reduction, angular) in losses(dtype) {
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
        options.margin.angular = angular;
        if reduction == Reduction::None {
            options.loss.label_smoothing = 0.1;
        }
        let _ = cosine_cross_entropy::forward(client, &inputs, &options).expect(VALID);
        let upstream = Upstream::Total(1.0);
        for wanted in [
            Wanted::BOTH,
            Wanted::EMBEDDINGS,
            Wanted::WEIGHTS,
            Wanted::ALL,
        ] {
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

/// Dtypes of labels, reductions (that of rows with smoothing, too) and angular margins of a loss.
fn losses(dtype: FloatKind) -> impl Iterator<Item = (ElemType, Reduction, f32)> {
    let plain = labels_beside(dtype).into_iter().flat_map(|labels| {
        [Reduction::Mean, Reduction::None].map(|reduction| (labels, reduction, 0.0))
    });
    let with_margin = [Reduction::Mean, Reduction::None].map(|reduction| (LABELS, reduction, 0.5));
    plain.chain(with_margin)
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
    first.means(client, &weights).expect(VALID);
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
