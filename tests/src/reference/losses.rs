//! Losses over rows of logits.

/// Which divergence, of student q and teacher p.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `Σ q (ln q - ln p)`.
    ReverseKl,
    /// `Σ p (ln p - ln q)`.
    ForwardKl,
    /// `½ KL(q ‖ m) + ½ KL(p ‖ m)`, `m = (q + p) / 2`.
    JensenShannon,
    /// `-Σ p ln q`.
    SoftCrossEntropy,
}

/// `ln softmax(logits / temperature)` of one row.
pub fn log_softmax(logits: &[f64], temperature: f64) -> Vec<f64> {
    let greatest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max) / temperature;
    let total: f64 = logits.iter().map(|logit| (logit / temperature - greatest).exp()).sum();
    logits.iter().map(|logit| logit / temperature - greatest - total.ln()).collect()
}

/// `-ln softmax(logits)[label]` of every row; 0 where there is no label.
pub fn cross_entropy(logits: &[f64], labels: &[Option<usize>], vocabulary: usize) -> Vec<f64> {
    let rows = logits.chunks(vocabulary).zip(labels);
    rows.map(|(row, label)| label.map_or(0.0, |label| -log_softmax(row, 1.0)[label])).collect()
}

/// The divergence of every row.
pub fn divergence(
    kind: Kind,
    student: &[f64],
    teacher: &[f64],
    vocabulary: usize,
    student_temperature: f64,
    teacher_temperature: f64,
) -> Vec<f64> {
    let mut result = Vec::new();
    for (student, teacher) in student.chunks(vocabulary).zip(teacher.chunks(vocabulary)) {
        let log_q = log_softmax(student, student_temperature);
        let log_p = log_softmax(teacher, teacher_temperature);
        let mut sum = 0.0;
        for (log_q, log_p) in log_q.into_iter().zip(log_p) {
            let (q, p) = (log_q.exp(), log_p.exp());
            sum += match kind {
                Kind::ReverseKl => q * (log_q - log_p),
                Kind::ForwardKl => p * (log_p - log_q),
                Kind::SoftCrossEntropy => -p * log_q,
                Kind::JensenShannon => {
                    let log_m = ((q + p) / 2.0).ln();
                    let part =
                        |probability: f64, log: f64| if probability > 0.0 { probability * (log - log_m) } else { 0.0 };
                    0.5 * part(q, log_q) + 0.5 * part(p, log_p)
                }
            };
        }
        result.push(sum);
    }
    result
}
