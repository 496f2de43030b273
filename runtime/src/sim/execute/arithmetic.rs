//! What instructions compute, for all lanes of a warp at once. Every function is a match over operations, each a loop over
//! lanes that the compiler turns into vector instructions.

use super::super::numbers::{
    BF16, F16, F32, Format, TF32, add_to_odd, bf16_of, bit_field, bits_of, bits_of_f64, cosine, divide_to_odd, exp2,
    f16_bits, f16_value, f32_of, f32_of_bf16, find_bit, flush, log2, max_f32, max_f64, min_f32, min_f64, or_nan,
    permute, root_to_odd, round, sine, tanh, whole, whole_to_f64, whole_to_odd,
};
use super::super::program::{
    Binary32, Binary64, CompareKind, Comparison, Conversion, FloatMode, FloatOp, Narrow, NumberType, Rounding, Shift,
    Ternary32, Ternary64, Unary32, Unary64, Widen,
};
use super::super::shadow::LANES;

type W = [u32; LANES];
type D = [u64; LANES];

/// One value per lane. `std::array::from_fn` is not always inlined, and its loops then miss the vector instructions that
/// this is compiled for.
#[inline(always)]
pub(super) fn each_lane<R: Copy + Default>(value: impl Fn(usize) -> R) -> [R; LANES] {
    let mut values = [R::default(); LANES];
    for lane in 0..LANES {
        values[lane] = value(lane);
    }
    values
}

#[inline(always)]
fn map<A: Copy, R: Copy + Default>(a: &[A; LANES], f: impl Fn(A) -> R) -> [R; LANES] {
    each_lane(|lane| f(a[lane]))
}

#[inline(always)]
fn map2<A: Copy, B: Copy, R: Copy + Default>(a: &[A; LANES], b: &[B; LANES], f: impl Fn(A, B) -> R) -> [R; LANES] {
    each_lane(|lane| f(a[lane], b[lane]))
}

#[inline(always)]
fn map3<A: Copy, R: Copy + Default>(
    a: &[A; LANES],
    b: &[A; LANES],
    c: &[A; LANES],
    f: impl Fn(A, A, A) -> R,
) -> [R; LANES] {
    each_lane(|lane| f(a[lane], b[lane], c[lane]))
}

/// Sign-extends the lower 16 bits.
#[inline(always)]
fn s16(bits: u32) -> i32 {
    i32::from(bits as u16 as i16)
}

/// 16 bits of a result.
#[inline(always)]
fn h(value: i32) -> u32 {
    u32::from(value as u16)
}

