//! How a step is cut into pieces that fit in caches and in a bounded workspace.

use cubecl::prelude::*;

use crate::packing::unit::TILE_VECTORS;

/// What one launch computes, decided when the kernel is compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Phases {
    /// Loss, lse, predictions and the reductions.
    pub loss: bool,
    /// The gradient of the embeddings.
    pub embeddings: bool,
    /// The gradient of the class weights.
    pub weights: bool,
    /// The upstream gradient has one element a row, not one a head.
    pub per_row: bool,
    /// The loss is a mean over the rows that count.
    pub mean: bool,
}

impl Phases {
    pub(crate) fn gradients(self) -> bool {
        self.embeddings || self.weights
    }

    /// Whether the exponentials of the loss are kept for the gradients, which then need no second product.
    pub(crate) fn keeps(self) -> bool {
        self.loss && self.gradients()
    }
}

/// Classes whose weights are packed at once; a multiple of every `tile_rows`.
const CLASS_BLOCK: usize = 64;
/// Classes whose gradients a unit accumulates at once.
pub(super) const OWNED_CLASSES: usize = 32;
/// Panels of rows that a unit carries through all classes together.
pub(super) const PANEL_BLOCK: usize = 8;
/// Floats that a block of class weights, and one of panels, may take: half of a 1 MiB second-level cache together.
const BLOCK_FLOATS: usize = 128 << 10;
/// Floats of the whole workspace: 60 MiB, whatever `N·K` is.
const WORKSPACE_FLOATS: usize = 15 << 20;

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
    /// `active`, padded to whole register tiles.
    pub classes: usize,
    pub chunk_classes: usize,
    pub class_block: usize,
    pub panel_block: usize,
    /// `[chunk_items, dim_padded, width]`: unit-norm embeddings, a column of a panel after another.
    pub columns: usize,
    /// `[chunk_items, dim_padded / width, width, width]`: the same in blocks of columns, row after row.
    pub blocks: usize,
    /// `[chunk_items, dim_padded / width, width, width]`: gradients of the unit-norm embeddings.
    pub gradient: usize,
    /// `[chunk_items, chunk_classes, width]`: exponentials, then logit gradients.
    pub logits: usize,
    /// `[chunk_items, classes / tile_rows, width]`: the peak under which the exponentials were taken.
    pub peaks: usize,
    /// `[chunk_items, STATES, width]`
    pub state: usize,
    /// `[active, dim_padded]` of one head: f32 weight gradients carried from chunk to chunk.
    pub carry: usize,
    /// `[units]` of `class_block · dim_padded` packed weights, then `OWNED_CLASSES · dim_padded` of their gradients.
    pub units: usize,
}

/// A plan with what only the host needs of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct HostPlan {
    pub plan: Plan,
    pub floats: usize,
    /// Where the weight gradients of a head that spans several chunks wait: in the f32 gradient itself, or in `carry`.
    pub carry_in_gradient: bool,
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
    /// Whether the gradients are f32.
    pub full: bool,
}

