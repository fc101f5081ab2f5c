//! Where new tensors lie.

use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::server::Handle;
use cubecl::std::tensor::TensorHandle;

/// A contiguous tensor of unspecified content.
pub(crate) fn empty(
    client: &Client,
    shape: impl Into<Vec<usize>>,
    dtype: ElemType,
) -> TensorHandle {
    empty_beside(client, shape, dtype, 0)
}

/// [`empty`], beside a tensor of `largest` bytes.
pub(crate) fn empty_beside(
    client: &Client,
    shape: impl Into<Vec<usize>>,
    dtype: ElemType,
    largest: usize,
) -> TensorHandle {
    let shape: Vec<usize> = shape.into();
    let bytes = shape.iter().product::<usize>() * dtype.size();
    TensorHandle::new_contiguous(shape, memory_beside(client, bytes, largest), dtype)
}

/// Bytes up to which CubeCL's pools have pages of their own.
const SMALL: usize = 64 << 10;
/// How many times larger a tensor is whose page would be wasted on what lies beside it.
const MUCH: usize = 8;

/// Memory of unspecified content, beside a tensor of `largest` bytes.
///
/// A page of CubeCL's pools is as large as the largest tensor so far, whatever it is taken for. On a CPU, what is much smaller
/// than that lies outside of the pools; on a GPU such memory would be the driver's, and its requests wait.
pub(crate) fn memory_beside(client: &Client, bytes: usize, largest: usize) -> Handle {
    let on_cpu = client.properties().hardware.num_cpu_cores.is_some();
    if on_cpu && bytes > SMALL && bytes.saturating_mul(MUCH) <= largest {
        client.memory_dedicated_allocation(bytes, |bytes| client.empty(bytes))
    } else {
        client.empty(bytes)
    }
}
