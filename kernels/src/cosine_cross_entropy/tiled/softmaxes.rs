//! The softmaxes of a cube's rows: each unit's part of them, and the parts of a row put together.

use cubecl::prelude::*;

use crate::math::online_softmax::{FLOOR, RowSoftmax};
use crate::tiles::{Place, Tile, column_of, exp_scaled, result_of};

/// Of each row of which a unit holds results, the softmax of the columns that it has seen, in cosines. Where the tile's results need
/// the registers, it is stowed in shared memory while a tile is multiplied.
#[derive(CubeType)]
pub(super) struct Softmaxes {
    peaks: Array<f32>,
    sums: Array<f32>,
    bests: Array<u32>,
    totals: Array<f32>, // of all cosines, where labels are smoothed
    stowed_peaks: Shared<[f32]>,
    stowed_sums: Shared<[f32]>,
    stowed_bests: Shared<[u32]>,
    stowed_totals: Shared<[f32]>,
}

/// Where a unit stows row `r`.
#[cube]
fn slot(#[comptime] r: usize, #[comptime] tile: Tile) -> usize {
    comptime!(r * tile.units()) + UNIT_POS as usize
}

#[cube]
impl Softmaxes {
    /// Of no class yet.
    pub(super) fn new(#[comptime] tile: Tile, #[comptime] smooth: bool) -> Softmaxes {
        let rows = comptime!(tile.rows());
        let room = comptime!((tile.stowed() * tile.units()).max(1));
        let mut new = Softmaxes {
            peaks: Array::<f32>::new(rows),
            sums: Array::<f32>::new(rows),
            bests: Array::<u32>::new(rows),
            totals: Array::<f32>::new(rows),
            stowed_peaks: Shared::<[f32]>::new_slice(room),
            stowed_sums: Shared::<[f32]>::new_slice(room),
            stowed_bests: Shared::<[u32]>::new_slice(room),
            stowed_totals: Shared::<[f32]>::new_slice(comptime!(if smooth { room } else { 1 })),
        };
        #[unroll]
        for r in 0..rows {
            new.peaks[r] = FLOOR;
            new.sums[r] = 0.0;
            new.bests[r] = 0u32.runtime();
            new.totals[r] = 0.0;
        }
        #[unroll]
        for r in 0..rows {
            new.stow(r, tile);
            if comptime!(smooth && tile.stowed() > 0) {
                new.stowed_totals[slot(r, tile)] = new.totals[r];
            }
        }
        new
    }

    fn stow(&mut self, #[comptime] r: usize, #[comptime] tile: Tile) {
        if comptime!(tile.stowed() > 0) {
            let slot = slot(r, tile);
            self.stowed_peaks[slot] = self.peaks[r];
            self.stowed_sums[slot] = self.sums[r];
            self.stowed_bests[slot] = self.bests[r];
        }
    }

    fn take(&mut self, #[comptime] r: usize, #[comptime] tile: Tile) {
        if comptime!(tile.stowed() > 0) {
            let slot = slot(r, tile);
            self.peaks[r] = self.stowed_peaks[slot];
            self.sums[r] = self.stowed_sums[slot];
            self.bests[r] = self.stowed_bests[slot];
        }
    }

    /// Adds the cosines of a tile to the totals; those of classes that are not there are 0.
    pub(super) fn add_totals(&mut self, results: &Array<f32>, #[comptime] tile: Tile) {
        #[unroll]
        for r in 0..comptime!(tile.rows()) {
            let mut total = results[comptime!(result_of(r, 0, tile))];
            #[unroll]
            for c in 1..comptime!(tile.columns()) {
                total += results[comptime!(result_of(r, c, tile))];
            }
            if comptime!(tile.stowed() > 0) {
                self.stowed_totals[slot(r, tile)] += total;
            } else {
                self.totals[r] += total;
            }
        }
    }

