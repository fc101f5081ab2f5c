//! Logits and their gradients against the reference.

use proptest::prelude::*;
use proptest::test_runner::TestCaseError;
use protohead::Wanted;
use protohead::cosine_logits::{Inputs, Options, backward, forward};
use protohead_reference as reference;
use protohead_tests::close::{Comparison, lengths};
use protohead_tests::devices::{Run, product_runs, say_agreed};
use protohead_tests::problem::{Dtype, Problem, download, problem};

use crate::support::{all_three, bytes, config, failed_once, fails, long_rows, same_alone};

struct Expected<T> {
    logits: Vec<T>,
    gradients: reference::Gradients<T>,
}

fn expected<T: reference::Real>(problem: &Problem, upstream: &[f32]) -> Expected<T> {
    let data = problem.data();
    let of = |values: &[f32]| -> Vec<T> { values.iter().map(|&v| T::of(f64::from(v))).collect() };
    let (x, w) = (of(&data.embeddings), of(&data.weights));
    let sizes = problem.reference_sizes();
    let scale = T::of(f64::from(problem.scale));
    Expected {
        logits: reference::cosine_logits(&x, &w, sizes, scale),
        gradients: reference::cosine_logits_backward(&x, &w, &of(upstream), sizes, scale),
    }
}

fn check(
    run: &Run,
    problem: &Problem,
    truth: &Expected<f64>,
    working: &Expected<f32>,
    upstream: &[f32],
) -> Result<(), String> {
    let client = run.client;
    let data = problem.data();
    let (heads, rows, dim, classes, active) = problem.sizes;
    let inputs = Inputs {
        embeddings: problem.upload(client, &data.embeddings, &[heads, rows, dim]),
        weights: problem.upload(client, &data.weights, &[heads, classes, dim]),
    };
    let options = Options {
        scale: problem.scale,
        active: Some(active),
        allow_tf32: false,
        strategy: run.strategy,
    };
    let said = |error: protohead::Error| error.to_string();
    let scale = f64::from(problem.scale.abs());
    // A product of two unit rows is off by twice the roundoff of either at most.
    let kept = run.kept(problem.dtype);
    let operands = [&inputs.embeddings, &inputs.weights];
    let before = bytes(client, &operands);
    let logits = forward(client, &inputs, &options).map_err(said)?;
    let again = forward(client, &inputs, &options).map_err(said)?;
    if bytes(client, &[&logits]) != bytes(client, &[&again]) {
        return Err("a second forward pass differs".into());
    }
    Comparison {
        name: "logits",
        ours: &download(client, &logits),
        truth: &truth.logits,
        working: &working.logits,
        dtype: problem.dtype,
        magnitude: scale,
        kept: 2.0 * kept,
        rounded: 0.0,
        lengths: &[],
    }
    .check()?;
    let upstream = problem.upload(client, upstream, &[heads, rows, active]);
    let wanted = |wanted| backward(client, &inputs, &options, &upstream, wanted).map_err(said);
    let all = wanted(Wanted::ALL)?;
    // A frozen operand changes nothing for the other, and a second backward gives the same bits.
    let [dx, dw, ds] = all_three(all)?;
    same_alone(client, [&dx, &dw, &ds], problem.seed, wanted)?;
    let (truth, working) = (&truth.gradients, &working.gradients);
    let (of_x, of_w) = (lengths(&data.embeddings, dim), lengths(&data.weights, dim));
    let of_products = (rows as f64 * active as f64).sqrt();
    for (name, ours, truth, working, lengths, magnitude) in [
        (
            "dX",
            dx,
            &truth.embeddings,
            &working.embeddings,
            &of_x[..],
            scale * (active as f64).sqrt(),
        ),
        (
            "dW",
            dw,
            &truth.weights,
            &working.weights,
            &of_w,
            scale * (rows as f64).sqrt(),
        ),
        ("ds", ds, &truth.scale, &working.scale, &[], of_products),
    ] {
        Comparison {
            name,
            ours: &download(client, &ours),
            truth,
            working,
            dtype: if name == "ds" {
                Dtype::F32
            } else {
                problem.dtype
            },
            magnitude,
            kept: 2.0 * kept + run.unit_rows(),
            rounded: 0.0,
            lengths,
        }
        .check()?;
    }
    if bytes(client, &operands) != before {
        return Err("the operands were modified".into());
    }
    Ok(())
}

fn agrees(problem: &Problem) -> Result<(), TestCaseError> {
    let (heads, rows, _, _, active) = problem.sizes;
    let upstream = problem.uniform(9, heads * rows * active);
    let truth = expected::<f64>(problem, &upstream);
    let working = expected::<f32>(problem, &upstream);
    for run in product_runs() {
        if problem.supported(run.client) {
            check(&run, problem, &truth, &working, &upstream).map_err(fails(&run))?;
            say_agreed("cosine_logits", &run, problem.dtype);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(config(16))]

    #[test]
    fn logits_and_their_gradients_agree_with_the_reference(problem in problem()) {
        agrees(&problem)?;
    }
}

#[test]
fn problems_that_failed_once_agree_with_the_reference() {
    for problem in failed_once() {
        agrees(&problem).unwrap_or_else(|error| panic!("{problem:?}: {error}"));
    }
}

#[test]
fn long_rows_agree_with_the_reference() {
    for problem in long_rows() {
        agrees(&problem).unwrap_or_else(|error| panic!("{problem:?}: {error}"));
    }
}
