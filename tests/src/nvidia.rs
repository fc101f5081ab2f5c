//! An NVIDIA device without the device: every launch is compiled to PTX for its architecture, kept, and dropped.
//!
//! It advertises what CubeCL's CUDA runtime does for that architecture, so the library infers the same blueprints and
//! launches the same kernels. Buffers have a size and no bytes; reading gives zeros. Another one like it emulates what it compiles.

use std::collections::HashSet;
use std::ffi::CStr;
use std::sync::{Arc, Mutex};

use cubecl::bytes::Bytes;
use cubecl::client::Client;
use cubecl::future::DynFut;
use cubecl::ir::features::{Plane, TypeUsage};
use cubecl::ir::nvidia::SmArch;
use cubecl::ir::{
    ContiguousElements, DeviceIdentity, DeviceProperties, ElemType, FloatKind, HardwareProperties,
    MemoryDeviceProperties, MmaProperties, TargetProperties, VectorSize,
};
use cubecl::profile::{ProfileDuration, TimingMethod};
use cubecl::server::{
    BufferBinding, CopyDescriptor, Handle, KernelArguments, MemoryLayout, MemoryLayoutDescriptor,
    MemoryLayoutPolicy, ProfileError, ProfilingToken, Server, ServerCommunication, ServerError,
    ServerStorage, ServerUtilities,
};
use cubecl::zspace::{Shape, Strides, strides};
use cubecl::{Compiler, CubeCount, CubeKernel, MemoryAllocationMode, define_kernel};
use cubecl_core::device::{DeviceId, DeviceService, ServerUtilitiesHandle, ServiceId};
use cubecl_core::environment::backtrace::BackTrace;
use cubecl_core::environment::stream::StreamId;
use cubecl_cpp::cuda::arch::CudaArchitecture;
use cubecl_cpp::cuda::mma::manual::contiguous_elements_cuda;
use cubecl_cpp::cuda::supported_mma_combinations;
use cubecl_cpp::register_supported_types;
use cubecl_cpp::shared::register_mma_features;
use cubecl_llvm::nvptx::ptx_version::PtxVersion;
use cubecl_llvm::shared::lowered_features::{GpuTarget, restrict_features};
use cubecl_llvm::{LlvmTarget, PlironArtifact, PlironCompiler, PlironOptions};
use cubecl_runtime::dry_run::LaunchMode;
use cubecl_runtime::id::KernelId;
use cubecl_runtime::logging::ServerLogger;
use cubecl_runtime::memory_management::{ManagedMemoryHandle, StreamMemoryReport};
use cubecl_runtime::server::IoError;
use cubecl_runtime::storage::{ComputeStorage, ManagedResource, StorageHandle, StorageId};

use crate::emulated::Emulated;

/// A kernel as the library launched it.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// The kernel function's name.
    pub name: String,
    /// Its compile-time arguments and settings, as CubeCL's cache key prints them.
    pub key: String,
    /// The architecture: 90 for sm_90.
    pub arch: u32,
    /// Units of a cube along each axis.
    pub dim: [u32; 3],
    /// Shared memory a launch asks for, in bytes.
    pub shared: usize,
    /// The assembly.
    pub ptx: String,
}

static COMPILED: Mutex<Vec<Compiled>> = Mutex::new(Vec::new());
static FAILED: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// The client of the device that compiles for `sm_<arch>`.
pub fn client(arch: u32) -> Client {
    Client::load::<Nvidia>(DeviceId {
        type_id: arch as u16,
        index_id: 0,
    })
}

/// The client of the device that emulates an `sm_<arch>`: see [`emulator`](crate::emulator). What goes wrong in a launch is reported
/// when something is read.
pub fn emulated(arch: u32) -> Client {
    Client::load::<Nvidia>(DeviceId {
        type_id: arch as u16,
        index_id: EMULATED,
    })
}

/// Of the device that is emulated; the other one's number is 0.
const EMULATED: u16 = 1;

