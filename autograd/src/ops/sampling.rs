//! The choice of the next token from logits.

use kernels_ptx::kernels::sampling::{ArgMax, Sample, takes_vectors};
use rayon::prelude::*;
use runtime::Argument;

use super::cross_entropy::sizes;
use crate::gpu::{self, Output};
use crate::{DType, Error, Result, Tensor, check};

/// The choice from a row in which a logit is NaN.
pub const NO_TOKEN: u32 = kernels_ptx::kernels::sampling::NO_TOKEN;

/// What a random choice is made from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingOptions {
    /// Divides the logits; above 0.
    pub temperature: f32,
    /// Only the `top_k` most likely tokens, at least 1; `None`: all. Of equal logits the first come first.
    pub top_k: Option<usize>,
    /// Only the most likely tokens that together reach this part of the probability of what `top_k` leaves; 1: all.
    pub top_p: f32,
}

/// The index of the greatest logit of each row, the first of equals; [`NO_TOKEN`] where one is NaN.
///
/// - `logits` `[…, vocabulary]`, result u32 `[…]`
///
/// # Errors
/// An empty vocabulary; element-type errors.
pub fn argmax(logits: &Tensor) -> Result<Tensor> {
    let mut tokens = Output::new(logits.device(), choices(logits), DType::U32)?.tensor();
    argmax_into(&mut tokens, logits)?;
    Ok(tokens)
}

/// As [`argmax`], into a u32 tensor with an element for each row of logits, in place.
///
/// # Errors
/// As [`argmax`]; another number of elements.
pub fn argmax_into(tokens: &mut Tensor, logits: &Tensor) -> Result<()> {
    const OPERATOR: &str = "argmax";
    check_logits(OPERATOR, logits)?;
    check_tokens(OPERATOR, tokens, logits)?;
    if logits.device().is_cpu() {
        return choose_cpu(tokens, logits, |_, row| greatest(row));
    }
    let (rows, vocabulary) = sizes(OPERATOR, logits)?;
    let kernel = ArgMax { element: gpu::element(logits.dtype()), vector: takes_vectors(vocabulary) };
    let target = Argument::Write(tokens.make_unique()?, kernels_ptx::Element::U32);
    let arguments = [target, gpu::read(logits), Argument::U32(vocabulary)];
    let sizes = [rows.into(), vocabulary.into()];
    gpu::launch(OPERATOR, logits.device(), &kernel, Some([rows, 1, 1]), &sizes, &arguments)
}

/// A random index for each row, with the probabilities that the options leave; [`NO_TOKEN`] where a logit is NaN.
///
/// Row `i`'s tokens stand in falling order of their logits, equal ones in order of index. The choice is the first at which
/// the running sum of the probabilities exceeds `uniforms[i]`, so equal numbers give equal choices. Sums are f64 on the CPU
/// and f32 on GPUs: a number within some 1e-6 of a boundary may give the neighbour there.
///
/// - `logits` `[…, vocabulary]`, `uniforms` f32 `[…]` from 0 to below 1, result u32 `[…]`
///
/// # Errors
/// Options out of their ranges; an empty vocabulary; shape and element-type errors.
pub fn sample(logits: &Tensor, uniforms: &Tensor, options: SamplingOptions) -> Result<Tensor> {
    let mut tokens = Output::new(logits.device(), choices(logits), DType::U32)?.tensor();
    sample_into(&mut tokens, logits, uniforms, options)?;
    Ok(tokens)
}

