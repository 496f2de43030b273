//! Distillation in stages: what each stage starts from, and that it goes on where it was ended.

#![allow(clippy::unwrap_used)] // Helpers of tests fail as tests do.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use model::{Model, Precision};
use runtime::Device;
use serde_json::Value;
use support::{Workshop, borrowed, fail, files_below, grafter, run, stderr, succeed, text};

const STAGES: [&str; 16] = [
    "--schedule",
    "1,3,[0,1,2,3]",
    "--rank",
    "loo,mmr",
    "--rank-steps",
    "4",
    "--steps",
    "12",
    "--batch-size",
    "4",
    "--warmup-steps",
    "2",
    "--checkpoint-every",
    "3",
    "--evaluation-every",
    "6",
];

fn arguments(workshop: &Workshop, run: &str, more: &[&str]) -> Vec<String> {
    let mut arguments = workshop.distill(run, more);
    // The schedule says which layers.
    let at = arguments.iter().position(|argument| argument == "--layers").unwrap();
    arguments.drain(at..at + 2);
    arguments
}

fn stages(run: &Path) -> Vec<Value> {
    serde_json::from_slice(&fs::read(run.join("stages.json")).unwrap()).unwrap()
}

fn layers(value: &Value) -> Vec<u64> {
    value.as_array().unwrap().iter().map(|layer| layer.as_u64().unwrap()).collect()
}

/// What must be equal bit for bit: everything but clocks, and of the checkpoints the last. Paths of the run itself are
/// in some files; they are given another name.
fn result(run: &Path, name: &str) -> BTreeMap<String, Vec<u8>> {
    for stage in 1..=3 {
        support::check_events(&run.join(format!("stage-{stage:02}/run")));
    }
    let mut files = files_below(run);
    files.retain(|file, _| {
        !file.ends_with("timing.jsonl")
            && !file.ends_with(support::EVENTS)
            && (!file.contains("/checkpoints/") || file.contains("/step-000012/"))
            // It holds the hash of the configuration, and so the path.
            && !file.ends_with("state.json")
    });
    assert!(files.keys().all(|file| !file.contains("partial")), "leftovers: {:?}", files.keys());
    let path = text(run).to_owned();
    for bytes in files.values_mut() {
        if let Ok(text) = std::str::from_utf8(bytes) {
            *bytes = text.replace(&path, "RUN").replace(name, "RUN").into_bytes();
        }
    }
    files
}

fn values(model: &Model, name: &str) -> Vec<f32> {
    let id = model.parameters.find(name).unwrap_or_else(|| panic!("{name} is missing"));
    model.parameters.get(id).value.to_f32_vec().unwrap()
}

#[test]
fn flags_override_what_a_file_says_for_each_stage() {
    let workshop = Workshop::new();
    let file = workshop.path("run.toml");
    let stages = "schedule = [1, 2]\nsteps = [30, 50]\nlearning_rates = [1e-3, 2e-3]\n";
    fs::write(&file, format!("[training]\nsteps = 7\n[stages]\n{stages}")).unwrap();
    let (teacher, train, run) = (workshop.path("teacher"), workshop.path("train.jsonl"), workshop.path("run"));
    let common = ["distill", "--config", text(&file), "--teacher", text(&teacher), "--train", text(&train)];
    let resolved = |more: &[&str]| {
        let text = succeed(&[&common[..], &["--run", text(&run), "--print-config"], more].concat());
        let config: toml::Table = text.parse().unwrap();
        (
            config["training"]["steps"].clone(),
            config["stages"]["steps"].clone(),
            config["stages"]["learning_rates"].clone(),
        )
    };
    let numbers = |text: &str| format!("x = {text}").parse::<toml::Table>().unwrap()["x"].clone();
    assert_eq!(resolved(&[]), (numbers("7"), numbers("[30, 50]"), numbers("[1e-3, 2e-3]")));
    let flags = ["--steps", "60", "--learning-rate", "1e-4"];
    assert_eq!(resolved(&flags), (numbers("60"), numbers("[]"), numbers("[]")));
    let set = ["--steps", "60", "--set", "stages.steps=[8, 9]"];
    assert_eq!(resolved(&set).1, numbers("[8, 9]"));
}

