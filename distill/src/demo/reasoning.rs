//! A larger world than the demo's: arithmetic and algebra of five difficulties, with every step written out.
//!
//! | level | question | solution |
//! |---|---|---|
//! | 1 four operands | `7+5*3+8` | `5*3=15;7+15=22;22+8=30 A:30` |
//! | 2 parentheses | `(7+5)*(9-3)` | `7+5=12;9-3=6;12*6=72 A:72` |
//! | 3 long product | `47*86` | `47*80=3760;47*6=282;3760+282=4042 A:4042` |
//! | 4 equation | `7x+15=64` | `64-15=49;49/7=7 A:7` |
//! | 5 two equations | `x+y=31,x-y=5` | `31+5=36;36/2=18;31-18=13;18*13=234 A:234` (asked for is `xy`) |
//!
//! One problem in sixteen, by the hash of its question, is never used for training.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use super::task::{Problem, Problems, Split, split_of};
use super::world::{self, Characters, Existing};
use crate::files;

/// Names of the levels, the easiest first.
pub const LEVELS: [&str; 5] = ["1 four operands", "2 parentheses", "3 long product", "4 equation", "5 two equations"];
/// Characters of the problems.
const CHARACTERS: Characters = Characters("0123456789+-*/=;?:QRA(),xy ");
const TRAIN_SEED: u64 = 11;
const VALIDATION_SEED: u64 = 12;
const EXAM_SEED: u64 = 13;
const VALIDATION_PROBLEMS: usize = 1000;
/// Problems of the exam, of each level.
const EXAM_PROBLEMS: usize = 100;

/// Where everything lies.
#[derive(Clone, Debug)]
pub struct World {
    /// Configuration and tokenizer of the teacher, which is to be trained.
    pub teacher: PathBuf,
    /// Problems of all levels to train on, one chat a line.
    pub train: PathBuf,
    /// Unseen problems, to look at while training.
    pub validation: PathBuf,
    /// Unseen problems for `grafter eval --task generation`, with their levels as tasks.
    pub exam: PathBuf,
}

/// Writes the world into `folder`, which is new, empty, or such a world already, with so many problems to train on.
///
/// # Errors
/// A folder with other things in it; files that cannot be written, or are there and have other contents.
pub fn write(folder: &Path, problems: usize) -> Result<World> {
    files::create_folder(folder)?;
    let world = World {
        teacher: folder.join("teacher"),
        train: folder.join("train.jsonl"),
        validation: folder.join("validation.jsonl"),
        exam: folder.join("exam.jsonl"),
    };
    if fs::read_dir(folder)?.next().is_some() && !world.teacher.exists() {
        bail!("{} has other things in it: name a new or empty folder", folder.display());
    }
    world::write_model(&world.teacher, &config(), CHARACTERS, Existing::Refuse)?;
    let chats = |path: &Path, split, seed, count| {
        files::write_same_file(path, |writer| {
            for (_, problem) in Mixed::new(split, seed).take(count) {
                writeln!(writer, "{}", world::chat(&problem))?;
            }
            Ok(())
        })
    };
    chats(&world.train, Split::Train, TRAIN_SEED, problems)?;
    chats(&world.validation, Split::Unseen, VALIDATION_SEED, VALIDATION_PROBLEMS)?;
    files::write_same_file(&world.exam, |writer| {
        for (level, name) in LEVELS.iter().enumerate() {
            let mut asked: Vec<String> = Vec::new();
            for (_, problem) in Mixed::new(Split::Unseen, EXAM_SEED).filter(|(of, _)| *of == level) {
                if asked.contains(&problem.question) {
                    continue;
                }
                let id = format!("{}-{}", level + 1, asked.len() + 1);
                let line = json!({ "id": id, "task": name, "question": problem.question, "answer": problem.answer.to_string() });
                writeln!(writer, "{line}")?;
                asked.push(problem.question);
                if asked.len() == EXAM_PROBLEMS {
                    break;
                }
            }
        }
        Ok(())
    })?;
    Ok(world)
}

/// 12 layers, 8.2 M parameters.
fn config() -> Value {
    json!({
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": CHARACTERS.vocabulary(),
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 16384,
        "sliding_window": null,
        "tie_word_embeddings": false,
        "initializer_range": 0.02,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    })
}

/// Problems of all levels without end, each with its level, from 0.
struct Mixed {
    random: ChaCha8Rng,
    split: Split,
    easiest: Problems,
}

impl Mixed {
    fn new(split: Split, seed: u64) -> Self {
        Self { random: ChaCha8Rng::seed_from_u64(seed), split, easiest: Problems::new(split, seed) }
    }

    /// A problem of a level above the first, unless a result is negative.
    fn draw(&mut self, level: usize) -> Option<Problem> {
        let (question, steps) = match level {
            1 => self.parentheses()?,
            2 => self.long_product(),
            3 => self.equation(),
            _ => self.two_equations(),
        };
        let answer = steps.last().map_or(0, |step| step.1);
        let steps: Vec<String> = steps.into_iter().map(|(left, result)| format!("{left}={result}")).collect();
        Some(Problem { question, solution: format!("{} A:{answer}", steps.join(";")), answer })
    }

