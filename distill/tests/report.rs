//! `grafter report`: what is there is shown, what is not is left out, and nothing that comes from files is obeyed.

#![allow(clippy::unwrap_used)] // Helpers of tests fail as tests do.

mod support;

use std::fs;
use std::path::Path;

use serde_json::json;
use support::{Workshop, borrowed, fail, succeed, text, write_documents};

/// Trains two stages, the first ranked, the second named.
fn staged(workshop: &Workshop) -> std::path::PathBuf {
    let more =
        ["--schedule", "1,[0,1,2,3]", "--rank", "mmr", "--rank-steps", "3", "--steps", "12", "--batch-size", "4"];
    let mut arguments = workshop.distill("run", &[&more[..], &["--evaluation-every", "4"]].concat());
    let at = arguments.iter().position(|argument| argument == "--layers").unwrap();
    arguments.drain(at..at + 2);
    succeed(&borrowed(&arguments));
    workshop.path("run")
}

/// The page of a folder, which holds itself together: it asks for nothing, and runs nothing.
fn page(folder: &Path) -> String {
    let out = folder.join("report.html");
    assert_eq!(succeed(&["report", text(folder)]), format!("report  {}\n", out.display()));
    let html = fs::read_to_string(out).unwrap();
    for forbidden in ["<script", "<img", "<link", "src=", "href=", "url(", "@import", "NaN", "inf<"] {
        assert!(!html.contains(forbidden), "{forbidden} in {html}");
    }
    assert!(html.starts_with("<!doctype html>") && html.contains("name=\"viewport\""), "{html}");
    for (open, close) in [("<table", "</table>"), ("<svg", "</svg>"), ("<figure", "</figure>"), ("<div", "</div>")] {
        assert_eq!(html.matches(open).count(), html.matches(close).count(), "{open}");
    }
    assert_eq!(html.matches("<svg").count(), html.matches("<svg role=\"img\" aria-label=").count());
    assert_eq!(html.matches("<table").count(), html.matches("<caption>").count());
    html
}

fn all(html: &str, expected: &[&str]) {
    for expected in expected {
        assert!(html.contains(expected), "{expected} is missing in {html}");
    }
}

#[test]
fn a_run_in_stages_shows_everything() {
    let workshop = Workshop::new();
    let run = staged(&workshop);
    let evaluations = run.join("evaluations");
    fs::create_dir(&evaluations).unwrap();
    let evil = "<script>alert(1)</script>";
    for (name, answer) in [("before", "5"), ("after", evil)] {
        let evaluation = json!({
            "task": evil, "metrics": { "accuracy": 0.25, "accuracy_standard_error": 0.01, evil: 3, "words": "not a number" },
            "samples": [{ "of": "another form" }, { "prompt": "2+2", "expected": 4, "answer": answer, "right": false }],
        });
        fs::write(evaluations.join(format!("{name}.json")), evaluation.to_string()).unwrap();
    }
    fs::write(evaluations.join("<b>.json"), "{}").unwrap();
    // As `grafter eval` writes it.
    let questions = workshop.path("questions.jsonl");
    fs::write(&questions, "{\"question\": \"one\", \"choices\": [\"two\", \"six\"], \"answer\": 1}\n").unwrap();
    let (model, out) = (run.join("model"), evaluations.join("choice.json"));
    let eval = ["eval", text(&model), "--task", "multiple-choice", "--data", text(&questions), "--out", text(&out)];
    succeed(&eval);
    // A ranking of the teacher beside the run, and one of another model, which is not the run's.
    let (teacher, data) = (workshop.path("teacher"), workshop.path("validation.jsonl"));
    let ranking = workshop.path("beside");
    let rank = ["rank", text(&teacher), "--method", "mse", "--data", text(&data), "--sequence-length", "32"];
    succeed(&[&rank[..], &["--out", text(&ranking)]].concat());
    let other = workshop.path("other");
    support::write_model(&other, support::VOCABULARY, 2);
    let foreign = workshop.path("foreign");
    let rank = ["rank", text(&other), "--method", "mse", "--data", text(&data), "--sequence-length", "32"];
    succeed(&[&rank[..], &["--out", text(&foreign)]].concat());

    let html = page(&run);
    all(&html, &["<h2>Stages</h2>", "<h2>Curves</h2>", "<h2>Importance of layers</h2>", "<h2>Evaluation</h2>"]);
    all(&html, &["<h2>Samples</h2>", "<h2>Throughput</h2>", "<h2>Configuration</h2>", "· finished", "4 of 4"]);
    all(
        &html,
        &["Ranking before stage 1", "Change of rank, before stage 1", "Ranking beside", ">0.2500 ± 0.0100<", "✗ 5"],
    );
    all(&html, &["&lt;script&gt;alert(1)&lt;/script&gt;", "evaluations/&lt;b&gt;.json is not an evaluation"]);
    all(&html, &["Task: multiple-choice; 1 of 1 questions", "<td>six</td>"]);
    all(&html, &["12 / 12", "new Mamba mixers", "the teacher&#39;s attention", "rank_steps = 3"]);
    assert!(!html.contains("Ranking foreign") && !html.contains("Ranking before stage 2"), "{html}");
    // Loss, gradients, rate, bars and slopes before stage 1, bars beside, tokens per second.
    assert_eq!(html.matches("<svg").count(), 7);
    // Training loss of both stages, its mean, and the validation loss of both: each stage a line of its own.
    let loss = &html[html.find("<figcaption>Loss").unwrap()..html.find("<figcaption>Gradient norm").unwrap()];
    assert_eq!(loss.matches("<circle").count(), 2 * 4, "a look before each stage, and three in it");

    let alone = page(&ranking);
    assert!(alone.contains("a ranking of layers (mse)") && alone.matches("<svg").count() == 1, "{alone}");
}

