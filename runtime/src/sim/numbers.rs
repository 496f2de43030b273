//! Numbers as a GPU rounds them. Nothing here depends on the machine's mathematical library or on fused operations that the
//! text does not ask for, so that results are the same everywhere.

use super::program::Rounding;

/// The NaN that operations in f32 give.
const NAN_F32: u32 = 0x7fff_ffff;

/// The f32 in these bits.
#[inline(always)]
pub(super) fn f32_of(bits: u32) -> f32 {
    f32::from_bits(bits)
}

/// The bits of a result; every NaN has the same.
#[inline(always)]
pub(super) fn bits_of(value: f32) -> u32 {
    if value.is_nan() { NAN_F32 } else { value.to_bits() }
}

/// The bits of a result in double precision; every NaN has the same.
#[inline(always)]
pub(super) fn bits_of_f64(value: f64) -> u64 {
    if value.is_nan() { 0xfff8_0000_0000_0000 } else { value.to_bits() }
}

/// A subnormal number becomes zero of the same sign.
#[inline(always)]
pub(super) fn flush(bits: u32) -> u32 {
    if bits & 0x7f80_0000 == 0 { bits & 0x8000_0000 } else { bits }
}

/// The lesser; of a number and a NaN the number; -0 is less than 0.
#[inline(always)]
pub(super) fn min_f32(a: u32, b: u32) -> u32 {
    let (x, y) = (f32_of(a), f32_of(b));
    let lesser = if x < y {
        a
    } else if y < x {
        b
    } else {
        a | b
    };
    if x.is_nan() {
        bits_of(y)
    } else if y.is_nan() {
        a
    } else {
        lesser
    }
}

/// The greater; of a number and a NaN the number; 0 is greater than -0.
#[inline(always)]
pub(super) fn max_f32(a: u32, b: u32) -> u32 {
    let (x, y) = (f32_of(a), f32_of(b));
    let greater = if x > y {
        a
    } else if y > x {
        b
    } else {
        a & b
    };
    if x.is_nan() {
        bits_of(y)
    } else if y.is_nan() {
        a
    } else {
        greater
    }
}

/// NaN when either is, or else what `choose` gives.
#[inline(always)]
pub(super) fn or_nan(a: u32, b: u32, choose: impl Fn(u32, u32) -> u32) -> u32 {
    if f32_of(a).is_nan() | f32_of(b).is_nan() { NAN_F32 } else { choose(a, b) }
}

/// As [`min_f32`], in double precision.
pub(super) fn min_f64(a: u64, b: u64) -> u64 {
    let (x, y) = (f64::from_bits(a), f64::from_bits(b));
    let lesser = if x < y {
        a
    } else if y < x {
        b
    } else {
        a | b
    };
    if x.is_nan() {
        bits_of_f64(y)
    } else if y.is_nan() {
        a
    } else {
        lesser
    }
}

/// As [`max_f32`], in double precision.
pub(super) fn max_f64(a: u64, b: u64) -> u64 {
    let (x, y) = (f64::from_bits(a), f64::from_bits(b));
    let greater = if x > y {
        a
    } else if y > x {
        b
    } else {
        a & b
    };
    if x.is_nan() {
        bits_of_f64(y)
    } else if y.is_nan() {
        a
    } else {
        greater
    }
}

/// The f32 of a bf16 in the lower half.
#[inline(always)]
pub(super) fn f32_of_bf16(bits: u32) -> f32 {
    f32::from_bits(bits << 16)
}

/// The nearest bf16, ties to even; a NaN becomes 0x7fff.
#[inline(always)]
pub(super) fn bf16_of(bits: u32) -> u32 {
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if bits & 0x7fff_ffff > 0x7f80_0000 { 0x7fff } else { rounded }
}

