//! The units of a cube, one after the other as far as each comes.

use std::collections::VecDeque;

use super::instruction::{Address, Space, Step};
use super::memory::{Access, Global, Shared};
use super::parse::Program;

/// Units of a plane.
pub(super) const PLANE: usize = 32;
/// Instructions after which a unit is taken to run for ever.
const MOST: u64 = 1 << 32;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Runs,
    /// At an instruction that it does together with others.
    Waits,
    Ended,
}

pub(super) struct Unit {
    pub registers: Vec<u64>,
    at: usize,
    state: State,
    /// Copies that were begun: groups, and those that are in none yet.
    groups: VecDeque<Vec<[u64; 2]>>,
    open: Vec<[u64; 2]>,
}

pub(super) struct Cube<'a> {
    program: &'a Program,
    pub units: Vec<Unit>,
    pub shared: Shared,
    global: &'a mut Global,
    turn: u32,
    plane_turns: Vec<u32>,
}

impl<'a> Cube<'a> {
    pub(super) fn new(
        program: &'a Program,
        position: [u32; 3],
        count: [u32; 3],
        units: [u32; 3],
        shared: usize,
        global: &'a mut Global,
    ) -> Self {
        let addresses = global.addresses();
        let unit = |number: u32| {
            let mut registers = vec![0; program.registers()];
            for (&parameter, &address) in program.parameters().iter().zip(&addresses) {
                registers[parameter] = address;
            }
            let of_unit = [
                number % units[0],
                number / units[0] % units[1],
                number / units[0] / units[1],
            ];
            for (name, values) in [
                ("tid", of_unit),
                ("ntid", units),
                ("ctaid", position),
                ("nctaid", count),
            ] {
                for (axis, value) in ["x", "y", "z"].into_iter().zip(values) {
                    if let Some(register) = program.named(&format!("%{name}.{axis}")) {
                        registers[register] = value.into();
                    }
                }
            }
            Unit {
                registers,
                at: 0,
                state: State::Runs,
                groups: VecDeque::new(),
                open: Vec::new(),
            }
        };
        let all = units.iter().product::<u32>();
        let mut instructions = program.instructions.iter();
        let shows = instructions.any(|instruction| matches!(instruction.step, Step::Show));
        Self {
            program,
            units: (0..all).map(unit).collect(),
            shared: Shared::new(shared, if shows { all as usize } else { 0 }),
            global,
            turn: 0,
            plane_turns: vec![0; (all as usize).div_ceil(PLANE)],
        }
    }

    pub(super) fn run(mut self) -> Result<(), String> {
        loop {
            for plane in 0..self.plane_turns.len() {
                self.run_plane(plane)?;
            }
            if self.units.iter().all(|unit| unit.state == State::Ended) {
                return Ok(());
            }
            // Nobody runs: those that are left have to be at a barrier.
            for number in 0..self.units.len() {
                let unit = &self.units[number];
                if unit.state == State::Ended {
                    continue;
                }
                let instruction = &self.program.instructions[unit.at];
                if !matches!(instruction.step, Step::Barrier) {
                    return Err(format!(
                        "unit {number} waits for others that do not come: {}",
                        instruction.text
                    ));
                }
            }
            for plane in self.units.chunks(PLANE) {
                let mut waits = plane.iter().filter(|unit| unit.state == State::Waits);
                let first = waits.next().map(|unit| unit.at);
                if waits.any(|unit| Some(unit.at) != first) {
                    return Err("units of a plane are at two barriers".into());
                }
            }
            self.turn += 1;
            for unit in &mut self.units {
                if unit.state == State::Waits {
                    unit.go_on();
                }
            }
        }
    }

