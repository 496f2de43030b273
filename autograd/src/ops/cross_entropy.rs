//! Cross-entropy of logits against labels.

use kernels_ptx::kernels::cross_entropy::{CrossEntropyBackward, CrossEntropyForward, takes_vectors};
use kernels_ptx::kernels::loss_total::LossTotal;
use rayon::prelude::*;
use runtime::Argument;

use super::vocabulary_loss::{FromLabels, Losses, Results, kernel, scale_by};
use crate::cpu::{self, LogSumExp};
use crate::gpu::{self, Output};
use crate::{DType, Error, Result, Tape, Tensor, Var, check};

const OPERATOR: &str = "cross_entropy";

/// The label of a position that does not count.
pub const IGNORED_LABEL: u32 = kernels_ptx::kernels::cross_entropy::IGNORED_LABEL;

/// A cross-entropy loss and what it was made of.
#[derive(Debug)]
pub struct CrossEntropy {
    /// Scalar f32: `Σ per_token / denominator`.
    pub loss: Var,
    /// f32, shape of the labels: `logsumexp(logits) - logits[label]` in nats; 0 where the label is ignored.
    pub per_token: Tensor,
}

/// Cross-entropy in nats, summed and divided by `denominator`.
///
/// - `logits` `[…, vocabulary]`, `labels` u32 `[…]`, [`IGNORED_LABEL`] where a position does not count. No shift.
/// - `denominator`: usually the number of labels that count in the whole batch, which makes the sum over micro-batches
///   independent of how the batch was cut
///
/// On GPUs, where reading the labels would make the host wait, a label outside the vocabulary gives NaN: the loss, and the
/// gradient of its row.
///
/// # Errors
/// Shape errors that name the argument; a denominator that is not positive; on the CPU a label outside the vocabulary.
pub fn cross_entropy(tape: &Tape<'_>, logits: &Var, labels: &Tensor, denominator: f32) -> Result<CrossEntropy> {
    check::is_float(OPERATOR, "logits", logits)?;
    check::is_u32(OPERATOR, "labels", labels)?;
    check::shape(OPERATOR, "labels", labels, &logits.shape()[..logits.shape().len().saturating_sub(1)])?;
    check::positive(OPERATOR, "denominator", denominator)?;
    let (saved_logits, saved_labels) = (logits.tensor().clone(), labels.clone());
    if logits.device().is_cpu() {
        check_labels(labels, logits.last_dimension())?;
        let (per_token, log_sums) = forward_cpu(logits, labels.host_slice()?)?;
        let total: f64 = per_token.iter().map(|loss| f64::from(*loss)).sum();
        let loss = Tensor::from_slice(logits.device(), &[], &[(total / f64::from(denominator)) as f32])?;
        let per_token = Tensor::from_slice(logits.device(), labels.shape(), &per_token)?;
        let loss = tape.record_one(&[logits], loss, move |gradient, _| {
            let factor = gradient.item()? / denominator;
            Ok(vec![Some(backward_cpu(&saved_logits, saved_labels.host_slice()?, &log_sums, factor)?)])
        });
        return Ok(CrossEntropy { loss, per_token });
    }
    if let Some(loss) = record_fused(tape, logits, labels, denominator)? {
        return Ok(loss);
    }
    let (per_token, statistics) = forward_gpu(logits, labels)?;
    let loss = total_gpu(OPERATOR, &per_token, None, denominator)?;
    let loss = tape.record_one(&[logits], loss, move |gradient, _| {
        Ok(vec![Some(backward_gpu(gradient, &saved_logits, &saved_labels, &statistics, denominator)?)])
    });
    Ok(CrossEntropy { loss, per_token })
}

fn check_labels(labels: &Tensor, vocabulary: usize) -> Result<()> {
    let labels = labels.host_slice::<u32>()?;
    let outside = |label: &u32| *label != IGNORED_LABEL && *label as usize >= vocabulary;
    match labels.iter().position(outside) {
        None => Ok(()),
        Some(position) => Err(Error::IndexOutOfRange {
            operator: OPERATOR,
            argument: "labels",
            position,
            value: labels[position] as usize,
            limit: vocabulary,
        }),
    }
}

/// Rows and vocabulary of logits as kernels take them.
pub(super) fn sizes(operator: &'static str, logits: &Tensor) -> Result<(u32, u32)> {
    let rows = gpu::size(operator, "the number of rows", logits.rows())?;
    Ok((rows, gpu::size(operator, "the vocabulary", logits.last_dimension())?))
}

