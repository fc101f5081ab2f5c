//! Runs single cases on demand: a line `<group>/<shape>/<who>` or `ceiling/fma` on stdin, its nanoseconds on stdout. So that
//! another program can take turns with it on the same machine. A case is checked before its first run.

use std::collections::HashSet;
use std::io::{BufRead, Write, stdin, stdout};

use protohead_benches::{Case, ceiling};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut checked = HashSet::new();
    for (seed, line) in stdin().lock().lines().enumerate() {
        let line = line?;
        let id = line.trim();
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
            (_, Some(case)) => {
                if checked.insert(id.to_owned()) {
                    case.check();
                }
                case.run(seed as u64, false).time.as_nanos().to_string()
            }
            (_, None) => return Err(format!("no such case: {id}").into()),
        };
        println!("{answer}");
        stdout().flush()?;
    }
    Ok(())
}
