//! How a step is cut into pieces that fit in caches and in a bounded workspace.

use super::phases::Phases;
use super::plan::{InGradient, OWNED_CLASSES, OWNED_PANELS, Plan, SKEW, STATES};
use crate::math::tile::TILE_VECTORS;

/// Classes whose weights are packed at once; a multiple of every `tile_rows`.
const CLASS_BLOCK: usize = 128;
/// Columns of a panel that stay in the first-level cache while a block of classes is multiplied with them.
const CACHED_COLUMNS: usize = 192;
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

/// A plan with what only the host needs of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct HostPlan {
    pub plan: Plan,
    /// Of the workspace.
    pub floats: usize,
    pub in_gradient: InGradient,
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
        let cut = Cut::new(problem, phases);
        let chunk = cut.chunk()?;
        Some(cut.place(&chunk))
    }
}

/// What a problem alone decides: the sizes of panels and of blocks of classes.
#[derive(Clone, Copy)]
struct Cut<'a> {
    problem: &'a Problem,
    phases: Phases,
    /// Rows of a panel.
    width: usize,
    dim_padded: usize,
    /// Floats of a panel of columns.
    panel: usize,
    /// Of one head.
    panels: usize,
    items: usize,
    /// Items that a chunk may have: they touch no more heads than there are slots, wherever it starts.
    most: usize,
    /// Padded to whole register tiles.
    classes: usize,
    class_block: usize,
    /// Blocks of classes.
    blocks: usize,
    /// Heads whose blocks are packed at once.
    slots: usize,
    /// Floats of the packed blocks.
    packed: usize,
    /// Panels of columns and of gradients of an item.
    held_each: usize,
    /// An item is done with before its unit begins the next.
    one_by_one: bool,
    /// Floats of a unit's own space, apart from weights of its classes.
    own: usize,
}

/// What is in the workspace at once.
struct Chunk {
    items: usize,
    /// Whose logits are kept.
    classes: usize,
    in_gradient: InGradient,
}

impl<'a> Cut<'a> {
    fn new(problem: &'a Problem, phases: Phases) -> Self {
        let width = problem.lanes * TILE_VECTORS;
        let tile_rows = problem.tile_rows;
        let dim_padded = problem.dim.next_multiple_of(width);
        let classes = problem.active.next_multiple_of(tile_rows);
        let panels = problem.rows.div_ceil(width);
        let items = problem.heads * panels;
        let block_floats = |heads: usize, classes: usize| 2 * heads * classes * (dim_padded + SKEW);
        // Rounded down: upwards, the last head would find no place.
        let together = PACKED_FLOATS / block_floats(problem.heads.min(HEADS_TOGETHER), tile_rows);
        let class_block = (together * tile_rows)
            .clamp(tile_rows, CLASS_BLOCK)
            .min(classes);
        let slots = (PACKED_FLOATS / block_floats(1, class_block)).clamp(1, problem.heads);
        let most = match slots == problem.heads {
            true => items,
            false => ((slots - 1) * panels).max(1),
        };
        let blocks = classes.div_ceil(class_block);
        Self {
            problem,
            phases,
            width,
            dim_padded,
            panel: dim_padded * width,
            panels,
            items,
            most,
            classes,
            class_block,
            blocks,
            slots,
            packed: block_floats(slots, class_block),
            held_each: 1 + usize::from(phases.embeddings),
            one_by_one: blocks == 1 && !phases.needs_totals(),
            own: class_block.max(OWNED_CLASSES) * width
                + OWNED_CLASSES
                    * (dim_padded + OWNED_PANELS * width + SKEW).next_multiple_of(width),
        }
    }

    /// Whether gradients are f32, and so can carry sums.
    fn full(&self) -> bool {
        self.problem.bytes == size_of::<f32>()
    }

    /// Floats that an item takes in the workspace, without its logits.
    fn of_item(&self) -> usize {
        let blocks = usize::from(self.phases.gradients());
        let held = if self.one_by_one { 0 } else { self.held_each };
        (blocks + held) * self.panel + STATES * self.width
    }

    /// Floats that there are for items.
    fn room(&self) -> usize {
        let units = self.problem.units;
        let held = if self.one_by_one { self.held_each } else { 0 };
        let of_unit = self.own + held * self.panel;
        let taken = self.packed + self.problem.heads * self.dim_padded + units * of_unit;
        WORKSPACE_FLOATS
            .max(units.saturating_mul(UNIT_FLOATS))
            .saturating_sub(taken)
    }

    /// Items that busy all units.
    fn least(&self) -> usize {
        self.most.min(self.problem.units)
    }

    /// Panels of rows whose exponentials find a place in a class's gradient: any if it is whole vectors of f32.
    fn kept_panels(&self) -> usize {
        let place = self.problem.dim * self.problem.bytes;
        match place.is_multiple_of(self.problem.lanes * size_of::<f32>()) {
            true => (place / (self.width * size_of::<f32>())).min(self.panels),
            false => 0,
        }
    }

