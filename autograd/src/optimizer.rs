//! AdamW, gradient clipping and learning-rate schedules.

use crate::{Gradients, Parameters, Result, Tensor};

/// Constants of [`AdamW`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWOptions {
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Decoupled weight decay, on parameters whose `decay` is set.
    pub weight_decay: f32,
}

/// Adam with decoupled weight decay (Loshchilov and Hutter 2019), in f32:
/// `p ← (1 - lr·wd) p - lr/(1-β₁ᵗ) · m / (√v/√(1-β₂ᵗ) + ε)`.
#[derive(Debug)]
pub struct AdamW {
    options: AdamWOptions,
    step: u64,
    /// Per parameter, in the table's order: first and second moments; `None` while never updated.
    moments: Vec<Option<(Tensor, Tensor)>>,
}

impl AdamW {
    /// An optimizer that has taken no step.
    pub fn new(options: AdamWOptions, parameters: &Parameters) -> Self {
        Self { options, step: 0, moments: vec![None; parameters.len()] }
    }

    /// Number of steps taken.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// First and second moments by position in the parameter table, for a checkpoint.
    pub fn moments(&self) -> &[Option<(Tensor, Tensor)>] {
        &self.moments
    }

    /// Continues from a checkpoint.
    ///
    /// # Errors
    /// When the number of moments or a shape does not fit the parameters.
    pub fn restore(
        options: AdamWOptions,
        parameters: &Parameters,
        step: u64,
        moments: Vec<Option<(Tensor, Tensor)>>,
    ) -> Result<Self> {
        let _ = parameters;
        Ok(Self { options, step, moments })
    }

    /// Updates every trainable parameter that has a gradient.
    ///
    /// # Errors
    /// Shape errors; out of memory.
    pub fn update(&mut self, parameters: &mut Parameters, gradients: &Gradients, learning_rate: f32) -> Result<()> {
        let _ = (parameters, gradients, learning_rate, &self.options);
        unimplemented!()
    }
}

/// The Euclidean norm of all trainable parameters' gradients together, accumulated in f64.
///
/// # Errors
/// Driver errors.
pub fn gradient_norm(parameters: &Parameters, gradients: &Gradients) -> Result<f64> {
    let _ = (parameters, gradients);
    unimplemented!()
}

/// Scales all gradients by `limit / norm` when `norm` exceeds `limit` (as PyTorch: `limit / (norm + 1e-6)`).
///
/// # Errors
/// Driver errors.
pub fn clip_gradients(gradients: &mut Gradients, norm: f64, limit: f64) -> Result<()> {
    let _ = (gradients, norm, limit);
    unimplemented!()
}

/// How the learning rate falls after warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decay {
    /// Not at all.
    Constant,
    /// In a straight line to the minimum.
    Linear,
    /// Along half a cosine to the minimum.
    Cosine,
}

/// Learning rate as a function of the step: linear warm-up, then decay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// The rate at the end of the warm-up.
    pub base: f64,
    /// The rate from `decay_steps` on.
    pub minimum: f64,
    /// Steps of linear warm-up; step 1 has `base / warmup_steps`.
    pub warmup_steps: u64,
    /// The step at which decay ends, counted from the beginning of training.
    pub decay_steps: u64,
    /// The form of the decay.
    pub decay: Decay,
}

impl Schedule {
    /// The rate of step `step`, counted from 1.
    pub fn rate(&self, step: u64) -> f64 {
        let _ = step;
        unimplemented!()
    }
}
