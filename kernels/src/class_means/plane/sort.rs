//! A stable counting sort of rows by class, without atomics.
//!
//! Rows are cut into blocks. A cube ranks the rows of its block among those of the same class, and counts them;
//! the running sums of the counts over blocks, and then over classes, are where each row goes.
//!
//! Bytes, for `B` blocks: labels once, `20·N` for targets, ranks and order, `16·B·K` for the histograms, where `B ≤ max(1, 8·N/K)`: linear
//! in `N + K`.

use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::blueprint::{PLANE_UNITS, cubes_for};
use crate::class_means::launch::{AccumulateCall, SUMS_STATUS_FIELDS};
use crate::class_means::state::add_status;
use crate::loss::target::{IGNORED, INVALID, LabelRule, halves, is_class, label_rule, target_of};
use crate::math::group::{Group, group_count, group_min};
use crate::operand::whole;

/// Blocks have at least this many rows.
const ROWS: usize = 4 * PLANE_UNITS;
/// Counts or targets that a unit has on the way at once.
const AHEAD: usize = 16;

/// The rows by class, each class in the order of its rows.
pub(super) struct Sorted {
    pub order: Handle, // u32, [rows], of which the last `rows - starts[classes]` are unspecified
    pub starts: Handle, // u32, [classes + 1]
}

/// Sorts the rows, adds to the counts of the classes, and to the status what labels are invalid.
pub(super) fn launch(call: &AccumulateCall) -> Sorted {
    let client = call.client;
    let [_, rows, _] = call.embeddings.dims3();
    let classes = call.sums.counts.shape()[0];
    // Histograms are indexed with 32 bits, and in one buffer; those of one block are no larger than the sums.
    let page = client.properties().memory.max_page_size / size_of::<u32>() as u64;
    let indexed = (page.min(u32::MAX.into()) as usize / classes).max(1);
    let most = (rows / classes.div_ceil(8)).clamp(1, rows.div_ceil(ROWS).min(indexed));
    let block = rows.div_ceil(most).next_multiple_of(PLANE_UNITS);
    let blocks = rows.div_ceil(block);
    let words = |count: usize| client.empty(count * size_of::<u32>());
    let targets = words(rows);
    let ranks = words(rows);
    let histograms = words(blocks * classes);
    let invalid = words(blocks * SUMS_STATUS_FIELDS);
    let totals = words(classes);
    let sorted = Sorted {
        order: words(rows),
        starts: words(classes + 1),
    };
    let cube = CubeDim::new_1d(PLANE_UNITS as u32);
    let group = Group::cube(call.blueprint);
    // Whether one cube has all classes, and needs no other launch to add up their totals.
    let alone = classes <= PLANE_UNITS;
    // SAFETY: every buffer has the length named beside it in the kernels; labels have `rows` elements.
    unsafe {
        rank::launch_unchecked(
            client,
            cubes_for(client, blocks),
            cube,
            call.labels.buffer_arg(),
            BufferArg::from_raw_parts(targets.clone(), rows),
            BufferArg::from_raw_parts(ranks.clone(), rows),
            BufferArg::from_raw_parts(histograms.clone(), blocks * classes),
            BufferArg::from_raw_parts(invalid.clone(), blocks * SUMS_STATUS_FIELDS),
            rows,
            classes,
            block,
            label_rule(call.labels.dtype(), classes, call.sums.options.ignore_index),
            group,
            call.labels.dtype(),
        );
        offsets::launch_unchecked(
            client,
            cubes_for(client, classes.div_ceil(PLANE_UNITS)),
            cube,
            BufferArg::from_raw_parts(histograms.clone(), blocks * classes),
            BufferArg::from_raw_parts(invalid, blocks * SUMS_STATUS_FIELDS),
            BufferArg::from_raw_parts(totals.clone(), classes),
            BufferArg::from_raw_parts(sorted.starts.clone(), classes + 1),
            whole(&call.sums.counts, 1),
            whole(&call.sums.status, 1),
            blocks,
            block,
            classes,
            call.sums.fresh,
            alone,
            group,
        );
        if !alone {
            starts::launch_unchecked(
                client,
                CubeCount::new_single(),
                cube,
                BufferArg::from_raw_parts(totals, classes),
                BufferArg::from_raw_parts(sorted.starts.clone(), classes + 1),
                classes,
            );
        }
        place::launch_unchecked(
            client,
            cubes_for(client, rows.div_ceil(PLANE_UNITS)),
            cube,
            BufferArg::from_raw_parts(targets, rows),
            BufferArg::from_raw_parts(ranks, rows),
            BufferArg::from_raw_parts(histograms, blocks * classes),
            BufferArg::from_raw_parts(sorted.starts.clone(), classes + 1),
            BufferArg::from_raw_parts(sorted.order.clone(), rows),
            rows,
            classes,
            block,
        );
    }
    sorted
}

