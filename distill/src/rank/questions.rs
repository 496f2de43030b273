//! Questions from a jsonl file: `question`, `choices`, `answer` for multiple choice; `question` and `answer`, or a chat
//! whose last message is the answer, for what the model is to write.

use std::fs::File;
use std::io::{BufRead, BufReader};

use anyhow::{Context, Result, bail, ensure};
use model::chat::ChatTemplate;
use model::tokenizer::Tokenizer;
use serde::Deserialize;
use serde_json::{Value, json};

use super::RankConfig;

/// A question with written-out choices.
pub(super) struct MultipleChoice {
    /// File and line, for messages.
    pub place: String,
    /// Each choice behind the question.
    pub choices: Vec<Choice>,
    /// Which one is right.
    pub answer: usize,
}

/// A question followed by one of its choices.
pub(super) struct Choice {
    /// Both.
    pub tokens: Vec<u32>,
    /// How many of them are the question's.
    pub prompt: usize,
    /// Bytes of the choice.
    pub bytes: usize,
}

/// A question whose answer the model writes.
pub(super) struct ToAnswer {
    /// The question.
    pub prompt: Vec<u32>,
    right: Vec<String>,
}

impl ToAnswer {
    /// Whether what was written is the answer: word by word, whatever the white space; where the answer is a number, the
    /// last number written.
    pub fn is_right(&self, written: &str) -> bool {
        let plain = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase();
        self.right.iter().any(|right| {
            let numeric = number(right).is_some_and(|(start, end)| end - start == right.trim().len());
            match number(written).filter(|_| numeric) {
                Some((start, end)) => written[start..end].replace(',', "") == right.trim().replace(',', ""),
                None => plain(written) == plain(right),
            }
        })
    }
}

/// The last number in a text, sign and thousands' commas included, as a range of bytes.
fn number(text: &str) -> Option<(usize, usize)> {
    let bytes = text.as_bytes();
    let end = bytes.iter().rposition(u8::is_ascii_digit)? + 1;
    let belongs = |at: usize| {
        let byte = bytes[at];
        byte.is_ascii_digit() || (matches!(byte, b',' | b'.') && at > 0 && bytes[at - 1].is_ascii_digit())
    };
    let mut start = end;
    while start > 0 && belongs(start - 1) {
        start -= 1;
    }
    if start > 0 && bytes[start - 1] == b'-' {
        start -= 1;
    }
    Some((start, end))
}

#[derive(Deserialize)]
struct Line {
    question: Option<String>,
    choices: Option<Vec<String>>,
    answer: Option<Value>,
    #[serde(default)]
    aliases: Vec<String>,
    messages: Option<Vec<Value>>,
}

/// The first `samples` lines of the data, each with its place.
fn lines(config: &RankConfig) -> Result<Vec<(String, Line)>> {
    let path = &config.data;
    let file = File::open(path).with_context(|| format!("opening the questions {}", path.display()))?;
    let mut lines = Vec::new();
    for (index, line) in BufReader::new(file).lines().enumerate() {
        let place = format!("{} line {}", path.display(), index + 1);
        let line = line.with_context(|| place.clone())?;
        if line.trim().is_empty() {
            continue;
        }
        if lines.len() as u64 == config.samples {
            break;
        }
        let parsed: Line = serde_json::from_str(&line).with_context(|| format!("{place}: not a question"))?;
        lines.push((place, parsed));
    }
    ensure!(!lines.is_empty(), "{} has no questions", path.display());
    Ok(lines)
}

/// Multiple-choice questions.
///
/// # Errors
/// Lines that are none, named.
pub(super) fn multiple_choice(config: &RankConfig, tokenizer: &Tokenizer) -> Result<Vec<MultipleChoice>> {
    lines(config)?.into_iter().map(|(place, line)| choices(&place, line, tokenizer).with_context(|| place)).collect()
}

