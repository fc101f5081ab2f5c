//! Rows are first sorted by class, stably, then a cube sums the rows of one class of one head.
//!
//! The sort is a counting sort over blocks of rows, each owned by one unit: histograms, their running sums, and
//! the order. All of it is linear in `rows + BLOCKS · classes`, without atomics, and rows of a class keep
//! their order, so the sums are those of a loop over the rows.

use cubecl::prelude::*;

use super::launch::AccumulateCall;
use crate::blueprint::{PLANE_UNITS, cubes_for};
use crate::loss::target::{INVALID, LabelRule, is_class, label_rule, target_of};
use crate::math::cube::cube_sum;
use crate::operand::whole;
use crate::packing::unit::{EPSILON, RowStrides};

/// Blocks of rows, one a unit.
const BLOCKS: usize = 64;

pub(super) fn launch(call: &AccumulateCall) {
    let client = call.client;
    let [heads, rows, dim] = call.embeddings.dims3();
    let classes = call.sums.counts.shape()[0];
    let rule = || label_rule(call.labels.dtype(), classes, call.options.ignore_index);
    let word = size_of::<u32>();
    let histograms = client.empty((BLOCKS + 1) * classes * word);
    let order = client.empty(rows * word);
    // SAFETY: every buffer has the length named beside it in the kernels; `Strided` proved the embeddings.
    unsafe {
        count::launch_unchecked(
            client,
            CubeCount::new_single(),
            CubeDim::new_1d(BLOCKS as u32),
            call.labels.buffer_arg(),
            BufferArg::from_raw_parts(histograms.clone(), (BLOCKS + 1) * classes),
            rows,
            classes,
            rule(),
            call.labels.dtype(),
        );
        offsets::launch_unchecked(
            client,
            CubeCount::new_single(),
            CubeDim::new_1d(PLANE_UNITS as u32),
            call.labels.buffer_arg(),
            BufferArg::from_raw_parts(histograms.clone(), (BLOCKS + 1) * classes),
            whole(&call.sums.counts, 1),
            whole(&call.sums.status, 1),
            rows,
            classes,
            rule(),
            call.labels.dtype(),
        );
        sort::launch_unchecked(
            client,
            CubeCount::new_single(),
            CubeDim::new_1d(BLOCKS as u32),
            call.labels.buffer_arg(),
            BufferArg::from_raw_parts(histograms.clone(), (BLOCKS + 1) * classes),
            BufferArg::from_raw_parts(order.clone(), rows),
            rows,
            classes,
            rule(),
            call.labels.dtype(),
        );
        sum::launch_unchecked(
            client,
            cubes_for(client, heads * classes),
            CubeDim::new_1d(PLANE_UNITS as u32),
            call.embeddings.buffer_arg(1),
            call.embeddings.strides_arg(1),
            BufferArg::from_raw_parts(histograms, (BLOCKS + 1) * classes),
            BufferArg::from_raw_parts(order, rows),
            whole(&call.sums.sums, 1),
            whole(&call.sums.carries, 1),
            heads,
            dim,
            classes,
            call.options.normalize,
            call.fresh,
            call.embeddings.dtype(),
        );
    }
}

/// The first row of a block.
#[cube]
fn block_start(block: usize, rows: usize) -> usize {
    min(block * rows.div_ceil(BLOCKS), rows)
}

/// `histograms[block, class]`: rows of the class in the block.
#[cube(launch_unchecked)]
fn count<I: Int>(
    labels: &[I],
    histograms: &mut [u32], // [BLOCKS + 1, classes]
    rows: usize,
    classes: usize,
    rule: LabelRule,
    #[define(I)] _label: ElemType,
) {
    let block = UNIT_POS as usize;
    for class in 0..classes {
        histograms[block * classes + class] = 0;
    }
    for row in block_start(block, rows)..block_start(block + 1, rows) {
        let target = target_of::<I>(labels[row], &rule);
        if is_class(target) {
            histograms[block * classes + target as usize] += 1;
        }
    }
}