    /// Runs the units of a plane until none gets further on its own or with others of the plane.
    fn run_plane(&mut self, plane: usize) -> Result<(), String> {
        let first = plane * PLANE;
        let end = (first + PLANE).min(self.units.len());
        loop {
            for number in first..end {
                self.run_unit(number)?;
            }
            let mut waiting: Vec<usize> = (first..end)
                .filter(|&unit| self.units[unit].state == State::Waits)
                .map(|unit| self.units[unit].at)
                .collect();
            waiting.sort_unstable();
            waiting.dedup();
            let mut went_on = false;
            for &at in &waiting {
                went_on |= self.together(plane, first..end, at)?;
            }
            if went_on {
                continue;
            }
            // Those of a plane that are somewhere at the same time are active there.
            let asks =
                waiting
                    .into_iter()
                    .find_map(|at| match self.program.instructions[at].step {
                        Step::ActiveMask(to) => Some((at, to)),
                        _ => None,
                    });
            let Some((at, to)) = asks else { return Ok(()) };
            let there: Vec<usize> = (first..end).filter(|&unit| self.is_at(unit, at)).collect();
            let mask = there
                .iter()
                .fold(0u64, |mask, unit| mask | 1 << (unit - first));
            for unit in there {
                self.units[unit].registers[to] = mask;
                self.units[unit].go_on();
            }
        }
    }

    pub(super) fn is_at(&self, unit: usize, at: usize) -> bool {
        self.units[unit].state == State::Waits && self.units[unit].at == at
    }

    /// What some units of a plane do together at an instruction, if all that take part are there.
    fn together(
        &mut self,
        plane: usize,
        units: std::ops::Range<usize>,
        at: usize,
    ) -> Result<bool, String> {
        let instruction = &self.program.instructions[at];
        let there: Vec<usize> = units.clone().filter(|&unit| self.is_at(unit, at)).collect();
        let mask = match &instruction.step {
            Step::Barrier | Step::ActiveMask(_) => return Ok(false),
            Step::PlaneBarrier(mask) | Step::Shuffle { mask, .. } => {
                let masks = there
                    .iter()
                    .map(|&unit| mask.of(&self.units[unit].registers));
                let masks: Vec<u64> = masks.map(|mask| mask & 0xffff_ffff).collect();
                if masks.iter().any(|mask| *mask != masks[0]) {
                    return Err(format!("units have other masks: {}", instruction.text));
                }
                masks[0]
            }
            _ => 0xffff_ffff,
        };
        let asked = |unit: &usize| mask >> (unit - units.start) & 1 == 1;
        if there.iter().any(|unit| !asked(unit)) {
            return Err(format!("a unit is not in its mask: {}", instruction.text));
        }
        let lasting = |unit: &usize| self.units[*unit].state != State::Ended;
        let needed = units.clone().filter(asked).filter(lasting).count();
        if there.len() < needed {
            return Ok(false);
        }
        let whole = there.len() == PLANE;
        let access = |unit: usize| Access {
            cube: self.global.cube(),
            unit: unit as u32,
            turn: self.turn,
            plane_turn: self.plane_turns[plane],
        };
        let accesses: Vec<Access> = there.iter().map(|&unit| access(unit)).collect();
        let result = match &instruction.step {
            Step::PlaneBarrier(_) if mask != 0xffff_ffff => {
                Err("a barrier of part of a plane is not known".into())
            }
            Step::PlaneBarrier(_) => {
                self.plane_turns[plane] += 1;
                Ok(())
            }
            Step::Shuffle {
                to, from, across, ..
            } => self.shuffle(&there, units.start, *to, *from, *across),
            _ if !whole => Err("not all units of the plane take part".into()),
            Step::LoadMatrices {
                to,
                from,
                transposes,
            } => self.load_matrices(&there, &accesses, to, *from, *transposes),
            Step::Multiply {
                kind,
                to,
                left,
                right,
                sums,
            } => {
                self.multiply(&there, *kind, to, left, right, sums);
                Ok(())
            }
            Step::MultiplyTogether {
                kind,
                sums,
                left,
                right,
                adds,
                transposes,
            } => {
                let operands = [*left, *right, *adds];
                self.multiply_together(&there, &accesses, *kind, sums, operands, *transposes)
            }
            _ => Err("nothing to do together".into()),
        };
        result.map_err(|reason| format!("{reason}: {}", instruction.text))?;
        for unit in there {
            self.units[unit].go_on();
        }
        Ok(true)
    }