    fn parentheses(&mut self) -> Option<(String, Vec<(String, u32)>)> {
        let mut inner = || {
            let (left, right) = (self.between(1, 20), self.between(1, 20));
            let plus = self.between(0, 1) == 1;
            let result = if plus { Some(left + right) } else { left.checked_sub(right) };
            Some((format!("{left}{}{right}", if plus { '+' } else { '-' }), result?))
        };
        let (first, second) = (inner()?, inner()?);
        let product = first.1 * second.1;
        let last = (format!("{}*{}", first.1, second.1), product);
        Some((format!("({})*({})", first.0, second.0), vec![first, second, last]))
    }

    fn long_product(&mut self) -> (String, Vec<(String, u32)>) {
        let (left, tens, ones) = (self.between(11, 99), self.between(1, 9) * 10, self.between(1, 9));
        let (high, low) = (left * tens, left * ones);
        let steps = vec![
            (format!("{left}*{tens}"), high),
            (format!("{left}*{ones}"), low),
            (format!("{high}+{low}"), high + low),
        ];
        (format!("{left}*{}", tens + ones), steps)
    }

    fn equation(&mut self) -> (String, Vec<(String, u32)>) {
        let (factor, x, summand) = (self.between(2, 19), self.between(2, 49), self.between(1, 99));
        let total = factor * x + summand;
        let steps = vec![(format!("{total}-{summand}"), factor * x), (format!("{}/{factor}", factor * x), x)];
        (format!("{factor}x+{summand}={total}"), steps)
    }

    fn two_equations(&mut self) -> (String, Vec<(String, u32)>) {
        let y = self.between(2, 40);
        let x = y + self.between(1, 40);
        let (sum, difference) = (x + y, x - y);
        let steps = vec![
            (format!("{sum}+{difference}"), 2 * x),
            (format!("{}/2", 2 * x), x),
            (format!("{sum}-{x}"), y),
            (format!("{x}*{y}"), x * y),
        ];
        (format!("x+y={sum},x-y={difference}"), steps)
    }

    /// Uniform from `low` to `high`.
    fn between(&mut self, low: u32, high: u32) -> u32 {
        low + ((u64::from(self.random.next_u32()) * u64::from(high - low + 1)) >> 32) as u32
    }
}

impl Iterator for Mixed {
    type Item = (usize, Problem);

    fn next(&mut self) -> Option<Self::Item> {
        let level = self.between(0, LEVELS.len() as u32 - 1) as usize;
        if level == 0 {
            return self.easiest.next().map(|problem| (0, problem));
        }
        loop {
            let problem = self.draw(level);
            if let Some(problem) = problem.filter(|problem| split_of(&problem.question) == self.split) {
                return Some((level, problem));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// What a step's left side is.
    fn evaluate(left: &str) -> u32 {
        let place = left.find(|c: char| "+-*/".contains(c)).unwrap();
        let (a, b): (u32, u32) = (left[..place].parse().unwrap(), left[place + 1..].parse().unwrap());
        match &left[place..=place] {
            "+" => a + b,
            "-" => a - b,
            "*" => a * b,
            _ => {
                assert!(a.is_multiple_of(b));
                a / b
            }
        }
    }

    #[test]
    fn every_step_of_every_level_is_right_and_answers_fit_their_questions() {
        let mut seen = [0; LEVELS.len()];
        for (level, problem) in Mixed::new(Split::Train, 1).take(5000) {
            seen[level] += 1;
            let (steps, answer) = problem.solution.rsplit_once(" A:").unwrap();
            for step in steps.split(';') {
                let (left, right) = step.split_once('=').unwrap();
                assert_eq!(evaluate(left), right.parse::<u32>().unwrap(), "{problem:?}");
            }
            let answer: u32 = answer.parse().unwrap();
            assert_eq!(answer, problem.answer);
            let numbers: Vec<u32> = problem
                .question
                .split(|c: char| !c.is_ascii_digit())
                .filter_map(|number| number.parse().ok())
                .collect();
            match level {
                2 => assert_eq!(numbers[0] * numbers[1], answer),
                3 => assert_eq!(numbers[0] * answer + numbers[1], numbers[2]),
                4 => {
                    let x = (numbers[0] + numbers[1]) / 2;
                    assert_eq!(x * (numbers[0] - x), answer);
                }
                _ => {}
            }
            let spelled = format!("Q:{}? R:{}", problem.question, problem.solution);
            assert!(spelled.chars().all(|c| CHARACTERS.0.contains(c)), "{spelled}");
        }
        assert!(seen.iter().all(|&count| count > 800), "{seen:?}");
    }

    #[test]
    fn the_exam_asks_what_training_never_shows() {
        let folder = tempfile::tempdir().unwrap();
        let world = write(&folder.path().join("world"), 3000).unwrap();
        let lines = |path: &Path| -> Vec<Value> {
            fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
        };
        let trained: HashSet<String> = lines(&world.train)
            .iter()
            .map(|chat| chat["messages"][0]["content"].as_str().unwrap().to_owned())
            .collect();
        let exam = lines(&world.exam);
        assert_eq!(exam.len(), LEVELS.len() * EXAM_PROBLEMS);
        assert!(exam.iter().all(|question| !trained.contains(question["question"].as_str().unwrap())));
        assert!(world.teacher.join("tokenizer.json").exists());
        fs::write(folder.path().join("other"), "").unwrap();
        assert!(write(folder.path(), 10).unwrap_err().to_string().contains("has other things in it"));
    }
}
