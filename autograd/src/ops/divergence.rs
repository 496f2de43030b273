//! Divergences between the student's and the teacher's next-token distributions: the distillation losses.

use kernels_ptx::kernels::divergence::{
    self as kernels, DivergenceBackward, DivergenceForward, STATISTICS, takes_vectors,
};
use rayon::prelude::*;
use runtime::Argument;

use super::cross_entropy::{sizes, total_gpu};
use super::vocabulary_loss::{FromTeacher, Losses, Results, kernel, scale_by};
use crate::cpu::{self, LogSumExp};
use crate::gpu::{self, Output};
use crate::{DType, Result, Tape, Tensor, Var, check};

const OPERATOR: &str = "divergence";

/// Which divergence, of student `q` and teacher `p`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Divergence {
    /// `Σ q (ln q - ln p)`: mode-seeking, the Apriel-H1 loss (equation 5).
    ReverseKl,
    /// `Σ p (ln p - ln q)`.
    ForwardKl,
    /// `½ KL(q ‖ m) + ½ KL(p ‖ m)`, `m = (q + p) / 2`.
    JensenShannon,
    /// `-Σ p ln q`: the forward KL plus the teacher's entropy.
    SoftCrossEntropy,
}

/// Temperatures, mask and normalisation of a divergence.
#[derive(Clone, Copy, Debug)]
pub struct DivergenceOptions<'a> {
    /// Which divergence.
    pub divergence: Divergence,
    /// Divides the student's logits. No factor τ² is applied to the loss.
    pub student_temperature: f32,
    /// Divides the teacher's logits.
    pub teacher_temperature: f32,
    /// f32 `[…]`: weight of each position, usually 0 or 1. `None`: all 1. Positions of weight 0 are not looked at.
    pub mask: Option<&'a Tensor>,
    /// Divides the masked sum: usually the number of positions that count in the whole batch.
    pub denominator: f32,
}

impl DivergenceOptions<'_> {
    /// That they fit logits of so many positions.
    pub(super) fn check(&self, operator: &'static str, positions: &[usize]) -> Result<()> {
        check::positive(operator, "student_temperature", self.student_temperature)?;
        check::positive(operator, "teacher_temperature", self.teacher_temperature)?;
        check::positive(operator, "denominator", self.denominator)?;
        match self.mask {
            Some(mask) => check::shape(operator, "mask", mask, positions),
            None => Ok(()),
        }
    }
}

/// A divergence and what it was made of.
#[derive(Debug)]
pub struct DivergenceLoss {
    /// Scalar f32: `Σ mask · per_token / denominator`.
    pub loss: Var,
    /// f32 `[…]`: the divergence of each position in nats; 0 where the mask is 0.
    pub per_token: Tensor,
}

/// The divergence of the student's distribution from the teacher's, position by position. Gradients flow to the student
/// only.
///
/// - `student`, `teacher` logits `[…, vocabulary]` of equal shape
///
/// # Errors
/// Shape errors that name the argument; a temperature or denominator that is not positive.
pub fn divergence(
    tape: &Tape<'_>,
    student: &Var,
    teacher: &Tensor,
    options: DivergenceOptions<'_>,
) -> Result<DivergenceLoss> {
    check::is_float(OPERATOR, "student", student)?;
    check::is_float(OPERATOR, "teacher", teacher)?;
    check::shape(OPERATOR, "teacher", teacher, student.shape())?;
    let positions = &student.shape()[..student.shape().len().saturating_sub(1)];
    options.check(OPERATOR, positions)?;
    let rows = Rows {
        divergence: options.divergence,
        student_factor: 1.0 / options.student_temperature,
        teacher_factor: 1.0 / options.teacher_temperature,
    };
    if student.device().is_cpu() {
        let mask = options.mask.map(Tensor::to_f32_vec).transpose()?;
        rows.record_cpu(tape, student, teacher, mask, options.denominator)
    } else {
        let mask = match options.mask {
            Some(mask) => mask.cast(DType::F32)?,
            None => Tensor::filled(student.device(), positions, DType::F32, 1.0)?,
        };
        rows.record_gpu(tape, student, teacher, mask, options.denominator)
    }
}

