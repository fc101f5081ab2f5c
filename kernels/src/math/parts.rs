//! Long sums in parts, where too few cubes of a GPU would have anything to do.

use cubecl::client::Client;
use cubecl::prelude::*;

/// Floats that the parts of sums may take together: 32 MiB.
const PARTS: usize = 1 << 23;

/// In how many parts a GPU's cubes sum what fewer cubes than it has room for would sum alone: `owners` cubes, each of `steps`
/// steps, into `elements` sums. The parts are added in their order.
pub(crate) fn parts_of_sums(
    client: &Client,
    owners: usize,
    steps: usize,
    elements: usize,
) -> usize {
    // Where it is not known, as of a middling GPU.
    let processors = client.properties().hardware.num_streaming_multiprocessors;
    let wanted = 2 * processors.unwrap_or(16) as usize;
    (wanted / owners).min(PARTS / elements).clamp(1, steps)
}

/// The sum of the parts at `at`, `stride` apart.
#[cube]
pub(crate) fn sum_of_parts<N: Size>(
    sums: &[Vector<f32, N>],
    at: usize,
    stride: usize,
    parts: usize,
) -> Vector<f32, N> {
    let mut sum = sums[at];
    for part in 1..parts {
        sum += sums[at + part * stride];
    }
    sum
}
