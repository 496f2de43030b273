//! AdamW with clipping, as PyTorch has them.

/// One parameter tensor with its moments.
#[derive(Clone, Debug)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root.
    pub epsilon: f64,
    /// Decoupled weight decay; 0 where none applies.
    pub weight_decay: f64,
    /// The parameter.
    pub value: Vec<f64>,
    /// First moment.
    pub first: Vec<f64>,
    /// Second moment.
    pub second: Vec<f64>,
    /// Steps taken.
    pub steps: i32,
}

impl AdamW {
    /// One step with the given gradient.
    pub fn step(&mut self, gradient: &[f64], rate: f64) {
        self.steps += 1;
        for index in 0..self.value.len() {
            let g = gradient[index];
            self.value[index] *= 1.0 - rate * self.weight_decay;
            self.first[index] = self.beta1 * self.first[index] + (1.0 - self.beta1) * g;
            self.second[index] = self.beta2 * self.second[index] + (1.0 - self.beta2) * g * g;
            let first = self.first[index] / (1.0 - self.beta1.powi(self.steps));
            let second = self.second[index] / (1.0 - self.beta2.powi(self.steps));
            self.value[index] -= rate * first / (second.sqrt() + self.epsilon);
        }
    }
}
