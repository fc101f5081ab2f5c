//! A label becomes a target: its class, or one of two marks that no class can have.

use cubecl::ir::{ElemType, IntKind};
use cubecl::prelude::*;

/// The target of a row whose label is the ignored one.
pub(crate) const IGNORED: u32 = u32::MAX;
/// The target of a row whose label is neither ignored nor a class.
pub(crate) const INVALID: u32 = u32::MAX - 1;

/// What decides over labels.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(crate) struct LabelRule {
    pub active: u32,
    pub ignore: i32,
    /// Whether the label's dtype can hold `ignore` at all: 1 or 0.
    pub can_ignore: u32,
}

/// The rule for labels of `dtype`.
pub(crate) fn label_rule(dtype: ElemType, active: usize, ignore_index: i32) -> LabelRuleLaunch {
    let signed = matches!(dtype, ElemType::Int(IntKind::I32 | IntKind::I64));
    let can_ignore = signed || ignore_index >= 0;
    // As far as the labels' own dtype can tell.
    let most = match dtype {
        ElemType::Int(IntKind::I32) => i32::MAX as usize,
        _ => u32::MAX as usize,
    };
    LabelRuleLaunch::new(active.min(most) as u32, ignore_index, u32::from(can_ignore))
}

/// Ignored comes first, so that a valid class can be ignored.
#[cube]
pub(crate) fn target_of<I: Int>(label: I, rule: &LabelRule) -> u32 {
    let mut target = INVALID.runtime();
    if label >= I::new(0) && label < I::cast_from(rule.active) {
        target = u32::cast_from(label);
    }
    if rule.can_ignore == 1 && label == I::cast_from(rule.ignore) {
        target = IGNORED;
    }
    target
}

/// A label's 64 bits, low half first.
#[cube]
pub(crate) fn halves<I: Int>(label: I) -> (u32, u32) {
    let mut high = 0u32.runtime();
    if I::size_bits().comptime() == 64 {
        high = u32::cast_from(label >> I::new(32));
    } else if label < I::new(0) {
        high = u32::MAX;
    }
    (u32::cast_from(label), high)
}

/// The label of these [`halves`].
pub(crate) fn joined(low: u32, high: u32) -> i64 {
    (u64::from(high) << 32 | u64::from(low)) as i64
}

/// Whether a row takes part.
#[cube]
pub(crate) fn is_class(target: u32) -> bool {
    target < INVALID
}
