//! The bytes of a device that is emulated, and its launches.

use std::collections::HashMap;

use cubecl::CubeCount;
use cubecl::bytes::Bytes;
use cubecl::server::{BufferBinding, CopyDescriptor, KernelArguments};
use cubecl_runtime::id::KernelId;
use cubecl_runtime::memory_management::{ManagedMemoryHandle, ManagedMemoryId};
use cubecl_runtime::server::KernelResource;

use crate::emulator::{self, Buffer, Global, Program};
use crate::nvidia::Compiled;

/// A kernel that is ready to run.
pub(crate) struct Kernel {
    program: Program,
    dim: [u32; 3],
    shared: usize,
}

/// What an emulated device has.
#[derive(Default)]
pub(crate) struct Emulated {
    memories: HashMap<ManagedMemoryId, (ManagedMemoryHandle, Vec<u8>)>,
    kernels: HashMap<KernelId, Kernel>,
    /// What the first launch that failed did, until somebody is told.
    failed: Option<String>,
}

impl std::fmt::Debug for Emulated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} memories", self.memories.len())
    }
}

/// Where a buffer lies in its memory.
fn range(binding: &BufferBinding) -> (usize, usize) {
    let start = binding.offset_start.unwrap_or(0);
    let end = binding.size - binding.offset_end.unwrap_or(0);
    (start as usize, end as usize)
}

impl Emulated {
    /// Memory that holds NaNs.
    pub(crate) fn initialize(&mut self, memory: ManagedMemoryHandle, size: u64) {
        self.memories.retain(|_, (handle, _)| !handle.is_free());
        let id = memory.descriptor().id;
        self.memories
            .insert(id, (memory, vec![0xff; size as usize]));
    }

    pub(crate) fn write(&mut self, to: &CopyDescriptor, bytes: &[u8]) {
        let (start, _) = range(&to.handle);
        match self.memories.get_mut(&to.handle.memory.id()) {
            Some((_, memory)) => memory[start..start + bytes.len()].copy_from_slice(bytes),
            None => self.fail("it writes what was not allocated".into()),
        }
    }

    /// What is there; or what went wrong before.
    pub(crate) fn read(&mut self, descriptors: &[CopyDescriptor]) -> Result<Vec<Bytes>, String> {
        self.told()?;
        let found = descriptors.iter().map(|from| {
            let (start, _) = range(&from.handle);
            let bytes = from.shape.iter().product::<usize>() * from.elem_size;
            let memory = self.memories.get(&from.handle.memory.id());
            let (_, memory) = memory.ok_or("it reads what was not allocated")?;
            Ok(Bytes::from_elems(memory[start..start + bytes].to_vec()))
        });
        found.collect()
    }

    /// What went wrong since the last time, if anything did.
    pub(crate) fn told(&mut self) -> Result<(), String> {
        self.failed.take().map_or(Ok(()), Err)
    }

    pub(crate) fn knows(&self, kernel: &KernelId) -> bool {
        self.kernels.contains_key(kernel)
    }

    pub(crate) fn learn(&mut self, id: KernelId, compiled: &Compiled) {
        match Program::of(&compiled.ptx) {
            Ok(program) => {
                let kernel = Kernel {
                    program,
                    dim: compiled.dim,
                    shared: compiled.shared,
                };
                self.kernels.insert(id, kernel);
            }
            Err(error) => self.fail(format!("{}: {error}", compiled.name)),
        }
    }

    pub(crate) fn fail(&mut self, reason: String) {
        self.failed.get_or_insert(reason);
    }

    pub(crate) fn launch(&mut self, id: &KernelId, count: &CubeCount, arguments: KernelArguments) {
        if let Err(reason) = self.try_launch(id, count, arguments) {
            self.fail(format!("{id}: {reason}"));
        }
    }

    fn try_launch(
        &mut self,
        id: &KernelId,
        count: &CubeCount,
        arguments: KernelArguments,
    ) -> Result<(), String> {
        let kernel = self.kernels.get(id).ok_or("it was not compiled")?;
        let &CubeCount::Static(x, y, z) = count else {
            return Err("the number of cubes lies on the device".into());
        };
        let mut ids = Vec::new();
        let mut memories = Vec::new();
        let mut buffers = Vec::new();
        for resource in &arguments.resources {
            let KernelResource::Buffer(binding) = resource else {
                return Err("it has a tensor map".into());
            };
            let id = binding.memory.id();
            let known = ids.iter().position(|known| *known == id);
            let memory = match known {
                Some(memory) => memory,
                None => {
                    let taken = self
                        .memories
                        .get_mut(&id)
                        .map(|(_, bytes)| std::mem::take(bytes));
                    memories.push(taken.ok_or("a buffer was not allocated")?);
                    ids.push(id);
                    ids.len() - 1
                }
            };
            let (start, end) = range(binding);
            buffers.push(Buffer { memory, start, end });
        }
        // Scalars and lengths come last.
        let info: Vec<u8> = arguments
            .info
            .data
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        if !info.is_empty() {
            let end = info.len();
            let memory = memories.len();
            memories.push(info);
            buffers.push(Buffer {
                memory,
                start: 0,
                end,
            });
        }
        let mut global = Global::new(memories, buffers);
        let result = emulator::launch(
            &kernel.program,
            [x, y, z],
            kernel.dim,
            kernel.shared,
            &mut global,
        );
        for (id, bytes) in ids.iter().zip(global.into_memories()) {
            if let Some((_, memory)) = self.memories.get_mut(id) {
                *memory = bytes;
            }
        }
        result
    }
}
