//! The class axis a chunk at a time.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::Tile;
use super::pack::{RowsOf, pack_chunk};
use crate::blueprint::Blueprint;
use crate::cosine_logits::CosineProblem;
use crate::operand::F32;

/// Bytes that everything with a class axis may take beside the caller's tensors.
const WORKSPACE: usize = 160 << 20;

/// A problem whose embeddings are packed, and whose classes come in chunks.
///
/// The chunks of a pass take turns in one place, allocated before the first: where there is no memory for it, no chunk writes
/// results. If each had its own, CubeCL would forget that one was missing as soon as a later one has written the same results.
pub(crate) struct Chunks<'a> {
    pub client: &'a Client,
    pub blueprint: &'a Blueprint,
    pub tile: Tile,
    pub problem: &'a CosineProblem,
    /// Unit rows, `[heads, rows_padded, dim_padded]`.
    pub embeddings: Handle,
}

/// Some classes, with their packed weights.
pub(crate) struct Chunk {
    /// The first class.
    pub first: usize,
    /// How many take part.
    pub classes: usize,
    /// The same, padded to whole tiles.
    pub padded: usize,
    /// Unit rows, `[heads, padded, dim_padded]`, in a buffer for the largest chunk.
    pub weights: Handle,
}

/// A chunk of a backward pass.
pub(crate) struct GradientChunk {
    pub chunk: Chunk,
    /// The place of its logit gradients, where their cosines may lie before: `[heads, rows_padded, chunk.padded]` of the packed dtype, in
    /// a buffer for the largest chunk.
    pub values: Handle,
}

impl<'a> Chunks<'a> {
    /// Packs the embeddings, times 1 or −1.
    pub(crate) fn new(
        client: &'a Client,
        blueprint: &'a Blueprint,
        tile: Tile,
        problem: &'a CosineProblem,
        sign: f32,
    ) -> Self {
        let sizes = &problem.sizes;
        let elements = sizes.heads * sizes.rows_padded * sizes.dim_padded;
        let embeddings = client.empty(elements * tile.packed.size());
        let rows = RowsOf {
            operand: &problem.embeddings,
            first: 0,
            real: sizes.rows,
            count: sizes.rows_padded,
            dim_padded: sizes.dim_padded,
        };
        pack_chunk(client, blueprint, &rows, sign, tile.packed, &embeddings);
        Self {
            client,
            blueprint,
            tile,
            problem,
            embeddings,
        }
    }

    /// How many classes a chunk has at most, if each takes `bytes`, and `in_one` of them in the largest buffer.
    fn step(&self, bytes: usize, in_one: usize) -> usize {
        let side = self.tile.side;
        let page = self.client.properties().memory.max_page_size;
        let page = usize::try_from(page).unwrap_or(usize::MAX);
        // Several tiles, so that the last chunk can have fewer than there are parts.
        let most = if self.tile.stands_in { 3 } else { usize::MAX };
        let fitting = tiles_at_once(bytes, in_one, page, side).min(most);
        (fitting * side).min(self.problem.sizes.active_padded)
    }

    fn size(&self) -> usize {
        self.tile.packed.size()
    }

    /// A place for the packed weights of so many classes.
    fn place(&self, classes: usize) -> Handle {
        let sizes = &self.problem.sizes;
        let elements = sizes.heads * classes * sizes.dim_padded;
        self.client.empty(elements * self.size())
    }

    /// The classes from `first` on, `step` of them or what is left, and those padded to whole tiles.
    pub(super) fn classes(&self, first: usize, step: usize) -> (usize, usize) {
        let classes = step.min(self.problem.sizes.active - first);
        (classes, classes.next_multiple_of(self.tile.side))
    }

    /// Packs a chunk's weights into a place for `step` classes.
    fn chunk(&self, first: usize, step: usize, weights: Handle) -> Chunk {
        let (classes, padded) = self.classes(first, step);
        let rows = RowsOf {
            operand: &self.problem.weights,
            first,
            real: classes,
            count: padded,
            dim_padded: self.problem.sizes.dim_padded,
        };
        let dtype = self.tile.packed;
        pack_chunk(self.client, self.blueprint, &rows, 1.0, dtype, &weights);
        Chunk {
            first,
            classes,
            padded,
            weights,
        }
    }

    /// Chunks for a forward pass, or for the rest of one that leaves the cosines of `kept`. The rest are a backward pass's, which has
    /// room for one of them beside the kept one: in the place of the gradients of its weights.
    pub(crate) fn forward(
        &self,
        kept: Option<&GradientChunk>,
    ) -> impl ExactSizeIterator<Item = Chunk> {
        let sizes = &self.problem.sizes;
        let (start, step) = match kept {
            Some(kept) => (kept.chunk.classes, self.backward_step()),
            None => {
                let bytes = sizes.heads * sizes.dim_padded * self.size();
                (0, self.step(bytes, bytes))
            }
        };
        let firsts = (start..sizes.active).step_by(step);
        let place = (start < sizes.active).then(|| self.place(step));
        let places = place.iter().cycle().cloned();
        let chunks: Vec<(usize, Handle)> = firsts.zip(places).collect();
        let chunks = chunks.into_iter();
        chunks.map(move |(first, place)| self.chunk(first, step, place))
    }

