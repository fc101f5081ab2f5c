//! The numbers that `protohead loss` and `protohead prototypes` write, beside the reference's in f64; and those of a run's metrics.

use std::fs;
use std::path::Path;

use half::{bf16, f16};
use protohead_reference::{
    ClassSums, Cosine, LossOptions, Margin, Reduction, Sizes, Upstream, class_means,
    cosine_cross_entropy, cosine_cross_entropy_backward,
};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::protohead;
use crate::training::train;

/// A tensor's numbers as a file of `dtype` holds them: its bytes, and what they mean.
fn stored(dtype: Dtype, values: &[f32]) -> (Vec<u8>, Vec<f64>) {
    let mut bytes = Vec::new();
    let mut exact = Vec::new();
    for &value in values {
        match dtype {
            Dtype::F16 => {
                let value = f16::from_f32(value);
                bytes.extend(value.to_le_bytes());
                exact.push(value.to_f64());
            }
            Dtype::BF16 => {
                let value = bf16::from_f32(value);
                bytes.extend(value.to_le_bytes());
                exact.push(value.to_f64());
            }
            _ => {
                bytes.extend(value.to_le_bytes());
                exact.push(f64::from(value));
            }
        }
    }
    (bytes, exact)
}

fn read(view: &TensorView) -> Vec<f64> {
    let data = view.data();
    match view.dtype() {
        Dtype::F16 => data
            .chunks_exact(2)
            .map(|b| f16::from_le_bytes([b[0], b[1]]).to_f64())
            .collect(),
        Dtype::BF16 => data
            .chunks_exact(2)
            .map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f64())
            .collect(),
        Dtype::I64 => data
            .chunks_exact(8)
            .map(|b| {
                let bytes = [b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]];
                i64::from_le_bytes(bytes) as f64
            })
            .collect(),
        _ => data
            .chunks_exact(4)
            .map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]])))
            .collect(),
    }
}

/// Numbers in no order, between −1 and 1.
fn numbers(count: usize, seed: usize) -> Vec<f32> {
    (0..count)
        .map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.0 - 1.0)
        .collect()
}

/// `‖got − expected‖ ≤ relative · ‖expected‖`
fn close(name: &str, got: &[f64], expected: &[f64], relative: f64) {
    assert_eq!(got.len(), expected.len(), "{name}");
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let off = norm(&mut got.iter().zip(expected).map(|(a, b)| a - b));
    let size = norm(&mut expected.iter().copied());
    assert!(
        off <= relative * size,
        "{name}: off by {off:e}, of {size:e}: more than {relative:e} of it"
    );
}

/// What rounding to the dtype of a file may cost, of a tensor's norm: half of the last place of each number.
fn rounding(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F16 => f64::powi(2.0, -11),
        Dtype::BF16 => f64::powi(2.0, -8),
        _ => 0.0,
    }
}

fn write(path: &Path, tensors: Vec<(&str, Dtype, &[usize], &[u8])>) {
    let views = tensors.into_iter().map(|(name, dtype, shape, bytes)| {
        let view = TensorView::new(dtype, shape.to_vec(), bytes);
        (name, view.expect("the test's tensors are sound"))
    });
    let bytes = safetensors::serialize(views, None).expect("the test's tensors are sound");
    fs::write(path, bytes).expect("the folder is writable");
}

fn run(command: &str, input: &Path, out: &Path, options: &[&str]) -> Vec<u8> {
    let [input, out_name] = [input, out].map(|path| path.to_string_lossy().into_owned());
    let fixed = [command, &input, "--out", &out_name, "--device", "cpu"];
    let output = protohead(&[&fixed, options].concat());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{options:?}: {stderr}");
    fs::read(out).expect("the output is there")
}

