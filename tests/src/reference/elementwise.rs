//! Functions of one or two numbers, and repetition.

/// `1 / (1 + e^-x)`.
pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `x · sigmoid(x)`.
pub fn silu(x: f64) -> f64 {
    x * sigmoid(x)
}

/// `ln(1 + e^x)`. The operators pass values above 20 through, which differs by less than 2.1e-9.
pub fn softplus(x: f64) -> f64 {
    if x > 0.0 { x + (-x).exp().ln_1p() } else { x.exp().ln_1p() }
}

/// `silu(gate) · up`.
pub fn swiglu(gate: &[f64], up: &[f64]) -> Vec<f64> {
    gate.iter().zip(up).map(|(gate, up)| silu(*gate) * up).collect()
}

/// Each run of `chunk` elements, `repeats` times; `chunk` divides the rows, so that rows need no attention.
pub fn repeat_chunks(x: &[f64], chunk: usize, repeats: usize) -> Vec<f64> {
    let mut result = Vec::new();
    for run in x.chunks(chunk) {
        for _ in 0..repeats {
            result.extend_from_slice(run);
        }
    }
    result
}
