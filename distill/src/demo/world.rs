//! The demo's files: a tokenizer with one token per character, the teacher's configuration, the problems as chats, and the
//! run files that train the teacher and distil it.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};

use super::task::{Problem, Problems, Split};
use crate::files::{self, Writer};

/// Characters of a world's problems, in the order of their token ids after the special tokens.
#[derive(Clone, Copy, Debug)]
pub(super) struct Characters(pub &'static str);

impl Characters {
    /// Tokens in all.
    pub fn vocabulary(self) -> usize {
        SPECIAL.len() + self.0.chars().count()
    }
}

const CHARACTERS: Characters = Characters("0123456789+-*=;?:QRA ");
/// Tokens that are no character, in the order of their ids.
const SPECIAL: [&str; 4] = ["<pad>", "<bos>", "<eos>", "<unk>"];
/// A problem, as the model reads it: begin token, question, solution, end token.
const CHAT_TEMPLATE: &str = "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}\
                             Q:{{ message.content }}? R:{% else %}{{ message.content }}{{ eos_token }}{% endif %}\
                             {% endfor %}";
/// The teacher's weights: trained by `grafter train` with the run file that [`write`] makes.
const TEACHER_WEIGHTS: &[u8] = include_bytes!("../../assets/demo-teacher/model.safetensors");

/// Problems that the teacher was trained on, and seeds that draw them.
const TRAIN_PROBLEMS: usize = 60_000;
const TRAIN_SEED: u64 = 1;
const VALIDATION_PROBLEMS: usize = 256;
const VALIDATION_SEED: u64 = 2;

/// Where everything lies.
#[derive(Clone, Debug)]
pub struct World {
    /// The teacher: a Hugging Face folder.
    pub teacher: PathBuf,
    /// Problems to train on, one chat a line.
    pub train: PathBuf,
    /// Unseen problems, to look at while training.
    pub validation: PathBuf,
    /// A run file that replaces two layers at once.
    pub distill_run: PathBuf,
    /// A run file that ranks and replaces in two stages: what the demo does to the teacher.
    pub staged_run: PathBuf,
}

/// What becomes of a file that is there already and has other contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// It is written anew.
    Replace,
    /// It may be somebody's work: an error.
    Refuse,
}

impl Existing {
    /// Writes a file.
    pub(super) fn write(self, path: &Path, write: impl FnOnce(&mut Writer) -> Result<()>) -> Result<()> {
        match self {
            Self::Replace => files::write_file(path, write),
            Self::Refuse => files::write_same_file(path, write),
        }
    }
}

/// Writes the demo's world into `folder`, which is new, empty, or such a world already: `teacher/`, `train.jsonl`,
/// `validation.jsonl`, `teacher.toml` (how the teacher was trained), `distill.toml` (a hybrid of it) and `staged.toml` (the
/// same in stages, which is what the demo does).
///
/// # Errors
/// A folder with other things in it; files that cannot be written, or, with [`Existing::Refuse`], that have other contents.
pub fn write(folder: &Path, existing: Existing) -> Result<World> {
    files::create_folder(folder)?;
    let mut entries = folder.read_dir().with_context(|| format!("reading the folder {}", folder.display()))?;
    let mark = folder.join("teacher.toml");
    if entries.next().is_some() && !mark.exists() {
        bail!("{} has other things in it: name a new or empty folder", folder.display());
    }
    let world = World {
        teacher: folder.join("teacher"),
        train: folder.join("train.jsonl"),
        validation: folder.join("validation.jsonl"),
        distill_run: folder.join("distill.toml"),
        staged_run: folder.join("staged.toml"),
    };
    // First of all the mark, so that a folder that was begun is known again; and what people edit, before anything large.
    for (path, text) in [(&mark, TEACHER_RUN), (&world.distill_run, DISTILL_RUN), (&world.staged_run, STAGED_RUN)] {
        run_file(path, text, folder, existing)?;
    }
    write_model(&world.teacher, &config(), CHARACTERS, existing)?;
    existing.write(&world.teacher.join("model.safetensors"), |writer| Ok(writer.write_all(TEACHER_WEIGHTS)?))?;
    problems(&world.train, Split::Train, TRAIN_SEED, TRAIN_PROBLEMS, existing)?;
    problems(&world.validation, Split::Unseen, VALIDATION_SEED, VALIDATION_PROBLEMS, existing)?;
    Ok(world)
}