/// What is computed for every row of logits.
#[derive(Clone, Copy)]
struct Rows {
    divergence: Divergence,
    student_factor: f32,
    teacher_factor: f32,
}

/// On GPUs. Nothing here makes the host wait.
impl Rows {
    fn record_gpu(
        self,
        tape: &Tape<'_>,
        student: &Var,
        teacher: &Tensor,
        mask: Tensor,
        denominator: f32,
    ) -> Result<DivergenceLoss> {
        if let Some(loss) = self.record_fused(tape, student, teacher, &mask, denominator)? {
            return Ok(loss);
        }
        // Where the types differ, what bf16 would lose is kept.
        let dtype = student.dtype();
        let common = if dtype == teacher.dtype() { dtype } else { DType::F32 };
        let (student_logits, teacher_logits) = (student.cast(common)?, teacher.cast(common)?);
        let (per_token, statistics) = self.forward_gpu(&student_logits, &teacher_logits, &mask)?;
        let loss = total_gpu(OPERATOR, &per_token, Some(&mask), denominator)?;
        let loss = tape.record_one(&[student], loss, move |gradient, _| {
            let scale = self.student_factor / denominator;
            let gradient = gradient.cast(DType::F32)?;
            let student_gradient =
                self.backward_gpu(&gradient, &student_logits, &teacher_logits, &mask, &statistics, scale)?;
            Ok(vec![Some(student_gradient.cast(dtype)?)])
        });
        Ok(DivergenceLoss { loss, per_token })
    }

    /// By the kernel that computes the gradient together with the loss, where there is one.
    fn record_fused(
        self,
        tape: &Tape<'_>,
        student: &Var,
        teacher: &Tensor,
        mask: &Tensor,
        denominator: f32,
    ) -> Result<Option<DivergenceLoss>> {
        let with_gradient = tape.is_recording() && student.needs_gradient();
        let from_teacher = Some((teacher.dtype(), self.student_factor));
        let kernel =
            kernel(student.device(), student.dtype(), from_teacher, false, with_gradient, student.last_dimension());
        let Some(kernel) = kernel.filter(|_| self.divergence == Divergence::ReverseKl) else { return Ok(None) };
        let teacher = FromTeacher {
            logits: teacher,
            weights: mask,
            factors: [self.student_factor, self.teacher_factor],
            denominator,
            weight: 1.0,
        };
        let losses = Losses { teacher: Some(teacher), labels: None };
        let mut per_token = Output::new(student.device(), mask.shape(), DType::F32)?;
        let mut gradient = with_gradient.then(|| Output::like(student)).transpose()?;
        let results = Results {
            divergences: Some(&mut per_token),
            cross_entropies: None,
            gradient: gradient.as_mut().map(|gradient| (gradient, 0)),
        };
        losses.launch(OPERATOR, &kernel, student, 0, results)?;
        let per_token = per_token.tensor();
        let loss = total_gpu(OPERATOR, &per_token, Some(mask), denominator)?;
        let loss = match gradient.map(Output::tensor) {
            None => Var::constant(&loss),
            Some(mut gradient) => tape.record_one(&[student], loss, move |factor, _| {
                scale_by(OPERATOR, &mut gradient, factor)?;
                Ok(vec![Some(gradient)])
            }),
        };
        Ok(Some(DivergenceLoss { loss, per_token }))
    }

    /// The divergence of every row, and its statistics as the kernels define them.
    fn forward_gpu(self, student: &Tensor, teacher: &Tensor, mask: &Tensor) -> Result<(Tensor, Tensor)> {
        let (device, (rows, vocabulary)) = (student.device(), sizes(OPERATOR, student)?);
        let kernel = DivergenceForward {
            divergence: self.divergence.kernel(),
            element: gpu::element(student.dtype()),
            vector: takes_vectors(vocabulary),
        };
        let mut losses = Output::new(device, mask.shape(), DType::F32)?;
        let mut statistics = Output::new(device, &[student.rows(), STATISTICS as usize], DType::F32)?;
        let arguments = [
            losses.write(),
            statistics.write(),
            gpu::read(student),
            gpu::read(teacher),
            gpu::read(mask),
            Argument::F32(self.student_factor),
            Argument::F32(self.teacher_factor),
            Argument::U32(vocabulary),
        ];
        gpu::launch(OPERATOR, device, &kernel, Some([rows, 1, 1]), &[rows.into(), vocabulary.into()], &arguments)?;
        Ok((losses.tensor(), statistics.tensor()))
    }

