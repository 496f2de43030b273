//! GGUF files made by hand.

use std::fs;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use model::chat::ChatTemplate;
use model::import::import;
use model::tokenizer::Tokenizer;
use model::{Model, Precision};
use runtime::Device;
use serde_json::json;

use crate::folders::*;

/// A value with its type number.
#[derive(Clone)]
enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    Integers(Vec<i32>),
    Floats(Vec<f32>),
}

/// Name, dimensions innermost first, type number, bytes.
type Tensor = (String, Vec<u64>, u32, Vec<u8>);

/// A file before it is written.
#[derive(Clone)]
struct Gguf {
    version: u32,
    keys: Vec<(String, Value)>,
    tensors: Vec<Tensor>,
    /// Added to each tensor's offset.
    shift: u64,
}

fn put_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

impl Gguf {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend((self.tensors.len() as u64).to_le_bytes());
        bytes.extend((self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            put_text(&mut bytes, key);
            let kind = |bytes: &mut Vec<u8>, kind: u32| bytes.extend(kind.to_le_bytes());
            match value {
                Value::U32(value) => {
                    kind(&mut bytes, 4);
                    bytes.extend(value.to_le_bytes());
                }
                Value::F32(value) => {
                    kind(&mut bytes, 6);
                    bytes.extend(value.to_le_bytes());
                }
                Value::Bool(value) => {
                    kind(&mut bytes, 7);
                    bytes.push(u8::from(*value));
                }
                Value::Text(text) => {
                    kind(&mut bytes, 8);
                    put_text(&mut bytes, text);
                }
                Value::Texts(texts) => {
                    kind(&mut bytes, 9);
                    kind(&mut bytes, 8);
                    bytes.extend((texts.len() as u64).to_le_bytes());
                    texts.iter().for_each(|text| put_text(&mut bytes, text));
                }
                Value::Integers(values) => {
                    kind(&mut bytes, 9);
                    kind(&mut bytes, 5);
                    bytes.extend((values.len() as u64).to_le_bytes());
                    values.iter().for_each(|value| bytes.extend(value.to_le_bytes()));
                }
                Value::Floats(values) => {
                    kind(&mut bytes, 9);
                    kind(&mut bytes, 6);
                    bytes.extend((values.len() as u64).to_le_bytes());
                    values.iter().for_each(|value| bytes.extend(value.to_le_bytes()));
                }
            }
        }
        let mut offset = 0u64;
        for (name, dimensions, kind, data) in &self.tensors {
            put_text(&mut bytes, name);
            bytes.extend((dimensions.len() as u32).to_le_bytes());
            dimensions.iter().for_each(|size| bytes.extend(size.to_le_bytes()));
            bytes.extend(kind.to_le_bytes());
            bytes.extend((offset + self.shift).to_le_bytes());
            offset += (data.len() as u64).next_multiple_of(32);
        }
        for (_, _, _, data) in &self.tensors {
            bytes.resize(bytes.len().next_multiple_of(32), 0);
            bytes.extend(data);
        }
        bytes
    }

    fn set(&mut self, key: &str, value: Value) {
        match self.keys.iter_mut().find(|(other, _)| other == key) {
            Some(entry) => entry.1 = value,
            None => self.keys.push((key.to_owned(), value)),
        }
    }

    fn remove(&mut self, key: &str) {
        self.keys.retain(|(other, _)| other != key);
    }

    fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|(other, ..)| other == name).unwrap()
    }
}

