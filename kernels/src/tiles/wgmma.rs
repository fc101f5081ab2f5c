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
