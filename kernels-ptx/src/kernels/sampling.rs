//! Choosing tokens from rows of logits: the greatest, or at random with temperature, top-k and top-p.
//!
//! - Order: logits are compared by their key, a u32 that orders as they do (−0 before +0); equal ones by their index. A row
//!   with a NaN has no choice: [`NO_TOKEN`].
//! - The random choice is what sorting would give, without sorting. Tokens in falling order have the weights
//!   `e^((logit − greatest) / temperature)`; `top_k` of them are kept, then the fewest whose weights reach `top_p` of their
//!   total, then the first at which the running sum exceeds `uniform` times the kept total. Each of the three places is found
//!   by bisection over keys: the greatest key for which the number or the weight of the tokens with at least that key is large
//!   enough. Within equal keys the place follows by division, and the token by bisection over indices.
//! - Layout: one block per row. A random choice reads its row some 100 times, from the cache where it fits.
//! - Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", for top-p.

use super::{VECTOR, load_part};
use crate::asm::{Assembler, Description, F32, Global, LANES, Operand, Pred, Shared, U32, Value, Variable};
use crate::{Element, Kernel, KernelSource, Target, Work};

use super::cross_entropy::suffix;
pub use super::cross_entropy::takes_vectors;

const THREADS: u32 = 512;
const WARPS: u32 = THREADS / LANES;

/// The choice from a row with a NaN.
pub const NO_TOKEN: u32 = u32::MAX;

/// The key of every NaN.
const NAN_KEY: u32 = u32::MAX;

/// The index of the greatest logit of each row; the first of equals.
///
/// Parameters: `tokens` (u32 `[rows]`, written), `logits` (`[rows, vocabulary]`), `vocabulary` (u32). One block per row.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ArgMax {
    /// Type of the logits.
    pub element: Element,
    /// The vocabulary is a multiple of 8.
    pub vector: bool,
}

/// A random index for each row.
///
/// Parameters: `tokens` (u32 `[rows]`, written), `logits` (`[rows, vocabulary]`), `uniforms` (f32 `[rows]`, from 0 to below 1),
/// `vocabulary` (u32), `temperature` (f32), `top_k` (u32, at least 1), `top_p` (f32, above 0). One block per row.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Sample {
    /// Type of the logits.
    pub element: Element,
    /// The vocabulary is a multiple of 8.
    pub vector: bool,
}

impl KernelSource for ArgMax {
    fn build(&self) -> Kernel {
        let Self { element, vector } = *self;
        let bytes = element.bytes() as u64;
        let description = Description {
            name: format!("argmax_{element}{}", suffix(vector)),
            summary: "tokens[r] = the index of the greatest logit of row r; one block per row".to_owned(),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["rows", "vocabulary"],
            work: move |sizes: &[u64]| Work {
                bytes: (bytes * sizes[1] + 4) * sizes[0],
                operations: sizes[0] * sizes[1],
            },
        };
        Assembler::assemble(description, |k| {
            let (tokens, logits) = (k.write("tokens", Element::U32), k.read("logits", element));
            let row = Row::new(k, logits, k.u32("vocabulary"), vector);
            let greatest = k.variable(0u32).named("greatest");
            let index = k.variable(NO_TOKEN).named("index");
            row.for_each(|at, logit| {
                // Zeros of either sign are equal.
                let logit_key = key(logit + 0.0);
                let greater = logit_key.gt(greatest);
                index.set(greater.select(at, index.get()));
                greatest.set(logit_key.max(greatest));
            });
            let all = row.reduce(greatest.get(), |a, b| a.max(b));
            let mine = greatest.get().eq(all).select(index.get(), NO_TOKEN);
            let first = row.reduce(mine, |a, b| a.min(b));
            let token: Value<'_, U32> = all.eq(NAN_KEY).select(NO_TOKEN, first);
            tokens.at(k.block()).store_u32_if(k.thread().eq(0), token);
        })
    }

    fn configurations() -> Vec<Self> {
        super::float_elements(|element| Self { element, vector: true })
    }
}