impl HostPlan {
    /// The plan of a launch, or none if keeping the exponentials would not fit or not pay.
    pub(super) fn new(problem: &Problem, phases: Phases) -> Option<Self> {
        let width = problem.lanes * TILE_VECTORS;
        let dim_padded = problem.dim.next_multiple_of(width);
        let classes = problem.active.next_multiple_of(problem.tile_rows);
        let panels = problem.rows.div_ceil(width);
        let items = problem.heads * panels;
        let panel = dim_padded * width;
        let class_block = (BLOCK_FLOATS / dim_padded)
            .clamp(problem.tile_rows, CLASS_BLOCK)
            .next_multiple_of(problem.tile_rows)
            .min(classes);
        let panel_block = (BLOCK_FLOATS / panel).clamp(1, PANEL_BLOCK);

        let panels_each = if phases.embeddings { 3 } else { 2 };
        let of_item = panels_each * panel + STATES * width;
        let groups = classes / problem.tile_rows;
        let of_units = problem.units * (class_block + OWNED_CLASSES) * dim_padded;
        let room = WORKSPACE_FLOATS.saturating_sub(of_units);
        let least = items.min(problem.units);

        let (chunk_items, chunk_classes) = if phases.keeps() {
            let fitting = room / (of_item + (classes + groups) * width);
            let fitting = match fitting / problem.units * problem.units {
                _ if fitting >= items => items,
                // Gradients of less than f32 are not carried in themselves: a head's rows stay together.
                _ if !problem.full => fitting / panels * panels,
                whole => whole,
            };
            if fitting < least {
                return None;
            }
            (fitting, classes)
        } else if phases.gradients() {
            let fitting = (room / 2 / of_item).max(least).min(items);
            let block = class_block * width * fitting;
            let blocks = ((room - room / 2) / block).max(1);
            (fitting, (blocks * class_block).min(classes))
        } else {
            ((problem.units * panel_block).min(items), 0)
        };
        let split = phases.weights && chunk_items < items && chunk_items % panels != 0;
        let carry_in_gradient = problem.full;

        let mut floats = 0;
        let mut take = |count: usize| {
            let at = floats;
            floats += count.next_multiple_of(width);
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
            classes,
            chunk_classes,
            class_block,
            panel_block,
            columns: take(chunk_items * panel),
            blocks: take(chunk_items * panel),
            gradient: take(if phases.embeddings {
                chunk_items * panel
            } else {
                0
            }),
            logits: take(chunk_items * chunk_classes * width),
            peaks: take(if phases.keeps() {
                chunk_items * groups * width
            } else {
                0
            }),
            state: take(chunk_items * STATES * width),
            carry: take(if split && !carry_in_gradient {
                problem.active * dim_padded
            } else {
                0
            }),
            units: take(of_units),
        };
        Some(Self {
            plan,
            floats,
            carry_in_gradient,
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
            self.classes,
            self.chunk_classes,
            self.class_block,
            self.panel_block,
            self.columns,
            self.blocks,
            self.gradient,
            self.logits,
            self.peaks,
            self.state,
            self.carry,
            self.units,
        )
    }
}

/// What is kept of each row of an item.
const STATES: usize = 4;

/// Where an item's `[width]` of each is.
#[derive(CubeType, Clone, Copy)]
pub(super) struct RowState {
    /// Of the embeddings, before clamping.
    pub norms: usize,
    pub lse: usize,
    /// The gradient that arrives, times the scale.
    pub arriving: usize,
    pub loss: usize,
}

#[cube]
impl Plan {
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

    /// Where this unit packs class weights.
    pub(super) fn packed_weights(&self) -> usize {
        self.units + UNIT_POS as usize * (self.class_block + OWNED_CLASSES) * self.dim_padded
    }

    /// Where this unit accumulates gradients of class weights.
    pub(super) fn owned_gradient(&self) -> usize {
        self.packed_weights() + self.class_block * self.dim_padded
    }

    /// Where the rows of an item keep what is known of them.
    pub(super) fn state(&self, local: usize, #[comptime] width: usize) -> RowState {
        let at = self.state + local * comptime!(STATES * width);
        RowState {
            norms: at,
            lse: at + width,
            arriving: at + comptime!(2 * width),
            loss: at + comptime!(3 * width),
        }
    }

    /// Where the peak is under which the exponentials of a group of classes were taken.
    pub(super) fn peak(
        &self,
        local: usize,
        group: usize,
        groups: usize,
        #[comptime] width: usize,
    ) -> usize {
        self.peaks + (local * groups + group) * width
    }

    /// Where the logits of an item's rows with a class of the chunk are.
    pub(super) fn logit(&self, local: usize, class: usize, #[comptime] width: usize) -> usize {
        self.logits + (local * self.chunk_classes + class) * width
    }
}
