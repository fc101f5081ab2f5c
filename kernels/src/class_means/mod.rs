//! Prototype averaging: `p[h, k] = mean of x[h, n] over the rows with label k`.
//!
//! Rows are streamed in batches into [`ClassSums`]; at the end the means take the place of the first `K` rows of the class weights. A
//! class without rows keeps its old weights, and its count is 0 (torch's `mean` of nothing is NaN). Sums are f32 with Kahan's
//! compensation, so that a class of many thousand rows keeps f32's precision. Any split into batches gives the same bits;
//! of rows that are normalized, if the batches lie alike in memory (views of one tensor do). Merged states
//! agree with a single one up to rounding.

mod launch;
mod plane;
mod state;
mod unit;

#[cfg(feature = "burn-unfused")]
pub(crate) use launch::SUMS_STATUS_FIELDS;
#[cfg(feature = "burn-unfused")]
pub(crate) use launch::addressable_batch;
pub use launch::{ClassSums, Options};
