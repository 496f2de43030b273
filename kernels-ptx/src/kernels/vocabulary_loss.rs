//! Losses over whole rows of bf16 logits and, in the same kernel, their gradient: the reverse KL divergence `Σ q (ln q − ln p)` of
//! the student `q` from the teacher `p`, the cross-entropy `−ln q[label]`, or both.
//!
//! - Everything is in powers of two: with `f` the logits' factor (1 / temperature) times log₂ e and `m` the greatest scaled
//!   logit, `x = f z − m` (one fma), `y` the same of the teacher, `S = Σ 2^x`, `T = Σ 2^y`, `W = Σ 2^x (x − y)`, `D = W / S`:
//!   divergence `ln 2 · D + ln T − ln S`; cross-entropy `ln S − ln 2 · x[label]`; gradient of a logit
//!   `2^x / S · (ln 2 · f' · (x − y − D) + c) − c [label]`, where `f'` and `c` hold the two losses' weights.
//! - The sums are formed in one pass: where a greater logit comes, `S` and `T` are scaled, and
//!   `W` becomes `2^δ (W + S (δ − δ'))`, δ and δ' being what the maxima of student and teacher moved by.
//! - Layout: a block takes one row after the other (every `blocks`-th). What it has read of a row stays on the chip as far
//!   as there is room: 8 vectors of 16 bytes of each model's row per thread in registers, 20 or 28 of both together in
//!   shared memory. The rest is read again, from the L2 cache as far as it is still there: it is the last part of the row for
//!   the sums and the first one for the gradient, and then backwards. Places in shared memory that become free take in the
//!   next row at once. A thread reads only what it wrote to shared memory itself.
//! - Rows that do not count (weight 0, label ignored) are not read; their losses are 0 and their gradient is set to zero.
//! - Traffic: each logit is read once and the gradient is written once. Bound by memory; the next bound are the exponentials, two
//!   and, with the gradient, three for a pair of logits.
//! - Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", with a third sum.

use super::VECTOR;
use super::cross_entropy::{IGNORED_LABEL, sum_of};
use crate::asm::{Assembler, Description, F32, Global, LANES, Pred, Shared, U32, U64, Value, Variable};
use crate::{Element, Kernel, KernelSource, Target, Work};

/// Rounds of a block over neighbouring vectors that are kept in registers.
const HELD_ROUNDS: u32 = 8;
/// Vectors whose terms are added at once where they are in registers.
const AT_ONCE: usize = 2;
/// What the negative of the greatest logit starts with: finite, so that differences are never NaN.
const NOTHING_YET: f32 = 1e38;

/// Losses of rows of logits, and their gradient.
///
/// Parameters: `gradient` (bf16 `[…, vocabulary]`, rows from `gradient_first` on are written; only with `gradient`),
/// `divergences` (f32, written; only with `divergence`), `cross_entropies` (f32, written; only with `labels`), `student` (bf16
/// `[rows, vocabulary]`), `teacher` (like `student`) and `weights` (f32; both only with `divergence`), `labels` (u32; only with
/// `labels`), `student_factor`, `teacher_factor` (f32: 1 / temperature, times log₂ e), `divergence_scale`, `label_scale` (f32:
/// what the gradients of the two losses are multiplied by, in the student's scaled logits; a row's weight comes on top of the
/// first), `rows`, `first`, `gradient_first`, `vocabulary` (u32, a multiple of 8).
/// The row `r` of the logits has place `first + r` in the arrays with one number per row. Any number of blocks.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct VocabularyLoss {
    /// The reverse KL divergence from a teacher. One of this and `labels` at least.
    pub divergence: bool,
    /// The cross-entropy against labels.
    pub labels: bool,
    /// How rows are kept for the gradient; `None`: only the losses are computed.
    pub gradient: Option<Row>,
}

/// How a row is kept on the chip.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Row {
    /// In the shared memory of 256 threads.
    Short,
    /// In registers and shared memory of 256 threads, two blocks on a multiprocessor.
    Medium,
    /// In registers and shared memory of 512 threads, one block on a multiprocessor.
    Long,
    /// The same with the shared memory that Hopper has.
    Longest,
}