impl KernelSource for Sample {
    fn build(&self) -> Kernel {
        let Self { element, vector } = *self;
        let bytes = element.bytes() as u64;
        let description = Description {
            name: format!("sample_{element}{}", suffix(vector)),
            summary: "tokens[r] = a random index with temperature, top-k and top-p; one block per row".to_owned(),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["rows", "vocabulary"],
            work: move |sizes: &[u64]| Work {
                bytes: (bytes * sizes[1] + 8) * sizes[0],
                operations: 100 * sizes[0] * sizes[1],
            },
        };
        Assembler::assemble(description, |k| {
            let (tokens, logits) = (k.write("tokens", Element::U32), k.read("logits", element));
            let (uniforms, vocabulary) = (k.read("uniforms", Element::F32), k.u32("vocabulary"));
            let (temperature, top_k, top_p) = (k.f32("temperature"), k.u32("top_k"), k.f32("top_p"));
            let row = Row::new(k, logits, vocabulary, vector);
            let token = k.variable(NO_TOKEN).named("token");

            k.comment("the greatest and the least key");
            let (greatest, least) = (k.variable(0u32), k.variable(u32::MAX));
            row.for_each(|_, logit| {
                let logit_key = key(logit);
                greatest.set(logit_key.max(greatest));
                least.set(logit_key.min(least));
            });
            let greatest = row.reduce(greatest.get(), |a, b| a.max(b)).named("greatest_key");
            let least = row.reduce(least.get(), |a, b| a.min(b)).named("least_key");
            k.if_(greatest.ne(NAN_KEY), || {
                let weights = Weights { row, greatest, highest: logit_of(greatest), temperature };

                k.comment("top-k: the key of the last token that is kept, and how many tokens of that key are");
                let top_k = top_k.min(vocabulary);
                let last = row.search(least, greatest, |key| row.count_from(key).ge(top_k)).named("last_key");
                let ties = k.variable(top_k - row.count_from(last.get() + 1)).named("ties");
                let total = k.variable(weights.sum_from(last.get() + 1)).named("total");
                total.set(ties.get().to_f32().fma(weights.of_key(last.get()), total.get()));

                k.comment("top-p: the same, again");
                k.if_(top_p.lt(1.0), || {
                    let needed = total.get() * top_p;
                    let first = last.get();
                    let cut = row.search(first, greatest, |key| weights.sum_from(key).ge(needed));
                    let above = weights.sum_from(cut.get() + 1);
                    let weight = weights.of_key(cut.get());
                    let equal = cut.get().eq(first).select(ties.get(), row.count_of(cut.get()));
                    // The least number of them that fills the rest.
                    let parts = (needed - above).div(weight);
                    let whole = parts.truncate();
                    let more: Value<'_, U32> = whole.to_f32().lt(parts).select(1u32, 0u32);
                    ties.set((whole + more).max(1u32).min(equal));
                    last.set(cut.get());
                    total.set(ties.get().to_f32().fma(weight, above));
                });

                k.comment("the token at which the running sum exceeds the uniform part of the total");
                let target = (uniforms.at(k.block()).load() * total.get()).named("target");
                let chosen = row.search(last.get(), greatest, |key| weights.sum_from(key).gt(target));
                let above = weights.sum_from(chosen.get() + 1);
                let equal = chosen.get().eq(last.get()).select(ties.get(), row.count_of(chosen.get()));
                let place = (target - above).div(weights.of_key(chosen.get())).truncate().min(equal - 1);

                k.comment("the token of that place among those of its key");
                let (low, high) = (k.variable(0u32), k.variable(vocabulary - 1));
                k.while_(
                    || low.get().lt(high),
                    || {
                        let middle = (low.get() + high) >> 1;
                        let count = row.sum(|at, logit| {
                            let before = at.le(middle) & key(logit).eq(chosen);
                            before.select(1u32, 0u32)
                        });
                        let reached = count.gt(place);
                        high.set(reached.select(middle, high.get()));
                        low.set(reached.select(low.get(), middle + 1));
                    },
                );
                token.set(low.get());
            });
            tokens.at(k.block()).store_u32_if(k.thread().eq(0), token.get());
        })
    }

    fn configurations() -> Vec<Self> {
        super::float_elements(|element| Self { element, vector: true })
    }
}

/// The block's row of logits, and the reductions over it. All threads of the block get the same results.
#[derive(Clone, Copy)]
struct Row<'a> {
    k: &'a Assembler,
    logits: Global<'a>,
    vocabulary: Value<'a, U32>,
    vector: bool,
    scratch: Shared<'a>,
}

impl<'a> Row<'a> {
    fn new(k: &'a Assembler, logits: Global<'a>, vocabulary: Value<'a, U32>, vector: bool) -> Self {
        let logits = logits.from_row(k.block(), vocabulary);
        Self { k, logits, vocabulary, vector, scratch: k.shared(Element::U32, WARPS) }
    }