/// What `launches` made the library launch on that device, each kernel once.
///
/// # Panics
/// If a kernel did not compile.
pub fn compiled_by(arch: u32, launches: impl FnOnce(&Client)) -> Vec<Compiled> {
    // One at a time: what was compiled is collected for all devices together.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let client = client(arch);
    launches(&client);
    client.flush().expect("nothing runs, so nothing fails");
    let lock = |list: &Mutex<Vec<_>>| std::mem::take(&mut *list.lock().expect("no holder panics"));
    let failed = std::mem::take(&mut *FAILED.lock().expect("no holder panics"));
    assert!(failed.is_empty(), "for sm_{arch}: {}", failed.join("\n"));
    lock(&COMPILED)
}

/// The device.
#[derive(Debug)]
pub struct Nvidia {
    arch: u32,
    utilities: Arc<ServerUtilities>,
    seen: HashSet<KernelId>,
    emulated: Option<Emulated>,
}

/// Shared memory that a cube may ask for, and the multiprocessors: A100, H100, B200.
fn sizes(arch: u32) -> (usize, u32) {
    match arch {
        80 => (166_912, 108),
        90 => (232_448, 132),
        _ => (232_448, 148),
    }
}

fn properties(arch: u32) -> DeviceProperties {
    let (shared, multiprocessors) = sizes(arch);
    let hardware = HardwareProperties {
        load_width: 128,
        vector_register_count: None,
        plane_size_min: 32,
        plane_size_max: 32,
        max_bindings: 32,
        max_shared_memory_size: shared,
        max_cube_count: (i32::MAX as u32, u16::MAX as u32, u16::MAX as u32),
        max_units_per_cube: 1024,
        max_cube_dim: (1024, 1024, 64),
        num_streaming_multiprocessors: Some(multiprocessors),
        num_tensor_cores: Some(4),
        min_tensor_cores_dim: Some(8),
        num_cpu_cores: None,
        last_level_cache_size: None,
        max_vector_size: VectorSize::MAX,
        cube_mma_reserved_shared_memory: 0,
    };
    let mut properties = DeviceProperties::new(
        Default::default(),
        MemoryDeviceProperties::new(1 << 40, 512),
        hardware,
        TimingMethod::Device,
        DeviceIdentity {
            name: format!("sm_{arch}"),
            fingerprint: format!("ptx_sm{arch}"),
            physical: None,
        },
    );
    register_supported_types(&mut properties);
    properties.register_type_usage(ElemType::Float(FloatKind::TF32), TypeUsage::Conversion);
    for half in [FloatKind::F16, FloatKind::BF16] {
        properties
            .features
            .matmul
            .ldmatrix
            .insert(ElemType::Float(half));
    }
    properties.features.plane.insert(Plane::Sync);
    properties.features.plane.insert(Plane::Ops);
    properties
        .features
        .plane
        .insert(Plane::NonUniformControlFlow);
    properties.features.memory_reinterpret = true;
    properties.features.alignment = true;
    properties.features.device_memory_scope = true;
    let cuda = CudaArchitecture {
        version: arch,
        tensor_cores: true,
    };
    register_mma_features(supported_mma_combinations(&cuda), &mut properties);
    restrict_features(&mut properties, GpuTarget::Nvptx);
    properties
}

fn target_properties() -> TargetProperties {
    use cubecl::cmma::MatrixLayout::{ColMajor, RowMajor};
    TargetProperties {
        mma: MmaProperties {
            register_size_bits: 32,
            const_plane_size: 32,
            register_layout_a: RowMajor,
            register_layout_b: ColMajor,
            register_layout_acc: RowMajor,
            register_duplication_a: 1,
            register_duplication_b: 1,
            register_duplication_acc: 1,
            contiguous_elements: ContiguousElements::new(contiguous_elements_cuda),
        },
    }
}

