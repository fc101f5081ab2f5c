//! One line of a table: what is computed, at which shape, by whom.

use std::fmt;

use crate::ours::{Dtype, Step};
use crate::{Data, Ran, Shape, naive, ours, tensors};

/// What is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// Logits from embeddings and class weights.
    CosineLogits,
    /// Loss and gradient of given logits.
    CrossEntropy,
    /// The fused loss.
    FusedForward,
    /// The fused loss and both gradients.
    Fused,
    /// The same with ArcFace's margin.
    Margin,
    /// Prototype averaging.
    ClassMeans,
    /// The reconstruction loss and its gradients.
    Reconstruction,
}

impl Group {
    /// In the order of the tables.
    pub const ALL: [Self; 7] = [
        Self::CosineLogits,
        Self::CrossEntropy,
        Self::FusedForward,
        Self::Fused,
        Self::Margin,
        Self::ClassMeans,
        Self::Reconstruction,
    ];

    /// How bench ids name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::CosineLogits => "cosine_logits",
            Self::CrossEntropy => "cross_entropy",
            Self::FusedForward => "cosine_cross_entropy_forward",
            Self::Fused => "cosine_cross_entropy",
            Self::Margin => "cosine_cross_entropy_margin",
            Self::ClassMeans => "class_means",
            Self::Reconstruction => "reconstruction",
        }
    }

    /// Whether it multiplies matrices.
    pub fn has_product(self) -> bool {
        matches!(
            self,
            Self::CosineLogits | Self::FusedForward | Self::Fused | Self::Margin
        )
    }

    /// Floating-point operations of the products, where there are any: recomputation does not count.
    pub fn flops(self, shape: &Shape) -> Option<u64> {
        let product = 2 * (shape.heads * shape.rows * shape.dim * shape.active) as u64;
        match self {
            Self::CosineLogits | Self::FusedForward => Some(product),
            Self::Fused | Self::Margin => Some(3 * product),
            _ => None,
        }
    }

    /// Radians between a row and its class that its loss adds.
    pub(crate) fn angular_margin(self) -> f32 {
        match self {
            Self::Margin => 0.5,
            _ => 0.0,
        }
    }

    /// Bytes that have to be read and written once, where memory is what limits.
    pub fn bytes(self, shape: &Shape) -> Option<u64> {
        let float = size_of::<f32>() as u64;
        let embeddings = (shape.heads * shape.rows * shape.dim) as u64;
        let prototypes = (shape.heads * shape.active * shape.dim) as u64;
        match self {
            Self::ClassMeans => Some((embeddings + prototypes) * float),
            // The logits are read twice, their gradient is written.
            Self::CrossEntropy => {
                Some(3 * (shape.heads * shape.rows * shape.active) as u64 * float)
            }
            // Three inputs, read in the forward and the backward pass; two gradients, since two parts share one.
            Self::Reconstruction => Some(8 * (shape.rows * shape.dim) as u64 * float),
            _ => None,
        }
    }
}

/// By whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// This library.
    Protohead,
    /// This library, with f32 operands that it may round to TF32.
    Tf32,
    /// This library, with bf16 operands.
    Bf16,
    /// This library, with f16 operands.
    F16,
    /// This library, a step recorded before and replayed on fresh operands.
    Captured,
    /// This library's module `CosineHeads`, through Burn's autodiff.
    ThroughBurn,
    /// This library's logits, then its cross-entropy.
    Unfused,
    /// Burn's tensor ops on the same device, fusion and autotune on, head by head in contiguous matrices.
    Burn,
    /// The same on Burn's CPU backend flex.
    Flex,
    /// The reference.
    Naive,
}

impl Who {
    const ALL: [Self; 10] = [
        Self::Protohead,
        Self::Tf32,
        Self::Bf16,
        Self::F16,
        Self::Captured,
        Self::ThroughBurn,
        Self::Unfused,
        Self::Burn,
        Self::Flex,
        Self::Naive,
    ];

    /// How bench ids name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Protohead => "protohead",
            Self::Tf32 => "protohead_tf32",
            Self::Bf16 => "protohead_bf16",
            Self::F16 => "protohead_f16",
            Self::Captured => "protohead_captured",
            Self::ThroughBurn => "protohead_burn",
            Self::Unfused => "unfused",
            Self::Burn => "burn",
            Self::Flex => "flex",
            Self::Naive => "naive",
        }
    }
}

/// One line.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// What is computed.
    pub group: Group,
    /// At which sizes.
    pub shape: Shape,
    /// By whom.
    pub who: Who,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (group, who) = (self.group.name(), self.who.name());
        write!(f, "{group}/{}/{who}", self.shape.name)
    }
}

impl Case {
    /// Every case that is measured.
    pub fn all() -> Vec<Self> {
        let mut cases = Vec::new();
        for group in Group::ALL {
            let shapes: Vec<Shape> = match group {
                Group::ClassMeans => Shape::HEADS
                    .into_iter()
                    .chain(Shape::PROTOTYPES)
                    .chain([Shape::PROTO_TWICE])
                    .collect(),
                _ => Shape::HEADS.to_vec(),
            };
            for shape in shapes {
                for who in Who::ALL {
                    let case = Self { group, shape, who };
                    if case.is_measured() {
                        cases.push(case);
                    }
                }
            }
        }
        cases
    }