#[inline(always)]
pub(super) fn unary32(op: Unary32, a: &W) -> W {
    use Unary32 as O;
    match op {
        O::Move => *a,
        O::Not => map(a, |a| !a),
        O::Not16 => map(a, |a| !a & 0xffff),
        O::Negate => map(a, u32::wrapping_neg),
        O::Negate16 => map(a, |a| a.wrapping_neg() & 0xffff),
        O::Absolute => map(a, |a| (a as i32).wrapping_abs() as u32),
        O::Absolute16 => map(a, |a| h(s16(a).wrapping_abs())),
        O::PopulationCount => map(a, u32::count_ones),
        O::LeadingZeros => map(a, u32::leading_zeros),
        O::FindU => map(a, |a| find_bit(u64::from(a), 32, false)),
        O::FindS => map(a, |a| find_bit(u64::from(a), 32, true)),
        O::FindShiftU => map(a, |a| shift_amount(find_bit(u64::from(a), 32, false), 31)),
        O::FindShiftS => map(a, |a| shift_amount(find_bit(u64::from(a), 32, true), 31)),
        O::Reverse => map(a, u32::reverse_bits),
        O::NegateF => map(a, |a| a ^ 0x8000_0000),
        O::AbsoluteF => map(a, |a| a & 0x7fff_ffff),
        O::Reciprocal => map(a, |a| bits_of(1.0 / f32_of(a))),
        O::Root => map(a, |a| bits_of(f32_of(a).sqrt())),
        O::ReciprocalRoot => map(a, |a| bits_of((1.0 / f64::from(f32_of(a)).sqrt()) as f32)),
        O::Exp2 => map(a, |a| bits_of(exp2(f32_of(a)))),
        O::Log2 => map(a, |a| bits_of(log2(f32_of(a)))),
        O::Sine => map(a, |a| bits_of(sine(f32_of(a)))),
        O::Cosine => map(a, |a| bits_of(cosine(f32_of(a)))),
        O::Tanh => map(a, |a| bits_of(tanh(f32_of(a)))),
        O::Exp2Bf16 => map(a, |a| bf16_of(bits_of(exp2(f32_of_bf16(a))))),
        O::TanhBf16 => map(a, |a| bf16_of(bits_of(tanh(f32_of_bf16(a))))),
        O::U32ToF32 => map(a, |a| (a as f32).to_bits()),
        O::S32ToF32 => map(a, |a| (a as i32 as f32).to_bits()),
        O::F32ToU32 => map(a, |a| f32_of(a) as u32),
        O::F32ToS32 => map(a, |a| f32_of(a) as i32 as u32),
        O::F32ToBf16 => map(a, bf16_of),
        O::Bf16ToF32 => map(a, |a| bits_of(f32_of_bf16(a))),
        O::SignExtend8 => map(a, |a| i32::from(a as u8 as i8) as u32),
        O::SignExtend16 => map(a, |a| s16(a) as u32),
        O::ZeroExtend8 => map(a, |a| a & 0xff),
        O::ZeroExtend16 => map(a, |a| a & 0xffff),
    }
}

#[inline(always)]
fn shift_amount(position: u32, last: u32) -> u32 {
    if position == u32::MAX { position } else { last - position }
}