impl Nvidia {
    fn compile(&self, kernel: &dyn CubeKernel) -> Result<Compiled, String> {
        let definition = define_kernel(kernel).map_err(|error| format!("{error:?}"))?;
        let dim = definition.settings.cube_dim;
        let options = PlironOptions {
            sm_arch: Some(SmArch::new(self.arch, true)),
            // The driver of CUDA 13.0.
            ptx_version: PtxVersion::for_driver(13000),
            // As CubeCL has it for every GPU since 7.0: scalars come by value.
            grid_constants: true,
            ..Default::default()
        };
        let mut compiler = PlironCompiler {
            target: LlvmTarget::Nvptx,
        };
        let artifact = compiler
            .compile(definition, &options)
            .map_err(|error| format!("{error:?}"))?;
        let PlironArtifact::NvptxCode(module) = artifact else {
            return Err("the NVPTX target gave no PTX".into());
        };
        // SAFETY: the module's PTX ends with NUL.
        let ptx = unsafe { CStr::from_ptr(module.ptx.as_ptr()) };
        Ok(Compiled {
            name: module.entrypoint.clone(),
            key: kernel.id().to_string(),
            arch: self.arch,
            dim: [dim.x, dim.y, dim.z],
            shared: module.shared_memory_size,
            ptx: ptx.to_string_lossy().into_owned(),
        })
    }
}

fn emulation(reason: String) -> ServerError {
    ServerError::Generic {
        reason,
        backtrace: BackTrace::capture(),
    }
}

impl DeviceService for Nvidia {
    fn init(device: DeviceId) -> Self {
        let arch = u32::from(device.type_id);
        let (utilities, _captures) = ServerUtilities::init(
            ServiceId::of::<Self>(device),
            "nvidia without a device",
            properties(arch),
            target_properties(),
            Arc::new(ServerLogger::default()),
            Contiguous,
        );
        Self {
            arch,
            utilities: Arc::new(utilities),
            seen: HashSet::new(),
            emulated: (device.index_id == EMULATED).then(Emulated::default),
        }
    }

    fn utilities(&self) -> ServerUtilitiesHandle {
        self.utilities.clone()
    }
}

impl ServerCommunication for Nvidia {}

impl Server for Nvidia {
    fn initialize_memory(
        &mut self,
        memory: ManagedMemoryHandle,
        size: u64,
        _stream: StreamId,
    ) -> Result<(), ServerError> {
        if let Some(emulated) = &mut self.emulated {
            emulated.initialize(memory, size);
        }
        Ok(())
    }

    fn logger(&self) -> Arc<ServerLogger> {
        self.utilities.logger.clone()
    }

    fn utilities(&self) -> Arc<ServerUtilities> {
        self.utilities.clone()
    }

    fn read(
        &mut self,
        descriptors: Vec<CopyDescriptor>,
        _stream: StreamId,
    ) -> DynFut<Result<Vec<Bytes>, ServerError>> {
        if let Some(emulated) = &mut self.emulated {
            let found = emulated.read(&descriptors);
            let found = found.map_err(emulation);
            return Box::pin(async move { found });
        }
        let zeros = descriptors
            .iter()
            .map(|d| Bytes::from_elems(vec![0u8; d.shape.iter().product::<usize>() * d.elem_size]))
            .collect();
        Box::pin(async move { Ok(zeros) })
    }

    fn write(&mut self, descriptors: Vec<(CopyDescriptor, Bytes)>, _stream: StreamId) {
        if let Some(emulated) = &mut self.emulated {
            for (to, bytes) in &descriptors {
                emulated.write(to, bytes);
            }
        }
    }

    fn sync(
        &mut self,
        _handles: Vec<BufferBinding>,
        _stream: StreamId,
    ) -> DynFut<Result<(), ServerError>> {
        let told = self.emulated.as_mut().map_or(Ok(()), Emulated::told);
        let told = told.map_err(emulation);
        Box::pin(async move { told })
    }

    fn check(
        &mut self,
        _handles: Vec<BufferBinding>,
        _stream: StreamId,
    ) -> Result<(), ServerError> {
        Ok(())
    }

