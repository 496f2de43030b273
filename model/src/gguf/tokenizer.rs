//! A GGUF file's vocabulary as the files that Hugging Face tokenizers read.

use std::collections::{HashMap, HashSet};

use serde_json::{Map, Value, json};

use super::GgufFile;
use crate::Result;

/// Token types as GGUF numbers them.
const NORMAL: i128 = 1;
const UNKNOWN: i128 = 2;
const CONTROL: i128 = 3;
const USER_DEFINED: i128 = 4;

const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";

/// The contents of the four files beside the weights.
#[derive(Debug)]
pub(crate) struct TokenizerFiles {
    pub(crate) tokenizer: Value,
    pub(crate) tokenizer_config: Value,
    pub(crate) special_tokens_map: Value,
    pub(crate) generation_config: Value,
}

/// Turns the vocabulary of a GGUF file into a tokenizer.
pub(crate) fn convert(file: &GgufFile) -> Result<TokenizerFiles> {
    let tokens = file.required(TOKENS, file.texts(TOKENS)?)?;
    let mut seen = HashSet::with_capacity(tokens.len());
    if let Some((id, token)) = tokens.iter().enumerate().find(|(_, token)| !seen.insert(**token)) {
        return Err(file.fail(TOKENS, format!("token {id} ({token:?}) is there twice")));
    }
    let parts = match file.text("tokenizer.ggml.model")?.unwrap_or("none") {
        "gpt2" => byte_level_parts(file)?,
        "llama" => sentence_piece_parts(file, &tokens)?,
        other => {
            let problem = format!(
                "a vocabulary of kind \"{other}\" is not supported: expected \"gpt2\" (byte-level BPE) or \"llama\" \
                 (SentencePiece BPE); for this model use its Hugging Face folder"
            );
            return Err(file.fail("tokenizer.ggml.model", problem));
        }
    };
    let special = special_tokens(file, &tokens)?;
    let added = added_tokens(file, &tokens)?;
    let add_bos = file.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(parts.adds_bos);
    let post_processor = match special.iter().find(|(name, _, _)| *name == "bos_token") {
        Some((_, id, token)) if add_bos => begin_with(token, *id),
        _ => Value::Null,
    };
    let vocabulary: Map<String, Value> =
        tokens.iter().enumerate().map(|(id, token)| ((*token).to_owned(), json!(id))).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": added,
        "normalizer": parts.normalizer,
        "pre_tokenizer": parts.pre_tokenizer,
        "post_processor": post_processor,
        "decoder": parts.decoder,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": parts.unknown, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": parts.byte_fallback, "byte_fallback": parts.byte_fallback,
            "ignore_merges": parts.whole_words, "vocab": vocabulary, "merges": parts.merges,
        },
    });
    Ok(TokenizerFiles {
        tokenizer,
        tokenizer_config: tokenizer_config(file, &added, &special, tokens.len(), add_bos)?,
        special_tokens_map: special_tokens_map(&special),
        generation_config: generation_config(file)?,
    })
}

/// What the kinds of vocabulary differ in.
struct Parts {
    normalizer: Value,
    /// How text is cut into words before merging.
    pre_tokenizer: Value,
    decoder: Value,
    merges: Value,
    /// The token for what has none.
    unknown: Option<String>,
    /// Whether characters without a token become the tokens of their bytes.
    byte_fallback: bool,
    /// Whether a word that is a token is taken whole, whatever the merges say.
    whole_words: bool,
    /// Whether a text begins with the BOS token, unless the file says otherwise.
    adds_bos: bool,
}

