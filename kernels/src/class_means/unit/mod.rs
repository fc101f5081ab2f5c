//! Where a head's sums stay in a core's cache, rows are [`streamed`] past them, each core into sums of its own; where there are too
//! many classes or heads for that, rows are [`sorted`] by class first, and each class is summed by one core.

mod sorted;
mod streamed;

use cubecl::prelude::*;

use super::launch::AccumulateCall;
use crate::error::Error;
use crate::loss::target::{INVALID, LabelRule, halves, is_class, target_of};
use crate::math::norm::{SIDE_BY_SIDE, add_squares, inverse_norm, norm_of};

/// Elements of a head's sums, at most, that stay in a core's cache with their carries and the rows that pass: 256 KiB.
const CACHED: usize = 1 << 15;
/// Elements of all lanes' sums, at most: beyond, clearing and adding them is no longer little.
const MOST: usize = 1 << 20;

/// Lanes of the sums: one for each unit where rows are streamed, as far as there may be so many; otherwise one.
pub(super) fn lanes(units: usize, shape: [usize; 3]) -> usize {
    streaming_units(units, shape).unwrap_or(1)
}

/// How many units stream, if not so few that all of them had better sort.
fn streaming_units(units: usize, [heads, classes, dim]: [usize; 3]) -> Option<usize> {
    let head = classes.saturating_mul(dim);
    let streaming = units.min(MOST / head.saturating_mul(heads));
    (head <= CACHED && 2 * streaming >= units).then_some(streaming)
}

pub(super) fn launch(call: &AccumulateCall) -> Result<(), Error> {
    let [_, heads, classes, dim] = call.sums.shape();
    match streaming_units(call.blueprint.units, [heads, classes, dim]) {
        Some(_) => streamed::launch(call),
        None => sorted::launch(call),
    }
}

/// Reads the row that begins at `from` a first time, for its norm or, where rows are not normalized, for nothing but to bring it to
/// the cache: then `squares` gathers all rows, for the caller to write, or the reading would be optimised away.
#[cube]
fn read_first<F: Float, N: Size>(
    embeddings: &[Vector<F, N>],
    from: usize,
    columns: usize,
    squares: &mut Array<Vector<f32, N>>,
    inverse: &mut [f32],
    at: usize,
    #[comptime] normalize: bool,
) {
    add_squares::<F, N>(squares, embeddings, from, columns);
    if comptime!(normalize) {
        inverse[at] = inverse_norm(norm_of::<N>(&*squares));
        #[unroll]
        for i in 0..SIDE_BY_SIDE {
            squares[i] = Vector::<f32, N>::new(0.0);
        }
    }
}

/// The target of each row, and to `histogram` how many rows each class has; counts the bad labels, from 0 on if the state is fresh, and
/// gives how many are good.
/// Each label is read once: a second reading could find another, if someone writes them.
#[cube]
fn classify<I: Int>(
    labels: &[I],
    targets: &mut [u32],
    histogram: &mut [u32],
    status: &mut [u32],
    rows: usize,
    rule: &LabelRule,
    #[comptime] fresh: bool,
) -> u32 {
    if comptime!(fresh) {
        status[0] = 0;
    }
    let mut good = 0u32.runtime();
    for row in 0..rows {
        let label = labels[row];
        let target = target_of::<I>(label, rule);
        targets[row] = target;
        if is_class(target) {
            histogram[target as usize] += 1;
            good += 1;
        } else if target == INVALID {
            if status[0] == 0 {
                let (low, high) = halves::<I>(label);
                status[1] = row as u32;
                status[2] = low;
                status[3] = high;
            }
            status[0] += 1;
        }
    }
    good
}