impl Row {
    fn threads(self) -> u32 {
        match self {
            Self::Short | Self::Medium => 256,
            Self::Long | Self::Longest => 512,
        }
    }

    /// Columns in registers.
    fn held(self) -> u32 {
        match self {
            Self::Short => 0,
            Self::Medium | Self::Long | Self::Longest => HELD_ROUNDS * self.threads() * VECTOR,
        }
    }

    /// Columns in shared memory, of each of so many matrices.
    fn shared(self, matrices: u32) -> u32 {
        let rounds = match self {
            // 163 KiB of shared memory are what every GPU that runs this has.
            Self::Long => 20,
            Self::Short | Self::Medium | Self::Longest => 28,
        };
        rounds / matrices * self.threads() * VECTOR
    }

    fn name(self) -> &'static str {
        match self {
            Self::Short => "short",
            Self::Medium => "medium",
            Self::Long => "long",
            Self::Longest => "longest",
        }
    }
}

impl VocabularyLoss {
    /// The kernel for rows of so many logits on a GPU whose blocks may have so many bytes of shared memory; `None` where there is
    /// none.
    pub fn new(divergence: bool, labels: bool, gradient: bool, vocabulary: u32, shared_bytes: u32) -> Option<Self> {
        /// Beyond this length one block to a multiprocessor re-reads less.
        const LONG: u32 = 1 << 16;
        const HOPPER: u32 = 227 << 10;
        let row = match vocabulary {
            _ if vocabulary < Row::Medium.held() => Row::Short,
            _ if vocabulary <= LONG => Row::Medium,
            _ if shared_bytes < HOPPER => Row::Long,
            _ => Row::Longest,
        };
        let exists = (divergence || labels) && vocabulary.is_multiple_of(VECTOR) && vocabulary <= i32::MAX as u32;
        exists.then(|| Self { divergence, labels, gradient: gradient.then_some(row) })
    }

    /// Blocks for so many rows. With the gradient: as many as an H100 runs at a time.
    pub fn grid(&self, rows: u32) -> [u32; 3] {
        let most = match self.gradient {
            Some(Row::Long | Row::Longest) => 132,
            Some(_) => 264,
            None => i32::MAX as u32,
        };
        [rows.min(most), 1, 1]
    }

    fn name(&self) -> String {
        let flag = |set: bool, name: &'static str| if set { name } else { "" };
        let gradient = self.gradient.map_or(String::new(), |row| format!("_gradient_{}", row.name()));
        format!(
            "vocabulary_loss{}{}{gradient}",
            flag(self.divergence, "_reverse_kl"),
            flag(self.labels, "_cross_entropy")
        )
    }
}

