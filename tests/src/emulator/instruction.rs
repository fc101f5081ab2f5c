//! What a unit can be told to do.

use super::arithmetic::Compute;

/// What an instruction takes a value from.
#[derive(Clone, Copy, Debug)]
pub(super) enum Operand {
    Register(usize),
    Value(u64),
}

impl Operand {
    pub(super) fn of(self, registers: &[u64]) -> u64 {
        match self {
            Self::Register(number) => registers[number],
            Self::Value(value) => value,
        }
    }
}

/// `[base + offset]`
#[derive(Clone, Copy, Debug)]
pub(super) struct Address {
    pub base: Operand,
    pub offset: i64,
}

impl Address {
    pub(super) fn of(self, registers: &[u64]) -> u64 {
        self.base.of(registers).wrapping_add_signed(self.offset)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Space {
    Global,
    Shared,
}

/// The numbers that a product of fragments is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    F16,
    Bf16,
    Tf32,
}

/// What an instruction does.
pub(super) enum Step {
    Compute(Compute),
    Branch(usize),
    End,
    Load {
        space: Space,
        bytes: usize,
        extends: bool,
        to: Vec<usize>,
        from: Address,
    },
    Store {
        space: Space,
        bytes: usize,
        to: Address,
        from: Vec<Operand>,
    },
    /// `cp.async` of 16 bytes.
    Copy {
        to: Address,
        from: Address,
    },
    EndCopies,
    AwaitCopies(usize),
    /// Of the cube.
    Barrier,
    /// Of the units of a plane in a mask.
    PlaneBarrier(Operand),
    ActiveMask(usize),
    Shuffle {
        to: usize,
        from: Operand,
        across: Operand,
        mask: Operand,
    },
    LoadMatrices {
        to: [usize; 4],
        from: Address,
        transposes: bool,
    },
    Multiply {
        kind: Kind,
        to: [usize; 4],
        left: [usize; 4],
        right: [usize; 2],
        sums: [usize; 4],
    },
    /// `wgmma` of 64 rows, 128 columns, 16 deep.
    MultiplyTogether {
        kind: Kind,
        sums: Vec<usize>,
        left: Operand,
        right: Operand,
        /// Whether to what the sums are already.
        adds: Operand,
        transposes: [bool; 2],
    },
    AwaitProducts,
    /// Shows what the unit has written to shared memory to `wgmma`.
    Show,
    Nothing,
}

pub(super) struct Instruction {
    /// A register, and whether it must be true.
    pub guard: Option<(usize, bool)>,
    pub step: Step,
    pub text: String,
}
