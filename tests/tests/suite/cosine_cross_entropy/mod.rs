//! The fused op against the reference.

mod shapes;
mod values;

use cubecl::prelude::CubeElement;
use cubecl::std::tensor::TensorHandle;
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;
use protohead::cosine_cross_entropy::{
    Inputs, Options, backward, forward, forward_backward, predictions,
};
use protohead::{Gradients, LossOutput, Upstream, Wanted};
use protohead_reference as reference;
use protohead_tests::close::{Comparison, Share, lengths};
use protohead_tests::devices::{Run, fused_runs, say_agreed};
use protohead_tests::fused::arguments;
use protohead_tests::problem::{Data, Dtype, Problem, download, problem, wide};
use protohead_tests::rounded::{self, gradients};

use crate::support::{all_three, config, f32s, fails, same_alone, step};

/// The reference's answers in one precision.
struct Expected<T> {
    forward: reference::CrossEntropy<T>,
    logits: Vec<T>,
    of_total: reference::Gradients<T>,
    of_loss: reference::Gradients<T>,
}

fn expected<T: reference::Real>(problem: &Problem, data: &Data) -> Expected<T> {
    let of = |values: &[f32]| -> Vec<T> { values.iter().map(|&v| T::of(f64::from(v))).collect() };
    let (x, w) = (of(&data.embeddings), of(&data.weights));
    let sizes = problem.reference_sizes();
    let options = problem.reference_options(data);
    let scale = T::of(f64::from(problem.scale));
    let gradients = |upstream: &reference::Upstream<T>| {
        reference::cosine_cross_entropy_backward(
            &x,
            &w,
            &data.labels,
            sizes,
            problem.cosine(),
            &options,
            upstream,
        )
    };
    Expected {
        forward: reference::cosine_cross_entropy(
            &x,
            &w,
            &data.labels,
            sizes,
            problem.cosine(),
            &options,
        ),
        logits: reference::cosine_logits(&x, &w, sizes, scale),
        of_total: gradients(&reference::Upstream::Total(T::of(0.7))),
        of_loss: gradients(&reference::Upstream::Loss(of(&data.upstream))),
    }
}

/// How far a margin takes results beyond what they are off without, relative to the scale: the root of the mean square.
#[derive(Default)]
struct NearPoles {
    of_logit: f64,
    of_x: f64,
    of_w: f64,
    of_scale: f64,
}

/// A cosine that is off by so much has an angle that is off by more, the nearer it is to a pole: by √(2 off) there.
fn near_poles(
    problem: &Problem,
    data: &Data,
    logits: &[f64],
    cosine: &reference::Cosine<f64>,
    off: f64,
    kept: f64, // of a gradient that a slope has multiplied
) -> NearPoles {
    let (heads, rows, dim, classes, active) = problem.sizes;
    let mut squares = NearPoles::default();
    let mut of_heads = vec![0.0; heads];
    if problem.margin.0 == 0.0 {
        return squares;
    }
    for (at, row) in logits.chunks(active).enumerate() {
        let label = usize::try_from(data.labels[at % rows]).unwrap_or(active);
        let Some(logit) = row.get(label) else {
            continue;
        };
        let of_target = logit / cosine.scale;
        let (counts_as, slope) = cosine.margin.of(of_target);
        let sine = (1.0 - of_target * of_target).max(0.0).sqrt();
        let mut most = [0.0f64; 3];
        for moved in [of_target - off, of_target + off] {
            let (moved, other) = cosine.margin.of(moved);
            let by = ((moved - counts_as).abs() - off).max(0.0);
            // A probability moves by less than its logit, and by 1 at most; the direction that a slope is for is as long as the sine, and
            // off itself.
            let probability = (cosine.scale * by).min(1.0);
            let steeper = (other.max(slope) - 1.0).max(0.0);
            let of_gradient = probability + (other - slope).abs() * sine + steeper * off;
            // What the cosine counts as is a factor; the slope is one in what a row's product with its gradient has, and in what is taken
            // from that again.
            let of_scale = (by + probability + steeper * (off + kept)) / cosine.scale;
            let now = [by, of_gradient, of_scale];
            most = [0, 1, 2].map(|i: usize| most[i].max(now[i]));
        }
        squares.of_logit += most[0] * most[0];
        squares.of_x += most[1] * most[1];
        of_heads[at / rows] += most[2];
    }
    let root = |squares: f64, elements: usize| (squares / (heads * elements) as f64).sqrt();
    NearPoles {
        of_logit: root(squares.of_logit, rows),
        of_x: root(squares.of_x, rows * dim),
        // Each row in the class that it moves.
        of_w: root(squares.of_x, classes * dim),
        // All rows of a head to the same side, as where every cosine is 1.
        of_scale: root(of_heads.iter().map(|sum| sum * sum).sum(), rows),
    }
}

