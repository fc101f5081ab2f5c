//! What can be wrong with a call, with the numbers in it.

use cubecl::ir::ElemType;

use crate::loss::Reduction;

/// Why an op refused its operands, or what the device reported afterwards.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operand has the wrong number of axes or the wrong lengths.
    #[error("{operand}: shape {got:?}, expected {expected}")]
    Shape {
        /// The operand's name.
        operand: &'static str,
        /// Its shape.
        got: Vec<usize>,
        /// What the shape must be, in words and numbers.
        expected: String,
    },
    /// An axis has length zero.
    #[error("{operand}: shape {got:?}, every axis must have at least one element")]
    Empty {
        /// The operand's name.
        operand: &'static str,
        /// Its shape.
        got: Vec<usize>,
    },
    /// The strides are not what the op takes, or leave the buffer.
    #[error(
        "{operand}: strides {strides:?} for shape {shape:?} in a buffer of {elements} elements, expected {expected} and every element inside the buffer"
    )]
    Strides {
        /// The operand's name.
        operand: &'static str,
        /// Its shape.
        shape: Vec<usize>,
        /// Its strides, in elements.
        strides: Vec<usize>,
        /// What its buffer holds; 0 if it begins in the middle of an element.
        elements: usize,
        /// What the strides must be.
        expected: &'static str,
    },
    /// An operand has a dtype that the op or the device does not take.
    #[error("{operand}: dtype {got}, expected {expected}")]
    Dtype {
        /// The operand's name.
        operand: &'static str,
        /// Its dtype.
        got: ElemType,
        /// The dtypes that are taken.
        expected: String,
    },
    /// No active classes are asked for, or more than there are.
    #[error("{active} active classes were asked for, expected between 1 and {classes}")]
    ActiveClasses {
        /// K
        active: usize,
        /// C
        classes: usize,
    },
    /// A number among the options is out of its range.
    #[error("{option} is {}, expected {expected}", *got as f32)]
    Option {
        /// The option's name.
        option: &'static str,
        /// Its value.
        got: f64,
        /// The range.
        expected: &'static str,
    },
    /// A reduction that this function does not do.
    #[error("the reduction is {got:?}, expected {expected}")]
    Reduction {
        /// What was asked for.
        got: Reduction,
        /// What is done.
        expected: &'static str,
    },
    /// A tensor begins where the device's kernels cannot read it.
    #[error(
        "{operand}: first element at byte {offset} of its buffer, expected a multiple of {alignment}"
    )]
    Offset {
        /// The operand's name.
        operand: &'static str,
        /// Where it begins, in bytes.
        offset: u64,
        /// What the device asks for.
        alignment: u64,
    },
    /// There is not one head weight per head.
    #[error("{got} head weights for {heads} heads")]
    HeadWeights {
        /// How many weights were given.
        got: usize,
        /// H
        heads: usize,
    },
    /// Head weights were given to a function that returns losses by head or by row.
    #[error("head weights are not taken here: multiply the losses by them")]
    HeadWeightsNotTaken,
    /// A problem is too large for the 32-bit addressing of the kernels, or for a buffer of the device.
    #[error("{operand}: {elements} elements are more than the {most} that fit")]
    TooLarge {
        /// The tensor's name.
        operand: &'static str,
        /// Its elements.
        elements: u128,
        /// The most that there may be.
        most: u128,
    },
    /// A variant cannot run on this device. If none was forced, the device has less than WebGPU guarantees.
    #[error(
        "the {variant} variant needs {needed} units a cube and {shared} bytes of shared memory, the device has {units} and {memory}"
    )]
    Variant {
        /// The variant's name.
        variant: &'static str,
        /// The units a cube needs.
        needed: usize,
        /// The shared memory it needs.
        shared: usize,
        /// The units a cube may have.
        units: usize,
        /// The shared memory a cube may have.
        memory: usize,
    },
    /// A variant was forced on a device, in a build or on an op that it is not for.
    #[error("the {variant} variant runs {only}")]
    NoVariant {
        /// The variant's name.
        variant: &'static str,
        /// Where it runs.
        only: &'static str,
    },
    /// The small variant was forced on a problem that is not.
    #[error(
        "{heads} heads × {rows} rows × {active} active classes × {dim} columns are too many for the small variant, which takes at most {} rows, {} classes, {} vectors of columns and {} of their product", most[0], most[1], most[2], most[3]
    )]
    NotSmall {
        /// Heads.
        heads: usize,
        /// Rows.
        rows: usize,
        /// K, the active classes.
        active: usize,
        /// Columns.
        dim: usize,
        /// The most rows, classes, vectors of columns, and their product with the heads.
        most: [usize; 4],
    },
    /// The output that a backward pass was given is of another op, or of a forward pass with other sizes or options.
    #[error("{option} is {backward}, but was {forward} in the forward pass")]
    OtherForward {
        /// What differs.
        option: &'static str,
        /// Its value in the forward pass.
        forward: String,
        /// Its value in the backward pass.
        backward: String,
    },
    /// A label is neither a class nor ignored.
    #[error(
        "label {label} of row {row} is none of the {active} active classes, nor the ignored label (the first of {rows} such row(s))"
    )]
    Label {
        /// The first such row, counted in its batch.
        row: usize,
        /// Its label.
        label: i64,
        /// K
        active: usize,
        /// How many such rows there are.
        rows: usize,
    },
    /// Sums of normalized rows and of raw ones do not go together.
    #[error("sums of {} rows cannot be merged into sums of {} rows", kind(*normalized), kind(!*normalized))]
    MixedSums {
        /// Whether the rows of those that were to be merged are normalized.
        normalized: bool,
    },
    /// An operand is on a device where the op cannot read it.
    #[error("{operand}: on {on}, expected {expected}")]
    Place {
        /// The operand's name.
        operand: &'static str,
        /// Its device.
        on: String,
        /// Where it must be.
        expected: String,
    },
    /// The device failed.
    #[error("the device reported: {0}")]
    Device(String),
}

