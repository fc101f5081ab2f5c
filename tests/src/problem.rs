//! Random problems: sizes off every multiple, values and labels of several kinds, all from one seed.

use std::fmt;

use cubecl::client::Client;
use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::CubeElement;
use cubecl::std::tensor::TensorHandle;
use half::{bf16, f16};
use proptest::prelude::*;
use protohead::cosine_cross_entropy::Margin;
use protohead_reference as reference;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

pub use crate::dtype::{Dtype, LabelDtype};

/// What embeddings and class weights look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Values {
    /// Uniform in −1..1.
    Uniform,
    /// Every class weight is a row of the embeddings: cosines of 1, peaky softmax.
    Copies,
    /// Rows of very different length.
    Scaled,
    /// Some rows are zero.
    ZeroRows,
}

/// What labels look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LabelKind {
    /// Any class.
    Classes,
    /// One in five ignored.
    SomeIgnored,
    /// All ignored.
    AllIgnored,
    /// The first and the last class only.
    Ends,
}

/// A problem, printed as the one line that has [`problem`] give it alone.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Problem {
    /// H, N, D, C, K
    pub sizes: (usize, usize, usize, usize, usize),
    /// Of embeddings and class weights.
    pub dtype: Dtype,
    /// Of labels.
    pub label_dtype: LabelDtype,
    /// Elements between a row's end and the next row.
    pub gap: usize,
    /// Tensors of rank 3 are `[rows, heads, columns]` in memory.
    pub interleaved: bool,
    /// What embeddings and class weights look like.
    pub values: Values,
    /// What labels look like.
    pub labels: LabelKind,
    /// What cosines are multiplied with.
    pub scale: f32,
    /// Of a row's own class in the fused op, angular and cosine; none where the scale is not positive.
    #[serde(default)]
    pub margin: (f32, f32),
    /// How rows become a loss.
    pub reduction: protohead::Reduction,
    /// ε
    pub smoothing: f32,
    /// The ignored label; may be a valid class.
    pub ignore_index: i32,
    /// Whether heads are weighted.
    pub weighted: bool,
    /// Of everything random.
    pub seed: u64,
}

impl Problem {
    /// Of these sizes, and of the plainest kind.
    pub fn plain(sizes: (usize, usize, usize, usize, usize)) -> Self {
        Self {
            sizes,
            dtype: Dtype::F32,
            label_dtype: LabelDtype::I32,
            gap: 0,
            interleaved: false,
            values: Values::Uniform,
            labels: LabelKind::Classes,
            scale: 16.0,
            margin: (0.0, 0.0),
            reduction: protohead::Reduction::Mean,
            smoothing: 0.0,
            ignore_index: -100,
            weighted: false,
            seed: 1,
        }
    }
}

/// The environment variable that names the only problem to try.
pub const ONLY: &str = "PROTOHEAD_PROBLEM";

impl fmt::Debug for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = serde_json::to_string(self).map_err(|_| fmt::Error)?;
        write!(f, "{ONLY}='{text}'")
    }
}

/// Sizes up to a little more than two tiles of any variant, mostly off every multiple.
pub fn sizes() -> impl proptest::strategy::Strategy<Value = (usize, usize, usize, usize, usize)> {
    let length = |limit: usize| {
        prop_oneof![
            1 => Just(1usize),
            4 => 2..limit / 4,
            2 => limit / 4..limit,
        ]
    };
    (1usize..4, length(140), length(150), length(160))
        .prop_flat_map(|(h, n, d, c)| (Just(h), Just(n), Just(d), Just(c), 1..=c))
}

/// Any problem; only the one of the environment variable [`ONLY`], if it is set.
pub fn problem() -> BoxedStrategy<Problem> {
    match std::env::var(ONLY) {
        Ok(text) => {
            Just(serde_json::from_str(&text).expect("a problem, as a failure prints it")).boxed()
        }
        Err(_) => any_problem().boxed(),
    }
}

