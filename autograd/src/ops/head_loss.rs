//! The output head and the losses of its logits together, in chunks of tokens: neither model's logits ever exist whole.
//!
//! Per chunk: two matrix products for the logits, their losses and gradient, and the gradient's two products, that of
//! the hidden states and that of the head's weight, which is summed over the chunks in order. The gradients are computed in the
//! forward pass, for a loss whose own gradient is 1, and handed out in the backward pass, times the one that came. Without a tape
//! only the losses are computed.
//!
//! Where one kernel computes losses and gradient (bf16 on GPUs, reverse KL), several chunks of logits share a group of
//! gradients, so that the gradient's products are large ones.

use kernels_ptx::Element;
use runtime::Argument;

use super::cross_entropy::total_gpu;
use super::divergence::{Divergence, DivergenceOptions, divergence};
use super::layout::{Columns, copy_columns};
use super::linear::products;
use super::top_log_probabilities::TopLogProbabilities;
use super::vocabulary_loss::{FromLabels, FromTeacher, Losses, Results, kernel, scale_by};
use super::{add, cross_entropy, scale, scale_in_place};
use crate::gpu::{self, Output};
use crate::{DType, Error, Result, Tape, Tensor, Var, check};

const OPERATOR: &str = "head_loss";

/// A teacher to diverge from.
#[derive(Clone, Copy, Debug)]
pub struct HeadTeacher<'a> {
    /// Where its logits come from.
    pub source: TeacherSource<'a>,
    /// Which divergence; the mask is one number per position.
    pub options: DivergenceOptions<'a>,
    /// Multiplies the divergence in the sum of the losses.
    pub weight: f32,
}

/// What a teacher's logits are made of.
#[derive(Clone, Copy, Debug)]
pub enum TeacherSource<'a> {
    /// A model.
    Head {
        /// The states before its head, `[…, width]`: as many positions as the student's.
        hidden: &'a Tensor,
        /// Its head, `[vocabulary, width]`.
        head: &'a Tensor,
    },
    /// What it said before, with its temperature already applied: the options' must be 1.
    Top(&'a TopLogProbabilities),
}

/// Labels for a cross-entropy.
#[derive(Clone, Copy, Debug)]
pub struct HeadLabels<'a> {
    /// u32, one per position; [`IGNORED_LABEL`](super::IGNORED_LABEL) where it does not count.
    pub labels: &'a Tensor,
    /// Divides the sum over the positions.
    pub denominator: f32,
    /// Multiplies the cross-entropy in the sum of the losses; with 0 it is only reported.
    pub weight: f32,
}

/// How many positions are taken at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadChunks {
    /// Positions whose logits exist at a time.
    pub logits: usize,
    /// Positions the gradients of whose logits exist at a time.
    pub gradients: usize,
}

/// The losses of a head's logits.
#[derive(Debug)]
pub struct HeadLoss {
    /// Scalar f32: the weighted sum of the losses.
    pub loss: Var,
    /// Scalar f32: the divergence, where there is a teacher.
    pub divergence: Option<Tensor>,
    /// Scalar f32: the cross-entropy, where there are labels.
    pub cross_entropy: Option<Tensor>,
}

/// The losses of the logits `hidden · headᵀ`: a divergence from a teacher's, a cross-entropy, or both. Gradients flow to `hidden`
/// and to `head`, whose gradient is f32.
///
/// - `hidden` `[…, width]`, `head` `[vocabulary, width]`
///
/// The result is that of [`linear`](super::linear()), [`divergence()`] and [`cross_entropy()`], up to rounding: logits are
/// rounded to the type of `hidden`, as those of `linear` are.
///
/// # Errors
/// Shape errors that name the argument; neither teacher nor labels; those of the losses.
pub fn head_loss(
    tape: &Tape<'_>,
    hidden: &Var,
    head: &Var,
    teacher: Option<HeadTeacher<'_>>,
    labels: Option<HeadLabels<'_>>,
) -> Result<HeadLoss> {
    let vocabulary = head.shape().first().copied().unwrap_or(1);
    let chunks = HeadChunks::new(hidden.rows(), hidden.last_dimension(), vocabulary, hidden.dtype());
    head_loss_in_chunks(tape, hidden, head, teacher, labels, chunks)
}