impl KernelSource for VocabularyLoss {
    fn build(&self) -> Kernel {
        let Self { divergence, labels, gradient } = *self;
        let matrices: u32 = if divergence { 2 } else { 1 };
        let layout = gradient.unwrap_or(Row::Short);
        let description = Description {
            name: self.name(),
            summary: format!(
                "losses of rows of bf16 logits{}; blocks take rows in turn",
                if gradient.is_some() { " and their gradient" } else { "" }
            ),
            block: [layout.threads(), 1, 1],
            target: Target::Sm80,
            sizes: &["rows", "vocabulary"],
            work: move |sizes: &[u64]| Work {
                bytes: (2 * (u64::from(matrices) + u64::from(gradient.is_some())) * sizes[1] + 16) * sizes[0],
                operations: (5 * u64::from(matrices) + if gradient.is_some() { 6 } else { 0 }) * sizes[0] * sizes[1],
            },
        };
        Assembler::assemble(description, |k| {
            let gradient_memory = gradient.map(|_| k.write("gradient", Element::Bf16));
            let divergences = divergence.then(|| k.write("divergences", Element::F32));
            let cross_entropies = labels.then(|| k.write("cross_entropies", Element::F32));
            let student = k.read("student", Element::Bf16);
            let teacher = divergence.then(|| (k.read("teacher", Element::Bf16), k.read("weights", Element::F32)));
            let labels = labels.then(|| k.read("labels", Element::U32));
            let (student_factor, teacher_factor) = (k.f32("student_factor"), k.f32("teacher_factor"));
            let (divergence_scale, label_scale) = (k.f32("divergence_scale"), k.f32("label_scale"));
            let (rows, first, gradient_first) = (k.u32("rows"), k.u32("first"), k.u32("gradient_first"));
            let vocabulary = k.u32("vocabulary");
            let is_first = k.thread().eq(0).named("is_first");
            let scratch = k.shared(Element::F32, layout.threads() / LANES * Statistics::COUNT);
            let shared = |wanted: bool| wanted.then(|| k.shared(Element::Bf16, layout.shared(matrices)));
            let parts = Parts {
                k,
                layout,
                vocabulary,
                start: (k.thread() * VECTOR).named("start"),
                student: shared(gradient.is_some()),
                teacher: shared(gradient.is_some() && divergence),
            };

            let known = Known { weights: teacher.map(|(_, weights)| weights), labels, first };
            let row = k.variable(k.block()).named("row");
            let ready = k.variable::<U32>(0).named("ready");
            k.while_(
                || row.get().lt(rows),
                || {
                    let here = known.of_row(row.get(), None);
                    let place = (first + row.get()).named("place");
                    let target = gradient_memory.map(|memory| memory.from_row(gradient_first + row.get(), vocabulary));
                    k.if_else(
                        here.counts(),
                        || {
                            let logits =
                                Logits::new(student, teacher.map(|(teacher, _)| teacher), row.get(), vocabulary)
                                    .without_teacher(here.ignored_teacher());
                            let factors = (student_factor, teacher_factor);
                            let (statistics, held) = parts.read(&logits, ready, factors, scratch);
                            k.comment("the losses");
                            let label = here.label.map(|label| Label::new(k, label, vocabulary, label_scale));
                            let x_of_label = label.as_ref().map(|label| {
                                let logit = logits.student.at(label.index).load_if(label.inside, 0.0);
                                logit.fma(student_factor, statistics.minus_greatest)
                            });
                            k.if_(is_first, || {
                                let rest = logarithm(statistics.sum);
                                if let (Some(divergences), Some(teacher)) = (divergences, statistics.teacher) {
                                    let mean = teacher.mean_difference * std::f32::consts::LN_2;
                                    let loss = mean + (logarithm(teacher.sum) - rest);
                                    divergences.at(place).store(match here.ignored_teacher() {
                                        Some(ignored) => ignored.select(0.0, loss),
                                        None => loss,
                                    });
                                }
                                if let (Some(losses), Some(label), Some(x)) = (cross_entropies, &label, x_of_label) {
                                    losses.at(place).store(label.loss(x.fma(-std::f32::consts::LN_2, rest)));
                                }
                            });
                            let Some(target) = target else { return };

                            k.comment("the gradient");
                            let over_sum = k.constant(1.0f32).div(statistics.sum);
                            let slope = here.weight.map(|weight| (weight * divergence_scale * over_sum).named("slope"));
                            let constant = label.as_ref().map(|label| (label.coefficient * over_sum).named("constant"));
                            let formula = Formula { factors, statistics, slope, constant };
                            let next = (row.get() + k.blocks()).named("next");
                            let inside = next.lt(rows);
                            let of_next = known.of_row(next, Some(inside));
                            let refill = inside & of_next.counts();
                            let next_logits =
                                Logits::new(student, teacher.map(|(teacher, _)| teacher), next, vocabulary)
                                    .without_teacher(of_next.ignored_teacher());
                            parts.write(&logits, &held, target, &formula, (refill, &next_logits));
                            ready.set(refill.select::<U32>(1, 0));
                            if let (Some(label), Some(x)) = (&label, x_of_label) {
                                k.comment("what the label's own logit has besides, by the thread that wrote the rest");
                                let owner = (label.index >> VECTOR.ilog2()) & (layout.threads() - 1);
                                k.if_(owner.eq(k.thread()) & label.inside, || {
                                    let y = logits.teacher.zip(statistics.teacher).map(|(teacher, statistics)| {
                                        teacher.at(label.index).load().fma(teacher_factor, statistics.minus_greatest)
                                    });
                                    let value = formula.gradient_at(x, y) - label.coefficient;
                                    target.at(label.index).store(value);
                                });
                            }
                        },
                        || {
                            for losses in [divergences, cross_entropies].into_iter().flatten() {
                                losses.at(place).store_if(is_first, 0.0);
                            }
                            if let Some(target) = target {
                                let zero = k.constant(0u32);
                                k.for_(parts.start, vocabulary, layout.threads() * VECTOR, |column| {
                                    target.at(column).store_words(&[zero; 4]);
                                });
                            }
                        },
                    );
                    row.set(row.get() + k.blocks());
                },
            );
        })
    }

