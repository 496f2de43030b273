//! `grafter rank`: what it finds, and that it goes on where it was ended.

#![allow(clippy::unwrap_used)] // Helpers of tests fail as tests do.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::{Workshop, borrowed, fail, files_below, grafter, run, stderr, succeed, text};

fn arguments(workshop: &Workshop, out: &str, more: &[&str]) -> Vec<String> {
    let mut arguments = vec!["rank".to_owned(), text(&workshop.path("teacher")).to_owned()];
    arguments.extend(["--out".to_owned(), text(&workshop.path(out)).to_owned()]);
    arguments.extend(more.iter().map(|argument| (*argument).to_owned()));
    if !more.contains(&"--data") {
        arguments.extend(["--data".to_owned(), text(&workshop.path("train.jsonl")).to_owned()]);
    }
    arguments.extend(["--sequence-length".to_owned(), "32".to_owned()]);
    arguments
}

fn ranking(folder: &Path) -> Value {
    serde_json::from_slice(&fs::read(folder.join("ranking.json")).unwrap()).unwrap()
}

fn scores(ranking: &Value, key: &str) -> Vec<f64> {
    ranking["scores"].as_array().unwrap().iter().map(|score| score[key].as_f64().unwrap()).collect()
}

/// Everything but packed data.
fn result(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = files_below(folder);
    files.retain(|name, _| !name.starts_with("data/"));
    files
}

#[test]
fn every_method_scores_every_layer_and_draws_it() {
    let workshop = Workshop::new();
    for (method, more, plots) in [
        ("loo", vec![], vec!["importance.svg"]),
        ("mse", vec![], vec!["importance.svg"]),
        ("mmr", vec!["--steps", "3", "--batch-size", "4"], vec!["importance.svg", "change-of-rank.svg"]),
    ] {
        let mut more = more.clone();
        more.extend(["--method", method]);
        let said = succeed(&borrowed(&arguments(&workshop, method, &more)));
        assert!(said.contains("least important first: ") && said.contains("passes of a layer instead of"), "{said}");
        let ranking = ranking(&workshop.path(method));
        let scores = scores(&ranking, "score");
        assert!(scores.len() == 4 && scores.iter().all(|score| score.is_finite()), "{method}: {scores:?}");
        let order = ranking["least_important_first"].as_array().unwrap();
        let ordered: Vec<f64> = order.iter().map(|layer| scores[layer.as_u64().unwrap() as usize]).collect();
        assert!(ordered.is_sorted(), "{method}: {ordered:?}");
        assert_eq!(ranking["hashes"]["data"].as_str().unwrap().len(), 64);
        assert_eq!(ranking["settings"]["method"], method);
        for plot in plots {
            let drawing = fs::read_to_string(workshop.path(method).join(plot)).unwrap();
            assert!(drawing.starts_with("<svg ") && drawing.contains("layer"), "{drawing}");
        }
    }
    succeed(&borrowed(&arguments(&workshop, "aligned", &["--method", "mse", "--init", "aligned"])));
    assert_eq!(ranking(&workshop.path("aligned"))["settings"]["init"], "aligned");
    // What a finished ranking's command is asked again it answers from the folder.
    let again = run(&borrowed(&arguments(&workshop, "loo", &["--method", "loo", "--json"])));
    assert!(stderr(&again).contains("is finished"), "{}", stderr(&again));
    assert_eq!(serde_json::from_slice::<Value>(&again.stdout).unwrap(), ranking(&workshop.path("loo")));
}

#[test]
fn scores_of_replacement_do_not_depend_on_what_learns_together() {
    let workshop = Workshop::new();
    let mut found = Vec::new();
    for together in ["1", "3", "4"] {
        let out = format!("together-{together}");
        let more =
            ["--method", "mmr", "--steps", "6", "--batch-size", "4", "--learning-rate", "1e-2", "--together", together];
        succeed(&borrowed(&arguments(&workshop, &out, &more)));
        found.push(ranking(&workshop.path(&out)));
    }
    assert_eq!(found[0]["scores"], found[1]["scores"]);
    assert_eq!(found[0]["scores"], found[2]["scores"]);
    let (start, end) = (scores(&found[0], "score_at_start"), scores(&found[0], "score"));
    assert!(start.iter().zip(&end).all(|(start, end)| end < start), "nothing was learned: {start:?} {end:?}");
    let passes = |ranking: &Value| ranking["cost"]["layer_passes"].as_u64().unwrap();
    assert!(passes(&found[2]) < passes(&found[0]), "a shared trunk saves something");
}

