//! AdamW, gradient clipping and learning-rate schedules.

use kernels_ptx::kernels;
use rayon::prelude::*;
use runtime::{Argument, Table, Word};

use crate::gpu;
use crate::{DType, Error, Gradients, Parameters, Result, Tensor, check, cpu, ops};

const OPERATOR: &str = "AdamW";
const NORM: &str = "gradient_norm";

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
/// `p ← (1 - lr·wd) p - lr/(1-β₁ᵗ) · m / (√v/√(1-β₂ᵗ) + ε)`, where `lr` is the learning rate times the parameter's `rate`.
///
/// Of a parameter in bf16, whose small updates would be lost to rounding, it keeps the value in f32 from the first update
/// on: its master. The parameter is the master, rounded.
#[derive(Debug)]
pub struct AdamW {
    options: AdamWOptions,
    step: u64,
    /// Per parameter, in the table's order: first and second moments; `None` while never updated.
    moments: Vec<Option<(Tensor, Tensor)>>,
    /// Per parameter in bf16: its value in f32; `None` while never updated.
    masters: Vec<Option<Tensor>>,
    /// Where GPUs find the parameters in bf16, and those in f32.
    tables: [Table; 2],
}

impl AdamW {
    /// An optimizer that has taken no step.
    pub fn new(options: AdamWOptions, parameters: &Parameters) -> Self {
        let (moments, masters) = (vec![None; parameters.len()], vec![None; parameters.len()]);
        Self { options, step: 0, moments, masters, tables: Default::default() }
    }

    /// Number of steps taken.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// First and second moments by position in the parameter table, for a checkpoint.
    pub fn moments(&self) -> &[Option<(Tensor, Tensor)>] {
        &self.moments
    }

    /// Values in f32 of the parameters in bf16 that were updated, by position in the parameter table, for a checkpoint.
    pub fn masters(&self) -> &[Option<Tensor>] {
        &self.masters
    }

    /// Continues from a checkpoint: `moments` and `masters` as [`AdamW::moments`] and [`AdamW::masters`] gave them, on the
    /// parameters' device.
    ///
    /// # Errors
    /// When the number of moments or masters or a shape does not fit the parameters.
    pub fn restore(
        options: AdamWOptions,
        parameters: &Parameters,
        step: u64,
        moments: Vec<Option<(Tensor, Tensor)>>,
        masters: Vec<Option<Tensor>>,
    ) -> Result<Self> {
        const OPERATOR: &str = "restoring AdamW";
        for (what, count) in [("moments", moments.len()), ("masters", masters.len())] {
            if count != parameters.len() {
                let message = format!("{what} of {count} parameters for {} parameters", parameters.len());
                return Err(Error::Invalid { operator: OPERATOR, message });
            }
        }
        for ((_, parameter), (moments, master)) in parameters.iter().zip(moments.iter().zip(&masters)) {
            let moments = moments.iter().flat_map(|(first, second)| [("moments are", first), ("moments are", second)]);
            for (what, tensor) in moments.chain(master.iter().map(|master| ("the master is", master))) {
                if tensor.shape() != parameter.value.shape() || tensor.dtype() != DType::F32 {
                    let message = format!(
                        "{}: {what} {} {:?}, expected f32 {:?}",
                        parameter.name,
                        tensor.dtype(),
                        tensor.shape(),
                        parameter.value.shape()
                    );
                    return Err(Error::Invalid { operator: OPERATOR, message });
                }
            }
        }
        Ok(Self { options, step, moments, masters, tables: Default::default() })
    }

    /// Updates every trainable parameter that has a gradient.
    ///
    /// # Errors
    /// Shape errors; out of memory.
    pub fn update(&mut self, parameters: &mut Parameters, gradients: &Gradients, learning_rate: f32) -> Result<()> {
        self.update_scaled(parameters, gradients, learning_rate, 1.0)
    }

