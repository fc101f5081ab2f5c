//! Where the sums stay in a core's cache, rows are [`streamed`] past them, each core into sums of its own; where there are too
//! many classes for that, rows are [`sorted`] by class first, and each class is summed by one core.

mod sorted;
mod streamed;

use cubecl::prelude::*;

use super::launch::AccumulateCall;
use crate::loss::target::{INVALID, LabelRule, is_class, target_of};

/// Elements of a head's sums, at most, that stay in a core's cache with their carries and the rows that pass: 256 KiB.
const CACHED: usize = 1 << 15;
/// Elements of all cores' sums, at most: beyond, clearing and adding them is no longer little.
const MOST: usize = 1 << 20;

/// Lanes of the sums: one for each unit where rows are streamed, otherwise one.
pub(super) fn lanes(units: usize, [heads, classes, dim]: [usize; 3]) -> usize {
    if streams(units, [heads, classes, dim]) {
        units
    } else {
        1
    }
}

fn streams(units: usize, [heads, classes, dim]: [usize; 3]) -> bool {
    let head = classes.saturating_mul(dim);
    head <= CACHED && head.saturating_mul(heads).saturating_mul(units) <= MOST
}

pub(super) fn launch(call: &AccumulateCall) {
    let [_, heads, classes, dim] = call.sums.shape();
    if streams(call.blueprint.units, [heads, classes, dim]) {
        streamed::launch(call);
    } else {
        sorted::launch(call);
    }
}

/// The target of each row, and to `histogram` how many rows each class has; counts the bad labels. Each label is read once: a
/// second reading could find another, if someone writes them.
#[cube]
fn classify<I: Int>(
    labels: &[I],
    targets: &mut [u32],
    histogram: &mut [u32],
    status: &mut [u32],
    rows: usize,
    rule: &LabelRule,
) {
    for row in 0..rows {
        let target = target_of::<I>(labels[row], rule);
        targets[row] = target;
        if is_class(target) {
            histogram[target as usize] += 1;
        } else if target == INVALID {
            if status[0] == 0 {
                status[1] = row as u32;
            }
            status[0] += 1;
        }
    }
}
