//! The softmax states that units of a cube merge through shared memory, wherever they sit in it.

use cubecl::prelude::*;

use super::online_softmax::RowSoftmax;

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
