//! The pieces that a step is cut into, and where they are in the workspace.

use cubecl::prelude::*;

use super::rows::Item;
use crate::math::span::Span;

/// Classes whose gradients a unit accumulates at once.
pub(super) const OWNED_CLASSES: usize = 32;
/// Panels of rows that a unit multiplies with those at once.
pub(super) const OWNED_PANELS: usize = 32;
/// Floats between rows that are read together: a cache line more than a power of two, so that they fall into other sets.
pub(super) const SKEW: usize = 16;

/// The pieces, and where they are in the workspace (in f32 elements). An *item* is a panel of `width` rows of one head;
/// a *chunk* is the items, or the classes, that are in the workspace at once.
#[derive(CubeType, CubeLaunch, Clone, Copy, Debug)]
pub(super) struct Plan {
    pub heads: usize,
    pub rows: usize,
    pub active: usize,
    pub stored: usize,
    pub dim: usize,
    pub dim_padded: usize,
    /// Of one head.
    pub panels: usize,
    pub items: usize,
    pub chunk_items: usize,
    /// Panels of columns and of gradients: one for each item of a chunk, or, where all classes are one block and an item is done with
    /// before the next is begun, for each unit.
    pub held: usize,
    /// `active`, padded to whole register tiles.
    pub classes: usize,
    pub chunk_classes: usize,
    pub class_block: usize,
    /// Columns that are multiplied while they are in the first-level cache.
    pub depth: usize,
    /// `[2, slots, class_block, dim_padded + SKEW]`: unit-norm class weights of the chunk's heads, a block being used and the next.
    pub packed: usize,
    pub slots: usize,
    /// `[heads, dim_padded]`: sums of the unit-norm class weights, for smoothed labels.
    pub totals: usize,
    /// `[held, dim_padded, width]`: unit-norm embeddings, a column of a panel after another.
    pub columns: usize,
    /// `[dim_padded / width, chunk_items · width, width]`: the same in blocks of columns, row after row.
    pub blocks: usize,
    /// `[held, dim_padded / width, width, width]`: gradients of the unit-norm embeddings.
    pub gradient: usize,
    /// Of one head: those whose exponentials wait in the gradient of the class weights, if any do.
    pub kept_panels: usize,
    /// `[chunk_items, chunk_classes, width]`: exponentials or logit gradients, where class weights get gradients and do not hold them
    /// themselves.
    pub logits: usize,
    /// `[chunk_items, ⌈classes / class_block⌉, width]`: the base of each block's exponentials.
    pub bases: usize,
    /// `[chunk_items, STATES, width]`
    pub state: usize,
    /// `[active, dim_padded]` of one head: f32 weight gradients carried from chunk to chunk.
    pub carry: usize,
    /// `[units, own]`, a unit's own space.
    pub units: usize,
    pub own: usize,
}

/// What waits in the gradient of the class weights until it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum InGradient {
    /// Nothing, since it is not f32: sums of a head that spans several chunks wait in `carry`.
    Nothing,
    /// Sums of a head that spans several chunks.
    Sums,
    /// The exponentials of each class with the rows of its head, all of them or as many as find a place there: the logits of the
    /// others are computed again.
    Exponentials { all: bool },
}

impl InGradient {
    pub(super) fn exponentials(self) -> bool {
        matches!(self, Self::Exponentials { .. })
    }

    pub(super) fn some_exponentials(self) -> bool {
        self == Self::Exponentials { all: false }
    }
}

impl Plan {
    pub(super) fn launch_arg(&self) -> PlanLaunch {
        PlanLaunch::new(
            self.heads,
            self.rows,
            self.active,
            self.stored,
            self.dim,
            self.dim_padded,
            self.panels,
            self.items,
            self.chunk_items,
            self.held,
            self.classes,
            self.chunk_classes,
            self.class_block,
            self.depth,
            self.packed,
            self.slots,
            self.totals,
            self.columns,
            self.blocks,
            self.gradient,
            self.kept_panels,
            self.logits,
            self.bases,
            self.state,
            self.carry,
            self.units,
            self.own,
        )
    }
}

/// What is kept of each row of an item.
pub(super) const STATES: usize = 12;

/// Where an item's `[width]` of each is.
#[derive(CubeType, Clone, Copy)]
pub(super) struct RowState {
    /// Of the embeddings, before clamping.
    pub norms: usize,
    /// Once the classes are seen; until then, after each block, what the exponentials before it are to be multiplied with.
    pub lse: usize,
    /// What rounding took from it.
    pub lse_low: usize,
    /// The gradient that arrives, times the scale.
    pub arriving: usize,
    pub loss: usize,
    /// The highest logit so far.
    pub peak: usize,
    /// What is subtracted from logits before the exponential.
    pub base: usize,
    /// The sum of the exponentials so far.
    pub sum: usize,
    /// The target's logit.
    pub target: usize,
    /// The sum of the logits so far.
    pub total: usize,
    /// With a margin, the target's logit without it,
    pub plain: usize,
    /// and the derivative of the one with it by the one without.
    pub slope: usize,
}

