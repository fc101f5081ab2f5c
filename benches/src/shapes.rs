//! Named shapes and random data.

use crate::Group;

/// The sizes of a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

impl Shape {
    /// A few-shot keyword spotter's batch, and three larger ones.
    pub const HEADS: [Self; 4] = [
        shape("seed", [3, 128, 256, 35, 20]),
        shape("mid", [3, 1024, 256, 1000, 1000]),
        shape("large", [3, 1024, 512, 10_000, 10_000]),
        shape("wide", [1, 512, 512, 100_000, 100_000]),
    ];
    /// Averages over a training set: of a few classes, and of many.
    pub const PROTOTYPES: [Self; 2] = [
        shape("proto", [3, 20_000, 256, 20, 20]),
        shape("proto_many", [1, 200_000, 256, 20_000, 20_000]),
    ];
    /// Twice the rows of `proto_many`, to see that time is linear in them.
    pub const PROTO_TWICE: Self = shape("proto_twice", [1, 400_000, 256, 20_000, 20_000]);
    /// Vocabularies and face sets, for GPUs.
    pub const VOCABULARIES: [Self; 3] = [
        shape("classes_100k", [1, 4096, 512, 100_000, 100_000]),
        shape("classes_360k", [1, 4096, 512, 360_000, 360_000]),
        shape("heads_10k", [3, 8192, 256, 10_000, 10_000]),
    ];
    /// What every case is checked on: off every multiple.
    pub const SMALL: Self = shape("small", [2, 37, 19, 13, 11]);
    /// What our own cases are checked on besides: too many classes for the variant of small problems.
    pub const NOT_SMALL: Self = shape("not_small", [2, 37, 19, 301, 299]);

    /// The shape of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::HEADS
            .into_iter()
            .chain(Self::PROTOTYPES)
            .chain([Self::PROTO_TWICE])
            .chain(Self::VOCABULARIES)
            .find(|shape| shape.name == name)
    }
}

/// Random operands on the host, the ones that a group takes.
pub struct Data {
    /// `[heads, rows, dim]`; `[3, rows, dim]` for the reconstruction.
    pub embeddings: Vec<f32>,
    /// `[heads, classes, dim]`
    pub weights: Vec<f32>,
    /// `[heads, rows, active]`
    pub logits: Vec<f32>,
    /// `[rows]`
    pub labels: Vec<i32>,
}

impl Data {
    /// Other numbers for every seed.
    pub fn new(group: Group, shape: &Shape, seed: u64) -> Self {
        let mut random = random(seed);
        let Shape {
            heads,
            rows,
            dim,
            classes,
            active,
            ..
        } = *shape;
        let heads_of = if group == Group::Reconstruction {
            3
        } else {
            heads
        };
        let on_logits = group == Group::CrossEntropy;
        let labels = (0..rows)
            .map(|_| ((random() + 0.5) * active as f32) as i32)
            .collect();
        let mut floats = |wanted: bool, count: usize| -> Vec<f32> {
            let count = if wanted { count } else { 0 };
            (0..count).map(|_| random()).collect()
        };
        Self {
            embeddings: floats(!on_logits, heads_of * rows * dim),
            weights: floats(
                !on_logits && group != Group::Reconstruction,
                heads * classes * dim,
            ),
            logits: floats(on_logits, heads * rows * active),
            labels,
        }
    }
}

/// Numbers between −0.5 and 0.5, by a linear congruential generator.
fn random(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    }
}
