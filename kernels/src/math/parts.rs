//! Long work in parts, where too few cubes of a GPU would have anything to do.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::blueprint::{PLANE_UNITS, cubes_for};

/// Floats that the parts of sums may take together: 32 MiB.
const PARTS: usize = 1 << 23;

/// Steps that beginning a part and writing its sums takes as long as, about: by count of instructions, not measured.
const STEPS_OF_A_PART: usize = 4;

/// In how many parts a GPU's cubes sum what fewer cubes than its `slots` would sum alone: `owners` cubes, each of `steps`
/// steps, into `elements` sums. The parts are added in their order.
pub(crate) fn parts_of_sums(slots: usize, owners: usize, steps: usize, elements: usize) -> usize {
    let most = steps.div_ceil(STEPS_OF_A_PART).min(PARTS / elements);
    parts_that_fill(slots, owners, steps, STEPS_OF_A_PART, most)
}

/// Cubes with so many bytes of shared memory that a GPU runs at a time: two on a multiprocessor, or one if two do not fit.
pub(crate) fn slots(client: &Client, shared: usize) -> usize {
    let hardware = &client.properties().hardware;
    let Some(processors) = hardware.num_streaming_multiprocessors else {
        return 32; // as of a small GPU
    };
    // An NVIDIA GPU keeps so much for itself with each cube; one cube gets all the rest.
    const KEPT: usize = 1 << 10;
    let fit = 2 * (shared + KEPT) <= hardware.max_shared_memory_size + KEPT;
    processors as usize * if fit { 2 } else { 1 }
}

/// In how many parts, `most` at most, each of `owners` does its work of `steps`, if a part takes `own` steps besides: as few as take
/// little longer than the number that takes least.
pub(crate) fn parts_that_fill(
    slots: usize,
    owners: usize,
    steps: usize,
    own: usize,
    most: usize,
) -> usize {
    let most = (4 * slots / owners).min(most).max(1);
    // Cubes run in waves, and a wave takes as long as the longest part.
    let time = |parts: usize| (parts * owners).div_ceil(slots) * (steps.div_ceil(parts) + own);
    let least = (1..=most).map(time).min().unwrap_or(0);
    (1..=most)
        .find(|&parts| time(parts) * 20 <= least * 21)
        .unwrap_or(1)
}

/// Adds the other parts of `sums [parts, elements]`, in their order, to the first. They are whole tiles, so vectors of four divide
/// them.
pub(crate) fn add_parts(client: &Client, sums: &Handle, elements: usize, parts: usize) {
    if parts == 1 {
        return;
    }
    let vectors = elements / 4;
    // SAFETY: the caller allocated so many parts of so many elements.
    unsafe {
        add::launch_unchecked(
            client,
            cubes_for(client, vectors.div_ceil(PLANE_UNITS)),
            CubeDim::new_1d(PLANE_UNITS as u32),
            BufferArg::from_raw_parts(sums.clone(), parts * vectors),
            vectors,
            parts,
        );
    }
}

#[cube(launch_unchecked)]
fn add(sums: &mut [Vector<f32, Const<4>>], vectors: usize, parts: usize) {
    let at = ABSOLUTE_POS;
    if at < vectors {
        let mut sum = sums[at];
        for part in 1..parts {
            sum += sums[at + part * vectors];
        }
        sums[at] = sum;
    }
}

#[cfg(test)]
mod tests {
    use super::parts_that_fill;

    /// On 132 multiprocessors: tiles of rows and of classes of the benches' shapes, and some that divide badly.
    #[test]
    fn parts_fill_the_gpu_and_are_about_equal() {
        for (owners, steps, parts) in [
            (4, 782, 66),   // 12 tiles each; 60 parts would fill 240 of 264 slots, but take 14
            (16, 16, 16),   // one tile each
            (192, 79, 4),   // 768 cubes in three waves
            (24, 79, 10),   // eight tiles, as in 11 parts
            (32, 782, 8),   // 256 cubes
            (264, 100, 1),  // filled as they are
            (1000, 100, 1), // almost
        ] {
            let found = parts_that_fill(264, owners, steps, 0, steps);
            assert_eq!(found, parts, "{owners} owners of {steps} steps");
        }
    }

    /// Three waves of four steps fill 32 slots best, but begin and end 32 parts.
    #[test]
    fn what_a_part_takes_besides_its_steps_counts() {
        assert_eq!(parts_that_fill(32, 3, 128, 0, 32), 32);
        assert_eq!(parts_that_fill(32, 3, 128, 4, 32), 10);
    }

    #[test]
    fn there_are_no_more_parts_than_steps_or_than_asked_for() {
        for owners in [1, 7, 100, 300, 5000] {
            for steps in [1, 2, 5, 33] {
                for most in [0, 1, 3, steps] {
                    let parts = parts_that_fill(32, owners, steps, 1, most);
                    assert!((1..=most.max(1)).contains(&parts));
                }
            }
        }
    }
}
