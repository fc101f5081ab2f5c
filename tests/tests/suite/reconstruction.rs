//! The reconstruction loss against the reference.

use cubecl::std::tensor::TensorHandle;
use proptest::prelude::*;
use protohead::Upstream;
use protohead::reconstruction::{Inputs, Options, Wanted, backward, forward};
use protohead_reference as reference;
use protohead_tests::close::{Comparison, lengths};
use protohead_tests::devices::{Run, runs, say_agreed};
use protohead_tests::problem::{Dtype, Problem, download, problem};

use crate::support::{bytes, config, fails};

type Expected<T> = (reference::Reconstruction<T>, (Vec<T>, Vec<T>));

fn expected<T: reference::Real>(parts: &[Vec<f32>; 3], dim: usize) -> Expected<T> {
    let of = |values: &[f32]| -> Vec<T> { values.iter().map(|&v| T::of(f64::from(v))).collect() };
    let [w, a, b] = parts.each_ref().map(|values| of(values));
    (
        reference::reconstruction(&w, &a, &b, dim),
        reference::reconstruction_backward(&w, &a, &b, dim, T::of(1.5)),
    )
}

fn check(
    run: &Run,
    problem: &Problem,
    parts: &[Vec<f32>; 3],
    truth: &Expected<f64>,
    working: &Expected<f32>,
) -> Result<(), String> {
    let client = run.client;
    let (_, rows, dim, _, _) = problem.sizes;
    let [whole, first, second] = parts
        .each_ref()
        .map(|values| problem.upload(client, values, &[rows, dim]));
    let inputs = Inputs {
        whole,
        first,
        second,
    };
    let said = |error: protohead::Error| error.to_string();
    let options = Options {
        strategy: run.strategy,
    };
    let operands = [&inputs.whole, &inputs.first, &inputs.second];
    let before = bytes(client, &operands);
    let output = forward(client, &inputs, &options).map_err(said)?;
    let again = forward(client, &inputs, &options).map_err(said)?;
    let [once, again] = [&output, &again].map(|o| bytes(client, &[&o.loss, &o.cosines]));
    if once != again {
        return Err("a second forward pass differs".into());
    }
    let upstream = Upstream::Total(1.5);
    let gradients = backward(client, &inputs, &options, &upstream, Wanted::ALL).map_err(said)?;
    // With some frozen, the others get the same bits.
    for (whole, part) in [(true, false), (false, true)] {
        let wanted = Wanted { whole, part };
        let some = backward(client, &inputs, &options, &upstream, wanted).map_err(said)?;
        for (asked, once, again) in [
            (whole, &gradients.whole, &some.whole),
            (part, &gradients.part, &some.part),
        ] {
            let bits = |gradient: &TensorHandle| download(client, gradient);
            let expected = once.as_ref().filter(|_| asked).map(bits);
            if again.as_ref().map(bits) != expected {
                return Err(format!("other gradients where {wanted:?}"));
            }
        }
    }
    let sum: Vec<f32> = parts[1].iter().zip(&parts[2]).map(|(a, b)| a + b).collect();
    let none: &[f64] = &[];
    let of_whole = lengths(&parts[0], dim);
    let of_part = lengths(&sum, dim);
    for (name, ours, truth, working, dtype, magnitude, lengths) in [
        (
            "loss",
            Some(output.loss),
            &vec![truth.0.loss],
            &vec![working.0.loss],
            Dtype::F32,
            1.0,
            none,
        ),
        (
            "cosines",
            Some(output.cosines),
            &truth.0.cosines,
            &working.0.cosines,
            Dtype::F32,
            1.0,
            none,
        ),
        (
            "d whole",
            gradients.whole,
            &truth.1.0,
            &working.1.0,
            problem.dtype,
            1.5 / rows as f64,
            &of_whole,
        ),
        (
            "d part",
            gradients.part,
            &truth.1.1,
            &working.1.1,
            problem.dtype,
            1.5 / rows as f64,
            &of_part,
        ),
    ] {
        Comparison {
            name,
            ours: &download(client, &ours.ok_or("a gradient is missing")?),
            truth,
            working,
            dtype,
            magnitude,
            kept: run.unit_rows(),
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

proptest! {
    #![proptest_config(config(16))]

    #[test]
    fn reconstruction_agrees_with_the_reference(problem in problem()) {
        let (_, rows, dim, _, _) = problem.sizes;
        let mut parts = [11, 12, 13].map(|purpose| problem.uniform(purpose, rows * dim));
        if problem.values == protohead_tests::problem::Values::ZeroRows {
            parts[0][..dim].fill(0.0);
            let last = (rows - 1) * dim;
            parts[1][last..].fill(0.0);
            parts[2][last..].fill(0.0);
        }
        let truth = expected::<f64>(&parts, dim);
        let working = expected::<f32>(&parts, dim);
        for run in runs() {
            if problem.supported(run.client) {
                check(&run, &problem, &parts, &truth, &working).map_err(fails(&run))?;
                say_agreed("reconstruction", &run, problem.dtype);
            }
        }
    }
}