/// Whether what a device computes agrees; a result that is called `zeroed` is taken for zeros.
fn check(
    run: &Run,
    problem: &Problem,
    data: &Data,
    truth: &Expected<f64>,
    working: &Expected<f32>,
    zeroed: &str,
) -> Result<(), String> {
    let client = run.client;
    let (heads, rows, dim, _, active) = problem.sizes;
    let (inputs, options) = arguments(run, problem, data);
    let said = |error: protohead::Error| error.to_string();
    let output = forward(client, &inputs, &options).map_err(said)?;
    output.read_total(client).map_err(said)?;
    let scale = f64::from(problem.scale.abs());
    let share = Share::under(problem.reduction, rows);
    // A logit is off by 2 · scale · the roundoff of unit rows at most. How far that takes gradients the same roundings say, in f64;
    // between two of them that fall to either side lies one roundoff.
    let kept = run.kept(problem.dtype);
    let cosine = match kept > 0.0 {
        true => rounded::cosine(problem),
        false => problem.cosine(),
    };
    // In `rounded` unit rows are rounded as on the device, but for elements that lie between two numbers.
    let [logits_off, gradients_off] = [2.0 * kept, 2.0 * kept / dim as f64]
        .map(|off| near_poles(problem, data, &truth.logits, &cosine, 4e-7 + off, kept));
    let narrow = |gradients: reference::Gradients<f64>| {
        let of = |values: Vec<f64>| values.into_iter().map(|v| v as f32).collect();
        reference::Gradients::<f32> {
            embeddings: of(gradients.embeddings),
            weights: of(gradients.weights),
            scale: of(gradients.scale),
        }
    };
    let rounded = (kept > 0.0).then(|| {
        let of_loss = reference::Upstream::Loss(wide(&data.upstream));
        let of_total = reference::Upstream::Total(0.7);
        [of_total, of_loss].map(|upstream| narrow(gradients(problem, data, &upstream)))
    });
    let [of_total, of_loss] = match &rounded {
        Some([of_total, of_loss]) => [of_total, of_loss],
        None => [&working.of_total, &working.of_loss],
    };
    let (of_x, of_w) = (lengths(&data.embeddings, dim), lengths(&data.weights, dim));
    let float =
        |name: &str, tensor: &TensorHandle, truth: &[f64], working: &[f32], dtype, magnitude| {
            let mut ours = download(client, tensor);
            if name == zeroed {
                ours.fill(0.0);
            }
            Comparison {
                name,
                ours: &ours,
                truth,
                working,
                dtype,
                magnitude,
                kept: match name {
                    "dX" | "dX at once" => run.unit_rows() + gradients_off.of_x,
                    "dW" | "dW at once" => run.unit_rows() + gradients_off.of_w,
                    "ds" | "ds at once" => kept + run.unit_rows() + gradients_off.of_scale,
                    _ => 2.0 * kept + logits_off.of_logit,
                },
                rounded: match name {
                    "dX" | "dX at once" | "dW" | "dW at once" => kept,
                    _ => 0.0,
                },
                lengths: match name {
                    "dX" | "dX at once" => &of_x,
                    "dW" | "dW at once" => &of_w,
                    _ => &[],
                },
            }
            .check()
        };
    let full = Dtype::F32;
    let (t, w) = (&truth.forward, &working.forward);
    float(
        "loss",
        &output.loss,
        &t.loss,
        &w.loss,
        full,
        scale * share.of_loss,
    )?;
    let total_size = scale * share.of_total * heads as f64;
    float(
        "total",
        &output.total,
        &[t.total],
        &[w.total],
        full,
        total_size,
    )?;
    float("lse", &output.lse, &t.lse, &w.lse, full, scale)?;
    let predicts = |output: &LossOutput| {
        let predictions = output.read_predictions(client).map_err(said)?;
        for (at, &class) in predictions.iter().enumerate() {
            let row = &truth.logits[at * active..][..active];
            let best = row.iter().copied().fold(f64::MIN, f64::max);
            let close = best - (1e-5 + 4.0 * kept) * scale;
            if class as usize >= active || row[class as usize] < close {
                return Err(format!(
                    "prediction {at} is {class}, expected {}",
                    t.predictions[at]
                ));
            }
        }
        Ok(())
    };
    predicts(&output)?;
    let unlabelled = predictions(client, &inputs.embeddings, &inputs.weights, &options);
    let unlabelled = client.read_one(unlabelled.map_err(said)?.handle);
    let unlabelled = unlabelled.map_err(|error| format!("{error:?}"))?;
    if u32::from_bytes(&unlabelled) != output.read_predictions(client).map_err(said)? {
        return Err("predictions are others without labels".into());
    }

    // An element of a gradient, times its row's length, is a sum of logit gradients, each up to scale · upstream.
    let size = |other: usize| 2.0 * scale * share.of_row * (other as f64).sqrt();
    let (x_size, w_size) = (size(1), size(rows));
    // The scale's is one of logit gradients times cosines, over all rows; logits, and so their gradients, are off in proportion to it.
    let s_size = w_size;
    let loss_gradient = client.create_from_slice(CubeElement::as_bytes(&data.upstream[..]));
    let loss_gradient = TensorHandle::new_contiguous(
        output.loss.shape().to_vec(),
        loss_gradient,
        Dtype::F32.elem(),
    );
    let first = problem.seed % 3;
    for (turn, upstream, truth, working) in [
        (first, Upstream::Total(0.7), &truth.of_total, of_total),
        (
            first + 1,
            Upstream::Loss(loss_gradient),
            &truth.of_loss,
            of_loss,
        ),
    ] {
        let all =
            backward(client, &inputs, &options, &output, &upstream, Wanted::ALL).map_err(said)?;
        let [dx, dw, ds] = all_three(all)?;
        let (x, w) = (truth, working);
        float(
            "dX",
            &dx,
            &x.embeddings,
            &w.embeddings,
            problem.dtype,
            x_size,
        )?;
        float("dW", &dw, &x.weights, &w.weights, problem.dtype, w_size)?;
        float("ds", &ds, &x.scale, &w.scale, full, s_size)?;
        // A frozen operand changes nothing for the other, and a second backward gives the same bits.
        let only =
            |wanted| backward(client, &inputs, &options, &output, &upstream, wanted).map_err(said);
        same_alone(client, [&dx, &dw, &ds], turn, only)?;
    }
    // Both in one call: the same within rounding, and the same bits with an operand frozen or in another run.
    let together = |wanted| {
        forward_backward(client, &inputs, &options, &Upstream::Total(0.7), wanted).map_err(said)
    };
    let (output, all) = together(Wanted::ALL)?;
    predicts(&output)?;
    let (loss, total) = (&output.loss, &output.total);
    float("loss", loss, &t.loss, &w.loss, full, scale * share.of_loss)?;
    float("total", total, &[t.total], &[w.total], full, total_size)?;
    float("lse", &output.lse, &t.lse, &w.lse, full, scale)?;
    let [dx, dw, ds] = all_three(all)?;
    let (x, w) = (&truth.of_total, of_total);
    let dtype = problem.dtype;
    float(
        "dX at once",
        &dx,
        &x.embeddings,
        &w.embeddings,
        dtype,
        x_size,
    )?;
    float("dW at once", &dw, &x.weights, &w.weights, dtype, w_size)?;
    float("ds at once", &ds, &x.scale, &w.scale, full, s_size)?;
    if problem.dtype == Dtype::F32 {
        // Factors that come later.
        let factors: Vec<f32> = (0..heads).map(|head| (head % 5) as f32 - 3.0).collect();
        let gradients = Gradients {
            embeddings: Some(dx.clone()),
            weights: Some(dw.clone()),
            scale: Some(ds.clone()),
        };
        let by_head = f32s(client, &factors, &[heads]);
        let scaled = all_three(gradients.scaled(client, &by_head).map_err(said)?)?;
        let [dx, dw, ds] = &scaled;
        for (name, scaled, truth, working, size) in [
            ("dX", dx, &x.embeddings, &w.embeddings, x_size),
            ("dW", dw, &x.weights, &w.weights, w_size),
            ("ds", ds, &x.scale, &w.scale, s_size),
        ] {
            let factor = |at: usize| factors[at / (truth.len() / heads)];
            let truth = truth.iter().enumerate();
            let truth: Vec<f64> = truth.map(|(at, v)| v * f64::from(factor(at))).collect();
            let working = working.iter().enumerate();
            let working: Vec<f32> = working.map(|(at, v)| v * factor(at)).collect();
            float(name, scaled, &truth, &working, full, 3.0 * size)?;
        }
    }
    let alone = |wanted| Ok(together(wanted)?.1);
    same_alone(client, [&dx, &dw, &ds], first + 2, alone)?;

    let (again, _) = arguments(run, problem, data);
    let bits = |tensor| -> Vec<u64> {
        let values = download(client, tensor);
        values.into_iter().map(f64::to_bits).collect()
    };
    if bits(&inputs.embeddings) != bits(&again.embeddings)
        || bits(&inputs.weights) != bits(&again.weights)
    {
        return Err("the operands were modified".into());
    }
    Ok(())
}

fn agrees(problem: &Problem) -> Result<(), TestCaseError> {
    agrees_on(problem, fused_runs(problem.sizes))
}

fn agrees_on(problem: &Problem, runs: Vec<Run>) -> Result<(), TestCaseError> {
    let data = problem.data();
    let truth = expected::<f64>(problem, &data);
    let working = expected::<f32>(problem, &data);
    for run in runs {
        if problem.supported(run.client) {
            check(&run, problem, &data, &truth, &working, "").map_err(fails(&run))?;
            say_agreed("cosine_cross_entropy", &run, problem.dtype);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(config(24))]

    #[test]
    fn the_fused_op_agrees_with_the_reference(problem in problem()) {
        agrees(&problem)?;
    }
}

/// Both gradients from a backward pass, and from one call with the loss.
fn apart_and_at_once(
    run: &Run,
    inputs: &Inputs,
    options: &Options,
    upstream: &Upstream,
) -> [Gradients; 2] {
    [false, true].map(|at_once| step(run.client, inputs, options, upstream, at_once).1)
}
