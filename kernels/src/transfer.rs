//! Numbers from the host to a device, and back.

use cubecl::client::Client;
use cubecl::prelude::CubeElement;
use cubecl::std::tensor::TensorHandle;

use crate::error::Error;
use crate::loss::values;
use crate::operand::{contiguous, count};

/// A new contiguous tensor of this shape, with `values` in row-major order. Floats become floats and integers labels: f32, `half`'s f16 and
/// bf16, i32, i64 and u32 are what the ops take.
///
/// # Errors
/// [`Error::Shape`] if the shape has not as many elements as there are values.
///
/// # Examples
/// ```no_run
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let client = cubecl::Device::cpu()?.client();
/// let labels = protohead::upload(&client, &[0, 2, 1, 0], [4])?; // i32
/// assert_eq!(protohead::download::<i32>(&client, &labels)?, [0, 2, 1, 0]);
/// # Ok(()) }
/// ```
pub fn upload<T: CubeElement, const RANK: usize>(
    client: &Client,
    values: &[T],
    shape: [usize; RANK],
) -> Result<TensorHandle, Error> {
    if count(&shape) != values.len() as u128 {
        return Err(Error::Shape {
            operand: "upload",
            got: shape.to_vec(),
            expected: format!("{} elements, as there are values", values.len()),
        });
    }
    let handle = client.create_from_slice(T::as_bytes(values));
    Ok(TensorHandle::new_contiguous(shape, handle, T::cube_type()))
}

/// Waits, and reads a contiguous tensor, in row-major order. It does not check the labels that a result rests on: do that first.
///
/// # Errors
/// [`Error::Dtype`] if the tensor is of other numbers, [`Error::Strides`] if it is not contiguous or leaves its buffer, [`Error::Offset`] if it
/// begins where the device cannot read, [`Error::Place`] if it is on another device, [`Error::Device`] if the device failed.
pub fn download<T: CubeElement>(client: &Client, tensor: &TensorHandle) -> Result<Vec<T>, Error> {
    contiguous(client, "download", tensor, tensor.shape(), T::cube_type())?;
    let bytes = client.read_one(tensor.handle.clone());
    Ok(values(&bytes.map_err(Error::device)?, tensor))
}
