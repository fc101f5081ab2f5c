//! The text of a kernel as a list of instructions.

use std::collections::HashMap;

use super::arithmetic;
use super::instruction::{Address, Instruction, Kind, Operand, Space, Step};

/// A kernel.
pub struct Program {
    pub(super) instructions: Vec<Instruction>,
    names: HashMap<String, usize>,
    parameters: Vec<usize>,
}

impl Program {
    /// The entry of a module.
    ///
    /// # Errors
    /// What is not understood.
    pub fn of(ptx: &str) -> Result<Self, String> {
        let text: String = ptx
            .lines()
            .map(|line| line.split("//").next().unwrap_or(""))
            .collect::<Vec<_>>()
            .join("\n");
        let entry = text.split_once(".entry").ok_or("there is no entry")?.1;
        let (head, rest) = entry.split_once('{').ok_or("the entry has no body")?;
        let mut parser = Parser::default();
        let mut parameters = Vec::new();
        for word in head.split_whitespace() {
            let word = word.trim_matches([',', '(', ')']);
            if word.contains("_param_") {
                // `name[bytes]` comes by value, and the register has where.
                let name = word.split('[').next().unwrap_or(word);
                let register = parser.register(name);
                parameters.push(register);
                parser.pointers.extend((name == word).then_some(register));
            }
        }
        for statement in statements(rest)? {
            parser
                .statement(&statement)
                .map_err(|reason| format!("{statement}: {reason}"))?;
        }
        if let Some(name) = parser.names.keys().find(|name| !parser.knows(name)) {
            return Err(format!("{name} is not known"));
        }
        let labels = parser.labels;
        for (at, label) in parser.jumps {
            let to = labels.get(&label).ok_or(format!("no label {label}"))?;
            parser.instructions[at].step = Step::Branch(*to);
        }
        Ok(Self {
            instructions: parser.instructions,
            names: parser.names,
            parameters,
        })
    }

    pub(super) fn registers(&self) -> usize {
        self.names.len()
    }

    pub(super) fn named(&self, name: &str) -> Option<usize> {
        self.names.get(name).copied()
    }

    /// The registers that hold the kernel's parameters.
    pub(super) fn parameters(&self) -> &[usize] {
        &self.parameters
    }
}

/// The statements of a body, with labels as statements that end with a colon. Blocks of inline assembly have one meaning with what is
/// around them, as they declare names of their own only.
fn statements(text: &str) -> Result<Vec<String>, String> {
    let mut found = Vec::new();
    let mut statement = String::new();
    let mut depth = 1;
    for c in text.chars() {
        match c {
            // Of operands.
            '{' if !statement.trim().is_empty() => {
                statement.push(c);
                depth += 1;
            }
            '}' if statement.contains('{') => {
                statement.push(c);
                depth -= 1;
            }
            '{' => depth += 1,
            '}' => {
                depth -= 1;
                if depth == 0 {
                    return Ok(found);
                }
            }
            ';' => found.push(std::mem::take(&mut statement).trim().to_owned()),
            ':' if statement.trim().starts_with('$') => {
                found.push(std::mem::take(&mut statement).trim().to_owned() + ":");
            }
            _ => statement.push(c),
        }
    }
    Err("the body does not end".into())
}

#[derive(Default)]
struct Parser {
    names: HashMap<String, usize>,
    instructions: Vec<Instruction>,
    labels: HashMap<String, usize>,
    jumps: Vec<(usize, String)>,
    /// As `.reg` has them: `%r<9>` are nine.
    declared: Vec<String>,
    /// Parameters that are addresses.
    pointers: Vec<usize>,
}

/// What commas part, but for those in braces and brackets.
fn operands(text: &str) -> Vec<String> {
    let mut found = vec![String::new()];
    let mut depth = 0;
    for c in text.chars() {
        match c {
            '{' | '[' => depth += 1,
            '}' | ']' => depth -= 1,
            _ => {}
        }
        match (c, found.last_mut()) {
            (',', _) if depth == 0 => found.push(String::new()),
            (_, Some(last)) => last.push(c),
            _ => {}
        }
    }
    let found = found.iter().map(|operand| operand.trim().to_owned());
    found.filter(|operand| !operand.is_empty()).collect()
}

/// The names in braces, or the only one.
fn list(text: &str) -> Vec<&str> {
    let text = text.trim_start_matches('{').trim_end_matches('}');
    text.split(',').map(str::trim).collect()
}