/// Byte-level BPE, as GPT-2 introduced it.
fn byte_level_parts(file: &GgufFile) -> Result<Parts> {
    const KEY: &str = "tokenizer.ggml.pre";
    const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let merges = file.required("tokenizer.ggml.merges", file.texts("tokenizer.ggml.merges")?)?;
    let plain = Parts {
        normalizer: Value::Null,
        pre_tokenizer: byte_level(false, true),
        decoder: byte_level(true, true),
        merges: json!(merges),
        unknown: None,
        byte_fallback: false,
        whole_words: false,
        adds_bos: false,
    };
    let by_pattern = |pattern: &str| {
        sequence([
            json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false }),
            byte_level(false, false),
        ])
    };
    Ok(match file.text(KEY)?.unwrap_or("missing") {
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" => {
            let digits = json!({ "type": "Digits", "individual_digits": true });
            Parts { pre_tokenizer: sequence([digits, byte_level(false, true)]), ..plain }
        }
        "gpt-2" | "phi-2" => plain,
        "llama-bpe" | "llama3" | "llama-v3" => {
            Parts { pre_tokenizer: by_pattern(LLAMA3), whole_words: true, adds_bos: true, ..plain }
        }
        "tekken" => Parts { pre_tokenizer: by_pattern(TEKKEN), whole_words: true, adds_bos: true, ..plain },
        "qwen2" => Parts { pre_tokenizer: by_pattern(QWEN2), normalizer: json!({ "type": "NFC" }), ..plain },
        other => {
            return Err(file.fail(
                KEY,
                format!(
                    "the way \"{other}\" to split text is not supported: expected smollm, starcoder, refact, command-r, \
                     codeshell, gpt-2, phi-2, llama-bpe, tekken or qwen2"
                ),
            ));
        }
    })
}

