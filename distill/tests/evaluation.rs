//! `grafter eval` on questions.

#![allow(clippy::unwrap_used)] // Helpers of tests fail as tests do.

mod support;

use std::fs;
use std::path::Path;

use autograd::Tape;
use model::tokenizer::Tokenizer;
use model::{Model, TokenBatch};
use runtime::Device;
use serde_json::{Value, json};
use support::{Workshop, fail, files_below, run, succeed, text};

fn write_lines(path: &Path, lines: &[Value]) {
    let lines: Vec<String> = lines.iter().map(Value::to_string).collect();
    fs::write(path, lines.join("\n") + "\n").unwrap();
}

fn parse(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

/// The sum of the log-probabilities of the last `count` tokens, from the model's logits in f64.
fn log_likelihood(model: &Model, tokens: &[u32], count: usize) -> f64 {
    let batch = TokenBatch::new(&Device::cpu(), &[tokens.to_vec()], None).unwrap();
    let logits = model.logits(&Tape::inference(), &batch).unwrap().to_vec::<f32>().unwrap();
    let vocabulary = logits.len() / tokens.len();
    (tokens.len() - count..tokens.len())
        .map(|at| {
            let row = &logits[(at - 1) * vocabulary..at * vocabulary];
            let sum: f64 = row.iter().map(|logit| f64::from(*logit).exp()).sum();
            f64::from(row[tokens[at] as usize]) - sum.ln()
        })
        .sum()
}

#[test]
fn the_likeliest_choice_is_chosen_in_each_of_three_ways() {
    let workshop = Workshop::new();
    let (teacher, data, out) =
        (workshop.path("teacher"), workshop.path("questions.jsonl"), workshop.path("deep/out.json"));
    let words = ["one", "two and a half", "three", "x", "seven eight nine", "ten!"];
    let lines: Vec<Value> = (0..11)
        .map(|index| {
            let choices: Vec<&str> = (0..2 + index % 3).map(|choice| words[(index + choice) % words.len()]).collect();
            let answer = if index % 4 == 0 { json!("B") } else { json!(index % choices.len()) };
            let task = if index % 2 == 0 { "odd" } else { "even" };
            json!({ "id": index, "task": task, "question": format!("What is {index}?"), "choices": choices, "answer": answer })
        })
        .collect();
    write_lines(&data, &lines);
    let arguments = ["eval", text(&teacher), "--task", "multiple-choice", "--data", text(&data), "--json"];
    let results = parse(&succeed(&[&arguments[..], &["--out", text(&out)]].concat()));
    assert_eq!(results, parse(&fs::read_to_string(&out).unwrap()));
    let cut = parse(&succeed(&[&arguments[..], &["--sequence-length", "64", "--batch-size", "3"]].concat()));
    assert_eq!(cut["metrics"], results["metrics"]);

    let (model, tokenizer) =
        (Model::load(&teacher, &Device::cpu(), model::Precision::F32).unwrap(), Tokenizer::load(&teacher).unwrap());
    let mut right = [0.0; 3];
    for (line, item) in lines.iter().zip(results["items"].as_array().unwrap()) {
        let prompt = format!("Question: {}\nAnswer:", line["question"].as_str().unwrap());
        assert_eq!(item["prompt"], prompt);
        // One token is one byte in this vocabulary.
        let scores: Vec<[f64; 3]> = line["choices"]
            .as_array()
            .unwrap()
            .iter()
            .zip(item["choices"].as_array().unwrap())
            .map(|(choice, scored)| {
                let choice = choice.as_str().unwrap();
                let tokens = tokenizer.encode(&format!("{prompt} {choice}"), false).unwrap();
                let expected = log_likelihood(&model, &tokens, choice.len() + 1);
                let got = scored["log_likelihood"].as_f64().unwrap();
                assert!((got - expected).abs() < 1e-4 * expected.abs(), "{got} and {expected}");
                assert_eq!((&scored["tokens"], &scored["bytes"]), (&json!(choice.len() + 1), &json!(choice.len())));
                [expected, expected / (choice.len() + 1) as f64, expected / choice.len() as f64]
            })
            .collect();
        let answer = line["answer"].as_u64().unwrap_or(1) as usize;
        for (way, name) in ["chosen", "chosen_per_token", "chosen_per_byte"].into_iter().enumerate() {
            let best = (0..scores.len()).max_by(|a, b| scores[*a][way].total_cmp(&scores[*b][way])).unwrap();
            assert_eq!(item[name], best, "{name} of {item}");
            right[way] += f64::from(best == answer) / lines.len() as f64;
        }
    }
    for (way, name) in ["accuracy", "accuracy_per_token", "accuracy_per_byte"].into_iter().enumerate() {
        assert!((results["metrics"][name].as_f64().unwrap() - right[way]).abs() < 1e-12);
    }
    assert_eq!(
        (&results["by_task"]["odd"]["questions"], &results["by_task"]["even"]["questions"]),
        (&json!(6.0), &json!(5.0))
    );
    assert!(succeed(&arguments[..6]).contains("(11 questions)"));
}

#[test]
fn written_answers_are_found_and_counted() {
    let folder = tempfile::tempdir().unwrap();
    let world = folder.path().join("world");
    succeed(&["demo", "--export", text(&world)]);
    let (teacher, problems) = (world.join("teacher"), world.join("validation.jsonl"));
    let arguments = |more: &[&str]| {
        let common = [
            "eval",
            text(&teacher),
            "--task",
            "generation",
            "--data",
            text(&problems),
            "--limit",
            "24",
            "--max-tokens",
            "40",
            "--json",
        ];
        parse(&succeed(&[&common[..], more].concat()))
    };
    let one = arguments(&[]);
    assert_eq!(one["metrics"]["exact_match"], 1.0, "{one}");
    let batched = arguments(&["--batch-size", "8", "--extract", "regex:A:(-?[0-9]+)"]);
    // Whole solutions are right answers in these data, and "30" is not the whole of one.
    assert_eq!(batched["metrics"]["exact_match"], 0.0);
    let extracted: Vec<&str> = batched["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|item| item["answers"][0]["extracted"].as_str().unwrap())
        .collect();
    for (item, extracted) in one["items"].as_array().unwrap().iter().zip(extracted) {
        assert!(item["answers"][0]["text"].as_str().unwrap().ends_with(&format!("A:{extracted}")), "{item}");
    }

    let several = || arguments(&["--samples", "4", "--temperature", "3", "--seed", "5", "--batch-size", "4"]);
    let samples = several();
    let metric = |name: &str| samples["metrics"][name].as_f64().unwrap();
    let right: Vec<usize> = samples["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|item| item["answers"].as_array().unwrap().iter().filter(|answer| answer["right"] == true).count())
        .collect();
    let mean = |of: &dyn Fn(usize) -> f64| right.iter().map(|&right| of(right)).sum::<f64>() / right.len() as f64;
    assert!((metric("pass@1") - mean(&|right| right as f64 / 4.0)).abs() < 1e-12);
    assert!((metric("pass@4") - mean(&|right| f64::from(right > 0))).abs() < 1e-12);
    assert!(
        metric("pass@1") < 1.0 && metric("pass@1") <= metric("pass@2") && metric("pass@2") <= metric("pass@4"),
        "{samples}"
    );
    assert_eq!(samples, several(), "the same seed gives the same answers");
}

#[test]
fn questions_that_are_none_and_flags_that_make_no_sense_are_named() {
    let workshop = Workshop::new();
    let (teacher, data, out) = (workshop.path("teacher"), workshop.path("questions.jsonl"), workshop.path("out.json"));
    let refused = |task: &str, line: &str, more: &[&str]| {
        let good = r#"{"question":"a?","choices":["b","c"],"answer":0}"#;
        fs::write(&data, format!("{good}\n{line}\n")).unwrap();
        let common = ["eval", text(&teacher), "--task", task, "--data", text(&data), "--out", text(&out)];
        let said = fail(&[&common[..], more].concat());
        assert!(!out.exists());
        said
    };
    let choice = |line: &str| refused("multiple-choice", line, &[]);
    assert!(choice("{").contains("questions.jsonl line 2: not a question"));
    assert!(choice(r#"{"question":"a?","choices":["b","c"]}"#).contains("line 2: a multiple-choice question has"));
    assert!(
        choice(r#"{"question":"a?","choices":["b","c"],"answer":2}"#).contains("its \"answer\" is none of its choices")
    );
    assert!(choice(r#"{"question":"a?","choices":["b",""],"answer":0}"#).contains("a choice is empty"));
    let long = refused("multiple-choice", "", &["--sequence-length", "8"]);
    assert!(long.contains("line 1: choice 1 takes") && long.contains("--sequence-length"), "{long}");
    assert!(refused("generation", r#"{"question":"a?"}"#, &[]).contains("line 2: a question has"));
    assert!(refused("generation", "", &["--samples", "2"]).contains("give a --temperature"));
    assert!(refused("generation", "", &["--prompt", "Q:"]).contains("where the question goes"));
    assert!(refused("generation", "", &["--temperature", "0"]).contains("temperature"));
    let usage = run(&["eval", text(&teacher), "--task", "generation", "--data", "x", "--extract", "regex:("]);
    assert_eq!(usage.status.code(), Some(2));
}

#[test]
fn places_that_cannot_be_written_are_named_before_the_work() {
    let workshop = Workshop::new();
    let (data, folder) = (workshop.path("train.jsonl"), workshop.path("teacher"));
    let before = files_below(&workshop.path("."));
    let below_a_file = data.join("out");
    // What they are to work on is not there either: the place comes first.
    let (nowhere, out) = (workshop.path("nowhere"), text(&below_a_file));
    let nowhere = text(&nowhere);
    let eval = ["eval", nowhere, "--task", "generation", "--data", text(&data)];
    for arguments in [
        &[&eval[..], &["--out", out]].concat()[..],
        &["report", nowhere, "--out", out],
        &["report", nowhere, nowhere, "--out", out],
        &["report", "--models", nowhere, "--out", out],
        &["rank", nowhere, "--method", "loo", "--data", text(&data), "--out", out],
        &["teach", nowhere, "--data", text(&data), "--out", out],
    ] {
        let said = fail(arguments);
        assert!(
            said.contains("error: --out: writing ") && said.contains("train.jsonl is no folder: name another"),
            "{said}"
        );
    }
    for arguments in [&eval[..], &["report", nowhere]] {
        let said = fail(&[arguments, &["--out", text(&folder)]].concat());
        assert!(said.contains("teacher: it is a folder: name a file"), "{said}");
    }
    assert_eq!(files_below(&workshop.path(".")), before);
}
