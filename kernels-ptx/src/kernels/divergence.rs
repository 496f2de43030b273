//! Divergences between the distributions of two rows of logits, and the gradient of the first: student `q`, teacher `p`.
//!
//! - With `a = ln q` and `b = ln p` of each token: reverse KL `Σ q (a − b)`, forward KL `Σ p (b − a)`, Jensen-Shannon
//!   `½ Σ q (a − ln m) + ½ Σ p (b − ln m)` with `m = (q + p) / 2`, soft cross-entropy `−Σ p a`. A probability of 0 makes a
//!   term 0.
//! - Gradient of the student's scaled logits: with `s` the slope `a − b` or `½ (a − ln m)`, `q (s − Σ q s)`; forward KL and
//!   soft cross-entropy: `q − p`. Divided by the temperature and the batch's count, times the row's weight.
//! - Layout: one block per row; threads take 8 neighbouring logits of each at a time (`vector`: rows of a multiple of 8), or
//!   one. Forward goes over the rows twice, for the log-sum-exps of both and for the loss; backward once, with the forward
//!   pass's statistics. Rows of weight 0 are not read; their loss and gradient are zero.
//! - Traffic: forward reads each logit of both once (and once more, from the cache where it is there), backward reads both
//!   and writes one. Bound by memory.
//! - Source: Apriel-H1 (2025), equation 5; Lin 1991 for Jensen-Shannon.

use super::cross_entropy::{LogSumExp, OnlineLogSumExp, THREADS, fill_zero, for_each_part, suffix, sum_of};
use super::{load_part, store_part};
use crate::asm::{Assembler, Description, F32, LANES, Value};
use crate::{Element, Kernel, KernelSource, Target, Work};

pub use super::cross_entropy::takes_vectors;

/// Numbers that the forward pass keeps of each row: greatest logit and the rest of the log-sum-exp, of the student and of
/// the teacher, both scaled, and the mean slope.
pub const STATISTICS: u32 = 5;

/// Which divergence.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Divergence {
    /// `Σ q (ln q − ln p)`.
    ReverseKl,
    /// `Σ p (ln p − ln q)`.
    ForwardKl,
    /// `½ KL(q ‖ m) + ½ KL(p ‖ m)`, `m = (q + p) / 2`.
    JensenShannon,
    /// `−Σ p ln q`; its gradient is the forward KL's.
    SoftCrossEntropy,
}

/// The divergence of every row, and the row's statistics.
///
/// Parameters: `losses` (f32 `[rows]`), `statistics` (f32 `[rows, 5]`; both written, the latter only where the weight is not
/// 0), `student`, `teacher` (`[rows, vocabulary]`), `weights` (f32 `[rows]`), `student_factor`, `teacher_factor` (f32, times
/// the logits), `vocabulary` (u32). One block per row.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct DivergenceForward {
    /// Which divergence.
    pub divergence: Divergence,
    /// Type of the logits.
    pub element: Element,
    /// The vocabulary is a multiple of 8.
    pub vector: bool,
}

/// The gradient of the student's logits: `gradient[0] · scale · weight` times that of the scaled logits.
///
/// Parameters: `student_gradient` (`[rows, vocabulary]`, written), `gradient` (f32, one element), `student`, `teacher`
/// (`[rows, vocabulary]`), `weights` (f32 `[rows]`), `statistics` (f32 `[rows, 5]`, of the forward pass), `student_factor`,
/// `teacher_factor`, `scale` (f32), `vocabulary` (u32). One block per row.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct DivergenceBackward {
    /// Which divergence.
    pub divergence: Divergence,
    /// Type of the logits and of the gradient.
    pub element: Element,
    /// The vocabulary is a multiple of 8.
    pub vector: bool,
}

