//! AdamW, gradient clipping and learning-rate schedules.

use rayon::prelude::*;

use crate::{DType, Error, Gradients, Parameters, Result, Tensor, check, cpu};

/// Elements that one thread takes at a time, and the unit in which norms are summed.
const BLOCK: usize = 1 << 15;

/// Constants of [`AdamW`]. In f64, since `1 - beta2` is what counts: 1 - 0.999 is off by 1.3e-5 of itself when 0.999 is
/// rounded to f32 first.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWOptions {
    /// Decay of the first moment, β₁.
    pub beta1: f64,
    /// Decay of the second moment, β₂.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay, on parameters whose `decay` is set.
    pub weight_decay: f64,
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
        const OPERATOR: &str = "restoring AdamW";
        if moments.len() != parameters.len() {
            return Err(Error::Invalid {
                operator: OPERATOR,
                message: format!("moments of {} parameters for {} parameters", moments.len(), parameters.len()),
            });
        }
        for ((_, parameter), moments) in parameters.iter().zip(&moments) {
            for moment in moments.iter().flat_map(|(first, second)| [first, second]) {
                if moment.shape() != parameter.value.shape() || moment.dtype() != DType::F32 {
                    return Err(Error::Invalid {
                        operator: OPERATOR,
                        message: format!(
                            "{}: moments are {} {:?}, expected f32 {:?}",
                            parameter.name,
                            moment.dtype(),
                            moment.shape(),
                            parameter.value.shape()
                        ),
                    });
                }
            }
        }
        Ok(Self { options, step, moments })
    }

    /// Updates every trainable parameter that has a gradient.
    ///
    /// # Errors
    /// Shape errors; out of memory.
    pub fn update(&mut self, parameters: &mut Parameters, gradients: &Gradients, learning_rate: f32) -> Result<()> {
        self.step += 1;
        let AdamWOptions { beta1, beta2, epsilon, weight_decay } = self.options;
        // Powers in f64: 1 - beta2^t loses all its digits in f32 for the first steps.
        let exponent = self.step as f64;
        let rate = (f64::from(learning_rate) / (1.0 - beta1.powf(exponent))) as f32;
        let inverse_root = (1.0 / (1.0 - beta2.powf(exponent)).sqrt()) as f32;
        let (old_first, new_first) = (beta1 as f32, (1.0 - beta1) as f32);
        let (old_second, new_second) = (beta2 as f32, (1.0 - beta2) as f32);
        let epsilon = epsilon as f32;
        for ((_, parameter), moments) in parameters.iter_mut().zip(&mut self.moments) {
            if !parameter.trainable {
                continue;
            }
            let Some(gradient) = gradients.get(&parameter.value) else { continue };
            check::shape("AdamW", "gradient", gradient, parameter.value.shape())?;
            // Subtracted, since 1 - lr·wd rounded to f32 would err the same way in every step.
            let decay = if parameter.decay { (f64::from(learning_rate) * weight_decay) as f32 } else { 0.0 };
            let (first, second) = match moments {
                Some(moments) => moments,
                None => {
                    let zeros = || Tensor::zeros(gradient.device(), gradient.shape(), DType::F32);
                    moments.insert((zeros()?, zeros()?))
                }
            };
            let gradient = gradient.host_f32()?;
            parameter
                .value
                .make_mut::<f32>()?
                .par_chunks_mut(BLOCK)
                .zip(first.make_mut::<f32>()?.par_chunks_mut(BLOCK))
                .zip(second.make_mut::<f32>()?.par_chunks_mut(BLOCK))
                .zip(gradient.par_chunks(BLOCK))
                .for_each(|(((value, first), second), gradient)| {
                    cpu::simd(
                        #[inline(always)]
                        || {
                            for index in 0..value.len() {
                                let g = gradient[index];
                                first[index] = old_first * first[index] + new_first * g;
                                second[index] = old_second * second[index] + new_second * g * g;
                                let scale = second[index].sqrt() * inverse_root + epsilon;
                                value[index] -= decay * value[index] + rate * first[index] / scale;
                            }
                        },
                    );
                });
        }
        Ok(())
    }
}

