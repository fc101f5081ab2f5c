//! Rows meet their own classes, whose logits lose the margin.

use cubecl::prelude::*;

use super::plan::Plan;
use crate::cosine_cross_entropy::margin::MarginRule;
use crate::loss::target::INVALID;

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

/// What a row's own class has of the gradient of the scale, times the scale, beside what the product of the row with its gradient has:
/// `g (ψ − ψ' cos)`, where `ψ` is what its cosine counts as. A row that takes no part has nothing.
#[cube]
pub(super) fn own_class(
    workspace: &[f32],
    target: u32,
    plan: &Plan,
    local: usize,
    r: usize,
    scale: f32,
    smoothing: f32,
    margin: &MarginRule,
    #[comptime] width: usize,
) -> f32 {
    let state = plan.state(local, width);
    let mut own = 0.0f32.runtime();
    if target < INVALID {
        let logit = workspace[state.plain + r];
        let with = margin.of_logit(logit, scale);
        let below = with.value - workspace[state.lse + r];
        let probability = (below - workspace[state.lse_low + r]).exp();
        let uniform = smoothing / f32::cast_from(plan.active as u32);
        let gradient = probability - (1.0 - smoothing) - uniform;
        own = workspace[state.arriving + r] * gradient * margin.beyond_slope(logit, scale);
    }
    own
}
