//! A scale that is learnt: a tensor whose value the host reads at each use.

use burn::tensor::{DType, FloatDType, Tensor};

use super::checks::together;
use crate::{Error, Wanted, scale as scale_of};

/// The value of a learnt scale that goes with these operands.
pub(super) fn learnt(
    scale: &Tensor<1>,
    embeddings: &Tensor<3>,
    weights: &Tensor<3>,
) -> Result<f32, Error> {
    for operand in [embeddings, weights] {
        together("scale", &scale.device(), &operand.device())?;
    }
    let value = value_of(scale)?;
    if scale.device().is_autodiff() {
        scale_of::validate(value, Wanted::SCALE)?;
    }
    Ok(value)
}

/// A learnt scale as the ops take it: its gradient is f32, whatever the parameter is.
pub(super) fn in_f32(scale: Tensor<1>) -> Tensor<1> {
    dequantized(scale).cast(FloatDType::F32)
}

/// A tensor of floats.
pub(super) fn dequantized<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    match tensor.dtype() {
        DType::QFloat(_) => tensor.dequantize(),
        _ => tensor,
    }
}

/// The value of a scale that is learnt, as the device has it.
pub(super) fn value_of(scale: &Tensor<1>) -> Result<f32, Error> {
    if scale.dims() != [1] {
        return Err(Error::Shape {
            operand: "scale",
            got: scale.dims().to_vec(),
            expected: "[1]".into(),
        });
    }
    let values = in_f32(scale.clone().detach()).try_into_vec_as::<f32>();
    let values = values.map_err(Error::device)?;
    let few = || Error::Device("a read returned too few numbers".into());
    values.first().copied().ok_or_else(few)
}
