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

/// Bytes between what a dot product reads and what it asks for: weights are read once, from memory, and the processor's
/// own prefetching stops at every page.
const AHEAD: usize = 2048;
/// Bytes of a cache line.
const LINE: usize = 64;

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
        for line in (0..PARTS * size_of::<T>()).step_by(LINE) {
            runtime::prefetch(b, (AHEAD + line) / size_of::<T>());
        }
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

/// 1 / (1 + e^-x) with a relative error of at most 3 ulp; 0 below -88.7, where e^-x is infinite.
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

    /// Numbers of either sign from all of f32, from the smallest denormal to the greatest: every 1009th.
    fn all_sizes() -> impl Iterator<Item = f32> {
        (0..f32::INFINITY.to_bits()).step_by(1009).map(f32::from_bits).flat_map(|x| [x, -x])
    }

    /// Every number between two negative ones.
    fn all_between(lower: f32, upper: f32) -> impl Iterator<Item = f32> {
        (upper.to_bits()..=lower.to_bits()).map(f32::from_bits)
    }

    /// The difference in units of the last place that an f32 of the expected size has.
    fn ulps(found: f32, expected: f64) -> f64 {
        let size = (expected.abs() as f32).max(f32::MIN_POSITIVE);
        let unit = f32::from_bits((size.to_bits() >> 23) << 23) * f32::EPSILON;
        (f64::from(found) - expected).abs() / f64::from(unit)
    }

    fn softplus_in_f64(x: f64) -> f64 {
        x.max(0.0) + (-x.abs()).exp().ln_1p()
    }

    #[test]
    fn ulps_are_counted_rightly() {
        assert_eq!(ulps(1.0 + f32::EPSILON, 1.0), 1.0);
        assert_eq!(ulps(-7.0, -7.0 - 8.0 * f64::from(f32::EPSILON)), 2.0);
        assert_eq!(ulps(f32::from_bits(5), f64::from(f32::from_bits(2))), 3.0);
        assert!(ulps(f32::NAN, 1.0).is_nan());
    }

    #[test]
    fn elementary_functions_keep_their_error_bounds() {
        for x in all_sizes() {
            let wide = f64::from(x);
            let checks = [
                ("exp", exp(x), wide.exp(), 2.0, f32::MIN..=88.7),
                ("softplus", softplus(x), softplus_in_f64(wide), 4.0, f32::MIN..=f32::MAX),
                ("sigmoid", sigmoid(x), 1.0 / (1.0 + (-wide).exp()), 3.0, -88.7..=f32::MAX),
                ("ln(1 + x)", ln_1p_up_to_one(x), wide.ln_1p(), 2.0, 0.0..=1.0),
            ];
            for (name, found, expected, allowed, range) in checks {
                if range.contains(&x) {
                    assert!(ulps(found, expected) <= allowed, "{name} of {x:e} is {found:e}, not {expected:e}");
                }
            }
        }
    }

    #[test]
    fn results_below_the_normal_numbers_are_right_to_the_last_places() {
        for x in all_between(-104.5, -87.0) {
            let expected = f64::from(x).exp();
            // Rounded twice, to the polynomial's last place and to the denormals' spacing.
            assert!(ulps(exp(x), expected) <= 1.5, "exp of {x} is {:e}, not {expected:e}", exp(x));
        }
        for x in all_between(-104.5, -87.0).step_by(17) {
            assert!(ulps(softplus(x), softplus_in_f64(f64::from(x))) <= 4.0, "softplus of {x}");
        }
    }

    #[test]
    fn elementary_functions_end_where_they_say() {
        // ln of the greatest f32 is 88.722839…; half of the smallest is e^-103.972….
        assert!(exp(88.7228) < f32::INFINITY);
        assert!(exp(-103.97) > 0.0);
        for above in [88.722_84, 88.8, 89.0, 89.1, 127.0, 1e4, f32::MAX, f32::INFINITY] {
            assert_eq!(exp(above), f32::INFINITY, "{above}");
            assert_eq!(exp(-above - 15.3), 0.0, "{above}");
            assert_eq!(sigmoid(-above), 0.0, "{above}");
            assert_eq!(sigmoid(above), 1.0, "{above}");
            assert_eq!(softplus(above), above, "{above}");
            assert_eq!(softplus(-above - 15.3), 0.0, "{above}");
        }
        for zero in [0.0, -0.0, 1e-45, -1e-45] {
            assert_eq!((exp(zero), sigmoid(zero), softplus(zero)), (1.0, 0.5, std::f32::consts::LN_2), "{zero:e}");
        }
        assert_eq!(ln_1p_up_to_one(0.0), 0.0);
        assert_eq!(softplus(20.5), 20.5);
        assert!([exp, sigmoid, softplus, ln_1p_up_to_one].iter().all(|function| function(f32::NAN).is_nan()));
    }

    /// In vectors as one by one: the loops that [`simd`] compiles give the same bits.
    #[test]
    fn vectors_give_the_bits_of_single_numbers() {
        let arguments: Vec<f32> = all_sizes().step_by(251).chain([f32::INFINITY, f32::NEG_INFINITY]).collect();
        type Named = (&'static str, fn(f32) -> f32);
        let functions: [Named; 4] =
            [("exp", exp), ("sigmoid", sigmoid), ("softplus", softplus), ("ln(1 + x)", ln_1p_up_to_one)];
        let mut results = vec![vec![0.0; arguments.len()]; functions.len()];
        let [for_exp, for_sigmoid, for_softplus, for_ln] = &mut results[..] else { unreachable!() };
        simd(
            #[inline(always)]
            || {
                for (index, x) in arguments.iter().enumerate() {
                    for_exp[index] = exp(*x);
                    for_sigmoid[index] = sigmoid(*x);
                    for_softplus[index] = softplus(*x);
                    for_ln[index] = ln_1p_up_to_one(*x);
                }
            },
        );
        // A NaN, outside the domain, may have any bits.
        let bits = |result: f32| if result.is_nan() { u32::MAX } else { result.to_bits() };
        for ((name, function), results) in functions.iter().zip(&results) {
            for (x, result) in arguments.iter().zip(results) {
                assert_eq!(bits(*result), bits(std::hint::black_box(function)(*x)), "{name} of {x:e}");
            }
        }
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
