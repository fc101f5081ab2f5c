//! The dtypes of a problem.

use cubecl::client::Client;
use cubecl::ir::{ElemType, FloatKind, IntKind, UIntKind};
use cubecl::prelude::CubeElement;
use cubecl::std::tensor::TensorHandle;
use half::{bf16, f16};
use serde::{Deserialize, Serialize};

/// The dtype of embeddings, class weights and logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Dtype {
    /// f32
    F32,
    /// f16
    F16,
    /// bf16
    Bf16,
}

impl Dtype {
    /// The kernels' name of it.
    pub fn elem(self) -> ElemType {
        ElemType::Float(match self {
            Self::F32 => FloatKind::F32,
            Self::F16 => FloatKind::F16,
            Self::Bf16 => FloatKind::BF16,
        })
    }

    /// The nearest value of this dtype.
    pub fn round(self, value: f32) -> f32 {
        match self {
            Self::F32 => value,
            Self::F16 => f16::from_f32(value).to_f32(),
            Self::Bf16 => bf16::from_f32(value).to_f32(),
        }
    }

    pub(crate) fn bytes(self, values: &[f32]) -> Vec<u8> {
        match self {
            Self::F32 => f32::as_bytes(values).to_vec(),
            Self::F16 => values
                .iter()
                .flat_map(|&v| f16::from_f32(v).to_le_bytes())
                .collect(),
            Self::Bf16 => values
                .iter()
                .flat_map(|&v| bf16::from_f32(v).to_le_bytes())
                .collect(),
        }
    }
}

/// The dtype of labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LabelDtype {
    /// i32
    I32,
    /// i64
    I64,
    /// u32; a negative label is not possible
    U32,
}

impl LabelDtype {
    /// As CubeCL calls it.
    pub fn elem(self) -> ElemType {
        match self {
            LabelDtype::I32 => ElemType::Int(IntKind::I32),
            LabelDtype::I64 => ElemType::Int(IntKind::I64),
            LabelDtype::U32 => ElemType::UInt(UIntKind::U32),
        }
    }

    /// Labels of this dtype, on the device.
    pub fn upload(self, client: &Client, labels: &[i64]) -> TensorHandle {
        let bytes = match self {
            LabelDtype::I64 => i64::as_bytes(labels).to_vec(),
            LabelDtype::I32 => labels
                .iter()
                .flat_map(|&l| (l as i32).to_le_bytes())
                .collect(),
            LabelDtype::U32 => labels
                .iter()
                .flat_map(|&l| (l as u32).to_le_bytes())
                .collect(),
        };
        TensorHandle::new_contiguous(
            [labels.len()],
            client.create_from_slice(&bytes),
            self.elem(),
        )
    }
}
