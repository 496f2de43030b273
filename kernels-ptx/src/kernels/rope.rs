//! Rotary position embedding, rotate-half form: pairs `(a, b) = (x[j], x[j + half])` of every head become
//! `(a cos − b sin, b cos + a sin)` of the angle `position · frequency[j]`. The gradient is the same with the sine's sign
//! turned.
//!
//! - Angles are f32 products, as the host forms them. Cosine and sine come from a reduction to a quarter turn in two
//!   parts (Cody and Waite 1980) and the polynomials of Cephes' `sinf` and `cosf` (Moshier 1989): errors stay below 2⁻²³
//!   for angles below 2²⁰.
//! - Layout: one thread takes 8 neighbouring pairs of a token (one, where half the head size is no multiple of 8) in up to
//!   `HEADS` heads, whose cosines and sines it computes once while all that it reads is on its way. The heads of neighbouring
//!   threads are neighbours, those of one thread lie apart: what threads have in hand together is one stretch of memory.
//! - Traffic: every element is read once and written once. Bound by memory.
//! - Source: Su et al. 2021, "RoFormer".

use super::{VECTOR, load_part, store_part};
use crate::asm::{Assembler, Description, F32, Value, unpack};
use crate::{Element, Kernel, KernelSource, Target, Work};

const THREADS: u32 = 128;
/// Heads that one thread rotates.
const HEADS: u32 = 4;

/// Rotates pairs of every head.
///
/// Parameters: `output` (written), `input` (`[tokens, heads, 2 half]`), `positions` (u32 `[tokens]`), `frequencies` (f32
/// `[half]`, radians per position), `cosine_factor`, `sine_factor` (f32: factors on cosine and sine), `tokens`, `heads`,
/// `half` (u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Rope {
    /// Type of input and output.
    pub element: Element,
    /// Half the head size is a multiple of 8.
    pub vector: bool,
}

impl Rope {
    /// The kernel for heads of so many pairs.
    pub fn new(element: Element, half: u32) -> Self {
        Self { element, vector: half.is_multiple_of(VECTOR) }
    }

    /// Blocks for so many tokens; `None` when one launch cannot cover them.
    pub fn grid(&self, tokens: u32, heads: u32, half: u32) -> Option<[u32; 3]> {
        let of_token = u64::from(half / self.pairs()) * u64::from(heads.div_ceil(HEADS));
        let threads = u64::from(tokens).checked_mul(of_token)?;
        // Indices of threads and of rows are 32 bits wide.
        tokens.checked_mul(heads)?;
        (threads <= u64::from(u32::MAX - THREADS)).then(|| super::one_thread_per_element(threads, THREADS)).flatten()
    }

    /// Pairs that a thread takes at a time.
    fn pairs(&self) -> u32 {
        if self.vector { VECTOR } else { 1 }
    }
}

