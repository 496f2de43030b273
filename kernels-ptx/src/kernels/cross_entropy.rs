//! Cross-entropy of rows of logits against labels: `loss = ln Σ e^x − x[label]`, its gradient
//! `weight · (softmax(x) − onehot(label))`, and the log-sum-exp that the divergences share.
//!
//! - Log-sum-exp in one pass: every thread keeps the greatest logit that it has seen and the sum of `e^(x − greatest)`;
//!   where a greater one comes, the sum is scaled. It is kept in two parts, the greatest logit and the logarithm of the
//!   sum: rounding their total would cost large logits the digits that their probabilities depend on.
//! - Layout: one block per row; threads take 8 neighbouring logits at a time (`vector`: rows of a multiple of 8), or one.
//! - Rows whose label is [`IGNORED_LABEL`] are not read; their loss and gradient are zero. A label outside the vocabulary
//!   gives NaN.
//! - Traffic: forward reads each logit once, backward reads and writes it once. Bound by memory.
//! - Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax".

use super::{VECTOR, load_part, store_part};
use crate::asm::{Address, Assembler, Description, F32, Global, LANES, Shared, U32, Value, Variable};
use crate::{Element, Kernel, KernelSource, Target, Work};

/// Threads of the blocks that go over rows of logits.
pub(super) const THREADS: u32 = 256;

/// The label of a row that does not count.
pub const IGNORED_LABEL: u32 = u32::MAX;

/// The loss of every row, and the two parts of its log-sum-exp.
///
/// Parameters: `losses` (f32 `[rows]`), `statistics` (f32 `[rows, 2]`; both written, the latter only where the label
/// counts), `logits` (`[rows, vocabulary]`), `labels` (u32 `[rows]`), `vocabulary` (u32). One block per row.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct CrossEntropyForward {
    /// Type of the logits.
    pub element: Element,
    /// The vocabulary is a multiple of 8.
    pub vector: bool,
}

/// The gradient of the logits: `gradient[0] · scale · (softmax(logits) − onehot(label))`.
///
/// Parameters: `logits_gradient` (`[rows, vocabulary]`, written), `gradient` (f32, one element), `logits`
/// (`[rows, vocabulary]`), `labels` (u32 `[rows]`), `statistics` (f32 `[rows, 2]`, of the forward pass), `scale` (f32),
/// `vocabulary` (u32). One block per row.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct CrossEntropyBackward {
    /// Type of the logits and of their gradient.
    pub element: Element,
    /// The vocabulary is a multiple of 8.
    pub vector: bool,
}

/// Whether rows of so many logits take the `vector` kernels.
pub fn takes_vectors(vocabulary: u32) -> bool {
    vocabulary.is_multiple_of(VECTOR)
}

impl KernelSource for CrossEntropyForward {
    fn build(&self) -> Kernel {
        let Self { element, vector } = *self;
        let bytes = element.bytes() as u64;
        let description = Description {
            name: format!("cross_entropy_forward_{element}{}", suffix(vector)),
            summary: "losses[r] = ln sum of e^logits[r] - logits[r, labels[r]]; one block per row".to_owned(),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["rows", "vocabulary"],
            work: move |sizes: &[u64]| Work {
                bytes: (bytes * sizes[1] + 16) * sizes[0],
                operations: 4 * sizes[0] * sizes[1],
            },
        };
        Assembler::assemble(description, |k| {
            let (losses, statistics) = (k.write("losses", Element::F32), k.write("statistics", Element::F32));
            let (logits, labels) = (k.read("logits", element), k.read("labels", Element::U32));
            let vocabulary = k.u32("vocabulary");
            let (row, is_first) = (k.block().named("row"), k.thread().eq(0).named("is_first"));
            let logits = logits.from_row(row, vocabulary);
            let label = labels.at(row).load_u32().named("label");
            k.if_else(
                label.eq(IGNORED_LABEL),
                || losses.at(row).store_if(is_first, 0.0),
                || {
                    let sum = OnlineLogSumExp::new(k);
                    for_each_part(k, vocabulary, vector, |column| sum.take(&load_part(logits.at(column), vector)));
                    let sum = sum.over_block(k, k.shared(Element::F32, THREADS / LANES));
                    k.if_(is_first, || {
                        let inside = label.lt(vocabulary);
                        let rest: Value<'_, F32> = inside.select(sum.rest, f32::NAN);
                        let logit = logits.at(label).load_if(inside, 0.0);
                        let of_row = statistics.from_row(row, 2u32).first();
                        of_row.store(sum.greatest);
                        of_row.plus(1).store(rest);
                        losses.at(row).store(k.constant(0.0f32) - LogSumExp { rest, ..sum }.log_probability(logit));
                    });
                },
            );
        })
    }

    fn configurations() -> Vec<Self> {
        super::float_elements(|element| Self { element, vector: true })
    }
}