/// [`head_loss()`] with chunks of a given size.
///
/// # Errors
/// As [`head_loss()`]; a chunk of no positions.
pub fn head_loss_in_chunks(
    tape: &Tape<'_>,
    hidden: &Var,
    head: &Var,
    teacher: Option<HeadTeacher<'_>>,
    labels: Option<HeadLabels<'_>>,
    chunks: HeadChunks,
) -> Result<HeadLoss> {
    check_arguments(hidden, head, &teacher, &labels, chunks)?;
    let dtype = hidden.dtype();
    // Cast once and not for every chunk.
    let narrow_head = if hidden.device().is_cpu() { head.tensor().clone() } else { head.cast(dtype)? };
    let teacher_head = match teacher.map(|teacher| teacher.source) {
        Some(TeacherSource::Head { hidden: states, head }) if !hidden.device().is_cpu() => {
            Some(head.cast(states.dtype())?)
        }
        _ => None,
    };
    let mut narrow_teacher = teacher;
    if let (Some(HeadTeacher { source: TeacherSource::Head { head, .. }, .. }), Some(narrow)) =
        (&mut narrow_teacher, &teacher_head)
    {
        *head = narrow;
    }
    let work = Work {
        hidden: hidden.tensor(),
        head: &narrow_head,
        teacher: narrow_teacher,
        labels,
        wants_hidden: tape.is_recording() && hidden.needs_gradient(),
        wants_head: tape.is_recording() && head.needs_gradient(),
        chunks,
    };
    let Computed { divergence, cross_entropy, hidden_gradient, head_gradient } = work.compute()?;

    let inference = Tape::inference();
    let weigh = |loss: &Tensor, weight: f32| {
        let loss = Var::constant(loss);
        if weight == 1.0 { Ok(loss) } else { scale(&inference, &loss, weight) }
    };
    let mut terms = Vec::new();
    if let (Some(loss), Some(teacher)) = (&divergence, &teacher) {
        terms.push(weigh(loss, teacher.weight)?);
    }
    if let (Some(loss), Some(labels)) =
        (&cross_entropy, labels.filter(|labels| labels.weight != 0.0 || terms.is_empty()))
    {
        terms.push(weigh(loss, labels.weight)?);
    }
    let total = match &terms[..] {
        [one] => one.tensor().clone(),
        [first, second] => add(&inference, first, second)?.tensor().clone(),
        _ => unreachable!("there is a teacher, or there are labels"),
    };
    let loss = tape.record_one(&[hidden, head], total, move |factor, _| {
        let scaled = |gradient: Option<Tensor>| gradient.map(|gradient| times(gradient, factor)).transpose();
        Ok(vec![scaled(hidden_gradient)?, scaled(head_gradient)?])
    });
    Ok(HeadLoss { loss, divergence, cross_entropy })
}

impl HeadChunks {
    /// The sizes that [`head_loss()`] takes: logits of at most 160 MiB a model, gradients of at most 560 MiB.
    ///
    /// Together with what else a chunk needs that is less than 1 GiB. Rows come in tiles of 128, which is how products take
    /// them, and as many as make the hidden states' gradient a whole number of waves of blocks, as far as possible.
    pub fn new(positions: usize, width: usize, vocabulary: usize, dtype: DType) -> Self {
        const TILE: usize = 128;
        /// Tiles that an H100 computes at a time.
        const WAVE: usize = 264;
        const LOGITS: usize = 160 << 20;
        const GRADIENTS: usize = 560 << 20;
        let row_bytes = (vocabulary * dtype.size()).max(1);
        let tiles = |bytes: usize| (bytes / row_bytes / TILE).max(1);
        let (all, most, across) = (positions.div_ceil(TILE).max(1), tiles(GRADIENTS), width.div_ceil(TILE).max(1));
        // How full the waves are, in parts of 1000: the fullest of the larger half, and of those the largest.
        let fullness = |rows: usize| {
            let blocks = rows * across;
            blocks * 1000 / (blocks.div_ceil(WAVE) * WAVE)
        };
        let fullest = || (most.div_ceil(2)..=most).max_by_key(|&rows| fullness(rows)).unwrap_or(most);
        let in_group = if all <= most { all } else { fullest() };
        // Chunks of nearly one size make up a group.
        let chunks = in_group.div_ceil(tiles(LOGITS));
        Self { logits: in_group.div_ceil(chunks) * TILE, gradients: in_group * TILE }
    }
}

