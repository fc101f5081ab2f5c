//! Every gradient of the reference against central differences of its forward pass, in f64.

use protohead_reference::*;

/// Numbers between −1 and 1 that differ from each other; SplitMix64.
fn numbers(count: usize, seed: u64) -> Vec<f64> {
    let mut state = seed;
    (0..count)
        .map(|_| {
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        })
        .collect()
}

/// Compares `gradient` with differences of `f` around `at`. A step of 1e-5 leaves a truncation error of about 1e-10
/// and a rounding error of about 1e-11.
fn check(name: &str, at: &[f64], gradient: &[f64], f: impl Fn(&[f64]) -> f64) {
    assert_eq!(at.len(), gradient.len(), "{name}");
    for i in 0..at.len() {
        let moved = |by: f64| {
            let mut point = at.to_vec();
            point[i] += by;
            f(&point)
        };
        let difference = (moved(1e-5) - moved(-1e-5)) / 2e-5;
        let error = (difference - gradient[i]).abs();
        assert!(
            error < 1e-7 * (1.0 + gradient[i].abs()),
            "{name}[{i}] is {}, differences give {difference}",
            gradient[i]
        );
    }
}

const SIZES: Sizes = Sizes {
    heads: 2,
    rows: 5,
    dim: 3,
    classes: 6,
    active: 4,
};
const LABELS: [i64; 5] = [0, 3, -100, 2, 3];

/// Without a margin, and with either: 1.4 is so much that an angle beyond it passes π.
const COSINES: [Cosine<f64>; 4] = [
    with_margin(0.0, 0.0),
    with_margin(0.5, 0.0),
    with_margin(0.0, 0.35),
    with_margin(1.4, 0.1),
];

const fn with_margin(angular: f64, cosine: f64) -> Cosine<f64> {
    Cosine {
        scale: 5.0,
        margin: Margin {
            angular,
            cosine,
            sine: SINE,
        },
    }
}

fn options(reduction: Reduction) -> LossOptions<f64> {
    LossOptions {
        reduction,
        label_smoothing: 0.2,
        ignore_index: -100,
        head_weights: vec![0.5, 2.0],
    }
}

#[test]
fn gradients_of_the_total_are_its_differences() {
    let x = numbers(30, 1);
    let w = numbers(36, 2);
    let reductions = [Reduction::None, Reduction::Sum, Reduction::Mean];
    for (reduction, cosine) in reductions.into_iter().flat_map(|r| COSINES.map(|c| (r, c))) {
        let options = options(reduction);
        let scaled = |x: &[f64], w: &[f64], scale: f64| {
            let cosine = Cosine { scale, ..cosine };
            cosine_cross_entropy(x, w, &LABELS, SIZES, cosine, &options).total
        };
        let total = |x: &[f64], w: &[f64]| scaled(x, w, cosine.scale);
        let gradients = cosine_cross_entropy_backward(
            &x,
            &w,
            &LABELS,
            SIZES,
            cosine,
            &options,
            &Upstream::Total(1.0),
        );
        check("dX", &x, &gradients.embeddings, |x| total(x, &w));
        check("dW", &w, &gradients.weights, |w| total(&x, w));
        let of_scale = [gradients.scale.iter().sum()];
        check("ds", &[cosine.scale], &of_scale, |s| scaled(&x, &w, s[0]));
    }
}

#[test]
fn gradients_honour_an_upstream_that_differs_by_row() {
    let x = numbers(30, 3);
    let w = numbers(36, 4);
    let options = options(Reduction::None);
    let cosine = COSINES[1];
    let upstream = numbers(10, 5);
    let of_heads = |x: &[f64], w: &[f64], scale: f64| {
        let cosine = Cosine { scale, ..cosine };
        let loss = cosine_cross_entropy(x, w, &LABELS, SIZES, cosine, &options).loss;
        let of_head = |h: usize| (5 * h..5 * (h + 1)).map(|at| loss[at] * upstream[at]).sum();
        [0, 1].map(of_head)
    };
    let objective =
        |x: &[f64], w: &[f64]| -> f64 { of_heads(x, w, cosine.scale).iter().sum::<f64>() };
    let gradients = cosine_cross_entropy_backward(
        &x,
        &w,
        &LABELS,
        SIZES,
        cosine,
        &options,
        &Upstream::Loss(upstream.clone()),
    );
    check("dX", &x, &gradients.embeddings, |x| objective(x, &w));
    check("dW", &w, &gradients.weights, |w| objective(&x, w));
    for (head, of_scale) in gradients.scale.iter().enumerate() {
        check("ds", &[cosine.scale], &[*of_scale], |s| {
            of_heads(&x, &w, s[0])[head]
        });
    }
}

