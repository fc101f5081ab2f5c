//! What the device can do at most: fused multiply-adds that touch no memory, and a copy.

use std::time::{Duration, Instant};

use cubecl::prelude::*;

use crate::ours::{client, on_cpu};

/// More than a core's latency of a multiply-add times how many it starts in that time, 8 to 10; with the factor they fit in AVX2's 16 vector
/// registers.
const CHAINS: usize = 12;
const STEPS: usize = 1 << 22;
const COPIED: usize = 64 << 20; // floats: 256 MiB, beyond any cache

/// Floating-point operations of one [`multiply_adds`].
pub fn flops() -> u64 {
    let (cubes, units, lanes) = grid();
    (2 * CHAINS * STEPS * lanes * cubes * units) as u64
}

/// Bytes read and written by one [`copy()`].
pub fn bytes() -> u64 {
    (2 * COPIED * size_of::<f32>()) as u64
}

/// Cubes, units a cube, lanes of a vector.
fn grid() -> (usize, usize, usize) {
    let hardware = &client().properties().hardware;
    match hardware.num_cpu_cores {
        Some(cores) => (1, cores as usize, hardware.load_width as usize / 32),
        None => (4096, 256, 4),
    }
}

#[cube(launch_unchecked)]
fn chains<N: Size>(out: &mut [Vector<f32, N>], factor: f32, steps: usize) {
    let factor = Vector::<f32, N>::new(factor);
    let mut sums = Array::<Vector<f32, N>>::new(CHAINS);
    #[unroll]
    for i in 0..CHAINS {
        sums[i] = Vector::<f32, N>::new(f32::cast_from(i as u32));
    }
    for _ in 0..steps {
        #[unroll]
        for i in 0..CHAINS {
            sums[i] = fma(sums[i], factor, factor);
        }
    }
    let mut total = Vector::<f32, N>::new(0.0);
    #[unroll]
    for i in 0..CHAINS {
        total += sums[i];
    }
    out[ABSOLUTE_POS] = total;
}

/// Independent chains of multiply-adds in registers, on every core.
pub fn multiply_adds() -> Duration {
    let (cubes, units, lanes) = grid();
    let steps = if on_cpu() { STEPS } else { STEPS / 64 };
    let out = client().empty(cubes * units * lanes * size_of::<f32>());
    let start = Instant::now();
    // SAFETY: `out` has a vector for every unit.
    unsafe {
        chains::launch_unchecked(
            client(),
            CubeCount::new_1d(cubes as u32),
            CubeDim::new_1d(units as u32),
            lanes,
            BufferArg::from_raw_parts(out.clone(), cubes * units),
            0.5,
            steps,
        );
    }
    cubecl::future::block_on(client().sync_buffers([&out])).expect("the device works");
    start.elapsed() * (STEPS / steps) as u32
}

// CubeCL compiles loops, not slices' methods.
#[allow(clippy::manual_memcpy)]
#[cube(launch_unchecked)]
fn copies<N: Size>(
    from: &[Vector<f32, N>],
    to: &mut [Vector<f32, N>],
    count: usize,
    #[comptime] in_stretches: bool,
) {
    let units = CUBE_COUNT * CUBE_DIM as usize;
    if comptime!(in_stretches) {
        // A CPU's unit copies a stretch, as a thread would.
        for i in ABSOLUTE_POS * count / units..(ABSOLUTE_POS + 1) * count / units {
            to[i] = from[i];
        }
    } else {
        // A GPU's units copy neighbours.
        let mut i = ABSOLUTE_POS;
        while i < count {
            to[i] = from[i];
            i += units;
        }
    }
}

/// A copy between two buffers that were written before, on every core.
pub fn copy() -> Duration {
    let (cubes, units, lanes) = grid();
    let from = client().create_from_slice(f32::as_bytes(&vec![1.0; COPIED]));
    let to = client().create_from_slice(f32::as_bytes(&vec![0.0; COPIED]));
    cubecl::future::block_on(client().sync_buffers([&from, &to])).expect("the device works");
    let start = Instant::now();
    // SAFETY: both buffers have `COPIED` floats, a multiple of every vector, and `copies` stays below that.
    unsafe {
        copies::launch_unchecked(
            client(),
            CubeCount::new_1d(cubes as u32),
            CubeDim::new_1d(units as u32),
            lanes,
            BufferArg::from_raw_parts(from, COPIED / lanes),
            BufferArg::from_raw_parts(to.clone(), COPIED / lanes),
            COPIED / lanes,
            on_cpu(),
        );
    }
    cubecl::future::block_on(client().sync_buffers([&to])).expect("the device works");
    start.elapsed()
}