/// The Euclidean norm of all trainable parameters' gradients together, accumulated in f64.
///
/// # Errors
/// Driver errors.
pub fn gradient_norm(parameters: &Parameters, gradients: &Gradients) -> Result<f64> {
    let mut squares = 0.0;
    for (_, parameter) in parameters.iter().filter(|(_, parameter)| parameter.trainable) {
        if let Some(gradient) = gradients.get(&parameter.value) {
            squares += square_sum(gradient)?;
        }
    }
    Ok(squares.sqrt())
}

/// Scales all gradients by `limit / (norm + 1e-6)`, as PyTorch does, when `norm` exceeds `limit`. A norm that is not a
/// number changes nothing: whoever trains has to stop there.
///
/// # Errors
/// Driver errors.
pub fn clip_gradients(gradients: &mut Gradients, norm: f64, limit: f64) -> Result<()> {
    if norm > limit {
        gradients.scale((limit / (norm + 1e-6)) as f32)?;
    }
    Ok(())
}

fn square_sum(tensor: &Tensor) -> Result<f64> {
    let values = tensor.host_f32()?;
    let blocks: Vec<f64> = values
        .par_chunks(BLOCK)
        .map(|block| {
            cpu::simd(
                #[inline(always)]
                || {
                    let mut sums = [0.0f64; 16];
                    let chunks = block.chunks_exact(16);
                    let rest: f64 = chunks.remainder().iter().map(|value| f64::from(*value).powi(2)).sum();
                    for chunk in chunks {
                        for (sum, value) in sums.iter_mut().zip(chunk) {
                            *sum += f64::from(*value) * f64::from(*value);
                        }
                    }
                    sums.iter().sum::<f64>() + rest
                },
            )
        })
        .collect();
    Ok(blocks.iter().sum())
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
        if step < self.warmup_steps {
            return self.base * step as f64 / self.warmup_steps as f64;
        }
        let length = self.decay_steps.saturating_sub(self.warmup_steps).max(1);
        let progress = ((step - self.warmup_steps) as f64 / length as f64).min(1.0);
        let height = match self.decay {
            Decay::Constant => 1.0,
            Decay::Linear => 1.0 - progress,
            Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        };
        self.minimum + (self.base - self.minimum) * height
    }
}

#[cfg(test)]
mod tests {
    use runtime::Device;

    use super::*;
    use crate::{Parameter, Tape, ops};

    fn one_parameter(values: &[f32], decay: bool) -> Parameters {
        let mut parameters = Parameters::default();
        let value = Tensor::from_slice(&Device::cpu(), &[values.len()], values).unwrap();
        parameters.push(Parameter { name: "w".to_owned(), value, trainable: true, decay });
        parameters
    }

    fn gradients_of_squares(parameters: &Parameters) -> Gradients {
        let tape = Tape::new();
        let (id, _) = parameters.iter().next().unwrap();
        let w = parameters.var(&tape, id);
        let loss = ops::sum(&tape, &ops::mul(&tape, &w, &w).unwrap()).unwrap();
        tape.backward(&loss).unwrap()
    }

    const OPTIONS: AdamWOptions = AdamWOptions { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.1 };

    #[test]
    fn the_first_step_moves_by_the_rate_against_the_sign_after_decay() {
        let mut parameters = one_parameter(&[2.0, -3.0], true);
        let gradients = gradients_of_squares(&parameters);
        AdamW::new(OPTIONS, &parameters).update(&mut parameters, &gradients, 0.5).unwrap();
        let (_, parameter) = parameters.iter().next().unwrap();
        let values = parameter.value.to_vec::<f32>().unwrap();
        assert!((values[0] - (2.0 * 0.95 - 0.5)).abs() < 1e-6 && (values[1] - (-3.0 * 0.95 + 0.5)).abs() < 1e-6);
    }

