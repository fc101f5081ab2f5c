//! Where a step begins: labels become targets.

use cubecl::prelude::*;

use crate::loss::reduce::STATUS_FIELDS;
use crate::loss::target::{IGNORED, INVALID, LabelRule, is_class, target_of};
use crate::math::span::{share, wait};

/// Turns labels into targets, and counts the rows that have one; the status goes out if this launch is to `report`.
/// Every unit must call.
#[cube]
pub(super) fn count<I: Int>(
    labels: &[I],
    rule: &LabelRule,
    targets: &mut [u32],
    status: &mut [u32],
    rows: usize,
    padded: usize,
    #[comptime] report: bool,
    #[comptime] units: usize,
) -> u32 {
    let unit = UNIT_POS as usize;
    let mut counted = 0u32.runtime();
    let mut invalid = 0u32.runtime();
    let mut first = INVALID.runtime();
    let mine = share(0, padded);
    for row in mine.start..mine.end {
        let mut target = IGNORED.runtime();
        if row < rows {
            target = target_of::<I>(labels[row], rule);
        }
        targets[row] = target;
        if is_class(target) {
            counted += 1;
        } else if target == INVALID {
            invalid += 1;
            first = min(first, row as u32);
        }
    }
    if comptime!(units > 1) {
        // See `meet` for what else shared memory does here.
        let mut shared = Shared::<[u32]>::new_slice(comptime!(STATUS_FIELDS * units));
        shared[unit * STATUS_FIELDS] = counted;
        shared[unit * STATUS_FIELDS + 1] = invalid;
        shared[unit * STATUS_FIELDS + 2] = first;
        wait(units);
        counted = 0;
        invalid = 0;
        first = INVALID;
        for i in 0..units {
            counted += shared[i * STATUS_FIELDS];
            invalid += shared[i * STATUS_FIELDS + 1];
            first = min(first, shared[i * STATUS_FIELDS + 2]);
        }
    }
    if comptime!(report) && unit == 0 {
        status[0] = counted;
        status[1] = invalid;
        status[2] = first;
    }
    counted
}
