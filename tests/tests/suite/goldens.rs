//! The reference, and through it the kernels, against PyTorch's answers.

use std::path::Path;

use cubecl::client::Client;
use cubecl::prelude::CubeElement;
use cubecl::std::tensor::TensorHandle;
use protohead::class_means::{self, ClassSums};
use protohead::cosine_cross_entropy::Margin;
use protohead::{LossOptions, Reduction, Upstream, Wanted, cosine_cross_entropy, reconstruction};
use protohead_reference as reference;
use protohead_tests::close::{Comparison, Share, lengths};
use protohead_tests::devices::{fused_runs, runs};
use protohead_tests::problem::{Dtype, download};
use safetensors::SafeTensors;
use serde::Deserialize;

use crate::support::{f32s, labels};

/// A file of goldens.
struct Goldens {
    bytes: Vec<u8>,
    cases: String,
}

impl Goldens {
    fn open(op: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("goldens/{op}.safetensors"));
        let bytes =
            std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let (_, metadata) = SafeTensors::read_metadata(&bytes).expect("goldens are safetensors");
        let cases = metadata.metadata().as_ref().expect("goldens have metadata")["cases"].clone();
        Self { bytes, cases }
    }

    fn tensor(&self, case: usize, name: &str) -> (Vec<usize>, Vec<f64>) {
        let file = SafeTensors::deserialize(&self.bytes).expect("goldens are safetensors");
        let view = file
            .tensor(&format!("{case:02}.{name}"))
            .expect("the golden has this tensor");
        let values = match view.dtype() {
            safetensors::Dtype::F64 => f64::from_bytes(view.data()).to_vec(),
            safetensors::Dtype::I64 => i64::from_bytes(view.data())
                .iter()
                .map(|&v| v as f64)
                .collect(),
            _ => f32::from_bytes(view.data())
                .iter()
                .map(|&v| f64::from(v))
                .collect(),
        };
        (view.shape().to_vec(), values)
    }

    fn values(&self, case: usize, name: &str) -> Vec<f64> {
        self.tensor(case, name).1
    }
}

/// The reference in f64 does what torch does in f64: they differ by rounding alone.
fn same(name: &str, ours: &[f64], torch: &[f64]) {
    assert_eq!(ours.len(), torch.len(), "{name}");
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let error = norm(&mut ours.iter().zip(torch).map(|(a, b)| a - b));
    let size = norm(&mut torch.iter().copied());
    assert!(
        error <= 1e-12 * size + 1e-13,
        "{name}: error {error:e} of {size:e}"
    );
}

#[derive(Deserialize)]
struct LossCase {
    scale: f32,
    active: usize,
    reduction: Reduction,
    label_smoothing: f64,
    ignore_index: i32,
    head_weights: Vec<f32>,
    angular: f64,
    cosine: f64,
}

impl LossCase {
    fn cosine<T: reference::Real>(&self) -> reference::Cosine<T> {
        reference::Cosine {
            scale: T::of(f64::from(self.scale)),
            margin: reference::Margin {
                angular: T::of(self.angular),
                cosine: T::of(self.cosine),
                ..reference::Margin::none()
            },
        }
    }

    fn reference_options<T: reference::Real>(&self) -> reference::LossOptions<T> {
        reference::LossOptions {
            reduction: match self.reduction {
                Reduction::None => reference::Reduction::None,
                Reduction::Sum => reference::Reduction::Sum,
                Reduction::Mean => reference::Reduction::Mean,
            },
            label_smoothing: T::of(self.label_smoothing),
            ignore_index: i64::from(self.ignore_index),
            head_weights: self
                .head_weights
                .iter()
                .map(|&w| T::of(f64::from(w)))
                .collect(),
        }
    }
}

