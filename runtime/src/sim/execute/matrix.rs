//! Tensor-core products: `mma.sync` on fragments that a warp's registers hold (PTX ISA, "Matrix Fragments for mma").

use super::super::numbers::{bits_of, f16_value, f32_of};
use super::super::program::MatrixShape;
use super::super::shadow::LANES;

type W = [u32; LANES];

const COLUMNS: usize = 8;

/// `d = a b + c`: products and sums in f32, along k from the first to the last.
#[inline(always)]
pub(super) fn multiply(shape: MatrixShape, a: [&W; 4], b: [&W; 2], c: [&W; 4]) -> [W; 4] {
    let bf16 = |pair: u32| [f32_of(pair << 16), f32_of(pair & 0xffff_0000)];
    match shape {
        MatrixShape::Bf16K16 => product::<2, 2>(a, b, c, bf16),
        MatrixShape::Bf16K8 => product::<1, 2>(a, b, c, bf16),
        MatrixShape::F16K16 => {
            product::<2, 2>(a, b, c, |pair| [f16_value(pair & 0xffff) as f32, f16_value(pair >> 16) as f32])
        }
        // Of a tf32 the upper 19 bits count.
        MatrixShape::Tf32K8 => product::<2, 1>(a, b, c, |bits| [f32_of(bits & 0xffff_e000)]),
        MatrixShape::Tf32K4 => product::<1, 1>(a, b, c, |bits| [f32_of(bits & 0xffff_e000)]),
    }
}

/// The product for `PARTS` registers of B, whose words hold `N` elements, neighbours along k.
///
/// Lane `4 g + t` holds of A rows `g` (registers 0 and 2) and `g + 8` (1 and 3), of B column `g`: those elements that stand in
/// word `t` of four, in register `2 p` or `2 p + 1` of A and `p` of B the four words of part `p`. Of C and D it holds rows `g`
/// (registers 0 and 1) and `g + 8` (2 and 3), columns 2 t and 2 t + 1.
#[inline(always)]
fn product<const PARTS: usize, const N: usize>(
    a: [&W; 4],
    b: [&W; 2],
    c: [&W; 4],
    elements: impl Fn(u32) -> [f32; N],
) -> [W; 4] {
    // Rows of B: of part p, word t, element n.
    let mut right = [[[[0.0f32; COLUMNS]; N]; 4]; PARTS];
    for part in 0..PARTS {
        let words = unpack(b[part], &elements);
        for t in 0..4 {
            for n in 0..N {
                for g in 0..COLUMNS {
                    right[part][t][n][g] = words[n][4 * g + t];
                }
            }
        }
    }
    let mut d = [[0; LANES]; 4];
    for half in 0..2 {
        let (even, odd) = (c[2 * half], c[2 * half + 1]);
        let left: [[[f32; LANES]; N]; PARTS] = std::array::from_fn(|part| unpack(a[2 * part + half], &elements));
        for g in 0..8 {
            let mut sums = [0.0f32; COLUMNS];
            for t in 0..4 {
                sums[2 * t] = f32_of(even[4 * g + t]);
                sums[2 * t + 1] = f32_of(odd[4 * g + t]);
            }
            for part in 0..PARTS {
                for t in 0..4 {
                    for n in 0..N {
                        let factor = left[part][n][4 * g + t];
                        for column in 0..COLUMNS {
                            sums[column] = factor.mul_add(right[part][t][n][column], sums[column]);
                        }
                    }
                }
            }
            let bits = sums.map(bits_of);
            for t in 0..4 {
                d[2 * half][4 * g + t] = bits[2 * t];
                d[2 * half + 1][4 * g + t] = bits[2 * t + 1];
            }
        }
    }
    d
}

/// The elements of every lane's word.
#[inline(always)]
fn unpack<const N: usize>(words: &W, elements: &impl Fn(u32) -> [f32; N]) -> [[f32; LANES]; N] {
    let mut unpacked = [[0.0; LANES]; N];
    for lane in 0..LANES {
        let elements = elements(words[lane]);
        for n in 0..N {
            unpacked[n][lane] = elements[n];
        }
    }
    unpacked
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
