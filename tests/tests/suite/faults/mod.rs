//! Bad input: a typed error with the numbers in it, before anything is launched; bad labels are harmless and reported.

mod labels;
mod not_finite;
mod operands;
mod variants;

use cubecl::client::Client;
use cubecl::ir::{ElemType, IntKind};
use cubecl::prelude::CubeElement;
use cubecl::std::tensor::TensorHandle;
use protohead::cosine_cross_entropy::Inputs;
use protohead_tests::problem::Dtype;

pub(super) fn floats(client: &Client, shape: &[usize]) -> TensorHandle {
    let count = shape.iter().product();
    let values: Vec<f32> = (0..count)
        .map(|i| ((i * 37 + 11) % 17) as f32 - 8.0)
        .collect();
    TensorHandle::new_contiguous(
        shape.to_vec(),
        client.create_from_slice(f32::as_bytes(&values)),
        Dtype::F32.elem(),
    )
}

pub(super) fn labels(client: &Client, labels: &[i32]) -> TensorHandle {
    TensorHandle::new_contiguous(
        [labels.len()],
        client.create_from_slice(i32::as_bytes(labels)),
        ElemType::Int(IntKind::I32),
    )
}

pub(super) fn inputs(client: &Client) -> Inputs {
    Inputs {
        embeddings: floats(client, &[2, 4, 5]),
        weights: floats(client, &[2, 3, 5]),
        labels: labels(client, &[0, 2, 1, 0]),
    }
}