/// SentencePiece's BPE: words are not split off, a space is the letter `▁`, and a token's score says when it is merged.
fn sentence_piece_parts(file: &GgufFile, tokens: &[&str]) -> Result<Parts> {
    const SCORES: &str = "tokenizer.ggml.scores";
    let scores = file.required(SCORES, file.numbers(SCORES)?)?;
    let types = file.required(TYPES, file.integers(TYPES)?)?;
    for (key, count) in [(SCORES, scores.len()), (TYPES, types.len())] {
        if count != tokens.len() {
            return Err(file.fail(key, format!("{count} values for {} tokens", tokens.len())));
        }
    }
    let prefix = file.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let prepend = prefix.then(|| json!({ "type": "Prepend", "prepend": "▁" }));
    let replace = |from: &str, to: &str| json!({ "type": "Replace", "pattern": { "String": from }, "content": to });
    let strip = prefix.then(|| json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    let normalizers: Vec<Value> = prepend.into_iter().chain([replace(" ", "▁")]).collect();
    let decoders: Vec<Value> = [replace("▁", " "), json!({ "type": "ByteFallback" }), json!({ "type": "Fuse" })]
        .into_iter()
        .chain(strip)
        .collect();
    let unknown = tokens.iter().zip(&types).find(|(_, kind)| **kind == UNKNOWN).map(|(token, _)| (*token).to_owned());
    Ok(Parts {
        normalizer: json!({ "type": "Sequence", "normalizers": normalizers }),
        pre_tokenizer: Value::Null,
        decoder: json!({ "type": "Sequence", "decoders": decoders }),
        merges: merges_by_score(tokens, &types, &scores),
        unknown,
        byte_fallback: true,
        whole_words: false,
        adds_bos: true,
    })
}

/// Every way to put a token together from two others, the highest scores first.
fn merges_by_score(tokens: &[&str], types: &[i128], scores: &[f64]) -> Value {
    let known = || tokens.iter().zip(types).zip(scores).filter(|((_, kind), _)| **kind == NORMAL);
    let (mut beginnings, mut endings) = (Trie::default(), Trie::default());
    for ((token, _), _) in known() {
        beginnings.insert(token.bytes());
        endings.insert(token.bytes().rev());
    }
    let mut merges: Vec<(f64, usize, &str, &str)> = Vec::new();
    for ((token, _), score) in known() {
        let rest: HashSet<usize> = endings.lengths(token.bytes().rev()).map(|length| token.len() - length).collect();
        for middle in beginnings.lengths(token.bytes()).filter(|middle| rest.contains(middle)) {
            let (left, right) = token.split_at(middle);
            merges.push((*score, left.chars().count(), left, right));
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| b.1.cmp(&a.1)));
    merges.into_iter().map(|(_, _, left, right)| json!([left, right])).collect()
}

/// Words by their letters: finds all words that a text begins with in one pass over it.
#[derive(Default)]
struct Trie {
    /// From a node and a byte to the next node; node 0 is the root.
    edges: HashMap<(usize, u8), usize>,
    /// Nodes where a word ends.
    ends: HashSet<usize>,
}

impl Trie {
    fn insert(&mut self, word: impl Iterator<Item = u8>) {
        let mut node = 0;
        for byte in word {
            let next = self.edges.len() + 1;
            node = *self.edges.entry((node, byte)).or_insert(next);
        }
        self.ends.insert(node);
    }

    /// The lengths of the words that `text` begins with, in bytes, shortest first; the empty one is none.
    fn lengths(&self, text: impl Iterator<Item = u8>) -> impl Iterator<Item = usize> {
        let nodes = text.scan(0, |node, byte| {
            *node = *self.edges.get(&(*node, byte))?;
            Some(*node)
        });
        nodes.enumerate().filter(|(_, node)| self.ends.contains(node)).map(|(index, _)| index + 1)
    }
}

fn sequence(parts: [Value; 2]) -> Value {
    json!({ "type": "Sequence", "pretokenizers": parts })
}

fn byte_level(add_prefix_space: bool, use_regex: bool) -> Value {
    json!({
        "type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": true, "use_regex": use_regex,
    })
}

/// Puts a token before every text.
fn begin_with(token: &str, id: u32) -> Value {
    let bos = json!({ "SpecialToken": { "id": token, "type_id": 0 } });
    let text = |name: &str, type_id: u32| json!({ "Sequence": { "id": name, "type_id": type_id } });
    json!({
        "type": "TemplateProcessing",
        "single": [bos, text("A", 0)],
        "pair": [bos, text("A", 0), json!({ "SpecialToken": { "id": token, "type_id": 1 } }), text("B", 1)],
        "special_tokens": { token: { "id": token, "ids": [id], "tokens": [token] } },
    })
}

type SpecialToken = (&'static str, u32, String);

/// The special tokens that the file names: their key, id and text.
fn special_tokens(file: &GgufFile, tokens: &[&str]) -> Result<Vec<SpecialToken>> {
    let mut special = Vec::new();
    for (name, key) in [
        ("bos_token", "tokenizer.ggml.bos_token_id"),
        ("eos_token", "tokenizer.ggml.eos_token_id"),
        ("unk_token", "tokenizer.ggml.unknown_token_id"),
        ("pad_token", "tokenizer.ggml.padding_token_id"),
    ] {
        if let Some(id) = file.integer(key)? {
            let Some(token) = tokens.get(id as usize) else {
                return Err(file.fail(key, format!("{id} is outside the vocabulary of {} tokens", tokens.len())));
            };
            special.push((name, id, (*token).to_owned()));
        }
    }
    Ok(special)
}

/// Tokens that are recognised in a text before anything else.
fn added_tokens(file: &GgufFile, tokens: &[&str]) -> Result<Vec<Value>> {
    let Some(types) = file.integers(TYPES)? else { return Ok(Vec::new()) };
    if types.len() != tokens.len() {
        return Err(file.fail(TYPES, format!("{} values for {} tokens", types.len(), tokens.len())));
    }
    let mut added = Vec::new();
    for (id, (token, kind)) in tokens.iter().zip(types).enumerate() {
        let special = kind == CONTROL;
        if special || kind == USER_DEFINED {
            added.push(json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": special,
            }));
        }
    }
    Ok(added)
}

