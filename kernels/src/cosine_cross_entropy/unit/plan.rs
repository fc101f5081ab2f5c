//! How a step is cut into pieces that fit in caches and in a bounded workspace.

use cubecl::prelude::*;

use super::rows::Item;
use crate::loss::arriving::Arrives;
use crate::math::span::Span;
use crate::math::tile::TILE_VECTORS;

/// What one launch computes, decided when the kernel is compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Phases {
    /// Loss, lse, predictions and the reductions.
    pub loss: bool,
    /// The gradient of the embeddings.
    pub embeddings: bool,
    /// The gradient of the class weights.
    pub weights: bool,
    /// Whom a number of the upstream gradient is for.
    pub arrives: Arrives,
    /// The loss is a mean over the rows that count.
    pub mean: bool,
    /// Labels are smoothed.
    pub smooth: bool,
    /// Heads have weights.
    pub weighted: bool,
}

impl Phases {
    pub(crate) fn gradients(self) -> bool {
        self.embeddings || self.weights
    }

    /// Whether gradients follow from the exponentials of the loss, with no second product for logits.
    pub(crate) fn at_once(self) -> bool {
        self.loss && self.gradients()
    }

    /// Whether gradients of rows wait for the sums of all class weights, which one unit makes for all.
    pub(crate) fn needs_totals(self) -> bool {
        self.at_once() && self.smooth
    }
}

/// Classes whose weights are packed at once; a multiple of every `tile_rows`.
const CLASS_BLOCK: usize = 128;
/// Classes whose gradients a unit accumulates at once.
pub(super) const OWNED_CLASSES: usize = 32;
/// Panels of rows that a unit multiplies with those at once.
pub(super) const OWNED_PANELS: usize = 32;
/// Panels of rows whose blocks of columns stay in the first-level cache meanwhile.
pub(super) const CACHED_PANELS: usize = 4;
/// Columns of a panel that stay in the first-level cache while a block of classes is multiplied with them.
const CACHED_COLUMNS: usize = 192;
/// Floats between rows that are read together: a cache line more than a power of two, so that they fall into other sets.
pub(super) const SKEW: usize = 16;
/// Heads whose blocks of class weights are to fit together without getting smaller.
const HEADS_TOGETHER: usize = 8;
/// Floats that the packed class weights may take: 8 MiB, however many heads there are.
const PACKED_FLOATS: usize = 2 << 20;
/// Floats of the whole workspace, 60 MiB, whatever `N·K` is, and 8 MiB a unit where there are many; a panel of rows and the
/// owned classes of each unit are there even where they take more.
const WORKSPACE_FLOATS: usize = 15 << 20;
const UNIT_FLOATS: usize = 2 << 20;
/// Exponentials of a head that are kept in the workspace, though they would fit in the gradient: 1 MiB.
const CACHED_EXPONENTIALS: usize = 1 << 18;

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

/// A plan with what only the host needs of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct HostPlan {
    pub plan: Plan,
    pub floats: usize,
    pub in_gradient: InGradient,
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

/// The sizes a plan is made from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Problem {
    pub heads: usize,
    pub rows: usize,
    pub active: usize,
    pub stored: usize,
    pub dim: usize,
    pub units: usize,
    pub lanes: usize,
    pub tile_rows: usize,
    /// Bytes of an element of the gradients.
    pub bytes: usize,
}

