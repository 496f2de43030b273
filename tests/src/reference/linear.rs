//! Matrix product and table look-up.

/// `x Wᵀ + bias`: `x` `[rows, inner]`, `weight` `[outer, inner]`, `bias` `[outer]`.
pub fn linear(x: &[f64], weight: &[f64], bias: Option<&[f64]>, rows: usize, inner: usize, outer: usize) -> Vec<f64> {
    let mut result = vec![0.0; rows * outer];
    for row in 0..rows {
        for column in 0..outer {
            let mut sum = bias.map_or(0.0, |bias| bias[column]);
            for index in 0..inner {
                sum += x[row * inner + index] * weight[column * inner + index];
            }
            result[row * outer + column] = sum;
        }
    }
    result
}

/// The rows of `weight` `[vocabulary, width]` that `ids` name.
pub fn embedding(ids: &[usize], weight: &[f64], width: usize) -> Vec<f64> {
    let mut result = Vec::new();
    for id in ids {
        for column in 0..width {
            result.push(weight[id * width + column]);
        }
    }
    result
}
