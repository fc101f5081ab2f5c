//! Instructions that compute with a unit's own registers. A register holds its bits, zeros above them.

use std::cmp::Ordering;

use half::{bf16, f16};

use super::instruction::Operand;

/// What an instruction does to registers.
pub(super) type Compute = Box<dyn Fn(&mut [u64]) + Send + Sync>;

/// The size of a type.
pub(super) fn bytes(of: &str) -> Result<usize, String> {
    match of {
        "b16" | "u16" | "s16" | "f16" | "bf16" => Ok(2),
        "b32" | "u32" | "s32" | "f32" => Ok(4),
        "b64" | "u64" | "s64" => Ok(8),
        _ => Err(format!("{of} is not known")),
    }
}

pub(super) fn copied(to: usize, from: Operand) -> Compute {
    Box::new(move |r| r[to] = from.of(r))
}

/// A value in pieces, the lowest first.
pub(super) fn unpacked(to: Vec<usize>, from: Operand, bytes: usize) -> Compute {
    let bits = 8 * bytes / to.len();
    Box::new(move |r| {
        let value = from.of(r);
        for (piece, &to) in to.iter().enumerate() {
            r[to] = value >> (piece * bits) & ((1 << bits) - 1);
        }
    })
}

/// A value of pieces, the lowest first.
pub(super) fn packed(to: usize, from: Vec<Operand>, bytes: usize) -> Compute {
    let bits = 8 * bytes / from.len();
    Box::new(move |r| {
        let pieces = from.iter().rev();
        r[to] = pieces.fold(0, |value, piece| {
            value << bits | piece.of(r) & ((1 << bits) - 1)
        });
    })
}

fn f(value: u64) -> f32 {
    f32::from_bits(value as u32)
}

fn bits(value: f32) -> u64 {
    value.to_bits().into()
}

fn unary(to: usize, a: Operand, op: impl Fn(u64) -> u64 + Send + Sync + 'static) -> Compute {
    Box::new(move |r| r[to] = op(a.of(r)))
}

fn binary(
    to: usize,
    [a, b]: [Operand; 2],
    op: impl Fn(u64, u64) -> u64 + Send + Sync + 'static,
) -> Compute {
    Box::new(move |r| r[to] = op(a.of(r), b.of(r)))
}

fn ternary(
    to: usize,
    [a, b, c]: [Operand; 3],
    op: impl Fn(u64, u64, u64) -> u64 + Send + Sync + 'static,
) -> Compute {
    Box::new(move |r| r[to] = op(a.of(r), b.of(r), c.of(r)))
}

/// The sum of a product and a third, exact but for one rounding down.
fn fma_down(a: f32, b: f32, c: f32) -> f32 {
    // The product of two f32 is exact in f64; what the sum leaves out is found as Knuth does.
    let (product, c) = (f64::from(a) * f64::from(b), f64::from(c));
    let sum = product + c;
    let part = sum - product;
    let rest = (product - (sum - part)) + (c - part);
    let nearest = sum as f32;
    let above = f64::from(nearest) > sum || (f64::from(nearest) == sum && rest < 0.0);
    if above { nearest.next_down() } else { nearest }
}

/// Rounded to TF32's ten bits, halves away from zero.
fn tf32(value: f32) -> u64 {
    match value.is_finite() {
        true => u64::from((value.to_bits() + 0x1000) & !0x1fff),
        false => bits(value),
    }
}

/// `2^x` without subnormals. The hardware's is off by two units in the last place at most.
fn exp2_flushed(x: f32) -> f32 {
    let flushed = |v: f32| {
        if v.is_subnormal() {
            0.0f32.copysign(v)
        } else {
            v
        }
    };
    flushed(f64::from(flushed(x)).exp2() as f32)
}

const M32: u64 = 0xffff_ffff;

fn s(value: u64) -> i64 {
    i64::from(value as u32 as i32)
}

