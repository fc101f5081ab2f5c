//! Every op at every shape beside its peers: `cargo bench`, or `cargo bench -- 'cosine_cross_entropy/mid'` for some.

use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{
    BenchmarkGroup, Criterion, SamplingMode, Throughput, criterion_group, criterion_main,
};
use protohead_benches::{Case, Group, Who, ceiling};

fn measure(
    group: &mut BenchmarkGroup<WallTime>,
    id: &str,
    throughput: Throughput,
    mut once: impl FnMut(u64) -> Duration,
) {
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
    group.warm_up_time(Duration::from_millis(500));
    group.measurement_time(Duration::from_secs(3));
    group.throughput(throughput);
    let mut seed = 0;
    group.bench_function(id, |bencher| {
        bencher.iter_custom(|iterations| {
            let mut spent = Duration::ZERO;
            for _ in 0..iterations {
                seed += 1;
                spent += once(seed);
            }
            spent
        });
    });
}

fn ceilings(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("ceiling");
    let flops = Throughput::Elements(ceiling::flops());
    measure(&mut group, "fma", flops, |_| ceiling::multiply_adds());
    let bytes = Throughput::Bytes(ceiling::bytes());
    measure(&mut group, "copy", bytes, |_| ceiling::copy());
    group.finish();
}

/// Burn's ops last, and of these the products: what its matmul leaves behind on CubeCL's CPU runtime makes every launch that waits for
/// another slow, in the whole process.
fn heads(criterion: &mut Criterion) {
    let (burn, others): (Vec<Case>, Vec<Case>) = Case::all()
        .into_iter()
        .partition(|case| case.who == Who::Burn);
    let (products, plain): (Vec<Case>, Vec<Case>) =
        burn.into_iter().partition(|case| case.group.has_product());
    for cases in [others, plain, products] {
        measure_all(criterion, &cases);
    }
}

fn measure_all(criterion: &mut Criterion, cases: &[Case]) {
    for group in Group::ALL {
        let mut bench = criterion.benchmark_group(group.name());
        for case in cases.iter().filter(|case| case.group == group) {
            let id = format!("{}/{}", case.shape.name, case.who.name());
            let throughput = match (group.flops(&case.shape), group.bytes(&case.shape)) {
                (Some(flops), _) => Throughput::Elements(flops),
                (None, bytes) => Throughput::Bytes(bytes.unwrap_or_default()),
            };
            let mut checked = false;
            measure(&mut bench, &id, throughput, |seed| {
                if !std::mem::replace(&mut checked, true) {
                    case.check();
                }
                case.run(seed, false).time
            });
        }
        bench.finish();
    }
}

criterion_group!(benches, ceilings, heads);
criterion_main!(benches);
