//! The sizes of a cosine head as tiles have them, and on a CPU its operands, made ready for products: unit rows in f32, zero-padded to whole tiles.
//!
//! `x̂ = x / max(‖x‖₂, 1e-12)` for the embeddings of every head and for the active class weights, in one
//! buffer: first `[heads, rows_padded, dim_padded]`, then `[heads, active_padded, dim_padded]`. The padding is
//! zero, so no product has to look at it. For logits the class weights are in *panels* as well, the same values with
//! `width` rows interleaved: `[.., dim_padded, width]`, so that a vector load takes one coordinate of
//! several classes.

mod layout;
pub(crate) mod unit;

pub(crate) use layout::{Layout, LayoutLaunch, Operand};

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::blueprint::Blueprint;
use crate::operand::Strided;

/// The packed operands of one problem.
#[derive(Clone)]
pub(crate) struct Packed {
    rows: Handle,           // f32, [heads · (rows_padded + active_padded), dim_padded]
    norms: Handle,          // f32, [heads · (rows_padded + active_padded)], before clamping
    panels: Option<Handle>, // f32, [heads · active_padded / width, dim_padded, width]
    pub sizes: PackedSizes,
}

/// The sizes of [`Packed`], on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PackedSizes {
    pub heads: usize,
    pub rows: usize,
    pub rows_padded: usize,
    pub active: usize,
    pub active_padded: usize,
    pub dim: usize,
    pub dim_padded: usize,
}

impl PackedSizes {
    pub(crate) fn new(
        heads: usize,
        rows: usize,
        active: usize,
        dim: usize,
        blueprint: &Blueprint,
    ) -> Self {
        Self {
            heads,
            rows,
            rows_padded: rows.next_multiple_of(blueprint.tile()),
            active,
            active_padded: active.next_multiple_of(blueprint.tile()),
            dim,
            dim_padded: dim.next_multiple_of(blueprint.tile()),
        }
    }

    fn packed_rows(&self) -> usize {
        self.heads * (self.rows_padded + self.active_padded)
    }

    pub(crate) fn elements(&self) -> usize {
        self.packed_rows() * self.dim_padded
    }

    fn panel_elements(&self) -> usize {
        self.heads * self.active_padded * self.dim_padded
    }

    pub(crate) fn launch_arg(&self) -> LayoutLaunch {
        LayoutLaunch::new(
            self.heads,
            self.rows,
            self.rows_padded,
            self.active,
            self.active_padded,
            self.dim,
            self.dim_padded,
        )
    }
}

impl Packed {
    /// Packs `embeddings [heads, rows, dim]` and the first `active` rows of `weights [heads, classes, dim]`, read in vectors
    /// of `vector`; with panels if `for_logits`.
    pub(crate) fn new(
        client: &Client,
        embeddings: &Strided,
        weights: &Strided,
        sizes: PackedSizes,
        vector: usize,
        blueprint: &Blueprint,
        for_logits: bool,
    ) -> Self {
        let floats = |count: usize| client.empty(count * size_of::<f32>());
        let packed = Self {
            rows: floats(sizes.elements()),
            norms: floats(sizes.packed_rows()),
            panels: for_logits.then(|| floats(sizes.panel_elements())),
            sizes,
        };
        unit::launch(client, embeddings, weights, &packed, vector, blueprint);
        packed
    }

    pub(crate) fn rows_arg(&self) -> BufferArg {
        // SAFETY: `new` allocated exactly this many elements.
        unsafe { BufferArg::from_raw_parts(self.rows.clone(), self.sizes.elements()) }
    }

    /// The panels in vectors of `lanes`; a vector of the rows, which nobody reads, where there are none.
    pub(crate) fn panels_arg(&self, lanes: usize) -> BufferArg {
        let (handle, elements) = match &self.panels {
            Some(panels) => (panels, self.sizes.panel_elements()),
            None => (&self.rows, lanes),
        };
        // SAFETY: `new` allocated at least this many elements, and lanes divide the tile.
        unsafe { BufferArg::from_raw_parts(handle.clone(), elements / lanes) }
    }

    pub(crate) fn norms_arg(&self) -> BufferArg {
        // SAFETY: `new` allocated exactly this many elements.
        unsafe { BufferArg::from_raw_parts(self.norms.clone(), self.sizes.packed_rows()) }
    }
}