    fn run_unit(&mut self, number: usize) -> Result<(), String> {
        let mut steps = 0;
        while self.units[number].state == State::Runs {
            let at = self.units[number].at;
            let instruction = &self.program.instructions[at];
            self.step(number)
                .map_err(|reason| format!("unit {number}: {reason}: {}", instruction.text))?;
            steps += 1;
            if steps > MOST {
                return Err(format!("unit {number} does not end: {}", instruction.text));
            }
        }
        Ok(())
    }

    fn step(&mut self, number: usize) -> Result<(), String> {
        let unit = &mut self.units[number];
        let instruction = &self.program.instructions[unit.at];
        if let Some((register, expected)) = instruction.guard
            && (unit.registers[register] != 0) != expected
        {
            unit.at += 1;
            return Ok(());
        }
        let access = Access {
            cube: self.global.cube(),
            unit: number as u32,
            turn: self.turn,
            plane_turn: self.plane_turns[number / PLANE],
        };
        match &instruction.step {
            Step::Compute(compute) => compute(&mut unit.registers),
            Step::Branch(to) => {
                unit.at = *to;
                return Ok(());
            }
            Step::End => {
                unit.state = State::Ended;
                return Ok(());
            }
            Step::Load {
                space,
                bytes,
                extends,
                to,
                from,
            } => {
                let address = from.of(&unit.registers);
                let all = bytes * to.len();
                let found: [u8; 16] = match space {
                    Space::Shared => self.shared.read(address, all, access)?,
                    Space::Global => {
                        let is_constant = instruction.text.contains("global.nc");
                        self.global.read(address, all, access, is_constant)?
                    }
                };
                for (piece, &to) in found.chunks(*bytes).zip(to) {
                    let mut value = [0; 8];
                    value[..*bytes].copy_from_slice(piece);
                    let value = u64::from_le_bytes(value);
                    unit.registers[to] = match extends {
                        true => i64::from(value as u32 as i32) as u64,
                        false => value,
                    };
                }
            }
            Step::Store {
                space,
                bytes,
                to,
                from,
            } => {
                let address = to.of(&unit.registers);
                let mut all = [0; 16];
                for (piece, from) in all.chunks_mut(*bytes).zip(from) {
                    let value = from.of(&unit.registers).to_le_bytes();
                    piece.copy_from_slice(&value[..*bytes]);
                }
                let all = &all[..bytes * from.len()];
                match space {
                    Space::Shared => self.shared.write(address, all, access)?,
                    Space::Global => self.global.write(address, all, access)?,
                }
            }
            Step::Copy { to, from } => {
                let copy = [*to, *from].map(|address: Address| address.of(&unit.registers));
                self.shared.begin_copy(copy[0], 16, access)?;
                unit.open.push(copy);
            }
            Step::EndCopies => {
                let group = std::mem::take(&mut unit.open);
                unit.groups.push_back(group);
            }
            Step::AwaitCopies(left) => {
                while unit.groups.len() > *left {
                    for [to, from] in unit.groups.pop_front().unwrap_or_default() {
                        let bytes: [u8; 16] = self.global.read(from, 16, access, false)?;
                        self.shared.end_copy(to, &bytes, access)?;
                    }
                }
            }
            Step::Show => self.shared.show(access.unit),
            Step::AwaitProducts | Step::Nothing => {}
            _ => {
                unit.state = State::Waits;
                return Ok(());
            }
        }
        unit.at += 1;
        Ok(())
    }
}

impl Unit {
    fn go_on(&mut self) {
        self.state = State::Runs;
        self.at += 1;
    }
}