impl Parser {
    fn knows(&self, name: &str) -> bool {
        let (special, axis) = name.split_once('.').unwrap_or((name, ""));
        let is_position = ["%tid", "%ntid", "%ctaid", "%nctaid"].contains(&special)
            && ["x", "y", "z"].contains(&axis);
        let numbered = name.trim_end_matches(|c: char| c.is_ascii_digit());
        let is_declared = |declared: &String| {
            let stem = declared.split('<').next().unwrap_or("");
            declared == name || declared.contains('<') && stem == numbered
        };
        is_position
            || name == "_"
            || name.contains("_param_")
            || self.declared.iter().any(is_declared)
    }

    fn register(&mut self, name: &str) -> usize {
        let next = self.names.len();
        *self.names.entry(name.to_owned()).or_insert(next)
    }

    fn registers(&mut self, text: &str) -> Vec<usize> {
        let names = list(text);
        names.into_iter().map(|name| self.register(name)).collect()
    }

    fn several<const N: usize>(&mut self, text: &str) -> Result<[usize; N], String> {
        let registers = self.registers(text);
        let count = registers.len();
        registers
            .try_into()
            .map_err(|_| format!("{count} registers, expected {N}"))
    }

    fn operand(&mut self, text: &str) -> Result<Operand, String> {
        if let Some(bits) = text.strip_prefix("0f") {
            let bits = u32::from_str_radix(bits, 16).map_err(|e| format!("{text}: {e}"))?;
            return Ok(Operand::Value(bits.into()));
        }
        if let Some(bits) = text.strip_prefix("0x") {
            let bits = u64::from_str_radix(bits, 16).map_err(|e| format!("{text}: {e}"))?;
            return Ok(Operand::Value(bits));
        }
        if text == "cube_shared" {
            return Ok(Operand::Value(0));
        }
        match text.parse::<i128>() {
            Ok(number) => Ok(Operand::Value(number as u64)),
            Err(_) => Ok(Operand::Register(self.register(text))),
        }
    }

    fn address(&mut self, text: &str) -> Result<Address, String> {
        let inside = text.trim_start_matches('[').trim_end_matches(']').trim();
        let (base, offset) = inside.split_once('+').unwrap_or((inside, "0"));
        Ok(Address {
            base: self.operand(base.trim())?,
            offset: offset
                .trim()
                .parse()
                .map_err(|e| format!("{offset}: {e}"))?,
        })
    }

    fn statement(&mut self, text: &str) -> Result<(), String> {
        if let Some(label) = text.strip_suffix(':') {
            self.labels
                .insert(label.to_owned(), self.instructions.len());
            return Ok(());
        }
        if let Some(declared) = text.strip_prefix(".reg") {
            let names = declared.split_whitespace().skip(1);
            self.declared
                .extend(names.map(|name| name.trim_end_matches(',').to_owned()));
            return Ok(());
        }
        if text.is_empty() || text.starts_with(".pragma") {
            return Ok(());
        }
        let (guard, rest) = match text.strip_prefix('@') {
            None => (None, text),
            Some(guarded) => {
                let (guard, rest) = guarded
                    .split_once(char::is_whitespace)
                    .ok_or("a guard of nothing")?;
                let name = guard.trim_start_matches('!');
                let guard = (self.register(name), !guard.starts_with('!'));
                (Some(guard), rest)
            }
        };
        let rest = rest.trim();
        let (opcode, rest) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
        let operands = operands(rest);
        let operands: Vec<&str> = operands.iter().map(String::as_str).collect();
        let step = self.step(opcode, &operands)?;
        self.instructions.push(Instruction {
            guard,
            step,
            text: text.split_whitespace().collect::<Vec<_>>().join(" "),
        });
        Ok(())
    }