    /// The same with all gradients multiplied by `scale` as they are read: see [`clip_factor`].
    ///
    /// # Errors
    /// As [`AdamW::update`].
    pub fn update_scaled(
        &mut self,
        parameters: &mut Parameters,
        gradients: &Gradients,
        learning_rate: f32,
        scale: f32,
    ) -> Result<()> {
        self.step += 1;
        let factors = Factors::new(&self.options, self.step, learning_rate, scale);
        let mut updates = Vec::new();
        let states = self.moments.iter_mut().zip(&mut self.masters);
        for ((_, parameter), (moments, master)) in parameters.iter_mut().zip(states) {
            if !parameter.trainable {
                continue;
            }
            let Some(gradient) = gradients.get(&parameter.value) else { continue };
            check::shape(OPERATOR, "gradient", gradient, parameter.value.shape())?;
            check::is_float(OPERATOR, "gradient", gradient)?;
            check::is_float(OPERATOR, "parameter", &parameter.value)?;
            let [first, second] = match moments {
                Some((first, second)) => [first, second],
                None => {
                    let zeros = || Tensor::zeros(gradient.device(), gradient.shape(), DType::F32);
                    let (first, second) = moments.insert((zeros()?, zeros()?));
                    [first, second]
                }
            };
            let is_wide = parameter.value.dtype() == DType::F32;
            if !is_wide && master.is_none() {
                *master = Some(parameter.value.cast(DType::F32)?);
            }
            let master = master.as_mut().filter(|_| !is_wide);
            let (value, decay, rate) = (&mut parameter.value, parameter.decay, parameter.rate);
            // The kernels read f32.
            let gradient = if gradient.device().is_cpu() { gradient.clone() } else { gradient.cast(DType::F32)? };
            updates.push(Update { value, master, first, second, gradient, decay, rate });
        }
        let (of_cpu, of_gpu): (Vec<_>, Vec<_>) =
            updates.into_iter().partition(|update| update.gradient.device().is_cpu());
        for update in of_cpu {
            factors.step_cpu(update)?;
        }
        let (narrow, wide): (Vec<_>, Vec<_>) = of_gpu.into_iter().partition(|update| update.master.is_some());
        for (updates, table) in [narrow, wide].into_iter().zip(&self.tables) {
            factors.step_gpu(updates, table)?;
        }
        Ok(())
    }
}

/// A parameter and what its step takes.
struct Update<'a> {
    value: &'a mut Tensor,
    /// The value in f32, where the parameter itself is not.
    master: Option<&'a mut Tensor>,
    first: &'a mut Tensor,
    second: &'a mut Tensor,
    gradient: Tensor,
    decay: bool,
    /// Multiple of the learning rate.
    rate: f32,
}

/// The numbers of a step: see [`kernels::adamw`].
#[derive(Clone, Copy)]
struct Factors {
    scale: f32,
    old_first: f32,
    new_first: f32,
    old_second: f32,
    new_second: f32,
    rate: f32,
    inverse_root: f32,
    epsilon: f32,
    decay: f32,
}

impl Factors {
    fn new(options: &AdamWOptions, step: u64, learning_rate: f32, scale: f32) -> Self {
        let AdamWOptions { beta1, beta2, epsilon, weight_decay } = *options;
        // Powers in f64: 1 - beta2^t loses all its digits in f32 for the first steps.
        let exponent = step as f64;
        Self {
            scale,
            old_first: beta1 as f32,
            new_first: (1.0 - beta1) as f32,
            old_second: beta2 as f32,
            new_second: (1.0 - beta2) as f32,
            rate: (f64::from(learning_rate) / (1.0 - beta1.powf(exponent))) as f32,
            inverse_root: (1.0 / (1.0 - beta2.powf(exponent)).sqrt()) as f32,
            epsilon: epsilon as f32,
            // Subtracted, since 1 - lr·wd rounded to f32 would err the same way in every step.
            decay: (f64::from(learning_rate) * weight_decay) as f32,
        }
    }

    /// One step on a parameter.
    fn step_cpu(&self, update: Update<'_>) -> Result<()> {
        let Update { value, mut master, first, second, gradient, decay, rate } = update;
        let gradient = gradient.host_f32()?;
        let decay = if decay { self.decay * rate } else { 0.0 };
        let rate = self.rate * rate;
        let wide = master.as_deref_mut().unwrap_or(value);
        wide.make_mut::<f32>()?
            .par_chunks_mut(BLOCK)
            .zip(first.make_mut::<f32>()?.par_chunks_mut(BLOCK))
            .zip(second.make_mut::<f32>()?.par_chunks_mut(BLOCK))
            .zip(gradient.par_chunks(BLOCK))
            .for_each(|(((value, first), second), gradient)| {
                cpu::simd(
                    #[inline(always)]
                    || {
                        for index in 0..value.len() {
                            let g = gradient[index] * self.scale;
                            first[index] = self.old_first * first[index] + self.new_first * g;
                            second[index] = self.old_second * second[index] + self.new_second * g * g;
                            let scale = second[index].sqrt() * self.inverse_root + self.epsilon;
                            value[index] -= decay * value[index] + rate * first[index] / scale;
                        }
                    },
                );
            });
        if let Some(master) = master {
            *value = master.cast(value.dtype())?;
        }
        Ok(())
    }

