//! Tensor-core products: `mma.sync` on fragments that a warp's registers hold (PTX ISA, "Matrix Fragments for mma").

use super::super::numbers::{bits_of, f16_value, f32_of, f32_of_bf16};
use super::super::program::MatrixShape;
use super::super::shadow::LANES;

type W = [u32; LANES];

const ROWS: usize = 16;
const COLUMNS: usize = 8;

/// `d = a b + c`: products and sums in f32, along k from the first to the last.
#[inline(always)]
pub(super) fn multiply(shape: MatrixShape, a: [&W; 4], b: [&W; 2], c: [&W; 4]) -> [W; 4] {
    match shape {
        MatrixShape::Bf16K16 => halves::<16>(a, b, c, f32_of_bf16),
        MatrixShape::Bf16K8 => halves::<8>(a, b, c, f32_of_bf16),
        MatrixShape::F16K16 => halves::<16>(a, b, c, |bits| f16_value(bits) as f32),
        MatrixShape::Tf32K8 => words::<8>(a, b, c),
        MatrixShape::Tf32K4 => words::<4>(a, b, c),
    }
}

/// Elements of 16 bits, two neighbours along k in a register. Lane `4 g + t` holds of A rows `g` (registers 0 and 2) and
/// `g + 8` (1 and 3) at k = 2 t (0 and 1) and 2 t + 8 (2 and 3); of B column `g` at k = 2 t (0) and 2 t + 8 (1).
#[inline(always)]
fn halves<const K: usize>(a: [&W; 4], b: [&W; 2], c: [&W; 4], number: impl Fn(u32) -> f32) -> [W; 4] {
    let mut left = [[0.0; ROWS]; K];
    let mut right = [[0.0; COLUMNS]; K];
    for lane in 0..LANES {
        let (g, t) = (lane / 4, lane % 4);
        for part in 0..K / 8 {
            let k = 2 * t + 8 * part;
            for half in 0..2 {
                let pair = a[2 * part + half][lane];
                left[k][g + 8 * half] = number(pair & 0xffff);
                left[k + 1][g + 8 * half] = number(pair >> 16);
            }
            right[k][g] = number(b[part][lane] & 0xffff);
            right[k + 1][g] = number(b[part][lane] >> 16);
        }
    }
    product(&left, &right, c)
}

/// Elements of 32 bits of which the upper 19 count. Lane `4 g + t` holds of A rows `g` (registers 0 and 2) and `g + 8` (1
/// and 3) at k = t (0 and 1) and t + 4 (2 and 3); of B column `g` at k = t (0) and t + 4 (1).
#[inline(always)]
fn words<const K: usize>(a: [&W; 4], b: [&W; 2], c: [&W; 4]) -> [W; 4] {
    let number = |bits: u32| f32_of(bits & 0xffff_e000);
    let mut left = [[0.0; ROWS]; K];
    let mut right = [[0.0; COLUMNS]; K];
    for lane in 0..LANES {
        let (g, t) = (lane / 4, lane % 4);
        for part in 0..K / 4 {
            for half in 0..2 {
                left[t + 4 * part][g + 8 * half] = number(a[2 * part + half][lane]);
            }
            right[t + 4 * part][g] = number(b[part][lane]);
        }
    }
    product(&left, &right, c)
}

/// Lane `4 g + t` holds of C and D rows `g` (registers 0 and 1) and `g + 8` (2 and 3), columns 2 t and 2 t + 1.
#[inline(always)]
fn product<const K: usize>(left: &[[f32; ROWS]; K], right: &[[f32; COLUMNS]; K], c: [&W; 4]) -> [W; 4] {
    let mut sums = [[0.0f32; COLUMNS]; ROWS];
    for lane in 0..LANES {
        let (g, t) = (lane / 4, lane % 4);
        for register in 0..4 {
            sums[g + 8 * (register / 2)][2 * t + register % 2] = f32_of(c[register][lane]);
        }
    }
    for row in 0..ROWS {
        let mut sum = sums[row];
        for k in 0..K {
            for column in 0..COLUMNS {
                sum[column] = left[k][row].mul_add(right[k][column], sum[column]);
            }
        }
        sums[row] = sum;
    }
    let mut d = [[0; LANES]; 4];
    for lane in 0..LANES {
        let (g, t) = (lane / 4, lane % 4);
        for register in 0..4 {
            d[register][lane] = bits_of(sums[g + 8 * (register / 2)][2 * t + register % 2]);
        }
    }
    d
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A by B for elements that a function of (row, k) and (k, column) gives, against a plain triple loop.
    fn check(shape: MatrixShape, depth: usize, per_word: usize, encode: impl Fn(f32) -> u32) {
        let left = |row: usize, k: usize| ((row * 7 + k * 3) % 11) as f32 - 5.0;
        let right = |k: usize, column: usize| ((k * 5 + column * 2) % 9) as f32 - 4.0;
        let word = |elements: [f32; 2]| {
            if per_word == 2 { encode(elements[1]) << 16 | encode(elements[0]) } else { encode(elements[0]) }
        };
        let parts = depth / (4 * per_word);
        let (mut a, mut b, mut c) = ([[0; LANES]; 4], [[0; LANES]; 2], [[0; LANES]; 4]);
        for lane in 0..LANES {
            let (g, t) = (lane / 4, lane % 4);
            for part in 0..parts {
                let k = t * per_word + 4 * per_word * part;
                for half in 0..2 {
                    a[2 * part + half][lane] = word([left(g + 8 * half, k), left(g + 8 * half, k + 1)]);
                }
                b[part][lane] = word([right(k, g), right(k + 1, g)]);
            }
            for register in 0..4 {
                c[register][lane] = (register as f32 + lane as f32).to_bits();
            }
        }
        let d = multiply(shape, a.each_ref(), b.each_ref(), c.each_ref());
        for lane in 0..LANES {
            for register in 0..4 {
                let (row, column) = (lane / 4 + 8 * (register / 2), 2 * (lane % 4) + register % 2);
                let sum: f32 = (0..depth).map(|k| left(row, k) * right(k, column)).sum();
                assert_eq!(f32_of(d[register][lane]), sum + register as f32 + lane as f32, "{shape:?} {row} {column}");
            }
        }
    }

    #[test]
    fn fragments_lie_where_the_instruction_set_says() {
        check(MatrixShape::Bf16K16, 16, 2, |x| x.to_bits() >> 16);
        check(MatrixShape::Bf16K8, 8, 2, |x| x.to_bits() >> 16);
        check(MatrixShape::F16K16, 16, 2, |x| super::super::super::numbers::f16_bits(f64::from(x)));
        check(MatrixShape::Tf32K8, 8, 1, f32::to_bits);
        check(MatrixShape::Tf32K4, 4, 1, f32::to_bits);
    }
}