#[test]
fn new_mixers_come_from_the_teacher_and_the_rest_from_the_hybrid_before() {
    let workshop = Workshop::new();
    // The second stage learns nothing that an f32 can hold: its model is what it started from.
    let more = [
        "--schedule",
        "[2],[0,2]",
        "--steps",
        "3",
        "--batch-size",
        "4",
        "--set",
        "stages.learning_rates=[1e-2, 1e-30]",
        "--set",
        "training.weight_decay=0",
    ];
    succeed(&borrowed(&arguments(&workshop, "run", &more)));
    let load = |folder: &Path| Model::load(folder, &Device::cpu(), Precision::F32).unwrap();
    let run = workshop.path("run");
    let teacher = load(&workshop.path("teacher"));
    let (first, second) = (load(&run.join("stage-01/run/model")), load(&run.join("stage-02/run/model")));
    let (mut compared, mut learned) = (0, 0);
    for (_, parameter) in second.parameters.iter() {
        if parameter.name.starts_with("model.layers.0.mixer.") {
            continue;
        }
        let before = values(&first, &parameter.name);
        assert_eq!(values(&second, &parameter.name), before, "{} is the previous hybrid's", parameter.name);
        compared += 1;
        if let Some(id) = teacher.parameters.find(&parameter.name) {
            learned += usize::from(teacher.parameters.get(id).value.to_f32_vec().unwrap() != before);
        }
    }
    assert!(compared > 30 && learned > 20, "the first stage trains: {compared} {learned}");
    // in_proj is [z; x; B; C]; x, B and C are the teacher's value, key and query projections, not the hybrid's.
    let projection = values(&second, "model.layers.0.mixer.in_proj.weight");
    let attention = |name: &str| values(&teacher, &format!("model.layers.0.self_attn.{name}_proj.weight"));
    let expected = [attention("v"), attention("k"), attention("q")].concat();
    assert_eq!(&projection[projection.len() - expected.len()..], expected);
    assert_ne!(values(&first, "model.layers.0.self_attn.v_proj.weight"), attention("v"));
    assert_eq!(values(&second, "model.layers.0.mixer.out_proj.weight"), attention("o"));
    assert_eq!(fs::read(run.join("model/model.safetensors")).unwrap(), {
        fs::read(run.join("stage-02/run/model/model.safetensors")).unwrap()
    });
    let config = fs::read_to_string(run.join("stage-02/run/config.toml")).unwrap();
    assert!(
        config.contains("\nlearning_rate = 0.00000000000000000000000000000") && config.contains("layers = [0]"),
        "{config}"
    );
}

#[test]
fn stages_pick_the_least_important_layers_and_say_what_they_train() {
    let workshop = Workshop::new();
    let output = run(&borrowed(&arguments(&workshop, "run", &STAGES)));
    let said = stderr(&output);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("stage 2 of 3: layers ") && said.contains("new Mamba mixers"), "{said}");
    let run = workshop.path("run");
    let stages = stages(&run);
    assert_eq!(stages.len(), 3);
    for (index, (stage, method)) in stages.iter().zip([Some("loo"), Some("mmr"), None]).enumerate() {
        assert_eq!(stage["ranked_by"].as_str(), method);
        assert_eq!(stage["finished"], true);
        assert!(stage["validation_after"].as_f64().unwrap() > 0.0);
        let new = layers(&stage["new_layers"]);
        let Some(_) = method else { continue };
        let path = run.join(format!("stage-{:02}/ranking/ranking.json", index + 1));
        let ranking: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        let mut least = layers(&ranking["least_important_first"]);
        least.truncate(new.len());
        least.sort_unstable();
        assert_eq!(new, least);
        assert!(stage["parts"].as_array().unwrap().iter().all(|part| part["why"].as_str().unwrap().len() > 5));
    }
    assert_eq!(layers(&stages[1]["mamba_layers"]).len(), 3);
    assert_eq!(layers(&stages[2]["mamba_layers"]), [0, 1, 2, 3]);
    // Each stage's rate rises and falls by itself.
    for stage in 1..=3 {
        let text = fs::read_to_string(run.join(format!("stage-{stage:02}/run/metrics.jsonl"))).unwrap();
        let rates: Vec<f64> = text
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).unwrap()["learning_rate"].as_f64())
            .collect();
        assert!(rates.len() == 12 && rates[0] < rates[1] && rates[11] < rates[1] / 4.0, "{rates:?}");
    }
    let before = files_below(&run);
    succeed(&borrowed(&arguments(&workshop, "run", &STAGES)));
    assert!(files_below(&run) == before, "a finished run stays as it is");
}

