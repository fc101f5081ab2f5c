//! A problem as arguments of the fused op.

use protohead::cosine_cross_entropy::{Inputs, Options};

use crate::devices::Run;
use crate::problem::{Data, Problem};

/// Operands on the device, and options.
pub fn arguments(run: &Run, problem: &Problem, data: &Data) -> (Inputs, Options) {
    let client = run.client;
    let (heads, rows, dim, classes, active) = problem.sizes;
    let inputs = Inputs {
        embeddings: problem.upload(client, &data.embeddings, &[heads, rows, dim]),
        weights: problem.upload(client, &data.weights, &[heads, classes, dim]),
        labels: problem.upload_labels(client, &data.labels),
    };
    let options = Options {
        scale: problem.scale,
        active: Some(active),
        allow_tf32: false,
        margin: problem.margin(),
        loss: problem.options(data),
        strategy: run.strategy,
    };
    (inputs, options)
}
