//! Runs that are interrupted and killed, and continue to the same bits.

#![allow(clippy::unwrap_used)] // Helpers of tests fail as tests do.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use support::{Workshop, borrowed, fail, files_below, grafter, run, stderr, succeed, text};

const STEPS: u64 = 40;
const RUN: [&str; 10] =
    ["--steps", "40", "--batch-size", "16", "--micro-batch", "5", "--checkpoint-every", "4", "--evaluation-every", "6"];

/// What must be equal bit for bit: everything but what holds clock times, and of the checkpoints the last.
fn result(run: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = files_below(run);
    files.remove("timing.jsonl").expect("timing.jsonl is written");
    files.remove(support::EVENTS).expect("the event file is written");
    support::check_events(run);
    files.retain(|name, _| !name.starts_with("checkpoints/") || name.starts_with("checkpoints/step-000040/"));
    assert!(files.keys().all(|name| !name.contains("partial")), "leftovers: {:?}", files.keys());
    for name in [
        "config.toml",
        "metrics.jsonl",
        "model/config.json",
        "model/model.safetensors",
        "model/tokenizer.json",
        "checkpoints/step-000040/weights.safetensors",
        "checkpoints/step-000040/optimizer.safetensors",
        "checkpoints/step-000040/state.json",
    ] {
        assert!(files.contains_key(name), "{name} is missing");
    }
    files
}

/// Compares by name first, so that a failure does not print megabytes.
fn assert_same(found: &BTreeMap<String, Vec<u8>>, expected: &BTreeMap<String, Vec<u8>>, after: &str) {
    assert!(found.keys().eq(expected.keys()), "{after}: {:?} instead of {:?}", found.keys(), expected.keys());
    for (name, bytes) in expected {
        assert!(&found[name] == bytes, "{after}: {name} differs");
    }
}