/// `ranks[row]`: rows of its class before it in its block. `histograms[block, class]`: rows of the class in the block. Labels
/// are read here only: a second reading could find others, if someone writes them.
#[cube(launch_unchecked)]
fn rank<I: Int>(
    labels: &[I],            // [rows]
    row_targets: &mut [u32], // [rows]
    ranks: &mut [u32],       // [rows]
    histograms: &mut [u32],  // [blocks, classes]
    invalid: &mut [u32],     // [blocks, SUMS_STATUS_FIELDS]: the status of each block
    rows: usize,
    classes: usize,
    block: usize, // rows of a block, a multiple of the cube's units
    rule: LabelRule,
    #[comptime] group: Group,
    #[define(I)] _label: ElemType,
) {
    let first = CUBE_POS * block;
    if first >= rows {
        terminate!();
    }
    let unit = UNIT_POS as usize;
    let histogram = CUBE_POS * classes;
    let mut class = unit;
    while class < classes {
        histograms[histogram + class] = 0;
        class += PLANE_UNITS;
    }
    sync_storage();
    let mut targets = Shared::<[u32]>::new_slice(PLANE_UNITS);
    let mut my_invalid = 0u32.runtime();
    let mut my_first = INVALID.runtime();
    let mut my_label = I::cast_from(0u32);
    for tile in 0..block / PLANE_UNITS {
        let row = first + tile * PLANE_UNITS + unit;
        let mut target = IGNORED.runtime();
        if row < rows {
            let label = labels[row];
            target = target_of::<I>(label, &rule);
            row_targets[row] = target;
            if target == INVALID {
                if my_invalid == 0 {
                    my_first = row as u32;
                    my_label = label;
                }
                my_invalid += 1;
            }
        }
        targets[unit] = target;
        sync_cube();
        let mut earlier = 0u32.runtime();
        let mut all = 0u32.runtime();
        for some in 0..PLANE_UNITS / AHEAD {
            #[unroll]
            for i in 0..AHEAD {
                let other = some * AHEAD + i;
                let same = select(targets[other] == target, 1u32, 0u32);
                all += same;
                earlier += select(other < unit, same, 0u32);
            }
        }
        let mut rank = 0u32.runtime();
        if is_class(target) {
            rank = histograms[histogram + target as usize] + earlier;
            ranks[row] = rank;
        }
        // The last of a class in the tile writes, once everyone has read.
        sync_storage();
        if is_class(target) && earlier + 1 == all {
            histograms[histogram + target as usize] = rank + 1;
        }
        sync_storage();
    }
    let all_invalid = group_count(my_invalid, group);
    let all_first = group_min(my_first, group);
    let status = CUBE_POS * SUMS_STATUS_FIELDS;
    if unit == 0 {
        invalid[status] = all_invalid;
        invalid[status + 1] = all_first;
    }
    if my_invalid > 0 && my_first == all_first {
        let (low, high) = halves::<I>(my_label);
        invalid[status + 2] = low;
        invalid[status + 3] = high;
    }
}

