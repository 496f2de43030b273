//! Rotary position embedding.

use std::f64::consts::{PI, TAU};

/// How frequencies are stretched.
#[derive(Clone, Copy, Debug)]
pub enum Scaling {
    /// Not at all.
    None,
    /// Llama 3.1's rule (transformers, `_compute_llama3_parameters`).
    Llama3 {
        /// Divides the low frequencies.
        factor: f64,
        /// Bound of the low frequencies.
        low: f64,
        /// Bound of the high frequencies.
        high: f64,
        /// Positions at first.
        original: f64,
    },
    /// YaRN (transformers, `_compute_yarn_parameters`).
    Yarn {
        /// Divides the low frequencies.
        factor: f64,
        /// Rotations above which nothing is scaled.
        beta_fast: f64,
        /// Rotations below which all is scaled.
        beta_slow: f64,
        /// Positions at first.
        original: f64,
    },
}

/// The frequency of every pair of dimensions, and the factor on cosine and sine.
pub fn inverse_frequencies(head_size: usize, theta: f64, scaling: Scaling) -> (Vec<f64>, f64) {
    let mut plain = Vec::new();
    for pair in 0..head_size / 2 {
        plain.push(theta.powf(-2.0 * pair as f64 / head_size as f64));
    }
    match scaling {
        Scaling::None => (plain, 1.0),
        Scaling::Llama3 { factor, low, high, original } => {
            let mut scaled = Vec::new();
            for frequency in plain {
                let wavelength = TAU / frequency;
                if wavelength < original / high {
                    scaled.push(frequency);
                } else if wavelength > original / low {
                    scaled.push(frequency / factor);
                } else {
                    let smooth = (original / wavelength - low) / (high - low);
                    scaled.push((1.0 - smooth) * frequency / factor + smooth * frequency);
                }
            }
            (scaled, 1.0)
        }
        Scaling::Yarn { factor, beta_fast, beta_slow, original } => {
            // The dimension at which a wave turns `rotations` times over the original positions.
            let dimension =
                |rotations: f64| head_size as f64 * (original / (rotations * 2.0 * PI)).ln() / (2.0 * theta.ln());
            let first = dimension(beta_fast).floor().max(0.0);
            let mut last = dimension(beta_slow).ceil().min(head_size as f64 - 1.0);
            if first == last {
                last += 0.001;
            }
            let mut scaled = Vec::new();
            for (pair, frequency) in plain.into_iter().enumerate() {
                let ramp = ((pair as f64 - first) / (last - first)).clamp(0.0, 1.0);
                scaled.push(frequency / factor * ramp + frequency * (1.0 - ramp));
            }
            (scaled, if factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 })
        }
    }
}

/// Rotates the pairs `(j, j + head size / 2)` of `x` `[tokens, heads, head size]`.
pub fn rope(x: &[f64], positions: &[usize], heads: usize, frequencies: &[f64], factor: f64) -> Vec<f64> {
    let half = frequencies.len();
    let mut result = vec![0.0; x.len()];
    for (token, position) in positions.iter().enumerate() {
        for head in 0..heads {
            let start = (token * heads + head) * 2 * half;
            for (pair, frequency) in frequencies.iter().enumerate() {
                let angle = *position as f64 * frequency;
                let (cosine, sine) = (angle.cos() * factor, angle.sin() * factor);
                let (a, b) = (x[start + pair], x[start + half + pair]);
                result[start + pair] = a * cosine - b * sine;
                result[start + half + pair] = b * cosine + a * sine;
            }
        }
    }
    result
}