#[test]
fn the_fused_op_does_what_pytorch_does() {
    let goldens = Goldens::open("cosine_cross_entropy");
    let cases: Vec<LossCase> = serde_json::from_str(&goldens.cases).expect("the cases are JSON");
    assert!(cases.len() >= 40, "only {} cases", cases.len());
    for (number, case) in cases.iter().enumerate() {
        let (shape, x) = goldens.tensor(number, "embeddings");
        let (weight_shape, w) = goldens.tensor(number, "weights");
        let labels: Vec<i64> = goldens
            .values(number, "labels")
            .iter()
            .map(|&v| v as i64)
            .collect();
        let sizes = reference::Sizes {
            heads: shape[0],
            rows: shape[1],
            dim: shape[2],
            classes: weight_shape[1],
            active: case.active,
        };
        let scale = f64::from(case.scale);
        let options = case.reference_options();
        let cosine = case.cosine();
        let truth = reference::cosine_cross_entropy(&x, &w, &labels, sizes, cosine, &options);
        let gradients = reference::cosine_cross_entropy_backward(
            &x,
            &w,
            &labels,
            sizes,
            cosine,
            &options,
            &reference::Upstream::Total(1.0),
        );
        same("loss", &truth.loss, &goldens.values(number, "loss"));
        same("total", &[truth.total], &goldens.values(number, "total"));
        same("lse", &truth.lse, &goldens.values(number, "lse"));
        let (of_x, of_w) = (lengths(&x, sizes.dim), lengths(&w, sizes.dim));
        for (name, ours, of_rows) in [
            ("grad_embeddings", &gradients.embeddings, &of_x),
            ("grad_weights", &gradients.weights, &of_w),
        ] {
            // Times the rows' lengths, so that the huge gradients of a zero row do not hide the others.
            let times = |values: &[f64]| -> Vec<f64> {
                let rows = values.chunks(sizes.dim).zip(of_rows);
                rows.flat_map(|(row, length)| row.iter().map(move |v| v * length))
                    .collect()
            };
            same(name, &times(ours), &times(&goldens.values(number, name)));
        }
        let of_scale = goldens.values(number, "grad_scale");
        same("grad_scale", &gradients.scale, &of_scale);

        let (x32, w32) = (narrow(&x), narrow(&w));
        let options32 = case.reference_options::<f32>();
        let working =
            reference::cosine_cross_entropy(&x32, &w32, &labels, sizes, case.cosine(), &options32);
        let gradients32 = reference::cosine_cross_entropy_backward(
            &x32,
            &w32,
            &labels,
            sizes,
            case.cosine(),
            &options32,
            &reference::Upstream::Total(1.0),
        );
        for run in fused_runs((
            sizes.heads,
            sizes.rows,
            sizes.dim,
            sizes.classes,
            sizes.active,
        )) {
            let client = run.client;
            let inputs = cosine_cross_entropy::Inputs {
                embeddings: uploaded(client, &x, &shape),
                weights: uploaded(client, &w, &weight_shape),
                labels: targets(client, &labels),
            };
            let options = cosine_cross_entropy::Options {
                scale: case.scale,
                active: Some(case.active),
                allow_tf32: false,
                margin: Margin {
                    angular: case.angular as f32,
                    cosine: case.cosine as f32,
                },
                loss: LossOptions {
                    reduction: case.reduction,
                    label_smoothing: case.label_smoothing as f32,
                    ignore_index: case.ignore_index,
                    head_weights: Some(case.head_weights.clone()),
                },
                strategy: run.strategy,
            };
            let output = cosine_cross_entropy::forward(client, &inputs, &options).expect("valid");
            output.read_total(client).expect("labels are valid");
            let ours = cosine_cross_entropy::backward(
                client,
                &inputs,
                &options,
                &output,
                &Upstream::default(),
                Wanted::ALL,
            )
            .expect("valid");
            let share = Share::under(case.reduction, shape[1]);
            // A gradient, times its row's length, is a sum of logit gradients of at most scale · upstream each.
            let of_row = 2.0 * scale * share.of_row;
            let of_rows = of_row * (shape[1] as f64).sqrt();
            let (t, w) = (&gradients, &gradients32);
            let total = scale * share.of_total * shape[0] as f64;
            for (name, tensor, truth, working, magnitude) in [
                (
                    "loss",
                    Some(output.loss),
                    &truth.loss,
                    &working.loss,
                    scale * share.of_loss,
                ),
                (
                    "total",
                    Some(output.total),
                    &vec![truth.total],
                    &vec![working.total],
                    total,
                ),
                (
                    "grad_embeddings",
                    ours.embeddings,
                    &t.embeddings,
                    &w.embeddings,
                    of_row,
                ),
                (
                    "grad_weights",
                    ours.weights,
                    &t.weights,
                    &w.weights,
                    of_rows,
                ),
                ("grad_scale", ours.scale, &t.scale, &w.scale, of_rows),
            ] {
                Comparison {
                    name,
                    ours: &download(client, &tensor.expect("asked for")),
                    truth,
                    working,
                    dtype: Dtype::F32,
                    magnitude,
                    kept: match name {
                        "grad_embeddings" | "grad_weights" | "grad_scale" => run.unit_rows(),
                        _ => 0.0,
                    },
                    rounded: 0.0,
                    lengths: match name {
                        "grad_embeddings" => &of_x,
                        "grad_weights" => &of_w,
                        _ => &[],
                    },
                }
                .check()
                .unwrap_or_else(|message| panic!("case {number} on {run}: {message}"));
            }
        }
    }
}

#[derive(Deserialize)]
struct MeansCase {
    active: usize,
}