    /// One step on parameters of a GPU, of which all or none have a master, in one launch.
    fn step_gpu(&self, updates: Vec<Update<'_>>, table: &Table) -> Result<()> {
        use kernels_ptx::Element::{Bf16, F32};
        let mut updates: Vec<_> = updates.into_iter().filter(|update| update.gradient.count() > 0).collect();
        let Some(device) = updates.first().map(|update| update.gradient.device().clone()) else { return Ok(()) };
        let narrow = updates.iter().all(|update| update.master.is_some());
        let (mut words, mut blocks, mut elements) = (Vec::new(), 0, 0);
        let rows = gpu::size(OPERATOR, "the number of parameters", updates.len())?;
        for update in &mut updates {
            let count = gpu::size(OPERATOR, "the number of elements", update.gradient.count())?;
            let value = update.value.make_unique()?;
            let (wide, rounded) = match &mut update.master {
                Some(master) => (master.make_unique()?, Some(value)),
                None => (value, None),
            };
            words.extend([
                Word::Write(wide, F32),
                Word::Write(update.first.make_unique()?, F32),
                Word::Write(update.second.make_unique()?, F32),
                Word::Read(update.gradient.buffer(), F32),
                Word::U64(count.into()),
                Word::U64(blocks),
                Word::U64(update.decay.into()),
                Word::U64(update.rate.to_bits().into()),
            ]);
            words.extend(rounded.map(|rounded| Word::Write(rounded, Bf16)));
            blocks += u64::from(kernels::adamw::AdamW::blocks(count));
            elements += u64::from(count);
        }
        let numbers = [
            self.scale,
            self.old_first,
            self.new_first,
            self.old_second,
            self.new_second,
            self.rate,
            self.inverse_root,
            self.epsilon,
            self.decay,
        ];
        let mut arguments = vec![Argument::Table(table, words), Argument::U32(rows)];
        arguments.extend(numbers.map(Argument::F32));
        gpu::launch(OPERATOR, &device, &kernels::adamw::AdamW { narrow }, gpu::line(blocks), &[elements], &arguments)
    }
}

/// The Euclidean norm of all trainable parameters' gradients together: accumulated in f64 on the CPU; on GPUs the root of
/// [`gradient_square_sum`], for which the host waits.
///
/// # Errors
/// Driver errors.
pub fn gradient_norm(parameters: &Parameters, gradients: &Gradients) -> Result<f64> {
    let gradients = trainable_gradients(parameters, gradients);
    match gradients.first() {
        None => Ok(0.0),
        Some(first) if first.device().is_cpu() => Ok(square_sum_cpu(&gradients)?.sqrt()),
        Some(first) => Ok(f64::from(ops::square_sum_gpu(NORM, first.device(), &gradients)?.item()?).sqrt()),
    }
}

/// The square of [`gradient_norm`] as a scalar f32 on the gradients' device; the host does not wait for it. `None` without
/// gradients. Infinite from norms of 1.8e19 on.
///
/// # Errors
/// Driver errors; out of memory.
pub fn gradient_square_sum(parameters: &Parameters, gradients: &Gradients) -> Result<Option<Tensor>> {
    let gradients = trainable_gradients(parameters, gradients);
    let sum = |first: &&Tensor| match first.device() {
        device if device.is_cpu() => Tensor::from_slice(device, &[], &[square_sum_cpu(&gradients)? as f32]),
        device => ops::square_sum_gpu(NORM, device, &gradients),
    };
    gradients.first().map(sum).transpose()
}

/// In the table's order.
fn trainable_gradients<'a>(parameters: &Parameters, gradients: &'a Gradients) -> Vec<&'a Tensor> {
    let trainable = parameters.iter().filter(|(_, parameter)| parameter.trainable);
    trainable.filter_map(|(_, parameter)| gradients.get(&parameter.value)).collect()
}