#[cube]
impl Plan {
    /// An item of a chunk.
    pub(super) fn item(&self, item: usize, chunk: &Span) -> Item {
        Item {
            item,
            local: item - chunk.start,
            slot: self.head(item) - self.head(chunk.start),
        }
    }

    /// The head of an item.
    pub(super) fn head(&self, item: usize) -> usize {
        item / self.panels
    }

    /// The first row of an item in its head.
    pub(super) fn first_row(&self, item: usize, #[comptime] width: usize) -> usize {
        (item % self.panels) * width
    }

    /// Floats of a panel.
    pub(super) fn panel(&self, #[comptime] width: usize) -> usize {
        self.dim_padded * width
    }

    /// The place of an item of a chunk among the panels that are held.
    fn held_place(&self, local: usize) -> usize {
        select(self.held < self.chunk_items, UNIT_POS as usize, local)
    }

    /// Where an item's columns are.
    pub(super) fn columns_panel(&self, local: usize, #[comptime] width: usize) -> usize {
        self.columns + self.held_place(local) * self.panel(width)
    }

    /// Where the gradients of an item's rows are.
    pub(super) fn gradient_panel(&self, local: usize, #[comptime] width: usize) -> usize {
        self.gradient + self.held_place(local) * self.panel(width)
    }

    /// Floats from one packed class weight to the next.
    pub(super) fn weight_stride(&self) -> usize {
        self.dim_padded + SKEW
    }

    /// Where the block number `block` of the class weights of a chunk's head number `slot` is packed.
    pub(super) fn packed_weights(&self, block: usize, slot: usize) -> usize {
        self.packed + (block % 2 * self.slots + slot) * self.class_block * self.weight_stride()
    }

    /// Where this unit has the logits of an item with a block of classes, if they are not kept, or with its own classes.
    pub(super) fn own_logits(&self) -> usize {
        self.units + UNIT_POS as usize * self.own
    }

    /// Where this unit accumulates gradients of class weights: `[dim_padded / width, OWNED_CLASSES, width]`.
    pub(super) fn own_gradient(&self, #[comptime] width: usize) -> usize {
        self.own_logits() + max(self.class_block, OWNED_CLASSES) * width
    }

    /// Where this unit has the logit gradients of its classes: `[OWNED_CLASSES]` rows, [`own_stride`](Self::own_stride) apart.
    pub(super) fn own_rows(&self, #[comptime] width: usize) -> usize {
        self.own_gradient(width) + OWNED_CLASSES * self.dim_padded
    }

    /// Floats from one class to the next there.
    pub(super) fn own_stride(&self, #[comptime] width: usize) -> usize {
        comptime!(OWNED_PANELS * width + SKEW)
    }

    /// Where this unit packs the weights of its classes, if it multiplies some rows with them again.
    pub(super) fn own_weights(&self, #[comptime] width: usize) -> usize {
        self.own_rows(width) + OWNED_CLASSES * self.own_stride(width)
    }

    /// Where an item's first row is in the first block of columns.
    pub(super) fn block_row(&self, local: usize, #[comptime] width: usize) -> usize {
        self.blocks + local * comptime!(width * width)
    }

    /// Floats from one block of columns to the next.
    pub(super) fn block_stride(&self, #[comptime] width: usize) -> usize {
        self.chunk_items * comptime!(width * width)
    }

    /// Where the rows of an item keep what is known of them.
    pub(super) fn state(&self, local: usize, #[comptime] width: usize) -> RowState {
        let at = self.state + local * comptime!(STATES * width);
        RowState {
            norms: at,
            lse: at + width,
            arriving: at + comptime!(2 * width),
            loss: at + comptime!(3 * width),
            peak: at + comptime!(4 * width),
            base: at + comptime!(5 * width),
            sum: at + comptime!(6 * width),
            target: at + comptime!(7 * width),
            total: at + comptime!(8 * width),
            lse_low: at + comptime!(9 * width),
            plain: at + comptime!(10 * width),
            slope: at + comptime!(11 * width),
        }
    }

    /// Where the base of a block's exponentials is.
    pub(super) fn base(&self, local: usize, block: usize, #[comptime] width: usize) -> usize {
        self.bases + (local * self.classes.div_ceil(self.class_block) + block) * width
    }

    /// Where the kept logits of an item's rows with a class of the chunk are, in the workspace.
    pub(super) fn logit(&self, local: usize, class: usize, #[comptime] width: usize) -> usize {
        self.logits + (local * self.chunk_classes + class) * width
    }

    /// Whether the exponentials of an item are in the gradient of the class weights, if any are.
    pub(super) fn is_kept(&self, item: usize) -> bool {
        item % self.panels < self.kept_panels
    }

    /// Where the exponentials of an item's rows with a class are there, in f32 elements. `per_float` elements of the gradient take the
    /// place of one.
    pub(super) fn kept_in_gradient(
        &self,
        item: usize,
        class: usize,
        #[comptime] width: usize,
        #[comptime] per_float: usize,
    ) -> usize {
        let row = self.head(item) * self.stored + class;
        row * (self.dim / per_float) + self.first_row(item, width)
    }
}
