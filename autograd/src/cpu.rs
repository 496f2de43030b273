//! What the operators' CPU ways share: vector arithmetic.
//!
//! Loops that run inside [`simd`] are compiled for the widest vectors that the processor at hand has. The elementary
//! functions here are branch-free polynomials, so that such loops vectorise; each states its error.

use half::bf16;

/// Runs `function` with the processor's widest vectors. The loops to be vectorised must be inlined into it.
#[inline(always)]
pub(crate) fn simd<R>(function: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(function)
}

/// Widens bf16 to f32, exactly.
pub(crate) fn widen(narrow: &[bf16], wide: &mut [f32]) {
    simd(
        #[inline(always)]
        || {
            for (wide, narrow) in wide.iter_mut().zip(narrow) {
                *wide = widen_one(*narrow);
            }
        },
    );
}

/// One bf16 as f32, exactly.
#[inline(always)]
pub(crate) fn widen_one(narrow: bf16) -> f32 {
    f32::from_bits(u32::from(narrow.to_bits()) << 16)
}

/// Interleaved parts in which sums are formed: two of the widest vectors.
const PARTS: usize = 32;

/// The sum of all parts, halves first: a chain of five additions, which takes far less time than one of 32.
#[inline(always)]
fn fold(parts: &[f32; PARTS]) -> f32 {
    let sixteen: [f32; 16] = std::array::from_fn(|i| parts[i] + parts[i + 16]);
    across(&sixteen)
}

/// The sum of 16 lanes, halves first.
#[inline(always)]
pub(crate) fn across(lanes: &[f32; 16]) -> f32 {
    let eight: [f32; 8] = std::array::from_fn(|i| lanes[i] + lanes[i + 8]);
    let four: [f32; 4] = std::array::from_fn(|i| eight[i] + eight[i + 4]);
    (four[0] + four[2]) + (four[1] + four[3])
}

/// `Σ a[i] b[i]` of equally long slices, summed in interleaved parts that are added in a fixed order.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    dot_widened(a, b, |b| b)
}

/// As [`dot`], with the second factor in bf16.
#[inline(always)]
pub(crate) fn dot_bf16(a: &[f32], b: &[bf16]) -> f32 {
    dot_widened(a, b, widen_one)
}

#[inline(always)]
fn dot_widened<T: Copy>(a: &[f32], b: &[T], widen: impl Fn(T) -> f32) -> f32 {
    const SHORT: usize = 8;
    let mut sums = [0.0; PARTS];
    let (a_chunks, b_chunks) = (a.chunks_exact(PARTS), b.chunks_exact(PARTS));
    let (a_rest, b_rest) = (a_chunks.remainder().chunks_exact(SHORT), b_chunks.remainder().chunks_exact(SHORT));
    let last: f32 = a_rest.remainder().iter().zip(b_rest.remainder()).map(|(a, b)| a * widen(*b)).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        for part in 0..PARTS {
            sums[part] += a[part] * widen(b[part]);
        }
    }
    for (a, b) in a_rest.zip(b_rest) {
        for part in 0..SHORT {
            sums[part] += a[part] * widen(b[part]);
        }
    }
    fold(&sums) + last
}

/// The sum of a slice, formed in interleaved parts that are added in a fixed order.
#[inline(always)]
pub(crate) fn total(values: &[f32]) -> f32 {
    let mut sums = [0.0; PARTS];
    let chunks = values.chunks_exact(PARTS);
    let rest: f32 = chunks.remainder().iter().sum();
    for chunk in chunks {
        for (sum, value) in sums.iter_mut().zip(chunk) {
            *sum += value;
        }
    }
    fold(&sums) + rest
}

/// The greatest element; NaN if there is one, minus infinity if there is none.
#[inline(always)]
pub(crate) fn maximum(values: &[f32]) -> f32 {
    // Comparisons with NaN are false: a NaN in `b` is taken, and one in `a` is kept.
    let greater = |a: f32, b: f32| if a >= b || a.is_nan() { a } else { b };
    let mut greatest = [f32::NEG_INFINITY; PARTS];
    let chunks = values.chunks_exact(PARTS);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (greatest, value) in greatest.iter_mut().zip(chunk) {
            *greatest = greater(*greatest, *value);
        }
    }
    greatest.iter().chain(rest).fold(f32::NEG_INFINITY, |a, b| greater(a, *b))
}

/// `ln Σ e^(factor · x)` over a row of logits, without overflow, in two parts: rounding their sum would cost large logits
/// the digits that their probabilities depend on.
#[derive(Clone, Copy)]
pub(crate) struct LogSumExp {
    /// The greatest `factor · x`; NaN if any is.
    greatest: f32,
    /// `ln Σ e^(factor · x - greatest)`: at least 0, at most the logarithm of the row's length.
    rest: f32,
}