fn check_arguments(
    hidden: &Var,
    head: &Var,
    teacher: &Option<HeadTeacher<'_>>,
    labels: &Option<HeadLabels<'_>>,
    chunks: HeadChunks,
) -> Result<()> {
    let positions = &hidden.shape()[..hidden.shape().len().saturating_sub(1)];
    check::is_float(OPERATOR, "hidden", hidden)?;
    check::is_float(OPERATOR, "head", head)?;
    check::rank(OPERATOR, "head", head, 2, "[vocabulary, width]")?;
    let vocabulary = head.shape()[0];
    check::shape(OPERATOR, "head", head, &[vocabulary, hidden.last_dimension()])?;
    if let Some(teacher) = teacher {
        match teacher.source {
            TeacherSource::Head { hidden, head } => {
                check::is_float(OPERATOR, "teacher.hidden", hidden)?;
                check::is_float(OPERATOR, "teacher.head", head)?;
                let width = hidden.last_dimension();
                check::shape(OPERATOR, "teacher.hidden", hidden, &[positions, &[width]].concat())?;
                check::shape(OPERATOR, "teacher.head", head, &[vocabulary, width])?;
            }
            TeacherSource::Top(top) => {
                top.check(positions)?;
                let temperature = teacher.options.teacher_temperature;
                if temperature != 1.0 {
                    let message =
                        format!("teacher_temperature is {temperature}: log-probabilities have theirs, give 1");
                    return Err(Error::Invalid { operator: OPERATOR, message });
                }
                if teacher.options.divergence == Divergence::SoftCrossEntropy {
                    let message = "the soft cross-entropy needs the teacher's whole distribution: take the forward KL, \
                                   whose gradient is the same";
                    return Err(Error::Invalid { operator: OPERATOR, message: message.to_owned() });
                }
            }
        }
        teacher.options.check(OPERATOR, positions)?;
    }
    if let Some(labels) = labels {
        check::is_u32(OPERATOR, "labels", labels.labels)?;
        check::shape(OPERATOR, "labels", labels.labels, positions)?;
        check::positive(OPERATOR, "denominator", labels.denominator)?;
    }
    let invalid = |message: String| Err(Error::Invalid { operator: OPERATOR, message });
    if teacher.is_none() && labels.is_none() {
        return invalid("neither a teacher nor labels: give one of them".to_owned());
    }
    if chunks.logits == 0 || chunks.gradients == 0 {
        return invalid(format!("{chunks:?}: expected positive numbers of positions"));
    }
    Ok(())
}

/// What is to be computed, on positions in a row.
struct Work<'a> {
    hidden: &'a Tensor,
    head: &'a Tensor,
    /// A teacher, its head in the type of its hidden states.
    teacher: Option<HeadTeacher<'a>>,
    labels: Option<HeadLabels<'a>>,
    wants_hidden: bool,
    wants_head: bool,
    chunks: HeadChunks,
}

/// Losses, and gradients for a loss whose own gradient is 1.
struct Computed {
    divergence: Option<Tensor>,
    cross_entropy: Option<Tensor>,
    hidden_gradient: Option<Tensor>,
    head_gradient: Option<Tensor>,
}

