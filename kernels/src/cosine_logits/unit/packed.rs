//! The operands, made ready for products: unit rows in f32, zero-padded to whole tiles.
//!
//! `x̂ = x / max(‖x‖₂, 1e-12)` for the embeddings of every head and for the active class weights, in one
//! buffer: first `[heads, rows_padded, dim_padded]`, then `[heads, active_padded, dim_padded]`. The padding is
//! zero, so no product has to look at it. For logits the class weights are in *panels* as well, the same values with
//! `width` rows interleaved: `[.., dim_padded, width]`, so that a vector load takes one coordinate of
//! several classes.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::layout::Operand;
use crate::cosine_logits::problem::{Sizes, SizesLaunch};
use crate::math::norm::{inverse_norm, row_norm};
use crate::math::span::meet;
use crate::math::tile::TILE_VECTORS;
use crate::operand::RowStrides;

/// Room for the packed operands of one problem, which the launch that multiplies them fills first.
pub(super) struct Packed {
    rows: Handle,           // f32, [heads · (rows_padded + active_padded), dim_padded]
    norms: Handle,          // f32, [heads · (rows_padded + active_padded)], before clamping
    panels: Option<Handle>, // f32, [heads · active_padded / width, dim_padded, width]
    sizes: Sizes,
}

/// Packed rows.
fn packed_rows(sizes: &Sizes) -> usize {
    sizes.heads * (sizes.rows_padded + sizes.active_padded)
}

/// Floats in panels.
fn panel_floats(sizes: &Sizes) -> usize {
    sizes.heads * sizes.active_padded * sizes.dim_padded
}

impl Packed {
    /// Room for operands of these sizes; with panels if `for_logits`.
    pub(super) fn empty(client: &Client, sizes: Sizes, for_logits: bool) -> Self {
        let floats = |count: usize| client.empty(count * size_of::<f32>());
        Self {
            rows: floats(packed_rows(&sizes) * sizes.dim_padded),
            norms: floats(packed_rows(&sizes)),
            panels: for_logits.then(|| floats(panel_floats(&sizes))),
            sizes,
        }
    }

    pub(super) fn layout_arg(&self) -> SizesLaunch {
        let sizes = &self.sizes;
        SizesLaunch::new(
            sizes.heads,
            sizes.rows,
            sizes.rows_padded,
            sizes.active,
            sizes.active_padded,
            sizes.dim,
            sizes.dim_padded,
        )
    }

    pub(super) fn rows_arg(&self) -> BufferArg {
        // SAFETY: `empty` allocated exactly this many elements.
        unsafe {
            BufferArg::from_raw_parts(
                self.rows.clone(),
                packed_rows(&self.sizes) * self.sizes.dim_padded,
            )
        }
    }

    /// The panels in vectors of `lanes`; a vector of the rows, which nobody reads, where there are none.
    pub(super) fn panels_arg(&self, lanes: usize) -> BufferArg {
        let (handle, elements) = match &self.panels {
            Some(panels) => (panels, panel_floats(&self.sizes)),
            None => (&self.rows, lanes),
        };
        // SAFETY: `empty` allocated at least this many elements, and lanes divide the tile.
        unsafe { BufferArg::from_raw_parts(handle.clone(), elements / lanes) }
    }

    pub(super) fn norms_arg(&self) -> BufferArg {
        // SAFETY: `empty` allocated exactly this many elements.
        unsafe { BufferArg::from_raw_parts(self.norms.clone(), packed_rows(&self.sizes)) }
    }
}

/// Packs both operands, a panel at a time; the units of the cube meet at the end.
#[cube]
pub(super) fn pack<F: Float, M: Size, N: Size>(
    embeddings: &[Vector<F, M>],
    embedding_strides: &RowStrides,
    weights: &[Vector<F, M>],
    weight_strides: &RowStrides,
    rows: &mut [f32],
    panels: &mut [Vector<f32, N>],
    norms: &mut [f32],
    layout: &Sizes,
    #[comptime] with_panels: bool,
    #[comptime] units: usize,
) {
    let lanes = N::value();
    let width = comptime!(lanes * TILE_VECTORS);
    let embedding_panels = layout.heads * layout.rows_padded / width;
    let weight_panels = layout.heads * layout.active_padded / width;
    let mut panel = UNIT_POS as usize;
    while panel < embedding_panels + weight_panels {
        if panel < embedding_panels {
            pack_rows::<F, M>(
                embeddings,
                embedding_strides,
                rows,
                norms,
                layout,
                panel,
                Operand::Embeddings,
                width,
            );
        } else {
            let panel = panel - embedding_panels;
            pack_rows::<F, M>(
                weights,
                weight_strides,
                rows,
                norms,
                layout,
                panel,
                Operand::Weights,
                width,
            );
            if comptime!(with_panels) {
                interleave::<N>(&*rows, panels, layout, panel);
            }
        }
        panel += CUBE_DIM as usize;
    }
    meet(units);
}

/// Normalizes the rows of one panel.
#[cube]
fn pack_rows<F: Float, M: Size>(
    source: &[Vector<F, M>],
    strides: &RowStrides,
    rows: &mut [f32],
    norms: &mut [f32],
    layout: &Sizes,
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
fn interleave<N: Size>(rows: &[f32], panels: &mut [Vector<f32, N>], layout: &Sizes, panel: usize) {
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