fn any_problem() -> impl proptest::strategy::Strategy<Value = Problem> {
    use protohead::Reduction;
    let dtypes = (
        prop_oneof![3 => Just(Dtype::F32), 1 => Just(Dtype::F16), 1 => Just(Dtype::Bf16)],
        prop_oneof![
            Just(LabelDtype::I32),
            Just(LabelDtype::I64),
            Just(LabelDtype::U32)
        ],
        prop_oneof![3 => Just(0usize), 1 => Just(1), 1 => Just(16)],
        prop_oneof![3 => Just(false), 1 => Just(true)],
    );
    let data = (
        prop_oneof![
            3 => Just(Values::Uniform),
            1 => Just(Values::Copies),
            1 => Just(Values::Scaled),
            1 => Just(Values::ZeroRows)
        ],
        prop_oneof![
            3 => Just(LabelKind::Classes),
            2 => Just(LabelKind::SomeIgnored),
            1 => Just(LabelKind::AllIgnored),
            1 => Just(LabelKind::Ends)
        ],
        any::<u64>(),
    );
    let options = (
        prop_oneof![Just(16.0f32), Just(1.0), Just(64.0), Just(-4.0)],
        prop_oneof![
            3 => Just((0.0f32, 0.0f32)),
            1 => Just((0.5, 0.0)),
            1 => Just((0.0, 0.35)),
            1 => Just((1.4, 0.1))
        ],
        prop_oneof![
            Just(Reduction::Mean),
            Just(Reduction::Sum),
            Just(Reduction::None)
        ],
        prop_oneof![2 => Just(0.0f32), 1 => Just(0.1), 1 => Just(1.0)],
        prop_oneof![3 => Just(-100i32), 1 => Just(0)],
        any::<bool>(),
    );
    (sizes(), dtypes, data, options).prop_map(
        |(
            sizes,
            (dtype, label_dtype, gap, interleaved),
            (values, labels, seed),
            (scale, margin, reduction, smoothing, ignore_index, weighted),
        )| Problem {
            sizes,
            dtype,
            label_dtype,
            gap,
            interleaved,
            values,
            labels,
            scale,
            margin: if scale > 0.0 { margin } else { (0.0, 0.0) },
            reduction,
            smoothing,
            ignore_index,
            weighted,
            seed,
        },
    )
}

/// The numbers of a problem, already rounded to its dtype.
#[derive(Clone)]
pub struct Data {
    /// `[H, N, D]`
    pub embeddings: Vec<f32>,
    /// `[H, C, D]`
    pub weights: Vec<f32>,
    /// `[N]`
    pub labels: Vec<i64>,
    /// `[H]`
    pub head_weights: Vec<f32>,
    /// `[H]`, or `[H, N]` without a reduction.
    pub upstream: Vec<f32>,
}

impl Problem {
    /// The reference's sizes.
    pub fn reference_sizes(&self) -> reference::Sizes {
        let (heads, rows, dim, classes, active) = self.sizes;
        reference::Sizes {
            heads,
            rows,
            dim,
            classes,
            active,
        }
    }

    /// A generator that depends on the problem's seed and a purpose.
    pub fn rng(&self, purpose: u64) -> ChaCha8Rng {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(purpose);
        rng
    }

    /// `count` numbers between −1 and 1, rounded to the dtype.
    pub fn uniform(&self, purpose: u64, count: usize) -> Vec<f32> {
        let mut rng = self.rng(purpose);
        (0..count)
            .map(|_| self.dtype.round(rng.random_range(-1.0f32..1.0)))
            .collect()
    }

    /// The numbers.
    pub fn data(&self) -> Data {
        let (heads, rows, dim, classes, active) = self.sizes;
        let mut embeddings = self.uniform(1, heads * rows * dim);
        let mut weights = self.uniform(2, heads * classes * dim);
        let mut rng = self.rng(3);
        match self.values {
            Values::Uniform => {}
            Values::Copies => {
                for h in 0..heads {
                    for c in 0..classes {
                        let from = (h * rows + c % rows) * dim;
                        weights[(h * classes + c) * dim..][..dim]
                            .copy_from_slice(&embeddings[from..][..dim]);
                    }
                }
            }
            Values::Scaled => {
                for row in embeddings.chunks_mut(dim).chain(weights.chunks_mut(dim)) {
                    let factor = [1e-3f32, 1.0, 30.0][rng.random_range(0..3)];
                    row.iter_mut()
                        .for_each(|v| *v = self.dtype.round(*v * factor));
                }
            }
            Values::ZeroRows => {
                for row in embeddings.chunks_mut(dim).chain(weights.chunks_mut(dim)) {
                    if rng.random_bool(0.2) {
                        row.fill(0.0);
                    }
                }
            }
        }
        let last = active as i64 - 1;
        let mut ignored = i64::from(self.ignore_index);
        if self.label_dtype == LabelDtype::U32 && ignored < 0 {
            ignored = last; // this dtype cannot hold the mark, so no row is ignored
        }
        let labels = (0..rows)
            .map(|_| match self.labels {
                LabelKind::Classes => rng.random_range(0..=last),
                LabelKind::SomeIgnored if rng.random_bool(0.2) => ignored,
                LabelKind::SomeIgnored => rng.random_range(0..=last),
                LabelKind::AllIgnored => ignored,
                LabelKind::Ends => last * i64::from(rng.random_bool(0.5)),
            })
            .collect();
        let upstream = match self.reduction {
            protohead::Reduction::None => heads * rows,
            _ => heads,
        };
        Data {
            embeddings,
            weights,
            labels,
            head_weights: if self.weighted {
                (0..heads).map(|_| rng.random_range(-1.0f32..2.0)).collect()
            } else {
                vec![1.0; heads]
            },
            upstream: (0..upstream)
                .map(|_| rng.random_range(-2.0f32..2.0))
                .collect(),
        }
    }