/// By the kernel that computes the gradient together with the loss, where there is one.
fn record_fused(tape: &Tape<'_>, logits: &Var, labels: &Tensor, denominator: f32) -> Result<Option<CrossEntropy>> {
    let with_gradient = tape.is_recording() && logits.needs_gradient();
    let kernel = kernel(logits.device(), logits.dtype(), None, true, with_gradient, logits.last_dimension());
    let Some(kernel) = kernel else { return Ok(None) };
    let losses = Losses { teacher: None, labels: Some(FromLabels { labels, denominator, weight: 1.0 }) };
    let mut per_token = Output::new(logits.device(), labels.shape(), DType::F32)?;
    let mut gradient = with_gradient.then(|| Output::like(logits)).transpose()?;
    let results = Results {
        divergences: None,
        cross_entropies: Some(&mut per_token),
        gradient: gradient.as_mut().map(|gradient| (gradient, 0)),
    };
    losses.launch(OPERATOR, &kernel, logits, 0, results)?;
    let per_token = per_token.tensor();
    let loss = total_gpu(OPERATOR, &per_token, None, denominator)?;
    let loss = match gradient.map(Output::tensor) {
        None => Var::constant(&loss),
        Some(mut gradient) => tape.record_one(&[logits], loss, move |factor, _| {
            scale_by(OPERATOR, &mut gradient, factor)?;
            Ok(vec![Some(gradient)])
        }),
    };
    Ok(Some(CrossEntropy { loss, per_token }))
}

/// The loss of every row, and the two parts of its log-sum-exp.
fn forward_gpu(logits: &Tensor, labels: &Tensor) -> Result<(Tensor, Tensor)> {
    let (device, (rows, vocabulary)) = (logits.device(), sizes(OPERATOR, logits)?);
    let kernel = CrossEntropyForward { element: gpu::element(logits.dtype()), vector: takes_vectors(vocabulary) };
    let mut losses = Output::new(device, labels.shape(), DType::F32)?;
    let mut statistics = Output::new(device, &[logits.rows(), 2], DType::F32)?;
    let arguments =
        [losses.write(), statistics.write(), gpu::read(logits), gpu::read(labels), Argument::U32(vocabulary)];
    gpu::launch(OPERATOR, device, &kernel, Some([rows, 1, 1]), &[rows.into(), vocabulary.into()], &arguments)?;
    Ok((losses.tensor(), statistics.tensor()))
}

fn backward_gpu(
    gradient: &Tensor,
    logits: &Tensor,
    labels: &Tensor,
    statistics: &Tensor,
    denominator: f32,
) -> Result<Tensor> {
    let (device, (rows, vocabulary)) = (logits.device(), sizes(OPERATOR, logits)?);
    let gradient = gradient.cast(DType::F32)?;
    let kernel = CrossEntropyBackward { element: gpu::element(logits.dtype()), vector: takes_vectors(vocabulary) };
    let mut logits_gradient = Output::like(logits)?;
    let arguments = [
        logits_gradient.write(),
        gpu::read(&gradient),
        gpu::read(logits),
        gpu::read(labels),
        gpu::read(statistics),
        Argument::F32(1.0 / denominator),
        Argument::U32(vocabulary),
    ];
    gpu::launch(OPERATOR, device, &kernel, Some([rows, 1, 1]), &[rows.into(), vocabulary.into()], &arguments)?;
    Ok(logits_gradient.tensor())
}

/// `Σ weights · losses / denominator`, a scalar f32; without weights all are 1.
pub(super) fn total_gpu(
    operator: &'static str,
    losses: &Tensor,
    weights: Option<&Tensor>,
    denominator: f32,
) -> Result<Tensor> {
    let count = gpu::size(operator, "the number of rows", losses.count())?;
    let mut total = Output::new(losses.device(), &[], DType::F32)?;
    let mut arguments = vec![total.write(), gpu::read(losses)];
    arguments.extend(weights.map(gpu::read));
    arguments.extend([Argument::F32(denominator), Argument::U32(count)]);
    let kernel = LossTotal { weighted: weights.is_some() };
    gpu::launch(operator, losses.device(), &kernel, Some([1, 1, 1]), &[count.into()], &arguments)?;
    Ok(total.tensor())
}

/// Loss and log-sum-exp of every row; 0 and `None` where the label is ignored.
fn forward_cpu(logits: &Tensor, labels: &[u32]) -> Result<(Vec<f32>, Vec<Option<LogSumExp>>)> {
    let values = logits.host_f32()?;
    let vocabulary = logits.last_dimension().max(1);
    Ok(labels
        .par_iter()
        .zip(values.par_chunks(vocabulary))
        .map(|(&label, row)| {
            if label == IGNORED_LABEL {
                return (0.0, None);
            }
            let log_sum = cpu::simd(
                #[inline(always)]
                || LogSumExp::of(row, 1.0),
            );
            (0.0 - log_sum.log_probability(row[label as usize]), Some(log_sum))
        })
        .unzip())
}