/// Histograms become the running sums over the blocks before, and `totals[class]` the sum of all. A unit takes a class. A cube that is alone
/// writes the classes' starts as well.
#[cube(launch_unchecked)]
fn offsets(
    histograms: &mut [u32], // [blocks, classes]
    invalid: &[u32],        // [blocks, SUMS_STATUS_FIELDS]
    totals: &mut [u32],     // [classes]
    starts: &mut [u32],     // [classes + 1], if `alone`
    counts: &mut [u32],     // [classes]
    status: &mut [u32],     // [SUMS_STATUS_FIELDS]
    blocks: usize,
    block_rows: usize,
    classes: usize,
    #[comptime] fresh: bool,
    #[comptime] alone: bool,
    #[comptime] group: Group,
) {
    let class = ABSOLUTE_POS;
    let mut rows_of_class = 0u32.runtime();
    if class < classes {
        let mut total = 0u32.runtime();
        for turn in 0..blocks.div_ceil(AHEAD) {
            let mut here = Array::<u32>::new(AHEAD);
            #[unroll]
            for i in 0..AHEAD {
                let block = turn * AHEAD + i;
                here[i] = 0;
                if block < blocks {
                    here[i] = histograms[block * classes + class];
                }
            }
            #[unroll]
            for i in 0..AHEAD {
                let block = turn * AHEAD + i;
                if block < blocks {
                    histograms[block * classes + class] = total;
                }
                total += here[i];
            }
        }
        totals[class] = total;
        rows_of_class = total;
        if comptime!(!fresh) {
            total += counts[class];
        }
        counts[class] = total;
    }
    if comptime!(alone) {
        let (start, all) = running_sum(rows_of_class);
        if class < classes {
            starts[class] = start;
        }
        if class == 0 {
            starts[classes] = all;
        }
    }
    let mut my_invalid = 0u32.runtime();
    let mut my_first = INVALID.runtime();
    let mut block = UNIT_POS as usize;
    while block < blocks {
        my_invalid += invalid[block * SUMS_STATUS_FIELDS];
        my_first = min(my_first, invalid[block * SUMS_STATUS_FIELDS + 1]);
        block += PLANE_UNITS;
    }
    let all_invalid = group_count(my_invalid, group);
    let first = group_min(my_first, group);
    if comptime!(fresh) && ABSOLUTE_POS == 0 {
        status[0] = 0;
    }
    if ABSOLUTE_POS == 0 && all_invalid > 0 {
        let block = first as usize / block_rows;
        add_status(status, all_invalid, invalid, block * SUMS_STATUS_FIELDS);
    }
}

/// `starts[class]`: the running sum of the totals before it. One cube; a unit takes neighbouring classes.
#[cube(launch_unchecked)]
fn starts(
    totals: &[u32],     // [classes]
    starts: &mut [u32], // [classes + 1]
    classes: usize,
) {
    let unit = UNIT_POS as usize;
    let share = classes.div_ceil(PLANE_UNITS);
    let first = min(unit * share, classes);
    let last = min(first + share, classes);
    let mut sum = 0u32.runtime();
    for turn in 0..share.div_ceil(AHEAD) {
        let here = some_totals(totals, first + turn * AHEAD, last);
        #[unroll]
        for i in 0..AHEAD {
            sum += here[i];
        }
    }
    let (mut start, all) = running_sum(sum);
    for turn in 0..share.div_ceil(AHEAD) {
        let from = first + turn * AHEAD;
        let here = some_totals(totals, from, last);
        #[unroll]
        for i in 0..AHEAD {
            if from + i < last {
                starts[from + i] = start;
            }
            start += here[i];
        }
    }
    if unit == 0 {
        starts[classes] = all;
    }
}

/// The sum of `mine` of the units before this one, and of all units of the cube.
#[cube]
fn running_sum(mine: u32) -> (u32, u32) {
    let unit = UNIT_POS as usize;
    let mut sums = Shared::<[u32]>::new_slice(PLANE_UNITS);
    sums[unit] = mine;
    sync_cube();
    let mut before = 0u32.runtime();
    let mut all = 0u32.runtime();
    for other in 0..PLANE_UNITS {
        let sum = sums[other];
        all += sum;
        before += select(other < unit, sum, 0u32);
    }
    (before, all)
}

/// The totals of the classes from `from` on that are before `last`; of others 0.
#[cube]
fn some_totals(totals: &[u32], from: usize, last: usize) -> Array<u32> {
    let mut here = Array::<u32>::new(AHEAD);
    #[unroll]
    for i in 0..AHEAD {
        here[i] = 0;
        if from + i < last {
            here[i] = totals[from + i];
        }
    }
    here
}

/// `order`: the rows, class by class.
#[cube(launch_unchecked)]
fn place(
    targets: &[u32],    // [rows]
    ranks: &[u32],      // [rows]
    histograms: &[u32], // [blocks, classes], running sums
    starts: &[u32],     // [classes + 1]
    order: &mut [u32],  // [rows]
    rows: usize,
    classes: usize,
    block: usize,
) {
    let row = ABSOLUTE_POS;
    if row < rows {
        let target = targets[row];
        if is_class(target) {
            let class = target as usize;
            let before = histograms[row / block * classes + class];
            order[(starts[class] + before + ranks[row]) as usize] = row as u32;
        }
    }
}