#[inline(always)]
pub(super) fn binary32(op: Binary32, a: &W, b: &W) -> W {
    use Binary32 as O;
    match op {
        O::Add => map2(a, b, u32::wrapping_add),
        O::Subtract => map2(a, b, u32::wrapping_sub),
        O::Multiply => map2(a, b, u32::wrapping_mul),
        O::MultiplyHighU => map2(a, b, |a, b| ((u64::from(a) * u64::from(b)) >> 32) as u32),
        O::MultiplyHighS => map2(a, b, |a, b| ((i64::from(a as i32) * i64::from(b as i32)) >> 32) as u32),
        // What a GPU gives for a division by zero is not specified; this is what they do.
        O::DivideU => map2(a, b, |a, b| a.checked_div(b).unwrap_or(u32::MAX)),
        O::DivideS => map2(a, b, |a, b| if b == 0 { u32::MAX } else { (a as i32).wrapping_div(b as i32) as u32 }),
        O::RemainderU => map2(a, b, |a, b| a.checked_rem(b).unwrap_or(a)),
        O::RemainderS => map2(a, b, |a, b| if b == 0 { a } else { (a as i32).wrapping_rem(b as i32) as u32 }),
        O::MinU => map2(a, b, u32::min),
        O::MinS => map2(a, b, |a, b| (a as i32).min(b as i32) as u32),
        O::MaxU => map2(a, b, u32::max),
        O::MaxS => map2(a, b, |a, b| (a as i32).max(b as i32) as u32),
        O::And => map2(a, b, |a, b| a & b),
        O::Or => map2(a, b, |a, b| a | b),
        O::Xor => map2(a, b, |a, b| a ^ b),
        O::ShiftLeft => map2(a, b, |a, b| if b > 31 { 0 } else { a << (b & 31) }),
        O::ShiftRightU => map2(a, b, |a, b| if b > 31 { 0 } else { a >> (b & 31) }),
        O::ShiftRightS => map2(a, b, |a, b| (a as i32 >> b.min(31)) as u32),
        O::Add16 => map2(a, b, |a, b| a.wrapping_add(b) & 0xffff),
        O::Subtract16 => map2(a, b, |a, b| a.wrapping_sub(b) & 0xffff),
        O::Multiply16 => map2(a, b, |a, b| a.wrapping_mul(b) & 0xffff),
        O::MultiplyHighU16 => map2(a, b, |a, b| ((a & 0xffff) * (b & 0xffff)) >> 16),
        O::MultiplyHighS16 => map2(a, b, |a, b| h((s16(a) * s16(b)) >> 16)),
        O::DivideS16 => map2(a, b, |a, b| if b == 0 { 0xffff } else { h(s16(a).wrapping_div(s16(b))) }),
        O::RemainderS16 => map2(a, b, |a, b| if b == 0 { a } else { h(s16(a).wrapping_rem(s16(b))) }),
        O::MinS16 => map2(a, b, |a, b| h(s16(a).min(s16(b)))),
        O::MaxS16 => map2(a, b, |a, b| h(s16(a).max(s16(b)))),
        O::ShiftLeft16 => map2(a, b, |a, b| if b > 15 { 0 } else { a << (b & 15) & 0xffff }),
        O::ShiftRightS16 => map2(a, b, |a, b| h(s16(a) >> b.min(15))),
        O::MultiplyWideU16 => map2(a, b, |a, b| (a & 0xffff) * (b & 0xffff)),
        O::MultiplyWideS16 => map2(a, b, |a, b| (s16(a) * s16(b)) as u32),
        O::AddF => map2(a, b, |a, b| bits_of(f32_of(a) + f32_of(b))),
        O::SubtractF => map2(a, b, |a, b| bits_of(f32_of(a) - f32_of(b))),
        O::MultiplyF => map2(a, b, |a, b| bits_of(f32_of(a) * f32_of(b))),
        O::DivideF => map2(a, b, |a, b| bits_of(f32_of(a) / f32_of(b))),
        O::MinF => map2(a, b, min_f32),
        O::MaxF => map2(a, b, max_f32),
        O::MinNanF => map2(a, b, |a, b| or_nan(a, b, min_f32)),
        O::MaxNanF => map2(a, b, |a, b| or_nan(a, b, max_f32)),
        O::PackBf16 => map2(a, b, |a, b| bf16_of(a) << 16 | bf16_of(b)),
        O::PackF16 => map2(a, b, |a, b| f16_of(a) << 16 | f16_of(b)),
    }
}

/// The nearest f16 of an f32.
fn f16_of(bits: u32) -> u32 {
    f16_bits(round(f64::from(f32_of(bits)), F16, Rounding::NearestEven))
}

#[inline(always)]
pub(super) fn ternary32(op: Ternary32, a: &W, b: &W, c: &W) -> W {
    use Ternary32 as O;
    match op {
        O::MultiplyAdd => map3(a, b, c, |a, b, c| a.wrapping_mul(b).wrapping_add(c)),
        O::MultiplyAddHighU => map3(a, b, c, |a, b, c| (((u64::from(a) * u64::from(b)) >> 32) as u32).wrapping_add(c)),
        O::MultiplyAddHighS => {
            map3(a, b, c, |a, b, c| (((i64::from(a as i32) * i64::from(b as i32)) >> 32) as u32).wrapping_add(c))
        }
        O::MultiplyAdd16 => map3(a, b, c, |a, b, c| a.wrapping_mul(b).wrapping_add(c) & 0xffff),
        O::MultiplyAddWideU16 => map3(a, b, c, |a, b, c| ((a & 0xffff) * (b & 0xffff)).wrapping_add(c)),
        O::MultiplyAddWideS16 => map3(a, b, c, |a, b, c| ((s16(a) * s16(b)) as u32).wrapping_add(c)),
        O::FusedMultiplyAdd => map3(a, b, c, |a, b, c| bits_of(f32_of(a).mul_add(f32_of(b), f32_of(c)))),
        O::Permute => map3(a, b, c, permute),
        O::BitFieldExtractU => map3(a, b, c, |a, b, c| bit_field(u64::from(a), b, c, 32, false) as u32),
        O::BitFieldExtractS => map3(a, b, c, |a, b, c| bit_field(u64::from(a), b, c, 32, true) as u32),
        O::FunnelLeftWrap => map3(a, b, c, |a, b, c| funnel_left(a, b, c & 31)),
        O::FunnelLeftClamp => map3(a, b, c, |a, b, c| funnel_left(a, b, c.min(32))),
        O::FunnelRightWrap => map3(a, b, c, |a, b, c| funnel_right(a, b, c & 31)),
        O::FunnelRightClamp => map3(a, b, c, |a, b, c| funnel_right(a, b, c.min(32))),
    }
}