    /// Floats of the weights of a unit's classes, which it packs again if it multiplies some rows with them again.
    fn own_weights(&self) -> usize {
        OWNED_CLASSES * (self.dim_padded + SKEW)
    }

    /// The chunks, or none if keeping the exponentials would not fit or not pay.
    fn chunk(&self) -> Option<Chunk> {
        let in_gradient = match self.full() {
            true => InGradient::Sums,
            false => InGradient::Nothing,
        };
        if self.phases.weights && self.phases.loss {
            return self.chunk_at_once(in_gradient);
        }
        let (room, of_item) = (self.room(), self.of_item());
        if !self.phases.weights {
            return Some(Chunk {
                items: (room / of_item).max(self.least()).min(self.most),
                classes: 0,
                in_gradient,
            });
        }
        let items = (room / 2 / of_item).max(self.least()).min(self.most);
        let block = self.class_block * self.width * items;
        let blocks = ((room - room / 2) / block).max(1);
        Some(Chunk {
            items,
            classes: (blocks * self.class_block).min(self.classes),
            in_gradient,
        })
    }

    /// The chunks where gradients of class weights follow from exponentials that are kept.
    fn chunk_at_once(&self, in_gradient: InGradient) -> Option<Chunk> {
        let Self { panels, width, .. } = *self;
        let units = self.problem.units;
        let (room, least) = (self.room(), self.least());
        let fit = |room: usize, kept: usize| {
            let states = (kept + self.blocks) * width;
            (room / (self.of_item() + states)).min(self.most)
        };
        let fitting = match fit(room, self.classes) {
            fitting if fitting == self.items => fitting,
            // Gradients of less than f32 are not carried in themselves: a head's rows stay together.
            fitting if !self.full() => fitting / panels * panels,
            // Few items: one for each unit that has any.
            fitting if fitting < units => fitting,
            fitting => fitting / units * units,
        };
        let kept_panels = self.kept_panels();
        let all = kept_panels == panels;
        let better = match all {
            true => panels * width * self.classes > CACHED_EXPONENTIALS,
            // Fewer than a quarter do not pay for packing the class weights again.
            false => kept_panels * 4 >= panels && fitting < least && !self.one_by_one,
        };
        // A head's rows stay together where their exponentials take the place of its gradient.
        let beside = if all { 0 } else { units * self.own_weights() };
        let of_whole_heads = fit(room.saturating_sub(beside), 0) / panels * panels;
        let (items, in_gradient) = match better && of_whole_heads >= least {
            true => (of_whole_heads, InGradient::Exponentials { all }),
            false if fitting >= least => (fitting, in_gradient),
            false => return None,
        };
        Some(Chunk {
            items,
            classes: self.classes,
            in_gradient,
        })
    }

    /// Gives each piece its place in the workspace.
    fn place(&self, chunk: &Chunk) -> HostPlan {
        let Self {
            problem,
            phases,
            width,
            dim_padded,
            panel,
            ..
        } = *self;
        let in_gradient = chunk.in_gradient;
        let parts = dim_padded.div_ceil(CACHED_COLUMNS);
        let split =
            phases.weights && chunk.items < self.items && !chunk.items.is_multiple_of(self.panels);
        let held = match self.one_by_one {
            true => chunk.items.min(problem.units),
            false => chunk.items,
        };
        let own = match in_gradient.some_exponentials() {
            true => self.own + self.own_weights(),
            false => self.own,
        };
        let mut floats = 0;
        let mut take = |wanted: bool, count: usize| {
            let at = floats;
            if wanted {
                floats += count.next_multiple_of(width);
            }
            at
        };
        let plan = Plan {
            heads: problem.heads,
            rows: problem.rows,
            active: problem.active,
            stored: problem.stored,
            dim: problem.dim,
            dim_padded,
            panels: self.panels,
            items: self.items,
            chunk_items: chunk.items,
            held,
            classes: self.classes,
            chunk_classes: chunk.classes,
            class_block: self.class_block,
            depth: dim_padded.div_ceil(parts).next_multiple_of(width),
            packed: take(true, self.packed),
            slots: self.slots,
            totals: take(phases.smooth, problem.heads * dim_padded),
            columns: take(true, held * panel),
            blocks: take(phases.gradients(), chunk.items * panel),
            gradient: take(phases.embeddings, held * panel),
            kept_panels: self.kept_panels(),
            logits: take(
                phases.weights && !in_gradient.exponentials(),
                chunk.items * chunk.classes * width,
            ),
            bases: take(
                phases.weights && phases.loss,
                chunk.items * self.blocks * width,
            ),
            state: take(true, chunk.items * STATES * width),
            carry: take(split && !self.full(), problem.active * dim_padded),
            units: take(true, problem.units * own),
            own,
        };
        HostPlan {
            plan,
            floats,
            in_gradient,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loss::arriving::Arrives;

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
            scale: false,
            arrives: Arrives::Everywhere,
            mean: true,
            smooth: false,
            weighted: false,
            margin: false,
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
