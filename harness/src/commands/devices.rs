//! `protohead devices`

use cubecl::ir::{ElemType, FloatKind};
use protohead::Strategy;

use crate::device::DeviceName;
use crate::error::Error;
use crate::output::say;

pub(crate) fn run() -> Result<(), Error> {
    for name in [DeviceName::Cpu, DeviceName::Cuda(0), DeviceName::Wgpu] {
        match name.client() {
            Ok(client) => {
                let kinds = [FloatKind::F32, FloatKind::F16, FloatKind::BF16];
                let variants = kinds.map(ElemType::Float).into_iter().filter_map(|dtype| {
                    let variant = Strategy::Inferred.variant(&client, dtype).ok()?;
                    let has = client.properties().supports_type(dtype);
                    has.then(|| format!("{dtype} {variant:?}").to_lowercase())
                });
                let variants: Vec<String> = variants.collect();
                say(format_args!(
                    "{name}: works; large products: {}",
                    variants.join(", ")
                ));
            }
            Err(Error::Device { reason, .. }) => {
                let line = reason.lines().next().unwrap_or_default().to_owned();
                say(format_args!("{name}: {line}"));
            }
            Err(error) => return Err(error),
        }
    }
    let auto = DeviceName::first_that_works();
    say(format_args!(
        "auto: {}",
        auto.map_or("none works".into(), |name| name.to_string())
    ));
    Ok(())
}
