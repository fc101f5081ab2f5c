//! Which variant of an op runs, and on which grid: decided once per call, above every kernel. (`small` is chosen by the sizes of a
//! problem, once they are checked: see `cosine_cross_entropy`.)
//!
//! A CPU device runs the units of a cube on its cores and the cubes one after another, so the *unit* variants
//! take one cube of as many units as there are cores, and each unit owns whole register tiles. A GPU runs
//! many cubes of many units with shared memory, which is the *plane* variants' shape; where it has tensor cores for the
//! operands, ops with a product run their *cmma* variants, the same kernels with another instruction.

use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::ir::features::Plane;
use cubecl::prelude::*;

use crate::error::Error;
use crate::math::tile::TILE_VECTORS;
use crate::pace::keep_close;
use crate::tiles::{Engine, Tile};

/// The shape of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Variant {
    /// One unit a core owns register tiles: the CPU's shape, on CPU devices only.
    Unit,
    /// A cube of 256 units shares tiles in shared memory: the GPU's shape, on any GPU that meets WebGPU's limits. Tiles are larger where
    /// a device says that it has room for them.
    Plane,
    /// A cube multiplies tiles on tensor cores: for ops with a product, where the device has them for the operands.
    /// If forced on a device without them, the same kernels run in multiply-adds, for tests.
    Cmma,
    /// Four planes multiply tiles together on Hopper's tensor cores: for ops with a product of f16 or bf16 operands, on NVIDIA GPUs of
    /// compute capability 9.0; f32 operands run as in [`Cmma`](Self::Cmma). Compiled, assembled and emulated, but so far not run, so it is
    /// never inferred.
    Wgmma,
    /// Both passes in two launches, on a GPU: for `cosine_cross_entropy` with operands that fit in the GPU's caches.
    Small,
}

/// How the variant of an op is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Strategy {
    /// From the device's properties.
    #[default]
    Inferred,
    /// This one, or an error where the device cannot run it or the op has no such variant: for tests and benches. On a CPU it takes
    /// all cores, which is slower for a small problem.
    Forced(Variant),
}

impl Strategy {
    /// The variant that an op with a product would run on this device, for operands of this dtype, without `allow_tf32`, if the
    /// problem is not small.
    ///
    /// # Errors
    /// [`Error::Variant`] with what the device lacks, or [`Error::NoVariant`].
    pub fn variant(self, client: &Client, dtype: ElemType) -> Result<Variant, Error> {
        let blueprint = match self {
            Self::Forced(Variant::Small) => Blueprint::small(client)?,
            _ => Blueprint::of_product(client, self, dtype, false)?,
        };
        Ok(blueprint.variant)
    }
}

/// Units of a plane variant's cube.
pub(crate) const PLANE_UNITS: usize = 256;
/// Shared memory of a plane variant without a product, at most.
const PLANE_SHARED: usize = 8 << 10;

/// A variant with the numbers it runs under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Blueprint {
    pub variant: Variant,
    /// Elements of a vector of f32 on a CPU, the most of any vector elsewhere.
    pub lanes: usize,
    /// Neighbouring units that can exchange registers; 1 where the device has no such instruction.
    pub plane: usize,
    /// Rows of the unit variant's register tile.
    pub tile_rows: usize,
    /// The tile of a product on a GPU.
    pub product: Option<Tile>,
    /// Units of a cube.
    pub units: usize,
    /// Whether the variant was asked for, and then runs as it is for large problems.
    forced: bool,
}

