//! Criterion's output as a table in Markdown: `table TARGET_FOLDER TITLE`, medians and ratios to protohead. `table device` says what
//! the benches measure on this machine: `cpu` or `cuda`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use protohead_benches::{Case, Who};
use serde_json::Value;

/// The median of a case in nanoseconds, if it was measured.
fn median(criterion: &Path, id: &str) -> Option<f64> {
    // Criterion's folders: the group, then the rest of the id with its slash replaced.
    let (group, rest) = id.split_once('/')?;
    let path = criterion
        .join(group)
        .join(rest.replace('/', "_"))
        .join("new/estimates.json");
    let estimates: Value = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    estimates["median"]["point_estimate"].as_f64()
}

fn time(nanoseconds: f64) -> String {
    match nanoseconds {
        t if t < 1e6 => format!("{:.0} µs", t / 1e3),
        t if t < 1e9 => format!("{:.3} ms", t / 1e6),
        t => format!("{:.2} s", t / 1e9),
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (target, title) = match (arguments.next(), arguments.next()) {
        (Some(target), Some(title)) => (target, title),
        (Some(word), None) if word == "device" => {
            println!("{}", protohead_benches::device_name());
            return Ok(());
        }
        _ => return Err("usage: table TARGET_FOLDER TITLE, or table device".into()),
    };
    let criterion = PathBuf::from(target).join("criterion");
    let fma =
        median(&criterion, "ceiling/fma").map(|ns| protohead_benches::ceiling::flops() as f64 / ns);
    let copy = median(&criterion, "ceiling/copy")
        .map(|ns| protohead_benches::ceiling::bytes() as f64 / ns);
    println!("# {title}\n");
    println!(
        "Medians of `cargo bench`; in brackets the ratio to protohead. `naive` is the reference, plain loops in f64 on one core. The\nmachine's ceilings, from the same run:"
    );
    println!(
        "{:.0} GFLOP/s of multiply-adds that touch no memory, {:.1} GB/s read and written by a copy.\n",
        fma.unwrap_or(f64::NAN),
        copy.unwrap_or(f64::NAN)
    );
    println!("| op | shape | protohead | of the ceiling | others |");
    println!("|---|---|---|---|---|");
    let mut lines: BTreeMap<usize, (Case, Vec<(Case, f64)>)> = BTreeMap::new();
    for (at, case) in Case::all().into_iter().enumerate() {
        let Some(time) = median(&criterion, &case.to_string()) else {
            continue;
        };
        let same = |other: &Case| other.group == case.group && other.shape == case.shape;
        let line = lines
            .iter()
            .find(|(_, (first, _))| same(first))
            .map_or(at, |(&line, _)| line);
        let entry = lines.entry(line).or_insert((case, Vec::new()));
        entry.1.push((case, time));
    }
    let mut without_ours = 0;
    for (case, times) in lines.values() {
        let of_us = times.iter().find(|(case, _)| case.who == Who::Protohead);
        let Some(&(_, ours)) = of_us else {
            without_ours += 1;
            continue;
        };
        let share = match (case.group.flops(&case.shape), case.group.bytes(&case.shape)) {
            (Some(flops), _) => {
                fma.map(|fma| format!("{:.0} % of FMA", 100.0 * flops as f64 / ours / fma))
            }
            (None, Some(bytes)) => {
                copy.map(|copy| format!("{:.0} % of copy", 100.0 * bytes as f64 / ours / copy))
            }
            (None, None) => None,
        };
        let others: Vec<String> = times
            .iter()
            .filter(|(case, _)| case.who != Who::Protohead)
            .map(|(case, t)| format!("{} {} ({:.1}×)", case.who.name(), time(*t), t / ours))
            .collect();
        println!(
            "| {} | {} | {} | {} | {} |",
            case.group.name(),
            case.shape.name,
            time(ours),
            share.unwrap_or_default(),
            others.join(", ")
        );
    }
    let measured: usize = lines.values().map(|(_, times)| times.len()).sum();
    let all = Case::all().len();
    if measured < all || without_ours > 0 {
        eprintln!(
            "table: {measured} of {all} cases were measured, and {without_ours} lines left out for want of protohead's own"
        );
    }
    Ok(())
}