    fn configurations() -> Vec<Self> {
        let mut all = Vec::new();
        for (divergence, labels) in [(true, false), (false, true), (true, true)] {
            for gradient in [None, Some(Row::Short), Some(Row::Medium), Some(Row::Long), Some(Row::Longest)] {
                all.push(Self { divergence, labels, gradient });
            }
        }
        all
    }
}

/// What is known of the rows without their logits.
struct Known<'a> {
    weights: Option<Global<'a>>,
    labels: Option<Global<'a>>,
    /// The first row's place in both.
    first: Value<'a, U32>,
}

impl<'a> Known<'a> {
    /// A row that is not `inside` does not count.
    fn of_row(&self, row: Value<'a, U32>, inside: Option<Value<'a, Pred>>) -> RowKnown<'a> {
        let place = self.first + row;
        let weight = self.weights.map(|weights| match inside {
            Some(inside) => weights.at(place).load_if(inside, 0.0),
            None => weights.at(place).load(),
        });
        let label = self.labels.map(|labels| match inside {
            Some(inside) => labels.at(place).load_u32_if(inside, IGNORED_LABEL),
            None => labels.at(place).load_u32(),
        });
        RowKnown { weight, label }
    }
}

/// What is known of a row.
struct RowKnown<'a> {
    weight: Option<Value<'a, F32>>,
    label: Option<Value<'a, U32>>,
}

impl<'a> RowKnown<'a> {
    /// Whether the row has a loss. A weight that is no number counts.
    fn counts(&self) -> Value<'a, Pred> {
        let weighted = self.weight.map(|weight| !weight.eq(0.0));
        let labelled = self.label.map(|label| label.ne(IGNORED_LABEL));
        match (weighted, labelled) {
            (Some(weighted), Some(labelled)) => weighted | labelled,
            (Some(one), None) | (None, Some(one)) => one,
            (None, None) => unreachable!("a kernel of no losses"),
        }
    }

    /// Whether a row that counts does so for its label alone.
    fn ignored_teacher(&self) -> Option<Value<'a, Pred>> {
        self.label.and(self.weight).map(|weight| weight.eq(0.0))
    }
}

/// A row's label.
struct Label<'a> {
    index: Value<'a, U32>,
    /// It is one of the vocabulary.
    inside: Value<'a, Pred>,
    ignored: Value<'a, Pred>,
    /// What its gradients are multiplied by: 0 where it is ignored, NaN where there is no such token.
    coefficient: Value<'a, F32>,
}

impl<'a> Label<'a> {
    fn new(k: &'a Assembler, index: Value<'a, U32>, vocabulary: Value<'a, U32>, scale: Value<'a, F32>) -> Self {
        let (inside, ignored) = (index.lt(vocabulary), index.eq(IGNORED_LABEL));
        let otherwise = ignored.select::<F32>(k.constant(0.0f32), f32::NAN);
        Self { index, inside, ignored, coefficient: inside.select(scale, otherwise) }
    }

    /// The row's loss, given that of a label that counts.
    fn loss(&self, loss: Value<'a, F32>) -> Value<'a, F32> {
        let loss = self.inside.select::<F32>(loss, f32::NAN);
        self.ignored.select(0.0, loss)
    }
}

/// A row of logits of each model.
struct Logits<'a> {
    student: Global<'a>,
    teacher: Option<Global<'a>>,
}