#[test]
fn questions_and_answers_are_metrics_too() {
    let workshop = Workshop::new();
    let questions: String = (0..6)
        .map(|index| {
            let question = format!("{index} and {index}?");
            json!({ "question": question, "choices": ["no", "yes", "it may be"], "answer": index % 3 }).to_string()
                + "\n"
        })
        .collect();
    fs::write(workshop.path("questions.jsonl"), questions).unwrap();
    let data = workshop.path("questions.jsonl");
    let more = ["--method", "loo", "--metric", "accuracy", "--data", text(&data)];
    let mut accuracy = arguments(&workshop, "accuracy", &more);
    let last = accuracy.len() - 1;
    accuracy[last] = "64".to_owned();
    succeed(&borrowed(&accuracy));
    let baseline = ranking(&workshop.path("accuracy"))["baseline"].as_f64().unwrap();
    assert!((0.0..=1.0).contains(&baseline) && (baseline * 6.0).fract() < 1e-9, "{baseline}");
    let message = fail(&borrowed(&arguments(&workshop, "short", &more)));
    assert!(message.contains("questions.jsonl line ") && message.contains("greater --sequence-length"), "{message}");

    let answers: String =
        (0..3).map(|index| json!({ "question": format!("{index}?"), "answer": "yes" }).to_string() + "\n").collect();
    fs::write(workshop.path("answers.jsonl"), answers).unwrap();
    let data = workshop.path("answers.jsonl");
    let more = ["--method", "loo", "--metric", "exact-match", "--max-tokens", "3", "--data", text(&data)];
    succeed(&borrowed(&arguments(&workshop, "exact", &more)));
    assert_eq!(ranking(&workshop.path("exact"))["scores"].as_array().unwrap().len(), 4);
    let wrong = ["--method", "loo", "--metric", "accuracy", "--data", text(&data)];
    let message = fail(&borrowed(&arguments(&workshop, "wrong", &wrong)));
    assert!(message.contains("answers.jsonl line 1") && message.contains("\"choices\""), "{message}");
}

#[test]
fn a_ranking_that_was_killed_goes_on_to_the_same_bytes() {
    let workshop = Workshop::new();
    for more in [
        ["--method", "mmr", "--steps", "30", "--batch-size", "8", "--together", "1"].as_slice(),
        ["--method", "loo", "--samples", "40", "--micro-batch", "1"].as_slice(),
    ] {
        let method = more[1];
        let whole = format!("{method}-whole");
        succeed(&borrowed(&arguments(&workshop, &whole, more)));
        let expected = result(&workshop.path(&whole));
        let name = format!("{method}-killed");
        let folder = workshop.path(&name);
        let command = arguments(&workshop, &name, more);
        let lines =
            || fs::read(folder.join("layers.jsonl")).unwrap_or_default().iter().filter(|b| **b == b'\n').count();
        let mut ended = 0;
        for (index, signal) in ["-KILL", "-INT", "-KILL", "-TERM", "-KILL"].into_iter().enumerate() {
            let mut child = grafter().args(&command).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            let target = (lines() + 1).min(4);
            let deadline = Instant::now() + Duration::from_secs(60);
            while child.try_wait().unwrap().is_none() && lines() < target {
                assert!(Instant::now() < deadline, "the ranking does not get on");
                std::thread::sleep(Duration::from_micros(300 * (index as u64 + 1)));
            }
            assert!(
                Command::new("kill").args([signal, &child.id().to_string()]).stderr(Stdio::null()).status().is_ok()
            );
            let status = child.wait().unwrap();
            ended += usize::from(!status.success());
            assert!(status.code().is_none_or(|code| code == 3 || code == 0), "{status:?}");
        }
        assert!(ended >= 2, "{method}: the ranking was ended {ended} times only");
        succeed(&borrowed(&command));
        let found = result(&folder);
        assert!(found.keys().eq(expected.keys()), "{:?} instead of {:?}", found.keys(), expected.keys());
        for (file, bytes) in &expected {
            assert!(&found[file] == bytes, "{method}: {file} differs");
        }
    }
}

#[test]
fn what_changed_is_named() {
    let workshop = Workshop::new();
    let command = arguments(&workshop, "ranking", &["--method", "loo"]);
    succeed(&borrowed(&command));
    let before = files_below(&workshop.path("ranking"));
    let other = fail(&borrowed(&arguments(&workshop, "ranking", &["--method", "loo", "--samples", "3"])));
    assert!(other.contains("samples was 16, is now 3"), "{other}");
    support::write_documents(&workshop.path("train.jsonl"), 91);
    let other = fail(&borrowed(&command));
    assert!(other.contains("the data's SHA-256 was "), "{other}");
    assert_eq!(files_below(&workshop.path("ranking")), before);
    let of_train = fail(&borrowed(&arguments(&workshop, "none", &["--method", "mse", "--init", "random"])));
    assert!(of_train.contains("--init: random and weights are for `grafter train`; use paper,"), "{of_train}");
    let missing = fail(&borrowed(&arguments(&workshop, "none", &["--method", "mse", "--layers", "4"])));
    assert!(missing.contains("layer 4 does not exist: the model has layers 0 to 3"), "{missing}");
    assert!(!workshop.path("none").exists());
}
