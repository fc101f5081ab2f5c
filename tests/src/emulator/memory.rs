//! Global and shared memory that know who has touched them.

/// Bytes that are watched together: the smallest that a kernel stores.
const GRAIN: usize = 2;
/// Bits of an address within a buffer; above them is its number.
const OFFSET_BITS: u32 = 40;

/// Who touches memory, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Access {
    pub cube: u32,
    pub unit: u32,
    /// Barriers of the cube so far,
    pub turn: u32,
    /// and of the unit's plane.
    pub plane_turn: u32,
}

impl Access {
    fn plane(&self) -> u32 {
        self.unit / 32
    }

    /// Whether nothing orders this after an earlier one.
    fn races(&self, earlier: &Self) -> bool {
        self.cube != earlier.cube
            || self.unit != earlier.unit
                && self.turn == earlier.turn
                && (self.plane() != earlier.plane() || self.plane_turn == earlier.plane_turn)
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Grain {
    written: Option<Access>,
    /// The last read, and the last that was not ordered with the one after it: by another cube, another plane, or another unit.
    read: Option<Access>,
    read_before: [Option<Access>; 3],
    /// Read as what no one writes.
    constant: bool,
    /// Written and not shown to `wgmma` yet.
    hidden: bool,
    /// A copy may change it at any time.
    copying: bool,
}

impl Grain {
    fn read(&mut self, now: Access) -> Result<(), String> {
        if self.copying {
            return Err(format!("{now:?} reads what is being copied"));
        }
        if let Some(written) = self.written
            && now.races(&written)
        {
            return Err(format!("{now:?} reads what {written:?} writes"));
        }
        if let Some(read) = self.read
            && now.races(&read)
        {
            // A write must not follow either of the two, whoever writes.
            let slot = match (read.cube == now.cube, read.plane() == now.plane()) {
                (false, _) => 0,
                (true, false) => 1,
                (true, true) => 2,
            };
            self.read_before[slot] = Some(read);
        }
        self.read = Some(now);
        Ok(())
    }

    fn write(&mut self, now: Access) -> Result<(), String> {
        if self.copying {
            return Err(format!("{now:?} writes what is being copied"));
        }
        let [one, other, third] = self.read_before;
        for (how, earlier) in [
            ("writes", self.written),
            ("reads", self.read),
            ("reads", one),
            ("reads", other),
            ("reads", third),
        ] {
            if let Some(earlier) = earlier
                && now.races(&earlier)
            {
                return Err(format!("{now:?} writes what {earlier:?} {how}"));
            }
        }
        if self.constant {
            return Err(format!("{now:?} writes what is read as a constant"));
        }
        self.written = Some(now);
        self.hidden = true;
        Ok(())
    }
}

/// Bytes, and who has touched them.
#[derive(Default)]
struct Watched {
    bytes: Vec<u8>,
    grains: Vec<Grain>,
}

impl Watched {
    fn new(bytes: Vec<u8>) -> Self {
        let grains = vec![Grain::default(); bytes.len().div_ceil(GRAIN)];
        Self { bytes, grains }
    }

    fn touch(
        &mut self,
        from: usize,
        count: usize,
        mut how: impl FnMut(&mut Grain) -> Result<(), String>,
    ) -> Result<(), String> {
        self.grains[from / GRAIN..(from + count).div_ceil(GRAIN)]
            .iter_mut()
            .try_for_each(&mut how)
    }

    fn read<const N: usize>(
        &mut self,
        from: usize,
        count: usize,
        how: impl FnMut(&mut Grain) -> Result<(), String>,
    ) -> Result<[u8; N], String> {
        self.touch(from, count, how)?;
        let mut found = [0; N];
        found[..count].copy_from_slice(&self.bytes[from..from + count]);
        Ok(found)
    }

    fn write(&mut self, from: usize, bytes: &[u8], access: Access) -> Result<(), String> {
        self.touch(from, bytes.len(), |grain| grain.write(access))?;
        self.bytes[from..from + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
}

/// A part of a memory that a kernel is given.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// Which memory.
    pub memory: usize,
    /// Where the buffer begins and ends there, in bytes.
    pub start: usize,
    /// The end.
    pub end: usize,
}

/// What kernels can reach.
pub struct Global {
    memories: Vec<Watched>,
    buffers: Vec<Buffer>,
    cube: u32,
}

impl Global {
    /// Memories, of which a kernel is given these buffers.
    pub fn new(memories: Vec<Vec<u8>>, buffers: Vec<Buffer>) -> Self {
        Self {
            memories: memories.into_iter().map(Watched::new).collect(),
            buffers,
            cube: 0,
        }
    }

    /// The memories, as the kernel has left them.
    pub fn into_memories(self) -> Vec<Vec<u8>> {
        self.memories.into_iter().map(|m| m.bytes).collect()
    }

    pub(super) fn begin_cube(&mut self) {
        self.cube += 1;
    }

    pub(super) fn cube(&self) -> u32 {
        self.cube
    }

    /// The addresses of the buffers.
    pub(super) fn addresses(&self) -> Vec<u64> {
        let buffers = (1u64..).zip(&self.buffers);
        buffers
            .map(|(number, buffer)| (number << OFFSET_BITS) + buffer.start as u64)
            .collect()
    }

    /// Which memory an address is in, and where.
    fn place(&self, address: u64, bytes: usize) -> Result<(usize, usize), String> {
        let number = (address >> OFFSET_BITS) as usize;
        let offset = (address & ((1 << OFFSET_BITS) - 1)) as usize;
        let Some(buffer) = number.checked_sub(1).and_then(|n| self.buffers.get(n)) else {
            return Err(format!("{address:#x} is in no buffer"));
        };
        if offset < buffer.start || offset + bytes > buffer.end {
            return Err(format!(
                "{bytes} bytes at {} of buffer {}, which has {}",
                offset as i64 - buffer.start as i64,
                number - 1,
                buffer.end - buffer.start
            ));
        }
        if !offset.is_multiple_of(bytes) {
            return Err(format!("{bytes} bytes at {offset}, which is not aligned"));
        }
        Ok((buffer.memory, offset))
    }

    pub(super) fn read<const N: usize>(
        &mut self,
        address: u64,
        bytes: usize,
        access: Access,
        is_constant: bool,
    ) -> Result<[u8; N], String> {
        let (memory, from) = self.place(address, bytes)?;
        self.memories[memory].read(from, bytes, |grain| {
            grain.constant |= is_constant;
            if is_constant && let Some(written) = grain.written {
                return Err(format!("reads as a constant what {written:?} writes"));
            }
            grain.read(access)
        })
    }

    pub(super) fn write(
        &mut self,
        address: u64,
        bytes: &[u8],
        access: Access,
    ) -> Result<(), String> {
        let (memory, from) = self.place(address, bytes.len())?;
        self.memories[memory].write(from, bytes, access)
    }
}

/// Memory of a cube.
pub(super) struct Shared {
    watched: Watched,
    /// By unit, where it has written since it last showed that to `wgmma`; of no unit in a kernel that shows nothing.
    hidden: Vec<Vec<usize>>,
}

impl Shared {
    pub(super) fn new(bytes: usize, units: usize) -> Self {
        Self {
            watched: Watched::new(vec![0xff; bytes]),
            hidden: vec![Vec::new(); units],
        }
    }

    /// A unit shows what it has written to `wgmma`.
    pub(super) fn show(&mut self, unit: u32) {
        for grain in self.hidden[unit as usize].drain(..) {
            let by = self.watched.grains[grain].written;
            if by.is_some_and(|by| by.unit == unit) {
                self.watched.grains[grain].hidden = false;
            }
        }
    }

    /// What `wgmma` reads for a unit.
    pub(super) fn read_shown<const N: usize>(
        &mut self,
        address: u64,
        bytes: usize,
        access: Access,
    ) -> Result<[u8; N], String> {
        let from = self.place(address, bytes)?;
        self.watched
            .touch(from, bytes, |grain| match grain.hidden {
                true => Err(format!("{:?} has not shown what it wrote", grain.written)),
                false => Ok(()),
            })?;
        self.read(address, bytes, access)
    }

    fn place(&self, address: u64, bytes: usize) -> Result<usize, String> {
        let (at, size) = (address as usize, self.watched.bytes.len());
        if address as usize + bytes > size {
            return Err(format!("{bytes} bytes at {at} of {size} of shared memory"));
        }
        if !at.is_multiple_of(bytes) {
            return Err(format!(
                "{bytes} bytes at {at} of shared memory, which is not aligned"
            ));
        }
        Ok(at)
    }

    pub(super) fn read<const N: usize>(
        &mut self,
        address: u64,
        bytes: usize,
        access: Access,
    ) -> Result<[u8; N], String> {
        let from = self.place(address, bytes)?;
        self.watched.read(from, bytes, |grain| grain.read(access))
    }

    pub(super) fn write(
        &mut self,
        address: u64,
        bytes: &[u8],
        access: Access,
    ) -> Result<(), String> {
        let from = self.place(address, bytes.len())?;
        let grains = from / GRAIN..(from + bytes.len()).div_ceil(GRAIN);
        if let Some(hidden) = self.hidden.get_mut(access.unit as usize) {
            hidden.extend(grains);
        }
        self.watched.write(from, bytes, access)
    }

    /// A copy, which may land from now on.
    pub(super) fn begin_copy(
        &mut self,
        address: u64,
        bytes: usize,
        access: Access,
    ) -> Result<(), String> {
        let from = self.place(address, bytes)?;
        self.watched.touch(from, bytes, |grain| {
            grain.write(access)?;
            grain.copying = true;
            Ok(())
        })
    }

    /// A copy, which has landed.
    pub(super) fn end_copy(
        &mut self,
        address: u64,
        bytes: &[u8],
        access: Access,
    ) -> Result<(), String> {
        let from = self.place(address, bytes.len())?;
        self.watched.touch(from, bytes.len(), |grain| {
            grain.copying = false;
            Ok(())
        })?;
        self.write(address, bytes, access)
    }
}