impl<'a> Logits<'a> {
    fn new(student: Global<'a>, teacher: Option<Global<'a>>, row: Value<'a, U32>, vocabulary: Value<'a, U32>) -> Self {
        Self {
            student: student.from_row(row, vocabulary),
            teacher: teacher.map(|teacher| teacher.from_row(row, vocabulary)),
        }
    }

    /// Where the condition holds the student's logits stand for the teacher's, which may hold anything.
    fn without_teacher(self, condition: Option<Value<'a, Pred>>) -> Self {
        let (Some(condition), Some(teacher)) = (condition, self.teacher) else { return self };
        let address = condition.select::<U64>(self.student.first().global_address(), teacher.first().global_address());
        Self { teacher: Some(teacher.from_address(address)), ..self }
    }

    /// Eight neighbouring logits as they are stored, for several columns `step` apart.
    fn load(&self, column: Value<'a, U32>, step: u32, count: u32) -> Vec<Pair<Words<'a>>> {
        let (student, teacher) = (self.student.at(column), self.teacher.map(|teacher| teacher.at(column)));
        (0..count)
            .map(|index| Pair {
                student: student.plus(i64::from(index * step)).load_words(4),
                teacher: teacher.map(|teacher| teacher.plus(i64::from(index * step)).load_words(4)),
            })
            .collect()
    }
}

/// Something of the student, and the same of the teacher where there is one.
struct Pair<T> {
    student: T,
    teacher: Option<T>,
}

/// Two logits each.
type Words<'a> = Vec<Value<'a, U32>>;

/// The sums over a row, relative to its greatest logits.
#[derive(Clone, Copy)]
struct Statistics<'a> {
    /// −m of the student.
    minus_greatest: Value<'a, F32>,
    /// S.
    sum: Value<'a, F32>,
    teacher: Option<TeacherStatistics<'a>>,
}

#[derive(Clone, Copy)]
struct TeacherStatistics<'a> {
    /// −m of the teacher.
    minus_greatest: Value<'a, F32>,
    /// T.
    sum: Value<'a, F32>,
    /// W while the sums are formed, D = W / S when they are complete.
    mean_difference: Value<'a, F32>,
}

impl<'a> Statistics<'a> {
    /// Numbers that warps exchange.
    const COUNT: u32 = 5;

    /// Of the 32 lanes together, in every lane.
    fn over_warp(self, k: &'a Assembler) -> Self {
        let common = |minus: Value<'a, F32>| -k.warp_max(-minus);
        let minus_greatest = common(self.minus_greatest);
        let moved = minus_greatest - self.minus_greatest;
        let scale = moved.exp2_flushed();
        let teacher = self.teacher.map(|teacher| {
            let minus_greatest = common(teacher.minus_greatest);
            let teacher_moved = minus_greatest - teacher.minus_greatest;
            let difference = self.sum.fma(moved - teacher_moved, teacher.mean_difference) * scale;
            TeacherStatistics {
                minus_greatest,
                sum: k.warp_sum(teacher.sum * teacher_moved.exp2_flushed()),
                mean_difference: k.warp_sum(difference),
            }
        });
        Self { minus_greatest, sum: k.warp_sum(self.sum * scale), teacher }
    }

    /// Of the block's threads together, in every thread; the difference becomes a mean.
    fn over_block(self, k: &'a Assembler, warps: u32, scratch: Shared<'a>) -> Self {
        let within = self.over_warp(k);
        let place = |number: u32, index: Value<'a, U32>| scratch.at(index + number * warps);
        let (first, warp) = (k.lane().eq(0), k.warp());
        place(0, warp).store_if(first, within.minus_greatest);
        place(1, warp).store_if(first, within.sum);
        if let Some(teacher) = within.teacher {
            place(2, warp).store_if(first, teacher.minus_greatest);
            place(3, warp).store_if(first, teacher.sum);
            place(4, warp).store_if(first, teacher.mean_difference);
        }
        k.barrier();
        let lane = k.lane();
        let load = |number: u32, otherwise: f32| place(number, lane).load_if(lane.lt(warps), otherwise);
        let of_warps = Self {
            minus_greatest: load(0, NOTHING_YET),
            sum: load(1, 0.0),
            teacher: within.teacher.map(|_| TeacherStatistics {
                minus_greatest: load(2, NOTHING_YET),
                sum: load(3, 0.0),
                mean_difference: load(4, 0.0),
            }),
        };
        k.comment("the places are free again when all have read them");
        k.barrier();
        let all = of_warps.over_warp(k);
        let teacher = all
            .teacher
            .map(|teacher| TeacherStatistics { mean_difference: teacher.mean_difference.div(all.sum), ..teacher });
        Self { teacher, ..all }
    }
}