impl Work<'_> {
    fn compute(&self) -> Result<Computed> {
        match self.fused()? {
            Some(computed) => Ok(computed),
            None => self.by_operators(),
        }
    }

    fn wants_gradient(&self) -> bool {
        self.wants_hidden || self.wants_head
    }

    /// By the operators for whole logits, chunk by chunk.
    fn by_operators(&self) -> Result<Computed> {
        let mut gradients = GradientSums::new(self)?;
        let (mut divergences, mut cross_entropies) = (Vec::new(), Vec::new());
        for (first, count) in ranges(self.hidden.rows(), self.chunks.logits) {
            let (student, teacher) = self.logits(first, count)?;
            let tape = if self.wants_gradient() { Tape::new() } else { Tape::inference() };
            let logits = tape.leaf(&student);
            let mut terms = Vec::new();
            if let (Some(given), Some(teacher)) = (&self.teacher, &teacher) {
                let mask = given.options.mask.map(|mask| numbers(mask, first, count)).transpose()?;
                let options = DivergenceOptions { mask: mask.as_ref(), ..given.options };
                let loss = divergence(&tape, &logits, teacher, options)?.loss;
                divergences.push(loss.tensor().clone());
                terms.push(if given.weight == 1.0 { loss } else { scale(&tape, &loss, given.weight)? });
            }
            if let Some(given) = &self.labels {
                let labels = numbers(given.labels, first, count)?;
                let loss = cross_entropy(&tape, &logits, &labels, given.denominator)?.loss;
                cross_entropies.push(loss.tensor().clone());
                if given.weight != 0.0 || terms.is_empty() {
                    terms.push(if given.weight == 1.0 { loss } else { scale(&tape, &loss, given.weight)? });
                }
            }
            drop(teacher);
            let total = match &terms[..] {
                [first, second] => add(&tape, first, second)?,
                _ => terms.swap_remove(0),
            };
            if self.wants_gradient() {
                drop(terms);
                drop(logits);
                let gradient = tape.backward(&total)?.take(&student);
                drop(student);
                if let Some(gradient) = gradient {
                    gradients.add(self, first, &gradient)?;
                }
            }
        }
        let (hidden_gradient, head_gradient) = gradients.finish();
        Ok(Computed {
            divergence: self.teacher.is_some().then(|| self.sum(divergences)).transpose()?,
            cross_entropy: self.labels.is_some().then(|| self.sum(cross_entropies)).transpose()?,
            hidden_gradient,
            head_gradient,
        })
    }

    /// The sum of the chunks' losses in order.
    fn sum(&self, losses: Vec<Tensor>) -> Result<Tensor> {
        let tape = Tape::inference();
        let mut losses = losses.iter().map(Var::constant);
        let Some(first) = losses.next() else { return Tensor::zeros(self.hidden.device(), &[], DType::F32) };
        let total = losses.try_fold(first, |total, loss| add(&tape, &total, &loss))?;
        Ok(total.tensor().clone())
    }

    /// By the kernel that computes losses and gradient at once; `None` where there is none.
    fn fused(&self) -> Result<Option<Computed>> {
        let device = self.hidden.device();
        let rows = self.hidden.rows();
        let teacher = self.teacher;
        let from_teacher = teacher.map(|teacher| {
            let dtype = match teacher.source {
                TeacherSource::Head { hidden, .. } => hidden.dtype(),
                TeacherSource::Top(_) => self.hidden.dtype(),
            };
            (dtype, 1.0 / teacher.options.student_temperature)
        });
        let vocabulary = self.head.shape()[0];
        let labels = self.labels.is_some();
        let kernel = kernel(device, self.hidden.dtype(), from_teacher, labels, self.wants_gradient(), vocabulary);
        let reverse = teacher.is_none_or(|teacher| teacher.options.divergence == Divergence::ReverseKl);
        let Some(kernel) = kernel.filter(|_| reverse && !device.is_cpu()) else { return Ok(None) };
        let weights = match &self.teacher {
            None => None,
            Some(teacher) => Some(match teacher.options.mask {
                Some(mask) => mask.cast(DType::F32)?,
                None => Tensor::filled(device, &[rows], DType::F32, 1.0)?,
            }),
        };
        let mut divergences = weights.as_ref().map(|_| Output::new(device, &[rows], DType::F32)).transpose()?;
        let mut cross_entropies = self.labels.map(|_| Output::new(device, &[rows], DType::F32)).transpose()?;
        let mut gradients = GradientSums::new(self)?;
        for (group, in_group) in ranges(rows, self.chunks.gradients) {
            let mut gradient = None;
            for (start, count) in ranges(in_group, self.chunks.logits) {
                let first = group + start;
                let (student, teacher) = self.logits(first, count)?;
                let losses = self.losses(teacher.as_ref(), weights.as_ref());
                if gradient.is_none() && self.wants_gradient() {
                    gradient = Some(Output::new(device, &[in_group, vocabulary], student.dtype())?);
                }
                let results = Results {
                    divergences: divergences.as_mut(),
                    cross_entropies: cross_entropies.as_mut(),
                    gradient: gradient.as_mut().map(|gradient| (gradient, start)),
                };
                losses.launch(OPERATOR, &kernel, &student, first, results)?;
            }
            if let Some(gradient) = gradient {
                gradients.add(self, group, &gradient.tensor())?;
            }
        }
        let divergence = match (divergences, &self.teacher, &weights) {
            (Some(losses), Some(teacher), Some(weights)) => {
                Some(total_gpu(OPERATOR, &losses.tensor(), Some(weights), teacher.options.denominator)?)
            }
            _ => None,
        };
        let cross_entropy = match (cross_entropies, &self.labels) {
            (Some(losses), Some(labels)) => Some(total_gpu(OPERATOR, &losses.tensor(), None, labels.denominator)?),
            _ => None,
        };
        let (hidden_gradient, head_gradient) = gradients.finish();
        Ok(Some(Computed { divergence, cross_entropy, hidden_gradient, head_gradient }))
    }

    /// What the kernel is to compute of a chunk with these logits of the teacher.
    fn losses<'a>(&'a self, teacher: Option<&'a Tensor>, weights: Option<&'a Tensor>) -> Losses<'a> {
        let from_teacher = self.teacher.zip(teacher.zip(weights)).map(|(given, (logits, weights))| FromTeacher {
            logits,
            weights,
            factors: [1.0 / given.options.student_temperature, 1.0 / given.options.teacher_temperature],
            denominator: given.options.denominator,
            weight: given.weight,
        });
        let from_labels = self.labels.map(|given| FromLabels {
            labels: given.labels,
            denominator: given.denominator,
            weight: given.weight,
        });
        Losses { teacher: from_teacher, labels: from_labels }
    }

    /// The logits of some positions: the student's, and the teacher's where there is one.
    fn logits(&self, first: usize, count: usize) -> Result<(Tensor, Option<Tensor>)> {
        // The teacher first: what it needs in passing is free again.
        let teacher = match self.teacher.map(|teacher| teacher.source) {
            Some(TeacherSource::Head { hidden, head }) => {
                Some(products::forward(&rows_of(hidden, first, count)?, head)?)
            }
            _ => None,
        };
        let student = products::forward(&rows_of(self.hidden, first, count)?, self.head)?;
        let teacher = match &self.teacher {
            Some(HeadTeacher { source: TeacherSource::Top(top), options, .. }) => {
                let part = top.map(|tensor, width| part_of(tensor, first * width, &[count, width]))?;
                let part = TopLogProbabilities { tail: part.tail.reshape(&[count])?, ..part };
                Some(part.logits_beside(&student, options.student_temperature)?)
            }
            _ => teacher,
        };
        Ok((student, teacher))
    }
}