#[test]
fn a_run_that_goes_on_shows_what_it_has_done() {
    let workshop = Workshop::new();
    let run = staged(&workshop);
    let second = run.join("stage-02/run");
    fs::remove_dir_all(run.join("model")).unwrap();
    fs::remove_dir_all(second.join("model")).unwrap();
    let metrics = fs::read_to_string(second.join("metrics.jsonl")).unwrap();
    let torn: Vec<&str> = metrics.lines().take(7).collect();
    fs::write(second.join("metrics.jsonl"), torn.join("\n") + "\n{\"step\": 7, \"lo").unwrap();
    // One validation before, four steps, one validation, one step.
    all(&page(&run), &["not finished: 17 of 24 updates so far", "5 / 12"]);
    fs::remove_file(second.join("timing.jsonl")).unwrap();
    fs::remove_file(second.join("metrics.jsonl")).unwrap();
    all(&page(&run), &["not finished: 12 of 24 updates so far", "0 / 12"]);
    // The teacher may have been moved since.
    fs::remove_dir_all(workshop.path("teacher")).unwrap();
    all(&page(&run), &["not finished: 12 of 24 updates so far"]);
    fs::remove_file(run.join("stages.json")).unwrap();
    all(&page(&run), &["its layers are being ranked", "0 of 24 updates"]);
}

#[test]
fn runs_without_stages_or_validation_data_have_a_page() {
    let workshop = Workshop::new();
    let mut arguments = workshop.distill("single", &["--steps", "4", "--batch-size", "4", "--trainable", "mixers"]);
    let at = arguments.iter().position(|argument| argument == "--validation").unwrap();
    arguments.drain(at..at + 2);
    succeed(&borrowed(&arguments));
    let html = page(&workshop.path("single"));
    all(&html, &["distillation", "1, 3", "training batches", "shared with the teacher where equal", "2 of 4"]);
    let (teacher, data, run) = (workshop.path("teacher"), workshop.path("more.jsonl"), workshop.path("train"));
    write_documents(&data, 40);
    let train = ["train", "--source", text(&teacher), "--train", text(&data), "--run", text(&run)];
    let more = ["--steps", "3", "--batch-size", "2", "--sequence-length", "32"];
    succeed(&[&train[..], &more].concat());
    let html = page(&run);
    all(&html, &["training of ", "3 / 3", "<h2>Throughput</h2>"]);
    assert!(!html.contains("becomes Mamba") && !html.contains("Importance"), "{html}");
}

#[test]
fn folders_that_are_no_runs_and_files_that_are_not_ours_are_named() {
    let workshop = Workshop::new();
    let message = fail(&["report", text(&workshop.path("nowhere"))]);
    assert!(message.contains("nowhere is no folder: give the folder of a run"), "{message}");
    let message = fail(&["report", text(&workshop.path("teacher"))]);
    assert!(message.contains("teacher is neither a run's folder (it has no config.toml)"), "{message}");
    assert!(!workshop.path("teacher").join("report.html").exists());
    succeed(&borrowed(&workshop.distill("run", &["--steps", "2", "--batch-size", "2"])));
    let run = workshop.path("run");
    let below_a_file = run.join("config.toml").join("page.html");
    let message = fail(&["report", text(&run), "--out", text(&below_a_file)]);
    assert!(message.contains("config.toml is no folder: name another place"), "{message}");
    let new = workshop.path("new folder").join("page.html");
    succeed(&["report", text(&run), "--out", text(&new)]);
    assert!(new.exists());
    let metrics = run.join("metrics.jsonl");
    fs::write(&metrics, format!("nonsense\n{}", fs::read_to_string(&metrics).unwrap())).unwrap();
    let message = fail(&["report", text(&run)]);
    assert!(message.contains("metrics.jsonl line 1 is not what this version writes"), "{message}");
    assert!(!run.join("report.html").exists());
}