    /// Folds in the cosines of row `r` of a tile whose first class is `first_class`.
    pub(super) fn fold(
        &mut self,
        #[comptime] r: usize,
        results: &Array<f32>,
        at: &Place,
        first_class: usize,
        scale: f32,
        #[comptime] tile: Tile,
    ) {
        let columns = comptime!(tile.columns());
        self.take(r, tile);
        let mut top = results[comptime!(result_of(r, 0, tile))];
        #[unroll]
        for c in 1..columns {
            top = max(top, results[comptime!(result_of(r, c, tile))]);
        }
        // Few tiles have a row's best class so far, so it is looked for apart.
        if top > self.peaks[r] {
            self.sums[r] *= exp_scaled(self.peaks[r] - top, scale, tile);
            self.peaks[r] = top;
            let mut best_column = 0u32.runtime();
            #[unroll]
            for back in 1..=columns {
                // The first of equal classes is found last.
                let c = comptime!(columns - back);
                let is_top = results[comptime!(result_of(r, c, tile))] == top;
                best_column = select(is_top, column_of(at, c, tile) as u32, best_column);
            }
            self.bests[r] = first_class as u32 + best_column;
        }
        let mut sum = self.sums[r];
        #[unroll]
        for c in 0..columns {
            let below = results[comptime!(result_of(r, c, tile))] - self.peaks[r];
            sum += exp_scaled(below, scale, tile);
        }
        self.sums[r] = sum;
        self.stow(r, tile);
    }

    /// Takes everything back, once all tiles are folded in.
    pub(super) fn take_all(&mut self, #[comptime] tile: Tile, #[comptime] smooth: bool) {
        #[unroll]
        for r in 0..comptime!(tile.rows()) {
            self.take(r, tile);
            if comptime!(smooth && tile.stowed() > 0) {
                self.totals[r] = self.stowed_totals[slot(r, tile)];
            }
        }
    }
}

/// The parts of one row of each unit, in shared memory.
#[derive(CubeType)]
pub(super) struct Parts {
    peaks: Shared<[f32]>,
    sums: Shared<[f32]>,
    bests: Shared<[u32]>,
    totals: Shared<[f32]>,
}

#[cube]
impl Parts {
    pub(super) fn new(#[comptime] tile: Tile, #[comptime] smooth: bool) -> Parts {
        let units = comptime!(tile.units());
        Parts {
            peaks: Shared::<[f32]>::new_slice(units),
            sums: Shared::<[f32]>::new_slice(units),
            bests: Shared::<[u32]>::new_slice(units),
            totals: Shared::<[f32]>::new_slice(comptime!(if smooth { units } else { 1 })),
        }
    }

    /// Writes the unit's part of its row `r`.
    pub(super) fn put(
        &mut self,
        softmaxes: &Softmaxes,
        #[comptime] r: usize,
        at: &Place,
        #[comptime] tile: Tile,
        #[comptime] smooth: bool,
    ) {
        let slot = at.group * comptime!(tile.sharing()) + at.member;
        self.peaks[slot] = softmaxes.peaks[r];
        self.sums[slot] = softmaxes.sums[r];
        self.bests[slot] = softmaxes.bests[r];
        if comptime!(smooth) {
            self.totals[slot] = softmaxes.totals[r];
        }
    }

    /// The row of the unit's group, from all of its units; without the target.
    pub(super) fn row(
        &self,
        at: &Place,
        scale: f32,
        #[comptime] tile: Tile,
        #[comptime] smooth: bool,
    ) -> RowSoftmax {
        let first = at.group * comptime!(tile.sharing());
        let end = first + comptime!(tile.sharing());
        let mut row = RowSoftmax {
            peak: self.peaks[first],
            sum: 0.0f32.runtime(),
            best: self.bests[first],
            target: 0.0f32.runtime(),
            total: 0.0f32.runtime(),
        };
        for other in first + 1..end {
            let peak = self.peaks[other];
            let best = self.bests[other];
            if peak > row.peak || (peak == row.peak && best < row.best) {
                row.peak = peak;
                row.best = best;
            }
        }
        for other in first..end {
            row.sum += self.sums[other] * ((self.peaks[other] - row.peak) * scale).exp();
            if comptime!(smooth) {
                row.total += self.totals[other];
            }
        }
        row
    }
}
