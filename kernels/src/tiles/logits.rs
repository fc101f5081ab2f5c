//! A tile of cosines: a tile of rows times a tile of a chunk's classes.

use cubecl::prelude::*;

use super::product::tile_product;
use super::stage::{Lies, Source};
use super::{Chunk, Chunks, Tile};

/// The sizes of a problem and of a chunk of its classes.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(crate) struct ChunkShape {
    pub heads: usize,
    pub rows: usize,
    pub rows_padded: usize,
    pub active: usize,
    /// The chunk's first class.
    pub first: usize,
    /// The chunk's classes, padded to whole tiles.
    pub classes: usize,
    pub dim: usize,
}

impl Chunks<'_> {
    pub(crate) fn shape_arg(&self, chunk: &Chunk) -> ChunkShapeLaunch {
        let sizes = &self.problem.sizes;
        ChunkShapeLaunch::new(
            sizes.heads,
            sizes.rows,
            sizes.rows_padded,
            sizes.active,
            chunk.first,
            chunk.padded,
            sizes.dim_padded,
        )
    }
}

/// Where a tile of logits is.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct LogitTile {
    pub head: usize,
    pub first_row: usize,
    /// Its first class, counted in the chunk.
    pub in_chunk: usize,
}

#[cube]
impl ChunkShape {
    /// The tile of this cube, if each has one: cubes that run together take other rows and the same classes. The head is
    /// `heads` where there is no tile left.
    pub(crate) fn tile_of_cube(&self, #[comptime] tile: Tile) -> LogitTile {
        let row_tiles = self.rows_padded / comptime!(tile.side);
        let class_tiles = self.classes / comptime!(tile.side);
        LogitTile {
            head: min(CUBE_POS / (row_tiles * class_tiles), self.heads),
            first_row: CUBE_POS % row_tiles * comptime!(tile.side),
            in_chunk: CUBE_POS / row_tiles % class_tiles * comptime!(tile.side),
        }
    }

    /// The cosines of a tile, into `results` as [`tile_product`] has them.
    #[allow(clippy::too_many_arguments)] // two operands, their stages, where and what
    pub(crate) fn cosines<E: Float, N: Size>(
        &self,
        results: &mut Array<f32>,
        embeddings: &[Vector<E, N>], // [heads, rows_padded, dim]
        weights: &[Vector<E, N>],    // [heads, classes, dim]
        at: &LogitTile,
        left_stages: &mut [E],
        right_stages: &mut [E],
        #[comptime] tile: Tile,
    ) {
        let stride = self.dim / comptime!(tile.vector);
        tile_product::<E, N>(
            results,
            embeddings,
            &Source {
                base: (at.head * self.rows_padded + at.first_row) * stride,
                stride,
            },
            weights,
            &Source {
                base: (at.head * self.classes + at.in_chunk) * stride,
                stride,
            },
            self.dim / comptime!(tile.depth),
            left_stages,
            right_stages,
            Lies::Rows,
            Lies::Rows,
            tile,
        );
    }
}
