//! Causal grouped-query attention.

/// Sizes and masks.
#[derive(Clone, Debug)]
pub struct Attention {
    /// Rows.
    pub batch: usize,
    /// Queries of a row: its last positions.
    pub query_time: usize,
    /// Keys of a row.
    pub key_time: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub key_heads: usize,
    /// Dimensions of a head.
    pub size: usize,
    /// Factor on the scores.
    pub scale: f64,
    /// `[batch, key time]`: where each token's document begins.
    pub document_start: Option<Vec<usize>>,
    /// Keys that a query sees, its own included.
    pub window: Option<usize>,
}

/// `softmax(scale · q kᵀ + mask) v`.
pub fn attention(sizes: &Attention, query: &[f64], key: &[f64], value: &[f64]) -> Vec<f64> {
    let Attention { batch, query_time, key_time, heads, key_heads, size, .. } = *sizes;
    let mut result = vec![0.0; batch * query_time * heads * size];
    for row in 0..batch {
        for step in 0..query_time {
            let position = key_time - query_time + step;
            for head in 0..heads {
                let key_head = head / (heads / key_heads);
                let query_at = ((row * query_time + step) * heads + head) * size;
                let key_at = |other: usize| ((row * key_time + other) * key_heads + key_head) * size;
                let visible = |other: usize| {
                    let start = sizes.document_start.as_ref().map_or(0, |starts| starts[row * key_time + position]);
                    other >= start && sizes.window.is_none_or(|window| position - other < window)
                };
                let mut scores = Vec::new();
                for other in (0..=position).filter(|other| visible(*other)) {
                    let mut score = 0.0;
                    for index in 0..size {
                        score += query[query_at + index] * key[key_at(other) + index];
                    }
                    scores.push((other, score * sizes.scale));
                }
                let greatest = scores.iter().fold(f64::NEG_INFINITY, |greatest, (_, score)| greatest.max(*score));
                let total: f64 = scores.iter().map(|(_, score)| (score - greatest).exp()).sum();
                for (other, score) in scores {
                    let probability = (score - greatest).exp() / total;
                    for index in 0..size {
                        result[query_at + index] += probability * value[key_at(other) + index];
                    }
                }
            }
        }
    }
    result
}
