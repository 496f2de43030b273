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

/// `Σ a[i] b[i]` of equally long slices, summed in 32 interleaved parts that are added in a fixed order.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    const PARTS: usize = 32;
    let mut sums = [0.0; PARTS];
    let (a_chunks, b_chunks) = (a.chunks_exact(PARTS), b.chunks_exact(PARTS));
    let rest: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        for part in 0..PARTS {
            sums[part] += a[part] * b[part];
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// As [`dot`], with the second factor in bf16.
#[inline(always)]
pub(crate) fn dot_bf16(a: &[f32], b: &[bf16]) -> f32 {
    const PARTS: usize = 32;
    let mut sums = [0.0; PARTS];
    let (a_chunks, b_chunks) = (a.chunks_exact(PARTS), b.chunks_exact(PARTS));
    let rest: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(a, b)| a * widen_one(*b)).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        for part in 0..PARTS {
            sums[part] += a[part] * widen_one(b[part]);
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// The sum of a slice, formed in 32 interleaved parts that are added in a fixed order.
#[inline(always)]
pub(crate) fn total(values: &[f32]) -> f32 {
    const PARTS: usize = 32;
    let mut sums = [0.0; PARTS];
    let chunks = values.chunks_exact(PARTS);
    let rest: f32 = chunks.remainder().iter().sum();
    for chunk in chunks {
        for (sum, value) in sums.iter_mut().zip(chunk) {
            *sum += value;
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// The greatest element; NaN if there is one, minus infinity if there is none.
#[inline(always)]
pub(crate) fn maximum(values: &[f32]) -> f32 {
    const PARTS: usize = 32;
    // Comparisons with NaN are false, so `!(a >= b)` lets it through and keeps it.
    let greater = |a: f32, b: f32| if !(a >= b) { if a.is_nan() { a } else { b } } else { a };
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

/// ln Σ e^(factor · x) over a slice of logits, without overflow. The sum is formed in f64 over blocks, since a
/// vocabulary is long. NaN if any logit is.
#[inline(always)]
pub(crate) fn log_sum_exp(logits: &[f32], factor: f32) -> f32 {
    const PARTS: usize = 32;
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
        sum += f64::from(sums.iter().sum::<f32>() + rest);
    }
    (f64::from(greatest) + sum.ln()) as f32
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
    let polynomial = polynomial * r + 5.000_000_1e-1;
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

/// ln(1 + e^x), or x above 20, as the reference implementations have it. Accurate for very negative x.
pub(crate) fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}