    /// How cosines become logits, of the reference.
    pub fn cosine<T: reference::Real>(&self) -> reference::Cosine<T> {
        let of = |value: f32| T::of(f64::from(value));
        reference::Cosine {
            scale: of(self.scale),
            margin: reference::Margin {
                angular: of(self.margin.0),
                cosine: of(self.margin.1),
                ..reference::Margin::none()
            },
        }
    }

    /// Its margin.
    pub fn margin(&self) -> Margin {
        Margin {
            angular: self.margin.0,
            cosine: self.margin.1,
        }
    }

    /// The loss options of the kernels.
    pub fn options(&self, data: &Data) -> protohead::LossOptions {
        protohead::LossOptions {
            reduction: self.reduction,
            label_smoothing: self.smoothing,
            ignore_index: self.ignore_index,
            head_weights: self.weighted.then(|| data.head_weights.clone()),
        }
    }

    /// The loss options of the reference.
    pub fn reference_options<T: reference::Real>(&self, data: &Data) -> reference::LossOptions<T> {
        reference::LossOptions {
            reduction: match self.reduction {
                protohead::Reduction::None => reference::Reduction::None,
                protohead::Reduction::Sum => reference::Reduction::Sum,
                protohead::Reduction::Mean => reference::Reduction::Mean,
            },
            label_smoothing: T::of(f64::from(self.smoothing)),
            ignore_index: i64::from(self.ignore_index),
            head_weights: data
                .head_weights
                .iter()
                .map(|&w| T::of(f64::from(w)))
                .collect(),
        }
    }

    /// Whether the device has the problem's dtypes.
    pub fn supported(&self, client: &Client) -> bool {
        client.properties().supports_type(self.dtype.elem())
            && client.properties().supports_type(self.label_dtype.elem())
    }

    /// Uploads a float tensor, its rows `gap` elements apart and perhaps interleaved; the gaps hold NaN.
    pub fn upload(&self, client: &Client, values: &[f32], shape: &[usize]) -> TensorHandle {
        let (outer, columns) = (shape.len() - 2, shape[shape.len() - 1]);
        let stride = columns + self.gap;
        let heads = shape[..outer].iter().product::<usize>();
        let rows = shape[outer];
        // Of a head, and of a row.
        let steps = match self.interleaved {
            true => [stride, heads * stride],
            false => [rows * stride, stride],
        };
        let mut spread = vec![f32::NAN; heads * rows * stride];
        for (i, row) in values.chunks(columns).enumerate() {
            let at = i / rows * steps[0] + i % rows * steps[1];
            spread[at..at + columns].copy_from_slice(row);
        }
        let mut strides = vec![steps[1], 1];
        if outer == 1 {
            strides.insert(0, steps[0]);
        }
        let handle = client.create_from_slice(&self.dtype.bytes(&spread));
        TensorHandle::new(
            handle,
            shape.to_vec(),
            strides,
            cubecl::ir::Type::from(self.dtype.elem()),
        )
    }

    /// Uploads the labels.
    pub fn upload_labels(&self, client: &Client, labels: &[i64]) -> TensorHandle {
        self.label_dtype.upload(client, labels)
    }
}

/// Reads a contiguous float tensor of any of the dtypes.
///
/// # Panics
/// If the device failed.
pub fn download(client: &Client, tensor: &TensorHandle) -> Vec<f64> {
    let bytes = client
        .read_one(tensor.handle.clone())
        .expect("the device can be read");
    match tensor.dtype {
        ElemType::Float(FloatKind::F16) => bytes
            .chunks_exact(2)
            .map(|b| f16::from_le_bytes([b[0], b[1]]).to_f64())
            .collect(),
        ElemType::Float(FloatKind::BF16) => bytes
            .chunks_exact(2)
            .map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f64())
            .collect(),
        _ => f32::from_bytes(&bytes)
            .iter()
            .map(|&v| f64::from(v))
            .collect(),
    }
}

/// Widens.
pub fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest! {
        #[test]
        fn what_a_failure_prints_is_one_line_that_gives_the_problem_again(problem in any_problem()) {
            // As proptest prints it, which asks for many lines.
            let printed = format!("{problem:#?}");
            prop_assert!(!printed.contains('\n'), "{}", printed);
            let text = printed
                .strip_prefix("PROTOHEAD_PROBLEM='")
                .and_then(|rest| rest.strip_suffix('\''));
            let again: Problem = serde_json::from_str(text.expect("quoted")).expect("a problem");
            prop_assert_eq!(again, problem);
        }
    }
}
