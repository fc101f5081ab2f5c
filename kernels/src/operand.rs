//! The tensors of a call: checked once, then known to be readable.

use cubecl::client::Client;
use cubecl::ir::features::TypeUsage;
use cubecl::ir::{ElemType, FloatKind, IntKind, UIntKind};
use cubecl::prelude::*;
use cubecl::std::tensor::TensorHandle;

use crate::blueprint::{Blueprint, PLANE_UNITS};
use crate::error::Error;
use crate::memory::empty;

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
    /// Proves that `tensor` is on the client's device, f32, f16 or bf16 of rank 3 (or 2), non-empty, packed along its last axis, inside its buffer and
    /// within reach of 32-bit indices.
    pub(crate) fn float(
        client: &Client,
        operand: &'static str,
        tensor: &TensorHandle,
        rank: usize,
    ) -> Result<Self, Error> {
        let strided = Self::of_any_size(client, operand, tensor, rank)?;
        // A stride of 0 makes a tensor larger than its buffer.
        addressable(operand, count(tensor.shape()))?;
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
        float_dtype(client, operand, tensor.dtype)?;
        Self::new(client, operand, tensor, rank)
    }

    fn new(
        client: &Client,
        operand: &'static str,
        tensor: &TensorHandle,
        rank: usize,
    ) -> Result<Self, Error> {
        on_device(client, operand, tensor)?;
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
        // Gradients are as large, whatever the strides are.
        at_most(operand, count(&shape), isize::MAX as u128 / 8)?;
        let elements = elements_of(tensor);
        let wrong = |strides| Error::Strides {
            operand,
            shape: shape.clone(),
            strides,
            elements,
            expected: "the last axis packed (stride 1)",
        };
        if strides.len() != rank {
            return Err(wrong(strides));
        }
        let last = shape.iter().zip(&strides).fold(0u128, |last, (&n, &s)| {
            last.saturating_add((n as u128 - 1) * s as u128)
        });
        let packed = shape[rank - 1] == 1 || strides[rank - 1] == 1;
        if !packed || last >= elements as u128 {
            return Err(wrong(strides));
        }
        aligned(client, operand, tensor)?;
        addressed(client, operand, elements as u128)?;
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

    /// The widest vector, up to the blueprint's, that every row starts and ends on. A single row counts with the stride that it has no
    /// use for: sums over its columns then have the bits that they have among others.
    pub(crate) fn vector_size(&self, blueprint: &Blueprint) -> usize {
        let rank = self.shape().len();
        let strides = self.tensor.strides();
        let outer = if rank == 3 { strides[0] } else { 0 };
        widest(
            blueprint.vector(self.dtype()),
            [
                self.shape()[rank - 1],
                strides[rank - 2],
                outer,
                offset(&self.tensor),
            ],
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

/// The strides of an operand's heads and rows, in vectors.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(crate) struct RowStrides {
    pub head: usize,
    pub row: usize,
}

/// Labels `[rows]`, i32, i64 or u32.
#[derive(Clone)]
pub(crate) struct Labels {
    pub tensor: TensorHandle,
}

impl Labels {
    pub(crate) fn new(client: &Client, tensor: &TensorHandle, rows: usize) -> Result<Self, Error> {
        label_dtype(client, tensor.dtype)?;
        contiguous(client, "labels", tensor, &[rows], tensor.dtype)?;
        Ok(Self {
            tensor: tensor.clone(),
        })
    }

    /// Class 0 for every row.
    pub(crate) fn zeros(client: &Client, rows: usize) -> Self {
        let zeros = client.create_from_slice(&vec![0; rows * U32.size()]);
        Self {
            tensor: TensorHandle::new_contiguous(vec![rows], zeros, U32),
        }
    }

    pub(crate) fn dtype(&self) -> ElemType {
        self.tensor.dtype
    }

    pub(crate) fn buffer_arg(&self) -> BufferArg {
        // SAFETY: `new` proved the tensor, or `zeros` made it.
        unsafe { whole(&self.tensor, 1) }
    }
}

/// Refuses a tensor of another device, at which a launch could only panic.
pub(crate) fn on_device(
    client: &Client,
    operand: &'static str,
    tensor: &TensorHandle,
) -> Result<(), Error> {
    let (on, expected) = (tensor.handle.service, client.service_id());
    if on == expected {
        return Ok(());
    }
    let runtime = match on.service == expected.service {
        true => "",
        false => " of another runtime",
    };
    Err(Error::Place {
        operand,
        on: format!("{}{runtime}", on.device),
        expected: format!("{}, the client's", expected.device),
    })
}

/// Proves that `tensor` is on the client's device, has this dtype and shape, is contiguous, and inside its buffer: what [`whole`]
/// leans on for tensors that come from a caller.
pub(crate) fn contiguous(
    client: &Client,
    operand: &'static str,
    tensor: &TensorHandle,
    expected: &[usize],
    dtype: ElemType,
) -> Result<(), Error> {
    on_device(client, operand, tensor)?;
    let (shape, strides) = (tensor.shape().to_vec(), tensor.strides().to_vec());
    if tensor.dtype != dtype {
        return Err(Error::Dtype {
            operand,
            got: tensor.dtype,
            expected: dtype.to_string(),
        });
    }
    if shape != expected {
        return Err(Error::Shape {
            operand,
            got: shape,
            expected: format!("{expected:?}"),
        });
    }
    let elements = elements_of(tensor);
    let mut packed = 1usize;
    let mut is_contiguous = shape.len() == strides.len();
    for (&length, &stride) in shape.iter().zip(&strides).rev() {
        is_contiguous &= length == 1 || stride == packed;
        packed = packed.saturating_mul(length);
    }
    if !is_contiguous || count(&shape) > elements as u128 {
        return Err(Error::Strides {
            operand,
            shape,
            strides,
            elements,
            expected: "contiguous ones",
        });
    }
    aligned(client, operand, tensor)
}

/// Refuses a tensor that begins inside its buffer where wgpu can bind none, and would panic. Elsewhere an address is a pointer.
fn aligned(client: &Client, operand: &'static str, tensor: &TensorHandle) -> Result<(), Error> {
    let properties = client.properties();
    let hardware = &properties.hardware;
    let has_pointers =
        hardware.num_cpu_cores.is_some() || hardware.num_streaming_multiprocessors.is_some();
    let offset = tensor.handle.offset_start.unwrap_or(0);
    let alignment = properties.memory.alignment;
    if has_pointers || offset.is_multiple_of(alignment) {
        return Ok(());
    }
    Err(Error::Offset {
        operand,
        offset,
        alignment,
    })
}

/// Refuses what is no dtype of float operands, or not one of the device's.
pub(crate) fn float_dtype(
    client: &Client,
    operand: &'static str,
    dtype: ElemType,
) -> Result<(), Error> {
    let taken = matches!(
        dtype,
        ElemType::Float(FloatKind::F32 | FloatKind::F16 | FloatKind::BF16)
    );
    if !taken || !in_buffers(client, dtype) {
        return Err(Error::Dtype {
            operand,
            got: dtype,
            expected: "f32, f16 or bf16, as far as the device has them".into(),
        });
    }
    Ok(())
}

/// Refuses what is no dtype of labels, or not one of the device's.
pub(crate) fn label_dtype(client: &Client, dtype: ElemType) -> Result<(), Error> {
    let taken = matches!(
        dtype,
        ElemType::Int(IntKind::I32 | IntKind::I64) | ElemType::UInt(UIntKind::U32)
    );
    if !taken || !in_buffers(client, dtype) {
        return Err(Error::Dtype {
            operand: "labels",
            got: dtype,
            expected: "i32, i64 or u32, as far as the device has them".into(),
        });
    }
    Ok(())
}

/// Whether buffers may hold this dtype, and kernels compute on what they read of it.
fn in_buffers(client: &Client, dtype: ElemType) -> bool {
    let usage = client.properties().type_usage(dtype);
    usage.is_superset(TypeUsage::Buffer | TypeUsage::Conversion)
}

/// The element of its allocation that a tensor begins at; only vectors that divide it are aligned.
pub(crate) fn offset(tensor: &TensorHandle) -> usize {
    tensor.handle.offset_start.unwrap_or(0) as usize / tensor.dtype.size()
}

/// What a tensor's buffer holds, from its first element on. A handle may begin, and end, inside its allocation; where it begins
/// behind its end or off an element, nothing.
fn elements_of(tensor: &TensorHandle) -> usize {
    let handle = &tensor.handle;
    let [start, end] = [handle.offset_start, handle.offset_end].map(|offset| offset.unwrap_or(0));
    let size = tensor.dtype.size() as u64;
    let used = handle
        .size()
        .checked_sub(start)
        .and_then(|n| n.checked_sub(end));
    match used {
        Some(used) if start.is_multiple_of(size) => (used / size) as usize,
        _ => 0,
    }
}

/// How many elements a shape has; the most a u128 can hold if it cannot hold them.
pub(crate) fn count(shape: &[usize]) -> u128 {
    shape
        .iter()
        .fold(1u128, |all, &n| all.saturating_mul(n as u128))
}

/// The largest half of half of .. `vector` that divides all lengths.
pub(crate) fn widest<const L: usize>(mut vector: usize, lengths: [usize; L]) -> usize {
    while lengths.iter().any(|length| !length.is_multiple_of(vector)) {
        vector /= 2;
    }
    vector
}

/// A whole tensor as a kernel argument, in vectors of `vector` elements.
///
/// # Safety
/// The tensor is contiguous, and its buffer holds all of it: this crate allocated it, or [`contiguous`] proved it.
pub(crate) unsafe fn whole(tensor: &TensorHandle, vector: usize) -> BufferArg {
    let elements: usize = tensor.shape().iter().product();
    // SAFETY: the caller's.
    unsafe { BufferArg::from_raw_parts(tensor.handle.clone(), elements / vector) }
}

/// [`whole`] of a gradient that was asked for; of one that was not, a vector that nobody writes.
///
/// # Safety
/// As of [`whole`].
pub(crate) unsafe fn whole_if_asked(
    client: &Client,
    grad: Option<&TensorHandle>,
    dtype: ElemType,
    vector: usize,
) -> BufferArg {
    let nothing;
    let tensor = match grad {
        Some(grad) => grad,
        None => {
            nothing = empty(client, [vector], dtype);
            &nothing
        }
    };
    // SAFETY: the caller's, or allocated here.
    unsafe { whole(tensor, vector) }
}

/// Elements that 32-bit indices reach: a unit goes on by as many elements as a grid has units, beyond the last.
pub(crate) const REACH: u32 = u32::MAX - 65_535 * PLANE_UNITS as u32;

/// The indices of a kernel whose buffers have so many elements.
pub(crate) fn address_type(elements: &[usize]) -> AddressType {
    let wide = elements.iter().any(|&count| count > REACH as usize);
    if wide {
        AddressType::U64
    } else {
        AddressType::U32
    }
}

/// Refuses what the device's indices cannot reach.
pub(crate) fn addressed(
    client: &Client,
    operand: &'static str,
    elements: u128,
) -> Result<(), Error> {
    match client.properties().supports_address(AddressType::U64) {
        true => Ok(()),
        false => addressable(operand, elements),
    }
}

/// Refuses what 32-bit indices cannot reach.
pub(crate) fn addressable(operand: &'static str, elements: u128) -> Result<(), Error> {
    at_most(operand, elements, REACH.into())
}

/// Refuses what no buffer of the device holds. CubeCL would find it out after the launch, and leave what a later launch writes as if
/// it were whole.
pub(crate) fn allocatable(
    client: &Client,
    operand: &'static str,
    elements: u128,
    dtype: ElemType,
) -> Result<(), Error> {
    let bytes = u128::from(client.properties().memory.max_page_size);
    at_most(operand, elements, bytes / dtype.size() as u128)
}

fn at_most(operand: &'static str, elements: u128, most: u128) -> Result<(), Error> {
    if elements > most {
        return Err(Error::TooLarge {
            operand,
            elements,
            most,
        });
    }
    Ok(())
}