impl Error {
    /// What a device says of itself, in one line and without where in CubeCL it happened.
    pub fn device(reported: impl std::fmt::Debug) -> Self {
        let said = format!("{reported:?}");
        let is_heading = |line: &str| {
            let headings = [
                "Backtrace",
                "Asked at",
                "No backtrace",
                "disabled backtrace",
            ];
            headings.iter().any(|heading| line.starts_with(heading))
        };
        let is_frame = |line: &str| {
            let (number, frame) = line.split_once(": ").unwrap_or(("", ""));
            let is_numbered = !frame.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
            is_numbered || line.starts_with("at ") || line.is_empty()
        };
        let mut in_trace = false;
        let lines = said.lines().map(str::trim).filter(|line| {
            // A trace follows its heading, and ends with the first line that is no part of one.
            in_trace = is_heading(line) || in_trace && is_frame(line);
            !line.is_empty() && !in_trace
        });
        Self::Device(lines.collect::<Vec<_>>().join(" "))
    }
}

fn kind(normalized: bool) -> &'static str {
    if normalized { "normalized" } else { "raw" }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As CubeCL writes it.
    #[test]
    fn what_a_device_says_is_one_line_without_a_trace() {
        struct Said;
        impl std::fmt::Debug for Said {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("it failed\nCaused by:\n  0 of 3: too big\nat most 128 MiB fit\nBacktrace:\n   0: cubecl::run\n             at /a/b.rs:3:4\n  12: main\n\nand again\nNo backtrace available\n")
            }
        }
        let said = Error::device(Said).to_string();
        let expected = "the device reported: it failed Caused by: 0 of 3: too big at most 128 MiB fit and again";
        assert_eq!(said, expected);
    }
}