/// The upper half of the 64 bits `b:a`, shifted left.
#[inline(always)]
fn funnel_left(a: u32, b: u32, bits: u32) -> u32 {
    ((u64::from(b) << 32 | u64::from(a)) << bits >> 32) as u32
}

/// The lower half of the 64 bits `b:a`, shifted right.
#[inline(always)]
fn funnel_right(a: u32, b: u32, bits: u32) -> u32 {
    ((u64::from(b) << 32 | u64::from(a)) >> bits) as u32
}

/// Any function of three bits, at each place: bit `4 a + 2 b + c` of the table.
#[inline(always)]
pub(super) fn lop3(table: u8, a: &W, b: &W, c: &W) -> W {
    let term = |index: u8| if table >> index & 1 == 1 { u32::MAX } else { 0 };
    let terms: [u32; 8] = std::array::from_fn(|index| term(index as u8));
    map3(a, b, c, |a, b, c| {
        let pick = |bits: u32, one: u32, zero: u32| bits & one | !bits & zero;
        let high = pick(b, pick(c, terms[7], terms[6]), pick(c, terms[5], terms[4]));
        let low = pick(b, pick(c, terms[3], terms[2]), pick(c, terms[1], terms[0]));
        pick(a, high, low)
    })
}

#[inline(always)]
pub(super) fn unary64(op: Unary64, a: &D) -> D {
    use Unary64 as O;
    let f = f64::from_bits;
    match op {
        O::Move => *a,
        O::Not => map(a, |a| !a),
        O::Negate => map(a, u64::wrapping_neg),
        O::Absolute => map(a, |a| (a as i64).wrapping_abs() as u64),
        O::Reverse => map(a, u64::reverse_bits),
        O::NegateF => map(a, |a| a ^ 1 << 63),
        O::AbsoluteF => map(a, |a| a & !(1 << 63)),
        O::ReciprocalF => map(a, |a| bits_of_f64(1.0 / f(a))),
        O::RootF => map(a, |a| bits_of_f64(f(a).sqrt())),
    }
}