    /// The first chunk of a backward pass, for a forward pass before it to leave its cosines in. None where logit gradients have too few
    /// digits for cosines (16 bits and TF32), or where the chunk is a small part of all.
    pub(crate) fn keep_first(&self) -> Option<GradientChunk> {
        let few = self.problem.sizes.active.div_ceil(self.backward_step()) <= 4;
        let exact = self.tile.packed == F32;
        (few && exact).then(|| self.gradient_chunk(0, None))
    }

    /// Classes of a backward pass's chunk, at most.
    pub(super) fn backward_step(&self) -> usize {
        let sizes = &self.problem.sizes;
        let (bytes, in_one) = bytes_of_class(
            sizes.heads,
            sizes.rows_padded,
            sizes.dim_padded,
            self.size(),
        );
        self.step(bytes, in_one)
    }

    /// The chunk from `first` on, in the place of the one before.
    pub(super) fn gradient_chunk(
        &self,
        first: usize,
        before: Option<GradientChunk>,
    ) -> GradientChunk {
        let sizes = &self.problem.sizes;
        let step = self.backward_step();
        let (weights, values) = match before {
            Some(before) => (before.chunk.weights, before.values),
            None => {
                let elements = sizes.heads * sizes.rows_padded * step;
                (self.place(step), self.client.empty(elements * self.size()))
            }
        };
        GradientChunk {
            chunk: self.chunk(first, step, weights),
            values,
        }
    }

    pub(crate) fn embeddings_arg(&self) -> BufferArg {
        let sizes = &self.problem.sizes;
        self.vectors(
            &self.embeddings,
            sizes.heads * sizes.rows_padded * sizes.dim_padded,
        )
    }

    pub(crate) fn weights_arg(&self, chunk: &Chunk) -> BufferArg {
        let sizes = &self.problem.sizes;
        self.vectors(
            &chunk.weights,
            sizes.heads * chunk.padded * sizes.dim_padded,
        )
    }

    pub(crate) fn values_arg(&self, of: &GradientChunk) -> BufferArg {
        let sizes = &self.problem.sizes;
        self.vectors(
            &of.values,
            sizes.heads * sizes.rows_padded * of.chunk.padded,
        )
    }

    fn vectors(&self, handle: &Handle, elements: usize) -> BufferArg {
        // SAFETY: the callers name no more elements than they allocated, whole tiles of them.
        unsafe { BufferArg::from_raw_parts(handle.clone(), elements / self.tile.vector) }
    }
}

/// How many tiles of `side` classes a chunk has at most, where each class takes `bytes`, and `in_one` of them in a buffer of at most
/// `page`.
fn tiles_at_once(bytes: usize, in_one: usize, page: usize, side: usize) -> usize {
    ((WORKSPACE / bytes).min(page / in_one) / side).max(1)
}

/// Bytes that a backward pass needs for each class of a chunk, its logit gradients, packed weights and their gradient; and those of
/// the largest of the three.
fn bytes_of_class(heads: usize, rows: usize, dim: usize, size: usize) -> (usize, usize) {
    let (logits, sums) = (rows * size, dim * size_of::<f32>());
    (
        heads * (logits + dim * size + sums),
        heads * logits.max(sums),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Else the fused op would allocate what grows with rows times classes, or more than WebGPU's 128 MiB at once.
    #[test]
    fn a_chunk_fits_the_workspace_and_its_buffers_a_page_or_it_is_a_single_tile() {
        for heads in [1, 3, 16] {
            for rows in [64, 1024, 65_536, 1 << 20] {
                for dim in [64, 512, 4096] {
                    for (side, size) in [(64, 4), (128, 4), (128, 2)] {
                        for page in [128 << 20, 1 << 40] {
                            let (of_class, in_one) = bytes_of_class(heads, rows, dim, size);
                            let tiles = tiles_at_once(of_class, in_one, page, side);
                            let fits = |tiles: usize| {
                                tiles * side * of_class <= WORKSPACE
                                    && tiles * side * in_one <= page
                            };
                            let what = format!("{heads} x {rows} x {dim}, pages of {page}");
                            assert!(fits(tiles) || tiles == 1, "{what}: {tiles} tiles");
                            assert!(!fits(tiles + 1), "{what} has room for another tile");
                        }
                    }
                }
            }
        }
    }
}
