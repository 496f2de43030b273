//! The demo's small world: arithmetic with four operands, worked out step by step.
//!
//! A problem reads `7+5*3+8`: three operators, exactly one of them a product, which comes first; then from left to
//! right. Its solution `5*3=15;7+15=22;22+8=30 A:30` writes every intermediate result down. Addends are 1 to 9, factors
//! 2 to 9, and every result lies between 0 and 99. One problem in sixteen, chosen by a hash of its text, is never used
//! for training.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A problem with its worked solution.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// What is asked, as in `7+5*3+8`.
    pub question: String,
    /// The steps and the answer, as in `5*3=15;7+15=22;22+8=30 A:30`.
    pub solution: String,
    /// The answer.
    pub answer: u32,
}

/// Which problems to draw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Those that a model may be trained on.
    Train,
    /// Those that no model has seen.
    Unseen,
}

/// Problems without end; the same seed gives the same ones.
#[derive(Debug)]
pub struct Problems {
    random: ChaCha8Rng,
    split: Split,
}

impl Problems {
    /// Problems of one split.
    pub fn new(split: Split, seed: u64) -> Self {
        Self { random: ChaCha8Rng::seed_from_u64(seed), split }
    }

    /// A problem, unless one of its results falls outside 0 to 99.
    fn draw(&mut self) -> Option<Problem> {
        let product = self.below(3) as usize;
        let mut operators = [0; 3].map(|_| if self.below(2) == 0 { '+' } else { '-' });
        operators[product] = '*';
        let mut operands = [0; 4].map(|_| 1 + self.below(9));
        operands[product] = 2 + self.below(8);
        operands[product + 1] = 2 + self.below(8);
        let mut question = operands[0].to_string();
        for (operator, operand) in operators.iter().zip(&operands[1..]) {
            question.push(*operator);
            question.push_str(&operand.to_string());
        }
        let (mut operators, mut operands) = (operators.to_vec(), operands.to_vec());
        let mut steps = Vec::new();
        while !operators.is_empty() {
            let next = operators.iter().position(|operator| *operator == '*').unwrap_or(0);
            let (left, operator, right) = (operands[next], operators.remove(next), operands.remove(next + 1));
            let result = match operator {
                '*' => left * right,
                '+' => left + right,
                _ => left.checked_sub(right)?,
            };
            if result > 99 {
                return None;
            }
            steps.push(format!("{left}{operator}{right}={result}"));
            operands[next] = result;
        }
        let answer = operands[0];
        Some(Problem { question, solution: format!("{} A:{answer}", steps.join(";")), answer })
    }

    /// Uniform below `limit` (above 0).
    fn below(&mut self, limit: u32) -> u32 {
        ((u64::from(self.random.next_u32()) * u64::from(limit)) >> 32) as u32
    }
}

impl Iterator for Problems {
    type Item = Problem;

    fn next(&mut self) -> Option<Problem> {
        loop {
            let problem = self.draw();
            if let Some(problem) = problem.filter(|problem| split_of(&problem.question) == self.split) {
                return Some(problem);
            }
        }
    }
}

/// The answer that a solution ends in: the number after its last `A:`.
pub fn answer_of(solution: &str) -> Option<u32> {
    solution.rsplit_once("A:")?.1.parse().ok()
}

/// One question in sixteen, by the FNV-1a hash of its text, is unseen.
pub(super) fn split_of(question: &str) -> Split {
    let hash = question.bytes().fold(0x811c_9dc5u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    if hash.is_multiple_of(16) { Split::Unseen } else { Split::Train }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// A product binds tighter, the rest goes from left to right: how the questions are meant.
    fn evaluate(expression: &str) -> i64 {
        let product = |term: &str| -> i64 { term.split('*').map(|factor| factor.parse::<i64>().unwrap()).product() };
        expression
            .split('+')
            .map(|sum| {
                let mut terms = sum.split('-').map(product);
                terms.next().unwrap() - terms.sum::<i64>()
            })
            .sum()
    }

    #[test]
    fn every_solution_is_right_and_every_step_follows() {
        for problem in Problems::new(Split::Train, 1).take(3000) {
            assert_eq!(evaluate(&problem.question), i64::from(problem.answer), "{problem:?}");
            assert_eq!(answer_of(&problem.solution), Some(problem.answer));
            let (steps, _) = problem.solution.rsplit_once(" A:").unwrap();
            assert_eq!(steps.split(';').count(), 3);
            for step in steps.split(';') {
                let (left, right) = step.split_once('=').unwrap();
                assert_eq!(evaluate(left), right.parse::<i64>().unwrap(), "{problem:?}");
            }
        }
    }

    #[test]
    fn the_splits_do_not_meet_and_seeds_repeat() {
        let questions = |split, seed| -> HashSet<String> {
            Problems::new(split, seed).take(3000).map(|problem| problem.question).collect()
        };
        assert!(questions(Split::Train, 1).is_disjoint(&questions(Split::Unseen, 1)));
        assert_eq!(questions(Split::Unseen, 2), questions(Split::Unseen, 2));
        assert_ne!(questions(Split::Train, 2), questions(Split::Train, 3));
    }

    #[test]
    fn an_answer_is_what_follows_the_last_mark() {
        assert_eq!(answer_of("1+2=3 A:3"), Some(3));
        assert_eq!(answer_of("1+2=3 A:"), None);
        assert_eq!(answer_of("12"), None);
    }
}