/// A label dtype, and its bytes of a label.
type OfLabel = (Dtype, fn(i64) -> Vec<u8>);
const LABELS: [OfLabel; 3] = [
    (Dtype::I64, |label| label.to_le_bytes().to_vec()),
    (Dtype::I32, |label| (label as i32).to_le_bytes().to_vec()),
    (Dtype::U32, |label| (label as u32).to_le_bytes().to_vec()),
];

#[test]
fn loss_writes_the_references_numbers_whatever_the_options() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let [input, out] = ["in", "out"].map(|name| folder.path().join(name));
    let sizes = Sizes {
        heads: 2,
        rows: 37,
        dim: 19,
        classes: 12,
        active: 9,
    };
    let plain = LossOptions {
        reduction: Reduction::Mean,
        label_smoothing: 0.0,
        ignore_index: -100,
        head_weights: vec![1.0, 1.0],
    };
    let scaled = Cosine::scaled;
    let cases: [(Cosine<f64>, LossOptions<f64>, &[&str]); 5] = [
        (scaled(16.0), plain.clone(), &[]),
        (
            Cosine {
                scale: 16.0,
                margin: Margin {
                    angular: 0.5,
                    cosine: 0.125,
                    ..Margin::none()
                },
            },
            plain.clone(),
            &["--angular-margin", "0.5", "--cosine-margin", "0.125"],
        ),
        (
            scaled(4.0),
            LossOptions {
                reduction: Reduction::Sum,
                label_smoothing: 0.25,
                ..plain.clone()
            },
            &[
                "--scale",
                "4",
                "--reduction",
                "sum",
                "--label-smoothing",
                "0.25",
            ],
        ),
        (
            scaled(-3.5),
            LossOptions {
                ignore_index: 2,
                ..plain.clone()
            },
            &["--scale", "-3.5", "--ignore-index", "2"],
        ),
        (
            scaled(30.0),
            LossOptions {
                reduction: Reduction::None,
                head_weights: vec![-0.5, 2.0],
                ..plain
            },
            &[
                "--scale",
                "30",
                "--reduction",
                "none",
                "--head-weights",
                "-0.5,2",
            ],
        ),
    ];
    let labels: Vec<i64> = (0..37).map(|row| row * 5 % 9).collect();
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        let (x_bytes, x) = stored(dtype, &numbers(2 * 37 * 19, 1));
        let (w_bytes, w) = stored(dtype, &numbers(2 * 12 * 19, 2));
        for (number, (cosine, options, arguments)) in cases.iter().enumerate() {
            let (label_dtype, label_bytes) = LABELS[number % LABELS.len()];
            let label_bytes: Vec<u8> = labels.iter().flat_map(|&l| label_bytes(l)).collect();
            write(
                &input,
                vec![
                    ("embeddings", dtype, &[2, 37, 19], &x_bytes),
                    ("prototypes", dtype, &[2, 12, 19], &w_bytes),
                    ("labels", label_dtype, &[37], &label_bytes),
                ],
            );
            let active = [&["--active", "9"], *arguments].concat();
            let bytes = run("loss", &input, &out, &active);
            let file = SafeTensors::deserialize(&bytes).expect("the output is safetensors");
            let got = |name: &str| read(&file.tensor(name).expect("promised"));
            let truth = cosine_cross_entropy(&x, &w, &labels, sizes, *cosine, options);
            let upstream = Upstream::Total(1.0);
            let gradients =
                cosine_cross_entropy_backward(&x, &w, &labels, sizes, *cosine, options, &upstream);
            let predictions: Vec<f64> = truth.predictions.iter().map(|&c| f64::from(c)).collect();
            assert_eq!(got("predictions"), predictions, "{dtype:?} {arguments:?}");
            // Sums are f32 whatever the operands are; only gradients are rounded to their dtype.
            for (name, expected, most) in [
                ("loss", &truth.loss, 2e-6),
                ("total", &vec![truth.total], 2e-6),
                ("lse", &truth.lse, 2e-6),
                (
                    "grad_embeddings",
                    &gradients.embeddings,
                    2e-5 + rounding(dtype),
                ),
                (
                    "grad_prototypes",
                    &gradients.weights,
                    2e-5 + rounding(dtype),
                ),
                ("grad_scale", &gradients.scale, 2e-5),
            ] {
                let what = format!("{name} of {dtype:?}, {arguments:?}");
                close(&what, &got(name), expected, most);
            }
        }
    }
}

