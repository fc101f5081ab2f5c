//! Device names: `auto`, `cpu`, `cuda`, `cuda:N`, `wgpu`.

use std::panic;
use std::str::FromStr;

use burn::tensor::Device;
use cubecl::client::Client;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::training::network::Devices;

/// A device as the user names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) enum DeviceName {
    Auto,
    Cpu,
    Cuda(usize),
    Wgpu,
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            "wgpu" => Ok(Self::Wgpu),
            other => other
                .strip_prefix("cuda:")
                .and_then(|index| index.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| "expected auto, cpu, cuda, cuda:N or wgpu".into()),
        }
    }
}

impl TryFrom<String> for DeviceName {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        name.parse()
    }
}

impl From<DeviceName> for String {
    fn from(name: DeviceName) -> Self {
        name.to_string()
    }
}

impl std::fmt::Display for DeviceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
            Self::Wgpu => f.write_str("wgpu"),
        }
    }
}

impl DeviceName {
    fn is_in_build(self) -> bool {
        match self {
            Self::Auto => true,
            Self::Cpu => cfg!(feature = "cpu"),
            Self::Cuda(_) => cfg!(feature = "cuda"),
            Self::Wgpu => cfg!(feature = "wgpu"),
        }
    }

    /// What `auto` stands for: the first device of the build that works, CUDA before the CPU.
    pub(crate) fn first_that_works() -> Option<Self> {
        [Self::Cuda(0), Self::Cpu, Self::Wgpu]
            .into_iter()
            .find(|name| name.client().is_ok())
    }

    /// The name itself, or that of the device which `auto` stands for.
    pub(crate) fn resolve(self) -> Self {
        match self {
            // Where none works, the CPU says why.
            Self::Auto => Self::first_that_works().unwrap_or(Self::Cpu),
            named => named,
        }
    }

    /// Where to train: on a GPU everything stays there; beside the CPU's heads the encoder runs on Burn's flex
    /// backend, whose convolutions are faster there.
    pub(crate) fn training_devices(self) -> Result<Devices, Error> {
        let named = self.resolve();
        named.client()?;
        let heads = match named {
            #[cfg(feature = "cpu")]
            Self::Auto | Self::Cpu => Device::cpu(),
            #[cfg(feature = "cuda")]
            Self::Cuda(index) => Device::cuda(index),
            #[cfg(feature = "wgpu")]
            Self::Wgpu => Device::wgpu(burn::tensor::DeviceKind::DefaultDevice),
            #[allow(unreachable_patterns)] // where all of them are in the build
            _ => {
                return Err(Error::Device {
                    name: named.to_string(),
                    reason: "not in this build".into(),
                });
            }
        };
        let encoder = match named {
            Self::Auto | Self::Cpu => Device::flex(),
            Self::Cuda(_) | Self::Wgpu => heads.clone(),
        };
        Ok(Devices {
            encoder: encoder.autodiff(),
            heads: heads.autodiff(),
        })
    }

    /// A client, once the device has shown that it works.
    pub(crate) fn client(self) -> Result<Client, Error> {
        let named = self.resolve();
        let failed = |reason: String| Error::Device {
            name: named.to_string(),
            reason,
        };
        if !named.is_in_build() {
            return Err(failed("not in this build".into()));
        }
        let device = match named {
            Self::Auto | Self::Cpu => cubecl::Device::cpu(),
            Self::Cuda(index) => cubecl::Device::cuda(index),
            Self::Wgpu => cubecl::Device::wgpu(Default::default()),
        }
        .map_err(|error| failed(format!("{error}")))?;
        quietly(|| {
            let client = device.client();
            let probe = client.create_from_slice(&[1, 2, 3, 4]);
            client.read_one(probe).map(|_| client)
        })
        .ok_or_else(|| failed("not on this machine".into()))?
        .map_err(|error| failed(format!("{error:?}")))
    }
}

/// Runs what panics where a driver is missing, without the panic's message.
fn quietly<T>(action: impl FnOnce() -> T) -> Option<T> {
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|_| {}));
    let result = panic::catch_unwind(panic::AssertUnwindSafe(action));
    panic::set_hook(hook);
    result.ok()
}