impl LogSumExp {
    /// The sum is formed in f64 over blocks, since a vocabulary is long.
    #[inline(always)]
    pub(crate) fn of(logits: &[f32], factor: f32) -> Self {
        let greatest = maximum(logits) * factor;
        let mut sum = 0.0f64;
        for block in logits.chunks(32 * PARTS) {
            let mut sums = [0.0f32; PARTS];
            let chunks = block.chunks_exact(PARTS);
            let rest: f32 = chunks.remainder().iter().map(|logit| exp(logit * factor - greatest)).sum();
            for chunk in chunks {
                for (sum, logit) in sums.iter_mut().zip(chunk) {
                    *sum += exp(logit * factor - greatest);
                }
            }
            sum += f64::from(fold(&sums) + rest);
        }
        Self { greatest, rest: sum.ln() as f32 }
    }

    /// The logarithm of the probability of `scaled`, one of the row's `factor · x`.
    #[inline(always)]
    pub(crate) fn log_probability(self, scaled: f32) -> f32 {
        (scaled - self.greatest) - self.rest
    }
}

/// e^x with a relative error of at most 2 ulp; 0 below -103.9, infinity above 88.7, NaN for NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 in two parts: the first has trailing zeros, so its product with an integer is exact (Cody and Waite).
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // Adding and subtracting 1.5·2²³ rounds to the nearest integer without a library call.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x > 89.0 { 89.0 } else { x };
    let clamped = if clamped < -104.0 { -104.0 } else { clamped };
    let shifted = clamped * LOG2_E + ROUND;
    let exponent = shifted - ROUND;
    let r = (clamped - exponent * LN_2_HIGH) - exponent * LN_2_LOW;
    let polynomial = 1.987_569_1e-4f32;
    let polynomial = polynomial * r + 1.398_199_9e-3;
    let polynomial = polynomial * r + 8.333_452e-3;
    let polynomial = polynomial * r + 4.166_579_6e-2;
    let polynomial = polynomial * r + 1.666_666_6e-1;
    let polynomial = polynomial * r + 0.5;
    let mantissa = (polynomial * r * r + r) + 1.0;
    // Two factors, so that results in the denormal range and the last one before infinity come out right.
    let integer = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = integer >> 1;
    let first = f32::from_bits(((half + 127) as u32) << 23);
    let second = f32::from_bits(((integer - half + 127) as u32) << 23);
    mantissa * first * second
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `ln(1 + e^x)` with a relative error of at most 4 ulp. Above 20 it is x itself, to the last bit.
#[inline(always)]
pub(crate) fn softplus(x: f32) -> f32 {
    let positive = if x > 0.0 { x } else { 0.0 };
    positive + ln_1p_up_to_one(exp(-x.abs()))
}

/// `ln(1 + x)` for x from 0 to 1, with a relative error of at most 2 ulp; NaN for NaN.
#[inline(always)]
pub(crate) fn ln_1p_up_to_one(x: f32) -> f32 {
    // ln((1 + s) / (1 - s)) = 2 (s + s³/3 + s⁵/5 + …) with s = x / (2 + x), at most 1/3; the last coefficients carry
    // the truncated tail.
    let s = x / (2.0 + x);
    let square = s * s;
    let polynomial = 0.0999f32;
    let polynomial = polynomial * square + 1.0 / 9.0;
    let polynomial = polynomial * square + 1.0 / 7.0;
    let polynomial = polynomial * square + 1.0 / 5.0;
    let polynomial = polynomial * square + 1.0 / 3.0;
    let twice = 2.0 * s;
    twice + twice * (polynomial * square)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Arguments from -110 to 110, dense around 0.
    fn arguments() -> impl Iterator<Item = f32> {
        (-40_000..=40_000).map(|i| i as f32 / 40_000.0).map(|x| 110.0 * x * x * x)
    }

    #[test]
    fn elementary_functions_keep_their_error_bounds() {
        for x in arguments() {
            let wide = f64::from(x);
            // Below the normal numbers only an absolute error makes sense.
            let close = |found: f32, expected: f64, ulps: f64| {
                let allowed = ulps * f64::from(f32::EPSILON) * expected + f64::from(f32::MIN_POSITIVE) * 1e-6;
                (f64::from(found) - expected).abs() <= allowed
            };
            assert!(x > 88.7 || close(exp(x), wide.exp(), 2.0), "exp {x}: {}", exp(x));
            assert!(close(softplus(x), wide.exp().ln_1p(), 4.0), "softplus {x}: {}", softplus(x));
            let unit = exp(-x.abs());
            assert!(close(ln_1p_up_to_one(unit), f64::from(unit).ln_1p(), 2.0), "ln(1 + {unit})");
        }
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::NAN).is_nan() && softplus(f32::NAN).is_nan());
        assert_eq!(softplus(20.5), 20.5);
    }

    #[test]
    fn log_sum_exp_survives_large_logits_and_shows_nan() {
        let row: Vec<f32> = (0..1000).map(|i| 3e4 + (i % 10) as f32).collect();
        let expected = -(0..10).map(|i| f64::from(i - 9).exp()).sum::<f64>().ln() - 100f64.ln();
        let found = simd(|| LogSumExp::of(&row, 1.0)).log_probability(3e4 + 9.0);
        assert!((f64::from(found) - expected).abs() < 1e-6, "{found} {expected}");
        for place in [0, 37, 999] {
            let mut row = row.clone();
            row[place] = f32::NAN;
            assert!(simd(|| LogSumExp::of(&row, 1.0)).log_probability(3e4).is_nan(), "NaN at {place}");
        }
    }
}