/// 2^x, rounded once.
#[inline(always)]
pub(super) fn exp2(x: f32) -> f32 {
    /// ln(2)^k / k! for k from 11 to 0.
    const COEFFICIENTS: [f64; 12] = [
        4.445_538_271_870_811_6e-10,
        7.054_911_620_801_123e-9,
        1.017_808_600_923_969_9e-7,
        1.321_548_679_014_430_8e-6,
        1.525_273_380_405_984e-5,
        1.540_353_039_338_161e-4,
        1.333_355_814_642_844_3e-3,
        9.618_129_107_628_477e-3,
        5.550_410_866_482_158e-2,
        2.402_265_069_591_007e-1,
        std::f64::consts::LN_2,
        1.0,
    ];
    /// Added to a small number, it leaves the nearest whole number in the lowest bits.
    const SHIFT: f64 = 6_755_399_441_055_744.0;
    let wide = f64::from(x).clamp(-200.0, 200.0);
    let shifted = wide + SHIFT;
    let part = wide - (shifted - SHIFT);
    let mut polynomial = 0.0;
    for coefficient in COEFFICIENTS {
        polynomial = polynomial * part + coefficient;
    }
    let power = f64::from_bits(shifted.to_bits().wrapping_add(1023) << 52);
    if x.is_nan() { x } else { (polynomial * power) as f32 }
}

/// The binary logarithm, rounded once.
#[inline(always)]
pub(super) fn log2(x: f32) -> f32 {
    /// 2 / (ln 2 · k) for k = 21, 19, …, 1.
    const COEFFICIENTS: [f64; 11] = {
        let mut coefficients = [0.0; 11];
        let mut index = 0;
        while index < 11 {
            coefficients[index] = 2.0 * std::f64::consts::LOG2_E / (21 - 2 * index) as f64;
            index += 1;
        }
        coefficients
    };
    const MANTISSA: u64 = (1 << 52) - 1;
    let bits = f64::from(x).to_bits();
    let exponent = f64::from_bits(0x4330_0000_0000_0000 | (bits >> 52 & 0x7ff)) - (4_503_599_627_370_496.0 + 1023.0);
    let mantissa = f64::from_bits(bits & MANTISSA | 0x3ff0_0000_0000_0000);
    let large = mantissa > std::f64::consts::SQRT_2;
    let (mantissa, exponent) =
        (if large { mantissa * 0.5 } else { mantissa }, if large { exponent + 1.0 } else { exponent });
    // log2 m = 2 / ln 2 · (s + s³/3 + s⁵/5 + …) with s = (m - 1) / (m + 1).
    let s = (mantissa - 1.0) / (mantissa + 1.0);
    let square = s * s;
    let mut polynomial = 0.0;
    for coefficient in COEFFICIENTS {
        polynomial = polynomial * square + coefficient;
    }
    let result = (exponent + polynomial * s) as f32;
    let finite = if x == f32::INFINITY { x } else { result };
    let positive = if x == 0.0 { f32::NEG_INFINITY } else { finite };
    if x >= 0.0 { positive } else { f32::NAN }
}

/// The sine of an angle in radians, rounded once.
pub(super) fn sine(x: f32) -> f32 {
    f64::from(x).sin() as f32
}

/// The cosine of an angle in radians, rounded once.
pub(super) fn cosine(x: f32) -> f32 {
    f64::from(x).cos() as f32
}

/// The hyperbolic tangent, rounded once.
pub(super) fn tanh(x: f32) -> f32 {
    f64::from(x).tanh() as f32
}

/// A floating-point format of at most 32 bits.
#[derive(Clone, Copy)]
pub(super) struct Format {
    /// Bits of the mantissa that are stored.
    mantissa: i32,
    /// Exponent of the smallest normal number.
    least: i32,
    /// Exponent of the greatest numbers.
    greatest: i32,
}

pub(super) const F16: Format = Format { mantissa: 10, least: -14, greatest: 15 };
pub(super) const BF16: Format = Format { mantissa: 7, least: -126, greatest: 127 };
pub(super) const TF32: Format = Format { mantissa: 10, least: -126, greatest: 127 };
pub(super) const F32: Format = Format { mantissa: 23, least: -126, greatest: 127 };

