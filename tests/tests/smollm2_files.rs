//! The real model's files: a 98 MB GGUF file that is not in the repository, so these tests are run by hand:
//!
//! ```text
//! GRAFTER_SMOLLM2_GGUF=SmolLM2-135M-Instruct.Q4_1.gguf GRAFTER_SMOLLM2_REFERENCE=FOLDER \
//!     cargo test --release -p grafter-tests --test smollm2_files -- --ignored
//! ```
//!
//! `FOLDER` is what an independent converter made of the same file: a Hugging Face folder with `tokenizer_cases.json`
//! (texts, their token ids, and the texts that these decode to) in it or beside it.

#![allow(clippy::unwrap_used, reason = "helpers of tests may fail as tests do")]

use std::path::{Path, PathBuf};

use model::checkpoint::WeightFiles;
use model::import::import;
use model::tokenizer::Tokenizer;
use safetensors::SafeTensors;
use serde_json::Value;

fn path(variable: &str) -> PathBuf {
    PathBuf::from(std::env::var_os(variable).unwrap_or_else(|| panic!("set {variable}")))
}

fn imported(folder: &Path) {
    import(&path("GRAFTER_SMOLLM2_GGUF"), folder, |_| {}).unwrap();
}

#[test]
#[ignore = "needs the GGUF file"]
fn the_import_is_bit_for_bit_what_the_reference_converter_makes() {
    let scratch = tempfile::tempdir().unwrap();
    let output = scratch.path().join("model");
    imported(&output);
    let reference = path("GRAFTER_SMOLLM2_REFERENCE");
    let ours = std::fs::read(output.join("model.safetensors")).unwrap();
    let theirs = std::fs::read(reference.join("model.safetensors")).unwrap();
    let (ours, theirs) = (SafeTensors::deserialize(&ours).unwrap(), SafeTensors::deserialize(&theirs).unwrap());
    assert_eq!(ours.len(), theirs.len());
    for (name, tensor) in theirs.iter() {
        assert!(ours.tensor(name).unwrap() == tensor, "{name} differs");
    }
    for file in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"] {
        let read = |folder: &Path| -> Value {
            serde_json::from_str(&std::fs::read_to_string(folder.join(file)).unwrap()).unwrap()
        };
        let mut ours = read(&output);
        if file == "tokenizer_config.json" {
            // Ours says in addition what the model takes, without which transformers also gives it token types.
            assert_eq!(ours["model_input_names"], serde_json::json!(["input_ids", "attention_mask"]));
            ours.as_object_mut().unwrap().remove("model_input_names");
        }
        assert!(ours == read(&reference), "{file} differs");
    }
    assert_eq!(WeightFiles::open(&output).unwrap().names().count(), 272);
}

#[test]
#[ignore = "needs the GGUF file"]
fn every_tokenizer_case_is_encoded_and_decoded_alike() {
    let scratch = tempfile::tempdir().unwrap();
    let output = scratch.path().join("model");
    imported(&output);
    let reference = path("GRAFTER_SMOLLM2_REFERENCE");
    let cases = ["tokenizer_cases.json", "../tokenizer_cases.json"].map(|name| reference.join(name));
    let cases = std::fs::read_to_string(cases.iter().find(|path| path.exists()).unwrap()).unwrap();
    let cases: Value = serde_json::from_str(&cases).unwrap();
    for folder in [&reference, &output] {
        let tokenizer = Tokenizer::load(folder).unwrap();
        for case in cases["cases"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let expected: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
            assert_eq!(tokenizer.encode(text, true).unwrap(), expected, "{text:?}");
            assert_eq!(tokenizer.decode(&expected, false).unwrap(), case["decoded"].as_str().unwrap());
            let mut stream = tokenizer.stream(false);
            let mut streamed: String = expected.iter().map(|id| stream.push(*id).unwrap()).collect();
            streamed += &stream.finish().unwrap();
            assert_eq!(streamed, case["decoded"].as_str().unwrap(), "{text:?} piece by piece");
        }
    }
}