    fn backward_gpu(
        self,
        gradient: &Tensor,
        student: &Tensor,
        teacher: &Tensor,
        mask: &Tensor,
        statistics: &Tensor,
        scale: f32,
    ) -> Result<Tensor> {
        let (device, (rows, vocabulary)) = (student.device(), sizes(OPERATOR, student)?);
        let divergence = match self.divergence {
            // Both have the gradient q - p.
            Divergence::SoftCrossEntropy => Divergence::ForwardKl,
            other => other,
        };
        let kernel = DivergenceBackward {
            divergence: divergence.kernel(),
            element: gpu::element(student.dtype()),
            vector: takes_vectors(vocabulary),
        };
        let mut student_gradient = Output::like(student)?;
        let arguments = [
            student_gradient.write(),
            gpu::read(gradient),
            gpu::read(student),
            gpu::read(teacher),
            gpu::read(mask),
            gpu::read(statistics),
            Argument::F32(self.student_factor),
            Argument::F32(self.teacher_factor),
            Argument::F32(scale),
            Argument::U32(vocabulary),
        ];
        gpu::launch(OPERATOR, device, &kernel, Some([rows, 1, 1]), &[rows.into(), vocabulary.into()], &arguments)?;
        Ok(student_gradient.tensor())
    }
}

impl Divergence {
    fn kernel(self) -> kernels::Divergence {
        match self {
            Self::ReverseKl => kernels::Divergence::ReverseKl,
            Self::ForwardKl => kernels::Divergence::ForwardKl,
            Self::JensenShannon => kernels::Divergence::JensenShannon,
            Self::SoftCrossEntropy => kernels::Divergence::SoftCrossEntropy,
        }
    }
}

/// A row's divergence and what the backward pass needs to compute its terms again.
#[derive(Clone, Copy)]
struct RowStatistics {
    value: f32,
    student: LogSumExp,
    teacher: LogSumExp,
    /// `Σ q a`, the mean of the slope with respect to q (reverse KL and Jensen-Shannon).
    mean_slope: f32,
}

/// On the CPU.
impl Rows {
    fn record_cpu(
        self,
        tape: &Tape<'_>,
        student: &Var,
        teacher: &Tensor,
        mask: Option<Vec<f32>>,
        denominator: f32,
    ) -> Result<DivergenceLoss> {
        let mask = mask.unwrap_or_else(|| vec![1.0; student.rows()]);
        let statistics = self.forward_cpu(student, teacher, &mask)?;
        let per_token: Vec<f32> = statistics.iter().map(|row| row.map_or(0.0, |row| row.value)).collect();
        let total: f64 =
            mask.iter().zip(&per_token).map(|(weight, value)| f64::from(*weight) * f64::from(*value)).sum();
        let positions = &student.shape()[..student.shape().len().saturating_sub(1)];
        let per_token = Tensor::from_slice(student.device(), positions, &per_token)?;
        let loss = Tensor::from_slice(student.device(), &[], &[(total / f64::from(denominator)) as f32])?;
        let (saved_student, saved_teacher) = (student.tensor().clone(), teacher.clone());
        let loss = tape.record_one(&[student], loss, move |gradient, _| {
            let factor = gradient.item()? * self.student_factor / denominator;
            let weights: Vec<f32> = mask.iter().map(|weight| factor * weight).collect();
            Ok(vec![Some(self.backward_cpu(&saved_student, &saved_teacher, &statistics, &weights)?)])
        });
        Ok(DivergenceLoss { loss, per_token })
    }

    /// `None` for rows that do not count.
    fn forward_cpu(self, student: &Tensor, teacher: &Tensor, mask: &[f32]) -> Result<Vec<Option<RowStatistics>>> {
        let vocabulary = student.last_dimension().max(1);
        let (s, t) = (student.host_f32()?, teacher.host_f32()?);
        Ok(s.par_chunks(vocabulary)
            .zip(t.par_chunks(vocabulary))
            .zip(mask)
            .map(|((student, teacher), weight)| {
                (*weight != 0.0).then(|| {
                    cpu::simd(
                        #[inline(always)]
                        || self.row_statistics(student, teacher),
                    )
                })
            })
            .collect())
    }

