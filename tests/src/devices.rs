//! The devices that this build and machine can reach, and the variants that each can run.

use std::collections::BTreeSet;
use std::sync::{Mutex, OnceLock};

use cubecl::client::Client;
use protohead::{Strategy, Variant};

use crate::nvidia;
use crate::problem::Dtype;

/// Every variant.
pub const VARIANTS: [Variant; 5] = [
    Variant::Unit,
    Variant::Plane,
    Variant::Cmma,
    Variant::Wgmma,
    Variant::Small,
];

/// A device under test.
pub struct Tested {
    /// How messages name it.
    pub name: &'static str,
    /// Its client.
    pub client: Client,
    /// The variants that it runs.
    pub variants: Vec<Variant>,
}

impl Tested {
    /// Whether it is none of the machine's.
    pub fn is_emulated(&self) -> bool {
        EMULATED.iter().any(|(name, _)| *name == self.name)
    }
}

/// One way to run an op.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    /// The device's name.
    pub device: &'static str,
    /// Its client.
    pub client: &'a Client,
    /// The variant, forced.
    pub strategy: Strategy,
}

impl std::fmt::Display for Run<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:?}", self.device, self.strategy)
    }
}

/// Architectures of NVIDIA GPUs that are emulated where they are asked for.
const EMULATED: [(&str, u32); 3] = [("sm_80", 80), ("sm_90", 90), ("sm_100", 100)];

/// Every device, or the ones that `PROTOHEAD_DEVICES` names (`cpu,cuda`; `sm_90` is one that is emulated); found once, and said once on
/// stderr with its variants.
pub fn devices() -> &'static [Tested] {
    static DEVICES: OnceLock<Vec<Tested>> = OnceLock::new();
    DEVICES.get_or_init(|| {
        let mut found = Vec::new();
        let reach = [
            ("cpu", cubecl::Device::cpu as fn() -> _),
            ("wgpu", || cubecl::Device::wgpu(Default::default())),
            ("cuda", || cubecl::Device::cuda(0)),
        ];
        let wanted = std::env::var("PROTOHEAD_DEVICES").ok();
        for name in wanted.iter().flat_map(|wanted| wanted.split(',')) {
            let emulated = EMULATED.iter().find(|(known, _)| *known == name);
            assert!(
                emulated.is_some() || reach.iter().any(|(known, _)| *known == name),
                "PROTOHEAD_DEVICES: {name} is none of cpu, wgpu, cuda, sm_80, sm_90, sm_100"
            );
            if let Some((name, arch)) = emulated {
                found.push(tested(name, nvidia::emulated(*arch)));
            }
        }
        for (name, device) in reach {
            if let Some(wanted) = &wanted
                && !wanted.split(',').any(|wanted| wanted == name)
            {
                continue;
            }
            match device() {
                Ok(device) => match std::panic::catch_unwind(|| device.client()) {
                    Ok(client) => found.push(tested(name, client)),
                    Err(_) => tell(format_args!("no {name} device on this machine")),
                },
                Err(error) => tell(format_args!("{name} is not reachable: {error:?}")),
            }
        }
        assert!(!found.is_empty(), "no device to test on");
        // A build without wgpu has no software GPU.
        let has_all = cfg!(feature = "wgpu") && std::env::var_os("CI").is_some();
        for variant in VARIANTS {
            let is_reached = found.iter().any(|d| d.variants.contains(&variant));
            assert!(
                is_reached || !has_all || variant == Variant::Wgmma, // no software GPU has it
                "no device for {variant:?}: scripts/setup.sh --tests should have installed a software GPU"
            );
        }
        for device in &found {
            let has = |dtype: &Dtype| device.client.properties().supports_type(dtype.elem());
            let dtypes = [Dtype::F32, Dtype::F16, Dtype::Bf16].map(|d| has(&d).then_some(d));
            let dtypes: Vec<Dtype> = dtypes.into_iter().flatten().collect();
            let Tested { name, variants, .. } = device;
            tell(format_args!("{name} runs {variants:?} in {dtypes:?}"));
        }
        found
    })
}

/// A line on stderr whether or not the test that comes first fails: the harness captures what tests print, but not this.
fn tell(line: std::fmt::Arguments) {
    use std::io::Write;
    // Nobody may be listening.
    let _ = writeln!(std::io::stderr(), "protohead tests: {line}");
}

fn tested(name: &'static str, client: Client) -> Tested {
    let variants = VARIANTS
        .into_iter()
        .filter(|&variant| {
            let dtype = Dtype::F32.elem();
            Strategy::Forced(variant).variant(&client, dtype).is_ok()
        })
        .collect();
    Tested {
        name,
        client,
        variants,
    }
}

/// Says on stderr, the first time, that an op agreed with the reference.
pub fn say_agreed(op: &'static str, run: &Run, dtype: Dtype) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let line = format!("{op} of {dtype:?} agrees on {run}");
    if let Ok(mut said) = SAID.lock()
        && said.insert(line.clone())
    {
        tell(format_args!("{line}"));
    }
}

/// Every variant of every device, for ops without a product.
pub fn runs() -> Vec<Run<'static>> {
    let mut runs = product_runs();
    let of_products = [Variant::Cmma, Variant::Wgmma].map(Strategy::Forced);
    runs.retain(|run| !of_products.contains(&run.strategy));
    runs
}

/// Every variant of every device, for ops with a product.
pub fn product_runs() -> Vec<Run<'static>> {
    let mut runs = all_runs();
    runs.retain(|run| run.strategy != Strategy::Forced(Variant::Small));
    runs
}

/// Every variant of every device for the fused op of (heads, rows, dim, classes, active classes): the small one only if they are,
/// however few columns a vector has.
pub fn fused_runs(sizes: (usize, usize, usize, usize, usize)) -> Vec<Run<'static>> {
    let (heads, rows, dim, _, active) = sizes;
    let small =
        rows <= 4096 && active <= 256 && dim <= 256 && heads * rows * active * dim <= 1 << 23;
    let mut runs = all_runs();
    runs.retain(|run| small || run.strategy != Strategy::Forced(Variant::Small));
    runs
}

/// Every variant of every device, for the fused op of a problem that is small.
pub fn all_runs() -> Vec<Run<'static>> {
    devices()
        .iter()
        .flat_map(|device| {
            device.variants.iter().map(|&variant| Run {
                device: device.name,
                client: &device.client,
                strategy: Strategy::Forced(variant),
            })
        })
        .collect()
}

impl Run<'_> {
    /// How far the square of a unit row's length may be off, which a gradient through the normalization has as a factor of what it
    /// takes away. IEEE's norm, inverse and product are off by half a unit in the last place (6e-8) each; WGSL's square root and
    /// division may be off by 2.5.
    pub fn unit_rows(&self) -> f64 {
        let units = if self.device == "wgpu" { 5.5 } else { 1.5 };
        2.0 * units * 6e-8
    }

    /// The unit roundoff of what the variant keeps between products: unit rows and logit gradients, which what runs on tensor
    /// cores rounds to the operands' dtype.
    pub fn kept(&self, dtype: Dtype) -> f64 {
        let rounds = [Variant::Cmma, Variant::Wgmma].map(Strategy::Forced);
        match dtype {
            _ if !rounds.contains(&self.strategy) => 0.0,
            Dtype::F32 => 0.0,
            Dtype::F16 => f64::from(half::f16::EPSILON) / 2.0,
            Dtype::Bf16 => f64::from(half::bf16::EPSILON) / 2.0,
        }
    }
}