/// The sums while a thread goes over its part of a row.
struct Online<'a> {
    minus_greatest: Variable<'a, F32>,
    sum: Variable<'a, F32>,
    factor: Value<'a, F32>,
    teacher: Option<OnlineTeacher<'a>>,
}

struct OnlineTeacher<'a> {
    minus_greatest: Variable<'a, F32>,
    sum: Variable<'a, F32>,
    difference: Variable<'a, F32>,
    factor: Value<'a, F32>,
}

impl<'a> Online<'a> {
    fn new(k: &'a Assembler, factor: Value<'a, F32>, teacher_factor: Option<Value<'a, F32>>) -> Self {
        let (greatest, zero) = (|| k.variable(NOTHING_YET), || k.variable(0.0f32));
        let teacher = teacher_factor.map(|factor| OnlineTeacher {
            minus_greatest: greatest(),
            sum: zero(),
            difference: zero(),
            factor,
        });
        Self { minus_greatest: greatest(), sum: zero(), factor, teacher }
    }

    /// Takes more of the row in.
    fn take(&self, words: &Pair<Words<'a>>) {
        let (x, minus_greatest) = scaled(&words.student, self.factor, self.minus_greatest.get());
        let moved = minus_greatest - self.minus_greatest.get();
        let scale = moved.exp2_flushed();
        let powers: Vec<_> = x.iter().map(|x| x.exp2_flushed()).collect();
        if let (Some(teacher), Some(words)) = (&self.teacher, &words.teacher) {
            let (y, minus_greatest) = scaled(words, teacher.factor, teacher.minus_greatest.get());
            let teacher_moved = minus_greatest - teacher.minus_greatest.get();
            let before = self.sum.get().fma(moved - teacher_moved, teacher.difference.get()) * scale;
            let difference = powers.iter().zip(x.iter().zip(&y)).fold(before, |sum, (power, (x, y))| {
                // Where the student's probability is 0 the term is 0, even if the teacher's is too.
                power.eq(0.0).select::<F32>(0.0, *x - *y).fma(*power, sum)
            });
            teacher.difference.set(difference);
            let powers: Vec<_> = y.iter().map(|y| y.exp2_flushed()).collect();
            let sum = sum_of(&powers);
            teacher.sum.set(teacher.sum.get().fma(teacher_moved.exp2_flushed(), sum));
            teacher.minus_greatest.set(minus_greatest);
        }
        let sum = sum_of(&powers);
        self.sum.set(self.sum.get().fma(scale, sum));
        self.minus_greatest.set(minus_greatest);
    }

    fn statistics(&self) -> Statistics<'a> {
        Statistics {
            minus_greatest: self.minus_greatest.get(),
            sum: self.sum.get(),
            teacher: self.teacher.as_ref().map(|teacher| TeacherStatistics {
                minus_greatest: teacher.minus_greatest.get(),
                sum: teacher.sum.get(),
                mean_difference: teacher.difference.get(),
            }),
        }
    }
}

/// `factor · logit − m` of logits, and −m, where −m was `minus_greatest` before these.
fn scaled<'a>(
    words: &[Value<'a, U32>],
    factor: Value<'a, F32>,
    minus_greatest: Value<'a, F32>,
) -> (Vec<Value<'a, F32>>, Value<'a, F32>) {
    let greatest = words[1..].iter().fold(words[0], |greatest, word| greatest.max_bf16_pairs(*word));
    let [low, high] = greatest.unpack_bf16();
    let minus_greatest = (-(low.max(high) * factor)).min(minus_greatest);
    (values(words).map(|logit| logit.fma(factor, minus_greatest)).collect(), minus_greatest)
}