/// As [`sample`], into a u32 tensor with an element for each row of logits, in place.
///
/// # Errors
/// As [`sample`]; another number of elements.
pub fn sample_into(tokens: &mut Tensor, logits: &Tensor, uniforms: &Tensor, options: SamplingOptions) -> Result<()> {
    const OPERATOR: &str = "sample";
    check_logits(OPERATOR, logits)?;
    check_tokens(OPERATOR, tokens, logits)?;
    check::shape(OPERATOR, "uniforms", uniforms, choices(logits))?;
    check::is_f32(OPERATOR, "uniforms", uniforms)?;
    check::positive(OPERATOR, "temperature", options.temperature)?;
    if options.top_k == Some(0) {
        return Err(Error::Invalid { operator: OPERATOR, message: "top_k is 0: expected at least 1".to_owned() });
    }
    if !(options.top_p > 0.0 && options.top_p <= 1.0) {
        let message = format!("top_p is {}: expected a number above 0 and at most 1", options.top_p);
        return Err(Error::Invalid { operator: OPERATOR, message });
    }
    if logits.device().is_cpu() {
        let uniforms = uniforms.host_slice::<f32>()?;
        return choose_cpu(tokens, logits, |index, row| draw(row, uniforms[index], options));
    }
    let (rows, vocabulary) = sizes(OPERATOR, logits)?;
    let top_k = options.top_k.map_or(vocabulary, |top_k| u32::try_from(top_k).unwrap_or(vocabulary));
    let kernel = Sample { element: gpu::element(logits.dtype()), vector: takes_vectors(vocabulary) };
    let target = Argument::Write(tokens.make_unique()?, kernels_ptx::Element::U32);
    let arguments = [
        target,
        gpu::read(logits),
        gpu::read(uniforms),
        Argument::U32(vocabulary),
        Argument::F32(options.temperature),
        Argument::U32(top_k),
        Argument::F32(options.top_p),
    ];
    let sizes = [rows.into(), vocabulary.into()];
    gpu::launch(OPERATOR, logits.device(), &kernel, Some([rows, 1, 1]), &sizes, &arguments)
}

fn check_logits(operator: &'static str, logits: &Tensor) -> Result<()> {
    check::is_float(operator, "logits", logits)?;
    if logits.shape().last().is_none_or(|&vocabulary| vocabulary == 0) {
        let expected = "[…, vocabulary] with at least one token".to_owned();
        return Err(Error::Shape { operator, argument: "logits", expected, found: logits.shape().to_vec() });
    }
    Ok(())
}

fn check_tokens(operator: &'static str, tokens: &Tensor, logits: &Tensor) -> Result<()> {
    check::is_u32(operator, "tokens", tokens)?;
    if tokens.count() != logits.rows() {
        let expected = format!("{} elements, one for each row of logits", logits.rows());
        return Err(Error::Shape { operator, argument: "tokens", expected, found: tokens.shape().to_vec() });
    }
    Ok(())
}

/// The shape of the choices.
fn choices(logits: &Tensor) -> &[usize] {
    &logits.shape()[..logits.shape().len().saturating_sub(1)]
}

/// A choice for every row that has no NaN, from the row's index and its logits.
fn choose_cpu(tokens: &mut Tensor, logits: &Tensor, choose: impl Fn(usize, &[f32]) -> usize + Sync) -> Result<()> {
    let (values, vocabulary) = (logits.host_f32()?, logits.last_dimension());
    let rows = values.par_chunks(vocabulary).enumerate();
    tokens.make_mut::<u32>()?.par_iter_mut().zip(rows).for_each(|(token, (index, row))| {
        let any_nan = row.iter().any(|logit| logit.is_nan());
        *token = if any_nan { NO_TOKEN } else { choose(index, row) as u32 };
    });
    Ok(())
}

fn greatest(row: &[f32]) -> usize {
    let better = |best: usize, (index, logit): (usize, &f32)| if *logit > row[best] { index } else { best };
    row.iter().enumerate().fold(0, better)
}

fn draw(row: &[f32], uniform: f32, options: SamplingOptions) -> usize {
    let mut order: Vec<usize> = (0..row.len()).collect();
    // Stable: ties keep the order of indices.
    order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
    order.truncate(options.top_k.unwrap_or(row.len()));
    let highest = row[order[0]];
    // Without the comparison, infinite logits would have no weight.
    let weight = |logit: f32| if logit == highest { 0.0 } else { (logit - highest) / options.temperature };
    let weights: Vec<f64> = order.iter().map(|&token| f64::from(weight(row[token])).exp()).collect();
    let needed = f64::from(options.top_p) * weights.iter().sum::<f64>();
    let (mut kept, mut mass) = (0, 0.0);
    while kept < weights.len() && (kept == 0 || mass < needed) {
        mass += weights[kept];
        kept += 1;
    }
    let mut left = f64::from(uniform) * mass;
    let exceeded = weights[..kept].iter().position(|weight| {
        left -= weight;
        left < 0.0
    });
    order[exceeded.unwrap_or(kept - 1)]
}

