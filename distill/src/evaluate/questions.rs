//! Questions from a jsonl file: `question`, `choices`, `answer` for multiple choice; `question` and `answer`, or a chat
//! whose last message is the answer, for what the model is to write.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use model::chat::ChatTemplate;
use model::tokenizer::Tokenizer;
use serde::Deserialize;
use serde_json::{Value, json};

use super::extract::is_right;

/// A question with written-out choices.
pub(crate) struct MultipleChoice {
    /// File and line, for messages.
    pub place: String,
    /// Its name in the data, if it has one.
    pub id: Option<String>,
    /// What it belongs to, if the data say.
    pub task: Option<String>,
    /// What stands before each choice.
    pub prompt: String,
    /// Each choice behind the question.
    pub choices: Vec<Choice>,
    /// Which one is right.
    pub answer: usize,
}

/// A question followed by one of its choices.
pub(crate) struct Choice {
    /// The choice alone.
    pub text: String,
    /// Both.
    pub tokens: Vec<u32>,
    /// How many of them are the question's.
    pub prompt: usize,
}

/// A question whose answer the model writes.
pub(crate) struct ToAnswer {
    /// Its name in the data, if it has one.
    pub id: Option<String>,
    /// What it belongs to, if the data say.
    pub task: Option<String>,
    /// The question, as the model reads it.
    pub text: String,
    /// The same as tokens.
    pub prompt: Vec<u32>,
    /// The answer, and others that are as good.
    pub right: Vec<String>,
}

impl ToAnswer {
    /// Whether what was written is the answer: word by word, whatever the white space; where the answer is a number, the
    /// last number written.
    pub fn is_right(&self, written: &str) -> bool {
        is_right(&self.right, written)
    }
}

#[derive(Deserialize)]
struct Line {
    id: Option<Value>,
    task: Option<String>,
    question: Option<String>,
    choices: Option<Vec<String>>,
    answer: Option<Value>,
    #[serde(default)]
    aliases: Vec<String>,
    messages: Option<Vec<Value>>,
}

impl Line {
    fn name(&self) -> Option<String> {
        self.id.as_ref().map(|id| id.as_str().map_or_else(|| id.to_string(), str::to_owned))
    }
}

/// The first `most` lines of the data, each with its place.
fn lines(path: &Path, most: u64) -> Result<Vec<(String, Line)>> {
    let file = File::open(path).with_context(|| format!("opening the questions {}", path.display()))?;
    let mut lines = Vec::new();
    for (index, line) in BufReader::new(file).lines().enumerate() {
        let place = format!("{} line {}", path.display(), index + 1);
        let line = line.with_context(|| place.clone())?;
        if line.trim().is_empty() {
            continue;
        }
        if lines.len() as u64 == most {
            break;
        }
        let parsed: Line = serde_json::from_str(&line).with_context(|| format!("{place}: not a question"))?;
        lines.push((place, parsed));
    }
    ensure!(!lines.is_empty(), "{} has no questions", path.display());
    Ok(lines)
}

/// How a question is put where nothing else is said.
pub(crate) const PROMPT: &str = "Question: {question}\nAnswer:";

fn put(form: &str, question: &str) -> String {
    form.replace("{question}", question.trim())
}

/// The first `most` multiple-choice questions, put in the form `form`, which has `{question}` in it.
///
/// # Errors
/// Lines that are none, named.
pub(crate) fn multiple_choice(
    path: &Path,
    most: u64,
    form: &str,
    tokenizer: &Tokenizer,
) -> Result<Vec<MultipleChoice>> {
    let read = |(place, line): (String, Line)| choices(&place, line, form, tokenizer).with_context(|| place);
    lines(path, most)?.into_iter().map(read).collect()
}

fn choices(place: &str, line: Line, form: &str, tokenizer: &Tokenizer) -> Result<MultipleChoice> {
    let id = line.name();
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
    let prompt = put(form, &question);
    let question = tokenizer.encode(&prompt, false)?;
    let write = |choice: &String| -> Result<Choice> {
        let choice = choice.trim();
        let tokens = tokenizer.encode(&format!("{prompt} {choice}"), false)?;
        // The question's last token may have merged with what follows: what both have alike is the question.
        let alike = tokens.iter().zip(&question).take_while(|(a, b)| a == b).count();
        let prompt = alike.clamp(1, tokens.len().saturating_sub(1).max(1));
        ensure!(!choice.is_empty() && prompt < tokens.len(), "a choice is empty");
        Ok(Choice { text: choice.to_owned(), prompt, tokens })
    };
    let choices = choices.iter().map(write).collect::<Result<_>>()?;
    Ok(MultipleChoice { place: place.to_owned(), id, task: line.task, prompt, choices, answer })
}

fn letter(text: &str) -> Option<usize> {
    match text.trim().as_bytes() {
        [letter @ b'A'..=b'Z'] => Some(usize::from(letter - b'A')),
        _ => None,
    }
}

/// The first `most` questions to be answered in words: as chats where there is a template, or else in the form `form`.
///
/// # Errors
/// Lines that are none, named; a chat without a chat template.
pub(crate) fn to_answer(
    path: &Path,
    most: u64,
    form: &str,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
) -> Result<Vec<ToAnswer>> {
    let read = |(place, line)| answer(line, form, tokenizer, template).context(place);
    lines(path, most)?.into_iter().map(read).collect()
}

fn answer(line: Line, form: &str, tokenizer: &Tokenizer, template: Option<&ChatTemplate>) -> Result<ToAnswer> {
    let (id, task) = (line.name(), line.task);
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
            let plain = put(form, &question);
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
    Ok(ToAnswer { id, task, text, prompt, right })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_name_choices() {
        assert_eq!((letter("A"), letter(" D "), letter("AB"), letter("")), (Some(0), Some(3), None, None));
    }
}