impl Blueprint {
    /// For an op with a product of operands of this dtype.
    pub(crate) fn of_product(
        client: &Client,
        strategy: Strategy,
        dtype: ElemType,
        allow_tf32: bool,
    ) -> Result<Self, Error> {
        let gpu = client.properties().hardware.num_cpu_cores.is_none();
        let on_tensor_cores = || Tile::on_tensor_cores(client, dtype, allow_tf32);
        let tile = match strategy {
            Strategy::Inferred if gpu => match on_tensor_cores() {
                Some(tile) => tile,
                None => Tile::of_multiply_adds(client)?,
            },
            Strategy::Forced(Variant::Plane) => Tile::of_multiply_adds(client)?,
            Strategy::Forced(Variant::Wgmma) if !Tile::is_hopper(client) => {
                return Err(Error::NoVariant {
                    variant: "wgmma",
                    only: "on NVIDIA GPUs of compute capability 9.0 only, with the `cuda` feature",
                });
            }
            Strategy::Forced(Variant::Cmma | Variant::Wgmma) => {
                let of_wgmma = || Tile::on_hopper(client, dtype);
                let wanted = strategy == Strategy::Forced(Variant::Wgmma);
                match wanted.then(of_wgmma).flatten().or_else(on_tensor_cores) {
                    Some(tile) => tile,
                    None => Tile::stand_in(client, dtype)?,
                }
            }
            _ => return Self::new(client, strategy),
        };
        let variant = match tile.engine {
            Engine::Fma if !tile.stands_in => Variant::Plane,
            Engine::Wgmma => Variant::Wgmma,
            _ => Variant::Cmma,
        };
        Ok(Self {
            variant,
            lanes: max_lanes(client),
            plane: exchanging_units(client),
            tile_rows: 0,
            product: Some(tile),
            units: tile.units(),
            forced: strategy != Strategy::Inferred,
        })
    }

    /// For the fused op on a GPU, where the problem is small.
    pub(crate) fn small(client: &Client) -> Result<Self, Error> {
        let hardware = &client.properties().hardware;
        if hardware.num_cpu_cores.is_some() {
            return Err(Error::NoVariant {
                variant: "small",
                only: GPUS,
            });
        }
        // Its many sums go through shared memory where units cannot exchange registers.
        let exchanges = exchanging_units(client) > 1;
        let shared = if exchanges { 16 << 10 } else { 24 << 10 };
        let has_units = hardware.max_units_per_cube as usize >= PLANE_UNITS;
        if !has_units || hardware.max_shared_memory_size < shared {
            return Err(Error::Variant {
                variant: "small",
                needed: PLANE_UNITS,
                shared,
                units: hardware.max_units_per_cube as usize,
                memory: hardware.max_shared_memory_size,
            });
        }
        let plane = Self::new(client, Strategy::Forced(Variant::Plane))?;
        Ok(Self {
            variant: Variant::Small,
            ..plane
        })
    }

    /// For any other op.
    pub(crate) fn new(client: &Client, strategy: Strategy) -> Result<Self, Error> {
        let hardware = &client.properties().hardware;
        let fits = hardware.max_units_per_cube as usize >= PLANE_UNITS
            && hardware.max_shared_memory_size >= PLANE_SHARED;
        let variant = match strategy {
            Strategy::Forced(variant) => variant,
            Strategy::Inferred if hardware.num_cpu_cores.is_some() => Variant::Unit,
            Strategy::Inferred => Variant::Plane,
        };
        match variant {
            Variant::Unit => {
                let cores = hardware.num_cpu_cores.ok_or(Error::NoVariant {
                    variant: "unit",
                    only: "on CPUs only",
                })?;
                let lanes = (hardware.load_width as usize / 32)
                    .min(hardware.max_vector_size)
                    .clamp(1, 16);
                let lanes = 1 << lanes.ilog2();
                let registers = hardware.vector_register_count.unwrap_or(16);
                let tile_rows = if registers >= 32 { 8 } else { 4 };
                Ok(Self {
                    variant,
                    lanes,
                    plane: 1,
                    tile_rows: tile_rows.min(lanes * TILE_VECTORS),
                    product: None,
                    units: cores.min(hardware.max_units_per_cube).max(1) as usize,
                    forced: strategy != Strategy::Inferred,
                })
            }
            Variant::Plane if hardware.num_cpu_cores.is_some() => Err(Error::NoVariant {
                variant: "plane",
                only: GPUS,
            }),
            Variant::Plane if fits => Ok(Self {
                variant,
                lanes: max_lanes(client),
                plane: exchanging_units(client),
                tile_rows: 0,
                product: None,
                units: PLANE_UNITS,
                forced: strategy != Strategy::Inferred,
            }),
            Variant::Cmma => Err(Error::NoVariant {
                variant: "cmma",
                only: "in ops with a matrix product only",
            }),
            Variant::Wgmma => Err(Error::NoVariant {
                variant: "wgmma",
                only: "in ops with a matrix product only",
            }),
            Variant::Small => Err(Error::NoVariant {
                variant: "small",
                only: "in cosine_cross_entropy only",
            }),
            Variant::Plane => Err(Error::Variant {
                variant: "plane",
                needed: PLANE_UNITS,
                shared: PLANE_SHARED,
                units: hardware.max_units_per_cube as usize,
                memory: hardware.max_shared_memory_size,
            }),
        }
    }