impl KernelSource for DivergenceForward {
    fn build(&self) -> Kernel {
        let Self { divergence, element, vector } = *self;
        let bytes = element.bytes() as u64;
        let description = Description {
            name: format!("divergence_forward_{}_{element}{}", divergence.name(), suffix(vector)),
            summary: format!("losses[r] = {} of the distributions of two rows; one block per row", divergence.words()),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["rows", "vocabulary"],
            work: move |sizes: &[u64]| Work {
                bytes: (2 * bytes * sizes[1] + 28) * sizes[0],
                operations: 16 * sizes[0] * sizes[1],
            },
        };
        Assembler::assemble(description, |k| {
            let (losses, statistics) = (k.write("losses", Element::F32), k.write("statistics", Element::F32));
            let (student, teacher) = (k.read("student", element), k.read("teacher", element));
            let weights = k.read("weights", Element::F32);
            let (student_factor, teacher_factor) = (k.f32("student_factor"), k.f32("teacher_factor"));
            let vocabulary = k.u32("vocabulary");
            let (row, is_first) = (k.block().named("row"), k.thread().eq(0).named("is_first"));
            let [student, teacher] = [student, teacher].map(|logits| logits.from_row(row, vocabulary));
            let load = |column| {
                [(student, student_factor), (teacher, teacher_factor)].map(|(logits, factor)| {
                    load_part(logits.at(column), vector).into_iter().map(|logit| logit * factor).collect::<Vec<_>>()
                })
            };
            k.if_else(
                weights.at(row).load().eq(0.0),
                || losses.at(row).store_if(is_first, 0.0),
                || {
                    let scratch = k.shared(Element::F32, THREADS / LANES);
                    k.comment("the log-sum-exps");
                    let (student_sum, teacher_sum) = (OnlineLogSumExp::new(k), OnlineLogSumExp::new(k));
                    for_each_part(k, vocabulary, vector, |column| {
                        let [s, t] = load(column);
                        student_sum.take(&s);
                        teacher_sum.take(&t);
                    });
                    let student_sum = student_sum.over_block(k, scratch);
                    let teacher_sum = teacher_sum.over_block(k, scratch);

                    k.comment("the loss");
                    let totals = [k.variable(0.0f32).named("total"), k.variable(0.0f32).named("other_total")];
                    for_each_part(k, vocabulary, vector, |column| {
                        let [s, t] = load(column);
                        let terms = s.into_iter().zip(t).map(|(s, t)| {
                            divergence.terms(student_sum.log_probability(s), teacher_sum.log_probability(t))
                        });
                        let (terms, other_terms): (Vec<_>, Vec<_>) = terms.unzip();
                        totals[0].set(totals[0].get() + sum_of(&terms));
                        if let Some(other_terms) = other_terms.into_iter().collect::<Option<Vec<_>>>() {
                            totals[1].set(totals[1].get() + sum_of(&other_terms));
                        }
                    });
                    let [total, other_total] = totals.map(|total| k.block_sum(total.get(), THREADS, scratch));
                    k.if_(is_first, || {
                        let of_row = statistics.from_row(row, STATISTICS).first();
                        let kept =
                            [student_sum.greatest, student_sum.rest, teacher_sum.greatest, teacher_sum.rest, total];
                        for (place, value) in (0..).zip(kept) {
                            of_row.plus(place).store(value);
                        }
                        losses.at(row).store(total + other_total);
                    });
                },
            );
        })
    }

    fn configurations() -> Vec<Self> {
        use Divergence::{ForwardKl, JensenShannon, ReverseKl, SoftCrossEntropy};
        [ReverseKl, ForwardKl, JensenShannon, SoftCrossEntropy]
            .into_iter()
            .flat_map(|divergence| super::float_elements(|element| Self { divergence, element, vector: true }))
            .collect()
    }
}

