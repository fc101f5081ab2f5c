//! One unit packs a panel at a time, and multiplies register tiles of the packed operands.

use cubecl::client::Client;
use cubecl::prelude::*;

use super::{Layout, Operand, Packed};
use crate::blueprint::Blueprint;
use crate::math::norm::{inverse_norm, projection, row_norm};
use crate::math::tile::{Broadcast, Lanes, accumulate};
use crate::operand::{RowStrides, Strided};

/// Vectors a tile is wide.
pub(crate) const TILE_VECTORS: usize = 2;

pub(super) fn launch(
    client: &Client,
    embeddings: &Strided,
    weights: &Strided,
    packed: &Packed,
    vector: usize,
    blueprint: &Blueprint,
) {
    let sizes = &packed.sizes;
    let (count, dim) = blueprint.unit_grid(client);
    // SAFETY: `Strided` proved that its strides stay inside its buffer, `Packed::new` allocated whole panels.
    unsafe {
        pack::launch_unchecked(
            client,
            count,
            dim,
            vector,
            blueprint.lanes,
            embeddings.buffer_arg(vector),
            embeddings.strides_arg(vector),
            weights.buffer_arg(vector),
            weights.strides_arg(vector),
            packed.rows_arg(),
            packed.panels_arg(blueprint.lanes),
            packed.norms_arg(),
            sizes.launch_arg(),
            packed.panels.is_some(),
            embeddings.dtype(),
        );
    }
}

#[cube(launch_unchecked)]
fn pack<F: Float, M: Size, N: Size>(
    embeddings: &[Vector<F, M>],
    embedding_strides: RowStrides,
    weights: &[Vector<F, M>],
    weight_strides: RowStrides,
    rows: &mut [f32],
    panels: &mut [Vector<f32, N>],
    norms: &mut [f32],
    layout: Layout,
    #[comptime] with_panels: bool,
    #[define(F)] _dtype: ElemType,
) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let embedding_panels = layout.heads * layout.rows_padded / width;
    let weight_panels = layout.heads * layout.active_padded / width;
    let mut panel = ABSOLUTE_POS;
    while panel < embedding_panels + weight_panels {
        if panel < embedding_panels {
            pack_rows::<F, M>(
                embeddings,
                &embedding_strides,
                rows,
                norms,
                &layout,
                panel,
                Operand::Embeddings,
                width,
            );
        } else {
            let panel = panel - embedding_panels;
            pack_rows::<F, M>(
                weights,
                &weight_strides,
                rows,
                norms,
                &layout,
                panel,
                Operand::Weights,
                width,
            );
            if comptime!(with_panels) {
                interleave::<N>(&*rows, panels, &layout, panel);
            }
        }
        panel += CUBE_COUNT * CUBE_DIM as usize;
    }
}

/// Normalizes the rows of one panel.
#[cube]
fn pack_rows<F: Float, M: Size>(
    source: &[Vector<F, M>],
    strides: &RowStrides,
    rows: &mut [f32],
    norms: &mut [f32],
    layout: &Layout,
    panel: usize,
    #[comptime] operand: Operand,
    #[comptime] width: usize,
) {
    let piece = M::value();
    let panels_per_head = layout.padded(operand) / width;
    let head = panel / panels_per_head;
    let first = (panel % panels_per_head) * width;
    let packed_row = layout.head_start(head, operand) + first;
    for r in 0..width {
        let out = (packed_row + r) * layout.dim_padded;
        let mut filled = 0usize;
        if first + r < layout.count(operand) {
            let at = head * strides.head + (first + r) * strides.row;
            let norm = row_norm::<F, M>(source, at, layout.dim / piece);
            norms[packed_row + r] = norm;
            let inverse = Vector::<f32, M>::new(inverse_norm(norm));
            let unit = rows.as_vectorized_mut().with_vector_size_mut::<M>();
            for d in 0..layout.dim / piece {
                unit[out / piece + d] = Vector::<f32, M>::cast_from(source[at + d]) * inverse;
            }
            filled = layout.dim;
        } else {
            norms[packed_row + r] = 0.0;
        }
        for d in filled..layout.dim_padded {
            rows[out + d] = 0.0;
        }
    }
}

/// Interleaves the packed rows of one panel of class weights.
#[cube]
fn interleave<N: Size>(rows: &[f32], panels: &mut [Vector<f32, N>], layout: &Layout, panel: usize) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let first = layout.heads * layout.rows_padded + panel * width;
    for d in 0..layout.dim_padded {
        #[unroll]
        for v in 0..TILE_VECTORS {
            let mut column = Vector::<f32, N>::empty();
            #[unroll]
            for lane in 0..lanes {
                column.insert(
                    lane,
                    rows[(first + v * lanes + lane) * layout.dim_padded + d],
                );
            }
            panels[(panel * layout.dim_padded + d) * TILE_VECTORS + v] = column;
        }
    }
}

/// Cosines of `tile_rows` packed rows with the panel that begins with the padded class `panel_class` of all heads:
/// `tile [tile_rows, width]`.
#[cube]
pub(crate) fn cosines<N: Size>(
    tile: &mut Array<Vector<f32, N>>,
    rows: &[f32],
    packed_row: usize,
    panels: &[Vector<f32, N>],
    panel_class: usize,
    dim_padded: usize,
    #[comptime] tile_rows: usize,
) {
    let lanes = N::value();
    #[unroll]
    for i in 0..tile_rows * TILE_VECTORS {
        tile[i] = Vector::<f32, N>::new(0.0);
    }
    accumulate::<N>(
        tile,
        rows,
        Broadcast {
            base: packed_row * dim_padded,
            row_stride: dim_padded,
            step_stride: 1,
        },
        panels,
        Lanes {
            base: panel_class * dim_padded / lanes,
            step_stride: TILE_VECTORS,
        },
        dim_padded,
        tile_rows,
        TILE_VECTORS,
    );
}