/// An instruction by the parts of its name.
pub(super) fn compute(parts: &[&str], to: usize, from: &[Operand]) -> Result<Compute, String> {
    let one = || -> Result<Operand, String> { from.first().copied().ok_or("no operand".into()) };
    let two = || -> Result<[Operand; 2], String> {
        from.try_into().map_err(|_| "expected two operands".into())
    };
    let three = || -> Result<[Operand; 3], String> {
        from.try_into()
            .map_err(|_| "expected three operands".into())
    };
    let of = parts[parts.len() - 1];
    let how: Vec<&str> = parts[1..parts.len() - 1].to_vec();
    let is_known = match (parts[0], of) {
        ("add" | "sub" | "mul", "f32") => how.is_empty() || how == ["rn"],
        ("div" | "rcp" | "sqrt", "f32") => how == ["rn"],
        ("fma", _) => how == ["rn"] || how == ["rm"],
        ("mul" | "mad", _) => how == ["lo"] || how == ["wide"] || how == ["hi"],
        ("setp", _) => how.len() == 1,
        ("ex2" | "cvt", _) => true, // by all of it, below
        _ => how.is_empty(),
    };
    if !is_known {
        return Err("this way is not known".into());
    }
    Ok(match (parts[0], of) {
        ("mov", "b32" | "u32" | "s32" | "f32") => unary(to, one()?, |a| a & M32),
        ("mov", _) => copied(to, one()?),
        ("add", "f32") => binary(to, two()?, |a, b| bits(f(a) + f(b))),
        ("sub", "f32") => binary(to, two()?, |a, b| bits(f(a) - f(b))),
        ("mul", "f32") => binary(to, two()?, |a, b| bits(f(a) * f(b))),
        ("div", "f32") if parts[1] == "rn" => binary(to, two()?, |a, b| bits(f(a) / f(b))),
        ("max", "f32") => binary(to, two()?, |a, b| bits(f(a).max(f(b)))),
        ("min", "f32") => binary(to, two()?, |a, b| bits(f(a).min(f(b)))),
        ("neg", "f32") => unary(to, one()?, |a| a ^ 0x8000_0000),
        ("abs", "f32") => unary(to, one()?, |a| a & 0x7fff_ffff),
        ("rcp", "f32") if parts[1] == "rn" => unary(to, one()?, |a| bits(1.0 / f(a))),
        ("sqrt", "f32") if parts[1] == "rn" => unary(to, one()?, |a| bits(f(a).sqrt())),
        ("ex2", "f32") if parts[1..] == ["approx", "ftz", "f32"] => {
            unary(to, one()?, |a| bits(exp2_flushed(f(a))))
        }
        ("fma", "f32") => match parts[1] {
            "rn" => ternary(to, three()?, |a, b, c| bits(f(a).mul_add(f(b), f(c)))),
            "rm" => ternary(to, three()?, |a, b, c| bits(fma_down(f(a), f(b), f(c)))),
            _ => return Err("this rounding is not known".into()),
        },
        ("selp", "b32" | "u32" | "s32" | "f32") => {
            ternary(to, three()?, |a, b, p| (if p != 0 { a } else { b }) & M32)
        }
        ("selp", _) => ternary(to, three()?, |a, b, p| if p != 0 { a } else { b }),
        ("setp", _) => comparison(parts[1], of, to, two()?)?,
        ("cvt", _) => conversion(&parts[1..], to, from)?,
        ("and", "b32") => binary(to, two()?, |a, b| a & b & M32),
        ("or", "b32") => binary(to, two()?, |a, b| (a | b) & M32),
        ("xor", "b32") => binary(to, two()?, |a, b| (a ^ b) & M32),
        ("and", "b64" | "pred") => binary(to, two()?, |a, b| a & b),
        ("or", "b64" | "pred") => binary(to, two()?, |a, b| a | b),
        ("xor", "b64" | "pred") => binary(to, two()?, |a, b| a ^ b),
        ("not", "pred") => unary(to, one()?, |a| a ^ 1),
        ("not", "b32") => unary(to, one()?, |a| !a & M32),
        ("add", "s32" | "u32") => binary(to, two()?, |a, b| a.wrapping_add(b) & M32),
        ("sub", "s32" | "u32") => binary(to, two()?, |a, b| a.wrapping_sub(b) & M32),
        ("neg", "s32") => unary(to, one()?, |a| a.wrapping_neg() & M32),
        ("add", "s64" | "u64") => binary(to, two()?, u64::wrapping_add),
        ("sub", "s64" | "u64") => binary(to, two()?, u64::wrapping_sub),
        ("mul", "s32" | "u32") if parts[1] == "lo" => {
            binary(to, two()?, |a, b| a.wrapping_mul(b) & M32)
        }
        ("mul", "u32") if parts[1] == "hi" => {
            binary(to, two()?, |a, b| ((a & M32) * (b & M32)) >> 32)
        }
        ("mul", "u32") if parts[1] == "wide" => binary(to, two()?, |a, b| (a & M32) * (b & M32)),
        ("mul", "s32") if parts[1] == "wide" => {
            binary(to, two()?, |a, b| s(a).wrapping_mul(s(b)) as u64)
        }
        ("mul", "s64" | "u64") if parts[1] == "lo" => binary(to, two()?, u64::wrapping_mul),
        ("mad", "s32" | "u32") if parts[1] == "lo" => ternary(to, three()?, |a, b, c| {
            a.wrapping_mul(b).wrapping_add(c) & M32
        }),
        ("mad", "u32") if parts[1] == "wide" => ternary(to, three()?, |a, b, c| {
            ((a & M32) * (b & M32)).wrapping_add(c)
        }),
        ("mad", "s64" | "u64") if parts[1] == "lo" => {
            ternary(to, three()?, |a, b, c| a.wrapping_mul(b).wrapping_add(c))
        }
        // A GPU gives ones for a division by zero.
        ("div", "u32") => binary(to, two()?, |a, b| {
            (a & M32).checked_div(b & M32).unwrap_or(M32)
        }),
        ("rem", "u32") => binary(to, two()?, |a, b| {
            (a & M32).checked_rem(b & M32).unwrap_or(a)
        }),
        ("div", "u64") => binary(to, two()?, |a, b| a.checked_div(b).unwrap_or(u64::MAX)),
        ("rem", "u64") => binary(to, two()?, |a, b| a.checked_rem(b).unwrap_or(a)),
        ("min", "u32") => binary(to, two()?, |a, b| (a & M32).min(b & M32)),
        ("max", "u32") => binary(to, two()?, |a, b| (a & M32).max(b & M32)),
        ("min", "u64") => binary(to, two()?, u64::min),
        ("max", "u64") => binary(to, two()?, u64::max),
        ("shl", "b32") => binary(to, two()?, |a, b| match b & M32 {
            b @ 0..32 => a << b & M32,
            _ => 0,
        }),
        ("shl", "b64") => binary(to, two()?, |a, b| match b & M32 {
            b @ 0..64 => a << b,
            _ => 0,
        }),
        ("shr", "u32" | "b32") => binary(to, two()?, |a, b| match b & M32 {
            b @ 0..32 => (a & M32) >> b,
            _ => 0,
        }),
        ("shr", "s32") => binary(to, two()?, |a, b| (s(a) >> (b & M32).min(31)) as u64 & M32),
        ("shr", "u64" | "b64") => binary(to, two()?, |a, b| match b & M32 {
            b @ 0..64 => a >> b,
            _ => 0,
        }),
        ("bfe", "u32" | "u64") => ternary(to, three()?, |a, from, count| {
            let (from, count) = (from & 0xff, count & 0xff);
            a.checked_shr(from as u32).unwrap_or(0)
                & 1u64.checked_shl(count as u32).unwrap_or(0).wrapping_sub(1)
        }),
        _ => return Err("this instruction is not known".into()),
    })
}

