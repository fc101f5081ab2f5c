//! Long work in parts, where too few cubes of a GPU would have anything to do.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::blueprint::{PLANE_UNITS, cubes_for};

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
    parts_that_fill(client, owners, steps.min(PARTS / elements))
}

/// In how many parts, `most` at most, the work of each of `owners` cubes is done: as few as leave less than a tenth of the GPU's time
/// unused, if it runs two cubes on a multiprocessor at a time.
pub(crate) fn parts_that_fill(client: &Client, owners: usize, most: usize) -> usize {
    // Where it is not known, as of a small GPU.
    let processors = client.properties().hardware.num_streaming_multiprocessors;
    let slots = 2 * processors.unwrap_or(16) as usize;
    let most = (4 * slots / owners).min(most).max(1);
    let used = |parts: usize| {
        let cubes = parts * owners;
        cubes as f64 / cubes.next_multiple_of(slots) as f64
    };
    let best = (1..=most).map(used).fold(0.0, f64::max);
    (1..=most)
        .find(|&parts| used(parts) >= best.min(0.9))
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