#[cfg(test)]
mod tests {
    use runtime::Device;

    use super::*;

    const ALL: SamplingOptions = SamplingOptions { temperature: 1.0, top_k: None, top_p: 1.0 };

    /// The choices from one row of logits for several numbers.
    fn choices_of(logits: &[f32], uniforms: &[f32], options: SamplingOptions) -> Vec<u32> {
        let device = Device::cpu();
        let rows = logits.repeat(uniforms.len());
        let logits = Tensor::from_slice(&device, &[uniforms.len(), logits.len()], &rows).unwrap();
        let uniforms = Tensor::from_slice(&device, &[uniforms.len()], uniforms).unwrap();
        sample(&logits, &uniforms, options).unwrap().to_vec::<u32>().unwrap()
    }

    #[test]
    fn the_first_of_the_greatest_is_chosen() {
        let logits = [[1.0f32, 3.0, 3.0, 2.0], [-0.0, 0.0, -1.0, f32::NEG_INFINITY], [0.0, f32::NAN, 9.0, 1.0]];
        let logits = Tensor::from_slice(&Device::cpu(), &[3, 4], logits.as_flattened()).unwrap();
        assert_eq!(argmax(&logits).unwrap().to_vec::<u32>().unwrap(), [1, 0, NO_TOKEN]);
    }

    #[test]
    fn numbers_give_the_tokens_at_which_the_running_sum_exceeds_them() {
        // Probabilities 1/2, 1/3, 1/6 of the tokens 1, 2, 0.
        let logits = [0.0, 3f32.ln(), 2f32.ln()];
        assert_eq!(choices_of(&logits, &[0.0, 0.49, 0.51, 0.83, 0.84, 0.999], ALL), [1, 1, 2, 2, 0, 0]);
        let two = SamplingOptions { top_k: Some(2), ..ALL };
        assert_eq!(choices_of(&logits, &[0.0, 0.59, 0.61, 0.999], two), [1, 1, 2, 2]);
        // A half is reached by the first alone; a little more is not.
        assert_eq!(choices_of(&logits, &[0.0, 0.999], SamplingOptions { top_p: 0.49, ..ALL }), [1, 1]);
        assert_eq!(choices_of(&logits, &[0.61, 0.999], SamplingOptions { top_p: 0.6, ..ALL }), [2, 2]);
        // At half the temperature probabilities are squared: 9/14, 4/14, 1/14.
        let cold = SamplingOptions { temperature: 0.5, ..ALL };
        assert_eq!(choices_of(&logits, &[0.64, 0.65, 0.92, 0.93], cold), [1, 2, 2, 0]);
    }

    #[test]
    fn options_out_of_their_ranges_are_named() {
        let logits = Tensor::from_slice(&Device::cpu(), &[1, 2], &[0.0f32, 1.0]).unwrap();
        let uniforms = Tensor::from_slice(&Device::cpu(), &[1], &[0.5f32]).unwrap();
        let message = |options| sample(&logits, &uniforms, options).unwrap_err().to_string();
        assert!(message(SamplingOptions { temperature: 0.0, ..ALL }).contains("temperature is 0"));
        assert!(message(SamplingOptions { top_k: Some(0), ..ALL }).contains("top_k is 0"));
        assert!(message(SamplingOptions { top_p: 1.5, ..ALL }).contains("top_p is 1.5"));
        let empty = Tensor::zeros(&Device::cpu(), &[1, 0], DType::F32).unwrap();
        assert!(argmax(&empty).unwrap_err().to_string().contains("at least one token"));
    }
}
