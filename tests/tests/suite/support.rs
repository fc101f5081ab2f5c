//! How a property is run: a default number of cases, regressions beside the suite, failures named; and what is in a buffer.

use cubecl::MemoryScope;
use cubecl::client::Client;
use cubecl::ir::{ElemType, IntKind};
use cubecl::prelude::CubeElement;
use cubecl::std::tensor::TensorHandle;
use proptest::prelude::ProptestConfig;
use proptest::test_runner::{FileFailurePersistence, TestCaseError};
use protohead::cosine_cross_entropy::{Inputs, Options, backward, forward, forward_backward};
use protohead::{Gradients, LossOutput, Reduction, Upstream, Wanted};
use protohead_tests::problem::{Dtype, LabelDtype, LabelKind, ONLY, Problem, Values};

/// `cases` random problems unless `PROPTEST_CASES` says otherwise, or there is only one.
pub(crate) fn config(cases: u32) -> ProptestConfig {
    let default = ProptestConfig::default();
    let only = std::env::var_os(ONLY).is_some();
    let chosen = if only {
        1
    } else if std::env::var_os("PROPTEST_CASES").is_some() {
        default.cases
    } else {
        cases
    };
    ProptestConfig {
        cases: chosen,
        // A seed would not lead to the only problem again.
        failure_persistence: match only {
            true => None,
            false => Some(Box::new(FileFailurePersistence::Direct(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/regressions.txt"
            )))),
        },
        max_shrink_iters: 400,
        ..default
    }
}

/// A failed comparison becomes a failed case, with where it happened.
pub(crate) fn fails(place: impl std::fmt::Display) -> impl FnOnce(String) -> TestCaseError {
    move |message| TestCaseError::fail(format!("on {place}: {message}"))
}

/// What is in the buffers of some tensors, gaps between their rows included.
pub(crate) fn bytes(client: &Client, tensors: &[&TensorHandle]) -> Vec<Vec<u8>> {
    let read = |tensor: &&TensorHandle| {
        let bytes = client.read_one(tensor.handle.clone());
        bytes.expect("the device can be read").to_vec()
    };
    tensors.iter().map(read).collect()
}

/// Bytes that the device has reserved for this thread.
pub(crate) fn reserved(client: &Client) -> u64 {
    let report = client.memory_report(MemoryScope::CurrentStream);
    report.usage().bytes_reserved
}

/// A tensor of f32.
pub(crate) fn f32s(client: &Client, values: &[f32], shape: &[usize]) -> TensorHandle {
    TensorHandle::new_contiguous(
        shape.to_vec(),
        client.create_from_slice(f32::as_bytes(values)),
        Dtype::F32.elem(),
    )
}

/// Labels of i32.
pub(crate) fn labels(client: &Client, labels: &[i32]) -> TensorHandle {
    TensorHandle::new_contiguous(
        [labels.len()],
        client.create_from_slice(i32::as_bytes(labels)),
        ElemType::Int(IntKind::I32),
    )
}

/// Both passes of the fused op, in which the host sees nothing wrong: in one call or in two.
pub(crate) fn step(
    client: &Client,
    inputs: &Inputs,
    options: &Options,
    upstream: &Upstream,
    at_once: bool,
) -> (LossOutput, Gradients) {
    if at_once {
        return forward_backward(client, inputs, options, upstream, Wanted::ALL).expect("valid");
    }
    let output = forward(client, inputs, options).expect("valid");
    let gradients = backward(client, inputs, options, &output, upstream, Wanted::ALL);
    (output, gradients.expect("valid"))
}

/// The gradients of the embeddings, the class weights and the scale.
pub(crate) fn all_three(gradients: Gradients) -> Result<[TensorHandle; 3], String> {
    Ok([
        gradients.embeddings.ok_or("no dX")?,
        gradients.weights.ok_or("no dW")?,
        gradients.scale.ok_or("no ds")?,
    ])
}

/// Whether a gradient, if it alone is asked for, comes alone and has the same bits. Which of the three, `turn` says: each has kernels of
/// its own, and all of every problem would take the suite minutes.
pub(crate) fn same_alone(
    client: &Client,
    all: [&TensorHandle; 3],
    turn: u64,
    only: impl Fn(Wanted) -> Result<Gradients, String>,
) -> Result<(), String> {
    let at = (turn % 3) as usize;
    let name = ["dX", "dW", "ds"][at];
    let gradients = only([Wanted::EMBEDDINGS, Wanted::WEIGHTS, Wanted::SCALE][at])?;
    let found = [gradients.embeddings, gradients.weights, gradients.scale];
    if found.iter().flatten().count() != 1 {
        return Err(format!("not {name} alone, which was asked for"));
    }
    let again = found[at].as_ref().ok_or_else(|| format!("no {name}"))?;
    if bytes(client, &[all[at]]) != bytes(client, &[again]) {
        return Err(format!("{name} differs if it is alone"));
    }
    Ok(())
}

/// Problems that failed once, as they were when they could not be made smaller. Seeds in `regressions.txt` lose theirs as soon as a
/// problem has one more choice.
pub(crate) fn failed_once() -> [Problem; 8] {
    [
        Problem::plain((1, 1, 4, 1, 1)),
        Problem::plain((1, 1, 1, 1, 1)),
        Problem::plain((1, 1, 1, 40, 1)),
        Problem {
            scale: -4.0,
            seed: 335086085004074900,
            ..Problem::plain((3, 56, 1, 6, 1))
        },
        Problem {
            seed: 17771048802682150257,
            ..Problem::plain((1, 1, 1, 58, 42))
        },
        // Rows of zeros, whose gradients are zero but for rounding.
        Problem {
            dtype: Dtype::F16,
            interleaved: true,
            values: Values::ZeroRows,
            labels: LabelKind::Ends,
            reduction: Reduction::Sum,
            smoothing: 1.0,
            ignore_index: 0,
            seed: 9605590800205694666,
            ..Problem::plain((3, 41, 51, 8, 2))
        },
        // A row on its class, where the slope of an angular margin is steepest: more than f16 holds.
        Problem {
            dtype: Dtype::F16,
            values: Values::Copies,
            margin: (1.4, 0.1),
            seed: 0,
            ..Problem::plain((1, 1, 1, 2, 2))
        },
        // Every cosine is 1 or -1, as nearly as f32 has it, and all of a head's rows are off to the same side.
        Problem {
            label_dtype: LabelDtype::I64,
            interleaved: true,
            labels: LabelKind::SomeIgnored,
            scale: 1.0,
            margin: (0.5, 0.0),
            reduction: Reduction::None,
            smoothing: 0.1,
            seed: 9442852033624947378,
            ..Problem::plain((1, 6, 1, 151, 148))
        },
    ]
}

/// Rows as long as real ones: longer than what stays in a CPU's first-level cache, which random problems never reach.
pub(crate) fn long_rows() -> [Problem; 3] {
    [
        ((2, 40, 257, 140, 135), Dtype::F32),
        ((1, 35, 520, 150, 150), Dtype::F32),
        ((1, 70, 400, 131, 131), Dtype::Bf16),
    ]
    .map(|(sizes, dtype)| Problem {
        dtype,
        labels: LabelKind::SomeIgnored,
        smoothing: 0.1,
        seed: 11,
        ..Problem::plain(sizes)
    })
}
