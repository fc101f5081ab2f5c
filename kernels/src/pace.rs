//! How far a thread gets ahead of a CPU that it launches on.

use std::cell::Cell;

use cubecl::client::Client;

/// Launches of unit variants that a thread may be ahead of a CPU. CubeCL's two queues of 32 tasks have room for four, with what
/// belongs to them; a thread that finds them full spins on a core that a unit needs, and the units that wait for that one at a
/// barrier wait milliseconds. Waiting at every launch would cost a loop that reads its results a second way to the device and back.
const LAUNCHES_AHEAD: u32 = 4;

thread_local! {
    /// Launches of unit variants since this thread waited for one.
    static LAUNCHED: Cell<u32> = const { Cell::new(0) };
}

/// Right before a launch of a unit variant: lets the device finish what was launched before, and waits for it if this thread has got too far ahead.
pub(crate) fn keep_close(client: &Client) {
    // CubeCL writes only once the launches before are done, and its thread waits for them by giving its core away. The unit of a launch behind
    // another would wait on its core for that one, spinning, and in its way.
    let _ = client.create_from_slice(&[0; 4]);
    let launched = LAUNCHED.get();
    if launched == LAUNCHES_AHEAD {
        // What failed stays with the buffers that it left unwritten, and is told where they are read.
        let _ = client.flush();
    }
    LAUNCHED.set(launched % LAUNCHES_AHEAD + 1);
}