/// Turns the histograms into the place of each block's first row of each class; the last row of them is where
/// the classes end. Adds the counts, and counts the bad labels.
#[cube(launch_unchecked)]
fn offsets<I: Int>(
    labels: &[I],
    histograms: &mut [u32], // [BLOCKS + 1, classes]
    counts: &mut [u32],     // [classes]
    status: &mut [u32],     // [2]
    rows: usize,
    classes: usize,
    rule: LabelRule,
    #[define(I)] _label: ElemType,
) {
    let unit = UNIT_POS as usize;
    let mut totals = Shared::<[u32]>::new_slice(PLANE_UNITS);
    let mut invalid = Shared::<[u32]>::new_slice(PLANE_UNITS);
    let mut firsts = Shared::<[u32]>::new_slice(PLANE_UNITS);
    let share = classes.div_ceil(PLANE_UNITS);
    let start = min(unit * share, classes);
    let end = min(start + share, classes);
    let mut total = 0u32.runtime();
    for class in start..end {
        for block in 0..BLOCKS {
            total += histograms[block * classes + class];
        }
    }
    totals[unit] = total;
    let mut my_invalid = 0u32.runtime();
    let mut my_first = INVALID.runtime();
    let mut row = unit;
    while row < rows {
        if target_of::<I>(labels[row], &rule) == INVALID {
            my_invalid += 1;
            my_first = min(my_first, row as u32);
        }
        row += PLANE_UNITS;
    }
    invalid[unit] = my_invalid;
    firsts[unit] = my_first;
    sync_cube();
    let mut place = 0u32.runtime();
    for other in 0..unit {
        place += totals[other];
    }
    for class in start..end {
        let before = place;
        for block in 0..BLOCKS {
            let here = histograms[block * classes + class];
            histograms[block * classes + class] = place;
            place += here;
        }
        histograms[BLOCKS * classes + class] = place;
        counts[class] += place - before;
    }
    if unit == 0 {
        let mut all = 0u32.runtime();
        let mut first = INVALID.runtime();
        for other in 0..PLANE_UNITS {
            all += invalid[other];
            first = min(first, firsts[other]);
        }
        if all > 0 {
            if status[0] == 0 {
                status[1] = first;
            }
            status[0] += all;
        }
    }
}

/// `order`: the rows, class by class. Leaves each block's place at the end of its rows of the class, which is
/// the next block's first: the first block's is then where its rows of the class ended.
#[cube(launch_unchecked)]
fn sort<I: Int>(
    labels: &[I],
    histograms: &mut [u32], // [BLOCKS + 1, classes]
    order: &mut [u32],      // [rows]
    rows: usize,
    classes: usize,
    rule: LabelRule,
    #[define(I)] _label: ElemType,
) {
    let block = UNIT_POS as usize;
    for row in block_start(block, rows)..block_start(block + 1, rows) {
        let target = target_of::<I>(labels[row], &rule);
        if is_class(target) {
            let at = block * classes + target as usize;
            order[histograms[at] as usize] = row as u32;
            histograms[at] += 1;
        }
    }
}

#[cube(launch_unchecked)]
fn sum<F: Float>(
    embeddings: &[F],
    strides: RowStrides,
    histograms: &[u32], // [BLOCKS + 1, classes]
    order: &[u32],      // [rows]
    sums: &mut [f32],   // [heads, classes, dim]
    carries: &mut [f32],
    heads: usize,
    dim: usize,
    classes: usize,
    #[comptime] normalize: bool,
    #[comptime] fresh: bool,
    #[define(F)] _dtype: ElemType,
) {
    if CUBE_POS >= heads * classes {
        terminate!();
    }
    let unit = UNIT_POS as usize;
    let head = CUBE_POS / classes;
    let class = CUBE_POS % classes;
    // A class begins where the one before it ends.
    let mut start = 0u32.runtime();
    if class > 0 {
        start = histograms[BLOCKS * classes + class - 1];
    }
    let end = histograms[BLOCKS * classes + class];
    if comptime!(fresh) {
        let mut d = unit;
        while d < dim {
            sums[CUBE_POS * dim + d] = 0.0;
            carries[CUBE_POS * dim + d] = 0.0;
            d += PLANE_UNITS;
        }
    }
    for place in start as usize..end as usize {
        let source = head * strides.head + order[place] as usize * strides.row;
        let mut inverse = 1.0f32.runtime();
        if comptime!(normalize) {
            let mut squares = 0.0f32.runtime();
            let mut d = unit;
            while d < dim {
                let value = f32::cast_from(embeddings[source + d]);
                squares += value * value;
                d += PLANE_UNITS;
            }
            inverse = 1.0 / max(cube_sum(squares, PLANE_UNITS).sqrt(), EPSILON);
        }
        let mut d = unit;
        while d < dim {
            let at = CUBE_POS * dim + d;
            let corrected = f32::cast_from(embeddings[source + d]) * inverse - carries[at];
            let next = sums[at] + corrected;
            carries[at] = (next - sums[at]) - corrected;
            sums[at] = next;
            d += PLANE_UNITS;
        }
    }
}