fn start(arguments: &[String]) -> Child {
    grafter().args(arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

fn count_lines(run: &Path) -> usize {
    fs::read(run.join("metrics.jsonl")).unwrap_or_default().iter().filter(|&&byte| byte == b'\n').count()
}

/// Waits until the loss log has `lines` lines; whether the process still runs then.
fn wait_for_lines(child: &mut Child, run: &Path, lines: usize) -> bool {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if count_lines(run) >= lines {
            return child.try_wait().unwrap().is_none();
        }
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        assert!(Instant::now() < deadline, "the run does not get on");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn signal(child: &Child, name: &str) {
    assert!(Command::new("kill").args([name, &child.id().to_string()]).status().unwrap().success());
}

fn reference(workshop: &Workshop) -> BTreeMap<String, Vec<u8>> {
    reference_of(workshop, &RUN)
}

fn reference_of(workshop: &Workshop, arguments: &[&str]) -> BTreeMap<String, Vec<u8>> {
    succeed(&borrowed(&workshop.distill("whole", arguments)));
    result(&workshop.path("whole"))
}

#[test]
fn a_run_ended_by_a_signal_continues_to_the_same_bits() {
    let workshop = Workshop::new();
    let expected = reference(&workshop);
    let lines = String::from_utf8(expected["metrics.jsonl"].clone()).unwrap();
    // 40 updates; validation before the first, after each sixth and after the last.
    assert_eq!(lines.lines().count(), 40 + 8);
    let name = "interrupted";
    let folder = workshop.path(name);
    let arguments = workshop.distill(name, &RUN);
    let mut last_step = 0;
    for (signal_name, lines_more) in [("-INT", 3), ("-TERM", 7), ("-HUP", 4), ("-INT", 1), ("-TERM", 6)] {
        let lines = count_lines(&folder) + lines_more;
        let mut child = start(&arguments);
        assert!(wait_for_lines(&mut child, &folder, lines), "the run ended before the signal");
        signal(&child, signal_name);
        let output = child.wait_with_output().unwrap();
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(3), "{said}");
        let by = signal_name.replace('-', "SIG");
        assert!(said.contains(&format!("interrupted by {by} after step ")), "{said}");
        assert!(said.contains("the same command continues"), "{said}");
        let step: u64 = fs::read_dir(folder.join("checkpoints"))
            .unwrap()
            .filter_map(|entry| entry.unwrap().file_name().to_str().unwrap().strip_prefix("step-")?.parse().ok())
            .max()
            .unwrap();
        assert!((last_step + 1..STEPS).contains(&step), "{step} after {last_step}");
        assert!(!folder.join("model").exists());
        last_step = step;
    }
    let output = run(&borrowed(&arguments));
    assert!(output.status.success());
    assert!(stderr(&output).contains(&format!("continuing after step {last_step} from ")), "{}", stderr(&output));
    assert_same(&result(&folder), &expected, "after five signals");

    // A run that is finished stays as it is.
    let before = files_below(&folder);
    let output = run(&borrowed(&arguments));
    assert!(output.status.success() && stderr(&output).contains("all 40 updates are made"));
    assert_same(&files_below(&folder), &before, "after a call on a finished run");
}

#[test]
fn a_run_that_is_to_outlive_its_terminal_does() {
    let workshop = Workshop::new();
    let folder = workshop.path("run");
    let arguments = workshop.distill("run", &RUN);
    // What nohup does.
    let script = "trap '' HUP; exec \"$0\" \"$@\"";
    let mut command = Command::new("bash");
    command.args(["-c", script, env!("CARGO_BIN_EXE_grafter")]).args(&arguments);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    assert!(wait_for_lines(&mut child, &folder, 3), "the run ended before the signal");
    signal(&child, "-HUP");
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(folder.join("model").exists());
}

#[test]
fn a_signal_while_documents_are_packed_ends_the_run_at_once_and_leaves_nothing() {
    let workshop = Workshop::new();
    let folder = workshop.path("run");
    // Packing takes seconds, and is ended long before.
    support::write_documents(&workshop.path("train.jsonl"), 400_000);
    let arguments = workshop.distill("run", &["--steps", "2"]);
    for (signal_name, by) in [("-INT", "SIGINT"), ("-TERM", "SIGTERM"), ("-HUP", "SIGHUP")] {
        let mut child = start(&arguments);
        let mut said = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.starts_with("packing ") {
            line.clear();
            assert!(said.read_line(&mut line).unwrap() > 0, "the run ended before it packed");
        }
        signal(&child, signal_name);
        let signalled = Instant::now();
        let mut rest = String::new();
        said.read_to_string(&mut rest).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(3), "{rest}");
        assert!(
            rest.contains(&format!("interrupted by {by} before the first step; the same command begins it")),
            "{rest}"
        );
        assert!(signalled.elapsed() < Duration::from_secs(1), "{:?}", signalled.elapsed());
        assert!(!folder.exists(), "{:?}", files_below(&folder).keys());
    }
    support::write_documents(&workshop.path("train.jsonl"), 90);
    succeed(&borrowed(&arguments));
}

#[test]
fn a_run_killed_at_any_moment_continues_to_the_same_bits() {
    let workshop = Workshop::new();
    let expected = reference(&workshop);
    let folder = workshop.path("killed");
    let arguments = workshop.distill("killed", &RUN);
    let mut kills = 0;
    let mut delay = 7;
    while kills < 25 {
        let mut child = start(&arguments);
        delay = delay * 61 % 149;
        std::thread::sleep(Duration::from_millis(delay));
        let finished = child.try_wait().unwrap().is_some();
        let _ = child.kill();
        child.wait().unwrap();
        if finished {
            break;
        }
        kills += 1;
    }
    assert!(kills >= 5, "only {kills} kills");
    succeed(&borrowed(&arguments));
    assert_same(&result(&folder), &expected, &format!("after {kills} kills"));
}

#[test]
fn a_run_killed_while_it_saves_continues_to_the_same_bits() {
    let workshop = Workshop::new();
    let every_step = [&RUN[..], &["--checkpoint-every", "1"]].concat();
    let expected = reference_of(&workshop, &every_step);
    let folder = workshop.path("killed");
    let arguments = workshop.distill("killed", &every_step);
    let is_saving = || {
        [folder.join("checkpoints"), folder.clone()].iter().any(|folder| {
            let entries = fs::read_dir(folder).into_iter().flatten();
            entries.flatten().any(|entry| entry.file_name().to_string_lossy().ends_with(".partial"))
        })
    };
    let (mut attempts, mut during) = (0, 0);
    while during < 5 {
        attempts += 1;
        let mut child = start(&arguments);
        // What the last attempt left half-written is removed first; a new one shows that saving began.
        let mut seen_clear = !is_saving();
        let finished = loop {
            let saving = is_saving();
            seen_clear |= !saving;
            if saving && seen_clear {
                break false;
            }
            if child.try_wait().unwrap().is_some() {
                break true;
            }
        };
        // At once, or a little later, so that different files are cut off.
        std::thread::sleep(Duration::from_micros(100 * (attempts % 3)));
        let _ = child.kill();
        child.wait().unwrap();
        during += u32::from(is_saving());
        if finished {
            break;
        }
    }
    assert!(during >= 2, "saving was hit {during} times in {attempts} attempts");
    succeed(&borrowed(&arguments));
    assert_same(&result(&folder), &expected, &format!("after {during} kills during saving"));
}

#[test]
fn a_disk_that_is_full_at_a_checkpoint_loses_nothing() {
    let workshop = Workshop::new();
    let expected = reference(&workshop);
    let folder = workshop.path("full");
    let arguments = workshop.distill("full", &RUN);
    let mut child = start(&arguments);
    assert!(wait_for_lines(&mut child, &folder, 7));
    signal(&child, "-INT");
    child.wait().unwrap();
    let before = files_below(&folder.join("checkpoints"));
    assert!(!before.is_empty());
    // No file may grow beyond 64 KiB: the logs and data are smaller, a checkpoint's weights are larger.
    let script = "ulimit -f 64; trap '' XFSZ; exec \"$0\" \"$@\"";
    let output =
        Command::new("bash").args(["-c", script, env!("CARGO_BIN_EXE_grafter")]).args(&arguments).output().unwrap();
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("error: saving the checkpoint of step 8 failed (the checkpoint of step "), "{said}");
    assert!(said.contains("is untouched"), "{said}");
    assert!(said.contains("weights.safetensors") && said.contains("File too large"), "{said}");
    assert_same(&files_below(&folder.join("checkpoints")), &before, "after the full disk");
    succeed(&borrowed(&arguments));
    assert_same(&result(&folder), &expected, "after the full disk");
}