/// The number of a format that an exact value, or one that is [rounded to odd](to_odd), is rounded to.
pub(super) fn round(value: f64, format: Format, rounding: Rounding) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    let exponent = ((value.to_bits() >> 52 & 0x7ff) as i32 - 1023).max(format.least);
    let unit = power_of_two(exponent - format.mantissa);
    let scaled = value.abs() / unit;
    let whole = scaled.floor();
    let rest = scaled - whole;
    let negative = value.is_sign_negative();
    let away = match rounding {
        Rounding::NearestEven => rest > 0.5 || rest == 0.5 && whole % 2.0 == 1.0,
        Rounding::NearestAway => rest >= 0.5,
        Rounding::Zero => false,
        Rounding::Down => rest > 0.0 && negative,
        Rounding::Up => rest > 0.0 && !negative,
    };
    let rounded = (whole + f64::from(u8::from(away))) * unit;
    let greatest = (2.0 - power_of_two(-format.mantissa)) * power_of_two(format.greatest);
    let limited = if rounded <= greatest {
        rounded
    } else {
        match rounding {
            Rounding::NearestEven | Rounding::NearestAway => f64::INFINITY,
            Rounding::Zero => greatest,
            Rounding::Down => {
                if negative {
                    f64::INFINITY
                } else {
                    greatest
                }
            }
            Rounding::Up => {
                if negative {
                    greatest
                } else {
                    f64::INFINITY
                }
            }
        }
    };
    limited.copysign(value)
}

fn power_of_two(exponent: i32) -> f64 {
    f64::from_bits(((exponent + 1023) as u64) << 52)
}

/// `nearest`, rounded to odd: when the exact value lies `beyond` it (the sign of the difference), the neighbour with an odd
/// last bit. Rounding that to a shorter format gives what rounding the exact value gives.
fn to_odd(nearest: f64, beyond: f64) -> f64 {
    if !nearest.is_finite() || beyond == 0.0 || beyond.is_nan() || nearest.to_bits() & 1 == 1 {
        nearest
    } else if beyond > 0.0 {
        nearest.next_up()
    } else {
        nearest.next_down()
    }
}

/// `a + b`, rounded to odd.
pub(super) fn add_to_odd(a: f64, b: f64) -> f64 {
    let sum = a + b;
    let other = sum - a;
    let error = (a - (sum - other)) + (b - other);
    to_odd(sum, error)
}

/// `a / b` of two f32, rounded to odd.
pub(super) fn divide_to_odd(a: f64, b: f64) -> f64 {
    let quotient = a / b;
    let rest = (-quotient).mul_add(b, a);
    to_odd(quotient, if b < 0.0 { -rest } else { rest })
}

/// `√a` of an f32, rounded to odd.
pub(super) fn root_to_odd(a: f64) -> f64 {
    let root = a.sqrt();
    to_odd(root, (-root).mul_add(root, a))
}

/// The bits of an f16 for a value that is one.
pub(super) fn f16_bits(value: f64) -> u32 {
    let sign = u32::from(value.is_sign_negative()) << 15;
    if value.is_nan() {
        return 0x7fff;
    }
    let magnitude = value.abs();
    if magnitude.is_infinite() {
        return sign | 0x7c00;
    }
    if magnitude < power_of_two(-14) {
        return sign | (magnitude * power_of_two(24)) as u32;
    }
    let bits = magnitude.to_bits();
    let exponent = (bits >> 52) as u32 - 1023 + 15;
    sign | exponent << 10 | (bits >> 42 & 0x3ff) as u32
}

/// The number in the bits of an f16.
pub(super) fn f16_value(bits: u32) -> f64 {
    let mantissa = f64::from(bits & 0x3ff);
    let magnitude = match bits >> 10 & 0x1f {
        0 => mantissa * power_of_two(-24),
        31 if mantissa == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        exponent => (1.0 + mantissa / 1024.0) * power_of_two(exponent as i32 - 15),
    };
    if bits & 0x8000 != 0 { -magnitude } else { magnitude }
}

/// A whole number, rounded to odd in double precision.
pub(super) fn whole_to_odd(number: i128) -> f64 {
    let nearest = number as f64;
    to_odd(nearest, (number - nearest as i128) as f64)
}

