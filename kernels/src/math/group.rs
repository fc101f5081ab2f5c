//! Groups of neighbouring units: how the plane variants stream rows, and what a group computes together.
//!
//! Trees of a fixed shape: the same bits every run.

use cubecl::client::Client;
use cubecl::prelude::*;

use super::online_softmax::RowSoftmax;
use crate::blueprint::{Blueprint, PLANE_UNITS, cubes_for};

/// Neighbouring units of a plane variant's cube that share a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Group {
    /// How many: a power of two, at most [`PLANE_UNITS`].
    pub size: usize,
    /// How many neighbours can exchange registers: a plane, or 1 where the device has no such instruction.
    pub exchange: usize,
}

impl Group {
    /// A unit by itself.
    pub(crate) const ALONE: Self = Self {
        size: 1,
        exchange: 1,
    };

    /// For rows of so many vectors: small enough that each unit has several of them on the way at once.
    pub(crate) fn of(blueprint: &Blueprint, vectors: usize) -> Self {
        Self {
            size: vectors
                .div_ceil(4)
                .next_power_of_two()
                .clamp(8, PLANE_UNITS),
            exchange: blueprint.plane,
        }
    }

    /// All units of a cube.
    pub(crate) fn cube(blueprint: &Blueprint) -> Self {
        Self {
            size: PLANE_UNITS,
            exchange: blueprint.plane,
        }
    }

    /// All units of this one's cube.
    pub(crate) fn of_its_cube(self) -> Self {
        Self {
            size: PLANE_UNITS,
            ..self
        }
    }

    /// Groups of a cube.
    pub(crate) fn per_cube(self) -> usize {
        PLANE_UNITS / self.size
    }

    /// The cubes that give each of `rows` a group.
    pub(crate) fn cubes(self, client: &Client, rows: usize) -> CubeCount {
        cubes_for(client, rows.div_ceil(self.per_cube()))
    }
}

/// Where a unit is.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Member {
    /// Its group, counted over all cubes.
    pub group: usize,
    /// Its place in the group.
    pub lane: usize,
}

#[cube]
pub(crate) fn member(#[comptime] group: Group) -> Member {
    let unit = UNIT_POS as usize;
    Member {
        group: CUBE_POS * comptime!(group.per_cube()) + unit / group.size,
        lane: unit % group.size,
    }
}

/// What becomes of two values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Fold {
    Sum,
    Largest,
    Smallest,
}

/// The sum of the group's values, in each of its units; all units of the cube must call.
#[cube]
pub(crate) fn group_sum(value: f32, #[comptime] group: Group) -> f32 {
    fold::<f32>(value, group, Fold::Sum)
}

/// The sum of the group's counts, in each of its units; all units of the cube must call.
#[cube]
pub(crate) fn group_count(value: u32, #[comptime] group: Group) -> u32 {
    fold::<u32>(value, group, Fold::Sum)
}

/// The largest of the group's values, in each of its units; all units of the cube must call.
#[cube]
pub(crate) fn group_max(value: f32, #[comptime] group: Group) -> f32 {
    fold::<f32>(value, group, Fold::Largest)
}

/// The smallest of the group's values, in each of its units; all units of the cube must call.
#[cube]
pub(crate) fn group_min(value: u32, #[comptime] group: Group) -> u32 {
    fold::<u32>(value, group, Fold::Smallest)
}

#[cube]
fn fold<T: Numeric>(value: T, #[comptime] group: Group, #[comptime] with: Fold) -> T {
    let exchanging = comptime!(group.exchange.min(group.size));
    let mut all = value;
    if comptime!(exchanging > 1) {
        // An exchange is among those who are there: all of them, whatever paths they came on.
        sync_plane();
    }
    #[unroll]
    for level in 0..comptime!(exchanging.ilog2()) {
        // Both sides of an exchange add the same two values, so every unit ends with the same bits.
        let other = plane_shuffle_xor(all, comptime!(1u32 << level));
        all = pair::<T>(all, other, with);
    }
    // One value of each plane, or of each unit, is left.
    let parts = comptime!(group.size / exchanging);
    if comptime!(parts > 1) {
        let unit = UNIT_POS as usize;
        let mut shared = Shared::<[T]>::new_slice(comptime!(PLANE_UNITS / exchanging));
        let slot = unit / exchanging;
        let lane = unit % exchanging;
        let leads = lane == 0;
        if leads {
            shared[slot] = all;
        }
        sync_cube();
        #[unroll]
        for level in 0..comptime!(parts.ilog2()) {
            let stride = comptime!(parts >> (level + 1));
            if leads && slot % parts < stride {
                let both = pair::<T>(shared[slot], shared[slot + stride], with);
                shared[slot] = both;
            }
            sync_cube();
        }
        all = shared[slot - slot % parts];
        sync_cube();
    }
    all
}

#[cube]
fn pair<T: Numeric>(a: T, b: T, #[comptime] with: Fold) -> T {
    match comptime!(with) {
        Fold::Sum => a + b,
        Fold::Largest => max(a, b),
        Fold::Smallest => min(a, b),
    }
}

/// The softmax of a row of which every unit of the group holds a part; all units of the cube must call.
#[cube]
pub(crate) fn group_softmax(part: RowSoftmax, #[comptime] group: Group) -> RowSoftmax {
    let peak = group_max(part.peak, group);
    let sum = group_sum(part.sum * (part.peak - peak).exp(), group);
    // A peak that is not a number equals no part's: every unit then names the class it has.
    let mut best = part.best;
    if part.peak < peak {
        best = u32::MAX.runtime();
    }
    RowSoftmax {
        peak,
        sum,
        best: group_min(best, group),
        target: group_sum(part.target, group),
        total: group_sum(part.total, group),
    }
}
