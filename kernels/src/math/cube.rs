//! What the units of a plane variant's cube do together. Trees of a fixed shape: the same bits every run.

use cubecl::prelude::*;

use super::online_softmax::RowSoftmax;

/// The sum of `value` over the `units` of the cube (a power of two), in every unit.
#[cube]
pub(crate) fn cube_sum(value: f32, #[comptime] units: usize) -> f32 {
    group_sum(value, units, units)
}

/// The sum of `value` over the unit's group of `size` neighbours, in each of them; all units of the cube must call.
#[cube]
pub(crate) fn group_sum(value: f32, #[comptime] units: usize, #[comptime] size: usize) -> f32 {
    let unit = UNIT_POS as usize;
    let mut shared = Shared::<[f32]>::new_slice(units);
    shared[unit] = value;
    sync_cube();
    #[unroll]
    for level in 0..comptime!(size.ilog2() as usize) {
        let stride = comptime!(size >> (level + 1));
        if unit % size < stride {
            let sum = shared[unit] + shared[unit + stride];
            shared[unit] = sum;
        }
        sync_cube();
    }
    let total = shared[unit - unit % size];
    sync_cube();
    total
}

/// The largest `value` of the `units` of the cube (a power of two), in every unit.
#[cube]
pub(crate) fn cube_max(value: f32, #[comptime] units: usize) -> f32 {
    let unit = UNIT_POS as usize;
    let mut shared = Shared::<[f32]>::new_slice(units);
    shared[unit] = value;
    sync_cube();
    #[unroll]
    for level in 0..comptime!(units.ilog2() as usize) {
        let stride = comptime!(units >> (level + 1));
        if unit < stride {
            let larger = max(shared[unit], shared[unit + stride]);
            shared[unit] = larger;
        }
        sync_cube();
    }
    let largest = shared[0];
    sync_cube();
    largest
}

/// Merges the rows of `parts` softmax states that neighbouring units hold, into every unit of the group.
/// Slot `group · parts + part` is this unit's; all units of the cube must call.
#[cube]
pub(crate) fn merge_softmax(
    mine: RowSoftmax,
    group: usize,
    part: usize,
    values: &mut [f32],
    classes: &mut [u32],
    #[comptime] parts: usize,
) -> RowSoftmax {
    let slot = group * parts + part;
    values[slot] = mine.peak;
    classes[slot] = mine.best;
    sync_cube();
    let mut peak = values[group * parts];
    let mut best = classes[group * parts];
    for other in 1..parts {
        let other_peak = values[group * parts + other];
        let other_best = classes[group * parts + other];
        if other_peak > peak || (other_peak == peak && other_best < best) {
            peak = other_peak;
            best = other_best;
        }
    }
    sync_cube();
    let scaled = mine.sum * (mine.peak - peak).exp();
    RowSoftmax {
        peak,
        sum: sum_of_group(scaled, group, slot, values, parts),
        best,
        target: sum_of_group(mine.target, group, slot, values, parts),
        total: sum_of_group(mine.total, group, slot, values, parts),
    }
}

#[cube]
fn sum_of_group(
    value: f32,
    group: usize,
    slot: usize,
    values: &mut [f32],
    #[comptime] parts: usize,
) -> f32 {
    values[slot] = value;
    sync_cube();
    let mut sum = values[group * parts];
    for other in 1..parts {
        sum += values[group * parts + other];
    }
    sync_cube();
    sum
}