#[inline(always)]
pub(super) fn binary64(op: Binary64, a: &D, b: &D) -> D {
    use Binary64 as O;
    let f = f64::from_bits;
    match op {
        O::Add => map2(a, b, u64::wrapping_add),
        O::Subtract => map2(a, b, u64::wrapping_sub),
        O::Multiply => map2(a, b, u64::wrapping_mul),
        O::MultiplyHighU => map2(a, b, |a, b| ((u128::from(a) * u128::from(b)) >> 64) as u64),
        O::MultiplyHighS => map2(a, b, |a, b| ((i128::from(a as i64) * i128::from(b as i64)) >> 64) as u64),
        O::DivideU => map2(a, b, |a, b| a.checked_div(b).unwrap_or(u64::MAX)),
        O::DivideS => map2(a, b, |a, b| if b == 0 { u64::MAX } else { (a as i64).wrapping_div(b as i64) as u64 }),
        O::RemainderU => map2(a, b, |a, b| a.checked_rem(b).unwrap_or(a)),
        O::RemainderS => map2(a, b, |a, b| if b == 0 { a } else { (a as i64).wrapping_rem(b as i64) as u64 }),
        O::MinU => map2(a, b, u64::min),
        O::MinS => map2(a, b, |a, b| (a as i64).min(b as i64) as u64),
        O::MaxU => map2(a, b, u64::max),
        O::MaxS => map2(a, b, |a, b| (a as i64).max(b as i64) as u64),
        O::And => map2(a, b, |a, b| a & b),
        O::Or => map2(a, b, |a, b| a | b),
        O::Xor => map2(a, b, |a, b| a ^ b),
        O::AddF => map2(a, b, |a, b| bits_of_f64(f(a) + f(b))),
        O::SubtractF => map2(a, b, |a, b| bits_of_f64(f(a) - f(b))),
        O::MultiplyF => map2(a, b, |a, b| bits_of_f64(f(a) * f(b))),
        O::DivideF => map2(a, b, |a, b| bits_of_f64(f(a) / f(b))),
        O::MinF => map2(a, b, min_f64),
        O::MaxF => map2(a, b, max_f64),
    }
}

#[inline(always)]
pub(super) fn ternary64(op: Ternary64, a: &D, b: &D, c: &D) -> D {
    use Ternary64 as O;
    let f = f64::from_bits;
    match op {
        O::MultiplyAdd => map3(a, b, c, |a, b, c| a.wrapping_mul(b).wrapping_add(c)),
        O::MultiplyAddHighU => {
            map3(a, b, c, |a, b, c| (((u128::from(a) * u128::from(b)) >> 64) as u64).wrapping_add(c))
        }
        O::MultiplyAddHighS => {
            map3(a, b, c, |a, b, c| (((i128::from(a as i64) * i128::from(b as i64)) >> 64) as u64).wrapping_add(c))
        }
        O::FusedMultiplyAddF => map3(a, b, c, |a, b, c| bits_of_f64(f(a).mul_add(f(b), f(c)))),
    }
}

#[inline(always)]
pub(super) fn shift64(op: Shift, a: &D, b: &W) -> D {
    match op {
        Shift::Left => map2(a, b, |a, b: u32| if b > 63 { 0 } else { a << b }),
        Shift::RightU => map2(a, b, |a, b: u32| if b > 63 { 0 } else { a >> b }),
        Shift::RightS => map2(a, b, |a, b: u32| (a as i64 >> b.min(63)) as u64),
    }
}

#[inline(always)]
pub(super) fn widen(op: Widen, a: &W) -> D {
    match op {
        Widen::Zero => map(a, u64::from),
        Widen::Sign => map(a, |a| i64::from(a as i32) as u64),
        Widen::F32ToF64 => map(a, |a| bits_of_f64(f64::from(f32_of(a)))),
    }
}

#[inline(always)]
pub(super) fn narrow(op: Narrow, a: &D) -> W {
    match op {
        Narrow::Low => map(a, |a| a as u32),
        Narrow::PopulationCount => map(a, u64::count_ones),
        Narrow::LeadingZeros => map(a, u64::leading_zeros),
        Narrow::FindU => map(a, |a| find_bit(a, 64, false)),
        Narrow::FindS => map(a, |a| find_bit(a, 64, true)),
        Narrow::FindShiftU => map(a, |a| shift_amount(find_bit(a, 64, false), 63)),
        Narrow::FindShiftS => map(a, |a| shift_amount(find_bit(a, 64, true), 63)),
        Narrow::F64ToF32 => map(a, |a| bits_of(f64::from_bits(a) as f32)),
    }
}