    /// `unfused` is an alternative to the fused op only; `naive` where it ends in seconds. On CubeCL's CPU runtime Burn's
    /// matmul tunes itself for minutes at any shape but the smallest, and then takes seconds (no fewer where the class weights are
    /// stored as `[D, K]`): products are shown at `seed`. A CPU captures nothing, and rounds nothing to TF32.
    fn is_measured(&self) -> bool {
        let fused = matches!(self.group, Group::FusedForward | Group::Fused);
        match self.who {
            Who::Unfused => fused,
            Who::Captured | Who::Tf32 => self.group == Group::Fused && !ours::on_cpu(),
            Who::Bf16 | Who::F16 | Who::ThroughBurn => self.group == Group::Fused,
            Who::Burn => self.shape.name == "seed" || !self.group.has_product() || !ours::on_cpu(),
            Who::Naive if self.group.has_product() => self.shape.name == "seed",
            Who::Naive => ["seed", "mid", "proto"].contains(&self.shape.name),
            _ => true,
        }
    }

    /// The case of this id.
    pub fn named(id: &str) -> Option<Self> {
        let mut parts = id.split('/');
        let group = parts.next()?;
        let group = Group::ALL.into_iter().find(|g| g.name() == group)?;
        let shape = Shape::named(parts.next()?)?;
        let who = parts.next()?;
        let who = Who::ALL.into_iter().find(|w| w.name() == who)?;
        Some(Self { group, shape, who })
    }

    /// Runs once on numbers of this seed.
    pub fn run(&self, seed: u64, keep: bool) -> Ran {
        let data = Data::new(self.group, &self.shape, seed);
        if let Some(step) = self.step(&data) {
            return step.run(keep);
        }
        match self.who {
            Who::ThroughBurn => tensors::run_through_burn(&self.shape, &data, keep),
            Who::Burn => tensors::run(&tensors::cube(), self.group, &self.shape, &data, keep),
            Who::Flex => tensors::run(&tensors::flex(), self.group, &self.shape, &data, keep),
            _ => naive::run(self.group, &self.shape, &data, keep),
        }
    }

    /// Ours, with its operands on the device, to be run again and again; nobody else's.
    pub fn step_of(&self, seed: u64) -> Option<Step> {
        self.step(&Data::new(self.group, &self.shape, seed))
    }

    fn step(&self, data: &Data) -> Option<Step> {
        let (group, shape) = (self.group, &self.shape);
        let of = |dtype| Some(ours::step(group, shape, data, dtype));
        match self.who {
            Who::Protohead => of(Dtype::F32),
            Who::Tf32 => of(Dtype::Tf32),
            Who::Bf16 => of(Dtype::Bf16),
            Who::F16 => of(Dtype::F16),
            Who::Captured => Some(ours::captured(shape, data, Dtype::F32)),
            Who::Unfused => Some(ours::unfused(group, shape, data)),
            Who::ThroughBurn | Who::Burn | Who::Flex | Who::Naive => None,
        }
    }

    /// Compares this case, at shapes that the reference is quick at, with the reference.
    ///
    /// # Panics
    /// If they differ by more than f32's rounding of sums of this length, or than the operands' own rounding.
    pub fn check(&self) {
        self.check_at(Shape::SMALL);
        if !matches!(self.who, Who::Burn | Who::Flex | Who::Naive) {
            self.check_at(Shape::NOT_SMALL);
        }
    }

    fn check_at(&self, shape: Shape) {
        let answer = |who| {
            let case = Self {
                shape,
                who,
                ..*self
            };
            case.run(7, true).answer.expect("it was asked for")
        };
        let tolerance = match self.who {
            Who::Bf16 => 2e-2,
            Who::F16 | Who::Tf32 => 2e-3,
            _ => 1e-5,
        };
        let (ours, truth) = (answer(self.who), answer(Who::Naive));
        assert_eq!(ours.len(), truth.len(), "{self}");
        for (part, (ours, truth)) in ours.iter().zip(&truth).enumerate() {
            assert_eq!(ours.len(), truth.len(), "{self}, part {part}");
            let size = truth.iter().map(|v| v * v).sum::<f32>().sqrt();
            let error = ours
                .iter()
                .zip(truth)
                .map(|(a, b)| (a - b) * (a - b))
                .sum::<f32>()
                .sqrt();
            assert!(
                error <= tolerance * size,
                "{self}, part {part}: {error} of {size}"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// But not Burn on CubeCL's CPU runtime, whose products tune themselves for a minute first.
    #[test]
    fn what_is_measured_agrees_with_the_reference() {
        for group in Group::ALL {
            for who in Who::ALL {
                let shape = Shape::SMALL;
                let measured = |case: &Case| (case.group, case.who) == (group, who);
                if Case::all().iter().any(measured) && !(who == Who::Burn && ours::on_cpu()) {
                    Case { group, shape, who }.check();
                }
            }
        }
    }

    #[test]
    fn an_id_names_its_case() {
        for case in Case::all() {
            let named = Case::named(&case.to_string()).expect("it is measured");
            assert_eq!((named.group, named.who), (case.group, case.who));
            assert_eq!(named.shape.name, case.shape.name);
        }
        assert!(Case::named("cosine_logits/seed/nobody").is_none());
    }
}
