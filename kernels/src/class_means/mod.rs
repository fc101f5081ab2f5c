//! Prototype averaging: `p[h, k] = mean of x[h, n] over the rows with label k`.
//!
//! Rows are streamed in batches into [`ClassSums`]; at the end the means take the place of the first `K` rows of the class weights. A
//! class nobody saw keeps the row it had, and its count says so (torch's `mean` of nothing is NaN). Sums are f32 with Kahan's
//! compensation, so that a class of many thousand rows keeps f32's precision. Batches of any split give the same bits; states that
//! are merged agree with one that saw all rows to rounding.

mod launch;
mod plane;
mod unit;

#[cfg(feature = "burn")]
pub(crate) use launch::SUMS_STATUS_FIELDS;
pub use launch::{ClassSums, Options};
