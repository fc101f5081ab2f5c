//! What is proved of Burn's tensors before an op goes down to where nothing can be returned.

use burn::backend::cubecl::dtype_to_elem_type;
use burn::tensor::{DType, Device, Int, Tensor};
use cubecl::client::Client;
use cubecl::ir::ElemType;

use crate::blueprint::Blueprint;
use crate::cosine_logits::{Sizes, active_classes, same_dtype};
use crate::operand::{self, addressable, allocatable, count, label_dtype};
use crate::{Error, Strategy};

/// The client of a device, which must be CubeCL's.
pub(super) fn cube_client(device: &Device) -> Result<Client, Error> {
    let plain = device.clone().without_autodiff();
    match plain.as_dispatch() {
        #[cfg(any(feature = "cpu", feature = "cuda", feature = "wgpu"))]
        burn::backend::DispatchDevice::Cube(device) => Ok(device.client()),
        #[allow(unreachable_patterns)] // where only CubeCL devices are in the build
        other => Err(Error::Place {
            operand: "an operand",
            on: format!("{other:?}"),
            expected: "a CubeCL device whose feature of this crate is on (cpu, cuda or wgpu)"
                .into(),
        }),
    }
}

/// Refuses operands of two devices, and of two ways to checkpoint gradients, which Burn would panic at.
pub(super) fn together(operand: &'static str, on: &Device, expected: &Device) -> Result<(), Error> {
    let place = |device: &Device, strategy: Option<_>| match strategy {
        Some(strategy) => format!("{device:?} ({strategy:?})"),
        None => format!("{device:?}"),
    };
    let strategies = [on, expected].map(Device::gradient_checkpointing_strategy);
    let differ = matches!(strategies, [Some(on), Some(expected)] if on != expected);
    if on != expected || differ {
        return Err(Error::Place {
            operand,
            on: place(on, strategies[0]),
            expected: place(expected, strategies[1]),
        });
    }
    Ok(())
}

/// Refuses tensors without elements, and with more than 32-bit indices reach: the launchers could only panic at them.
pub(super) fn sized(operand: &'static str, dims: &[usize]) -> Result<(), Error> {
    addressable(operand, count(dims))?;
    if dims.contains(&0) {
        return Err(Error::Empty {
            operand,
            got: dims.to_vec(),
        });
    }
    Ok(())
}

/// Refuses an operand whose gradient, or whose contiguous copy, no buffer of the device holds: a view may be larger than its buffer.
pub(super) fn storable<const D: usize>(
    operand: &'static str,
    tensor: &Tensor<D>,
) -> Result<(), Error> {
    let client = cube_client(&tensor.device())?;
    let dtype = float_dtype(operand, tensor)?;
    allocatable(&client, operand, count(&tensor.dims()), dtype)
}

/// What the launchers would refuse, refused at the call; gives K.
pub(super) fn head_operands(
    embeddings: &Tensor<3>,
    weights: &Tensor<3>,
    scale: f32,
    active: Option<usize>,
) -> Result<usize, Error> {
    cube_client(&embeddings.device())?;
    sized("embeddings", &embeddings.dims())?;
    sized("class weights", &weights.dims())?;
    let active = active_classes(embeddings.dims(), weights.dims(), scale, active)?;
    together("class weights", &weights.device(), &embeddings.device())?;
    storable("embeddings", embeddings)?;
    storable("class weights", weights)?;
    Ok(active)
}

/// [`head_operands`] of a product, which takes both in one dtype.
pub(super) fn product_operands(
    embeddings: &Tensor<3>,
    weights: &Tensor<3>,
    scale: f32,
    active: Option<usize>,
    allow_tf32: bool,
) -> Result<usize, Error> {
    let active = head_operands(embeddings, weights, scale, active)?;
    let dtype = float_dtype("embeddings", embeddings)?;
    same_dtype(float_dtype("class weights", weights)?, dtype)?;
    let client = cube_client(&embeddings.device())?;
    let blueprint = Blueprint::of_product(&client, Strategy::Inferred, dtype, allow_tf32)?;
    Sizes::new(embeddings.dims(), active, &blueprint).check_packed(&client, &blueprint)?;
    Ok(active)
}

/// The dtype of an operand, if the kernels take it and the device has it.
pub(super) fn float_dtype<const D: usize>(
    operand: &'static str,
    tensor: &Tensor<D>,
) -> Result<ElemType, Error> {
    let dtype = dtype_to_elem_type(tensor.dtype());
    operand::float_dtype(&cube_client(&tensor.device())?, operand, dtype)?;
    Ok(dtype)
}

pub(super) fn row_labels(
    labels: &Tensor<1, Int>,
    rows: usize,
    device: &Device,
) -> Result<(), Error> {
    together("labels", &labels.device(), device)?;
    // Smaller integers become i32. Not all of u64 become i64.
    if matches!(labels.dtype(), DType::I64 | DType::U32 | DType::U64) {
        label_dtype(&cube_client(device)?, dtype_to_elem_type(labels.dtype()))?;
    }
    if labels.dims() != [rows] {
        return Err(Error::Shape {
            operand: "labels",
            got: labels.dims().to_vec(),
            expected: format!("[{rows}]"),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_32_bit_indices_do_not_reach_is_refused_with_its_elements() {
        assert_eq!(
            sized("class weights", &[1, 17_000_000, 256]),
            Err(Error::TooLarge {
                operand: "class weights",
                elements: 4_352_000_000,
                most: operand::REACH.into()
            })
        );
        assert_eq!(sized("class weights", &[1, 16_000_000, 256]), Ok(()));
    }
}