#[inline(always)]
pub(super) fn multiply_wide(signed: bool, a: &W, b: &W) -> D {
    if signed {
        map2(a, b, |a: u32, b: u32| (i64::from(a as i32) * i64::from(b as i32)) as u64)
    } else {
        map2(a, b, |a: u32, b: u32| u64::from(a) * u64::from(b))
    }
}

/// Lanes where the comparison holds.
#[inline(always)]
pub(super) fn compare32(kind: CompareKind, comparison: Comparison, a: &W, b: &W) -> u32 {
    match kind {
        CompareKind::S32 => lanes(|lane| holds(comparison, &(a[lane] as i32), &(b[lane] as i32))),
        CompareKind::S16 => lanes(|lane| holds(comparison, &s16(a[lane]), &s16(b[lane]))),
        CompareKind::F32 => lanes(|lane| holds(comparison, &f32_of(a[lane]), &f32_of(b[lane]))),
        CompareKind::F32Flush => lanes(|lane| holds(comparison, &f32_of(flush(a[lane])), &f32_of(flush(b[lane])))),
        _ => lanes(|lane| holds(comparison, &a[lane], &b[lane])),
    }
}

/// As [`compare32`], for 64 bits.
#[inline(always)]
pub(super) fn compare64(kind: CompareKind, comparison: Comparison, a: &D, b: &D) -> u32 {
    match kind {
        CompareKind::S64 => lanes(|lane| holds(comparison, &(a[lane] as i64), &(b[lane] as i64))),
        CompareKind::F64 => lanes(|lane| holds(comparison, &f64::from_bits(a[lane]), &f64::from_bits(b[lane]))),
        _ => lanes(|lane| holds(comparison, &a[lane], &b[lane])),
    }
}

#[inline(always)]
fn lanes(condition: impl Fn(usize) -> bool) -> u32 {
    let mut lanes = 0;
    for lane in 0..LANES {
        lanes |= u32::from(condition(lane)) << lane;
    }
    lanes
}

#[inline(always)]
fn holds<T: PartialOrd>(comparison: Comparison, a: &T, b: &T) -> bool {
    let numbers = a.partial_cmp(b).is_some();
    match comparison {
        Comparison::Equal => a == b,
        // Ordered, as all comparisons without `u` are.
        Comparison::NotEqual => numbers & (a != b),
        Comparison::Less => a < b,
        Comparison::LessEqual => a <= b,
        Comparison::Greater => a > b,
        Comparison::GreaterEqual => a >= b,
        Comparison::EqualOrNan => !numbers | (a == b),
        Comparison::NotEqualOrNan => a != b,
        Comparison::LessOrNan => !numbers | (a < b),
        Comparison::LessEqualOrNan => !numbers | (a <= b),
        Comparison::GreaterOrNan => !numbers | (a > b),
        Comparison::GreaterEqualOrNan => !numbers | (a >= b),
        Comparison::Numbers => numbers,
        Comparison::Nan => !numbers,
    }
}

