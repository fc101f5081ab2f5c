//! Products of whole tiles on a GPU: the plane, cmma and wgmma variants of ops with a product, which differ in what multiplies.
//!
//! A cube multiplies two tiles of `side` rows that share a reduced axis. Both go through shared memory in
//! slabs of `depth`, two stages of them: while the planes multiply one, the next waits in registers. On tensor cores, where kernels may
//! have PTX of our own, there are three stages, or four for `wgmma`, and later slabs are copied there meanwhile. `down` planes lie along the rows and `across` along the columns; each owns its
//! part of the results, in fragments of 16 × 8.
//!
//! The operands are unit-norm rows, zero-padded to whole tiles, so no product looks at a bound; the
//! class weights are packed a chunk of classes at a time, and so is everything that has a class axis. Sums are f32.
//!
//! | variant | engine | instruction | packed operands |
//! |---|---|---|---|
//! | cmma | `Mma` | `cp.async`, `ldmatrix`, `mma.sync.m16n8k16` | f16, bf16 |
//! | cmma | `Tf32` | `cp.async`, `ldmatrix` of rows, `mma.sync.m16n8k8` | TF32, of f32 operands, where the caller allows it |
//! | wgmma | `Wgmma` | `cp.async`, `wgmma.m64n128k16` | f16, bf16 |
//! | plane | `Fma` | multiply-adds, on any device | f32 |
//!
//! Where a GPU without tensor cores is forced to cmma, `Fma` stands in on operands of the caller's dtype: that is how the variant is
//! checked there, all but how fragments move and multiply.

mod backward;
mod chunks;
mod copied;
mod exponential;
mod fragments;
mod logits;
mod pack;
mod product;
#[cfg(feature = "cuda")]
mod ptx;
mod results;
mod stage;
mod store;
mod warpgroup;
#[cfg(feature = "cuda")]
mod wgmma;

pub(crate) use backward::Backward;
pub(crate) use chunks::{Chunk, Chunks, GradientChunk};
pub(crate) use exponential::{exp_difference, exp_scaled};
pub(crate) use logits::{ChunkShape, LogitTile};
pub(crate) use results::{Place, column_of, place, replace_in, result_in, result_of, row_of};
pub(crate) use stage::Lies;
pub(crate) use store::store_tile;

use cubecl::client::Client;
use cubecl::ir::{ElemType, FloatKind};

use crate::blueprint::GPUS;
use crate::error::Error;
use crate::operand::F32;

/// Units of a plane. Fragments are laid out for this many.
pub(crate) const PLANE: usize = 32;

/// What multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Engine {
    /// Tensor cores on 16-bit operands.
    Mma,
    /// Hopper's tensor cores on 16-bit operands in shared memory.
    Wgmma,
    /// Tensor cores on TF32.
    Tf32,
    /// Multiply-adds.
    Fma,
}

