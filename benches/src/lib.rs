//! The benches of protohead: named shapes, our ops and their peers, each checked against the reference before it is timed.
//!
//! A [`Case`] is one line of a table, `<group>/<shape>/<who>`. It draws fresh random inputs, runs once and waits, and gives the
//! time between. `cargo bench` measures all of them; the program `serve` runs single cases on demand, so that
//! another program can take turns with it.

mod case;
pub mod ceiling;
mod naive;
mod ours;
mod shapes;
mod tensors;

pub use case::{Case, Group, Who};
pub use ours::{Step, device_name};
pub use shapes::{Data, Shape};

/// What a case computed, for the check: a loss, then gradients, or whatever its group has.
pub type Answer = Vec<Vec<f32>>;

/// A run: how long it took, and its answer if it was asked for.
pub struct Ran {
    /// From the call to the results being there.
    pub time: std::time::Duration,
    /// The results.
    pub answer: Option<Answer>,
}
