//! What becomes of sums: added to those of another state, and made means.

use cubecl::prelude::*;

use crate::math::narrow::narrow;
use crate::math::sum::KahanLanes;
use crate::operand::RowStrides;

/// Adds the sums of another state.
#[cube(launch_unchecked)]
pub(super) fn merge<N: Size>(
    sums: &mut [Vector<f32, N>],
    carries: &mut [Vector<f32, N>],
    counts: &[u32],
    other_sums: &[Vector<f32, N>],
    other_carries: &[Vector<f32, N>],
    other_counts: &[u32],
    classes: usize,
    columns: usize, // vectors of a row
    #[comptime] fresh: bool,
) {
    let mut i = ABSOLUTE_POS;
    while i < sums.len() {
        if comptime!(fresh) {
            // All of them: where rows are streamed, classes without rows have sums of zero.
            sums[i] = other_sums[i];
            carries[i] = other_carries[i];
        } else {
            let class = i / columns % classes;
            if other_counts[class] > 0 {
                let mut sum = KahanLanes::<N> {
                    sum: other_sums[i],
                    carry: other_carries[i],
                };
                if counts[class] > 0 {
                    sum.sum = sums[i];
                    sum.carry = carries[i];
                    sum.add(other_sums[i] - other_carries[i]);
                }
                sums[i] = sum.sum;
                carries[i] = sum.carry;
            }
        }
        i += CUBE_COUNT * CUBE_DIM as usize;
    }
}

/// Adds its counts and its status.
#[cube(launch_unchecked)]
pub(super) fn add_counts(
    counts: &mut [u32],
    status: &mut [u32],
    other_counts: &[u32],
    other_status: &[u32],
    #[comptime] fresh: bool,
) {
    let mut class = ABSOLUTE_POS;
    while class < counts.len() {
        let mut count = other_counts[class];
        if comptime!(!fresh) {
            count += counts[class];
        }
        counts[class] = count;
        class += CUBE_COUNT * CUBE_DIM as usize;
    }
    if ABSOLUTE_POS == 0 {
        if comptime!(fresh) {
            status[0] = 0;
        }
        add_status(status, other_status[0], other_status, 0usize);
    }
}

/// Adds so many rows with a bad label, the first of which is in the status that begins at `other[at]`.
#[cube]
pub(super) fn add_status(status: &mut [u32], rows: u32, other: &[u32], at: usize) {
    if rows > 0 {
        if status[0] == 0 {
            status[1] = other[at + 1];
            status[2] = other[at + 2];
            status[3] = other[at + 3];
        }
        status[0] += rows;
    }
}

/// The means, and where a class has no rows the old weights.
#[cube(launch_unchecked)]
pub(super) fn write_means<F: Float, N: Size>(
    sums: &[Vector<f32, N>],    // [lanes, heads, classes, dim]
    carries: &[Vector<f32, N>], // [lanes, heads, classes, dim]
    counts: &[u32],             // [classes]
    weights: &[Vector<F, N>],   // [heads, stored, dim]
    strides: RowStrides,
    out: &mut [Vector<F, N>], // [heads, stored, dim]
    lanes: usize,
    heads: usize,
    classes: usize,
    stored: usize,
    columns: usize,             // vectors of a row
    #[comptime] sharing: usize, // units that share a row
    #[comptime] fresh: bool,    // no class has a row
    #[define(F)] _dtype: ElemType,
) {
    let lane = ABSOLUTE_POS % sharing;
    let mut row = ABSOLUTE_POS / sharing;
    while row < heads * stored {
        let head = row / stored;
        let class = row % stored;
        let old = head * strides.head + class * strides.row;
        let mut count = 0u32.runtime();
        if comptime!(!fresh) && class < classes {
            count = counts[class];
        }
        let mut d = lane;
        if count == 0 {
            while d < columns {
                out[row * columns + d] = weights[old + d];
                d += sharing;
            }
        } else {
            let first = (head * classes + class) * columns;
            let divisor = Vector::<f32, N>::new(f32::cast_from(count));
            let inverse = Vector::<f32, N>::new(1.0 / f32::cast_from(count));
            while d < columns {
                let mut at = first + d;
                let mut all = KahanLanes::<N> {
                    sum: sums[at],
                    carry: carries[at],
                };
                for _lane in 1..lanes {
                    at += heads * classes * columns;
                    all.add(sums[at]);
                    all.carry += carries[at];
                }
                // A division, without a subroutine for every element: the quotient, corrected by what it leaves.
                let sum = all.sum - all.carry;
                let quotient = sum * inverse;
                let rest = fma(-quotient, divisor, sum);
                // An infinite quotient leaves no number.
                let rest = select_many(rest.equal(&rest), rest, Vector::<f32, N>::new(0.0));
                out[row * columns + d] = narrow::<F, N>(fma(rest, inverse, quotient));
                d += sharing;
            }
        }
        row += CUBE_COUNT * CUBE_DIM as usize / sharing;
    }
}