impl KernelSource for DivergenceBackward {
    fn build(&self) -> Kernel {
        let Self { divergence, element, vector } = *self;
        let bytes = element.bytes() as u64;
        let description = Description {
            name: format!("divergence_backward_{}_{element}{}", divergence.name(), suffix(vector)),
            summary: format!("gradient of the student's logits of {}; one block per row", divergence.words()),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["rows", "vocabulary"],
            work: move |sizes: &[u64]| Work {
                bytes: (3 * bytes * sizes[1] + 24) * sizes[0],
                operations: 12 * sizes[0] * sizes[1],
            },
        };
        Assembler::assemble(description, |k| {
            let student_gradient = k.write("student_gradient", element);
            let gradient = k.read("gradient", Element::F32);
            let (student, teacher) = (k.read("student", element), k.read("teacher", element));
            let (weights, statistics) = (k.read("weights", Element::F32), k.read("statistics", Element::F32));
            let (student_factor, teacher_factor) = (k.f32("student_factor"), k.f32("teacher_factor"));
            let (scale, vocabulary) = (k.f32("scale"), k.u32("vocabulary"));
            let row = k.block().named("row");
            let [student, teacher, student_gradient] =
                [student, teacher, student_gradient].map(|memory| memory.from_row(row, vocabulary));
            let weight = weights.at(row).load().named("weight");
            k.if_else(
                weight.eq(0.0),
                || fill_zero(k, student_gradient, vocabulary, vector),
                || {
                    let weight = (gradient.first().load() * scale * weight).named("scaled_weight");
                    let of_row = statistics.from_row(row, STATISTICS).first();
                    let (student_sum, teacher_sum) = (LogSumExp::load(of_row), LogSumExp::load(of_row.plus(2)));
                    let mean = of_row.plus(4).load().named("mean_slope");
                    for_each_part(k, vocabulary, vector, |column| {
                        let (s, t) = (load_part(student.at(column), vector), load_part(teacher.at(column), vector));
                        let results: Vec<_> = s
                            .into_iter()
                            .zip(t)
                            .map(|(s, t)| {
                                let log_q = student_sum.log_probability(s * student_factor);
                                let log_p = teacher_sum.log_probability(t * teacher_factor);
                                weight * divergence.slope(log_q, log_p, mean)
                            })
                            .collect();
                        store_part(student_gradient.at(column), &results);
                    });
                },
            );
        })
    }

    fn configurations() -> Vec<Self> {
        use Divergence::{ForwardKl, JensenShannon, ReverseKl};
        [ReverseKl, ForwardKl, JensenShannon]
            .into_iter()
            .flat_map(|divergence| super::float_elements(|element| Self { divergence, element, vector: true }))
            .collect()
    }
}

impl Divergence {
    fn name(self) -> &'static str {
        match self {
            Self::ReverseKl => "reverse_kl",
            Self::ForwardKl => "forward_kl",
            Self::JensenShannon => "jensen_shannon",
            Self::SoftCrossEntropy => "soft_cross_entropy",
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::ReverseKl => "the reverse KL divergence",
            Self::ForwardKl => "the forward KL divergence",
            Self::JensenShannon => "the Jensen-Shannon divergence",
            Self::SoftCrossEntropy => "the soft cross-entropy",
        }
    }

    /// A token's share of the loss: the part whose sum is the mean slope (where there is one), and the other part.
    fn terms<'a>(self, log_q: Value<'a, F32>, log_p: Value<'a, F32>) -> (Value<'a, F32>, Option<Value<'a, F32>>) {
        match self {
            Self::ReverseKl => (weighted(log_q, log_q - log_p), None),
            Self::ForwardKl => (weighted(log_p, log_p - log_q), None),
            Self::SoftCrossEntropy => (weighted(log_p, -log_q), None),
            Self::JensenShannon => {
                let log_mean = log_mean(log_q, log_p);
                (weighted(log_q, (log_q - log_mean) * 0.5), Some(weighted(log_p, (log_p - log_mean) * 0.5)))
            }
        }
    }

    /// The derivative with respect to a scaled logit of the student.
    fn slope<'a>(self, log_q: Value<'a, F32>, log_p: Value<'a, F32>, mean: Value<'a, F32>) -> Value<'a, F32> {
        match self {
            Self::ReverseKl => weighted(log_q, log_q - log_p - mean),
            Self::ForwardKl | Self::SoftCrossEntropy => log_q.exp_precise() - log_p.exp_precise(),
            Self::JensenShannon => weighted(log_q, (log_q - log_mean(log_q, log_p)).fma(0.5, -mean)),
        }
    }
}

/// `e^log_probability · value`, 0 where the probability is 0 even if the value is infinite; NaN stays NaN.
fn weighted<'a>(log_probability: Value<'a, F32>, value: Value<'a, F32>) -> Value<'a, F32> {
    let probability = log_probability.exp_precise();
    probability.eq(0.0).select(0.0, probability * value)
}

/// `ln((e^a + e^b) / 2)`.
fn log_mean<'a>(a: Value<'a, F32>, b: Value<'a, F32>) -> Value<'a, F32> {
    let (high, low) = (a.max(b), a.min(b));
    high + ((low - high).softplus() - std::f32::consts::LN_2)
}