fn comparison(how: &str, of: &str, to: usize, from: [Operand; 2]) -> Result<Compute, String> {
    if of == "f32" {
        // And whether it holds with a NaN.
        let (holds, unordered): (fn(Ordering) -> bool, bool) = match how {
            "eq" => (Ordering::is_eq, false),
            "ne" => (Ordering::is_ne, false),
            "lt" => (Ordering::is_lt, false),
            "le" => (Ordering::is_le, false),
            "gt" => (Ordering::is_gt, false),
            "ge" => (Ordering::is_ge, false),
            "equ" => (Ordering::is_eq, true),
            "neu" => (Ordering::is_ne, true),
            "ltu" => (Ordering::is_lt, true),
            "leu" => (Ordering::is_le, true),
            "gtu" => (Ordering::is_gt, true),
            "geu" => (Ordering::is_ge, true),
            "num" => (|_| true, false),
            "nan" => (|_| false, true),
            _ => return Err("this comparison is not known".into()),
        };
        return Ok(binary(to, from, move |a, b| {
            f(a).partial_cmp(&f(b)).map_or(unordered, holds).into()
        }));
    }
    let value: fn(u64) -> i128 = match of {
        "s32" => |v| s(v).into(),
        "s64" => |v| (v as i64).into(),
        "u16" | "b16" => |v| (v & 0xffff).into(),
        "u32" | "b32" => |v| (v & M32).into(),
        "u64" | "b64" => |v| v.into(),
        _ => return Err("this comparison is not known".into()),
    };
    let holds: fn(&i128, &i128) -> bool = match how {
        "eq" => i128::eq,
        "ne" => i128::ne,
        "lt" => i128::lt,
        "le" => i128::le,
        "gt" => i128::gt,
        "ge" => i128::ge,
        _ => return Err("this comparison is not known".into()),
    };
    Ok(binary(to, from, move |a, b| {
        holds(&value(a), &value(b)).into()
    }))
}