impl KernelSource for CrossEntropyBackward {
    fn build(&self) -> Kernel {
        let Self { element, vector } = *self;
        let bytes = element.bytes() as u64;
        let description = Description {
            name: format!("cross_entropy_backward_{element}{}", suffix(vector)),
            summary: "gradient[0] * scale * (softmax(logits) - onehot(label)); one block per row".to_owned(),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["rows", "vocabulary"],
            work: move |sizes: &[u64]| Work {
                bytes: (2 * bytes * sizes[1] + 12) * sizes[0],
                operations: 5 * sizes[0] * sizes[1],
            },
        };
        Assembler::assemble(description, |k| {
            let logits_gradient = k.write("logits_gradient", element);
            let gradient = k.read("gradient", Element::F32);
            let (logits, labels) = (k.read("logits", element), k.read("labels", Element::U32));
            let (statistics, scale) = (k.read("statistics", Element::F32), k.f32("scale"));
            let vocabulary = k.u32("vocabulary");
            let row = k.block().named("row");
            let [logits, logits_gradient] = [logits, logits_gradient].map(|memory| memory.from_row(row, vocabulary));
            let label = labels.at(row).load_u32().named("label");
            k.if_else(
                label.eq(IGNORED_LABEL),
                || fill_zero(k, logits_gradient, vocabulary, vector),
                || {
                    let weight = (gradient.first().load() * scale).named("weight");
                    let sum = LogSumExp::load(statistics.from_row(row, 2u32).first());
                    for_each_part(k, vocabulary, vector, |column| {
                        let values = load_part(logits.at(column), vector);
                        let results: Vec<_> = (0u32..)
                            .zip(&values)
                            .map(|(lane, value)| {
                                let one: Value<'_, F32> = (column + lane).eq(label).select(1.0, 0.0);
                                weight * (sum.log_probability(*value).exp_precise() - one)
                            })
                            .collect();
                        store_part(logits_gradient.at(column), &results);
                    });
                },
            );
        })
    }

    fn configurations() -> Vec<Self> {
        super::float_elements(|element| Self { element, vector: true })
    }
}

/// How names tell the kernels that take one logit at a time.
pub(super) fn suffix(vector: bool) -> &'static str {
    if vector { "" } else { "_scalar" }
}

/// Runs `body` with the first column of each part of a row that the thread takes.
pub(super) fn for_each_part<'a>(
    k: &'a Assembler,
    vocabulary: Value<'a, U32>,
    vector: bool,
    body: impl FnOnce(Value<'a, U32>),
) {
    let width = if vector { VECTOR } else { 1 };
    k.for_(k.thread() * width, vocabulary, THREADS * width, body);
}

/// Sets a row to zero.
pub(super) fn fill_zero<'a>(k: &'a Assembler, row: Global<'a>, vocabulary: Value<'a, U32>, vector: bool) {
    let zero = k.constant(0.0f32);
    let zeros = vec![zero; if vector { VECTOR as usize } else { 1 }];
    for_each_part(k, vocabulary, vector, |column| store_part(row.at(column), &zeros));
}

/// The sum of neighbours, pairs first.
pub(super) fn sum_of<'a>(values: &[Value<'a, F32>]) -> Value<'a, F32> {
    match values {
        [value] => *value,
        _ => {
            let (low, high) = values.split_at(values.len() / 2);
            sum_of(low) + sum_of(high)
        }
    }
}

/// `ln Σ e^x` of a row in two parts.
#[derive(Clone, Copy)]
pub(super) struct LogSumExp<'a> {
    /// The greatest x.
    pub greatest: Value<'a, F32>,
    /// `ln Σ e^(x − greatest)`.
    pub rest: Value<'a, F32>,
}

impl<'a> LogSumExp<'a> {
    /// What was stored in two neighbouring places.
    pub fn load(place: Address<'a>) -> Self {
        Self { greatest: place.load(), rest: place.plus(1).load() }
    }

    /// The logarithm of the probability of x.
    pub fn log_probability(self, x: Value<'a, F32>) -> Value<'a, F32> {
        (x - self.greatest) - self.rest
    }
}

/// What a thread has seen of a row: see the [module](self).
pub(super) struct OnlineLogSumExp<'a> {
    greatest: Variable<'a, F32>,
    sum: Variable<'a, F32>,
}

impl<'a> OnlineLogSumExp<'a> {
    /// Of nothing yet. The greatest starts at the least finite number, so that differences from it are never NaN.
    pub fn new(k: &'a Assembler) -> Self {
        Self { greatest: k.variable(f32::MIN), sum: k.variable(0.0f32) }
    }

    /// Takes more of the row in.
    pub fn take(&self, values: &[Value<'a, F32>]) {
        let before = self.greatest.get();
        let greatest = values.iter().fold(before, |greatest, value| greatest.max(*value));
        // A NaN, which the maximum passes over, shows in the sum.
        let terms: Vec<_> = values.iter().map(|value| (*value - greatest).exp_precise()).collect();
        let scale = (before - greatest).exp_precise();
        self.sum.set(self.sum.get().fma(scale, sum_of(&terms)));
        self.greatest.set(greatest);
    }

    /// Of the whole block, in every thread; `scratch` has one f32 per warp.
    pub fn over_block(self, k: &'a Assembler, scratch: Shared<'a>) -> LogSumExp<'a> {
        let greatest = k.block_max(self.greatest.get(), THREADS, scratch);
        let scale = (self.greatest.get() - greatest).exp_precise();
        let sum = k.block_sum(self.sum.get() * scale, THREADS, scratch);
        // One Newton step: what the fast logarithm lacks to its last places.
        let rough = sum.ln();
        let rest = rough + sum.fma((-rough).exp_precise(), -1.0);
        LogSumExp { greatest, rest }
    }
}