    #[inline(always)]
    fn row_statistics(self, student: &[f32], teacher: &[f32]) -> RowStatistics {
        let student_sum = LogSumExp::of(student, self.student_factor);
        let teacher_sum = LogSumExp::of(teacher, self.teacher_factor);
        let log_q = |logit: f32| student_sum.log_probability(logit * self.student_factor);
        let log_p = |logit: f32| teacher_sum.log_probability(logit * self.teacher_factor);
        let (value, mean_slope) = match self.divergence {
            Divergence::ReverseKl => {
                let value = sum_pairs(
                    student,
                    teacher,
                    #[inline(always)]
                    |s, t| reverse_term(log_q(s), log_p(t), 0.0),
                );
                (value, value)
            }
            Divergence::ForwardKl => {
                let value = sum_pairs(
                    student,
                    teacher,
                    #[inline(always)]
                    |s, t| reverse_term(log_p(t), log_q(s), 0.0),
                );
                (value, 0.0)
            }
            Divergence::SoftCrossEntropy => {
                let value = sum_pairs(
                    student,
                    teacher,
                    #[inline(always)]
                    |s, t| times(cpu::exp(log_p(t)), -log_q(s)),
                );
                (value, 0.0)
            }
            Divergence::JensenShannon => {
                let student_half = sum_pairs(
                    student,
                    teacher,
                    #[inline(always)]
                    |s, t| jensen_shannon_term(log_q(s), log_p(t), 0.0),
                );
                let teacher_half = sum_pairs(
                    student,
                    teacher,
                    #[inline(always)]
                    |s, t| jensen_shannon_term(log_p(t), log_q(s), 0.0),
                );
                (student_half + teacher_half, student_half)
            }
        };
        RowStatistics { value: value as f32, student: student_sum, teacher: teacher_sum, mean_slope: mean_slope as f32 }
    }

    /// The gradient with respect to the student's scaled logits, times each row's weight. With `a` the slope with
    /// respect to q: `q (a - Σ q a)` where the slope depends on q, `q - p` for the two that are linear in ln q.
    fn backward_cpu(
        self,
        student: &Tensor,
        teacher: &Tensor,
        statistics: &[Option<RowStatistics>],
        weights: &[f32],
    ) -> Result<Tensor> {
        let vocabulary = student.last_dimension().max(1);
        let (s, t) = (student.host_f32()?, teacher.host_f32()?);
        Tensor::compute(student.device(), student.shape(), student.dtype(), |output| {
            output
                .par_chunks_mut(vocabulary)
                .zip(s.par_chunks(vocabulary).zip(t.par_chunks(vocabulary)))
                .zip(statistics.par_iter().zip(weights))
                .for_each(|((output, (student, teacher)), (row, &weight))| {
                    let Some(row) = row.as_ref().filter(|_| weight != 0.0) else { return output.fill(0.0) };
                    cpu::simd(
                        #[inline(always)]
                        || self.row_gradient(output, student, teacher, row, weight),
                    );
                });
            Ok(())
        })
    }

    #[inline(always)]
    fn row_gradient(self, output: &mut [f32], student: &[f32], teacher: &[f32], row: &RowStatistics, weight: f32) {
        let log_q = |logit: f32| row.student.log_probability(logit * self.student_factor);
        let log_p = |logit: f32| row.teacher.log_probability(logit * self.teacher_factor);
        let pairs = output.iter_mut().zip(student.iter().zip(teacher));
        // One loop each, so that the choice is made once and not for every logit.
        match self.divergence {
            Divergence::ReverseKl => {
                for (output, (s, t)) in pairs {
                    *output = weight * reverse_term(log_q(*s), log_p(*t), row.mean_slope);
                }
            }
            Divergence::ForwardKl | Divergence::SoftCrossEntropy => {
                for (output, (s, t)) in pairs {
                    *output = weight * (cpu::exp(log_q(*s)) - cpu::exp(log_p(*t)));
                }
            }
            Divergence::JensenShannon => {
                for (output, (s, t)) in pairs {
                    *output = weight * jensen_shannon_term(log_q(*s), log_p(*t), row.mean_slope);
                }
            }
        }
    }
}

