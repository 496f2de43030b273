//! Logits of a teacher of whom only the likeliest tokens and the mass of the others are known.
//!
//! - `teacher[r, v] = ln p[r, i]` where `v` is `tokens[r, i]`; every other token gets its share of the tail as the student
//!   gives it: `ln tail[r] + x_v − ln Σ e^x`, the sum over the other tokens, with `x = student_factor · student`. A divergence of
//!   the student from such a row is that of the two distributions over the listed tokens and "another one", and so is its
//!   gradient: among the other tokens the ratio of the two is one number.
//! - Layout: one block per row. The row is copied, the listed tokens become −∞, the log-sum-exp of what is left is formed, and the
//!   row is written again; threads take 8 neighbouring logits at a time (`vector`: rows of a multiple of 8), or one.
//! - Traffic: each logit is read once and written once; the row is read and written once more while the cache holds it. Bound
//!   by memory.
//! - Source: the data-processing form of an f-divergence, as in Liese and Vajda 2006.

use super::cross_entropy::{OnlineLogSumExp, THREADS, for_each_part, suffix};
use super::{load_part, store_part};
use crate::asm::{Assembler, Description, LANES};
use crate::{Element, Kernel, KernelSource, Target, Work};

/// Parameters: `teacher` (`[rows, vocabulary]`, written), `student` (`[rows, vocabulary]`), `tokens` (u32 `[rows, count]`,
/// different ones of a row, each below `vocabulary`), `log_probabilities` (f32 `[rows, count]`), `tails` (f32 `[rows]`, logarithms),
/// `student_factor` (f32), `count`, `vocabulary` (u32). One block per row.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct TeacherLogits {
    /// Type of the logits.
    pub element: Element,
    /// The vocabulary is a multiple of 8.
    pub vector: bool,
}

impl KernelSource for TeacherLogits {
    fn build(&self) -> Kernel {
        let Self { element, vector } = *self;
        let bytes = element.bytes() as u64;
        let description = Description {
            name: format!("teacher_logits_{element}{}", suffix(vector)),
            summary: "a teacher's logits from its likeliest tokens and the mass of the others; one block per row".to_owned(),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["rows", "vocabulary", "count"],
            work: move |sizes: &[u64]| Work {
                bytes: (2 * bytes * sizes[1] + 8 * sizes[2] + 4) * sizes[0],
                operations: 6 * sizes[0] * sizes[1],
            },
        };
        Assembler::assemble(description, |k| {
            let teacher = k.write("teacher", element);
            let student = k.read("student", element);
            let tokens = k.read("tokens", Element::U32);
            let (log_probabilities, tails) = (k.read("log_probabilities", Element::F32), k.read("tails", Element::F32));
            let (student_factor, count, vocabulary) = (k.f32("student_factor"), k.u32("count"), k.u32("vocabulary"));
            let row = k.block().named("row");
            let [teacher, student] = [teacher, student].map(|logits| logits.from_row(row, vocabulary));
            let [tokens, log_probabilities] = [tokens, log_probabilities].map(|memory| memory.from_row(row, count));
            // What is not below the vocabulary would be written elsewhere.
            let for_each_token = |body: &dyn Fn(_, _)| {
                k.for_(k.thread(), count, THREADS, |index| {
                    let token = tokens.at(index).load_u32();
                    k.if_(token.lt(vocabulary), || body(index, token));
                });
                k.barrier();
            };

            k.comment("the student's logits without the listed tokens");
            for_each_part(k, vocabulary, vector, |column| {
                store_part(teacher.at(column), &load_part(student.at(column), vector));
            });
            k.barrier();
            for_each_token(&|_, token| teacher.at(token).store(f32::NEG_INFINITY));

            k.comment("the others' shares of the tail");
            let sum = OnlineLogSumExp::new(k);
            let load = |column| {
                load_part(teacher.at(column), vector).into_iter().map(|logit| logit * student_factor).collect::<Vec<_>>()
            };
            for_each_part(k, vocabulary, vector, |column| sum.take(&load(column)));
            let sum = sum.over_block(k, k.shared(Element::F32, THREADS / LANES));
            let tail = tails.at(row).load();
            for_each_part(k, vocabulary, vector, |column| {
                let shares: Vec<_> =
                    load(column).into_iter().map(|logit| sum.log_probability(logit) + tail).collect();
                store_part(teacher.at(column), &shares);
            });
            k.barrier();

            k.comment("the listed tokens");
            for_each_token(&|index, token| teacher.at(token).store(log_probabilities.at(index).load()));
        })
    }

    fn configurations() -> Vec<Self> {
        super::float_elements(|element| Self { element, vector: true })
    }
}