#[test]
fn a_folder_that_cannot_be_written_at_a_checkpoint_loses_nothing() {
    let workshop = Workshop::new();
    let expected = reference(&workshop);
    let folder = workshop.path("blocked");
    let arguments = workshop.distill("blocked", &RUN);
    // Root may write anywhere, so permissions would not stop it; a file where the folder should be does.
    let mut child = start(&arguments);
    assert!(wait_for_lines(&mut child, &folder, 1));
    let blocked = fs::write(folder.join("checkpoints"), "").is_ok();
    let output = child.wait_with_output().unwrap();
    assert!(blocked, "the run was faster than the test");
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("saving the checkpoint of step 4 failed (there is no earlier one"), "{said}");
    fs::remove_file(folder.join("checkpoints")).unwrap();
    succeed(&borrowed(&arguments));
    assert_same(&result(&folder), &expected, "after the blocked folder");
}

#[test]
fn what_differs_from_the_run_s_beginning_is_named() {
    let workshop = Workshop::new();
    let folder = workshop.path("run");
    let more = ["--steps", "6", "--batch-size", "32", "--checkpoint-every", "2"];
    let arguments = workshop.distill("run", &more);
    let mut child = start(&arguments);
    wait_for_lines(&mut child, &folder, 3);
    signal(&child, "-INT");
    child.wait().unwrap();
    fs::remove_dir_all(folder.join("model")).ok();
    let before = files_below(&folder);
    let unchanged = |what: &str| assert_same(&files_below(&folder), &before, what);

    let other_seed = workshop.distill("run", &[&more[..], &["--seed", "5"]].concat());
    let said = fail(&borrowed(&other_seed));
    assert!(said.contains("began with another configuration: training.seed was 0, is now 5"), "{said}");
    unchanged("after another seed");

    let documents = fs::read(workshop.path("train.jsonl")).unwrap();
    fs::write(workshop.path("train.jsonl"), "{\"text\": \"other documents\"}\n").unwrap();
    let said = fail(&borrowed(&arguments));
    assert!(
        said.contains("the train data are not those that the run began with: the documents' SHA-256 was"),
        "{said}"
    );
    unchanged("after other documents");
    fs::write(workshop.path("train.jsonl"), documents).unwrap();

    let weights = workshop.path("teacher").join("model.safetensors");
    let original = fs::read(&weights).unwrap();
    let mut changed = original.clone();
    *changed.last_mut().unwrap() ^= 1;
    fs::write(&weights, changed).unwrap();
    let said = fail(&borrowed(&arguments));
    assert!(said.contains("the teacher model's files are not those that the run began with"), "{said}");
    fs::write(&weights, original).unwrap();

    // How often the run is saved may change.
    let other_checkpoints = workshop.distill("run", &["--steps", "6", "--batch-size", "32", "--checkpoint-every", "1"]);
    succeed(&borrowed(&other_checkpoints));
    assert!(folder.join("model").join("model.safetensors").exists());

    let damaged = folder.join("checkpoints").join("step-000006").join("optimizer.safetensors");
    let bytes = fs::read(&damaged).unwrap();
    fs::write(&damaged, &bytes[..bytes.len() / 2]).unwrap();
    fs::remove_dir_all(folder.join("model")).unwrap();
    let output = run(&borrowed(&other_checkpoints));
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("step-000006 is damaged and passed over"), "{}", stderr(&output));
    assert!(stderr(&output).contains("continuing after step 5"), "{}", stderr(&output));
}