/// Writes the folder of a model without its weights: configuration, and a tokenizer with a token per character.
pub(super) fn write_model(folder: &Path, config: &Value, characters: Characters, existing: Existing) -> Result<()> {
    files::create_folder(folder)?;
    for (name, value) in [
        ("config.json", config),
        ("generation_config.json", &json!({ "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0 })),
        ("tokenizer.json", &tokenizer(characters)),
        ("tokenizer_config.json", &tokenizer_config()),
    ] {
        let text = serde_json::to_string_pretty(value)?;
        existing.write(&folder.join(name), |writer| Ok(writeln!(writer, "{text}")?))?;
    }
    Ok(())
}

/// Writes a run file, which speaks of `world/`, with the real folder in its place.
fn run_file(path: &Path, text: &str, folder: &Path, existing: Existing) -> Result<()> {
    let text = text
        .replace("world/", &format!("{}/", folder.display()))
        .replace("--export world", &format!("--export {}", folder.display()));
    existing.write(path, |writer| Ok(writer.write_all(text.as_bytes())?))
}

/// How the teacher was trained; paths are relative to where the command is given.
const TEACHER_RUN: &str = include_str!("teacher.toml");

/// A hybrid of it.
const DISTILL_RUN: &str = include_str!("distill.toml");

/// What the demo does.
const STAGED_RUN: &str = include_str!("staged.toml");

fn problems(path: &Path, split: Split, seed: u64, count: usize, existing: Existing) -> Result<()> {
    existing.write(path, |writer| {
        for problem in Problems::new(split, seed).take(count) {
            writeln!(writer, "{}", chat(&problem))?;
        }
        Ok(())
    })
}

/// A problem with its solution as a line of data.
pub(super) fn chat(problem: &Problem) -> Value {
    json!({ "messages": [
        { "role": "user", "content": problem.question },
        { "role": "assistant", "content": problem.solution },
    ]})
}

fn config() -> Value {
    json!({
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": CHARACTERS.vocabulary(),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "sliding_window": null,
        "tie_word_embeddings": false,
        "initializer_range": 0.02,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    })
}

fn tokenizer(characters: Characters) -> Value {
    let names = SPECIAL.iter().map(|name| (*name).to_owned()).chain(characters.0.chars().map(String::from));
    let vocabulary: Map<String, Value> = names.enumerate().map(|(id, name)| (name, json!(id))).collect();
    let added: Vec<Value> = SPECIAL
        .iter()
        .enumerate()
        .map(|(id, name)| {
            json!({
                "id": id, "content": name, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true,
            })
        })
        .collect();
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": { "type": "Split", "pattern": { "Regex": "." }, "behavior": "Isolated", "invert": false },
        "post_processor": null,
        "decoder": { "type": "Fuse" },
        "model": { "type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>" },
    })
}

fn tokenizer_config() -> Value {
    json!({
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "chat_template": CHAT_TEMPLATE,
        "model_input_names": ["input_ids", "attention_mask"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_folder_with_other_things_in_it_is_refused_and_one_that_was_begun_is_finished() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("world");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("train.jsonl"), "somebody else's").unwrap();
        let message = write(&path, Existing::Replace).unwrap_err().to_string();
        assert!(message.contains("world has other things in it: name a new or empty folder"), "{message}");
        assert_eq!(fs::read_dir(&path).unwrap().count(), 1);
        assert_eq!(fs::read(path.join("train.jsonl")).unwrap(), b"somebody else's");

        fs::remove_file(path.join("train.jsonl")).unwrap();
        let world = write(&path, Existing::Refuse).unwrap();
        assert!(path.join("teacher.toml").exists() && world.distill_run.exists());
        let documents = fs::read(&world.train).unwrap();
        // An export that was killed on its way.
        fs::remove_file(&world.distill_run).unwrap();
        fs::remove_file(&world.train).unwrap();
        write(&path, Existing::Refuse).unwrap();
        assert!(world.distill_run.exists() && fs::read(&world.train).unwrap() == documents);

        fs::write(&world.train, "somebody's own").unwrap();
        let message = write(&path, Existing::Refuse).unwrap_err().to_string();
        let expected = "train.jsonl is there and has other contents than what would be written: keep it and name another folder, \
                        or remove it";
        assert!(message.ends_with(expected), "{message}");
        assert_eq!(fs::read(&world.train).unwrap(), b"somebody's own");
        write(&path, Existing::Replace).unwrap();
        assert_eq!(fs::read(&world.train).unwrap(), documents);
        assert_eq!(fs::read_dir(&path).unwrap().count(), 6, "leftovers");
    }
}