impl KernelSource for Rope {
    fn build(&self) -> Kernel {
        let Self { element, vector } = *self;
        let pairs = self.pairs();
        let bytes = element.bytes() as u64;
        let description = Description {
            name: format!("rope_{element}{}", if vector { "" } else { "_scalar" }),
            summary: format!(
                "rotates pairs of every head by position * frequency; {pairs} pairs of a token per thread"
            ),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["tokens", "heads", "head_size"],
            work: move |sizes: &[u64]| {
                let elements = sizes[0] * sizes[1] * sizes[2];
                Work { bytes: 2 * bytes * elements, operations: 3 * elements }
            },
        };
        Assembler::assemble(description, |k| {
            let (output, input) = (k.write("output", element), k.read("input", element));
            let (positions, frequencies) = (k.read("positions", Element::U32), k.read("frequencies", Element::F32));
            let (cosine_factor, sine_factor) = (k.f32("cosine_factor"), k.f32("sine_factor"));
            let (tokens, heads, half) = (k.u32("tokens"), k.u32("heads"), k.u32("half"));
            let index = k.global_thread(THREADS).named("index");
            let groups = if vector { half >> VECTOR.ilog2() } else { half };
            // Threads of a token: for each group of pairs, one for every `HEADS` heads.
            let parts = ((heads + (HEADS - 1)) >> HEADS.ilog2()).named("parts");
            let of_token = groups * parts;
            let token = index.div(of_token).named("token");
            k.return_if(token.ge(tokens));
            let within = index - token * of_token;
            let part = within.div(groups);
            let pair = ((within - part * groups) * pairs).named("pair");

            k.comment("the heads of this thread set out");
            let width = half + half;
            let words = pairs as usize * element.bytes() / 4;
            // Single elements are held as f32.
            let held_as = if vector { element } else { Element::F32 };
            let held: Vec<_> = (0..HEADS)
                .map(|index| {
                    let head = part + parts * index;
                    let (exists, row) = (head.lt(heads), token.mad(heads, head));
                    let source = input.from_row(row, width);
                    let halves = [pair, pair + half].map(|first| {
                        let place = source.at(first);
                        if vector { place.load_words_if(exists, words) } else { vec![place.load_if(exists, 0.0).bits()] }
                    });
                    (exists, output.from_row(row, width), halves)
                })
                .collect();

            k.comment("cosine and sine of every pair");
            let position = positions.at(token).load_u32().to_f32();
            let turns: Vec<_> = load_part(frequencies.at(pair), vector)
                .into_iter()
                .map(|frequency| {
                    let (cosine, sine) = cosine_sine(position * frequency);
                    (cosine * cosine_factor, sine * sine_factor)
                })
                .collect();

            k.comment("the heads turn");
            for (exists, target, halves) in held {
                let [a, b] = halves.map(|words| unpack(held_as, &words));
                let (a, b): (Vec<_>, Vec<_>) = turns
                    .iter()
                    .zip(a.into_iter().zip(b))
                    .map(|((cosine, sine), (a, b))| (a.fma(*cosine, -(b * *sine)), b.fma(*cosine, a * *sine)))
                    .unzip();
                k.if_(exists, || {
                    store_part(target.at(pair), &a);
                    store_part(target.at(pair + half), &b);
                });
            }
        })
    }

    fn configurations() -> Vec<Self> {
        super::float_elements(|element| [true, false].map(|vector| Self { element, vector })).concat()
    }
}

/// Cosine and sine of an angle of at most 2²⁰ radians.
pub(super) fn cosine_sine<'a>(angle: Value<'a, F32>) -> (Value<'a, F32>, Value<'a, F32>) {
    /// Adding it leaves the nearest whole number in the lowest bits.
    const WHOLE: f32 = 12_582_912.0;
    /// π/2, and what its nearest f32 lacks.
    const QUARTER: f32 = std::f32::consts::FRAC_PI_2;
    const REST: f32 = -4.371_139e-8;
    let shifted = angle.fma(std::f32::consts::FRAC_2_PI, WHOLE);
    let quarters = shifted.bits();
    let whole = shifted - WHOLE;
    let rest = (-whole).fma(REST, (-whole).fma(QUARTER, angle));
    let square = rest * rest;
    let sine = square.fma(-1.951_529_6e-4, 8.332_161e-3).fma(square, -1.666_665_5e-1);
    let sine = (sine * square).fma(rest, rest);
    let cosine = square.fma(2.443_315_7e-5, -1.388_731_6e-3).fma(square, 4.166_664_6e-2);
    let cosine = (cosine * square).fma(square, square.fma(-0.5, 1.0));
    // The quarter turns exchange the two and turn their signs.
    let odd = (quarters & 1).ne(0);
    let sine_sign = (quarters & 2) << 30;
    let cosine_sign = ((quarters + 1) & 2) << 30;
    let (quarter_cosine, quarter_sine): (Value<'a, F32>, Value<'a, F32>) =
        (odd.select(sine, cosine), odd.select(cosine, sine));
    ((quarter_cosine.bits() ^ cosine_sign).as_f32(), (quarter_sine.bits() ^ sine_sign).as_f32())
}
