//! The tensors of a call: checked once, then known to be readable.

use cubecl::client::Client;
use cubecl::ir::{ElemType, FloatKind, IntKind, UIntKind};
use cubecl::prelude::*;
use cubecl::std::tensor::TensorHandle;

use crate::blueprint::Blueprint;
use crate::error::Error;
use crate::packing::unit::RowStridesLaunch;

/// f32, the dtype of everything that is accumulated or saved.
pub(crate) const F32: ElemType = ElemType::Float(FloatKind::F32);
/// u32, the dtype of predictions and counts.
pub(crate) const U32: ElemType = ElemType::UInt(UIntKind::U32);

/// A float tensor `[outer, rows, columns]` whose last axis is packed. A matrix has `outer` 1.
#[derive(Clone)]
pub(crate) struct Strided {
    tensor: TensorHandle,
    outer_stride: usize,
    row_stride: usize,
    elements: usize,
}

impl Strided {
    /// Proves that `tensor` is f32, f16 or bf16 of rank 3 (or 2), non-empty, packed along its last axis, inside its buffer and
    /// within reach of 32-bit indices.
    pub(crate) fn float(
        client: &Client,
        operand: &'static str,
        tensor: &TensorHandle,
        rank: usize,
    ) -> Result<Self, Error> {
        let strided = Self::of_any_size(client, operand, tensor, rank)?;
        // A stride of 0 makes a tensor larger than its buffer.
        let elements = tensor.shape().iter().map(|&n| n as u128).product();
        addressable(operand, elements)?;
        addressable(operand, strided.elements as u128)?;
        Ok(strided)
    }

    /// [`float`](Self::float), for kernels whose indices grow with the operands, where the device has such.
    pub(crate) fn of_any_size(
        client: &Client,
        operand: &'static str,
        tensor: &TensorHandle,
        rank: usize,
    ) -> Result<Self, Error> {
        let supported = matches!(
            tensor.dtype,
            ElemType::Float(FloatKind::F32 | FloatKind::F16 | FloatKind::BF16)
        ) && client.properties().supports_type(tensor.dtype);
        if !supported {
            return Err(Error::Dtype {
                operand,
                got: tensor.dtype,
                expected: "f32, f16 or bf16, as far as the device has them".into(),
            });
        }
        Self::new(client, operand, tensor, rank)
    }

    fn new(
        client: &Client,
        operand: &'static str,
        tensor: &TensorHandle,
        rank: usize,
    ) -> Result<Self, Error> {
        let shape = tensor.shape().to_vec();
        let strides = tensor.strides().to_vec();
        if shape.len() != rank {
            return Err(Error::Shape {
                operand,
                got: shape,
                expected: format!("{rank} axes"),
            });
        }
        if shape.contains(&0) {
            return Err(Error::Empty {
                operand,
                got: shape,
            });
        }
        let elements = tensor.handle.size_in_used() as usize / tensor.dtype.size();
        let last: u128 = shape
            .iter()
            .zip(&strides)
            .map(|(&n, &s)| (n as u128 - 1) * s as u128)
            .sum();
        let packed = shape[rank - 1] == 1 || strides[rank - 1] == 1;
        if !packed || last >= elements as u128 {
            return Err(Error::Strides {
                operand,
                shape,
                strides,
                elements,
            });
        }
        if address_type(&[elements]) == AddressType::U64
            && !client.properties().supports_address(AddressType::U64)
        {
            addressable(operand, elements as u128)?;
        }
        let stride = |axis: usize| if shape[axis] == 1 { 0 } else { strides[axis] };
        Ok(Self {
            outer_stride: if rank == 3 { stride(0) } else { 0 },
            row_stride: stride(rank - 2),
            elements,
            tensor: tensor.clone(),
        })
    }

    pub(crate) fn dtype(&self) -> ElemType {
        self.tensor.dtype
    }

    pub(crate) fn shape(&self) -> &[usize] {
        self.tensor.shape()
    }

    pub(crate) fn dims3(&self) -> [usize; 3] {
        let shape = self.shape();
        [shape[0], shape[1], shape[2]]
    }

    /// The widest vector, up to the blueprint's, that every row starts and ends on.
    pub(crate) fn vector_size(&self, blueprint: &Blueprint) -> usize {
        let columns = self.shape()[self.shape().len() - 1];
        // A handle may begin inside its allocation, where vectors would not be aligned.
        let offset = self.tensor.handle.offset_start.unwrap_or(0) as usize / self.dtype().size();
        widest(
            blueprint.vector(self.dtype()),
            [columns, self.row_stride, self.outer_stride, offset],
        )
    }

