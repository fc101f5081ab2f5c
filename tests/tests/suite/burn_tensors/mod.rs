//! The ops on Burn tensors: through fusion and autodiff they give the reference's numbers.

mod heads;
mod ops;
mod refused;
mod scale;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use protohead::burn::{CosineHeads, CosineHeadsConfig, Margin};
use protohead_reference as reference;
use protohead_tests::devices::Tested;

const SIZES: reference::Sizes = reference::Sizes {
    heads: 3,
    rows: 7,
    dim: 6,
    classes: 5,
    active: 4,
};
const LABELS: [i64; 7] = [0, 3, 1, -100, 2, 2, 0];
/// Of [`heads`]; not the default.
const SCALE: f64 = 8.0;

/// Those that this build and machine have, as Burn's; Burn knows none that are emulated.
fn devices() -> Vec<Device> {
    let devices = protohead_tests::devices::devices();
    let there = devices.iter().filter(|tested| !tested.is_emulated());
    let there: Vec<Device> = there.map(device_of).collect();
    assert!(!there.is_empty(), "Burn knows no device that is emulated");
    there
}

fn device_of(tested: &Tested) -> Device {
    match tested.name {
        #[cfg(feature = "cpu")]
        "cpu" => Device::cpu(),
        #[cfg(feature = "wgpu")]
        "wgpu" => Device::wgpu(burn::tensor::DeviceKind::DefaultDevice),
        #[cfg(feature = "cuda")]
        "cuda" => Device::cuda(0),
        other => panic!("{other} is reached, but the feature protohead-tests/{other} is off"),
    }
}

fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    (0..count)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

fn tensor<const D: usize>(values: &[f32], shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), device)
}

fn labels(device: &Device) -> Tensor<1, Int> {
    labels_of(&LABELS, device)
}

fn labels_of(labels: &[i64], device: &Device) -> Tensor<1, Int> {
    let values: Vec<i32> = labels.iter().map(|&l| l as i32).collect();
    Tensor::from_data(TensorData::new(values, [labels.len()]), device)
}

fn read<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.try_into_vec_as::<f32>().expect("the device works")
}

/// f32 against f64: a few rounding errors of sums of this length.
fn near(name: &str, ours: &[f32], truth: &[f64]) {
    near_by(name, ours, truth, 4e-6);
}

fn near_by(name: &str, ours: &[f32], truth: &[f64], relative: f64) {
    assert_eq!(ours.len(), truth.len(), "{name}");
    let size = truth.iter().map(|v| v * v).sum::<f64>().sqrt();
    let error = ours
        .iter()
        .zip(truth)
        .map(|(&a, b)| (f64::from(a) - b).powi(2))
        .sum::<f64>()
        .sqrt();
    assert!(
        error <= relative * size + 1e-7,
        "{name}: error {error:e} of {size:e}"
    );
}

/// Numbers as this dtype has them.
fn rounded(values: &[f32], dtype: DType) -> Vec<f64> {
    let round = |&v: &f32| match dtype {
        DType::F16 => half::f16::from_f32(v).to_f64(),
        DType::BF16 => half::bf16::from_f32(v).to_f64(),
        _ => f64::from(v),
    };
    values.iter().map(round).collect()
}

/// Both margins, and the reference's cosine of [`SCALE`] with them.
fn margin() -> (Margin, reference::Cosine<f64>) {
    let margin = Margin {
        angular: 0.5,
        cosine: 0.25,
    };
    let cosine = reference::Cosine {
        scale: SCALE,
        margin: reference::Margin {
            angular: 0.5,
            cosine: 0.25,
            ..reference::Margin::none()
        },
    };
    (margin, cosine)
}

fn heads(device: &Device, weights: &[f32]) -> CosineHeads {
    let mut heads = CosineHeadsConfig::new(3, 5, 6)
        .with_active(Some(4))
        .with_scale(SCALE)
        .init(device);
    let values = tensor(weights, [3, 5, 6], device);
    heads.weight = heads.weight.map(|_| values.require_grad());
    heads
}
