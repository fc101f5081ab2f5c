//! Runs single cases on demand, so that another program can take turns with it on the same machine: a line on stdin, numbers on
//! stdout. A case is checked before its first run.
//!
//! | line | answer |
//! |---|---|
//! | `<group>/<shape>/<who>` | nanoseconds of one call on fresh operands |
//! | `<group>/<shape>/<who> <calls>` | nanoseconds of so many calls on the operands of the line before, if it is the same, of which only the last is waited for; ours only |
//! | `<group>/<shape>/<who> memory` | bytes reserved for the operands, and by a step besides, in a process that did nothing before; ours only |
//! | `<group>/<shape>/<who> shape` | heads, rows, dim, classes, active classes |
//! | `ceiling/fma`, `ceiling/copy` | nanoseconds, and operations or bytes |
//!
//! `PROTOHEAD_VARIANT` forces the variant of ops with a product: `plane`, or `cmma` or `wgmma` where they have the operands on tensor cores.

use std::collections::HashSet;
use std::io::{BufRead, Write, stdin, stdout};

use protohead_benches::{Case, Step, ceiling};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut checked = HashSet::new();
    let mut held: Option<(String, Step)> = None;
    for (seed, line) in stdin().lock().lines().enumerate() {
        let line = line?;
        let (id, how) = line.trim().split_once(' ').unwrap_or((line.trim(), ""));
        let answer = match (id, Case::named(id)) {
            ("ceiling/fma", _) => {
                format!(
                    "{} {}",
                    ceiling::multiply_adds().as_nanos(),
                    ceiling::flops()
                )
            }
            ("ceiling/copy", _) => {
                format!("{} {}", ceiling::copy().as_nanos(), ceiling::bytes())
            }
            (_, Some(case)) if how == "shape" => {
                let shape = case.shape;
                let sizes = [
                    shape.heads,
                    shape.rows,
                    shape.dim,
                    shape.classes,
                    shape.active,
                ];
                sizes.map(|size| size.to_string()).join(" ")
            }
            (_, Some(case)) => {
                if how != "memory" && checked.insert(id.to_owned()) {
                    case.check();
                }
                if how.is_empty() {
                    case.run(seed as u64, false).time.as_nanos().to_string()
                } else {
                    if held.as_ref().is_none_or(|(held, _)| held != id) {
                        drop(held.take()); // first, so that there is room
                        let step = case.step_of(seed as u64).ok_or("only ours is repeated")?;
                        held = Some((id.to_owned(), step));
                    }
                    let step = &mut held.as_mut().expect("it is there").1;
                    if how == "memory" {
                        let (operands, more) = step.memory();
                        format!("{operands} {more}")
                    } else {
                        step.repeat(2); // compiles, and finds the device awake
                        step.repeat(how.parse()?).as_nanos().to_string()
                    }
                }
            }
            (_, None) => return Err(format!("no such case: {id}").into()),
        };
        println!("{answer}");
        stdout().flush()?;
    }
    Ok(())
}