    pub(crate) fn buffer_arg(&self, vector: usize) -> BufferArg {
        // SAFETY: `new` proved that this many elements are in the buffer.
        unsafe { BufferArg::from_raw_parts(self.tensor.handle.clone(), self.elements / vector) }
    }

    /// What its buffer holds, from its first element on.
    pub(crate) fn elements(&self) -> usize {
        self.elements
    }

    pub(crate) fn row_stride(&self, vector: usize) -> usize {
        self.row_stride / vector
    }

    pub(crate) fn strides_arg(&self, vector: usize) -> RowStridesLaunch {
        RowStridesLaunch::new(self.outer_stride / vector, self.row_stride / vector)
    }
}

/// Labels `[rows]`, i32, i64 or u32.
#[derive(Clone)]
pub(crate) struct Labels {
    pub tensor: TensorHandle,
    elements: usize,
}

impl Labels {
    pub(crate) fn new(client: &Client, tensor: &TensorHandle, rows: usize) -> Result<Self, Error> {
        let operand = "labels";
        let supported = matches!(
            tensor.dtype,
            ElemType::Int(IntKind::I32 | IntKind::I64) | ElemType::UInt(UIntKind::U32)
        ) && client.properties().supports_type(tensor.dtype);
        if !supported {
            return Err(Error::Dtype {
                operand,
                got: tensor.dtype,
                expected: "i32, i64 or u32, as far as the device has them".into(),
            });
        }
        let shape = tensor.shape().to_vec();
        if shape != [rows] {
            return Err(Error::Shape {
                operand,
                got: shape,
                expected: format!("[{rows}]"),
            });
        }
        let elements = tensor.handle.size_in_used() as usize / tensor.dtype.size();
        let strides = tensor.strides().to_vec();
        if (rows > 1 && strides != [1]) || elements < rows {
            return Err(Error::Strides {
                operand,
                shape,
                strides,
                elements,
            });
        }
        Ok(Self {
            tensor: tensor.clone(),
            elements,
        })
    }

    pub(crate) fn dtype(&self) -> ElemType {
        self.tensor.dtype
    }

    pub(crate) fn buffer_arg(&self) -> BufferArg {
        // SAFETY: `new` proved that this many elements are in the buffer.
        unsafe { BufferArg::from_raw_parts(self.tensor.handle.clone(), self.elements) }
    }
}

/// The largest half of half of .. `vector` that divides all lengths.
pub(crate) fn widest<const L: usize>(mut vector: usize, lengths: [usize; L]) -> usize {
    while lengths.iter().any(|length| !length.is_multiple_of(vector)) {
        vector /= 2;
    }
    vector
}

/// A whole contiguous tensor as a kernel argument, in vectors of `vector` elements.
pub(crate) fn whole(tensor: &TensorHandle, vector: usize) -> BufferArg {
    let elements: usize = tensor.shape().iter().product();
    // SAFETY: the tensors passed here were allocated contiguous by this crate.
    unsafe { BufferArg::from_raw_parts(tensor.handle.clone(), elements / vector) }
}

/// [`whole`] of a gradient that was asked for; of one that was not, a vector that nobody writes.
pub(crate) fn whole_if_asked(
    client: &Client,
    grad: Option<&TensorHandle>,
    dtype: ElemType,
    vector: usize,
) -> BufferArg {
    match grad {
        Some(grad) => whole(grad, vector),
        None => whole(&empty(client, [vector], dtype), vector),
    }
}

/// A contiguous tensor of unspecified content.
pub(crate) fn empty(
    client: &Client,
    shape: impl Into<Vec<usize>>,
    dtype: ElemType,
) -> TensorHandle {
    let shape: Vec<usize> = shape.into();
    let bytes = shape.iter().product::<usize>() * dtype.size();
    TensorHandle::new_contiguous(shape, client.empty(bytes), dtype)
}

/// The indices of a kernel whose buffers have so many elements.
pub(crate) fn address_type(elements: &[usize]) -> AddressType {
    let wide = elements.iter().any(|&count| count > u32::MAX as usize);
    if wide {
        AddressType::U64
    } else {
        AddressType::U32
    }
}

/// Refuses what 32-bit indices cannot reach.
pub(crate) fn addressable(operand: &'static str, elements: u128) -> Result<(), Error> {
    if elements > u128::from(u32::MAX) {
        return Err(Error::TooLarge { operand, elements });
    }
    Ok(())
}
