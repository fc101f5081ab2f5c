//! The labels of a batch, counted by a cube.

use cubecl::prelude::*;

use super::target::{INVALID, LabelRule, is_class, target_of};
use crate::math::group::{Group, group_count, group_min};

/// Rows that a unit reads at a time, so that it does not wait for each.
pub(crate) const READ_AHEAD: usize = 4;

#[derive(CubeType, Clone, Copy)]
pub(crate) struct Counted {
    /// Rows that count.
    pub classes: u32,
    /// Rows whose label is neither a class nor ignored.
    pub invalid: u32,
    /// The first of these, or INVALID.
    pub first_invalid: u32,
}

/// The counts, in every unit of the cube, which is `all`.
#[cube]
pub(crate) fn count_labels<I: Int>(
    labels: &[I], // [rows]
    rows: usize,
    rule: &LabelRule,
    #[comptime] all: Group,
) -> Counted {
    let mut classes = 0u32.runtime();
    let mut invalid = 0u32.runtime();
    let mut first_invalid = INVALID.runtime();
    let mut first = UNIT_POS as usize;
    while first < rows {
        let mut some = Array::<I>::new(READ_AHEAD);
        #[unroll]
        for i in 0..READ_AHEAD {
            some[i] = labels[min(first + i * all.size, rows - 1)];
        }
        #[unroll]
        for i in 0..READ_AHEAD {
            let row = first + i * all.size;
            let target = target_of::<I>(some[i], rule);
            if row < rows {
                if is_class(target) {
                    classes += 1;
                } else if target == INVALID {
                    invalid += 1;
                    first_invalid = min(first_invalid, row as u32);
                }
            }
        }
        first += READ_AHEAD * all.size;
    }
    Counted {
        classes: group_count(classes, all),
        invalid: group_count(invalid, all),
        first_invalid: group_min(first_invalid, all),
    }
}