fn values<'a>(words: &[Value<'a, U32>]) -> impl Iterator<Item = Value<'a, F32>> {
    words.iter().flat_map(|word| word.unpack_bf16())
}

/// The natural logarithm to its last places: a Newton step after the fast one.
fn logarithm(sum: Value<'_, F32>) -> Value<'_, F32> {
    let rough = sum.ln();
    rough + sum.fma((-rough).exp_precise(), -1.0)
}

/// The gradient of a row's logits.
struct Formula<'a> {
    /// Of the student's logits and of the teacher's.
    factors: (Value<'a, F32>, Value<'a, F32>),
    statistics: Statistics<'a>,
    /// Multiplies `x − y − D`.
    slope: Option<Value<'a, F32>>,
    /// Is added to that.
    constant: Option<Value<'a, F32>>,
}

impl<'a> Formula<'a> {
    fn gradient(&self, words: &Pair<Words<'a>>) -> Vec<Value<'a, F32>> {
        let x = values(&words.student).map(|logit| logit.fma(self.factors.0, self.statistics.minus_greatest));
        match (&words.teacher, self.statistics.teacher) {
            (Some(words), Some(teacher)) => {
                let y = values(words).map(|logit| logit.fma(self.factors.1, teacher.minus_greatest));
                x.zip(y).map(|(x, y)| self.gradient_at(x, Some(y))).collect()
            }
            _ => x.map(|x| self.gradient_at(x, None)).collect(),
        }
    }

    /// Without what the label's own logit has besides.
    fn gradient_at(&self, x: Value<'a, F32>, y: Option<Value<'a, F32>>) -> Value<'a, F32> {
        let power = x.exp2_flushed();
        match (y, self.slope, self.statistics.teacher, self.constant) {
            (Some(y), Some(slope), Some(teacher), constant) => {
                let difference = (x - y) - teacher.mean_difference;
                let slope = match constant {
                    Some(constant) => difference.fma(slope, constant),
                    None => difference * slope,
                };
                // As in the sums: 0 where the probability is 0.
                power.eq(0.0).select(0.0, power * slope)
            }
            (_, _, _, Some(constant)) => power * constant,
            _ => unreachable!("a kernel of no losses"),
        }
    }
}

/// How a block goes over a row.
struct Parts<'a> {
    k: &'a Assembler,
    layout: Row,
    vocabulary: Value<'a, U32>,
    /// The thread's first column.
    start: Value<'a, U32>,
    /// The shared memory that keeps a row; none without the gradient.
    student: Option<Shared<'a>>,
    teacher: Option<Shared<'a>>,
}

impl<'a> Parts<'a> {
    /// Columns from one round to the next.
    fn step(&self) -> u32 {
        self.layout.threads() * VECTOR
    }

    /// Columns in registers: none where nothing is kept.
    fn held(&self) -> u32 {
        if self.student.is_some() { self.layout.held() } else { 0 }
    }

    /// The sums over a row, and what of it is in registers. `ready` is 0 where the row is not yet in shared memory.
    fn read(
        &self,
        logits: &Logits<'a>,
        ready: Variable<'a, U32>,
        factors: (Value<'a, F32>, Value<'a, F32>),
        scratch: Shared<'a>,
    ) -> (Statistics<'a>, Vec<Pair<Words<'a>>>) {
        let k = self.k;
        let online = Online::new(k, factors.0, logits.teacher.map(|_| factors.1));
        if self.student.is_some() {
            k.if_(ready.get().eq(0), || {
                self.for_shared(|column| self.copy(logits, column));
                k.commit_copies();
            });
        }
        k.comment("the sums over the part in registers");
        let held = logits.load(self.start, self.step(), self.held() / self.step());
        for pairs in held.chunks(AT_ONCE) {
            online.take(&joined(pairs));
        }
        if let Some(student) = self.student {
            k.comment("over the part in shared memory");
            self.for_shared(|column| {
                // In the loop, since assemblers move a wait before it up to the loads of the registers.
                k.wait_copies(0);
                online.take(&self.kept(student, column));
            });
        }
        k.comment("over the rest");
        self.for_rest(|column, count| {
            for words in logits.load(column, self.step(), count) {
                online.take(&words);
            }
        });
        (online.statistics().over_block(k, self.layout.threads() / LANES, scratch), held)
    }