/// A whole number in double precision.
pub(super) fn whole_to_f64(number: i128, rounding: Rounding) -> f64 {
    let nearest = number as f64;
    let beyond = number - nearest as i128;
    match rounding {
        Rounding::Zero if (number > 0) == (beyond < 0) && beyond != 0 => {
            if number > 0 {
                nearest.next_down()
            } else {
                nearest.next_up()
            }
        }
        Rounding::Down if beyond < 0 => nearest.next_down(),
        Rounding::Up if beyond > 0 => nearest.next_up(),
        _ => nearest,
    }
}

/// The whole number that a value is rounded to, as a float.
pub(super) fn whole(value: f64, rounding: Rounding) -> f64 {
    match rounding {
        Rounding::NearestEven => value.round_ties_even(),
        Rounding::NearestAway => value.round(),
        Rounding::Zero => value.trunc(),
        Rounding::Down => value.floor(),
        Rounding::Up => value.ceil(),
    }
}

/// Bytes of `a` (numbers 0 to 3) and `b` (4 to 7), chosen by the lower four digits of `selection`; a digit of 8 or more
/// repeats the sign of the byte.
#[inline(always)]
pub(super) fn permute(a: u32, b: u32, selection: u32) -> u32 {
    let bytes = u64::from(b) << 32 | u64::from(a);
    let mut result = 0;
    for position in 0..4 {
        let digit = selection >> (4 * position) & 0xf;
        let byte = (bytes >> (8 * (digit & 7)) & 0xff) as u32;
        let byte = if digit & 8 != 0 { if byte & 0x80 != 0 { 0xff } else { 0 } } else { byte };
        result |= byte << (8 * position);
    }
    result
}

/// The field of `length` bits from bit `position` on, of a number of `bits` bits in the lower bits of `value`.
#[inline(always)]
pub(super) fn bit_field(value: u64, position: u32, length: u32, bits: u32, signed: bool) -> u64 {
    let (position, length) = (position & 0xff, length & 0xff);
    let last = (position + length).wrapping_sub(1).min(bits - 1);
    let sign = signed && length > 0 && value >> last & 1 == 1;
    let mut result = 0;
    for bit in 0..bits {
        let set = if bit < length && position + bit < bits { value >> (position + bit) & 1 == 1 } else { sign };
        result |= u64::from(set) << bit;
    }
    result
}

/// `b` with the lower `length` bits of `a` from bit `position` on.
#[inline(always)]
pub(super) fn insert_bits(a: u64, b: u64, position: u32, length: u32, bits: u32) -> u64 {
    let (position, length) = (position & 0xff, length & 0xff);
    if position >= bits || length == 0 {
        return b;
    }
    let field = if length >= 64 { u64::MAX } else { (1 << length) - 1 };
    b & !(field << position) | (a & field) << position
}