#[test]
fn prototypes_writes_the_references_means() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let [input, out] = ["in", "out"].map(|name| folder.path().join(name));
    let labels: Vec<i64> = (0..53).map(|row| row * 5 % 7).collect();
    let sizes = Sizes {
        heads: 3,
        rows: 53,
        dim: 21,
        classes: 7,
        active: 7,
    };
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        let (bytes, values) = stored(dtype, &numbers(3 * 53 * 21, 3));
        for (normalize, (label_dtype, label_bytes)) in [false, true, true].into_iter().zip(LABELS) {
            let label_bytes: Vec<u8> = labels.iter().flat_map(|&l| label_bytes(l)).collect();
            write(
                &input,
                vec![
                    ("embeddings", dtype, &[3, 53, 21], &bytes),
                    ("labels", label_dtype, &[53], &label_bytes),
                ],
            );
            let options: &[&str] = if normalize { &["--normalize"] } else { &[] };
            let written = run("prototypes", &input, &out, options);
            let file = SafeTensors::deserialize(&written).expect("the output is safetensors");
            let got = read(&file.tensor("prototypes").expect("promised"));
            let mut sums = ClassSums::<f64>::zeros(sizes);
            sums.add(&values, &labels, sizes, normalize);
            let expected = class_means(&sums, &vec![0.0; 3 * 7 * 21], sizes);
            let what = format!("{dtype:?}, normalize {normalize}");
            close(&what, &got, &expected, 1e-6 + rounding(dtype));
        }
    }
}

#[test]
fn the_loss_is_the_weighted_sum_of_what_the_metrics_tell() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let metrics = |name: &str, more: &[&str]| -> serde_json::Value {
        let run = folder.path().join(name);
        let output = train(&run, "1", more).output().expect("starts");
        assert!(output.status.success(), "{output:?}");
        let lines = fs::read_to_string(run.join("metrics.jsonl")).expect("written by train");
        serde_json::from_str(&lines).expect("a line of JSON")
    };
    let weighted = ["--head-weights", "2,0,0.5", "--lambda", "0.25"];
    let weighted = [&weighted[..], &["--lambda-shuffled", "3"]].concat();
    let margins = ["--angular-margin", "0.3", "--cosine-margin", "0.1"];
    let plain = metrics("plain", &[]);
    let with_margin = metrics("margins", &margins);
    for (told, weights) in [
        (&plain, [1.0; 5]),
        (&with_margin, [1.0; 5]),
        (&metrics("weighted", &weighted), [2.0, 0.0, 0.5, 0.25, 3.0]),
    ] {
        let of = |name: &str| told[name].as_f64().expect("a number");
        let terms = [
            "speech",
            "formant",
            "residual",
            "reconstruction",
            "reconstruction_shuffled",
        ];
        let sum: f64 = terms
            .iter()
            .zip(weights)
            .map(|(term, w)| w * of(term))
            .sum();
        // A few roundings of f32.
        assert!((of("loss") - sum).abs() < 1e-5 * sum, "{sum}: {told}");
    }
    // Without momentum the loss falls more slowly; a large decay keeps class weights, and so nothing but them, small.
    for option in ["--momentum", "--weight-decay"] {
        let other = metrics(option, &[option, "0.5"]);
        assert_ne!(other["loss"], plain["loss"], "{option}");
    }
    // A margin makes every head's loss larger.
    for head in ["speech", "formant", "residual"] {
        assert!(with_margin[head].as_f64() > plain[head].as_f64(), "{head}");
    }
}