/// The numbers of a tile product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Tile {
    pub engine: Engine,
    /// Of the unit rows and the logit gradients.
    pub packed: ElemType,
    /// Whether it only checks the cmma variant, and takes small chunks, so that small problems have several.
    pub stands_in: bool,
    /// Rows of either tile.
    pub side: usize,
    /// Planes along a tile's rows,
    pub down: usize,
    /// and along its columns.
    pub across: usize,
    /// Of the reduced axis, in one stage.
    pub depth: usize,
    /// Elements of a vector in memory: 16 bytes where the device has such.
    pub vector: usize,
    /// Whether shared memory can be seen as vectors, which WGSL's cannot.
    pub views: bool,
    /// Whether kernels may have PTX of our own.
    pub ptx: bool,
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
        let of_tf32 = multiplies(ElemType::Float(FloatKind::TF32), 8);
        let engine = if features.ldmatrix.contains(&dtype) && multiplies(dtype, 16) {
            Engine::Mma
        } else if allow_tf32 && dtype == F32 && of_tf32 && !features.ldmatrix.is_empty() {
            // `ldmatrix` is listed for 16 bits only, but moves any words.
            Engine::Tf32
        } else {
            return None;
        };
        let packed = match engine {
            // As wide as f32, and rounded once, where it is packed, not wherever it is read. CubeCL lists TF32 for conversions only, and
            // stores it as f32.
            Engine::Tf32 => ElemType::Float(FloatKind::TF32),
            _ => dtype,
        };
        let tile = Self {
            ptx: takes_ptx(client),
            ..Self::new(client, engine, packed)
        };
        let whole_planes = properties.hardware.plane_size_max as usize == PLANE;
        let whole_vectors = tile.vector == tile.piece();
        (whole_planes && whole_vectors && tile.fits(client)).then_some(tile)
    }

    /// The tile of `wgmma` for operands of this dtype.
    pub(crate) fn on_hopper(client: &Client, dtype: ElemType) -> Option<Self> {
        let tile = Self::new(client, Engine::Wgmma, dtype);
        (dtype.size() == 2 && tile.vector == tile.piece() && tile.fits(client)).then_some(tile)
    }

    /// The tile of multiply-adds in f32, on any GPU that has room for it.
    pub(crate) fn of_multiply_adds(client: &Client) -> Result<Self, Error> {
        Self::new(client, Engine::Fma, F32).checked(client, "plane")
    }

    /// What stands in for tensor cores on operands of this dtype.
    pub(crate) fn stand_in(client: &Client, dtype: ElemType) -> Result<Self, Error> {
        let tile = Self {
            stands_in: true,
            ..Self::new(client, Engine::Fma, dtype)
        };
        tile.checked(client, "cmma")
    }

    /// Whether the device has `wgmma`, of which CubeCL has no feature: it compiles for sm_90a there, the only target that has it.
    pub(crate) fn is_hopper(client: &Client) -> bool {
        takes_ptx(client) && client.properties().identity.fingerprint == "ptx_sm90"
    }

    fn checked(self, client: &Client, variant: &'static str) -> Result<Self, Error> {
        let hardware = &client.properties().hardware;
        if hardware.num_cpu_cores.is_some() {
            return Err(Error::NoVariant {
                variant,
                only: GPUS,
            });
        }
        if self.fits(client) {
            return Ok(self);
        }
        Err(Error::Variant {
            variant,
            needed: self.units(),
            shared: self.shared_bytes(),
            units: hardware.max_units_per_cube as usize,
            memory: hardware.max_shared_memory_size,
        })
    }

    fn new(client: &Client, engine: Engine, packed: ElemType) -> Self {
        let hardware = &client.properties().hardware;
        let widest = (16 / packed.size()).min(hardware.max_vector_size);
        // Only CUDA (and HIP, which is untested) knows, and has shared memory for large tiles.
        let is_known = hardware.num_streaming_multiprocessors.is_some()
            && hardware.max_shared_memory_size >= 56 << 10;
        Self::with_vectors(engine, packed, widest, is_known)
    }

    fn with_vectors(engine: Engine, packed: ElemType, widest: usize, is_known: bool) -> Self {
        let (side, down, across, depth, pad, vector) = match engine {
            Engine::Mma => (128, 2, 2, 32, 8, widest),
            Engine::Wgmma => (128, 4, 1, 32, 0, widest),
            Engine::Tf32 => (128, 2, 2, 16, 4, widest),
            // Small tiles where nobody knows how many would keep the device busy.
            Engine::Fma if is_known => (128, 2, 4, 8, 4, widest.min(4)),
            Engine::Fma => (64, 2, 4, 8, 4, widest.min(4)),
        };
        Self {
            engine,
            packed,
            stands_in: false,
            side,
            down,
            across,
            depth,
            vector,
            views: is_known && vector == 4 || engine != Engine::Fma,
            ptx: engine == Engine::Wgmma,
            pad,
        }
    }

    fn fits(&self, client: &Client) -> bool {
        let hardware = &client.properties().hardware;
        hardware.max_shared_memory_size >= self.shared_bytes()
            && hardware.max_units_per_cube as usize >= self.units()
    }

    /// Units of a cube.
    pub(crate) fn units(&self) -> usize {
        PLANE * self.down * self.across
    }

    /// Elements of 16 bytes.
    pub(crate) fn piece(&self) -> usize {
        16 / self.packed.size()
    }

    /// Fragments of 16 rows that a plane owns.
    pub(crate) fn tall(&self) -> usize {
        self.side / self.down / 16
    }

    /// Rows from one of them to the next.
    pub(crate) fn apart(&self) -> usize {
        match self.engine {
            Engine::Wgmma => warpgroup::ROWS,
            _ => 16,
        }
    }

    /// Fragments of 8 columns that a plane owns.
    pub(crate) fn wide(&self) -> usize {
        self.side / self.across / 8
    }

    /// Results that a unit owns: four of each fragment.
    pub(crate) fn results(&self) -> usize {
        self.rows() * self.columns()
    }

    /// Rows of which a unit holds results,
    pub(crate) fn rows(&self) -> usize {
        2 * self.tall()
    }

    /// and how many of each.
    pub(crate) fn columns(&self) -> usize {
        2 * self.wide()
    }

    /// Results of a unit that are neighbours of a row.
    pub(crate) fn neighbours(&self) -> usize {
        let most = match self.engine {
            Engine::Fma => 4,
            _ => 2,
        };
        self.vector.min(most)
    }

    /// Units that hold results of the same rows: four of each plane across.
    pub(crate) fn sharing(&self) -> usize {
        4 * self.across
    }

    /// Rows of a unit whose softmax lies in shared memory while the unit's registers hold results of a product: all or none.
    pub(crate) fn stowed(&self) -> usize {
        if self.results() < 64 { 0 } else { self.rows() }
    }

    /// Elements from one row of a stage to the next; from one column of pieces to the next for `wgmma`.
    pub(crate) fn pitch(&self, lies: Lies) -> usize {
        match lies {
            // Eight pieces of a row, or of two, begin in different banks.
            _ if self.engine == Engine::Wgmma => {
                let apart = (8 / (self.side * self.depth / self.outer(lies) / self.piece())).max(1);
                (self.outer(lies) + apart) * self.piece()
            }
            // Either way a step's elements lie in a row; what brings rows writes columns, in different banks.
            _ if self.engine == Engine::Fma => self.side + self.pad,
            Lies::Rows => self.depth + self.pad,
            // Without ldmatrix four rows of scalars are read at once, eight banks apart.
            Lies::Columns if self.engine == Engine::Tf32 => self.side + 8,
            Lies::Columns => self.side + self.pad,
        }
    }

    /// Elements of a stage.
    pub(crate) fn stage(&self, lies: Lies) -> usize {
        match lies {
            _ if self.engine == Engine::Wgmma => {
                self.side * self.depth / self.outer(lies) / self.piece() * self.pitch(lies)
            }
            _ if self.engine == Engine::Fma => self.depth * self.pitch(lies),
            Lies::Rows => self.side * self.pitch(lies),
            Lies::Columns => self.depth * self.pitch(lies),
        }
    }

    /// Slabs in shared memory at a time: one that is multiplied, and later ones.
    pub(crate) fn stages(&self) -> usize {
        match self.engine {
            Engine::Wgmma => 4,
            _ if self.ptx => 3,
            _ => 2,
        }
    }

    /// Rows of the matrix in a slab.
    pub(crate) fn outer(&self, lies: Lies) -> usize {
        match lies {
            Lies::Rows => self.side,
            Lies::Columns => self.depth,
        }
    }

    /// Vectors of a stage.
    pub(crate) fn vectors(&self) -> usize {
        self.side * self.depth / self.vector
    }

    /// Vectors of a stage that a unit brings, at most.
    pub(crate) fn brought(&self) -> usize {
        self.vectors().div_ceil(self.units())
    }

    /// Shared memory of the stages of two operands.
    pub(crate) fn stage_bytes(&self) -> usize {
        let stage = self.stage(Lies::Rows).max(self.stage(Lies::Columns));
        2 * self.stages() * stage * self.packed.size()
    }

    /// Shared memory of the hungriest kernel, the forward pass: the stages of two operands; the softmax of every row that is stowed, and of one that
    /// is merged, four numbers each; targets.
    pub(crate) fn shared_bytes(&self) -> usize {
        self.stage_bytes()
            + 4 * size_of::<f32>() * self.units() * (self.stowed() + 1)
            + size_of::<u32>() * self.side
    }
}

/// Whether CubeCL compiles for the device through LLVM to PTX, as it does by default, so that operations of our own can be in a
/// kernel. Its other way, through C++, says that the device can copy asynchronously, which all have from compute capability 8.0 on.
fn takes_ptx(client: &Client) -> bool {
    let properties = client.properties();
    let capability = properties.identity.fingerprint.strip_prefix("ptx_sm");
    let copies = capability.and_then(|number| number.parse().ok()) >= Some(80);
    cfg!(feature = "cuda") && copies && !properties.features.copy_async
}

#[cfg(test)]
fn of_every_engine() -> [Tile; 5] {
    let tile = |engine, kind: FloatKind, is_known| {
        let packed = ElemType::Float(kind);
        Tile::with_vectors(engine, packed, 16 / packed.size(), is_known)
    };
    [
        tile(Engine::Mma, FloatKind::BF16, true),
        tile(Engine::Wgmma, FloatKind::BF16, true),
        tile(Engine::Tf32, FloatKind::TF32, true),
        tile(Engine::Fma, FloatKind::F32, true),
        tile(Engine::Fma, FloatKind::F32, false),
    ]
}
