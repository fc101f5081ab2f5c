//! Rows meet their own classes, whose logits lose the margin.

use cubecl::prelude::*;

use super::plan::Plan;
use crate::cosine_cross_entropy::margin::MarginRule;

/// Of an item's logits `[count, width]` at `at`, with the classes from `first` on, each row's own becomes what the loss sees. What it
/// was, and the slope, stay with the rows the first time.
#[cube]
pub(super) fn apply(
    workspace: &mut [f32],
    targets: &[u32], // [rows, padded]
    plan: &Plan,
    item: usize,
    local: usize, // its place in the chunk
    first: usize,
    count: usize,
    at: usize,
    scale: f32,
    margin: &MarginRule,
    #[comptime] first_time: bool,
    #[comptime] width: usize,
) {
    let row = plan.first_row(item, width);
    let state = plan.state(local, width);
    for r in 0..width {
        let target = targets[row + r] as usize;
        if target >= first && target < first + count {
            let own = at + (target - first) * width + r;
            let logit = workspace[own];
            let with = margin.of_logit(logit, scale);
            workspace[own] = with.value;
            if comptime!(first_time) {
                workspace[state.plain + r] = logit;
                workspace[state.slope + r] = with.slope;
            }
        }
    }
}