/// `q (ln q - ln p - mean)`.
#[inline(always)]
fn reverse_term(log_q: f32, log_p: f32, mean: f32) -> f32 {
    times(cpu::exp(log_q), log_q - log_p - mean)
}

/// `q (½ (ln q - ln m) - mean)`, with `m = (q + p) / 2`.
#[inline(always)]
fn jensen_shannon_term(log_q: f32, log_p: f32, mean: f32) -> f32 {
    times(cpu::exp(log_q), 0.5 * (log_q - log_mean(log_q, log_p)) - mean)
}

/// `probability · value`, 0 where the probability is 0 even if the value is infinite; NaN stays NaN.
#[inline(always)]
fn times(probability: f32, value: f32) -> f32 {
    if probability == 0.0 { 0.0 } else { probability * value }
}

/// `ln((e^a + e^b) / 2)`.
#[inline(always)]
fn log_mean(a: f32, b: f32) -> f32 {
    let (high, low) = if a > b { (a, b) } else { (b, a) };
    high + (cpu::ln_1p_up_to_one(cpu::exp(low - high)) - std::f32::consts::LN_2)
}

/// `Σ term(student[v], teacher[v])`, in f32 over short blocks and in f64 over those.
#[inline(always)]
fn sum_pairs(student: &[f32], teacher: &[f32], term: impl Fn(f32, f32) -> f32) -> f64 {
    const PARTS: usize = 32;
    let mut total = 0.0f64;
    for (student, teacher) in student.chunks(16 * PARTS).zip(teacher.chunks(16 * PARTS)) {
        let mut sums = [0.0f32; PARTS];
        let (student_chunks, teacher_chunks) = (student.chunks_exact(PARTS), teacher.chunks_exact(PARTS));
        let (student_rest, teacher_rest) = (student_chunks.remainder(), teacher_chunks.remainder());
        for (student, teacher) in student_chunks.zip(teacher_chunks) {
            for part in 0..PARTS {
                sums[part] += term(student[part], teacher[part]);
            }
        }
        let rest: f32 = student_rest.iter().zip(teacher_rest).map(|(student, teacher)| term(*student, *teacher)).sum();
        total += sums.iter().map(|sum| f64::from(*sum)).sum::<f64>() + f64::from(rest);
    }
    total
}

#[cfg(test)]
mod tests {
    use runtime::Device;

    use super::*;
    use crate::gradient_check;

    const ALL: [Divergence; 4] =
        [Divergence::ReverseKl, Divergence::ForwardKl, Divergence::JensenShannon, Divergence::SoftCrossEntropy];