    /// The gradient of a row. Its place in shared memory takes in the next one where `refill` holds.
    fn write(
        &self,
        logits: &Logits<'a>,
        held: &[Pair<Words<'a>>],
        target: Global<'a>,
        formula: &Formula<'a>,
        (refill, next): (Value<'a, Pred>, &Logits<'a>),
    ) {
        let k = self.k;
        self.for_rest_backwards(|column, count| {
            let words = logits.load(column, self.step(), count);
            let target = target.at(column);
            for (index, words) in (0u32..).zip(&words) {
                target.plus(i64::from(index * self.step())).store_vector(&formula.gradient(words));
            }
        });
        if let Some(student) = self.student {
            self.for_shared(|column| {
                let words = self.kept(student, column);
                target.at(column).store_vector(&formula.gradient(&words));
                k.if_(refill, || self.copy(next, column));
            });
            k.commit_copies();
        }
        let target = target.at(self.start);
        for (round, words) in (0u32..).zip(held) {
            target.plus(i64::from(round * self.step())).store_vector(&formula.gradient(words));
        }
    }

    /// Starts copying a vector of the row to its place in shared memory.
    fn copy(&self, logits: &Logits<'a>, column: Value<'a, U32>) {
        let sources = [(self.student, Some(logits.student)), (self.teacher, logits.teacher)];
        for (place, source) in sources {
            if let (Some(place), Some(source)) = (place, source) {
                self.k.copy_16_bytes(place.at(column - self.held()), source.at(column), 16u32);
            }
        }
    }

    /// What [`Parts::copy`] brought.
    fn kept(&self, student: Shared<'a>, column: Value<'a, U32>) -> Pair<Words<'a>> {
        let place = column - self.held();
        Pair {
            student: student.at(place).load_words(4),
            teacher: self.teacher.map(|teacher| teacher.at(place).load_words(4)),
        }
    }

    /// Columns in registers and in shared memory.
    fn kept_columns(&self) -> u32 {
        let matrices = if self.teacher.is_some() { 2 } else { 1 };
        if self.student.is_some() { self.held() + self.layout.shared(matrices) } else { 0 }
    }

    /// Runs `body` with the first column of each of the thread's vectors in shared memory.
    fn for_shared(&self, body: impl FnOnce(Value<'a, U32>)) {
        let end = self.vocabulary.min(self.kept_columns());
        self.k.for_(self.start + self.held(), end, self.step(), body);
    }

    /// Runs `body` with the thread's columns that are kept nowhere: the first one, and how many (two or one) `step` apart.
    fn for_rest(&self, body: impl Fn(Value<'a, U32>, u32)) {
        let (k, step) = (self.k, self.step());
        let column = k.variable(self.start + self.kept_columns());
        k.while_(
            || (column.get() + step).lt(self.vocabulary),
            || {
                body(column.get(), 2);
                column.set(column.get() + 2 * step);
            },
        );
        k.if_(column.get().lt(self.vocabulary), || body(column.get(), 1));
    }

    /// The same from the last column to the first: what was read last is still in the cache.
    fn for_rest_backwards(&self, body: impl Fn(Value<'a, U32>, u32)) {
        let (k, step) = (self.k, self.step());
        let first = k.constant(self.start + self.kept_columns());
        let rounds = (self.vocabulary.max(first) - first + (step - 1)) >> step.ilog2();
        let end = k.variable(rounds.mad(step, first));
        k.while_(
            || (first + 2 * step).le(end.get()),
            || {
                end.set(end.get() - 2 * step);
                body(end.get(), 2);
            },
        );
        k.if_(first.lt(end.get()), || body(first, 1));
    }
}

fn joined<'a>(pairs: &[Pair<Words<'a>>]) -> Pair<Words<'a>> {
    Pair {
        student: pairs.iter().flat_map(|pair| pair.student.clone()).collect(),
        teacher: pairs[0]
            .teacher
            .is_some()
            .then(|| pairs.iter().flat_map(|pair| pair.teacher.iter().flatten().copied()).collect()),
    }
}