    unsafe fn launch(
        &mut self,
        kernel: Box<dyn CubeKernel>,
        count: CubeCount,
        bindings: KernelArguments,
        _stream: StreamId,
        _mode: LaunchMode,
    ) {
        if let Some(mut emulated) = self.emulated.take() {
            let id = kernel.id();
            if !emulated.knows(&id) {
                match self.compile(&*kernel) {
                    Ok(compiled) => emulated.learn(id.clone(), &compiled),
                    Err(error) => emulated.fail(format!("{}: {error}", kernel.name())),
                }
            }
            emulated.launch(&id, &count, bindings);
            self.emulated = Some(emulated);
            return;
        }
        if !self.seen.insert(kernel.id()) {
            return;
        }
        match self.compile(&*kernel) {
            Ok(compiled) => COMPILED.lock().expect("no holder panics").push(compiled),
            Err(error) => FAILED
                .lock()
                .expect("no holder panics")
                .push(format!("{}: {error}", kernel.name())),
        }
    }

    fn flush(&mut self, _stream: StreamId) -> Result<(), ServerError> {
        Ok(())
    }

    fn memory_report(&mut self, _stream: StreamId) -> Option<StreamMemoryReport> {
        None
    }

    fn memory_cleanup(&mut self, _stream: StreamId) -> Result<(), ServerError> {
        Ok(())
    }

    fn start_profile(&mut self, _stream: StreamId) -> Result<ProfilingToken, ServerError> {
        Ok(ProfilingToken { id: 0 })
    }

    fn end_profile(
        &mut self,
        _stream: StreamId,
        _token: ProfilingToken,
    ) -> Result<ProfileDuration, ProfileError> {
        unreachable!("nothing runs, so nobody profiles")
    }

    fn allocation_mode(&mut self, _mode: MemoryAllocationMode, _stream: StreamId) {}
}

impl ServerStorage for Nvidia {
    type Storage = Nothing;

    fn get_resource(
        &mut self,
        _binding: BufferBinding,
        _stream: StreamId,
    ) -> Result<ManagedResource<()>, ServerError> {
        unreachable!("no buffer has bytes")
    }
}

/// Storage that holds nothing.
pub struct Nothing;

impl ComputeStorage for Nothing {
    type Resource = ();

    fn alignment(&self) -> usize {
        512
    }

    fn get(&mut self, _handle: &StorageHandle) -> Result<(), IoError> {
        Ok(())
    }

    fn alloc(&mut self, _size: u64) -> Result<StorageHandle, IoError> {
        unreachable!("no buffer has bytes")
    }

    fn dealloc(&mut self, _id: StorageId) {}

    fn flush(&mut self) {}

    fn bytes_allocated(&self) -> u64 {
        0
    }
}

/// Tensors one after another, each packed.
struct Contiguous;

fn contiguous_strides(shape: &Shape) -> Strides {
    let rank = shape.len();
    let mut strides = strides![1; rank];
    for axis in (0..rank.saturating_sub(1)).rev() {
        strides[axis] = strides[axis + 1] * shape[axis + 1];
    }
    strides
}

impl MemoryLayoutPolicy for Contiguous {
    fn apply(
        &self,
        service: ServiceId,
        stream: StreamId,
        descriptors: &[MemoryLayoutDescriptor],
    ) -> (Handle, Vec<MemoryLayout>) {
        let bytes = |d: &MemoryLayoutDescriptor| {
            (d.shape.iter().product::<usize>() * d.elem_size).next_multiple_of(512) as u64
        };
        let total: u64 = descriptors.iter().map(bytes).sum();
        let base = Handle::new(service, stream, total);
        let mut start = 0;
        let layouts = descriptors
            .iter()
            .map(|d| {
                let size = (d.shape.iter().product::<usize>() * d.elem_size) as u64;
                let handle = base
                    .clone()
                    .offset_start(start)
                    .offset_end(total - start - size);
                start += bytes(d);
                MemoryLayout::new(handle, contiguous_strides(&d.shape))
            })
            .collect();
        (base, layouts)
    }
}
