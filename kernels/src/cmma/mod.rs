//! Products of whole tiles on tensor cores, for the cmma variants.
//!
//! A cube of eight planes multiplies two tiles of `side` rows that share a reduced axis. Both go through shared memory in
//! slabs of `depth`, two stages of them: while the planes multiply one, the next waits in registers. Each plane owns
//! `side/2 × side/4` results in fragments of 16 × 8.
//!
//! The operands are unit-norm rows of the caller's dtype, zero-padded to whole tiles, so no product looks at a bound; the
//! class weights are packed a chunk of classes at a time, and so is everything that has a class axis. Sums are f32.
//!
//! | engine | instruction | operands |
//! |---|---|---|
//! | `Mma` | `ldmatrix`, `mma.sync.m16n8k16` | f16, bf16 |
//! | `Tf32` | `mma.sync.m16n8k8` | f32 rounded to TF32, where the caller allows it |
//! | `Plain` | multiply-adds, a unit summing the elements that its fragments would hold | any, on any device |
//!
//! `Plain` is never inferred: it is how the variant is checked where there are no tensor cores, all but the instruction.

mod chunks;
mod logits;
mod pack;
mod product;

pub(crate) use chunks::{Backward, Chunk, Chunks};
pub(crate) use logits::{ChunkShape, LogitTile};
pub(crate) use pack::pack_chunk;
pub(crate) use product::{Lies, column_of, place, row_of};

use cubecl::client::Client;
use cubecl::ir::{ElemType, FloatKind};

use crate::blueprint::PLANE_UNITS;
use crate::error::Error;
use crate::operand::F32;

/// Units of a cube: eight planes of 32.
pub(crate) const UNITS: usize = PLANE_UNITS;
/// Units of a plane. Fragments are laid out for this many.
pub(crate) const PLANE: usize = 32;
/// Planes along a tile's columns; two lie along its rows.
pub(crate) const PLANES_ACROSS: usize = 4;

/// What multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Engine {
    /// Tensor cores on 16-bit operands.
    Mma,
    /// Tensor cores on f32 operands rounded to TF32.
    Tf32,
    /// Multiply-adds.
    Plain,
}

/// The numbers of a tile product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Tile {
    pub engine: Engine,
    /// Rows of either tile.
    pub side: usize,
    /// Of the reduced axis, in one stage.
    pub depth: usize,
    /// Elements of a vector in memory: 16 bytes where the device has such.
    pub vector: usize,
    /// Elements between rows of a stage, so that eight of them fall into different banks.
    pub pad: usize,
}

impl Tile {
    /// The tile for operands of this dtype, if the device's tensor cores multiply them and it has room for it; `allow_tf32`
    /// for f32.
    pub(crate) fn on_tensor_cores(
        client: &Client,
        dtype: ElemType,
        allow_tf32: bool,
    ) -> Option<Self> {
        let properties = client.properties();
        let features = &properties.features.matmul;
        let multiplies = |operand: ElemType, k: u32| {
            features.mma.iter().any(|mma| {
                (mma.a_type, mma.b_type, mma.cd_type) == (operand, operand, F32)
                    && (mma.m, mma.n, mma.k) == (16, 8, k)
            })
        };
        let engine = if features.ldmatrix.contains(&dtype) && multiplies(dtype, 16) {
            Engine::Mma
        } else if allow_tf32 && dtype == F32 && multiplies(ElemType::Float(FloatKind::TF32), 8) {
            Engine::Tf32
        } else {
            return None;
        };
        let tile = Self::new(client, engine, dtype);
        let whole_planes = properties.hardware.plane_size_max as usize == PLANE;
        (whole_planes && tile.fits(client, dtype)).then_some(tile)
    }

    /// The tile of multiply-adds, on any GPU that has room for it.
    pub(crate) fn plain(client: &Client, dtype: ElemType) -> Result<Self, Error> {
        let tile = Self::new(client, Engine::Plain, dtype);
        if tile.fits(client, dtype) {
            return Ok(tile);
        }
        let hardware = &client.properties().hardware;
        Err(Error::Variant {
            variant: "cmma",
            needed: UNITS,
            shared: tile.shared_bytes(dtype),
            units: hardware.max_units_per_cube as usize,
            memory: hardware.max_shared_memory_size,
        })
    }

    fn new(client: &Client, engine: Engine, dtype: ElemType) -> Self {
        let widest = (16 / dtype.size()).min(client.properties().hardware.max_vector_size);
        let (side, depth, pad, vector) = match engine {
            Engine::Mma => (128, 64, 8, widest),
            Engine::Tf32 => (128, 32, 4, widest),
            // WGSL has vectors of four.
            Engine::Plain => (64, 16, 0, widest.min(4)),
        };
        Self {
            engine,
            side,
            depth,
            vector,
            pad,
        }
    }

    fn fits(&self, client: &Client, dtype: ElemType) -> bool {
        let hardware = &client.properties().hardware;
        hardware.max_shared_memory_size >= self.shared_bytes(dtype)
            && hardware.max_units_per_cube as usize >= UNITS
    }

    /// Fragments of 16 rows that a plane owns.
    pub(crate) fn tall(&self) -> usize {
        self.side / 32
    }

    /// Fragments of 8 columns that a plane owns.
    pub(crate) fn wide(&self) -> usize {
        self.side / 32
    }

    /// Results that a unit owns: four of each fragment.
    pub(crate) fn results(&self) -> usize {
        4 * self.tall() * self.wide()
    }

    /// Elements from one row of a stage to the next.
    pub(crate) fn pitch(&self, lies: Lies) -> usize {
        match lies {
            Lies::Rows => self.depth + self.pad,
            // Without ldmatrix four rows of scalars are read at once, eight banks apart.
            Lies::Columns if self.engine == Engine::Tf32 => self.side + 8,
            Lies::Columns => self.side + self.pad,
        }
    }

    /// Elements of a stage.
    pub(crate) fn stage(&self, lies: Lies) -> usize {
        match lies {
            Lies::Rows => self.side * self.pitch(lies),
            Lies::Columns => self.depth * self.pitch(lies),
        }
    }

    /// Vectors of a stage that a unit brings.
    pub(crate) fn brought(&self) -> usize {
        self.side * self.depth / self.vector / UNITS
    }

    /// Shared memory of the hungriest kernel: two stages of two operands, and what the planes merge through.
    fn shared_bytes(&self, dtype: ElemType) -> usize {
        4 * self.stage(Lies::Rows).max(self.stage(Lies::Columns)) * dtype.size() + 2 * 4 * UNITS
    }
}