#[test]
fn class_means_are_those_of_the_loop_in_pytorch() {
    let goldens = Goldens::open("class_means");
    let cases: Vec<MeansCase> = serde_json::from_str(&goldens.cases).expect("the cases are JSON");
    for (number, case) in cases.iter().enumerate() {
        let (shape, x) = goldens.tensor(number, "embeddings");
        let (weight_shape, w) = goldens.tensor(number, "weights");
        let labels: Vec<i64> = goldens
            .values(number, "labels")
            .iter()
            .map(|&v| v as i64)
            .collect();
        let sizes = reference::Sizes {
            heads: shape[0],
            rows: shape[1],
            dim: shape[2],
            classes: weight_shape[1],
            active: case.active,
        };
        let truth = means_of::<f64>(&x, &w, &labels, sizes);
        same("means", &truth, &goldens.values(number, "means"));
        let working = means_of::<f32>(&narrow(&x), &narrow(&w), &labels, sizes);
        for run in runs() {
            let client = run.client;
            let options = class_means::Options {
                strategy: run.strategy,
                ..Default::default()
            };
            let mut sums = ClassSums::new(client, sizes.heads, sizes.active, sizes.dim, &options)
                .expect("valid");
            sums.accumulate(
                client,
                &uploaded(client, &x, &shape),
                &targets(client, &labels),
            )
            .expect("valid");
            let means = sums
                .means(client, &uploaded(client, &w, &weight_shape))
                .expect("valid");
            Comparison {
                name: "means",
                ours: &download(client, &means),
                truth: &truth,
                working: &working,
                dtype: Dtype::F32,
                magnitude: 0.0,
                kept: 0.0,
                rounded: 0.0,
                lengths: &[],
            }
            .check()
            .unwrap_or_else(|message| panic!("case {number} on {run}: {message}"));
        }
    }
}

fn means_of<T: reference::Real>(
    x: &[T],
    w: &[T],
    labels: &[i64],
    sizes: reference::Sizes,
) -> Vec<T> {
    let mut sums = reference::ClassSums::zeros(sizes);
    sums.add(x, labels, sizes, false);
    reference::class_means(&sums, w, sizes)
}

#[test]
fn reconstruction_does_what_pytorch_does() {
    let goldens = Goldens::open("reconstruction");
    for number in 0..3 {
        let (shape, whole) = goldens.tensor(number, "whole");
        let (first, second) = (
            goldens.values(number, "first"),
            goldens.values(number, "second"),
        );
        let ours = reference::reconstruction(&whole, &first, &second, shape[1]);
        let (of_whole, of_part) =
            reference::reconstruction_backward(&whole, &first, &second, shape[1], 1.0);
        same("loss", &[ours.loss], &goldens.values(number, "loss"));
        same(
            "grad_whole",
            &of_whole,
            &goldens.values(number, "grad_whole"),
        );
        same("grad_part", &of_part, &goldens.values(number, "grad_part"));
        let parts = [&whole, &first, &second].map(|part| narrow(part));
        let [w32, a32, b32] = &parts;
        let working = reference::reconstruction(w32, a32, b32, shape[1]);
        let (whole32, part32) = reference::reconstruction_backward(w32, a32, b32, shape[1], 1.0f32);
        let sum: Vec<f32> = a32.iter().zip(b32).map(|(a, b)| a + b).collect();
        for run in runs() {
            let client = run.client;
            let [whole, first, second] =
                [&whole, &first, &second].map(|part| uploaded(client, part, &shape));
            let inputs = reconstruction::Inputs {
                whole,
                first,
                second,
            };
            let options = reconstruction::Options {
                strategy: run.strategy,
            };
            let output = reconstruction::forward(client, &inputs, &options).expect("valid");
            let gradients = reconstruction::backward(
                client,
                &inputs,
                &options,
                &Upstream::default(),
                reconstruction::Wanted::ALL,
            )
            .expect("valid");
            let rows = shape[0] as f64;
            for (name, tensor, truth, working, magnitude, lengths) in [
                (
                    "loss",
                    Some(output.loss),
                    &vec![ours.loss],
                    &vec![working.loss],
                    1.0,
                    &[][..],
                ),
                (
                    "grad_whole",
                    gradients.whole,
                    &of_whole,
                    &whole32,
                    1.0 / rows,
                    &lengths(&parts[0], shape[1]),
                ),
                (
                    "grad_part",
                    gradients.part,
                    &of_part,
                    &part32,
                    1.0 / rows,
                    &lengths(&sum, shape[1]),
                ),
            ] {
                Comparison {
                    name,
                    ours: &download(client, &tensor.expect("asked for")),
                    truth,
                    working,
                    dtype: Dtype::F32,
                    magnitude,
                    kept: run.unit_rows(),
                    rounded: 0.0,
                    lengths,
                }
                .check()
                .unwrap_or_else(|message| panic!("case {number} on {run}: {message}"));
            }
        }
    }
}

fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&v| v as f32).collect()
}

fn uploaded(client: &Client, values: &[f64], shape: &[usize]) -> TensorHandle {
    f32s(client, &narrow(values), shape)
}

fn targets(client: &Client, values: &[i64]) -> TensorHandle {
    let values: Vec<i32> = values.iter().map(|&label| label as i32).collect();
    labels(client, &values)
}
