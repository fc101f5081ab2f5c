//! Prototype averaging: `p[h, k] = mean of x[h, n] over the rows with label k`.
//!
//! Rows are streamed in batches into [`ClassSums`], which merge; at the end the means are written over the first
//! `K` rows of the class weights. A class nobody saw keeps the row it had, and its count says so (torch's
//! `mean` of nothing is NaN). Sums are f32 with Kahan's compensation, in lanes of which each has one owner that adds its rows in
//! order, so that a class of many thousand rows keeps f32's precision and two runs give the same bits. The variants count the bytes.

mod launch;
mod plane;
mod unit;

pub use launch::{ClassSums, Options};