/// The gradients of hidden states and head, as far as they are summed.
struct GradientSums {
    hidden: Option<Tensor>,
    head: Option<Tensor>,
    wants_head: bool,
}

impl GradientSums {
    fn new(work: &Work<'_>) -> Result<Self> {
        let hidden = work.wants_hidden.then(|| unwritten_like(work.hidden)).transpose()?;
        // Of no positions nothing will be added.
        let head = (work.wants_head && work.hidden.rows() == 0)
            .then(|| Tensor::zeros(work.hidden.device(), work.head.shape(), DType::F32))
            .transpose()?;
        Ok(Self { hidden, head, wants_head: work.wants_head })
    }

    /// Adds what the gradient of the logits of the positions from `first` on contributes.
    fn add(&mut self, work: &Work<'_>, first: usize, gradient: &Tensor) -> Result<()> {
        let hidden = rows_of(work.hidden, first, gradient.rows())?;
        if let Some(target) = &mut self.hidden {
            place_rows(target, first, &products::input_gradient(gradient, &hidden, work.head)?)?;
        }
        if self.wants_head {
            self.head = Some(products::add_weight_gradient(self.head.take(), gradient, &hidden, work.head)?);
        }
        Ok(())
    }

    fn finish(self) -> (Option<Tensor>, Option<Tensor>) {
        (self.hidden, self.head)
    }
}

/// Consecutive ranges (first, count) of at most `most` that cover `total`.
pub(super) fn ranges(total: usize, most: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..total).step_by(most).map(move |first| (first, most.min(total - first)))
}

