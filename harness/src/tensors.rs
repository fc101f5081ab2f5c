//! Tensors in safetensors files: read whole and checked.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use cubecl::client::Client;
use cubecl::ir::{ElemType, FloatKind, IntKind};
use cubecl::prelude::CubeElement;
use cubecl::std::tensor::TensorHandle;
use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::error::Error;
use crate::files::write_atomically;
use crate::output::complain;

/// The tensors of a file.
pub(crate) struct TensorFile {
    path: PathBuf,
    bytes: Vec<u8>,
}

impl TensorFile {
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let bytes = fs::read(path).map_err(Error::io(path))?;
        let file = Self {
            path: path.into(),
            bytes,
        };
        file.parse()?;
        Ok(file)
    }

    fn parse(&self) -> Result<SafeTensors<'_>, Error> {
        SafeTensors::deserialize(&self.bytes).map_err(|error| Error::Format {
            path: self.path.clone(),
            reason: error.to_string(),
        })
    }

    fn wrong(&self, reason: String) -> Error {
        Error::Content {
            path: self.path.clone(),
            reason,
        }
    }

    fn view(&self, name: &str) -> Result<TensorView<'_>, Error> {
        let tensors = self.parse()?;
        tensors.tensor(name).map_err(|_| {
            let mut names = tensors.names();
            names.sort_unstable();
            self.wrong(format!(
                "no tensor `{name}` (there are: {})",
                names.join(", ")
            ))
        })
    }

    /// A float tensor on the device, after every value was seen to be finite.
    pub(crate) fn floats(&self, client: &Client, name: &str) -> Result<TensorHandle, Error> {
        let view = self.view(name)?;
        let data = view.data();
        let kind = match view.dtype() {
            Dtype::F32 => FloatKind::F32,
            Dtype::F16 => FloatKind::F16,
            Dtype::BF16 => FloatKind::BF16,
            other => {
                return Err(self.wrong(format!("`{name}` is {other:?}, expected F32, F16 or BF16")));
            }
        };
        if let Some(mut at) = not_finite(view.dtype(), data) {
            let mut index = vec![0; view.shape().len()];
            for (axis, &length) in view.shape().iter().enumerate().rev() {
                index[axis] = at % length;
                at /= length;
            }
            return Err(self.wrong(format!("`{name}` is not finite at {index:?}")));
        }
        if data.is_empty() {
            return Err(self.wrong(format!(
                "`{name}` is empty, its shape is {:?}",
                view.shape()
            )));
        }
        Ok(TensorHandle::new_contiguous(
            view.shape().to_vec(),
            client.create_from_slice(data),
            ElemType::Float(kind),
        ))
    }

    fn integers(&self, name: &str) -> Result<Vec<i64>, Error> {
        let view = self.view(name)?;
        let data = view.data();
        let word = |b: &[u8]| [b[0], b[1], b[2], b[3]];
        let integers: Vec<i64> = match view.dtype() {
            Dtype::I64 => data
                .chunks_exact(8)
                .map(|b| i64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]))
                .collect(),
            Dtype::I32 => data
                .chunks_exact(4)
                .map(|b| i64::from(i32::from_le_bytes(word(b))))
                .collect(),
            Dtype::U32 => data
                .chunks_exact(4)
                .map(|b| i64::from(u32::from_le_bytes(word(b))))
                .collect(),
            other => {
                return Err(self.wrong(format!("`{name}` is {other:?}, expected I64, I32 or U32")));
            }
        };
        if integers.is_empty() {
            return Err(self.wrong(format!(
                "`{name}` is empty, its shape is {:?}",
                view.shape()
            )));
        }
        Ok(integers)
    }

    /// Refuses a file to be written that is this one.
    pub(crate) fn is_not(&self, written: &Path) -> Result<(), Error> {
        let place = |path: &Path| fs::canonicalize(path).ok();
        match place(written) {
            Some(there) if Some(&there) == place(&self.path).as_ref() => Err(Error::Usage(
                format!("--out {} is the file that is read", written.display()),
            )),
            _ => Ok(()),
        }
    }

    /// How many classes there are, if the labels that are not ignored are all of them: one more than the highest. One that is far
    /// beyond the number of rows is taken for a mistake.
    pub(crate) fn classes(&self, name: &str, ignore_index: i32) -> Result<usize, Error> {
        let labels = self.integers(name)?;
        let counted = labels
            .iter()
            .enumerate()
            .filter(|&(_, &label)| label != i64::from(ignore_index));
        let Some((row, &highest)) = counted.max_by_key(|&(_, label)| label) else {
            return Err(self.wrong("every row is ignored: --classes is needed".into()));
        };
        let most = (100 * labels.len()).max(1000);
        match usize::try_from(highest) {
            Ok(label) if label < most => Ok(label + 1),
            Ok(_) => Err(self.wrong(format!(
                "label {highest} of row {row} is high for {} rows: if it is meant, say --classes",
                labels.len()
            ))),
            Err(_) => Err(self.wrong(format!("the highest of `{name}` is {highest}: not a class"))),
        }
    }

    /// What an op has against this file, in the words of the file, or against an option, in those of the command line.
    pub(crate) fn refused(&self, error: protohead::Error) -> Error {
        use protohead::Error as Op;
        match error {
            Op::TooLarge {
                operand: "class sums",
                ..
            } => Error::Usage(format!("--classes: {error}")),
            Op::Label { .. }
            | Op::Shape { .. }
            | Op::Empty { .. }
            | Op::Strides { .. }
            | Op::Dtype { .. }
            | Op::TooLarge { .. } => {
                self.wrong(error.to_string().replace("class weights", "prototypes"))
            }
            Op::Option {
                option,
                got,
                expected,
            } => Error::Usage(format!(
                "--{} is {}, expected {expected}",
                option.replace('_', "-"),
                got as f32
            )),
            Op::HeadWeights { .. } => Error::Usage(format!("--head-weights: {error}")),
            Op::ActiveClasses { .. } => Error::Usage(format!("--active: {error}")),
            error => Error::Op(error),
        }
    }

    /// Finite f32 of a shape, on the host.
    pub(crate) fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, Error> {
        let view = self.view(name)?;
        if view.dtype() != Dtype::F32 || view.shape() != shape {
            return Err(self.wrong(format!(
                "`{name}` is {:?} {:?}, expected F32 {shape:?}",
                view.dtype(),
                view.shape()
            )));
        }
        if not_finite(Dtype::F32, view.data()).is_some() {
            return Err(self.wrong(format!("`{name}` is not finite")));
        }
        let value = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        Ok(view.data().chunks_exact(4).map(value).collect())
    }

    /// Labels on the device, i64, or i32 where the device has no i64.
    pub(crate) fn labels(&self, client: &Client, name: &str) -> Result<TensorHandle, Error> {
        let labels = self.integers(name)?;
        let shape = self.view(name)?.shape().to_vec();
        let long = ElemType::Int(IntKind::I64);
        let (bytes, dtype) = if client.properties().supports_type(long) {
            (i64::as_bytes(&labels).to_vec(), long)
        } else {
            let narrow: Result<Vec<i32>, Error> = labels
                .iter()
                .enumerate()
                .map(|(row, &label)| {
                    i32::try_from(label)
                        .map_err(|_| self.wrong(format!("label {label} of row {row} is no class")))
                })
                .collect();
            (
                i32::as_bytes(&narrow?).to_vec(),
                ElemType::Int(IntKind::I32),
            )
        };
        Ok(TensorHandle::new_contiguous(
            shape,
            client.create_from_slice(&bytes),
            dtype,
        ))
    }
}

