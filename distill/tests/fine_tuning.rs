//! `grafter sft` and `grafter merge`, as one uses them after each other.

#![allow(clippy::unwrap_used)] // Helpers of tests fail as tests do.

mod support;

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use support::{Workshop, fail, succeed, text};

/// Chats whose prompts nobody can foresee and whose answers are all the same.
fn write_chats(path: &Path, count: u64) {
    let mut state = 1u64;
    let lines: Vec<String> = (0..count)
        .map(|_| {
            let prompt: String = (0..8)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    char::from(b'a' + (state >> 33) as u8 % 26)
                })
                .collect();
            json!({ "messages": [{ "role": "user", "content": prompt }, { "role": "assistant", "content": "four" }] })
                .to_string()
        })
        .collect();
    fs::write(path, lines.join("\n") + "\n").unwrap();
}

#[test]
fn a_model_is_tuned_on_answers_and_merged_with_what_it_was() {
    let workshop = Workshop::new();
    let (teacher, chats, run) = (workshop.path("teacher"), workshop.path("chats.jsonl"), workshop.path("sft"));
    write_chats(&chats, 200);
    let tune = ["sft", text(&teacher), "--train", text(&chats), "--run", text(&run), "--sequence-length", "64"];
    let more = ["--steps", "80", "--batch-size", "4", "--micro-batch", "4", "--learning-rate", "5e-3"];
    succeed(&[&tune[..], &more].concat());
    let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let losses: Vec<f64> =
        metrics.lines().filter_map(|line| serde_json::from_str::<Value>(line).unwrap()["loss"].as_f64()).collect();
    // Prompts of random letters would leave more than a nat for most of the positions, if they counted.
    assert!(losses[0] > 2.0 && losses[losses.len() - 1] < 0.1, "from {} to {}", losses[0], losses[losses.len() - 1]);

    let tuned = run.join("model");
    let answer = |model: &Path| {
        let arguments =
            ["generate", text(model), "--chat", "--prompt", "qzkv", "--max-tokens", "8", "--greedy", "--json"];
        serde_json::from_str::<Value>(&succeed(&arguments)).unwrap()["text"].clone()
    };
    assert_eq!(answer(&tuned), "four");

    let merged = workshop.path("merged");
    let both = ["merge", text(&tuned), text(&teacher), "--out", text(&merged)];
    let summary: Value =
        serde_json::from_str(&succeed(&[&both[..], &["--weights", "1,0", "--json"]].concat())).unwrap();
    assert_eq!(summary["model"], text(&merged));
    let weights = |folder: &Path| fs::read(folder.join("model.safetensors")).unwrap();
    assert!(weights(&merged) == weights(&tuned), "all of the first and nothing of the second");
    assert_eq!(answer(&merged), "four");
    assert!(fail(&both).contains("exists and is not empty"));
    fs::remove_dir_all(&merged).unwrap();
    assert!(fail(&[&both[..], &["--weights", "1"]].concat()).contains("1 number(s) for 2 models"));
    for method in ["linear", "slerp"] {
        assert!(succeed(&[&both[..], &["--method", method]].concat()).contains("0.5000"));
        assert!(weights(&merged) != weights(&tuned));
        answer(&merged);
        fs::remove_dir_all(&merged).unwrap();
    }
}