#[test]
fn gradients_of_logits_are_their_differences() {
    let x = numbers(30, 6);
    let w = numbers(36, 7);
    let upstream = numbers(40, 8);
    let scaled = |x: &[f64], w: &[f64], scale: f64| {
        let logits = cosine_logits(x, w, SIZES, scale);
        logits
            .iter()
            .zip(&upstream)
            .map(|(z, u)| z * u)
            .sum::<f64>()
    };
    let objective = |x: &[f64], w: &[f64]| scaled(x, w, 3.0);
    let gradients = cosine_logits_backward(&x, &w, &upstream, SIZES, 3.0);
    check("dX", &x, &gradients.embeddings, |x| objective(x, &w));
    check("dW", &w, &gradients.weights, |w| objective(&x, w));
    let of_scale = [gradients.scale.iter().sum()];
    check("ds", &[3.0], &of_scale, |s| scaled(&x, &w, s[0]));
    assert!(
        gradients.weights[4 * 3..6 * 3].iter().all(|&v| v == 0.0),
        "inactive classes have no gradient"
    );
}

#[test]
fn gradients_of_the_reconstruction_are_its_differences() {
    let [whole, first, second] = [9, 10, 11].map(|seed| numbers(12, seed));
    let (of_whole, of_part) = reconstruction_backward(&whole, &first, &second, 4, 1.0);
    check("d whole", &whole, &of_whole, |v| {
        reconstruction(v, &first, &second, 4).loss
    });
    check("d first", &first, &of_part, |v| {
        reconstruction(&whole, v, &second, 4).loss
    });
    check("d second", &second, &of_part, |v| {
        reconstruction(&whole, &first, v, 4).loss
    });
}

#[test]
fn below_the_clamp_the_norm_is_a_constant() {
    let x = [3e-13, -4e-13];
    let normalized = normalize(&x, 2);
    assert!(normalized.clamped[0]);
    assert_eq!(
        normalize_backward(&normalized, &[1.0, 2.0], 2),
        [1e12, 2e12]
    );
}

#[test]
fn a_margin_takes_from_a_cosine_what_its_formula_says() {
    let margin = Margin {
        angular: 0.5,
        cosine: 0.2,
        sine: SINE,
    };
    let at = |angle: f64| margin.of(angle.cos());
    for step in 0..=200 {
        let angle = f64::from(step) * std::f64::consts::PI / 200.0;
        let (counts_as, slope) = at(angle);
        let expected = match angle + 0.5 <= std::f64::consts::PI {
            true => (angle + 0.5).cos() - 0.2,
            false => angle.cos() - 0.5 * 0.5f64.sin() - 0.2,
        };
        assert!((counts_as - expected).abs() < 1e-12, "{angle}: {counts_as}");
        assert!(counts_as < angle.cos() && slope > 0.0, "{angle}: {slope}");
    }
    let (counts_as, slope) = at(0.0);
    assert!(slope.is_finite() && (counts_as - (0.5f64.cos() - 0.2)).abs() < 1e-15);
}

#[test]
fn a_margin_changes_the_loss_of_rows_that_count_and_no_prediction() {
    let (x, w) = (numbers(30, 1), numbers(36, 2));
    let options = LossOptions {
        label_smoothing: 0.0,
        ..options(Reduction::None)
    };
    let of = |cosine| cosine_cross_entropy(&x, &w, &LABELS, SIZES, cosine, &options);
    let plain = of(COSINES[0]);
    for cosine in &COSINES[1..] {
        let with = of(*cosine);
        assert_eq!(with.predictions, plain.predictions);
        for (at, (with, plain)) in with.loss.iter().zip(&plain.loss).enumerate() {
            match LABELS[at % 5] {
                -100 => assert_eq!((*with, *plain), (0.0, 0.0)),
                _ => assert!(with > plain, "{with} for {plain}"),
            }
        }
    }
}
