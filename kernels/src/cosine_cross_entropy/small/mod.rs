//! A small step in two launches, because launches cost more than it computes: one over rows, one over classes.
//!
//! 1. A cube owns a few rows of a head, and needs all class weights: cosines and the weights' norms, the softmax in shared
//!    memory, logit gradients, and the rows' own gradients. It leaves logit gradients, norms and losses in a scratch buffer.
//! 2. A cube owns a class of a head: the sum of logit gradient × row over the rows. One more cube reduces the losses.
//!
//! Nothing is packed: operands are read as they are, from a cache that they fit in. All in f32, whatever the operands are.

mod classes;
mod rows;

use cubecl::prelude::*;
use cubecl::server::Handle;
use cubecl::std::tensor::TensorHandle;

use super::launch::{Call, RowResults};
use crate::Gradients;
use crate::blueprint::{Blueprint, PLANE_UNITS};
use crate::cosine_logits::CosineProblem;
use crate::error::Error;
use crate::loss::arriving::Arriving;
use crate::loss::reduce::Reduced;
use crate::operand::{addressable, whole_if_asked};

/// Active classes at most: their logits for a few rows are in shared memory.
const CLASSES: usize = 256;
/// Rows at most: every cube counts the labels.
const ROWS: usize = 4096;
/// `heads · rows · active · dim` at most: operands are read again by every cube.
const WORK: usize = 1 << 23;

/// Whether a problem is small.
///
/// # Errors
/// [`Error::NotSmall`] if not, [`Error::TooLarge`] if what is stored beside the active classes is not.
pub(super) fn check(blueprint: &Blueprint, problem: &CosineProblem) -> Result<(), Error> {
    let sizes = &problem.sizes;
    let [rows, active, dim] = [sizes.rows, sizes.active, sizes.dim];
    let work = [rows, active, dim]
        .iter()
        .fold(sizes.heads, |work, &size| work.saturating_mul(size));
    // A unit has a vector of columns.
    let columns = dim / problem.vector_size(blueprint);
    if active > CLASSES || rows > ROWS || columns > PLANE_UNITS || work > WORK {
        return Err(Error::NotSmall {
            heads: sizes.heads,
            rows,
            active,
            dim,
            most: [ROWS, CLASSES, PLANE_UNITS, WORK],
        });
    }
    // Its indices have 32 bits, whatever is stored beside the active classes.
    let stored = sizes.heads as u128 * problem.classes as u128 * dim as u128;
    addressable("class weights", stored)?;
    addressable("class weights", problem.weights.elements() as u128)?;
    addressable("embeddings", problem.embeddings.elements() as u128)
}

/// What the launches tell each other, and where it lies in one buffer of f32: logit gradients `[heads, rows, active]` times
/// scale, then `1 / ‖x‖`, the losses and what rows have of the gradient of the scale, `[heads, rows]`, then [`COUNTS`] numbers.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
struct Sizes {
    heads: usize,
    rows: usize,
    active: usize,
    stored: usize,
    dim: usize,
}

#[cube]
impl Sizes {
    fn inverse_norms(&self) -> usize {
        self.heads * self.rows * self.active
    }

    fn losses(&self) -> usize {
        self.inverse_norms() + self.heads * self.rows
    }

    fn of_scale(&self) -> usize {
        self.losses() + self.heads * self.rows
    }

    fn counted(&self) -> usize {
        self.of_scale() + self.heads * self.rows
    }
}

/// Rows that count, rows with a bad label, and the first of these or the number of rows; so few that f32 holds them.
const COUNTS: usize = 3;

/// Both passes. A gradient that is not there is not computed; without `arriving` none may be.
pub(super) fn launch(
    call: &Call,
    arriving: Option<&Arriving>,
    results: &RowResults,
    reduced: &Reduced,
    gradients: &Gradients,
) {
    let sizes = &call.problem.sizes;
    let pairs = sizes.heads * sizes.rows;
    let elements = pairs * sizes.active + 3 * pairs + COUNTS;
    let step = Step {
        call,
        vector: call.problem.vector_size(&call.blueprint),
        scratch: call.client.empty(elements * size_of::<f32>()),
        elements,
    };
    rows::launch(&step, arriving, results, gradients);
    classes::launch(&step, results, reduced, gradients);
}

/// What both launches need.
struct Step<'a> {
    call: &'a Call<'a>,
    vector: usize,
    scratch: Handle,
    elements: usize,
}

impl Step<'_> {
    fn sizes_arg(&self) -> SizesLaunch {
        let sizes = &self.call.problem.sizes;
        SizesLaunch::new(
            sizes.heads,
            sizes.rows,
            sizes.active,
            self.call.problem.classes,
            sizes.dim,
        )
    }

    fn scratch_arg(&self) -> BufferArg {
        // SAFETY: `launch` allocated exactly this many elements.
        unsafe { BufferArg::from_raw_parts(self.scratch.clone(), self.elements) }
    }

    fn grad_arg(&self, grad: &Option<TensorHandle>) -> BufferArg {
        let dtype = self.call.problem.embeddings.dtype();
        // SAFETY: the call allocated the gradient.
        unsafe { whole_if_asked(self.call.client, grad.as_ref(), dtype, self.vector) }
    }
}
