//! Bad input: a typed error with the numbers in it, before anything is launched; bad labels are harmless and reported.

mod buffers;
mod labels;
mod not_finite;
mod operands;
mod together;
mod variants;

use cubecl::client::Client;
use cubecl::std::tensor::TensorHandle;
use protohead::cosine_cross_entropy::Inputs;

use crate::support::{f32s, labels};

pub(super) fn floats(client: &Client, shape: &[usize]) -> TensorHandle {
    let count = shape.iter().product();
    let values: Vec<f32> = (0..count)
        .map(|i| ((i * 37 + 11) % 17) as f32 - 8.0)
        .collect();
    f32s(client, &values, shape)
}

pub(super) fn inputs(client: &Client) -> Inputs {
    Inputs {
        embeddings: floats(client, &[2, 4, 5]),
        weights: floats(client, &[2, 3, 5]),
        labels: labels(client, &[0, 2, 1, 0]),
    }
}