    fn step(&mut self, opcode: &str, operands: &[&str]) -> Result<Step, String> {
        let parts: Vec<&str> = opcode.split('.').collect();
        let operand = |at: usize| -> Result<&str, String> {
            let found = operands.get(at).copied();
            found.ok_or_else(|| format!("there is no operand {at}"))
        };
        Ok(match parts[0] {
            "bra" => {
                let label = operand(0)?.to_owned();
                self.jumps.push((self.instructions.len(), label));
                Step::Nothing
            }
            "ret" | "exit" => Step::End,
            "ld" => {
                let (to, from) = (self.registers(operand(0)?), self.address(operand(1)?)?);
                let is_parameter = parts[1] == "param";
                match from.base {
                    Operand::Register(name) if is_parameter && self.pointers.contains(&name) => {
                        Step::Compute(arithmetic::copied(to[0], from.base))
                    }
                    _ => Step::Load {
                        space: if is_parameter {
                            Space::Global
                        } else {
                            space(parts[1])?
                        },
                        bytes: arithmetic::bytes(parts[parts.len() - 1])?,
                        extends: parts[parts.len() - 1] == "s32" && operand(0)?.starts_with("%rd"),
                        to,
                        from,
                    },
                }
            }
            "st" => Step::Store {
                space: space(parts[1])?,
                bytes: arithmetic::bytes(parts[parts.len() - 1])?,
                to: self.address(operand(0)?)?,
                from: list(operand(1)?)
                    .into_iter()
                    .map(|name| self.operand(name))
                    .collect::<Result<_, _>>()?,
            },
            "cp" => match opcode {
                "cp.async.commit_group" => Step::EndCopies,
                "cp.async.wait_group" => {
                    let groups = operand(0)?.parse();
                    Step::AwaitCopies(groups.map_err(|e| format!("groups: {e}"))?)
                }
                "cp.async.cg.shared.global.L2::128B" if operand(2)? == "16" => Step::Copy {
                    to: self.address(operand(0)?)?,
                    from: self.address(operand(1)?)?,
                },
                _ => return Err("this copy is not known".into()),
            },
            "bar" if opcode == "bar.sync" && operands == ["0"] => Step::Barrier,
            "bar" if opcode == "bar.warp.sync" => Step::PlaneBarrier(self.operand(operand(0)?)?),
            "activemask" => Step::ActiveMask(self.register(operand(0)?)),
            "shfl" if opcode == "shfl.sync.bfly.b32" && operand(3)? == "31" => Step::Shuffle {
                to: self.register(operand(0)?),
                from: self.operand(operand(1)?)?,
                across: self.operand(operand(2)?)?,
                mask: self.operand(operand(4)?)?,
            },
            "ldmatrix" => Step::LoadMatrices {
                transposes: match opcode {
                    "ldmatrix.sync.aligned.m8n8.x4.shared.b16" => false,
                    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16" => true,
                    _ => return Err("these matrices are not known".into()),
                },
                to: self.several(operand(0)?)?,
                from: self.address(operand(1)?)?,
            },
            "mma" => {
                let kind = match opcode {
                    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32" => Kind::F16,
                    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" => Kind::Bf16,
                    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32" => Kind::Tf32,
                    _ => return Err("this product is not known".into()),
                };
                Step::Multiply {
                    kind,
                    to: self.several(operand(0)?)?,
                    left: self.several(operand(1)?)?,
                    right: self.several(operand(2)?)?,
                    sums: self.several(operand(3)?)?,
                }
            }
            "wgmma" => match opcode {
                "wgmma.fence.sync.aligned" | "wgmma.commit_group.sync.aligned" => Step::Nothing,
                "wgmma.wait_group.sync.aligned" if operand(0)? == "0" => Step::AwaitProducts,
                "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16"
                | "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16"
                    if operands[4..6] == ["1", "1"] =>
                {
                    Step::MultiplyTogether {
                        kind: match opcode.ends_with("bf16") {
                            true => Kind::Bf16,
                            false => Kind::F16,
                        },
                        sums: self.registers(operand(0)?),
                        left: self.operand(operand(1)?)?,
                        right: self.operand(operand(2)?)?,
                        adds: self.operand(operand(3)?)?,
                        transposes: [operand(6)? == "1", operand(7)? == "1"],
                    }
                }
                _ => return Err("this product is not known".into()),
            },
            "fence" if opcode == "fence.proxy.async.shared::cta" => Step::Show,
            // Units run one after the other: what one has written, all see.
            "fence" => Step::Nothing,
            _ => {
                let braced = operands.iter().find(|operand| operand.starts_with('{'));
                let pieces = |of: &mut Self, at: usize| -> Result<Vec<Operand>, String> {
                    let names = list(operand(at)?);
                    names.into_iter().map(|name| of.operand(name)).collect()
                };
                match braced {
                    Some(_) if parts[0] == "mov" && operand(0)?.starts_with('{') => {
                        let to = self.registers(operand(0)?);
                        let from = self.operand(operand(1)?)?;
                        Step::Compute(arithmetic::unpacked(to, from, arithmetic::bytes(parts[1])?))
                    }
                    Some(_) if parts[0] == "mov" => {
                        let to = self.register(operand(0)?);
                        let from = pieces(self, 1)?;
                        Step::Compute(arithmetic::packed(to, from, arithmetic::bytes(parts[1])?))
                    }
                    Some(_) => return Err("it has braces".into()),
                    None => {
                        let to = self.register(operand(0)?);
                        let from = operands[1..].iter().map(|name| self.operand(name));
                        let from = from.collect::<Result<Vec<_>, _>>()?;
                        Step::Compute(arithmetic::compute(&parts, to, &from)?)
                    }
                }
            }
        })
    }
}

fn space(name: &str) -> Result<Space, String> {
    match name {
        "global" => Ok(Space::Global),
        "shared" => Ok(Space::Shared),
        _ => Err(format!("{name} memory is not known")),
    }
}