fn tokenizer_config(
    file: &GgufFile,
    added: &[Value],
    special: &[SpecialToken],
    vocabulary_size: usize,
    add_bos: bool,
) -> Result<Value> {
    let mut decoder = Map::new();
    for token in added {
        let described: Map<String, Value> = ["content", "lstrip", "normalized", "rstrip", "single_word", "special"]
            .iter()
            .map(|key| ((*key).to_owned(), token[*key].clone()))
            .collect();
        decoder.insert(token["id"].to_string(), Value::Object(described));
    }
    let mut config = Map::new();
    let mut set = |key: &str, value: Value| {
        config.insert(key.to_owned(), value);
    };
    set("add_bos_token", json!(add_bos));
    set("add_eos_token", json!(file.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false)));
    set("add_prefix_space", json!(false));
    set("added_tokens_decoder", Value::Object(decoder));
    set("additional_special_tokens", additional(special));
    for (name, _, token) in special {
        set(name, json!(token));
    }
    if let Some(template) = file.text("tokenizer.chat_template")? {
        set("chat_template", json!(template));
    }
    set("clean_up_tokenization_spaces", json!(false));
    if let Some(length) = file.integer("llama.context_length")? {
        set("model_max_length", json!(length));
    }
    // Without it transformers' tokenizer also gives token types, which its Llama refuses.
    set("model_input_names", json!(["input_ids", "attention_mask"]));
    set("tokenizer_class", json!("PreTrainedTokenizerFast"));
    set("vocab_size", json!(vocabulary_size));
    Ok(Value::Object(config))
}

fn special_tokens_map(special: &[SpecialToken]) -> Value {
    let mut map = Map::new();
    map.insert("additional_special_tokens".to_owned(), additional(special));
    for (name, _, token) in special {
        let described = json!({
            "content": token, "lstrip": false, "normalized": false, "rstrip": false, "single_word": false,
        });
        map.insert((*name).to_owned(), described);
    }
    Value::Object(map)
}

/// Beginning and end of a turn or text.
fn additional(special: &[SpecialToken]) -> Value {
    special
        .iter()
        .filter(|(name, _, _)| matches!(*name, "bos_token" | "eos_token"))
        .map(|(_, _, token)| json!(token))
        .collect()
}

fn generation_config(file: &GgufFile) -> Result<Value> {
    let mut config = Map::new();
    config.insert("_from_model_config".to_owned(), json!(true));
    for (name, key) in [
        ("bos_token_id", "tokenizer.ggml.bos_token_id"),
        ("eos_token_id", "tokenizer.ggml.eos_token_id"),
        ("pad_token_id", "tokenizer.ggml.padding_token_id"),
    ] {
        if let Some(id) = file.integer(key)? {
            config.insert(name.to_owned(), json!(id));
        }
    }
    Ok(Value::Object(config))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merges_are_all_splits_into_known_tokens() {
        let tokens = ["a", "é", "b", "aé", "éb", "aéb", "ab", "aéba", "ba", "<s>", "", "bb"];
        let types: Vec<i128> = tokens.iter().map(|token| if *token == "<s>" { CONTROL } else { NORMAL }).collect();
        let scores: Vec<f64> = (0..tokens.len()).map(|id| -((id / 2) as f64)).collect();
        // Of equal scores (éb and aéb; ab and aéba) the longer left part is first.
        let expected = json!([
            ["a", "é"],
            ["aé", "b"],
            ["é", "b"],
            ["a", "éb"],
            ["aéb", "a"],
            ["aé", "ba"],
            ["a", "b"],
            ["b", "a"],
            ["b", "b"],
        ]);
        let mut plain: Vec<(usize, Value)> = Vec::new();
        for (id, token) in tokens.iter().enumerate() {
            for (middle, _) in token.char_indices().skip(1) {
                let (left, right) = token.split_at(middle);
                if tokens.contains(&left) && tokens.contains(&right) {
                    plain.push((id, json!([left, right])));
                }
            }
        }
        let merges = merges_by_score(&tokens, &types, &scores);
        assert_eq!(merges.as_array().unwrap().len(), plain.len());
        assert!(plain.iter().all(|(_, pair)| merges.as_array().unwrap().contains(pair)));
        assert_eq!(merges, expected);
        // A damaged file may hold a token of any length: trying every split in full would take minutes.
        let long = "ab".repeat(500_000);
        assert_eq!(merges_by_score(&["a", "b", &long], &[NORMAL; 3], &[0.0; 3]), json!([]));
    }
}
