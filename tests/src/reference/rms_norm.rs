//! Root-mean-square normalisation.

/// `weight · x / sqrt(mean(x²) + epsilon)` for every row of `x` `[rows, width]`.
pub fn rms_norm(x: &[f64], weight: &[f64], epsilon: f64) -> Vec<f64> {
    let width = weight.len();
    let mut result = Vec::new();
    for row in x.chunks(width.max(1)) {
        let mut squares = 0.0;
        for value in row {
            squares += value * value;
        }
        let root = (squares / width as f64 + epsilon).sqrt();
        for (value, weight) in row.iter().zip(weight) {
            result.push(weight * value / root);
        }
    }
    result
}