    /// Elements of the vectors in which operands of this dtype are read: a CPU's registers hold so many once they are
    /// f32, a GPU's unit loads 16 bytes.
    pub(crate) fn vector(&self, dtype: ElemType) -> usize {
        match self.variant {
            Variant::Unit => self.lanes,
            Variant::Plane | Variant::Cmma | Variant::Wgmma | Variant::Small => {
                (16 / dtype.size()).min(self.lanes)
            }
        }
    }

    /// Rows of a tile on either side of a product; packed operands are padded to a multiple of it.
    pub(crate) fn tile(&self) -> usize {
        match self.variant {
            Variant::Unit => self.lanes * TILE_VECTORS,
            _ => self.product.map_or(1, |tile| tile.side),
        }
    }

    /// On a CPU with no more units than so many floating-point operations feed. Units are sent to their cores one after the
    /// other, by a thread that a core which has its unit already may push aside; the unit then spins at its first barrier until the
    /// next tick of the scheduler, for milliseconds. A unit alone never waits.
    pub(crate) fn for_work(mut self, operations: usize) -> Self {
        if self.variant == Variant::Unit && !self.forced {
            self.units = self.units.min(operations / UNIT_OPERATIONS).max(1);
        }
        self
    }

    /// [`for_work`](Self::for_work) on each of so many elements.
    pub(crate) fn for_elements(self, elements: usize) -> Self {
        self.for_work(elements.saturating_mul(ELEMENT_OPERATIONS))
    }

    /// The grid of the next launch, of a kernel that strides over `work` items, each for itself. On a CPU it [keeps close](keep_close).
    pub(crate) fn elementwise(&self, client: &Client, work: usize) -> (CubeCount, CubeDim) {
        match self.variant {
            Variant::Unit => self.unit_grid(client),
            _ => (
                cubes_for(client, work.div_ceil(PLANE_UNITS).min(65_535)),
                CubeDim::new_1d(PLANE_UNITS as u32),
            ),
        }
    }

    /// The grid of the next launch, of a unit variant: one cube, a unit a core, striding over the work. Its units meet at barriers, so it
    /// [keeps close](keep_close).
    pub(crate) fn unit_grid(&self, client: &Client) -> (CubeCount, CubeDim) {
        keep_close(client);
        (CubeCount::new_single(), CubeDim::new_1d(self.units as u32))
    }
}

/// Where the variants of GPUs run.
pub(crate) const GPUS: &str = "on GPUs only";

/// Operations that feed a unit, some 0.1 ms of a core: with fewer, a unit more saves less than its start costs.
const UNIT_OPERATIONS: usize = 8_000_000;
/// Operations that reading and writing an element, and what is done between, take as long as.
const ELEMENT_OPERATIONS: usize = 64;

/// Units of a plane that can exchange registers and wait for each other, where every plane is whole and of one size.
fn exchanging_units(client: &Client) -> usize {
    let properties = client.properties();
    let hardware = &properties.hardware;
    let size = hardware.plane_size_max;
    let usable = properties.features.plane.contains(Plane::Ops)
        && properties.features.plane.contains(Plane::Sync)
        && hardware.plane_size_min == size
        && size.is_power_of_two()
        && size as usize <= PLANE_UNITS;
    if usable { size as usize } else { 1 }
}

/// Elements of the widest vector.
fn max_lanes(client: &Client) -> usize {
    1 << client
        .properties()
        .hardware
        .max_vector_size
        .clamp(1, 16)
        .ilog2()
}

/// The number of cubes for `work` items, one a cube, split over two grid axes where one is too short.
pub(crate) fn cubes_for(client: &Client, work: usize) -> CubeCount {
    let limit = client.properties().hardware.max_cube_count.0.min(65_535) as usize;
    if work <= limit {
        CubeCount::new_1d(work as u32)
    } else {
        CubeCount::new_2d(limit as u32, work.div_ceil(limit) as u32)
    }
}
