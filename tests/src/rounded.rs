//! The fused op's gradients with the roundings of the cmma variant, in f64 otherwise: unit rows are rounded to the operands' dtype,
//! and so are the logit gradients, relative to the largest of their head.

use half::{bf16, f16};
use protohead_reference as reference;

use crate::problem::{Data, Dtype, Problem, wide};

/// How cosines of rounded unit rows become logits.
pub fn cosine(problem: &Problem) -> reference::Cosine<f64> {
    let mut cosine = problem.cosine::<f64>();
    cosine.margin.sine = match problem.dtype {
        Dtype::F32 => reference::SINE,
        Dtype::F16 => 1.0 / 32.0,
        Dtype::Bf16 => 1.0 / 16.0,
    };
    cosine
}

/// Of a number up to 1; f16's exponents are used from the top.
fn rounded(dtype: Dtype, value: f64) -> f64 {
    match dtype {
        Dtype::F32 => value,
        Dtype::F16 => f16::from_f64(value * 1024.0).to_f64() / 1024.0,
        Dtype::Bf16 => bf16::from_f64(value).to_f64(),
    }
}

/// `a [heads, m, dim] · b [heads, n, dim]ᵀ`, of the first `n` of `stored` rows.
fn products(a: &[f64], b: &[f64], [heads, m, n, stored, dim]: [usize; 5]) -> Vec<f64> {
    let mut out = Vec::with_capacity(heads * m * n);
    for head in 0..heads {
        for row in a[head * m * dim..][..m * dim].chunks_exact(dim) {
            for other in b[head * stored * dim..][..n * dim].chunks_exact(dim) {
                out.push(row.iter().zip(other).map(|(x, y)| x * y).sum());
            }
        }
    }
    out
}

/// The gradients of a problem, as the cmma variant rounds.
pub fn gradients(
    problem: &Problem,
    data: &Data,
    upstream: &reference::Upstream<f64>,
) -> reference::Gradients<f64> {
    let (heads, rows, dim, stored, active) = problem.sizes;
    let scale = f64::from(problem.scale);
    let round = |values: &[f64]| -> Vec<f64> {
        let each = values.iter().map(|&value| rounded(problem.dtype, value));
        each.collect()
    };
    let x = reference::normalize(&wide(&data.embeddings), dim);
    let w = reference::normalize(&wide(&data.weights), dim);
    let (unit_x, unit_w) = (round(&x.unit), round(&w.unit));
    let cosines = products(&unit_x, &unit_w, [heads, rows, active, stored, dim]);
    let logits: Vec<f64> = cosines.iter().map(|cosine| scale * cosine).collect();
    let sizes = problem.reference_sizes();
    let options = problem.reference_options(data);
    let (cosine, labels) = (cosine(problem), &data.labels);
    let (seen, slopes) = cosine.with_margin(&logits, labels, sizes, &options);
    let mut g = reference::cross_entropy_backward(&seen, labels, sizes, &options, upstream);
    // What a margin makes of a cosine, beside its slope times that: of the scale's gradient that is not rounded.
    let slope = |at: usize| match seen[at] == logits[at] {
        true => 1.0,
        false => slopes[at / active],
    };
    let of_margin = |at: usize| g[at] * (seen[at] - slope(at) * logits[at]) / scale;
    let by_head = |head: usize| head * rows * active..(head + 1) * rows * active;
    let mut ds: Vec<f64> = (0..heads)
        .map(|head| by_head(head).map(of_margin).sum())
        .collect();
    reference::Cosine::through_margin(&mut g, &slopes, labels, sizes, &options);
    let mut dx = vec![0.0; heads * rows * dim];
    let mut dw = vec![0.0; heads * stored * dim];
    for (head, g) in g.chunks_exact_mut(rows * active).enumerate() {
        let largest = g.iter().fold(f64::MIN_POSITIVE, |m, v| m.max(v.abs()));
        for (at, g) in g.iter_mut().enumerate() {
            *g = rounded(problem.dtype, *g / largest) * largest * scale;
            let row = (head * rows + at / active) * dim;
            let class = (head * stored + at % active) * dim;
            for d in 0..dim {
                dx[row + d] += *g * unit_w[class + d];
                dw[class + d] += *g * unit_x[row + d];
            }
        }
    }
    for (head, ds) in ds.iter_mut().enumerate() {
        let of_head = head * rows * dim..(head + 1) * rows * dim;
        let along = x.unit[of_head.clone()].iter().zip(&dx[of_head]);
        *ds += along.map(|(x, dx)| x * dx).sum::<f64>() / scale;
    }
    reference::Gradients {
        embeddings: reference::normalize_backward(&x, &dx, dim),
        weights: reference::normalize_backward(&w, &dw, dim),
        scale: ds,
    }
}
