//! `grafter teach`, and distillation from what it wrote.

#![allow(clippy::unwrap_used)] // Helpers of tests fail as tests do.

mod support;

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::{
    VOCABULARY, Workshop, borrowed, fail, files_below, grafter, succeed, text, write_documents, write_model,
};

fn teach(workshop: &Workshop, data: &str, out: &str, top: usize) -> Vec<String> {
    let (teacher, data, out) = (workshop.path("teacher"), workshop.path(data), workshop.path(out));
    let top = top.to_string();
    ["teach", text(&teacher), "--data", text(&data), "--out", text(&out), "--sequence-length", "32", "--top", &top]
        .map(String::from)
        .to_vec()
}

/// The losses of all updates, and the first validation loss.
fn losses(run: &Path) -> (Vec<f64>, f64) {
    let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of = |key: &str| lines.iter().filter_map(|line| line[key].as_f64()).collect::<Vec<_>>();
    (of("loss"), of("validation_loss")[0])
}

#[test]
fn with_all_tokens_listed_a_run_is_as_with_the_teacher_and_with_few_it_sees_less() {
    let workshop = Workshop::new();
    let run = |name: &str, more: &[&str]| {
        succeed(&borrowed(&workshop.distill(name, &[&["--steps", "6", "--batch-size", "4"], more].concat())));
        losses(&workshop.path(name))
    };
    let (online, online_validation) = run("online", &[]);
    for (top, tolerance) in [(VOCABULARY, 2e-5), (8, f64::INFINITY)] {
        let (train, validation) = (format!("train-{top}"), format!("validation-{top}"));
        succeed(&borrowed(&teach(&workshop, "train.jsonl", &train, top)));
        succeed(&borrowed(&teach(&workshop, "validation.jsonl", &validation, top)));
        let (train, validation) = (workshop.path(&train), workshop.path(&validation));
        // The teacher is asked for validation alone: there the loss is whole.
        let (losses, whole) = run(&format!("half-{top}"), &["--train-targets", text(&train)]);
        assert_eq!(whole, online_validation);
        let more = ["--train-targets", text(&train), "--validation-targets", text(&validation)];
        let (again, seen) = run(&format!("run-{top}"), &more);
        assert_eq!(losses, again, "what validation looks at changes no update");
        for (step, (got, expected)) in losses.iter().zip(&online).enumerate() {
            assert!((got - expected).abs() <= tolerance * expected, "top {top}, step {step}: {got} and {expected}");
        }
        if top < VOCABULARY {
            assert!(seen > 0.0 && seen < online_validation, "{seen} of {online_validation}");
            assert!(losses[0] > 0.0 && losses[0] < online[0], "{} of {}", losses[0], online[0]);
        } else {
            assert!((seen - online_validation).abs() <= 2e-5 * online_validation, "{seen} of {online_validation}");
        }
    }
}

#[test]
fn killed_at_any_moment_it_ends_with_the_same_bytes() {
    let workshop = Workshop::new();
    write_documents(&workshop.path("many.jsonl"), 4000);
    succeed(&borrowed(&teach(&workshop, "many.jsonl", "whole", 20)));
    let whole = files_below(&workshop.path("whole"));
    let killed = workshop.path("killed");
    let mut kills = 0;
    for attempt in 0u64.. {
        assert!(attempt < 200, "it never ends");
        let mut child = grafter().args(teach(&workshop, "many.jsonl", "killed", 20)).spawn().unwrap();
        let start = Instant::now();
        // Later and later, so that it gets somewhere.
        let patience = Duration::from_millis(15 + 10 * attempt);
        let ended = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break Some(status);
            }
            if start.elapsed() > patience {
                break None;
            }
            sleep(Duration::from_millis(2));
        };
        match ended {
            Some(status) => {
                assert!(status.success());
                break;
            }
            None => {
                child.kill().unwrap();
                child.wait().unwrap();
                kills += 1;
            }
        }
    }
    assert!(kills >= 2, "it was killed {kills} times");
    let mut again = files_below(&killed);
    // Where it was killed is no part of what it says.
    assert_eq!(again.keys().collect::<Vec<_>>(), whole.keys().collect::<Vec<_>>());
    for (name, bytes) in &whole {
        if name != "progress.json" {
            assert!(again.remove(name).unwrap() == *bytes, "{name}");
        }
    }
    assert!(succeed(&borrowed(&teach(&workshop, "many.jsonl", "killed", 20))).contains("20 tokens listed of each"));
}

#[test]
fn targets_of_something_else_are_refused() {
    let workshop = Workshop::new();
    succeed(&borrowed(&teach(&workshop, "train.jsonl", "taught", 4)));
    let taught = workshop.path("taught");
    let distill = |run: &str, more: &[&str]| {
        let targets = ["--steps", "4", "--batch-size", "2", "--train-targets", text(&taught)];
        workshop.distill(run, &[&targets, more].concat())
    };
    let refused = |more: &[&str], expected: &str| {
        let said = fail(&borrowed(&distill("refused", more)));
        assert!(said.contains(expected), "{said}");
        assert!(!workshop.path("refused").join("checkpoints").exists());
    };
    refused(&["--temperature", "2"], "these targets were made at temperature 1, but loss.temperature is 2");
    refused(&["--sequence-length", "40"], "data.train_targets: these are targets of other rows");
    refused(&["--set", "loss.mixer_matching_weight=1"], "loss.mixer_matching_weight needs the teacher itself");
    refused(&["--divergence", "soft_cross_entropy"], "take \"forward_kl\"");
    let nowhere = workshop.path("nowhere");
    refused(&["--train-targets", text(&nowhere)], "holds no finished targets");
    let other = workshop.path("other");
    write_model(&other, VOCABULARY, 2);
    refused(&["--teacher", text(&other)], "these are another teacher's targets");

    succeed(&borrowed(&distill("run", &["--set", "checkpoint.every=2"])));
    let said = fail(&borrowed(&teach(&workshop, "train.jsonl", "taught", 5)));
    assert!(said.contains("began differently: top was 4, is now 5"), "{said}");
    let said = fail(&borrowed(&teach(&workshop, "train.jsonl", "too-many", VOCABULARY + 1)));
    assert!(said.contains("--top is 259: the teacher's vocabulary has 258 tokens"), "{said}");

    // A changed byte, a cut, and other targets in the middle of a run.
    let path = taught.join("targets.bin");
    let whole = fs::read(&path).unwrap();
    let mut changed = whole.clone();
    changed[whole.len() / 2] ^= 1;
    fs::write(&path, &changed).unwrap();
    refused(&[], "was changed (checksum differs)");
    fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    refused(&[], "was it cut off?");
    fs::write(&path, &whole).unwrap();
    fs::remove_dir_all(workshop.path("run").join("model")).unwrap();
    let description: Value = serde_json::from_slice(&fs::read(taught.join("targets.json")).unwrap()).unwrap();
    assert_eq!((description["top"].clone(), description["sequence_length"].clone()), (json!(4), json!(32)));
    fs::remove_dir_all(&taught).unwrap();
    succeed(&borrowed(&teach(&workshop, "train.jsonl", "taught", 5)));
    let said = fail(&borrowed(&distill("run", &["--set", "checkpoint.every=2"])));
    assert!(said.contains("these are not the targets that the run began with"), "{said}");
}