    fn options(divergence: Divergence) -> DivergenceOptions<'static> {
        DivergenceOptions {
            divergence,
            student_temperature: 1.0,
            teacher_temperature: 1.0,
            mask: None,
            denominator: 1.0,
        }
    }

    fn logits(probabilities: &[f32]) -> Tensor {
        let logits: Vec<f32> = probabilities.iter().map(|p| p.ln()).collect();
        Tensor::from_slice(&Device::cpu(), &[1, logits.len()], &logits).unwrap()
    }

    fn value(divergence_kind: Divergence, student: &[f32], teacher: &[f32]) -> f32 {
        let student = Var::constant(&logits(student));
        divergence(&Tape::inference(), &student, &logits(teacher), options(divergence_kind))
            .unwrap()
            .loss
            .item()
            .unwrap()
    }

    #[test]
    fn two_symbols_fix_the_direction() {
        let (q, p) = ([0.9f32, 0.1], [0.5f32, 0.5]);
        let reverse = 0.9 * (0.9f32 / 0.5).ln() + 0.1 * (0.1f32 / 0.5).ln();
        let forward = 0.5 * (0.5f32 / 0.9).ln() + 0.5 * (0.5f32 / 0.1).ln();
        assert!((value(Divergence::ReverseKl, &q, &p) - reverse).abs() < 1e-6);
        assert!((value(Divergence::ForwardKl, &q, &p) - forward).abs() < 1e-6);
        assert!((value(Divergence::SoftCrossEntropy, &q, &p) - forward - 2f32.ln()).abs() < 1e-6);
        let jensen_shannon = value(Divergence::JensenShannon, &q, &p);
        assert!((jensen_shannon - value(Divergence::JensenShannon, &p, &q)).abs() < 1e-7);
        assert!(jensen_shannon > 0.0 && jensen_shannon < 2f32.ln());
    }

    #[test]
    fn equal_distributions_do_not_diverge_even_where_they_are_zero() {
        for kind in [Divergence::ReverseKl, Divergence::ForwardKl, Divergence::JensenShannon] {
            assert!(value(kind, &[0.3, 0.7], &[0.3, 0.7]).abs() < 1e-6);
            assert!(value(kind, &[0.3, 0.7, 0.0], &[0.3, 0.7, 0.0]).abs() < 1e-6, "{kind:?}");
        }
        assert_eq!(value(Divergence::ReverseKl, &[0.5, 0.5], &[1.0, 0.0]), f32::INFINITY);
        assert!(value(Divergence::ReverseKl, &[f32::NAN, 0.5], &[0.5, 0.5]).is_nan());
    }

    #[test]
    fn masked_rows_count_for_nothing_even_when_they_are_not_numbers() {
        let device = Device::cpu();
        let student = Tensor::from_slice(&device, &[2, 2], &[0.0, 1.0, f32::NAN, 0.0]).unwrap();
        let teacher = Tensor::from_slice(&device, &[2, 2], &[1.0f32, 0.0, 0.0, 0.0]).unwrap();
        let mask = Tensor::from_slice(&device, &[2], &[1.0f32, 0.0]).unwrap();
        for kind in ALL {
            let masked = DivergenceOptions { mask: Some(&mask), ..options(kind) };
            let tape = Tape::new();
            let result = divergence(&tape, &tape.leaf(&student), &teacher, masked).unwrap();
            assert!(result.loss.item().unwrap() > 0.0 && result.per_token.to_vec::<f32>().unwrap()[1] == 0.0);
            let gradient = tape.backward(&result.loss).unwrap().take(&student).unwrap().to_vec::<f32>().unwrap();
            assert!(gradient[0] != 0.0 && gradient[2..] == [0.0, 0.0], "{kind:?}: {gradient:?}");
            let whole = divergence(&Tape::inference(), &Var::constant(&student), &teacher, options(kind)).unwrap();
            assert!(whole.loss.item().unwrap().is_nan());
        }
    }

    #[test]
    fn gradients_sum_to_zero_agree_with_differences_and_respect_the_mask() {
        let device = Device::cpu();
        let values: Vec<f32> = (0..3 * 37).map(|i| ((i * 53 % 97) as f32 - 48.0) / 20.0).collect();
        let student = Tensor::from_slice(&device, &[3, 37], &values).unwrap();
        let reversed: Vec<f32> = values.iter().rev().copied().collect();
        let teacher = Tensor::from_slice(&device, &[3, 37], &reversed).unwrap();
        let mask = Tensor::from_slice(&device, &[3], &[1.0f32, 0.0, 0.5]).unwrap();
        for kind in ALL {
            let options = DivergenceOptions {
                student_temperature: 1.5,
                teacher_temperature: 0.8,
                mask: Some(&mask),
                denominator: 1.5,
                ..options(kind)
            };
            let tape = Tape::new();
            let result = divergence(&tape, &tape.leaf(&student), &teacher, options).unwrap();
            let gradient = tape.backward(&result.loss).unwrap().take(&student).unwrap().to_vec::<f32>().unwrap();
            for (row, gradient) in gradient.chunks(37).enumerate() {
                assert!(gradient.iter().sum::<f32>().abs() < 1e-6, "{kind:?} row {row}");
                assert_eq!(row == 1, gradient.iter().all(|value| *value == 0.0), "{kind:?} row {row}");
            }
            let check = gradient_check(std::slice::from_ref(&student), 1e-2, |tape, inputs| {
                Ok(divergence(tape, &inputs[0], &teacher, options)?.loss)
            })
            .unwrap();
            assert!(check.worst[0] <= 5e-3, "{kind:?}: {check:?}");
        }
    }
}