/// GPT-2's letters for bytes.
fn letters() -> Vec<char> {
    let printable =
        |byte: u32| (33..=126).contains(&byte) || (161..=172).contains(&byte) || (174..=255).contains(&byte);
    let mut next = 256;
    (0..256)
        .map(|byte| {
            let code = if printable(byte) {
                byte
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(code).unwrap()
        })
        .collect()
}

/// 3 special tokens, the 256 bytes, and a few merges.
fn vocabulary() -> (Vec<String>, Vec<i32>, Vec<String>) {
    let mut tokens: Vec<String> = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(str::to_owned).to_vec();
    tokens.extend(letters().iter().map(char::to_string));
    let merges = ["Ġ t", "h e", "Ġt he", "1 2"];
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    let types = (0..tokens.len()).map(|id| if id < 3 { 3 } else { 1 }).collect();
    (tokens, types, merges.map(str::to_owned).to_vec())
}

/// Values that bf16 holds exactly, different everywhere.
fn weight(seed: usize, count: usize) -> Vec<f32> {
    (0..count).map(|index| ((index * 37 + seed * 101) % 251) as f32 / 64.0 - 2.0).collect()
}

/// A Llama of one layer with 2 query heads and 1 key head of 4 dimensions.
fn small() -> Gguf {
    let (tokens, types, merges) = vocabulary();
    let (vocabulary, hidden, inner) = (tokens.len(), 32, 64);
    let f32s = |values: Vec<f32>| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    let mut tensors: Vec<Tensor> = vec![
        (
            "token_embd.weight".to_owned(),
            vec![hidden as u64, vocabulary as u64],
            30,
            weight(1, vocabulary * hidden).iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
        ),
        ("output_norm.weight".to_owned(), vec![hidden as u64], 0, f32s(weight(2, hidden))),
    ];
    for (seed, (name, rows, columns)) in [
        ("attn_q", 8, hidden),
        ("attn_k", 4, hidden),
        ("attn_v", 4, hidden),
        ("attn_output", hidden, 8),
        ("ffn_gate", inner, hidden),
        ("ffn_up", inner, hidden),
        ("ffn_down", hidden, inner),
    ]
    .into_iter()
    .enumerate()
    {
        let bytes =
            weight(seed + 3, rows * columns).iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect();
        tensors.push((format!("blk.0.{name}.weight"), vec![columns as u64, rows as u64], 1, bytes));
    }
    for name in ["attn_norm", "ffn_norm"] {
        tensors.push((format!("blk.0.{name}.weight"), vec![hidden as u64], 0, f32s(weight(20, hidden))));
    }
    let keys = [
        ("general.architecture", Value::Text("llama".to_owned())),
        ("llama.block_count", Value::U32(1)),
        ("llama.context_length", Value::U32(128)),
        ("llama.embedding_length", Value::U32(hidden as u32)),
        ("llama.feed_forward_length", Value::U32(inner as u32)),
        ("llama.attention.head_count", Value::U32(2)),
        ("llama.attention.head_count_kv", Value::U32(1)),
        ("llama.attention.key_length", Value::U32(4)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("llama.rope.freq_base", Value::F32(10_000.0)),
        ("tokenizer.ggml.model", Value::Text("gpt2".to_owned())),
        ("tokenizer.ggml.pre", Value::Text("smollm".to_owned())),
        ("tokenizer.ggml.tokens", Value::Texts(tokens)),
        ("tokenizer.ggml.token_type", Value::Integers(types)),
        ("tokenizer.ggml.merges", Value::Texts(merges)),
        ("tokenizer.ggml.bos_token_id", Value::U32(1)),
        ("tokenizer.ggml.eos_token_id", Value::U32(2)),
        ("tokenizer.ggml.add_bos_token", Value::Bool(false)),
        (
            "tokenizer.chat_template",
            Value::Text(
                "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}{% endfor %}\
                 {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
                    .to_owned(),
            ),
        ),
    ];
    let keys = keys.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    Gguf { version: 3, keys, tensors, shift: 0 }
}

fn write(folder: &Path, gguf: &Gguf) -> PathBuf {
    let path = folder.join("model.gguf");
    fs::write(&path, gguf.bytes()).unwrap();
    path
}

#[test]
fn a_small_file_becomes_a_model_with_its_tokenizer() {
    let scratch = tempfile::tempdir().unwrap();
    let output = scratch.path().join("output");
    let gguf = small();
    let summary = import(&write(scratch.path(), &gguf), &output, |_| {}).unwrap();
    assert_eq!((summary.tensors, summary.source), (11, "GGUF"));
    assert_eq!(
        summary.source_types.iter().map(|(name, n)| (name.as_str(), *n)).collect::<Vec<_>>(),
        [("BF16", 1), ("F16", 7), ("F32", 3)]
    );
    let model = Model::load(&output, &Device::cpu(), Precision::F32).unwrap();
    assert!(model.config.tied_embeddings);
    assert_eq!((model.config.head_size, model.config.rms_norm_epsilon), (4, 1e-5));
    assert_eq!(read_json(&output.join("config.json"))["rms_norm_eps"], json!(1e-5));
    let loaded = values(&model);
    assert_eq!(loaded["model.layers.0.mlp.up_proj.weight"], weight(8, 64 * 32));
    assert_eq!(loaded["model.embed_tokens.weight"], weight(1, 263 * 32));
    // A head's rows are stored as pairs: its first half is every other row.
    let (stored, read) = (weight(3, 8 * 32), &loaded["model.layers.0.self_attn.q_proj.weight"]);
    for (row, source) in [0, 2, 1, 3, 4, 6, 5, 7].into_iter().enumerate() {
        assert_eq!(read[row * 32..][..32], stored[source * 32..][..32], "row {row}");
    }

    let inputs = &read_json(&output.join("tokenizer_config.json"))["model_input_names"];
    assert_eq!(inputs, &json!(["input_ids", "attention_mask"]), "token types are no input of a Llama");

    let tokenizer = Tokenizer::load(&output).unwrap();
    assert_eq!(tokenizer.vocabulary_size(), 263);
    let text = "<|im_start|>on the 12é\n<|im_end|>";
    let ids = tokenizer.encode(text, true).unwrap();
    assert_eq!((ids[0], *ids.last().unwrap()), (1, 2));
    assert!(ids.contains(&261), "\" the\" is one token: {ids:?}");
    assert!(!ids.contains(&262), "digits are never merged: {ids:?}");
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "on the 12é\n");
    let mut stream = tokenizer.stream(false);
    let pieces: Vec<String> = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
    assert_eq!(pieces.concat(), text);
    assert!(pieces.iter().any(String::is_empty), "the first byte of é is held back");
    let mut cut = tokenizer.stream(false);
    let first_byte = tokenizer.encode("é", false).unwrap()[0];
    assert_eq!(cut.push(first_byte).unwrap(), "");
    assert_eq!(cut.finish().unwrap(), "\u{fffd}");

    let template = ChatTemplate::load(&output).unwrap().unwrap();
    let messages = [json!({"role": "user", "content": "the é"}), json!({"role": "assistant", "content": "12 é"})];
    let encoded = template.encode(&tokenizer, &messages).unwrap();
    let answer: Vec<u32> =
        encoded.ids.iter().zip(&encoded.assistant).filter(|(_, answer)| **answer).map(|(id, _)| *id).collect();
    assert_eq!(tokenizer.decode(&answer, false).unwrap(), "12 é<|im_end|>");
}

#[test]
fn fingerprints_tell_vocabularies_apart() {
    let scratch = tempfile::tempdir().unwrap();
    let fingerprint = |name: &str, gguf: &Gguf| {
        let output = scratch.path().join(name);
        import(&write(scratch.path(), gguf), &output, |_| {}).unwrap();
        Tokenizer::load(&output).unwrap().fingerprint()
    };
    let first = fingerprint("first", &small());
    assert_eq!(first.len(), 64);
    assert_eq!(first, fingerprint("again", &small()));
    let mut other = small();
    let (mut tokens, ..) = vocabulary();
    tokens.swap(100, 101);
    other.set("tokenizer.ggml.tokens", Value::Texts(tokens));
    assert_ne!(first, fingerprint("other", &other));
}

#[test]
fn a_text_can_begin_with_a_token_by_itself() {
    let scratch = tempfile::tempdir().unwrap();
    let mut gguf = small();
    gguf.set("tokenizer.ggml.add_bos_token", Value::Bool(true));
    gguf.set("tokenizer.ggml.pre", Value::Text("llama-bpe".to_owned()));
    let output = scratch.path().join("output");
    import(&write(scratch.path(), &gguf), &output, |_| {}).unwrap();
    let tokenizer = Tokenizer::load(&output).unwrap();
    let plain = tokenizer.encode("12 the", false).unwrap();
    assert_eq!(plain, [262, 261]);
    assert_eq!(tokenizer.encode("12 the", true).unwrap(), [1, 262, 261]);
}

#[test]
fn a_sentence_piece_vocabulary_merges_by_score() {
    let scratch = tempfile::tempdir().unwrap();
    let mut gguf = small();
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    tokens.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
    // The embedding has 263 rows: the last four bytes give way to 255 "▁" … 258 "c", 259 "ab" … 262 "bc".
    tokens.truncate(255);
    tokens.extend(["▁", "a", "b", "c", "ab", "▁a", "▁ab", "bc"].map(str::to_owned));
    let types =
        (0..tokens.len()).map(|id| [2, 3, 3].get(id).copied().unwrap_or(if id < 255 { 6 } else { 1 })).collect();
    let scores = (0..tokens.len()).map(|id| if id < 255 { 0.0 } else { 254.0 - id as f32 }).collect();
    gguf.set("tokenizer.ggml.model", Value::Text("llama".to_owned()));
    gguf.set("tokenizer.ggml.tokens", Value::Texts(tokens));
    gguf.set("tokenizer.ggml.token_type", Value::Integers(types));
    gguf.set("tokenizer.ggml.scores", Value::Floats(scores));
    gguf.remove("tokenizer.ggml.merges");
    gguf.remove("tokenizer.ggml.add_bos_token");
    let output = scratch.path().join("output");
    import(&write(scratch.path(), &gguf), &output, |_| {}).unwrap();
    let tokenizer = Tokenizer::load(&output).unwrap();
    assert_eq!(tokenizer.encode("ab abc", true).unwrap(), [1, 261, 261, 258]);
    assert_eq!(tokenizer.encode("bca", false).unwrap(), [255, 262, 256]);
    // A character without a token is its bytes, C3 A9.
    assert_eq!(tokenizer.encode("é", false).unwrap(), [255, 3 + 0xc3, 3 + 0xa9]);
    for text in ["ab abc", "é a", " a"] {
        assert_eq!(tokenizer.decode(&tokenizer.encode(text, true).unwrap(), true).unwrap(), text);
    }
    gguf.set("tokenizer.ggml.scores", Value::Floats(vec![f32::NAN; 263]));
    let message = import(&write(scratch.path(), &gguf), &scratch.path().join("none"), |_| {}).unwrap_err().to_string();
    assert!(message.contains("tokenizer.ggml.scores: expected a list of numbers"), "{message}");
    gguf.set("tokenizer.ggml.scores", Value::Floats(vec![0.0; 7]));
    let message = import(&write(scratch.path(), &gguf), &scratch.path().join("other"), |_| {}).unwrap_err().to_string();
    assert!(message.contains("tokenizer.ggml.scores: 7 values for 263 tokens"), "{message}");
}

#[test]
fn llama_3s_rotary_scaling_is_recognised_by_its_divisors() {
    let scratch = tempfile::tempdir().unwrap();
    let import_with = |name: &str, divisors: [f32; 2]| {
        let mut gguf = small();
        gguf.set("llama.rope.freq_base", Value::F32(1e8));
        let bytes = divisors.iter().flat_map(|value| value.to_le_bytes()).collect();
        gguf.tensors.push(("rope_freqs.weight".to_owned(), vec![2], 0, bytes));
        let output = scratch.path().join(name);
        import(&write(scratch.path(), &gguf), &output, |_| {}).map(|_| read_json(&output.join("config.json")))
    };
    let scaling = &import_with("llama3", [1.0, 8.0]).unwrap()["rope_scaling"];
    assert_eq!((&scaling["rope_type"], &scaling["factor"]), (&json!("llama3"), &json!(8.0)));
    let message = import_with("other", [2.0, 8.0]).unwrap_err().to_string();
    assert!(message.contains("rope_freqs.weight: divisor 0 is 2, Llama 3's rule gives 1"), "{message}");
}

#[test]
fn every_kind_of_damage_is_refused_and_nothing_is_written() {
    type Damage = Box<dyn Fn(&mut Gguf)>;
    let cases: Vec<(Damage, &str)> = vec![
        (Box::new(|gguf| gguf.version = 1), "GGUF version 1 is not supported: expected 2 or 3"),
        (Box::new(|gguf| gguf.version = 3 << 24), "(the file is big-endian)"),
        (
            Box::new(|gguf| gguf.set("general.architecture", Value::Text("qwen2".to_owned()))),
            "general.architecture: \"qwen2\" is not supported",
        ),
        (Box::new(|gguf| gguf.remove("general.architecture")), "general.architecture: this key is missing"),
        (Box::new(|gguf| gguf.remove("llama.context_length")), "llama.context_length: this key is missing"),
        (Box::new(|gguf| gguf.set("llama.block_count", Value::Bool(true))), "llama.block_count: expected an integer"),
        (Box::new(|gguf| gguf.remove("llama.attention.head_count")), "llama.attention.head_count: this key is missing"),
        (
            Box::new(|gguf| gguf.set("llama.attention.head_count", Value::U32(0))),
            "llama.attention.head_count: is 0: expected 1 or more",
        ),
        (
            Box::new(|gguf| gguf.set("llama.attention.head_count_kv", Value::U32(0))),
            "llama.attention.head_count_kv: is 0: expected 1 or more",
        ),
        (Box::new(|gguf| gguf.set("llama.context_length", Value::U32(0))), "llama.context_length: is 0"),
        (Box::new(|gguf| gguf.set("llama.attention.key_length", Value::U32(0))), "llama.attention.key_length: is 0"),
        (Box::new(|gguf| gguf.set("llama.vocab_size", Value::U32(0))), "llama.vocab_size: is 0"),
        (
            Box::new(|gguf| gguf.set("llama.rope.freq_base", Value::F32(f32::NAN))),
            "llama.rope.freq_base: expected a finite number",
        ),
        (
            Box::new(|gguf| gguf.set("llama.rope.freq_base", Value::F32(f32::INFINITY))),
            "llama.rope.freq_base: expected a finite number",
        ),
        (
            Box::new(|gguf| gguf.set("llama.attention.layer_norm_rms_epsilon", Value::F32(f32::NEG_INFINITY))),
            "llama.attention.layer_norm_rms_epsilon: expected a finite number",
        ),
        (Box::new(|gguf| gguf.set("llama.expert_count", Value::U32(8))), "mixtures of experts are not supported"),
        (
            Box::new(|gguf| gguf.set("llama.block_count", Value::U32(2))),
            "model.layers.1.self_attn.q_proj.weight is missing",
        ),
        (
            Box::new(|gguf| gguf.set("llama.feed_forward_length", Value::U32(96))),
            "has shape [64, 32], but [96, 32] follows",
        ),
        (Box::new(|gguf| gguf.set("llama.rope.dimension_count", Value::U32(2))), "rotating a part of the head"),
        (Box::new(|gguf| gguf.set("general.alignment", Value::U32(48))), "general.alignment is no power of two"),
        (
            Box::new(|gguf| gguf.set("llama.rope.scaling.type", Value::Text("linear".to_owned()))),
            "llama.rope.scaling.type: \"linear\" is not supported",
        ),
        (
            Box::new(|gguf| gguf.keys.push(("llama.block_count".to_owned(), Value::U32(1)))),
            "the key llama.block_count appears twice",
        ),
        (
            Box::new(|gguf| gguf.set("tokenizer.ggml.model", Value::Text("bert".to_owned()))),
            "a vocabulary of kind \"bert\" is not supported",
        ),
        (
            Box::new(|gguf| gguf.set("tokenizer.ggml.pre", Value::Text("elvish".to_owned()))),
            "the way \"elvish\" to split text is not supported",
        ),
        (
            Box::new(|gguf| gguf.set("tokenizer.ggml.eos_token_id", Value::U32(263))),
            "263 is outside the vocabulary of 263 tokens",
        ),
        (
            Box::new(|gguf| gguf.set("tokenizer.ggml.token_type", Value::Integers(vec![1; 5]))),
            "5 values for 263 tokens",
        ),
        (
            Box::new(|gguf| {
                let (mut tokens, ..) = vocabulary();
                tokens[9] = tokens[8].clone();
                gguf.set("tokenizer.ggml.tokens", Value::Texts(tokens));
            }),
            "token 9 (\"ą\") is there twice",
        ),
        (Box::new(|gguf| gguf.tensor("blk.0.ffn_up.weight").2 = 13), "has type 13 (Q5_K): supported are F32, F16"),
        (Box::new(|gguf| gguf.tensor("blk.0.ffn_up.weight").1 = vec![0; 7]), "7 dimensions: expected 1 to 4"),
        (
            Box::new(|gguf| gguf.tensor("blk.0.ffn_up.weight").1 = vec![1 << 40, 1 << 40]),
            "shape [1099511627776, 1099511627776] is larger than any memory",
        ),
        (
            Box::new(|gguf| {
                let tensor = gguf.tensor("blk.0.attn_output.weight");
                tensor.2 = 8;
            }),
            "rows of 8 elements are no whole number of Q8_0 blocks of 32",
        ),
        (
            Box::new(|gguf| gguf.tensor("blk.0.ffn_up.weight").0 = "blk.0.ffn_gate.weight".to_owned()),
            "blk.0.ffn_gate.weight: the file has this name twice",
        ),
        (
            Box::new(|gguf| gguf.tensor("blk.0.ffn_up.weight").0 = "blk.0.ssm_in.weight".to_owned()),
            "blk.0.ssm_in.weight: is no tensor of a Llama",
        ),
        (
            Box::new(|gguf| {
                let bytes = &mut gguf.tensor("blk.0.attn_norm.weight").3;
                bytes[20..24].copy_from_slice(&f32::INFINITY.to_le_bytes());
            }),
            "tensor blk.0.attn_norm.weight: the element at [5] is NaN or infinite",
        ),
        (Box::new(|gguf| gguf.shift = 8), "its offset 8 is no multiple of the alignment 32"),
        (Box::new(|gguf| gguf.shift = 64), "its data end beyond the file's"),
        (
            Box::new(|gguf| gguf.tensor("output_norm.weight").3.truncate(32)),
            "tensor blk.0.attn_q.weight: its data overlap with those of output_norm.weight",
        ),
    ];
    let scratch = tempfile::tempdir().unwrap();
    for (damage, expected) in cases {
        let mut gguf = small();
        damage(&mut gguf);
        let path = write(scratch.path(), &gguf);
        let message = import(&path, &scratch.path().join("output"), |_| {}).unwrap_err().to_string();
        assert!(message.contains(expected), "expected «{expected}» in «{message}»");
        assert!(message.contains("model.gguf"), "the file is not named in «{message}»");
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1, "something was written: {expected}");
    }
    fs::write(scratch.path().join("model.gguf"), "PK\u{3}\u{4}").unwrap();
    let message = import(&scratch.path().join("model.gguf"), &scratch.path().join("output"), |_| {}).unwrap_err();
    assert!(message.to_string().contains("this is no GGUF file"), "{message}");
}

#[test]
fn a_file_cut_off_anywhere_or_changed_at_random_never_panics() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("model.gguf");
    let gguf = small();
    let whole = gguf.bytes();
    let data = whole.len() - gguf.tensors.iter().map(|(.., data)| data.len().next_multiple_of(32)).sum::<usize>();
    for length in (0..data).step_by(41).chain(data - 100..data) {
        fs::write(&path, &whole[..length]).unwrap();
        assert!(model::gguf::GgufFile::open(&path).is_err(), "cut off at byte {length}");
    }
    let mut state = 9u64;
    let mut random = |limit: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % limit
    };
    for _ in 0..1000 {
        let mut bytes = whole.clone();
        for _ in 0..=random(3) {
            // Mostly in the counts and keys at the beginning and in the tensors' descriptions at the end.
            let position = if random(2) == 0 { random(1200) } else { data - 1 - random(1200) };
            bytes[position] = random(256) as u8;
        }
        fs::write(&path, &bytes).unwrap();
        // Whatever comes of it, it is an answer: no panic, no allocation beyond the file's size.
        let _ = model::gguf::GgufFile::open(&path);
    }
}