#[test]
fn killed_at_twenty_random_points_it_ends_with_the_same_bits() {
    let workshop = Workshop::new();
    let start = Instant::now();
    succeed(&borrowed(&arguments(&workshop, "whole", &STAGES)));
    let whole = start.elapsed();
    let expected = result(&workshop.path("whole"), "whole");
    let command = arguments(&workshop, "killed", &STAGES);
    let mut random: u64 = 0x9e37_79b9_7f4a_7c15;
    let (mut kills, mut attempts) = (0, 0);
    while kills < 20 && attempts < 200 {
        attempts += 1;
        // xorshift: any spread will do.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let share = (random % 1000) as f64 / 1000.0;
        let mut child = grafter().args(&command).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(whole.mul_f64(0.4 * share) + Duration::from_millis(2));
        let signal = ["-KILL", "-KILL", "-INT"][kills % 3];
        let _ = Command::new("kill").args([signal, &child.id().to_string()]).stderr(Stdio::null()).status();
        let status = child.wait().unwrap();
        assert!(status.code().is_none_or(|code| code == 0 || code == 3), "{status:?}");
        if status.success() {
            // It was finished before it could be ended: once more from the beginning.
            fs::remove_dir_all(workshop.path("killed")).unwrap();
        } else {
            kills += 1;
        }
    }
    assert_eq!(kills, 20);
    let output = run(&borrowed(&command));
    assert!(output.status.success(), "{}", stderr(&output));
    let found = result(&workshop.path("killed"), "killed");
    assert!(found.keys().eq(expected.keys()), "{:?} instead of {:?}", found.keys(), expected.keys());
    for (file, bytes) in &expected {
        assert!(&found[file] == bytes, "{file} differs");
    }
}

#[test]
fn a_changed_configuration_is_refused_and_from_stage_does_later_ones_anew() {
    let workshop = Workshop::new();
    succeed(&borrowed(&arguments(&workshop, "run", &STAGES)));
    let run = workshop.path("run");
    let kept = files_below(&run.join("stage-01"));
    let second = fs::read(run.join("stage-02/run/metrics.jsonl")).unwrap();
    let mut other = STAGES.to_vec();
    other.extend(["--learning-rate", "3e-3"]);
    let message = fail(&borrowed(&arguments(&workshop, "run", &other)));
    assert!(message.contains("training.learning_rate was 0.001, is now 0.003"), "{message}");
    assert!(message.contains("--from-stage"), "{message}");
    other.extend(["--from-stage", "2"]);
    for _ in 0..2 {
        // The second call finds everything done.
        succeed(&borrowed(&arguments(&workshop, "run", &other)));
        assert!(files_below(&run.join("stage-01")) == kept, "the first stage stays");
        assert!(fs::read(run.join("stage-02/run/metrics.jsonl")).unwrap() != second);
        let rates: Vec<f64> = stages(&run).iter().map(|stage| stage["learning_rate"].as_f64().unwrap()).collect();
        assert_eq!(rates, [1e-3, 3e-3, 3e-3]);
    }
    let mut far = STAGES.to_vec();
    far.extend(["--from-stage", "4"]);
    let message = fail(&borrowed(&arguments(&workshop, "run", &far)));
    assert!(message.contains("--from-stage is 4: the schedule has stages 1 to 3"), "{message}");
    let mut early = STAGES.to_vec();
    early.extend(["--from-stage", "2"]);
    let message = fail(&borrowed(&arguments(&workshop, "new", &early)));
    assert!(message.contains("stage 1 is not finished") && !workshop.path("new").exists(), "{message}");
    // A hybrid that somebody changed between two stages.
    let model = run.join("stage-01/run/model/model.safetensors");
    let mut bytes = fs::read(&model).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&model, bytes).unwrap();
    fs::remove_dir_all(run.join("stage-02/run/model")).unwrap();
    let message = fail(&borrowed(&arguments(&workshop, "run", &other)));
    assert!(message.contains("stage 2") && message.contains("the model's SHA-256 was "), "{message}");
}