    /// Runs `body` with every index that the thread takes, in order, and its logit.
    fn for_each(&self, body: impl Fn(Value<'a, U32>, Value<'a, F32>)) {
        let width = if self.vector { VECTOR } else { 1 };
        self.k.for_(self.k.thread() * width, self.vocabulary, THREADS * width, |first| {
            for (lane, logit) in (0u32..).zip(load_part(self.logits.at(first), self.vector)) {
                body(first + lane, logit);
            }
        });
    }

    /// Combines the threads' values, in a fixed order.
    fn reduce(
        &self,
        value: Value<'a, U32>,
        combine: impl Fn(Value<'a, U32>, Value<'a, U32>) -> Value<'a, U32>,
    ) -> Value<'a, U32> {
        let k = self.k;
        let across = |value, lanes: u32| {
            (0..lanes.ilog2()).rev().fold(value, |value, bit| combine(value, k.shuffle_xor(value, 1 << bit)))
        };
        let within = across(value, LANES);
        self.scratch.at(k.warp()).store_u32_if(k.lane().eq(0), within);
        k.barrier();
        let total = across(self.scratch.at(k.lane() & (WARPS - 1)).load_u32(), WARPS);
        k.barrier();
        total
    }

    /// The sum of a number for every token.
    fn sum(&self, number: impl Fn(Value<'a, U32>, Value<'a, F32>) -> Value<'a, U32>) -> Value<'a, U32> {
        let total = self.k.variable(0u32);
        self.for_each(|at, logit| total.set(total.get() + number(at, logit)));
        self.reduce(total.get(), |a, b| a + b)
    }

    /// How many tokens have at least this key.
    fn count_from(&self, least: Value<'a, U32>) -> Value<'a, U32> {
        self.sum(|_, logit| key(logit).ge(least).select(1u32, 0u32))
    }

    /// How many tokens have this key.
    fn count_of(&self, wanted: Value<'a, U32>) -> Value<'a, U32> {
        self.sum(|_, logit| key(logit).eq(wanted).select(1u32, 0u32))
    }

    /// The greatest key from `least` to `greatest` for which the condition holds, which it does up to there; `least` if for
    /// none.
    fn search(
        &self,
        least: impl Operand<'a, U32>,
        greatest: Value<'a, U32>,
        holds: impl Fn(Value<'a, U32>) -> Value<'a, Pred>,
    ) -> Variable<'a, U32> {
        let k = self.k;
        let (low, high) = (k.variable(least), k.variable(greatest));
        k.while_(
            || low.get().lt(high),
            || {
                // low < middle ≤ high
                let middle = high.get() - ((high.get() - low) >> 1);
                let condition = holds(middle);
                low.set(condition.select(middle, low.get()));
                high.set(condition.select(high.get(), middle - 1));
            },
        );
        low
    }
}

/// The tokens' weights.
#[derive(Clone, Copy)]
struct Weights<'a> {
    row: Row<'a>,
    greatest: Value<'a, U32>,
    highest: Value<'a, F32>,
    temperature: Value<'a, F32>,
}

impl<'a> Weights<'a> {
    /// The weight of every token of this key; 1 of the greatest, even if it is infinite.
    fn of_key(&self, wanted: Value<'a, U32>) -> Value<'a, F32> {
        let weight = (logit_of(wanted) - self.highest).div(self.temperature).exp_precise();
        wanted.eq(self.greatest).select(1.0, weight)
    }

    /// The sum of the weights of the tokens of at least this key.
    fn sum_from(&self, least: Value<'a, U32>) -> Value<'a, F32> {
        let k = self.row.k;
        let total = k.variable(0.0f32);
        self.row.for_each(|_, logit| {
            let logit_key = key(logit);
            k.if_(logit_key.ge(least), || total.set(total.get() + self.of_key(logit_key)));
        });
        self.row.reduce(total.get().bits(), |a, b| (a.as_f32() + b.as_f32()).bits()).as_f32()
    }
}

/// A number that orders as logits do; [`NAN_KEY`] for NaN.
fn key<'a>(logit: Value<'a, F32>) -> Value<'a, U32> {
    let bits = logit.bits();
    let flipped: Value<'a, U32> = bits ^ bits.ge(SIGN).select(u32::MAX, SIGN);
    logit.eq(logit).select(flipped, NAN_KEY)
}

/// The logit of a key.
fn logit_of<'a>(key: Value<'a, U32>) -> Value<'a, F32> {
    let bits: Value<'a, U32> = key ^ key.ge(SIGN).select(SIGN, u32::MAX);
    bits.as_f32()
}

const SIGN: u32 = 1 << 31;