/// The first number that is not finite.
fn not_finite(dtype: Dtype, data: &[u8]) -> Option<usize> {
    match dtype {
        Dtype::F16 => data
            .chunks_exact(2)
            .position(|b| !f16::from_le_bytes([b[0], b[1]]).is_finite()),
        Dtype::BF16 => data
            .chunks_exact(2)
            .position(|b| !bf16::from_le_bytes([b[0], b[1]]).is_finite()),
        _ => data
            .chunks_exact(4)
            .position(|b| !f32::from_le_bytes([b[0], b[1], b[2], b[3]]).is_finite()),
    }
}

/// Tensors to be written, by name.
#[derive(Default)]
pub(crate) struct Written {
    tensors: BTreeMap<&'static str, (Dtype, Vec<usize>, Vec<u8>)>,
    /// Those that are not finite.
    infinite: Vec<&'static str>,
}

impl Written {
    /// A contiguous float tensor from the device.
    pub(crate) fn floats(
        &mut self,
        client: &Client,
        name: &'static str,
        tensor: &TensorHandle,
        shape: &[usize],
    ) -> Result<(), Error> {
        let dtype = match tensor.dtype {
            ElemType::Float(FloatKind::F16) => Dtype::F16,
            ElemType::Float(FloatKind::BF16) => Dtype::BF16,
            _ => Dtype::F32,
        };
        let bytes = client
            .read_one(tensor.handle.clone())
            .map_err(Error::of_device)?;
        if not_finite(dtype, &bytes).is_some() {
            self.infinite.push(name);
        }
        self.tensors
            .insert(name, (dtype, shape.to_vec(), bytes.to_vec()));
        Ok(())
    }

    /// Numbers of the host.
    pub(crate) fn values(&mut self, name: &'static str, values: &[f32], shape: &[usize]) {
        if !values.iter().all(|value| value.is_finite()) {
            self.infinite.push(name);
        }
        let bytes = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        self.tensors
            .insert(name, (Dtype::F32, shape.to_vec(), bytes));
    }

    /// Classes or counts, as i64.
    pub(crate) fn integers(&mut self, name: &'static str, values: &[u32], shape: &[usize]) {
        let bytes = values
            .iter()
            .flat_map(|&value| i64::from(value).to_le_bytes())
            .collect();
        self.tensors
            .insert(name, (Dtype::I64, shape.to_vec(), bytes));
    }

    /// Writes the file beside its place, then renames it: nothing half-written is ever there. Tells of tensors that the numbers or the
    /// options have made infinite.
    pub(crate) fn save(self, path: &Path) -> Result<(), Error> {
        let views: Result<Vec<_>, _> = self
            .tensors
            .iter()
            .map(|(name, (dtype, shape, data))| {
                TensorView::new(*dtype, shape.clone(), data).map(|view| (*name, view))
            })
            .collect();
        let bytes = views
            .and_then(|views| safetensors::serialize(views, None))
            .map_err(|error| Error::Format {
                path: path.into(),
                reason: error.to_string(),
            })?;
        write_atomically(path, &bytes)?;
        if !self.infinite.is_empty() {
            let names = self.infinite.join(", ");
            complain(format_args!("{}: not finite: {names}", path.display()));
        }
        Ok(())
    }
}