/// Times a scalar on the same device.
fn times(mut gradient: Tensor, factor: &Tensor) -> Result<Tensor> {
    if !gradient.device().is_cpu() {
        scale_by(OPERATOR, &mut gradient, factor)?;
    } else {
        let factor = factor.item()?;
        if factor != 1.0 {
            scale_in_place(&mut gradient, factor)?;
        }
    }
    Ok(gradient)
}

/// Some innermost rows, `[count, width]`.
pub(super) fn rows_of(tensor: &Tensor, first: usize, count: usize) -> Result<Tensor> {
    let width = tensor.last_dimension();
    part_of(tensor, first * width, &[count, width])
}

/// Some of a tensor's elements, `[count]`.
fn numbers(tensor: &Tensor, first: usize, count: usize) -> Result<Tensor> {
    part_of(tensor, first, &[count])
}

/// The elements from `start` on, under `shape`.
fn part_of(tensor: &Tensor, start: usize, shape: &[usize]) -> Result<Tensor> {
    let (device, count) = (tensor.device(), shape.iter().product::<usize>());
    if count == tensor.count() {
        return tensor.reshape(shape);
    }
    if device.is_cpu() {
        let range = start..start + count;
        return match tensor.dtype() {
            DType::F32 => Tensor::from_slice(device, shape, &tensor.host_slice::<f32>()?[range]),
            DType::Bf16 => Tensor::from_slice(device, shape, &tensor.host_slice::<half::bf16>()?[range]),
            DType::U32 => Tensor::from_slice(device, shape, &tensor.host_slice::<u32>()?[range]),
        };
    }
    let mut part = Output::new(device, shape, tensor.dtype())?;
    let columns = Columns { rows: 1, count, from: (start, tensor.count()), to: (0, count) };
    let target = if tensor.dtype() == DType::U32 { part.write_as(Element::F32) } else { part.write() };
    copy_columns(OPERATOR, target, tensor, &columns)?;
    Ok(part.tensor())
}

/// Memory for a tensor like another one, whose values are written later.
fn unwritten_like(tensor: &Tensor) -> Result<Tensor> {
    if tensor.device().is_cpu() {
        return Tensor::zeros(tensor.device(), tensor.shape(), tensor.dtype());
    }
    Ok(Output::like(tensor)?.tensor())
}

/// Overwrites innermost rows from `first` on with those of `source`.
fn place_rows(target: &mut Tensor, first: usize, source: &Tensor) -> Result<()> {
    let (start, count, total) = (first * target.last_dimension(), source.count(), target.count());
    if target.device().is_cpu() {
        match target.dtype() {
            DType::F32 => target.make_mut::<f32>()?[start..start + count].copy_from_slice(source.host_slice()?),
            _ => target.make_mut::<half::bf16>()?[start..start + count].copy_from_slice(source.host_slice()?),
        }
        return Ok(());
    }
    let element = gpu::element(target.dtype());
    let columns = Columns { rows: 1, count, from: (0, count), to: (start, total) };
    copy_columns(OPERATOR, Argument::Write(target.make_unique()?, element), source, &columns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_take_less_than_a_gibibyte_and_fill_their_waves() {
        let cases = [(16_384, 5120, 131_072), (8192, 5120, 131_072), (16_384, 576, 49_152), (65_536, 4096, 128_256)];
        for (positions, width, vocabulary) in cases {
            let chunks = HeadChunks::new(positions, width, vocabulary, DType::Bf16);
            let rows = 2 * chunks.logits + chunks.gradients;
            let states = 2 * (chunks.logits + chunks.gradients) * width;
            assert!((rows * vocabulary + states) * DType::Bf16.size() <= 1 << 30, "{chunks:?}");
            assert!(chunks.logits >= 512 && chunks.gradients >= 1024, "{chunks:?}");
            assert!(chunks.logits.is_multiple_of(128) && chunks.gradients.is_multiple_of(128), "{chunks:?}");
        }
        let large = HeadChunks::new(16_384, 5120, 131_072, DType::Bf16);
        // 13 x 40 tiles are two waves of 264 but for 8.
        assert_eq!(large, HeadChunks { logits: 640, gradients: 1664 });
        assert_eq!(HeadChunks::new(300, 64, 1000, DType::F32), HeadChunks { logits: 384, gradients: 384 });
    }
}
