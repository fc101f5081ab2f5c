//! Which results of a tile a unit has.

use cubecl::prelude::*;

use super::{Engine, PLANE, Tile};

/// Where a unit is: its plane in the cube, and itself in a fragment.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Place {
    pub plane_row: usize,
    pub plane_column: usize,
    pub lane: usize,
    /// Units of the same group have results of the same rows,
    pub group: usize,
    /// each of other columns.
    pub member: usize,
}

#[cube]
pub(crate) fn place(#[comptime] tile: Tile) -> Place {
    place_of(UNIT_POS as usize, tile)
}

#[cube]
pub(super) fn place_of(unit: usize, #[comptime] tile: Tile) -> Place {
    let plane_row = unit / comptime!(PLANE * tile.across);
    let plane_column = unit / PLANE % tile.across;
    let lane = unit % PLANE;
    let (group, member) = if comptime!(tile.engine == Engine::Fma) {
        // NVIDIA GPUs read 16 bytes for sixteen units at once instead of eight, if units come in pairs that want the same: neighbours
        // (for rows) or units two apart (for columns).
        (lane / 2 % 8, lane / 16 * 2 + lane % 2)
    } else {
        (lane / 4, lane % 4)
    };
    Place {
        plane_row,
        plane_column,
        lane,
        group: plane_row * 8 + group,
        member: plane_column * 4 + member,
    }
}

/// The row of the tile that results of row `r` of this unit belong to.
#[cube]
pub(crate) fn row_of(at: &Place, #[comptime] r: usize, #[comptime] tile: Tile) -> usize {
    if comptime!(tile.engine == Engine::Fma) {
        of_four(at.group, r)
    } else {
        let (first_row, _) = place_of_plane(at, tile);
        first_row + comptime!(r / 2 * tile.apart() + r % 2 * 8) + at.lane / 4
    }
}

/// The column of the tile that results of column `c` of this unit belong to; an odd one is next to the even one before it.
#[cube]
pub(crate) fn column_of(at: &Place, #[comptime] c: usize, #[comptime] tile: Tile) -> usize {
    if comptime!(tile.engine == Engine::Fma) {
        of_four(at.member, c)
    } else {
        let fragment = comptime!(c / 2 * 8 + c % 2);
        at.plane_column * comptime!(tile.side / tile.across) + fragment + at.lane % 4 * 2
    }
}

/// Where a unit has the result of its row `r` and its column `c`.
pub(crate) fn result_of(r: usize, c: usize, tile: Tile) -> usize {
    (r / 2 * tile.wide() + c / 2) * 4 + r % 2 * 2 + c % 2
}

/// A result that this unit has, or does not.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Own {
    pub is_here: bool,
    pub value: f32,
}

/// The result of row `r` of this unit in a column of the tile.
#[cube]
pub(crate) fn result_in(
    results: &Array<f32>,
    at: &Place,
    #[comptime] r: usize,
    column: u32,
    #[comptime] tile: Tile,
) -> Own {
    let mut own = Own {
        is_here: false.runtime(),
        value: 0.0f32.runtime(),
    };
    #[unroll]
    for c in 0..comptime!(tile.columns()) {
        if column_of(at, c, tile) as u32 == column {
            own.is_here = true;
            own.value = results[comptime!(result_of(r, c, tile))];
        }
    }
    own
}

/// Replaces the result of row `r` of this unit in a column of the tile, if it has it.
#[cube]
pub(crate) fn replace_in(
    results: &mut Array<f32>,
    at: &Place,
    #[comptime] r: usize,
    column: u32,
    value: f32,
    #[comptime] tile: Tile,
) {
    #[unroll]
    for c in 0..comptime!(tile.columns()) {
        if column_of(at, c, tile) as u32 == column {
            results[comptime!(result_of(r, c, tile))] = value;
        }
    }
}

/// Where the results of a plane's fragments begin: row and column of the tile.
#[cube]
pub(crate) fn place_of_plane(at: &Place, #[comptime] tile: Tile) -> (usize, usize) {
    let rows = comptime!(match tile.engine {
        Engine::Wgmma => 16,
        _ => tile.side / tile.down,
    });
    (
        at.plane_row * rows,
        at.plane_column * comptime!(tile.side / tile.across),
    )
}

/// Sixteen units, four neighbours each, and again.
#[cube]
pub(super) fn of_four(unit: usize, #[comptime] number: usize) -> usize {
    unit * 4 + comptime!(number / 4 * 64 + number % 4)
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use super::*;
    use crate::tiles::of_every_engine;

    #[test]
    fn every_result_has_one_owner_and_a_group_shares_its_rows() {
        for tile in of_every_engine() {
            let mut owned = HashSet::new();
            let mut rows_of_groups = HashMap::new();
            for unit in 0..tile.units() {
                let at = place_of(unit, tile);
                let rows: Vec<_> = (0..tile.rows()).map(|r| row_of(&at, r, tile)).collect();
                for &row in &rows {
                    let columns = (0..tile.columns()).map(|c| column_of(&at, c, tile));
                    assert!(
                        columns
                            .into_iter()
                            .all(|column| owned.insert((row, column)))
                    );
                }
                let of_group = rows_of_groups
                    .entry(at.group)
                    .or_insert_with(|| rows.clone());
                assert_eq!(*of_group, rows, "{tile:?}, unit {unit}");
                assert!(at.member < tile.sharing());
            }
            assert_eq!(owned.len(), tile.side * tile.side, "{tile:?}");
            assert_eq!(rows_of_groups.len() * tile.sharing(), tile.units());
        }
    }

    #[test]
    fn every_two_units_read_the_same_for_multiply_adds() {
        for tile in of_every_engine()
            .into_iter()
            .filter(|tile| tile.engine == Engine::Fma)
        {
            for unit in 0..tile.units() {
                let at = place_of(unit, tile);
                assert_eq!(at.group, place_of(unit ^ 1, tile).group);
                assert_eq!(at.member, place_of(unit ^ 2, tile).member);
            }
        }
    }
}