    #[test]
    fn a_hundred_steps_follow_the_formula_in_f64() {
        let options = AdamWOptions { weight_decay: 0.05, ..OPTIONS };
        let mut parameters = one_parameter(&[1.5], true);
        let mut optimizer = AdamW::new(options, &parameters);
        let (mut p, mut m, mut v) = (1.5f64, 0.0f64, 0.0f64);
        for step in 1..=100 {
            let g = (step as f32 * 0.7).sin() + 0.2;
            let mut gradients = Gradients::default();
            let (_, parameter) = parameters.iter().next().unwrap();
            let gradient = Tensor::from_slice(&Device::cpu(), &[1], &[g]).unwrap();
            gradients.add(&parameter.value, gradient).unwrap();
            optimizer.update(&mut parameters, &gradients, 0.01).unwrap();
            let (g, rate) = (f64::from(g), f64::from(0.01f32));
            m = 0.9 * m + (1.0 - 0.9) * g;
            v = 0.999 * v + (1.0 - 0.999) * g * g;
            let (m_hat, v_hat) = (m / (1.0 - 0.9f64.powi(step)), v / (1.0 - 0.999f64.powi(step)));
            p = p * (1.0 - rate * 0.05) - rate * m_hat / (v_hat.sqrt() + 1e-8);
        }
        let found = |tensor: &Tensor| f64::from(tensor.item().unwrap());
        let (first, second) = optimizer.moments()[0].clone().unwrap();
        // A hundred roundings of f32 add up to a few times 1e-7; 0.999 rounded to f32 would be off by 1.3e-5.
        assert!((found(&second) / v - 1.0).abs() < 2e-6 && (found(&first) - m).abs() < 1e-6);
        assert!((found(&parameters.iter().next().unwrap().1.value) - p).abs() < 2e-6);
    }

    #[test]
    fn frozen_parameters_and_their_norm_stay_out() {
        let mut parameters = one_parameter(&[3.0, 4.0], false);
        let gradients = gradients_of_squares(&parameters);
        assert!((gradient_norm(&parameters, &gradients).unwrap() - 10.0).abs() < 1e-9);
        for (_, parameter) in parameters.iter_mut() {
            parameter.trainable = false;
        }
        assert_eq!(gradient_norm(&parameters, &gradients).unwrap(), 0.0);
        AdamW::new(OPTIONS, &parameters).update(&mut parameters, &gradients, 0.5).unwrap();
        assert_eq!(parameters.iter().next().unwrap().1.value.to_vec::<f32>().unwrap(), [3.0, 4.0]);
    }

    #[test]
    fn clipping_scales_only_what_is_too_long() {
        let parameters = one_parameter(&[3.0, 4.0], false);
        let mut gradients = gradients_of_squares(&parameters);
        clip_gradients(&mut gradients, 10.0, 20.0).unwrap();
        assert!((gradient_norm(&parameters, &gradients).unwrap() - 10.0).abs() < 1e-9);
        clip_gradients(&mut gradients, 10.0, 1.0).unwrap();
        assert!((gradient_norm(&parameters, &gradients).unwrap() - 1.0).abs() < 1e-6);
    }

    #[test]
    fn moments_of_another_shape_are_refused_by_name() {
        let parameters = one_parameter(&[3.0, 4.0], false);
        let wrong = Tensor::zeros(&Device::cpu(), &[3], DType::F32).unwrap();
        let error = AdamW::restore(OPTIONS, &parameters, 1, vec![Some((wrong.clone(), wrong))]).unwrap_err();
        assert!(error.to_string().contains("w: moments are f32 [3], expected f32 [2]"), "{error}");
        assert!(AdamW::restore(OPTIONS, &parameters, 1, Vec::new()).is_err());
    }

    #[test]
    fn rates_rise_and_fall() {
        let schedule = Schedule { base: 2e-3, minimum: 0.0, warmup_steps: 2, decay_steps: 12, decay: Decay::Linear };
        let expected = [1e-3, 2e-3, 1.8e-3, 1.6e-3, 1.4e-3];
        for (step, expected) in (1..).zip(expected) {
            assert!((schedule.rate(step) - expected).abs() < 1e-12, "step {step}: {}", schedule.rate(step));
        }
        assert_eq!(schedule.rate(12), 0.0);
        assert_eq!(schedule.rate(1000), 0.0);
        let cosine = Schedule { minimum: 1e-4, decay: Decay::Cosine, ..schedule };
        assert!((cosine.rate(7) - (1e-4 + (2e-3 - 1e-4) / 2.0)).abs() < 1e-12);
        let constant = Schedule { warmup_steps: 0, decay: Decay::Constant, ..schedule };
        assert_eq!(constant.rate(1), 2e-3);
        let sudden = Schedule { decay_steps: 2, ..schedule };
        assert_eq!((sudden.rate(2), sudden.rate(3)), (2e-3, 0.0));
    }
}