/// `factor · (softmax(logits) - onehot(label))`; 0 where the label is ignored.
fn backward_cpu(logits: &Tensor, labels: &[u32], log_sums: &[Option<LogSumExp>], factor: f32) -> Result<Tensor> {
    let values = logits.host_f32()?;
    let vocabulary = logits.last_dimension().max(1);
    Tensor::compute(logits.device(), logits.shape(), logits.dtype(), |output| {
        output
            .par_chunks_mut(vocabulary)
            .zip(values.par_chunks(vocabulary))
            .zip(labels.par_iter().zip(log_sums))
            .for_each(|((output, row), (&label, log_sum))| {
                let Some(log_sum) = log_sum else { return output.fill(0.0) };
                cpu::simd(
                    #[inline(always)]
                    || {
                        for (output, logit) in output.iter_mut().zip(row) {
                            *output = factor * cpu::exp(log_sum.log_probability(*logit));
                        }
                    },
                );
                output[label as usize] -= factor;
            });
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use runtime::Device;

    use super::*;
    use crate::DType;

    #[test]
    fn uniform_logits_cost_the_logarithm_of_the_vocabulary() {
        let device = Device::cpu();
        let logits = Tensor::zeros(&device, &[3, 5], DType::F32).unwrap();
        let labels = Tensor::from_slice(&device, &[3], &[4, IGNORED_LABEL, 0]).unwrap();
        let tape = Tape::new();
        let result = cross_entropy(&tape, &tape.leaf(&logits), &labels, 2.0).unwrap();
        assert!((result.loss.item().unwrap() - 5f32.ln()).abs() < 1e-6);
        assert_eq!(result.per_token.to_vec::<f32>().unwrap()[1], 0.0);
        let gradient = tape.backward(&result.loss).unwrap().take(&logits).unwrap().to_vec::<f32>().unwrap();
        let expected = [0.1, 0.1, 0.1, 0.1, -0.4, 0.0, 0.0, 0.0, 0.0, 0.0, -0.4, 0.1, 0.1, 0.1, 0.1];
        for (found, expected) in gradient.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-6, "{gradient:?}");
        }
    }

    #[test]
    fn large_logits_do_not_overflow_and_nan_is_not_hidden() {
        let device = Device::cpu();
        let labels = Tensor::from_slice(&device, &[1], &[1u32]).unwrap();
        let loss = |logits: &[f32]| {
            let logits = Var::constant(&Tensor::from_slice(&device, &[1, logits.len()], logits).unwrap());
            cross_entropy(&Tape::inference(), &logits, &labels, 1.0).unwrap().loss.item().unwrap()
        };
        assert_eq!(loss(&[3e38, 0.0]), 3e38);
        assert_eq!(loss(&[-1e30, 1e30]), 0.0);
        assert!(loss(&[f32::NAN, 0.0]).is_nan());
        assert!(loss(&[0.0, 0.0, f32::NAN]).is_nan());
    }

    #[test]
    fn large_logits_keep_the_digits_of_their_probabilities() {
        let device = Device::cpu();
        let logits: Vec<f32> = (0..999).map(|i| 5e3 + (i * 37 % 101) as f32 / 16.0).collect();
        let wide: Vec<f64> = logits.iter().map(|logit| (f64::from(*logit) - 5e3).exp()).collect();
        let sum: f64 = wide.iter().sum();
        let logits = Tensor::from_slice(&device, &[1, 999], &logits).unwrap();
        let labels = Tensor::from_slice(&device, &[1], &[100u32]).unwrap();
        let tape = Tape::new();
        let result = cross_entropy(&tape, &tape.leaf(&logits), &labels, 1.0).unwrap();
        assert!((f64::from(result.loss.item().unwrap()) / (sum / wide[100]).ln() - 1.0).abs() < 1e-6);
        let gradient = tape.backward(&result.loss).unwrap().take(&logits).unwrap().to_vec::<f32>().unwrap();
        assert!(gradient.iter().map(|value| f64::from(*value)).sum::<f64>().abs() < 1e-6);
        for (index, gradient) in gradient.into_iter().enumerate().filter(|(index, _)| *index != 100) {
            // The probability's exponent, at most 12, is rounded to f32: 12 · 6e-8.
            assert!((f64::from(gradient) * sum / wide[index] - 1.0).abs() < 1.5e-6, "{index}: {gradient}");
        }
    }

    #[test]
    fn a_label_outside_the_vocabulary_is_named() {
        let device = Device::cpu();
        let logits = Var::constant(&Tensor::zeros(&device, &[1, 5], DType::F32).unwrap());
        let labels = Tensor::from_slice(&device, &[1], &[5u32]).unwrap();
        let message = cross_entropy(&Tape::inference(), &logits, &labels, 1.0).unwrap_err().to_string();
        assert_eq!(message, "cross_entropy: labels[0] is 5, expected a value below 5");
        assert!(cross_entropy(&Tape::inference(), &logits, &labels, 0.0).is_err());
    }
}