impl HostPlan {
    /// The plan of a launch, or none if keeping the exponentials would not fit or not pay.
    pub(super) fn new(problem: &Problem, phases: Phases) -> Option<Self> {
        let full = problem.bytes == size_of::<f32>();
        let width = problem.lanes * TILE_VECTORS;
        let dim_padded = problem.dim.next_multiple_of(width);
        let classes = problem.active.next_multiple_of(problem.tile_rows);
        let panels = problem.rows.div_ceil(width);
        let items = problem.heads * panels;
        let panel = dim_padded * width;
        let block_floats = |heads: usize, classes: usize| 2 * heads * classes * (dim_padded + SKEW);
        let tile_rows = problem.tile_rows;
        // Rounded down: upwards, the last head would find no place.
        let together = PACKED_FLOATS / block_floats(problem.heads.min(HEADS_TOGETHER), tile_rows);
        let class_block = (together * tile_rows)
            .clamp(tile_rows, CLASS_BLOCK)
            .min(classes);
        // A chunk has no more items than touch so many heads, wherever it starts.
        let slots = (PACKED_FLOATS / block_floats(1, class_block)).clamp(1, problem.heads);
        let most = match slots == problem.heads {
            true => items,
            false => ((slots - 1) * panels).max(1),
        };
        let parts = dim_padded.div_ceil(CACHED_COLUMNS);
        let depth = dim_padded.div_ceil(parts).next_multiple_of(width);

        let blocks = classes.div_ceil(class_block);
        let held_each = 1 + usize::from(phases.embeddings);
        let one_by_one = blocks == 1 && !phases.needs_totals();
        let panels_each = usize::from(phases.gradients()) + if one_by_one { 0 } else { held_each };
        let of_item = panels_each * panel + STATES * width;
        let packed = block_floats(slots, class_block);
        let own = class_block.max(OWNED_CLASSES) * width
            + OWNED_CLASSES * (dim_padded + OWNED_PANELS * width + SKEW).next_multiple_of(width);
        let of_unit = own + if one_by_one { held_each * panel } else { 0 };
        let room = WORKSPACE_FLOATS
            .max(problem.units.saturating_mul(UNIT_FLOATS))
            .saturating_sub(packed + problem.heads * dim_padded + problem.units * of_unit);
        let least = most.min(problem.units);
        let fit = |room: usize, kept: usize| (room / (of_item + (kept + blocks) * width)).min(most);

        // A class's gradient, if it is whole vectors of f32, has a place for so many panels.
        let place = problem.dim * problem.bytes;
        let kept_panels = match place.is_multiple_of(problem.lanes * size_of::<f32>()) {
            true => (place / (width * size_of::<f32>())).min(panels),
            false => 0,
        };
        let all = kept_panels == panels;
        // To multiply a unit's own classes again they are packed again.
        let own_weights = match all {
            true => 0,
            false => OWNED_CLASSES * (dim_padded + SKEW),
        };
        // A head's rows stay together where their exponentials take the place of its gradient.
        let room_beside = room.saturating_sub(problem.units * own_weights);
        let of_whole_heads = fit(room_beside, 0) / panels * panels;
        let mut in_gradient = match full {
            true => InGradient::Sums,
            false => InGradient::Nothing,
        };

        let (chunk_items, chunk_classes) = if phases.weights && phases.loss {
            let fitting = fit(room, classes);
            let fitting = match fitting {
                _ if fitting == items => items,
                // Gradients of less than f32 are not carried in themselves: a head's rows stay together.
                _ if !full => fitting / panels * panels,
                // Few items: one for each unit that has any.
                _ if fitting < problem.units => fitting,
                _ => fitting / problem.units * problem.units,
            };
            let better = match all {
                true => panels * width * classes > CACHED_EXPONENTIALS,
                // Fewer than a quarter do not pay for packing the class weights again.
                false => kept_panels * 4 >= panels && fitting < least && !one_by_one,
            };
            if better && of_whole_heads >= least {
                in_gradient = InGradient::Exponentials { all };
                (of_whole_heads, classes)
            } else if fitting >= least {
                (fitting, classes)
            } else {
                return None;
            }
        } else if phases.weights {
            let fitting = (room / 2 / of_item).max(least).min(most);
            let block = class_block * width * fitting;
            let fitting_blocks = ((room - room / 2) / block).max(1);
            (fitting, (fitting_blocks * class_block).min(classes))
        } else {
            ((room / of_item).max(least).min(most), 0)
        };
        let split = phases.weights && chunk_items < items && chunk_items % panels != 0;
        let own = match in_gradient.some_exponentials() {
            true => own + own_weights,
            false => own,
        };

        let held = match one_by_one {
            true => chunk_items.min(problem.units),
            false => chunk_items,
        };
        let mut floats = 0;
        let mut take = |wanted: bool, count: usize| {
            let at = floats;
            floats += if wanted {
                count.next_multiple_of(width)
            } else {
                0
            };
            at
        };
        let plan = Plan {
            heads: problem.heads,
            rows: problem.rows,
            active: problem.active,
            stored: problem.stored,
            dim: problem.dim,
            dim_padded,
            panels,
            items,
            chunk_items,
            held,
            classes,
            chunk_classes,
            class_block,
            depth,
            packed: take(true, packed),
            slots,
            totals: take(phases.smooth, problem.heads * dim_padded),
            columns: take(true, held * panel),
            blocks: take(phases.gradients(), chunk_items * panel),
            gradient: take(phases.embeddings, held * panel),
            kept_panels,
            logits: take(
                phases.weights && !in_gradient.exponentials(),
                chunk_items * chunk_classes * width,
            ),
            bases: take(phases.weights && phases.loss, chunk_items * blocks * width),
            state: take(true, chunk_items * STATES * width),
            carry: take(split && !full, problem.active * dim_padded),
            units: take(true, problem.units * own),
            own,
        };
        Some(Self {
            plan,
            floats,
            in_gradient,
        })
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
const STATES: usize = 9;

/// Where an item's `[width]` of each is.
#[derive(CubeType, Clone, Copy)]
pub(super) struct RowState {
    /// Of the embeddings, before clamping.
    pub norms: usize,
    /// Once the classes are seen; until then, after each block, what the exponentials before it are to be multiplied with.
    pub lse: usize,
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

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(shape: [usize; 4], units: usize, bytes: usize) -> Option<HostPlan> {
        let [heads, rows, dim, active] = shape;
        let problem = Problem {
            heads,
            rows,
            active,
            stored: active,
            dim,
            units,
            lanes: 16,
            tile_rows: 8,
            bytes,
        };
        let both = Phases {
            loss: true,
            embeddings: true,
            weights: true,
            arrives: Arrives::Everywhere,
            mean: true,
            smooth: false,
            weighted: false,
        };
        HostPlan::new(&problem, both)
    }

    #[test]
    fn heads_up_to_eight_share_a_chunk_however_long_the_rows_are() {
        for heads in 1..=8 {
            for dim in [512, 1024, 2048, 2720, 4096] {
                for units in [1, 2, 16, 64] {
                    let shape = [heads, 128, dim, 100];
                    let HostPlan { plan, .. } = plan(shape, units, 4).expect("it fits");
                    assert_eq!(plan.slots, heads, "{shape:?} on {units}");
                    assert!(
                        plan.chunk_items >= plan.items.min(units),
                        "{shape:?} on {units}: {} items at once",
                        plan.chunk_items
                    );
                }
            }
        }
    }

    #[test]
    fn fewer_items_than_cores_are_computed_at_once_all_the_same() {
        for bytes in [4, 2] {
            for units in 1..=64 {
                for heads in [1, 2, 3, 9, 40] {
                    assert!(
                        plan([heads, 3, 4096, 128], units, bytes).is_some(),
                        "{heads} heads on {units}"
                    );
                }
            }
        }
    }

    #[test]
    fn nothing_is_computed_at_once_that_does_not_fit() {
        // Columns that fill no vector: nothing finds a place in the gradient.
        assert!(plan([1, 2048, 24, 100_000], 2, 4).is_some());
        assert!(plan([1, 2048, 24, 1_000_000], 2, 4).is_none());
    }

    #[test]
    fn exponentials_take_the_place_of_the_gradient_where_all_of_them_fit_or_would_not_elsewhere() {
        for units in [1, 2, 4, 16, 64] {
            for (shape, bytes, kept_panels) in [
                ([1, 512, 512, 1000], 4, 16),
                ([1, 512, 512, 100_000], 4, 16),
                ([1, 512, 512, 1_000_000], 4, 16),
                ([1, 250, 512, 10_000], 2, 8),
                ([1, 512, 512, 1_000_000], 2, 8),
                ([1, 2048, 512, 500_000], 4, 16),
                // Those that the suite compares with rows that do not fit.
                ([2, 35, 64, 7_001], 4, 2),
            ] {
                let host = plan(shape, units, bytes).expect("it fits");
                assert!(host.in_gradient.exponentials(), "{shape:?}");
                assert_eq!(host.plan.chunk_items, host.plan.items, "{shape:?}");
                assert_eq!(host.plan.kept_panels, kept_panels, "{shape:?}");
            }
            // More rows than find a place, where the workspace has one; what a cache holds; columns that fill no vector.
            for (shape, bytes) in [
                ([1, 544, 512, 10_000], 4),
                ([1, 512, 512, 10_000], 2),
                ([3, 128, 256, 20], 4),
                ([1, 500, 520, 1000], 4),
                ([1, 250, 528, 1000], 2),
            ] {
                let host = plan(shape, units, bytes).expect("it fits");
                assert!(!host.in_gradient.exponentials(), "{shape:?}");
            }
        }
    }
}
