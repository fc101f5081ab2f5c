//! `protohead devices`

use protohead::Strategy;

use crate::device::DeviceName;
use crate::error::Error;
use crate::output::say;

pub(crate) fn run() -> Result<(), Error> {
    for name in [DeviceName::Cpu, DeviceName::Cuda(0), DeviceName::Wgpu] {
        match name.client() {
            Ok(client) => {
                let variant = Strategy::Inferred.check(&client)?;
                say(format_args!("{name}: works, runs the {variant:?} variants"));
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
