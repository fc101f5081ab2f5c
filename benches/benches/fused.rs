//! The fused op at the named shapes: `cargo bench -p protohead-benches`.

use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use protohead::Upstream;
use protohead::cosine_cross_entropy::{Options, backward, forward};
use protohead_benches::SHAPES;

/// Forward alone, and forward with both gradients; fresh inputs for every iteration, results waited for.
fn fused(criterion: &mut Criterion) {
    let device = cubecl::Device::cuda(0)
        .or_else(|_| cubecl::Device::cpu())
        .expect("a device");
    let client = device.client();
    for (group_name, with_backward) in [
        ("cosine_cross_entropy_forward", false),
        ("cosine_cross_entropy", true),
    ] {
        let mut group = criterion.benchmark_group(group_name);
        group.sample_size(10);
        for shape in SHAPES {
            group.throughput(Throughput::Elements(if with_backward {
                shape.flops()
            } else {
                shape.flops() / 3
            }));
            let options = Options {
                active: Some(shape.active),
                ..Options::default()
            };
            group.bench_function(format!("{}/protohead", shape.name), |bencher| {
                bencher.iter_custom(|iterations| {
                    let mut spent = Duration::ZERO;
                    for iteration in 0..iterations {
                        let inputs = shape.inputs(&client, iteration);
                        let start = Instant::now();
                        let output = forward(&client, &inputs, &options).expect("valid");
                        if with_backward {
                            let upstream = Upstream::default();
                            let gradients = backward(
                                &client, &inputs, &options, &output, &upstream, true, true,
                            )
                            .expect("valid");
                            for gradient in [gradients.embeddings, gradients.weights] {
                                let gradient = gradient.expect("asked for");
                                client.read_one(gradient.handle).expect("the device works");
                            }
                        }
                        output.read_total(&client).expect("labels are valid");
                        spent += start.elapsed();
                    }
                    spent
                });
            });
        }
        group.finish();
    }
}

criterion_group!(benches, fused);
criterion_main!(benches);