/// f32 arithmetic with every qualifier, one lane after the other.
pub(super) fn float32(op: FloatOp, mode: FloatMode, a: &W, b: &W, c: &W) -> W {
    std::array::from_fn(|lane| {
        let source = |bits: u32| if mode.flush { flush(bits) } else { bits };
        let (a, b, c) = (source(a[lane]), source(b[lane]), source(c[lane]));
        let wide = |bits: u32| f64::from(f32_of(bits));
        // Sums of two numbers with many bits between them are kept exact enough for any rounding.
        let rounded = |value: f64| bits_of(round(value, F32, mode.rounding) as f32);
        let sum = |x: f64, y: f64| {
            // The sum of opposite numbers is 0, or -0 when rounding down.
            if x == -y && x.is_finite() && x.is_sign_negative() != y.is_sign_negative() {
                return if mode.rounding == Rounding::Down { 0x8000_0000 } else { 0 };
            }
            rounded(add_to_odd(x, y))
        };
        let result = match op {
            FloatOp::Add => sum(wide(a), wide(b)),
            FloatOp::Subtract => sum(wide(a), -wide(b)),
            FloatOp::Multiply => rounded(wide(a) * wide(b)),
            FloatOp::FusedMultiplyAdd => sum(wide(a) * wide(b), wide(c)),
            FloatOp::Divide => rounded(divide_to_odd(wide(a), wide(b))),
            FloatOp::Min => min_f32(a, b),
            FloatOp::Max => max_f32(a, b),
            FloatOp::MinNan => or_nan(a, b, min_f32),
            FloatOp::MaxNan => or_nan(a, b, max_f32),
            FloatOp::Negate => a ^ 0x8000_0000,
            FloatOp::Absolute => a & 0x7fff_ffff,
            FloatOp::Reciprocal => rounded(divide_to_odd(1.0, wide(a))),
            FloatOp::Root => rounded(root_to_odd(wide(a))),
            FloatOp::ReciprocalRoot => bits_of((1.0 / wide(a).sqrt()) as f32),
            FloatOp::Exp2 => bits_of(exp2(f32_of(a))),
            FloatOp::Log2 => bits_of(log2(f32_of(a))),
            FloatOp::Sine => bits_of(sine(f32_of(a))),
            FloatOp::Cosine => bits_of(cosine(f32_of(a))),
        };
        let result = if mode.flush { flush(result) } else { result };
        if mode.saturate { saturate(result) } else { result }
    })
}

/// Between 0 and 1; a NaN becomes 0.
fn saturate(bits: u32) -> u32 {
    let value = f32_of(bits);
    if value > 1.0 {
        1.0f32.to_bits()
    } else if value > 0.0 {
        bits
    } else {
        0
    }
}

/// bf16 arithmetic: one number in the lower half, or two.
pub(super) fn bf16(op: FloatOp, packed: bool, relu: bool, a: &W, b: &W, c: &W) -> W {
    let one = |a: u32, b: u32, c: u32| {
        let (x, y, z) = (a << 16, b << 16, c << 16);
        let wide = |bits: u32| f64::from(f32_of(bits));
        let rounded = |value: f64| bf16_of(bits_of(round(value, BF16, Rounding::NearestEven) as f32));
        let result = match op {
            FloatOp::Add => rounded(add_to_odd(wide(x), wide(y))),
            FloatOp::Subtract => rounded(add_to_odd(wide(x), -wide(y))),
            FloatOp::Multiply => rounded(wide(x) * wide(y)),
            FloatOp::FusedMultiplyAdd => rounded(add_to_odd(wide(x) * wide(y), wide(z))),
            FloatOp::Min => min_f32(x, y) >> 16,
            FloatOp::Max => max_f32(x, y) >> 16,
            FloatOp::MinNan => or_nan(x, y, min_f32) >> 16,
            FloatOp::MaxNan => or_nan(x, y, max_f32) >> 16,
            FloatOp::Negate => bf16_of(x ^ 0x8000_0000),
            FloatOp::Absolute => bf16_of(x & 0x7fff_ffff),
            _ => unreachable!("the decoder makes no other operation of bf16"),
        };
        // .relu: negative results become 0, a NaN stays.
        if relu && result & 0x8000 != 0 && result & 0x7fff <= 0x7f80 { 0 } else { result & 0xffff }
    };
    std::array::from_fn(|lane| {
        let (a, b, c) = (a[lane], b[lane], c[lane]);
        let low = one(a & 0xffff, b & 0xffff, c & 0xffff);
        if packed { one(a >> 16, b >> 16, c >> 16) << 16 | low } else { low }
    })
}