/// The scratch of one unit in a backward pass: a block of logit gradients `[width, width]`, owner rows
/// first, then the owner's gradient rows `[width, dim_padded]`.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Scratch {
    pub block: usize,
    pub gradient: usize,
}

#[cube]
impl Scratch {
    pub(crate) fn of_unit(dim_padded: usize, #[comptime] width: usize) -> Scratch {
        let start = ABSOLUTE_POS * width * (width + dim_padded);
        Scratch {
            block: start,
            gradient: start + width * width,
        }
    }
}

/// Floats of scratch that `units` need.
pub(crate) fn scratch_len(units: usize, width: usize, dim_padded: usize) -> usize {
    units * width * (width + dim_padded)
}

/// Sets the gradient rows of the scratch to zero.
#[cube]
pub(crate) fn clear_gradient(
    scratch: &mut [f32],
    at: &Scratch,
    dim_padded: usize,
    #[comptime] width: usize,
) {
    for i in 0..width * dim_padded {
        scratch[at.gradient + i] = 0.0;
    }
}

/// `gradient[o] += Σ_t block[o, t] · other[t]`, for the `width` rows of `other` from `packed_row` on.
#[cube]
pub(crate) fn add_product<N: Size>(
    scratch: &mut [f32],
    at: &Scratch,
    rows: &[f32],
    packed_row: usize,
    dim_padded: usize,
    #[comptime] tile_rows: usize,
) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let other = rows.as_vectorized().with_vector_size::<N>();
    for group in 0..width / tile_rows {
        for chunk in 0..dim_padded / width {
            let first = (at.gradient + group * tile_rows * dim_padded + chunk * width) / lanes;
            let mut tile = Array::<Vector<f32, N>>::new(tile_rows * TILE_VECTORS);
            let gradient = scratch.as_vectorized_mut().with_vector_size_mut::<N>();
            #[unroll]
            for r in 0..tile_rows {
                #[unroll]
                for v in 0..TILE_VECTORS {
                    tile[r * TILE_VECTORS + v] = gradient[first + r * dim_padded / lanes + v];
                }
            }
            accumulate::<N>(
                &mut tile,
                &scratch[at.block..at.block + width * width],
                Broadcast {
                    base: group * tile_rows * width,
                    row_stride: width,
                    step_stride: 1,
                },
                other,
                Lanes {
                    base: (packed_row * dim_padded + chunk * width) / lanes,
                    step_stride: dim_padded / lanes,
                },
                width,
                tile_rows,
                TILE_VECTORS,
            );
            let gradient = scratch.as_vectorized_mut().with_vector_size_mut::<N>();
            #[unroll]
            for r in 0..tile_rows {
                #[unroll]
                for v in 0..TILE_VECTORS {
                    gradient[first + r * dim_padded / lanes + v] = tile[r * TILE_VECTORS + v];
                }
            }
        }
    }
}

/// Through the normalization. Writes `grad[out..out + dim]`.
#[cube]
pub(crate) fn finish_row<F: Float, M: Size>(
    grad: &mut [Vector<F, M>],
    out: usize,
    scratch: &[f32],
    gradient: usize,
    rows: &[f32],
    packed_row: usize,
    norm: f32,
    layout: &Layout,
) {
    let piece = M::value();
    let unit = rows.as_vectorized().with_vector_size::<M>();
    let unit_at = packed_row * layout.dim_padded / piece;
    let upstream = scratch.as_vectorized().with_vector_size::<M>();
    let upstream_at = gradient / piece;
    let mut along = Vector::<f32, M>::new(0.0);
    for d in 0..layout.dim / piece {
        along = fma(unit[unit_at + d], upstream[upstream_at + d], along);
    }
    let inverse = Vector::<f32, M>::new(inverse_norm(norm));
    let projection = Vector::<f32, M>::new(-projection(along.vector_sum(), norm));
    for d in 0..layout.dim / piece {
        let value = fma(projection, unit[unit_at + d], upstream[upstream_at + d]) * inverse;
        grad[out / piece + d] = Vector::<F, M>::cast_from(value);
    }
}

/// Writes an owner's block of gradient rows `[width, dim]` from the scratch; stored rows that took no part get zeros.
#[cube]
pub(crate) fn write_gradients<F: Float, M: Size>(
    grad: &mut [Vector<F, M>],
    gradient: &[f32], // the unit's gradient rows, [width, dim_padded]
    rows: &[f32],
    norms: &[f32],
    head: usize,
    first: usize,
    stored: usize,
    layout: &Layout,
    #[comptime] owner: Operand,
    #[comptime] width: usize,
) {
    let packed = layout.head_start(head, owner) + first;
    let count = layout.count(owner);
    for r in 0..width {
        let out = (head * stored + first + r) * layout.dim;
        if first + r < count {
            finish_row::<F, M>(
                grad,
                out,
                gradient,
                r * layout.dim_padded,
                rows,
                packed + r,
                norms[packed + r],
                layout,
            );
        } else if first + r < stored {
            let piece = M::value();
            for d in 0..layout.dim / piece {
                grad[out / piece + d] = Vector::<F, M>::cast_from(Vector::<f32, M>::new(0.0));
            }
        }
    }
}
