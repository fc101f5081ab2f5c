//! Named shapes and random problems for the benches.

use cubecl::client::Client;
use cubecl::ir::{ElemType, FloatKind, IntKind};
use cubecl::prelude::CubeElement;
use cubecl::std::tensor::TensorHandle;
use protohead::cosine_cross_entropy::Inputs;

/// The sizes of a problem.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// How bench ids name it.
    pub name: &'static str,
    /// H
    pub heads: usize,
    /// N
    pub rows: usize,
    /// D
    pub dim: usize,
    /// C
    pub classes: usize,
    /// K
    pub active: usize,
}

const fn shape(name: &'static str, sizes: [usize; 5]) -> Shape {
    let [heads, rows, dim, classes, active] = sizes;
    Shape {
        name,
        heads,
        rows,
        dim,
        classes,
        active,
    }
}

/// A few-shot keyword spotter's batch, and three larger ones.
pub const SHAPES: [Shape; 4] = [
    shape("seed", [3, 128, 256, 35, 20]),
    shape("mid", [3, 1024, 256, 1000, 1000]),
    shape("large", [3, 1024, 512, 10_000, 10_000]),
    shape("wide", [1, 512, 512, 100_000, 100_000]),
];

impl Shape {
    /// The floating-point operations of a forward and backward pass that recompute nothing: `6·H·N·D·K`.
    pub fn flops(&self) -> u64 {
        6 * (self.heads * self.rows * self.dim * self.active) as u64
    }

    /// Random f32 operands on the device.
    pub fn inputs(&self, client: &Client, seed: u64) -> Inputs {
        let Self {
            heads,
            rows,
            dim,
            classes,
            active,
            ..
        } = *self;
        let mut random = random(seed);
        let mut floats = |shape: [usize; 3]| {
            let values: Vec<f32> = (0..shape.iter().product::<usize>())
                .map(|_| random())
                .collect();
            TensorHandle::new_contiguous(
                shape,
                client.create_from_slice(f32::as_bytes(&values)),
                ElemType::Float(FloatKind::F32),
            )
        };
        let embeddings = floats([heads, rows, dim]);
        let weights = floats([heads, classes, dim]);
        let labels: Vec<i32> = (0..rows).map(|n| (n * 7919 % active) as i32).collect();
        Inputs {
            embeddings,
            weights,
            labels: TensorHandle::new_contiguous(
                [rows],
                client.create_from_slice(i32::as_bytes(&labels)),
                ElemType::Int(IntKind::I32),
            ),
        }
    }
}

/// Numbers between −0.5 and 0.5, by a linear congruential generator.
fn random(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed;
    move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    }
}
