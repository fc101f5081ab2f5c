//! What the units of a plane do together.

use half::{bf16, f16};

use super::cube::Cube;
use super::instruction::{Address, Kind, Operand};
use super::memory::Access;

/// Two numbers of 16 bits in a register, or one of 32.
fn numbers(register: u64, kind: Kind) -> Vec<f64> {
    let halves = [register as u16, (register >> 16) as u16];
    match kind {
        Kind::F16 => halves.map(|v| f16::from_bits(v).to_f64()).to_vec(),
        Kind::Bf16 => halves.map(|v| bf16::from_bits(v).to_f64()).to_vec(),
        // The lower bits do not count.
        Kind::Tf32 => vec![f32::from_bits(register as u32 & !0x1fff).into()],
    }
}

/// Rounded towards zero: tensor cores round so, or worse.
fn sum(products: impl Iterator<Item = f64>, more: u64) -> u64 {
    let exact = products.sum::<f64>() + f64::from(f32::from_bits(more as u32));
    let nearest = exact as f32;
    let sum = match f64::from(nearest.abs()) > exact.abs() && nearest.is_finite() {
        true => f32::from_bits(nearest.to_bits() - 1),
        false => nearest,
    };
    sum.to_bits().into()
}

impl Cube<'_> {
    pub(super) fn shuffle(
        &mut self,
        units: &[usize],
        first: usize,
        to: usize,
        from: Operand,
        across: Operand,
    ) -> Result<(), String> {
        let values: Vec<u64> = units
            .iter()
            .map(|&unit| from.of(&self.units[unit].registers))
            .collect();
        for &unit in units {
            let across = across.of(&self.units[unit].registers) as usize;
            let other = first + ((unit - first) ^ across);
            let Some(at) = units.iter().position(|&unit| unit == other) else {
                return Err(format!(
                    "unit {unit} takes from {other}, which is not there"
                ));
            };
            self.units[unit].registers[to] = values[at];
        }
        Ok(())
    }

    /// PTX ISA, "ldmatrix": four matrices of eight rows of 16 bytes, whose addresses eight units each have.
    pub(super) fn load_matrices(
        &mut self,
        units: &[usize],
        accesses: &[Access],
        to: &[usize; 4],
        from: Address,
        transposes: bool,
    ) -> Result<(), String> {
        let mut rows = Vec::new();
        for (&unit, &access) in units.iter().zip(accesses) {
            let address = from.of(&self.units[unit].registers);
            let bytes: [u8; 16] = self.shared.read(address, 16, access)?;
            let row: Vec<u64> = bytes
                .chunks(2)
                .map(|two| u16::from_le_bytes([two[0], two[1]]).into())
                .collect();
            rows.push(row);
        }
        for (lane, &unit) in units.iter().enumerate() {
            for (matrix, &to) in to.iter().enumerate() {
                let element = |second: usize| {
                    let (row, column) = match transposes {
                        false => (lane / 4, lane % 4 * 2 + second),
                        true => (lane % 4 * 2 + second, lane / 4),
                    };
                    rows[matrix * 8 + row][column]
                };
                self.units[unit].registers[to] = element(0) | element(1) << 16;
            }
        }
        Ok(())
    }

    /// PTX ISA, "Matrix fragments for mma.m16n8k16" and ".m16n8k8": of a fragment two registers are eight rows apart, and two half of its
    /// depth.
    pub(super) fn multiply(
        &mut self,
        units: &[usize],
        kind: Kind,
        to: &[usize; 4],
        left: &[usize; 4],
        right: &[usize; 2],
        sums: &[usize; 4],
    ) {
        let of = |unit: usize, register: usize| numbers(self.units[unit].registers[register], kind);
        // By row and by column, both along the depth.
        let mut lefts = vec![Vec::new(); 16];
        for (row, of_row) in lefts.iter_mut().enumerate() {
            for deep in 0..2 {
                for lane in 0..4 {
                    of_row.extend(of(units[row % 8 * 4 + lane], left[row / 8 + 2 * deep]));
                }
            }
        }
        let mut rights = vec![Vec::new(); 8];
        for (column, of_column) in rights.iter_mut().enumerate() {
            for &register in right {
                for lane in 0..4 {
                    of_column.extend(of(units[column * 4 + lane], register));
                }
            }
        }
        for (lane, &unit) in units.iter().enumerate() {
            let registers = &mut self.units[unit].registers;
            let more = sums.map(|register| registers[register]);
            for (result, &to) in to.iter().enumerate() {
                let row = &lefts[lane / 4 + result / 2 * 8];
                let column = &rights[lane % 4 * 2 + result % 2];
                let products = row.iter().zip(column).map(|(a, b)| a * b);
                registers[to] = sum(products, more[result]);
            }
        }
    }

    /// This plane's sixteen rows of a `wgmma` of 64 × 128 × 16: PTX ISA, "Register fragment layout for accumulator matrix D", "Matrix
    /// descriptor" and "Canonical layouts" without swizzling.
    pub(super) fn multiply_together(
        &mut self,
        units: &[usize],
        accesses: &[Access],
        kind: Kind,
        sums: &[usize],
        [left, right, adds]: [Operand; 3],
        transposes: [bool; 2],
    ) -> Result<(), String> {
        let first_row = units[0] / super::cube::PLANE % 4 * 16;
        let [left, right] = [left, right].map(|of| of.of(&self.units[units[0]].registers));
        let mut read = |descriptor: u64, transposed: bool, row: usize, k: usize| {
            let bytes = |bit: u32| (descriptor >> bit & 0x3fff) as usize * 16;
            if descriptor >> 46 != 0 {
                return Err("the descriptor has an offset or a swizzle".to_owned());
            }
            let inside = match transposed {
                true => k % 8 * 16 + row % 8 * 2,
                false => row % 8 * 16 + k % 8 * 2,
            };
            let address = bytes(0) + row / 8 * bytes(32) + k / 8 * bytes(16) + inside;
            let found: [u8; 2] = self.shared.read_shown(address as u64, 2, accesses[0])?;
            Ok(numbers(u16::from_le_bytes(found).into(), kind)[0])
        };
        let mut side = |descriptor, transposed, rows: std::ops::Range<usize>| {
            let row = |row| {
                (0..16)
                    .map(|k| read(descriptor, transposed, row, k))
                    .collect()
            };
            rows.map(row).collect::<Result<Vec<Vec<f64>>, String>>()
        };
        let lefts = side(left, transposes[0], first_row..first_row + 16)?;
        let rights = side(right, transposes[1], 0..128)?;
        for (lane, &unit) in units.iter().enumerate() {
            for (d, &register) in sums.iter().enumerate() {
                let row = &lefts[lane / 4 + d / 2 % 2 * 8];
                let column = &rights[d / 4 * 8 + lane % 4 * 2 + d % 2];
                let products = row.iter().zip(column).map(|(a, b)| a * b);
                let registers = &mut self.units[unit].registers;
                let adds = adds.of(registers) != 0;
                let more = if adds { registers[register] } else { 0 };
                registers[register] = sum(products, more);
            }
        }
        Ok(())
    }
}