fn conversion(how: &[&str], to: usize, from: &[Operand]) -> Result<Compute, String> {
    let half = |value: u64| u64::from(f16::from_f32(f(value)).to_bits());
    let brain = |value: u64| u64::from(bf16::from_f32(f(value)).to_bits());
    let Some(&a) = from.first() else {
        return Err("no operand".into());
    };
    Ok(match (how, from) {
        (["f32", "f16"], _) => unary(to, a, |a| bits(f16::from_bits(a as u16).to_f32())),
        (["f32", "bf16"], _) => unary(to, a, |a| bits(bf16::from_bits(a as u16).to_f32())),
        (["rn", "f16", "f32"], _) => unary(to, a, half),
        (["rn", "bf16", "f32"], _) => unary(to, a, brain),
        // The first operand comes to the upper half.
        (["rn", "f16x2", "f32"], &[a, b]) => {
            binary(to, [a, b], move |a, b| half(a) << 16 | half(b))
        }
        (["rn", "bf16x2", "f32"], &[a, b]) => {
            binary(to, [a, b], move |a, b| brain(a) << 16 | brain(b))
        }
        (["rna", "tf32", "f32"], _) => unary(to, a, |a| tf32(f(a))),
        (["sat", "f32", "f32"], _) => unary(to, a, |a| match f(a) {
            a if a.is_nan() => 0,
            a => bits(a.clamp(0.0, 1.0)),
        }),
        (["rzi", "u32", "f32"], _) => unary(to, a, |a| u64::from(f(a) as u32)),
        (["rn", "f32", "u32"], _) => unary(to, a, |a| bits((a & M32) as f32)),
        (["rn", "f32", "s32"], _) => unary(to, a, |a| bits(s(a) as f32)),
        (["u64", "u32"] | ["u32", "u64"], _) => unary(to, a, |a| a & M32),
        (["s64", "s32"], _) => unary(to, a, |a| s(a) as u64),
        _ => return Err("this conversion is not known".into()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_is_rounded_down() {
        for (a, b, c, down) in [
            (1.0, 1.0, 1e-9, 1.0),
            (1.0, 1.0, -1e-9, 1f32.next_down()),
            // Less than f64 has room for.
            (1.0, 1.0, 1e-30, 1.0),
            (1.0, 1.0, -1e-30, 1f32.next_down()),
            (-1.0, 1.0, -1e-30, (-1f32).next_down()),
            (3.0, 0.5, 12_582_912.0, 12_582_913.0),
            (-3.0, 0.5, 12_582_912.0, 12_582_910.0),
        ] {
            assert_eq!(fma_down(a, b, c), down, "{a} {b} {c}");
        }
    }

    #[test]
    fn tf32_has_ten_bits() {
        assert_eq!(tf32(1.0 + 2f32.powi(-11)), bits(1.0 + 2f32.powi(-10)));
        assert_eq!(tf32(1.0 + 2f32.powi(-12)), bits(1.0));
        assert_eq!(tf32(-1.0 - 2f32.powi(-11)), bits(-1.0 - 2f32.powi(-10)));
        assert_eq!(tf32(f32::INFINITY), bits(f32::INFINITY));
    }
}
