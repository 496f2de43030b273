//! Losses of rows of bf16 logits with their gradient in the same kernel: what [`divergence`](super::divergence()),
//! [`cross_entropy`](super::cross_entropy()) share on GPUs.

use kernels_ptx::kernels::scale_by::ScaleBy;
use kernels_ptx::kernels::vocabulary_loss::VocabularyLoss;
use runtime::{Argument, Device};

use super::cross_entropy::sizes;
use crate::gpu::{self, Output};
use crate::{DType, Result, Tensor};

/// The reverse KL divergence of a student's logits from a teacher's.
#[derive(Clone, Copy)]
pub(super) struct FromTeacher<'a> {
    /// bf16, as many rows and columns as the student's.
    pub logits: &'a Tensor,
    /// f32, one number per row of the whole problem. Rows of weight 0 are not looked at.
    pub weights: &'a Tensor,
    /// 1 / temperature of the student's logits and of the teacher's.
    pub factors: [f32; 2],
    /// Divides the sum of the rows' losses: the gradient is that of the quotient.
    pub denominator: f32,
    /// Multiplies the gradient.
    pub weight: f32,
}

/// The cross-entropy against labels.
#[derive(Clone, Copy)]
pub(super) struct FromLabels<'a> {
    /// u32, one per row of the whole problem.
    pub labels: &'a Tensor,
    /// Divides the sum of the rows' losses: the gradient is that of the quotient.
    pub denominator: f32,
    /// Multiplies the gradient.
    pub weight: f32,
}

/// Which losses of some rows of logits.
#[derive(Clone, Copy)]
pub(super) struct Losses<'a> {
    pub teacher: Option<FromTeacher<'a>>,
    pub labels: Option<FromLabels<'a>>,
}

/// The kernel for losses of logits of these types, if there is one; of a teacher is told its logits' type and the student's factor.
pub(super) fn kernel(
    device: &Device,
    student: DType,
    teacher: Option<(DType, f32)>,
    labels: bool,
    gradient: bool,
    vocabulary: usize,
) -> Option<VocabularyLoss> {
    let narrow = student == DType::Bf16 && teacher.is_none_or(|(teacher, _)| teacher == DType::Bf16);
    // Both losses are of one distribution.
    let one_distribution = !labels || teacher.is_none_or(|(_, factor)| factor == 1.0);
    let vocabulary = u32::try_from(vocabulary).ok().filter(|_| narrow && one_distribution)?;
    VocabularyLoss::new(teacher.is_some(), labels, gradient, vocabulary, device.shared_bytes())
}

/// Where the results go: one number per row of the whole problem, and the gradient of some of its rows.
pub(super) struct Results<'a> {
    /// f32; there is one where there is a teacher.
    pub divergences: Option<&'a mut Output>,
    /// f32; there is one where there are labels.
    pub cross_entropies: Option<&'a mut Output>,
    /// bf16, and the row of it that belongs to the first row of logits.
    pub gradient: Option<(&'a mut Output, usize)>,
}

impl Losses<'_> {
    /// Computes the losses of rows of logits, which are the rows from `first` on of the whole problem.
    ///
    /// # Errors
    /// A problem that is too large; runtime errors.
    pub fn launch(
        &self,
        operator: &'static str,
        kernel: &VocabularyLoss,
        student: &Tensor,
        first: usize,
        results: Results<'_>,
    ) -> Result<()> {
        use std::f64::consts::{LN_2, LOG2_E};
        let (rows, vocabulary) = sizes(operator, student)?;
        let size = |what, number| gpu::size(operator, what, number);
        let (gradient, gradient_first) =
            results.gradient.map_or((None, 0), |(gradient, first)| (Some(gradient), first));
        let [student_factor, teacher_factor] = self.teacher.map_or([1.0; 2], |teacher| teacher.factors);
        // Slopes are of powers of two in the kernel, and of the student's logits before their factor here.
        let divergence_scale = self.teacher.map_or(0.0, |teacher| {
            LN_2 * f64::from(teacher.weight) * f64::from(student_factor) / f64::from(teacher.denominator)
        });
        let label_scale = self.labels.map_or(0.0, |labels| f64::from(labels.weight) / f64::from(labels.denominator));
        let in_powers_of_two = |factor: f32| Argument::F32((f64::from(factor) * LOG2_E) as f32);
        let mut arguments = Vec::new();
        arguments.extend(gradient.map(Output::write));
        arguments.extend(results.divergences.map(Output::write));
        arguments.extend(results.cross_entropies.map(Output::write));
        arguments.push(gpu::read(student));
        if let Some(teacher) = &self.teacher {
            arguments.extend([gpu::read(teacher.logits), gpu::read(teacher.weights)]);
        }
        arguments.extend(self.labels.as_ref().map(|labels| gpu::read(labels.labels)));
        arguments.extend([
            in_powers_of_two(student_factor),
            in_powers_of_two(teacher_factor),
            Argument::F32(divergence_scale as f32),
            Argument::F32(label_scale as f32),
            Argument::U32(rows),
            Argument::U32(size("the first row", first)?),
            Argument::U32(size("the gradient's first row", gradient_first)?),
            Argument::U32(vocabulary),
        ]);
        let sizes = [rows.into(), vocabulary.into()];
        gpu::launch(operator, student.device(), kernel, Some(kernel.grid(rows)), &sizes, &arguments)
    }
}

/// Multiplies a gradient that was computed for 1 by the one that came, a scalar on the same device. In place where nothing
/// else shares the memory; where the number is 1 the memory is not touched. The host does not wait.
///
/// # Errors
/// A problem that is too large; runtime errors.
pub(super) fn scale_by(operator: &'static str, values: &mut Tensor, factor: &Tensor) -> Result<()> {
    let factor = factor.cast(DType::F32)?;
    let (device, element) = (values.device().clone(), gpu::element(values.dtype()));
    let count = gpu::size(operator, "the number of elements", values.count())?;
    let arguments = [Argument::Write(values.make_unique()?, element), gpu::read(&factor), Argument::U32(count)];
    let count = u64::from(count);
    gpu::launch(operator, &device, &ScaleBy { element }, ScaleBy::grid(count), &[count], &arguments)
}
