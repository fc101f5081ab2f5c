//! The PTX by which four planes multiply two slabs in shared memory.

use cubecl::ir::{ElemType, FloatKind};

use super::Tile;
use super::stage::{Lies, staged};
use super::warpgroup::ROWS;

/// Of the reduced axis, in one `wgmma` of 16 bits.
const DEEP: usize = 16;

/// What a descriptor says besides the address: how far matrices of eight rows by 16 bytes are apart (PTX ISA, "Matrix descriptor"), in
/// units of 16 bytes.
fn strides(lies: Lies, tile: Tile) -> usize {
    let pitch = tile.pitch(lies) / tile.piece();
    let (leading, stride) = match lies {
        Lies::Rows => (pitch, 8),
        Lies::Columns => (8, pitch),
    };
    leading << 16 | stride << 32
}

/// Where element `(row, k)` of a slab is, in units of 16 bytes.
fn pieces_to(row: usize, k: usize, lies: Lies, tile: Tile) -> usize {
    staged(0, row, k, lies, tile) / tile.piece()
}

/// The PTX that begins to multiply two slabs, whose addresses follow the sums.
pub(super) fn multiplication(left_lies: Lies, right_lies: Lies, tile: Tile) -> String {
    let sums = tile.results();
    let kind = match tile.packed {
        ElemType::Float(FloatKind::F16) => "f16",
        _ => "bf16",
    };
    let product = format!(
        "wgmma.mma_async.sync.aligned.m{ROWS}n{}k{DEEP}.f32.{kind}.{kind}",
        tile.side
    );
    let transposed = |lies| u32::from(lies == Lies::Columns);
    let last = format!(
        "1, 1, {}, {}",
        transposed(left_lies),
        transposed(right_lies)
    );
    let mut lines = vec![
        "{".to_owned(),
        ".reg .pred adds;".to_owned(),
        ".reg .b64 left, right, l, r;".to_owned(),
        "setp.eq.b32 adds, 0, 0;".to_owned(),
    ];
    for (operand, lies, address) in [
        ("left", left_lies, 2 * sums),
        ("right", right_lies, 2 * sums + 1),
    ] {
        lines.push(format!("cvt.u64.u32 {operand}, ${address};"));
        lines.push(format!("shr.u64 {operand}, {operand}, 4;"));
        lines.push(format!(
            "or.b64 {operand}, {operand}, {};",
            strides(lies, tile)
        ));
    }
    lines.push("wgmma.fence.sync.aligned;".to_owned());
    let each = sums * ROWS / tile.side;
    for k in (0..tile.depth).step_by(DEEP) {
        lines.push(format!(
            "add.s64 r, right, {};",
            pieces_to(0, k, right_lies, tile)
        ));
        for row in (0..tile.side).step_by(ROWS) {
            let first = row / ROWS * each;
            let registers: Vec<_> = (first..first + each).map(|sum| format!("${sum}")).collect();
            lines.push(format!(
                "add.s64 l, left, {};",
                pieces_to(row, k, left_lies, tile)
            ));
            lines.push(format!(
                "{product} {{{}}}, l, r, adds, {last};",
                registers.join(", ")
            ));
        }
    }
    lines.extend([
        "wgmma.commit_group.sync.aligned;".to_owned(),
        "}".to_owned(),
    ]);
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::super::of_every_engine;
    use super::super::results::{column_of, place_of, result_of, row_of};
    use super::super::stage::emulated::{element, stage};
    use super::super::{Engine, PLANE};
    use super::*;

    /// Where `wgmma` finds element `(row, k)` of an operand, in 16-bit elements: matrices of eight rows by 16 bytes, each 128 bytes without
    /// gaps, of rows of k or, transposed, of rows of the other axis (PTX ISA, "Strides" and "Canonical layouts", no swizzling).
    fn described(descriptor: u64, transposed: bool, row: usize, k: usize) -> usize {
        let bytes = |bit: u32| (descriptor >> bit & 0x3fff) as usize * 16;
        let (start, leading, stride) = (bytes(0), bytes(16), bytes(32));
        assert_eq!(descriptor >> 46, 0, "no offset of the base, no swizzling");
        let byte = start
            + row / 8 * stride
            + k / 8 * leading
            + if transposed {
                k % 8 * 16 + row % 8 * 2
            } else {
                row % 8 * 16 + k % 8 * 2
            };
        byte / 2
    }

    /// Runs the PTX: sums by the registers' numbers, of each unit. Both slabs begin at address 0 of their own memory.
    fn emulate(text: &str, left: &[f32], right: &[f32], tile: Tile) -> Vec<Vec<f32>> {
        let mut sums = vec![vec![0.0; tile.results()]; tile.units()];
        let mut registers: HashMap<String, u64> = HashMap::new();
        let (mut fenced, mut committed) = (false, false);
        for line in text.lines().filter(|line| line.ends_with(';')) {
            let line = line.trim_end_matches(';');
            let (instruction, operands) = line.split_once(' ').unwrap_or((line, ""));
            let list: Vec<_> = operands.split(", ").collect();
            let number = |operand: &str| operand.parse::<u64>().ok();
            match instruction {
                ".reg" => {}
                "setp.eq.b32" => assert_eq!(list, ["adds", "0", "0"]),
                "cvt.u64.u32" => {
                    let address = 2 * tile.results() + usize::from(list[0] == "right");
                    assert_eq!(list[1], format!("${address}"));
                    registers.insert(list[0].into(), 0);
                }
                "shr.u64" | "or.b64" | "add.s64" => {
                    let (from, by) = (registers[list[1]], number(list[2]).unwrap());
                    let result = match instruction {
                        "shr.u64" => from >> by,
                        "or.b64" => from | by,
                        _ => from + by,
                    };
                    registers.insert(list[0].into(), result);
                }
                "wgmma.fence.sync.aligned" => fenced = true,
                "wgmma.commit_group.sync.aligned" => committed = true,
                _ => {
                    assert!(fenced && !committed);
                    assert_eq!(
                        instruction,
                        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16"
                    );
                    let (named, rest) = operands[1..].split_once("}, ").unwrap();
                    let named: Vec<usize> = named
                        .split(", ")
                        .map(|sum| sum[1..].parse().unwrap())
                        .collect();
                    assert_eq!(named.len(), 64);
                    let rest: Vec<_> = rest.split(", ").collect();
                    assert_eq!(rest[2..5], ["adds", "1", "1"]);
                    let lefts = (registers[rest[0]], rest[5] == "1");
                    let rights = (registers[rest[1]], rest[6] == "1");
                    for (unit, sums) in sums.iter_mut().enumerate() {
                        for (d, &sum) in named.iter().enumerate() {
                            // "Register fragment layout for accumulator matrix D".
                            let row = unit / PLANE * 16 + unit % PLANE / 4 + d / 2 % 2 * 8;
                            let column = d / 4 * 8 + unit % 4 * 2 + d % 2;
                            for k in 0..16 {
                                let a = left[described(lefts.0, lefts.1, row, k)];
                                let b = right[described(rights.0, rights.1, column, k)];
                                sums[sum] += a * b;
                            }
                        }
                    }
                }
            }
        }
        assert!(committed);
        sums
    }

    /// What the PTX ISA says `wgmma` does, on the text that the kernel has and slabs as units copy them: the exact product.
    #[test]
    fn emulated_warpgroups_multiply_two_slabs() {
        for tile in of_every_engine()
            .into_iter()
            .filter(|tile| tile.engine == Engine::Wgmma)
        {
            for left_lies in [Lies::Rows, Lies::Columns] {
                for right_lies in [Lies::Rows, Lies::Columns] {
                    let left = stage(left_lies, tile);
                    let right = stage(right_lies, tile);
                    let text = multiplication(left_lies, right_lies, tile);
                    let sums = emulate(&text, &left, &right, tile);
                    for (unit, sums) in sums.iter().enumerate() {
                        let at = place_of(unit, tile);
                        for r in 0..tile.rows() {
                            for c in 0..tile.columns() {
                                let (row, column) = (row_of(&at, r, tile), column_of(&at, c, tile));
                                let product = |k| element(row, k) * element(column, k);
                                let expected: f32 = (0..tile.depth).map(product).sum();
                                assert_eq!(sums[result_of(r, c, tile)], expected, "unit {unit}");
                            }
                        }
                    }
                }
            }
        }
    }
}