fn choices(place: &str, line: Line, tokenizer: &Tokenizer) -> Result<MultipleChoice> {
    let (Some(question), Some(choices), Some(answer)) = (line.question, line.choices, line.answer) else {
        bail!("a multiple-choice question has \"question\", \"choices\" and \"answer\"");
    };
    ensure!(choices.len() >= 2, "it has {} choices: at least 2 are needed", choices.len());
    let answer = match &answer {
        Value::Number(number) => number.as_u64().map(|number| number as usize),
        Value::String(text) => choices.iter().position(|choice| choice == text).or_else(|| letter(text)),
        _ => None,
    };
    let Some(answer) = answer.filter(|answer| *answer < choices.len()) else {
        bail!("its \"answer\" is none of its choices: give the right one's index from 0, its letter, or its text");
    };
    let prompt = format!("Question: {}\nAnswer:", question.trim());
    let question = tokenizer.encode(&prompt, false)?;
    let write = |choice: &String| -> Result<Choice> {
        let choice = choice.trim();
        let tokens = tokenizer.encode(&format!("{prompt} {choice}"), false)?;
        // The question's last token may have merged with what follows: what both have alike is the question.
        let alike = tokens.iter().zip(&question).take_while(|(a, b)| a == b).count();
        let prompt = alike.clamp(1, tokens.len().saturating_sub(1).max(1));
        ensure!(prompt < tokens.len(), "a choice is empty");
        Ok(Choice { prompt, tokens, bytes: choice.len() })
    };
    let choices = choices.iter().map(write).collect::<Result<_>>()?;
    Ok(MultipleChoice { place: place.to_owned(), choices, answer })
}

fn letter(text: &str) -> Option<usize> {
    match text.trim().as_bytes() {
        [letter @ b'A'..=b'Z'] => Some(usize::from(letter - b'A')),
        _ => None,
    }
}

/// Questions to be answered in words.
///
/// # Errors
/// Lines that are none, named; a chat without a chat template.
pub(super) fn to_answer(
    config: &RankConfig,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
) -> Result<Vec<ToAnswer>> {
    lines(config)?.into_iter().map(|(place, line)| answer(line, tokenizer, template).context(place)).collect()
}

fn answer(line: Line, tokenizer: &Tokenizer, template: Option<&ChatTemplate>) -> Result<ToAnswer> {
    let (messages, answer, plain) = match (line.messages, line.question, line.answer) {
        (Some(mut messages), ..) => {
            let last = messages.pop();
            let text =
                last.as_ref().filter(|last| last["role"] == "assistant").and_then(|last| last["content"].as_str());
            let Some(text) = text.map(str::to_owned) else { bail!("the chat's last message is not the assistant's") };
            ensure!(template.is_some(), "it is a chat, but the model folder has no chat template");
            (messages, text, String::new())
        }
        (None, Some(question), Some(answer)) => {
            let answer = match answer {
                Value::String(text) => text,
                other => other.to_string(),
            };
            let plain = format!("Question: {}\nAnswer:", question.trim());
            (vec![json!({ "role": "user", "content": question })], answer, plain)
        }
        _ => bail!("a question has \"question\" and \"answer\", or chat \"messages\""),
    };
    let text = match template {
        Some(template) => template.render(&messages, true)?,
        None => plain,
    };
    let prompt = tokenizer.encode(&text, false)?;
    ensure!(!prompt.is_empty(), "the question is empty");
    let right = std::iter::once(answer).chain(line.aliases).collect();
    Ok(ToAnswer { prompt, right })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_its_words_or_its_last_number() {
        let question = |right: &str| ToAnswer { prompt: Vec::new(), right: vec![right.to_owned()] };
        assert!(question("the Constitution").is_right(" The  constitution\n"));
        assert!(!question("the Constitution").is_right("the Constitution of 1787"));
        assert!(question("1,200").is_right("3 * 400 = 1200"));
        assert!(question("-7").is_right("so the answer is -7."));
        assert!(!question("7").is_right("so the answer is -7."));
        assert!(!question("7").is_right("no idea"));
        assert!(question("0.5").is_right("1/2 = 0.5"));
    }

    #[test]
    fn letters_name_choices() {
        assert_eq!((letter("A"), letter(" D "), letter("AB"), letter("")), (Some(0), Some(3), None, None));
    }
}
