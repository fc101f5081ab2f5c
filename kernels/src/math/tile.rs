//! A register tile of a matrix product, as a rank-1 update a step: `acc[r][v] += a[r] · b[v]`.
//!
//! `a` is read as scalars and broadcast, `b` as vectors; both products of the cosine heads
//! (logits, and gradients from logit gradients) are this loop with other strides. 8 rows of 2 vectors take 19 of
//! AVX-512's 32 vector registers: 16 accumulators, the column, and a scalar that is broadcast.

use cubecl::prelude::*;

/// Vectors that a register tile is wide on a CPU.
pub(crate) const TILE_VECTORS: usize = 2;

/// Where a tile finds the scalars it broadcasts: element `(row, step)` is at `base + row · row_stride + step · step_stride`.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Broadcast {
    pub base: usize,
    pub row_stride: usize,
    pub step_stride: usize,
}

/// Where a tile finds its vectors: vector `(step, v)` is at `base + step · step_stride + v`.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Lanes {
    pub base: usize,
    pub step_stride: usize,
}

/// [`accumulate`] onto a tile that lies at `out`, its rows one after another, in the same space as the operands: step by step, or, if the
/// steps are summed `apart`, their sum at the end, which loses less where there are millions.
#[cube]
pub(crate) fn add_to<N: Size>(
    space: &mut [f32],
    out: usize, // in vectors
    a: Broadcast,
    b: Lanes,
    steps: usize,
    #[comptime] rows: usize,
    #[comptime] vectors: usize,
    #[comptime] apart: bool,
) {
    let mut tile = Array::<Vector<f32, N>>::new(comptime!(rows * vectors));
    let operands = space.as_vectorized().with_vector_size::<N>();
    #[unroll]
    for i in 0..rows * vectors {
        if comptime!(apart) {
            tile[i] = Vector::<f32, N>::new(0.0);
        } else {
            tile[i] = operands[out + i];
        }
    }
    accumulate::<N>(&mut tile, &*space, a, operands, b, steps, rows, vectors);
    let results = space.as_vectorized_mut().with_vector_size_mut::<N>();
    #[unroll]
    for i in 0..rows * vectors {
        if comptime!(apart) {
            results[out + i] += tile[i];
        } else {
            results[out + i] = tile[i];
        }
    }
}

/// `acc[r · vectors + v] += Σ_step a(r, step) · b(step, v)`, for `steps` steps in order.
#[cube]
pub(crate) fn accumulate<N: Size>(
    acc: &mut Array<Vector<f32, N>>,
    a: &[f32],
    a_at: Broadcast,
    b: &[Vector<f32, N>],
    b_at: Lanes,
    steps: usize,
    #[comptime] rows: usize,
    #[comptime] vectors: usize,
) {
    for step in 0..steps {
        let mut column = Array::<Vector<f32, N>>::new(vectors);
        #[unroll]
        for v in 0..vectors {
            column[v] = b[b_at.base + step * b_at.step_stride + v];
        }
        #[unroll]
        for r in 0..rows {
            let value =
                Vector::<f32, N>::new(a[a_at.base + r * a_at.row_stride + step * a_at.step_stride]);
            #[unroll]
            for v in 0..vectors {
                acc[r * vectors + v] = fma(value, column[v], acc[r * vectors + v]);
            }
        }
    }
}
