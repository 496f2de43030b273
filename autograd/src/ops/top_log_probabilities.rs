//! A teacher's distribution as its likeliest tokens and the mass of all others: what fits on a disk.

use kernels_ptx::kernels::cross_entropy::takes_vectors;
use kernels_ptx::kernels::top_log_probabilities::TeacherLogits;
use rayon::prelude::*;
use runtime::{Argument, Device};

use super::cross_entropy::sizes;
use super::head_loss::{HeadChunks, ranges, rows_of};
use super::linear::products;
use crate::gpu::{self, Output};
use crate::{DType, Error, Result, Tensor, check};

const OPERATOR: &str = "top_log_probabilities";

/// The likeliest tokens of every position, and what is left.
#[derive(Clone, Debug)]
pub struct TopLogProbabilities {
    /// u32 `[…, count]`: token ids, the likeliest first; of equal ones the lower id.
    pub tokens: Tensor,
    /// f32 `[…, count]`: the logarithms of their probabilities.
    pub log_probabilities: Tensor,
    /// f32 `[…]`: the logarithm of the probability that it is none of them; −∞ where they are all there is.
    pub tail: Tensor,
}

impl TopLogProbabilities {
    /// Of the distributions `softmax(logits / temperature)`; `logits` is `[…, vocabulary]`, on any device. Computed in f64 on the
    /// host; the result is on the CPU.
    ///
    /// # Errors
    /// A count that is not from 1 to the vocabulary's size; a temperature that is not positive; driver errors.
    pub fn of(logits: &Tensor, count: usize, temperature: f32) -> Result<Self> {
        check::is_float(OPERATOR, "logits", logits)?;
        let rows = listed(logits, count, temperature)?;
        Self::from_rows(&rows, &logits.shape()[..logits.shape().len() - 1], count)
    }

    /// Of a model's distributions, from the states before its head: `hidden` is `[…, width]`, `head` `[vocabulary, width]`. The
    /// logits are those that [`head_loss()`](super::head_loss()) computes, and never exist whole.
    ///
    /// # Errors
    /// As [`TopLogProbabilities::of`]; shape errors that name the argument.
    pub fn of_head(hidden: &Tensor, head: &Tensor, count: usize, temperature: f32) -> Result<Self> {
        check::is_float(OPERATOR, "hidden", hidden)?;
        check::is_float(OPERATOR, "head", head)?;
        check::rank(OPERATOR, "head", head, 2, "[vocabulary, width]")?;
        check::shape(OPERATOR, "head", head, &[head.shape()[0], hidden.last_dimension()])?;
        let head = if hidden.device().is_cpu() { head.clone() } else { head.cast(hidden.dtype())? };
        let chunks = HeadChunks::new(hidden.rows(), hidden.last_dimension(), head.shape()[0], hidden.dtype());
        let mut rows = Vec::with_capacity(hidden.rows());
        for (first, positions) in ranges(hidden.rows(), chunks.logits) {
            let logits = products::forward(&rows_of(hidden, first, positions)?, &head)?;
            rows.extend(listed(&logits, count, temperature)?);
        }
        Self::from_rows(&rows, &hidden.shape()[..hidden.shape().len() - 1], count)
    }

    fn from_rows(rows: &[Row], positions: &[usize], count: usize) -> Result<Self> {
        let listed = [positions, &[count]].concat();
        let cpu = Device::cpu();
        let tokens: Vec<u32> = rows.iter().flat_map(|row| row.tokens.iter().copied()).collect();
        let log_probabilities: Vec<f32> = rows.iter().flat_map(|row| row.log_probabilities.iter().copied()).collect();
        let tail: Vec<f32> = rows.iter().map(|row| row.tail).collect();
        Ok(Self {
            tokens: Tensor::from_slice(&cpu, &listed, &tokens)?,
            log_probabilities: Tensor::from_slice(&cpu, &listed, &log_probabilities)?,
            tail: Tensor::from_slice(&cpu, positions, &tail)?,
        })
    }

    /// Logits of the student's shape and type whose divergence from the student, with a teacher's temperature of 1, is that between
    /// the two distributions over the listed tokens and "another one": tokens that are not listed share the tail as the
    /// student shares its own. Never more than the divergence from the whole distribution, and equal where all tokens are listed.
    ///
    /// - `student` logits `[…, vocabulary]`, which the divergence will divide by `student_temperature`
    ///
    /// # Errors
    /// Shape errors that name the argument; on the CPU, a token outside the vocabulary; driver errors.
    pub fn logits_beside(&self, student: &Tensor, student_temperature: f32) -> Result<Tensor> {
        check::is_float(OPERATOR, "student", student)?;
        check::positive(OPERATOR, "student_temperature", student_temperature)?;
        self.check(&student.shape()[..student.shape().len().saturating_sub(1)])?;
        let factor = 1.0 / student_temperature;
        if student.device().is_cpu() { self.beside_cpu(student, factor) } else { self.beside_gpu(student, factor) }
    }

    /// Tokens listed of a position.
    pub fn count(&self) -> usize {
        self.tokens.last_dimension()
    }