/// What clipping multiplies gradients of this norm by: `limit / (norm + 1e-6)`, as PyTorch does, when `norm` exceeds `limit`,
/// 1 otherwise. A norm that is not a number changes nothing: whoever trains has to stop there.
pub fn clip_factor(norm: f64, limit: f64) -> f32 {
    if norm > limit { (limit / (norm + 1e-6)) as f32 } else { 1.0 }
}

/// Scales all gradients by their [`clip_factor`]. [`AdamW::update_scaled`] does the same in passing.
///
/// # Errors
/// Driver errors.
pub fn clip_gradients(gradients: &mut Gradients, norm: f64, limit: f64) -> Result<()> {
    match clip_factor(norm, limit) {
        1.0 => Ok(()),
        factor => gradients.scale(factor),
    }
}

fn square_sum_cpu(tensors: &[&Tensor]) -> Result<f64> {
    let mut total = 0.0;
    for tensor in tensors {
        let values = tensor.host_f32()?;
        let blocks: Vec<f64> = values.par_chunks(BLOCK).map(block_square_sum).collect();
        total += blocks.iter().sum::<f64>();
    }
    Ok(total)
}

fn block_square_sum(block: &[f32]) -> f64 {
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
        parameters.push(Parameter { name: "w".to_owned(), value, trainable: true, decay, rate: 1.0 });
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
    fn a_parameter_in_bf16_moves_by_steps_that_bf16_cannot_hold() {
        let mut wide = one_parameter(&[1.0, -3.0], true);
        let mut narrow = wide.clone();
        for (_, parameter) in narrow.iter_mut() {
            parameter.value = parameter.value.cast(DType::Bf16).unwrap();
        }
        let value = |parameters: &Parameters| parameters.iter().next().unwrap().1.value.clone();
        let update = |parameters: &mut Parameters, optimizer: &mut AdamW| {
            let gradient = Tensor::from_slice(&Device::cpu(), &[2], &[1.0f32, -2.0]).unwrap();
            let mut gradients = Gradients::default();
            gradients.add(&value(parameters), gradient).unwrap();
            optimizer.update(parameters, &gradients, 1e-4).unwrap();
        };
        let (mut wide_optimizer, mut optimizer) = (AdamW::new(OPTIONS, &wide), AdamW::new(OPTIONS, &narrow));
        assert!(optimizer.masters()[0].is_none());
        for _ in 0..100 {
            update(&mut wide, &mut wide_optimizer);
            update(&mut narrow, &mut optimizer);
        }
        let master = optimizer.masters()[0].clone().unwrap();
        assert_eq!(master.to_vec::<f32>().unwrap(), value(&wide).to_vec::<f32>().unwrap());
        assert_eq!(value(&narrow).to_f32_vec().unwrap(), master.cast(DType::Bf16).unwrap().to_f32_vec().unwrap());
        assert!(value(&narrow).to_f32_vec().unwrap()[0] < 0.995 && wide_optimizer.masters()[0].is_none());
        let restore = |masters| AdamW::restore(OPTIONS, &narrow, 100, optimizer.moments().to_vec(), masters);
        let mut restored = restore(optimizer.masters().to_vec()).unwrap();
        let mut copy = narrow.clone();
        update(&mut copy, &mut restored);
        update(&mut narrow.clone(), &mut optimizer);
        let bits = |optimizer: &AdamW| optimizer.masters()[0].clone().unwrap().to_vec::<f32>().unwrap();
        assert_eq!(bits(&restored), bits(&optimizer));
    }

    #[test]
    fn moments_of_another_shape_are_refused_by_name() {
        let parameters = one_parameter(&[3.0, 4.0], false);
        let wrong = Tensor::zeros(&Device::cpu(), &[3], DType::F32).unwrap();
        let error =
            AdamW::restore(OPTIONS, &parameters, 1, vec![Some((wrong.clone(), wrong))], vec![None]).unwrap_err();
        assert!(error.to_string().contains("w: moments are f32 [3], expected f32 [2]"), "{error}");
        assert!(AdamW::restore(OPTIONS, &parameters, 1, Vec::new(), vec![None]).is_err());
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