#[test]
fn schedules_that_cannot_be_are_named() {
    let workshop = Workshop::new();
    for (schedule, expected) in [
        ("5", "stage 1 ends with 5 Mamba layers, but the model has 0 before it and can have at most 4"),
        ("2,1", "a stage ends with 1 Mamba layers after one with 2"),
        ("[1],[2,3]", "stage 2 leaves out layer 1, which is Mamba before it"),
        ("[9]", "stage 1 names layer 9, but the model has layers 0 to 3"),
        ("[1,1]", "names layer 1 twice"),
        ("x", "write how many Mamba layers each stage ends with"),
    ] {
        let message = fail(&borrowed(&arguments(&workshop, "run", &["--schedule", schedule, "--steps", "2"])));
        assert!(message.contains(expected), "{schedule}: {message}");
        assert!(!workshop.path("run").exists(), "{schedule}");
    }
    let both = fail(&borrowed(&workshop.distill("run", &["--schedule", "2", "--steps", "2"])));
    assert!(both.contains("model.layers and stages.schedule are both given"), "{both}");
    let none = fail(&borrowed(&workshop.distill("run", &["--from-stage", "2", "--steps", "2"])));
    assert!(none.contains("--from-stage is for runs in stages"), "{none}");
}

#[test]
fn mixers_that_the_device_does_not_run_are_refused_before_any_work() {
    let workshop = Workshop::new();
    // Heads of 128 dimensions; no weights of that size are read.
    let config = workshop.path("teacher").join("config.json");
    let mut source: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    source["head_dim"] = 128.into();
    fs::write(&config, source.to_string()).unwrap();
    let whole = ["--init", "whole_head", "--device", "sim", "--steps", "2"];
    let ranked = [&whole[..], &["--schedule", "2", "--rank", "loo"]].concat();
    let (teacher, data, out) = (workshop.path("teacher"), workshop.path("train.jsonl"), workshop.path("run"));
    let rank = ["rank", text(&teacher), "--method", "mmr", "--data", text(&data), "--out", text(&out)];
    for message in [
        fail(&borrowed(&workshop.distill("run", &whole))),
        fail(&borrowed(&arguments(&workshop, "run", &ranked))),
        fail(&[&rank[..], &whole].concat()),
    ] {
        let expected = "sim scans channels of at most 64 states, and new mixers would have 128, as many as a head has \
                        dimensions (--init whole_head, model.init): use another --init, or --device cpu";
        assert!(message.contains(expected), "{message}");
    }
    assert!(!out.exists() || files_below(&out).is_empty(), "{:?}", files_below(&out).keys());
}

#[test]
fn a_dry_run_prints_the_plan_and_writes_nothing() {
    let workshop = Workshop::new();
    let mut more = STAGES.to_vec();
    more.extend(["--dry-run", "--json"]);
    let plan: Value = serde_json::from_str(&succeed(&borrowed(&arguments(&workshop, "run", &more)))).unwrap();
    assert!(!workshop.path("run").exists());
    let stages = plan["stages"].as_array().unwrap();
    assert_eq!(stages.len(), 3);
    assert_eq!((stages[1]["mamba_layers"].as_u64(), stages[1]["ranked_by"].as_str()), (Some(3), Some("mmr")));
    assert_eq!(plan["tokens"], 3 * 12 * 4 * 32);
    let seconds: f64 = plan["seconds_per_update"].as_f64().unwrap();
    assert!(seconds > 0.0 && plan["seconds"].as_f64().unwrap() >= 36.0 * seconds, "{plan}");
    assert!(plan["memory_bytes"].as_u64().unwrap() > 100_000, "{plan}");
    more.pop();
    let said = succeed(&borrowed(&arguments(&workshop, "run", &more)));
    assert!(
        said.contains("loo") && said.contains("layers [0, 1, 2, 3]") && said.contains("an update, measured"),
        "{said}"
    );
    // A run without stages has a plan, too.
    let said = succeed(&borrowed(&workshop.distill("run", &["--steps", "5", "--dry-run"])));
    assert!(said.contains("layers [1, 3]"), "{said}");
    assert!(!workshop.path("run").exists());
}
