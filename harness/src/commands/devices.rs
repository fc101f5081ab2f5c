//! `protohead devices`

use protohead::{Strategy, Variant};

use crate::device::DeviceName;
use crate::error::Error;
use crate::output::say;

pub(crate) fn run() -> Result<(), Error> {
    for name in [DeviceName::Cpu, DeviceName::Cuda(0), DeviceName::Wgpu] {
        match name.client() {
            Ok(client) => {
                let variants = [Variant::Unit, Variant::Plane, Variant::Small, Variant::Cmma]
                    .into_iter()
                    .filter(|&variant| Strategy::Forced(variant).check(&client).is_ok())
                    .map(|variant| format!("{variant:?}").to_lowercase());
                let variants: Vec<String> = variants.collect();
                say(format_args!(
                    "{name}: works; variants {}",
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
    say(format_args!("auto: {}", DeviceName::Auto.resolve()));
    Ok(())
}