#[test]
fn a_run_without_a_checkpoint_keeps_its_configuration_too() {
    let workshop = Workshop::new();
    let folder = workshop.path("run");
    let more = ["--steps", "40", "--batch-size", "32", "--checkpoint-every", "0"];
    let arguments = workshop.distill("run", &more);
    let mut child = start(&arguments);
    assert!(wait_for_lines(&mut child, &folder, 2));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(folder.join("config.toml").exists() && !folder.join("checkpoints").exists());
    let before = files_below(&folder);
    let other = workshop.distill("run", &[&more[..], &["--learning-rate", "2e-3"]].concat());
    let said = fail(&borrowed(&other));
    assert!(
        said.contains("began with another configuration: training.learning_rate was 0.001, is now 0.002"),
        "{said}"
    );
    assert_same(&files_below(&folder), &before, "after another configuration");
}

#[test]
fn a_second_process_in_the_same_folder_is_refused() {
    let workshop = Workshop::new();
    let folder = workshop.path("shared");
    let arguments = workshop.distill("shared", &RUN);
    let mut child = start(&arguments);
    assert!(wait_for_lines(&mut child, &folder, 2));
    let said = fail(&borrowed(&arguments));
    assert!(said.contains("another grafter is working in") && said.contains(text(&folder)), "{said}");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn the_result_does_not_depend_on_how_a_batch_is_cut() {
    let workshop = Workshop::new();
    let losses = |run: &str, micro_batch: &str| -> Vec<f64> {
        let more = ["--steps", "5", "--batch-size", "6", "--micro-batch", micro_batch];
        succeed(&borrowed(&workshop.distill(run, &more)));
        let text = fs::read_to_string(workshop.path(run).join("metrics.jsonl")).unwrap();
        text.lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["loss"].as_f64())
            .collect()
    };
    let whole = losses("whole", "6");
    assert_eq!(whole.len(), 5);
    for (run, micro_batch) in [("ones", "1"), ("fours", "4")] {
        for (found, expected) in losses(run, micro_batch).iter().zip(&whole) {
            // Sums in another order: a few units in the last place of f32, growing over five updates.
            assert!((found - expected).abs() <= 2e-5 * expected, "{run}: {found} instead of {expected}");
        }
    }
}

/// Mixers have a rate of their own: the first update finds the same loss, and the next ones do not.
#[test]
fn mixers_learn_at_their_own_rate() {
    let workshop = Workshop::new();
    let losses = |run: &str, rate: &str| -> Vec<f64> {
        let more = ["--steps", "3", "--set", rate];
        succeed(&borrowed(&workshop.distill(run, &more)));
        let text = fs::read_to_string(workshop.path(run).join("metrics.jsonl")).unwrap();
        text.lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["loss"].as_f64())
            .collect()
    };
    let (one, four) = (losses("one", "training.mixer_rate=1"), losses("four", "training.mixer_rate=4"));
    assert_eq!((one.len(), one[0]), (four.len(), four[0]));
    assert_ne!(one[1..], four[1..]);
}