/// The position of the highest bit that is not the sign; `u32::MAX` if there is none.
#[inline(always)]
pub(super) fn find_bit(value: u64, bits: u32, signed: bool) -> u32 {
    let sign = signed && value >> (bits - 1) & 1 == 1;
    let value = if sign { !value & (u64::MAX >> (64 - bits)) } else { value };
    63u32.wrapping_sub(value.leading_zeros())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Distance in units of the last place; 0 for equal values and for two NaN.
    fn units(a: f32, b: f32) -> u32 {
        let ordered =
            |x: f32| if x.is_sign_negative() { -((x.to_bits() & 0x7fff_ffff) as i64) } else { i64::from(x.to_bits()) };
        if a.is_nan() && b.is_nan() { 0 } else { (ordered(a) - ordered(b)).unsigned_abs() as u32 }
    }

    #[test]
    fn exponential_and_logarithm_agree_with_double_precision() {
        for step in -1_600_000..1_400_000 {
            let x = step as f32 * 1e-4;
            let expected = f64::from(x).exp2() as f32;
            assert!(units(exp2(x), expected) <= 1, "2^{x}: {} instead of {expected}", exp2(x));
        }
        for bits in (1..0x7f80_0000u32).step_by(1009) {
            let x = f32::from_bits(bits);
            let expected = f64::from(x).log2() as f32;
            assert!(units(log2(x), expected) <= 1, "log2 {x}: {} instead of {expected}", log2(x));
        }
        assert_eq!((exp2(f32::INFINITY), exp2(f32::NEG_INFINITY), exp2(0.0)), (f32::INFINITY, 0.0, 1.0));
        assert!(exp2(f32::NAN).is_nan() && log2(-1.0).is_nan() && log2(f32::NAN).is_nan());
        assert_eq!((log2(0.0), log2(-0.0), log2(f32::INFINITY)), (f32::NEG_INFINITY, f32::NEG_INFINITY, f32::INFINITY));
        assert_eq!((log2(1.0), log2(8.0), exp2(10.0)), (0.0, 3.0, 1024.0));
    }

    #[test]
    fn rounding_to_shorter_formats() {
        use Rounding::{Down, NearestAway, NearestEven, Up, Zero};
        let third = 1.0 / 3.0;
        assert_eq!(round(third, F32, NearestEven), f64::from(1.0f32 / 3.0));
        assert!(round(third, F32, Zero) < third && round(third, F32, Up) > third);
        assert_eq!(round(-third, F32, Down), -round(third, F32, Up));
        // 1 + 2^-8 lies midway between two bf16.
        let tie = 1.0 + 1.0 / 256.0;
        assert_eq!((round(tie, BF16, NearestEven), round(tie, BF16, NearestAway)), (1.0, 1.0 + 1.0 / 128.0));
        assert_eq!((round(1e300, F32, NearestEven), round(1e300, F32, Zero)), (f64::INFINITY, f64::from(f32::MAX)));
        assert_eq!((round(1e-46, F32, NearestEven), round(1e-46, F32, Up)), (0.0, f64::from(f32::from_bits(1))));
        assert_eq!(round(65_519.0, F16, NearestEven), 65_504.0);
        assert_eq!(round(65_520.0, F16, NearestEven), f64::INFINITY);
        for bits in (0..=u32::MAX).step_by(65_521) {
            let value = f32::from_bits(bits);
            if !value.is_nan() {
                let by_formula = round(f64::from(value), BF16, NearestEven) as f32;
                assert_eq!(by_formula.to_bits() >> 16, bf16_of(bits), "{value}");
            }
        }
        for bits in 0..=0xffffu32 {
            let value = f16_value(bits);
            assert!(value.is_nan() || f16_bits(value) == bits, "{bits:x}");
        }
    }

    #[test]
    fn rounding_to_odd_keeps_what_a_second_rounding_needs() {
        // Midway between two f32, and a little more that double precision cannot hold.
        let sum = add_to_odd(1.0 + f64::powi(2.0, -24), f64::powi(2.0, -100));
        assert_eq!(round(sum, F32, Rounding::NearestEven), 1.0 + f64::powi(2.0, -23));
        let sum = add_to_odd(1.0 + f64::powi(2.0, -24), -f64::powi(2.0, -100));
        assert_eq!(round(sum, F32, Rounding::NearestEven), 1.0);
        assert_eq!(whole_to_f64((1 << 53) + 1, Rounding::Up), 9_007_199_254_740_994.0);
        assert_eq!(whole_to_f64(-(1 << 53) - 1, Rounding::Zero), -9_007_199_254_740_992.0);
    }

    #[test]
    fn bits_by_the_book() {
        assert_eq!(permute(0x3322_1100, 0x7766_5544, 0x7531), 0x7755_3311);
        assert_eq!(permute(0x0000_8000, 0, 0x0009), 0x0000_00ff);
        assert_eq!(bit_field(0xf0, 4, 4, 32, false), 0xf);
        assert_eq!(bit_field(0xf0, 4, 4, 32, true), 0xffff_ffff);
        assert_eq!(bit_field(0x8000_0000, 30, 8, 32, true), 0xffff_fffe);
        assert_eq!(bit_field(0x1234, 4, 0, 32, true), 0);
        assert_eq!(insert_bits(0xff, 0, 4, 4, 32), 0xf0);
        assert_eq!(insert_bits(0xff, 7, 32, 4, 32), 7);
        assert_eq!(
            (find_bit(0x10, 32, false), find_bit(0, 32, false), find_bit(0xffff_ffef, 32, true)),
            (4, u32::MAX, 4)
        );
    }
}