/// The bits of a converted number, as many as its type has.
pub(super) fn convert(conversion: Conversion, bits: u64) -> u64 {
    use NumberType as N;
    let Conversion { from, to, rounding, flush: flushes, .. } = conversion;
    let source = match from {
        N::U8 => Number::Whole(i128::from(bits as u8)),
        N::S8 => Number::Whole(i128::from(bits as i8)),
        N::U16 => Number::Whole(i128::from(bits as u16)),
        N::S16 => Number::Whole(i128::from(bits as i16)),
        N::U32 => Number::Whole(i128::from(bits as u32)),
        N::S32 => Number::Whole(i128::from(bits as i32)),
        N::U64 => Number::Whole(i128::from(bits)),
        N::S64 => Number::Whole(i128::from(bits as i64)),
        N::F16 => Number::Float(f16_value(bits as u32)),
        N::Bf16 => Number::Float(f64::from(f32_of_bf16(bits as u32))),
        N::F32 | N::Tf32 if flushes => Number::Float(f64::from(f32_of(flush(bits as u32)))),
        N::F32 | N::Tf32 => Number::Float(f64::from(f32_of(bits as u32))),
        N::F64 => Number::Float(f64::from_bits(bits)),
    };
    let limits = |bits: u32, signed: bool| {
        if signed { (-(1i128 << (bits - 1)), (1i128 << (bits - 1)) - 1) } else { (0, (1i128 << bits) - 1) }
    };
    let number = |bits: u32, signed: bool| {
        let (least, greatest) = limits(bits, signed);
        let value = match source {
            // Between whole numbers the upper bits are dropped, unless the result is to saturate.
            Number::Whole(value) if conversion.saturate => value.clamp(least, greatest),
            Number::Whole(value) => value,
            Number::Float(value) if value.is_nan() => {
                if bits == 64 || from == N::F64 {
                    1 << (bits - 1)
                } else {
                    0
                }
            }
            Number::Float(value) => (whole(value, rounding) as i128).clamp(least, greatest),
        };
        (value & ((1i128 << bits) - 1)) as u64
    };
    let narrow = |format: Format| {
        let value = match source {
            Number::Whole(value) => whole_to_odd(value),
            Number::Float(value) if conversion.whole => whole(value, rounding),
            Number::Float(value) => value,
        };
        let rounded = if conversion.whole { value } else { round(value, format, rounding) };
        let saturated = match conversion.saturate {
            true if rounded.is_nan() => 0.0,
            true => rounded.clamp(0.0, 1.0),
            false => rounded,
        };
        if conversion.relu && saturated < 0.0 { 0.0 } else { saturated }
    };
    match to {
        N::U8 => number(8, false),
        N::S8 => number(8, true),
        N::U16 => number(16, false),
        N::S16 => number(16, true),
        N::U32 => number(32, false),
        N::S32 => number(32, true),
        N::U64 => number(64, false),
        N::S64 => number(64, true),
        N::F16 => u64::from(f16_bits(narrow(F16))),
        N::Bf16 => u64::from(bf16_of(bits_of(narrow(BF16) as f32))),
        N::Tf32 => u64::from(bits_of(narrow(TF32) as f32)),
        N::F32 => {
            let result = bits_of(narrow(F32) as f32);
            u64::from(if flushes { flush(result) } else { result })
        }
        N::F64 => {
            let value = match source {
                Number::Whole(value) => whole_to_f64(value, rounding),
                Number::Float(value) if conversion.whole => whole(value, rounding),
                Number::Float(value) => value,
            };
            let saturated = match conversion.saturate {
                true if value.is_nan() => 0.0,
                true => value.clamp(0.0, 1.0),
                false => value,
            };
            bits_of_f64(saturated)
        }
    }
}

#[derive(Clone, Copy)]
enum Number {
    Whole(i128),
    Float(f64),
}

/// Whether a type's results fill a wider register with copies of their sign.
pub(super) fn sign_extends(kind: NumberType) -> Option<u32> {
    match kind {
        NumberType::S8 => Some(8),
        NumberType::S16 => Some(16),
        NumberType::S32 => Some(32),
        _ => None,
    }
}