    /// The same on another device.
    ///
    /// # Errors
    /// Out of memory; driver errors.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        self.map(|tensor, _| match tensor.dtype() {
            DType::U32 => Tensor::from_slice(device, tensor.shape(), &tensor.to_vec::<u32>()?),
            _ => Tensor::from_slice(device, tensor.shape(), &tensor.to_vec::<f32>()?),
        })
    }

    /// What a function makes of each of the tensors and of its numbers per position.
    pub(super) fn map(&self, function: impl Fn(&Tensor, usize) -> Result<Tensor>) -> Result<Self> {
        Ok(Self {
            tokens: function(&self.tokens, self.count())?,
            log_probabilities: function(&self.log_probabilities, self.count())?,
            tail: function(&self.tail, 1)?,
        })
    }

    /// That they are of so many positions.
    pub(super) fn check(&self, positions: &[usize]) -> Result<()> {
        let listed = [positions, &[self.count()]].concat();
        check::is_u32(OPERATOR, "tokens", &self.tokens)?;
        check::shape(OPERATOR, "tokens", &self.tokens, &listed)?;
        check::shape(OPERATOR, "log_probabilities", &self.log_probabilities, &listed)?;
        check::shape(OPERATOR, "tail", &self.tail, positions)
    }

    fn beside_cpu(&self, student: &Tensor, factor: f32) -> Result<Tensor> {
        let (vocabulary, count) = (student.last_dimension().max(1), self.count().max(1));
        let tokens = self.tokens.host_slice::<u32>()?;
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocabulary) {
            let message = format!("tokens holds {token}: expected ids below the vocabulary's {vocabulary}");
            return Err(Error::Invalid { operator: OPERATOR, message });
        }
        let mut logits = student.to_f32_vec()?;
        logits
            .par_chunks_mut(vocabulary)
            .zip(tokens.par_chunks(count))
            .zip(self.log_probabilities.host_slice::<f32>()?.par_chunks(count))
            .zip(self.tail.host_slice::<f32>()?)
            .for_each(|(((row, tokens), log_probabilities), tail)| {
                for &token in tokens {
                    row[token as usize] = f32::NEG_INFINITY;
                }
                let shift = f64::from(*tail) - log_sum_exp(row, factor);
                for logit in row.iter_mut() {
                    *logit = (f64::from(*logit * factor) + shift) as f32;
                }
                for (&token, log_probability) in tokens.iter().zip(log_probabilities) {
                    row[token as usize] = *log_probability;
                }
            });
        Tensor::from_slice(student.device(), student.shape(), &logits)?.cast(student.dtype())
    }

    fn beside_gpu(&self, student: &Tensor, factor: f32) -> Result<Tensor> {
        let (device, (rows, vocabulary)) = (student.device(), sizes(OPERATOR, student)?);
        let count = gpu::size(OPERATOR, "the count of listed tokens", self.count())?;
        let kernel = TeacherLogits { element: gpu::element(student.dtype()), vector: takes_vectors(vocabulary) };
        let mut logits = Output::like(student)?;
        let arguments = [
            logits.write(),
            gpu::read(student),
            gpu::read(&self.tokens),
            gpu::read(&self.log_probabilities),
            gpu::read(&self.tail),
            Argument::F32(factor),
            Argument::U32(count),
            Argument::U32(vocabulary),
        ];
        let sizes = [rows.into(), vocabulary.into(), count.into()];
        gpu::launch(OPERATOR, device, &kernel, Some([rows, 1, 1]), &sizes, &arguments)?;
        Ok(logits.tensor())
    }
}

struct Row {
    tokens: Vec<u32>,
    log_probabilities: Vec<f32>,
    tail: f32,
}

/// The likeliest tokens of every row of logits.
fn listed(logits: &Tensor, count: usize, temperature: f32) -> Result<Vec<Row>> {
    check::positive(OPERATOR, "temperature", temperature)?;
    let vocabulary = logits.last_dimension();
    if !(1..=vocabulary).contains(&count) {
        let message = format!("count is {count}: expected from 1 to the vocabulary's {vocabulary}");
        return Err(Error::Invalid { operator: OPERATOR, message });
    }
    let values = logits.to_f32_vec()?;
    Ok(values.par_chunks(vocabulary).map(|row| Row::of(row, count, temperature)).collect())
}

impl Row {
    fn of(logits: &[f32], count: usize, temperature: f32) -> Self {
        let factor = 1.0 / temperature;
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        let likelier = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then_with(|| a.cmp(b));
        if count < order.len() {
            order.select_nth_unstable_by(count, likelier);
        }
        let listed = &mut order[..count];
        listed.sort_unstable_by(likelier);
        let mut rest = logits.to_vec();
        for &token in listed.iter() {
            rest[token as usize] = f32::NEG_INFINITY;
        }
        let all = log_sum_exp(logits, factor);
        Self {
            log_probabilities: listed
                .iter()
                .map(|&token| (f64::from(logits[token as usize] * factor) - all) as f32)
                .collect(),
            tail: (log_sum_exp(&rest, factor) - all) as f32,
            tokens: listed.to_vec(),
        }
    }
}

/// `ln Σ e^(factor · x)`; −∞ of nothing but −∞.
fn log_sum_exp(logits: &[f32], factor: f32) -> f64 {
    let greatest = logits.iter().map(|logit| f64::from(*logit * factor)).fold(f64::NEG_INFINITY, f64::max);
    if greatest == f64::NEG_INFINITY {
        return greatest;
    }
    greatest + logits.iter().map(|logit| (f64::from(*logit * factor) - greatest).exp()).sum::<f64>().ln()
}
