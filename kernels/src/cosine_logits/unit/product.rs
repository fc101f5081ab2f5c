//! Register tiles of the packed operands, multiplied, and what becomes of their sums.

use cubecl::prelude::*;

use super::layout::Operand;
use crate::cosine_logits::problem::Sizes;
use crate::math::narrow::narrow;
use crate::math::norm::{inverse_norm, projection};
use crate::math::tile::{Broadcast, Lanes, TILE_VECTORS, accumulate};

/// Cosines of `tile_rows` packed rows with the panel that begins with the padded class `panel_class` of all heads:
/// `tile [tile_rows, width]`.
#[cube]
pub(super) fn cosines<N: Size>(
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
pub(super) struct Scratch {
    pub block: usize,
    pub gradient: usize,
}

#[cube]
impl Scratch {
    pub(super) fn of_unit(dim_padded: usize, #[comptime] width: usize) -> Scratch {
        let start = ABSOLUTE_POS * width * (width + dim_padded);
        Scratch {
            block: start,
            gradient: start + width * width,
        }
    }
}

/// Floats of scratch that `units` need.
pub(super) fn scratch_len(units: usize, width: usize, dim_padded: usize) -> usize {
    units * width * (width + dim_padded)
}

/// Sets the gradient rows of the scratch to zero.
#[cube]
pub(super) fn clear_gradient(
    scratch: &mut [f32],
    at: &Scratch,
    dim_padded: usize,
    #[comptime] width: usize,
) {
    for i in 0..width * dim_padded {
        scratch[at.gradient + i] = 0.0;
    }
}

/// `gradient[o] += Σ_t block[o, t] · other[t]`, for the `width` rows of `other` from `packed_row` on: a sum of sums, which loses less
/// than one of millions of products.
#[cube]
pub(super) fn add_product<N: Size>(
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
            #[unroll]
            for i in 0..tile_rows * TILE_VECTORS {
                tile[i] = Vector::<f32, N>::new(0.0);
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
                    gradient[first + r * dim_padded / lanes + v] += tile[r * TILE_VECTORS + v];
                }
            }
        }
    }
}

/// Through the normalization. Writes `grad[out..out + dim]`, and returns the product of the unit row with its gradient.
#[cube]
fn finish_row<F: Float, M: Size>(
    grad: &mut [Vector<F, M>],
    out: usize,
    scratch: &[f32],
    gradient: usize,
    rows: &[f32],
    packed_row: usize,
    norm: f32,
    layout: &Sizes,
) -> f32 {
    let piece = M::value();
    let unit = rows.as_vectorized().with_vector_size::<M>();
    let unit_at = packed_row * layout.dim_padded / piece;
    let upstream = scratch.as_vectorized().with_vector_size::<M>();
    let upstream_at = gradient / piece;
    let mut along = Vector::<f32, M>::new(0.0);
    for d in 0..layout.dim / piece {
        along = fma(unit[unit_at + d], upstream[upstream_at + d], along);
    }
    let along = along.vector_sum();
    let inverse = Vector::<f32, M>::new(inverse_norm(norm));
    let projection = Vector::<f32, M>::new(-projection(along, norm));
    for d in 0..layout.dim / piece {
        let value = fma(projection, unit[unit_at + d], upstream[upstream_at + d]) * inverse;
        grad[out / piece + d] = narrow::<F, M>(value);
    }
    along
}

/// Writes an owner's block of gradient rows `[width, dim]` from the scratch; stored rows that took no part get zeros. With `of_scale`,
/// also what they have of the gradient of the scale.
#[cube]
pub(super) fn write_gradients<F: Float, M: Size>(
    grad: &mut [Vector<F, M>],
    scale_rows: &mut [f32], // [heads, stored] if of_scale
    gradient: &[f32],       // the unit's gradient rows, [width, dim_padded]
    rows: &[f32],
    norms: &[f32],
    head: usize,
    first: usize,
    stored: usize,
    layout: &Sizes,
    #[comptime] owner: Operand,
    #[comptime] of_scale: bool,
    #[comptime] width: usize,
) {
    let packed = layout.head_start(head, owner) + first;
    let count = layout.count(owner);
    for r in 0..width {
        let out = (head * stored + first + r) * layout.dim;
        if first + r < count {
            let along = finish_row::<F, M>(
                grad,
                out,
                gradient,
                r * layout.dim_padded,
                rows,
                packed + r,
                norms[packed + r],
                layout,
            );
            if comptime!(of_scale) {
                scale_rows[head * stored + first + r] = along;
            }
        } else if first + r < stored {
            let piece = M::value();
            for d in 0..layout.dim / piece {
                grad[out / piece + d] = Vector::<F, M>::cast_from(Vector::<f32, M>::new(0.0));
            }
        }
    }
}