#[test]
fn batches_whose_loss_leaps_are_counted_and_a_run_that_continues_passes_over_the_same_ones() {
    let workshop = Workshop::new();
    // Small batches ripple, little is learned, and so low a threshold takes ripples for leaps.
    let mut arguments = RUN.to_vec();
    arguments.extend(["--batch-size", "2", "--micro-batch", "1", "--learning-rate", "1e-4"]);
    arguments.extend(["--set", "training.mixer_rate=1"]);
    let unguarded = arguments.clone();
    arguments.extend(["--set", "training.spike_threshold=0.7"]);
    let expected = reference_of(&workshop, &arguments);
    let log = String::from_utf8(expected["metrics.jsonl"].clone()).unwrap();
    let counted = log.matches("\"passed_over\":").count();
    assert!(counted >= 2, "{log}");
    let state = String::from_utf8(expected["checkpoints/step-000040/state.json"].clone()).unwrap();
    assert!(state.contains(&format!("\"passed_over\": {counted}")), "{state}");
    assert_ne!(expected["model/model.safetensors"], {
        succeed(&borrowed(&workshop.distill("unguarded", &unguarded)));
        fs::read(workshop.path("unguarded").join("model/model.safetensors")).unwrap()
    });
    let name = "ended";
    let folder = workshop.path(name);
    let arguments = workshop.distill(name, &arguments);
    for signal_name in ["-INT", "-KILL", "-TERM"] {
        let lines = count_lines(&folder) + 9;
        let mut child = start(&arguments);
        if wait_for_lines(&mut child, &folder, lines) {
            signal(&child, signal_name);
        }
        child.wait().unwrap();
    }
    let output = run(&borrowed(&arguments));
    assert!(output.status.success(), "{}", stderr(&output));
    assert_same(&result(&folder), &expected, "after three signals");
}

#[test]
fn every_loss_is_learned_from_and_continues_to_the_same_bits() {
    let workshop = Workshop::new();
    let mut arguments = RUN.to_vec();
    for assignment in [
        "loss.divergence_weight=0",
        "loss.cross_entropy_weight=0.1",
        "loss.forward_kl_weight=0.5",
        "loss.jensen_shannon_weight=0.5",
        "loss.mixer_matching_weight=0.2",
        "model.recompute_layers=true",
    ] {
        arguments.extend(["--set", assignment]);
    }
    let expected = reference_of(&workshop, &arguments);
    let validation: Vec<f64> = String::from_utf8(expected["metrics.jsonl"].clone())
        .unwrap()
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["validation_loss"].as_f64())
        .collect();
    assert!(validation.last().unwrap() < &(0.97 * validation[0]), "{validation:?}");
    let folder = workshop.path("ended");
    let arguments = workshop.distill("ended", &arguments);
    let mut child = start(&arguments);
    if wait_for_lines(&mut child, &folder, 20) {
        signal(&child, "-KILL");
    }
    child.wait().unwrap();
    let output = run(&borrowed(&arguments));
    assert!(output.status.success(), "{}", stderr(&output));
    assert_same(&result(&folder), &expected, "after a kill");
}

#[test]
fn mixers_are_matched_for_the_first_updates_alone_also_after_a_kill() {
    let workshop = Workshop::new();
    let matched: Vec<&str> = [&RUN[..], &["--set", "loss.mixer_matching_weight=0.2"]].concat();
    let first = [&matched[..], &["--set", "loss.mixer_matching_steps=15"]].concat();
    let expected = reference_of(&workshop, &first);
    let log = String::from_utf8(expected["metrics.jsonl"].clone()).unwrap();
    let records = log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    for record in records {
        let step = record["step"].as_u64().unwrap();
        let [total, divergence] = if record["loss"].is_null() {
            ["validation_loss", "validation_divergence"]
        } else {
            ["loss", "divergence"]
        }
        .map(|key| record[key].as_f64().unwrap());
        assert_eq!(total > divergence, step <= 15, "{record}");
        assert!(total >= divergence, "{record}");
    }
    // Up to there it is the run that matches throughout.
    succeed(&borrowed(&workshop.distill("throughout", &matched)));
    let throughout = fs::read_to_string(workshop.path("throughout").join("metrics.jsonl")).unwrap();
    let until = |log: &str| log.lines().take_while(|line| !line.contains("\"step\":16,")).count();
    assert_eq!(until(&log), 15 + 3);
    assert!(log.lines().zip(throughout.lines()).take(15 + 3).all(|(one, other)| one == other));
    assert_ne!(log, throughout);

    let folder = workshop.path("ended");
    let arguments = workshop.distill("ended", &first);
    // In the midst of them, and after them.
    for lines in [12, 24] {
        let mut child = start(&arguments);
        if wait_for_lines(&mut child, &folder, lines) {
            signal(&child, "-KILL");
        }
        child.wait().unwrap();
    }
    let output = run(&borrowed(&arguments));
    assert!(output.status.success(), "{}", stderr(&output));
    assert_same(&result(&folder), &expected, "after two kills");
}
