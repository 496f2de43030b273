//! What the tests of the program share: a tiny model folder, documents, and ways to run the program.

#![allow(dead_code)] // Each test program uses its own part.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use model::Model;
use model::checkpoint::SaveOptions;
use model::config::ModelConfig;
use runtime::Device;
use serde_json::{Value, json};

/// One token per byte, and the two special ones.
pub const VOCABULARY: usize = 258;

/// A chat template in which an answer can be told from its prompt.
pub const TEMPLATE: &str = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}\
                            {% if add_generation_prompt %}assistant: {% endif %}";

/// The program.
pub fn grafter() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_grafter"));
    command.stdin(Stdio::null());
    command
}

/// Runs the program with these arguments.
pub fn run(arguments: &[&str]) -> Output {
    grafter().args(arguments).output().unwrap()
}

/// Runs the program, which must succeed, and returns its standard output.
pub fn succeed(arguments: &[&str]) -> String {
    let output = run(arguments);
    assert!(output.status.success(), "{arguments:?} failed: {}", stderr(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// Runs the program, which must fail with exit code 1 and nothing on standard output, and returns what it says.
pub fn fail(arguments: &[&str]) -> String {
    let output = run(arguments);
    let stderr = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {stderr}");
    assert!(output.stdout.is_empty(), "{arguments:?} wrote {:?}", String::from_utf8_lossy(&output.stdout));
    assert!(!stderr.contains("panicked"), "{stderr}");
    stderr
}

/// What the program wrote on standard error.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A path as text.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The configuration of a model with 4 layers and `vocabulary` tokens.
pub fn config_json(vocabulary: usize) -> Value {
    let mut config = json!({
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "torch_dtype": "bfloat16",
        "hidden_size": 32, "head_dim": 16, "intermediate_size": 48, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": 4, "vocab_size": vocabulary, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 256, "tie_word_embeddings": true,
        "initializer_range": 0.2,
    });
    if vocabulary >= VOCABULARY {
        config["bos_token_id"] = json!(256);
        config["eos_token_id"] = json!(257);
    }
    config
}

/// Writes a model with random weights.
pub fn write_model(folder: &Path, vocabulary: usize, seed: u64) {
    let config = ModelConfig::from_json(config_json(vocabulary).as_object().unwrap()).unwrap();
    Model::random(config, seed, &Device::cpu()).unwrap().save(folder, &SaveOptions::default()).unwrap();
    write_tokenizer(folder);
}

/// Writes a byte-level tokenizer with a chat template into a folder.
pub fn write_tokenizer(folder: &Path) {
    let mut vocabulary: BTreeMap<String, usize> = byte_alphabet().into_iter().map(String::from).zip(0..).collect();
    vocabulary.insert("<s>".to_owned(), 256);
    vocabulary.insert("</s>".to_owned(), 257);
    let special = |id: usize, content: &str| {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        })
    };
    let byte_level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(256, "<s>"), special(257, "</s>")],
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocabulary, "merges": [],
        },
    });
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let config = json!({ "bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE });
    fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
}

/// GPT-2's alphabet: a printable character for each byte.
fn byte_alphabet() -> Vec<char> {
    let printable = |byte: &u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut next = 256;
    (0..256)
        .map(|byte| {
            let code = if printable(&byte) {
                byte
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(code).unwrap()
        })
        .collect()
}

/// Writes `count` short documents.
pub fn write_documents(path: &Path, count: usize) {
    let words = ["one", "two", "three", "four", "five", "six", "seven"];
    let lines: Vec<String> = (0..count)
        .map(|index| {
            let text: Vec<&str> =
                (0..2 + index % 4).map(|word| words[(index * 3 + word * word) % words.len()]).collect();
            json!({ "id": index, "text": text.join(" ") }).to_string()
        })
        .collect();
    fs::write(path, lines.join("\n") + "\n").unwrap();
}

/// A folder with a teacher, training and validation documents.
pub struct Workshop {
    folder: tempfile::TempDir,
}

impl Workshop {
    /// Makes one.
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        write_model(&folder.path().join("teacher"), VOCABULARY, 1);
        write_documents(&folder.path().join("train.jsonl"), 90);
        write_documents(&folder.path().join("validation.jsonl"), 12);
        Self { folder }
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Arguments of a distillation in the folder `run`, to which `more` are added.
    pub fn distill(&self, run: &str, more: &[&str]) -> Vec<String> {
        let mut arguments: Vec<String> =
            ["distill", "--layers", "1,3", "--sequence-length", "32", "--learning-rate", "1e-3"]
                .map(String::from)
                .to_vec();
        for (flag, name) in
            [("--teacher", "teacher"), ("--train", "train.jsonl"), ("--validation", "validation.jsonl"), ("--run", run)]
        {
            arguments.extend([flag.to_owned(), text(&self.path(name)).to_owned()]);
        }
        arguments.extend(more.iter().map(|argument| (*argument).to_owned()));
        arguments
    }
}

/// Arguments as `run` and its like take them.
pub fn borrowed(arguments: &[String]) -> Vec<&str> {
    arguments.iter().map(String::as_str).collect()
}

/// Every file below a folder with its bytes, by relative name.
pub fn files_below(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(current) = folders.pop() {
        let Ok(entries) = fs::read_dir(&current) else { continue };
        for entry in entries {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(folder).unwrap().to_str().unwrap().to_owned();
                files.insert(name, fs::read(&path).unwrap());
            }
        }
    }
    files
}

/// The name of a run's event file.
pub const EVENTS: &str = "events.out.tfevents.0.grafter";

/// That a run's event file says what its loss log says: every scalar of every line, and nothing else.
pub fn check_events(run: &Path) {
    let bits = |value: &Value| (value.as_f64().unwrap() as f32).to_bits();
    let mut expected = Vec::new();
    for line in fs::read_to_string(run.join("metrics.jsonl")).unwrap().lines() {
        let record: Value = serde_json::from_str(line).unwrap();
        let step = record["step"].as_u64().unwrap();
        for (key, value) in record.as_object().unwrap() {
            let tag = match key.as_str() {
                "loss" | "divergence" | "cross_entropy" | "gradient_norm" | "learning_rate" => format!("train/{key}"),
                other => match other.strip_prefix("validation_") {
                    Some(what) if what != "tokens" => format!("validation/{what}"),
                    _ => continue,
                },
            };
            expected.push((step, tag, bits(value)));
        }
    }
    let mut found = events(&fs::read(run.join(EVENTS)).unwrap());
    let speeds = found.iter().filter(|(_, tag, _)| tag == "train/tokens_per_second").count();
    found.retain(|(_, tag, _)| tag != "train/tokens_per_second");
    assert!(found == expected, "{}: {} scalars instead of {}", run.display(), found.len(), expected.len());
    assert_eq!(speeds, expected.iter().filter(|(_, tag, _)| tag == "train/loss").count());
}

/// The scalars of an event file: step, tag, and the value's bits. Checksums are left to TensorBoard's own reader, which
/// `.ci/tensorboard` runs.
fn events(mut file: &[u8]) -> Vec<(u64, String, u32)> {
    let mut found = Vec::new();
    while !file.is_empty() {
        let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let event = fields(&file[12..12 + length]);
        file = &file[16 + length..];
        let step = event.iter().find(|(field, _)| *field == 2).map(|(_, value)| varint(&mut &value[..]));
        for (_, summary) in event.iter().filter(|(field, _)| *field == 5) {
            for (_, value) in fields(summary) {
                let value = fields(&value);
                let tag = String::from_utf8(value[0].1.clone()).unwrap();
                found.push((step.unwrap(), tag, u32::from_le_bytes(value[1].1[..].try_into().unwrap())));
            }
        }
    }
    found
}

/// Number and bytes of every field of a protocol buffer.
fn fields(mut message: &[u8]) -> Vec<(u64, Vec<u8>)> {
    let mut found = Vec::new();
    while !message.is_empty() {
        let key = varint(&mut message);
        let start = message;
        let length = match key & 7 {
            0 => {
                varint(&mut message);
                start.len() - message.len()
            }
            1 => 8,
            2 => varint(&mut message) as usize,
            5 => 4,
            other => panic!("wire type {other}"),
        };
        let from = if key & 7 == 0 { start } else { message };
        found.push((key >> 3, from[..length].to_vec()));
        message = &from[length..];
    }
    found
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first().unwrap();
        *bytes = rest;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            break;
        }
    }
    value
}
