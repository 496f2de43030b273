//! The program's commands on a tiny model: what they answer, and how they refuse.

#![allow(clippy::unwrap_used)] // Helpers of tests fail as tests do.

mod support;

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use model::tokenizer::Tokenizer;
use model::{Model, Precision, TokenBatch};
use runtime::Device;
use serde_json::{Value, json};
use support::{VOCABULARY, Workshop, borrowed, fail, files_below, grafter, run, stderr, succeed, text};

fn json_of(arguments: &[&str]) -> Value {
    serde_json::from_str(&succeed(arguments)).unwrap()
}

fn losses(run: &Path) -> Vec<f64> {
    let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let records = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    records.filter_map(|record| record["loss"].as_f64()).collect()
}

#[test]
fn help_is_there_at_once_and_wrong_command_lines_are_told_apart() {
    let fastest = (0..5)
        .map(|_| {
            let start = Instant::now();
            assert!(succeed(&["--help"]).contains("Exit codes:"));
            start.elapsed()
        })
        .min()
        .unwrap();
    assert!(fastest < Duration::from_millis(20), "{fastest:?}");
    for wrong in [&["unknown"][..], &[], &["generate"], &["generate", "m", "--prompt", "x", "--greedy", "--seed", "1"]]
    {
        let output = run(wrong);
        assert_eq!(output.status.code(), Some(2), "{wrong:?}: {}", stderr(&output));
    }
}

#[test]
fn devices_are_listed() {
    let listed = json_of(&["devices", "--json"]);
    assert_eq!(listed["devices"][0]["name"], "cpu");
    assert!(listed["devices"][0]["threads"].as_u64().unwrap() >= 1);
    let gpus = listed["devices"].as_array().unwrap().len() - 1;
    assert_eq!(gpus == 0, listed["no_gpu_because"].is_string());
    assert_eq!(succeed(&["devices"]).lines().count(), 1 + gpus.max(1));
}

#[test]
fn generation_is_the_model_s_own_and_its_json_complete() {
    let workshop = Workshop::new();
    let teacher = workshop.path("teacher");
    let base = ["generate", text(&teacher), "--prompt", "one two", "--max-tokens", "9"];
    let greedy = json_of(&[&base[..], &["--greedy", "--json", "--ignore-eos"]].concat());
    let tokenizer = Tokenizer::load(&teacher).unwrap();
    let model = Model::load(&teacher, &Device::cpu(), Precision::F32).unwrap();
    let mut tokens = tokenizer.encode("one two", true).unwrap();
    assert_eq!(greedy["prompt_token_ids"], json!(tokens));
    for _ in 0..9 {
        let (logits, _) = model.prefill(&TokenBatch::new(&Device::cpu(), &[tokens.clone()], None).unwrap()).unwrap();
        let logits = logits.to_vec::<f32>().unwrap();
        tokens.push((0..VOCABULARY).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32);
    }
    let expected = &tokens[7..];
    assert_eq!(greedy["token_ids"], json!(expected));
    assert_eq!(greedy["finish_reason"], "length");
    assert_eq!(greedy["text"], json!(tokenizer.decode(expected, true).unwrap()));

    let random =
        [&base[..], &["--temperature", "0.9", "--top-k", "40", "--top-p", "0.95", "--seed", "4", "--json"]].concat();
    assert_eq!(json_of(&random), json_of(&random));
    let other = [&base[..], &["--seed", "5", "--json"]].concat();
    assert_ne!(json_of(&random)["token_ids"], json_of(&other)["token_ids"]);
    let streamed = succeed(&[&base[..], &["--seed", "5"]].concat());
    assert_eq!(streamed, json_of(&other)["text"].as_str().unwrap().to_owned() + "\n");

    let chat = json_of(&[&base[..], &["--chat", "--json"]].concat());
    let prompt = tokenizer.encode("user: one two</s>assistant: ", false).unwrap();
    assert_eq!(chat["prompt_token_ids"], json!(prompt));

    let said = fail(&[&base[..], &["--temperature", "0"]].concat());
    assert!(said.starts_with("error: generating: temperature 0 must be above 0"), "{said}");
    let said = fail(&["generate", text(&workshop.path("nowhere")), "--prompt", "x"]);
    assert!(said.contains("nowhere") && said.matches("error").count() == 1, "{said}");
    let file = teacher.join("model.safetensors");
    for command in [&["generate", text(&file), "--prompt", "x"][..], &["inspect", text(&file)]] {
        let said = fail(command);
        let expected = format!("error: {}: is a file, but a model folder is expected: give the folder", file.display());
        assert!(said.starts_with(&expected), "{said}");
        assert!(said.contains("`grafter import`"), "{said}");
    }
    let said = fail(&["generate", text(&teacher), "--prompt", ""]);
    assert!(said.contains("empty prompt"), "{said}");
}

#[test]
fn inspection_counts_and_a_reader_that_leaves_is_no_error() {
    let workshop = Workshop::new();
    let teacher = workshop.path("teacher");
    let inspection = json_of(&["inspect", text(&teacher), "--json"]);
    // Keys and values of 2 heads of 16 numbers in f32, in 4 layers.
    assert_eq!(inspection["cache_bytes_per_token"], json!(4 * 2 * 2 * 16 * 4));
    assert_eq!(inspection["cache_bytes_per_sequence"], json!(0));
    let layer = 32 * 64 * 2 + 32 * 32 * 2 + 3 * 32 * 48 + 2 * 32;
    assert_eq!(inspection["parameters"], json!(VOCABULARY * 32 + 4 * layer + 32));
    assert_eq!(inspection["layers"].as_array().unwrap().len(), 4);
    assert!(succeed(&["inspect", text(&teacher)]).contains("every weight was read and is finite"));

    let mut child =
        grafter().args(["inspect", text(&teacher)]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(child.wait().unwrap().success() && said.is_empty(), "{said}");

    let weights = teacher.join("model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() - 10]).unwrap();
    let said = fail(&["inspect", text(&teacher)]);
    assert!(said.contains("model.safetensors") && said.contains("truncated"), "{said}");
    let mut poisoned = bytes.clone();
    let length = poisoned.len();
    poisoned[length - 2..].copy_from_slice(&0x7fc0u16.to_le_bytes());
    fs::write(&weights, poisoned).unwrap();
    let said = fail(&["inspect", text(&teacher)]);
    assert!(said.contains("tensor ") && said.contains("model.safetensors"), "{said}");
}

#[test]
fn perplexity_is_that_of_the_model_s_own_probabilities() {
    let workshop = Workshop::new();
    let teacher = workshop.path("teacher");
    let data = workshop.path("two.jsonl");
    fs::write(&data, "{\"text\": \"one two three\"}\n{\"text\": \"x\"}\n{\"text\": \"four\"}\n").unwrap();
    let base = ["eval", text(&teacher), "--task", "perplexity", "--data", text(&data), "--json"];
    let model = Model::load(&teacher, &Device::cpu(), Precision::F32).unwrap();
    let nll = |document: &str, limit: usize| -> f64 {
        let tokens: Vec<u32> = document
            .bytes()
            .take(limit)
            .map(|byte| Tokenizer::load(&teacher).unwrap().encode(&char::from(byte).to_string(), false).unwrap()[0])
            .collect();
        let batch = TokenBatch::new(&Device::cpu(), std::slice::from_ref(&tokens), None).unwrap();
        let logits = model.logits(&autograd::Tape::inference(), &batch).unwrap().to_vec::<f32>().unwrap();
        (1..tokens.len())
            .map(|position| {
                let row = &logits[(position - 1) * VOCABULARY..position * VOCABULARY];
                let sum: f64 = row.iter().map(|logit| f64::from(*logit).exp()).sum();
                sum.ln() - f64::from(row[tokens[position] as usize])
            })
            .sum()
    };
    for (limit, more) in [(1024, &[][..]), (6, &["--tokens-per-document", "6"])] {
        let found = json_of(&[&base[..], more].concat());
        let tokens = (13usize.min(limit) - 1) + 3;
        assert_eq!((&found["documents"], &found["tokens"]), (&json!(2), &json!(tokens)));
        let expected = (nll("one two three", limit) + nll("four", limit)) / tokens as f64;
        let mean = found["mean_nll"].as_f64().unwrap();
        // f32 logits of size 10 and sums over 258 tokens.
        assert!((mean - expected).abs() < 1e-5, "{mean} instead of {expected}");
        assert!((found["perplexity"].as_f64().unwrap() - mean.exp()).abs() < 1e-9);
    }
    fs::write(&data, "{\"text\": \"x\"}\n").unwrap();
    assert!(fail(&base).contains("there is nothing to predict in its 1 documents"));
    fs::write(&data, "").unwrap();
    assert!(fail(&base).contains("there is nothing to predict in its 0 documents"));
}

#[test]
fn packing_counts_masks_and_can_be_done_beforehand() {
    let workshop = Workshop::new();
    let (teacher, data, packed) = (workshop.path("teacher"), workshop.path("chats.jsonl"), workshop.path("x.tokens"));
    let chat = json!({ "messages": [
        { "role": "user", "content": "one" }, { "role": "assistant", "content": "two" },
        { "role": "user", "content": "three" }, { "role": "assistant", "content": "four" },
    ] });
    fs::write(&data, format!("{chat}\n{{\"text\": \"abc\"}}\n{{\"text\": \"\"}}\n")).unwrap();
    let pack = [
        "data",
        "pack",
        "--model",
        text(&teacher),
        "--input",
        text(&data),
        "--output",
        text(&packed),
        "--sequence-length",
        "64",
        "--json",
    ];
    let summary = json_of(&pack)["summary"].clone();
    // The chat: "user: one</s>assistant: two</s>user: three</s>assistant: four</s>", an answer with its </s> counts.
    let chat_tokens = (6 + 3 + 1) + (11 + 3 + 1) + (6 + 5 + 1) + (11 + 4 + 1);
    assert_eq!(summary["tokens"], json!(chat_tokens + 4), "the text has its end-of-sequence token");
    assert_eq!(summary["targets"], json!((3 + 1) + (4 + 1) + 3), "a text's first token is predicted by nothing");
    assert_eq!((&summary["documents"], &summary["empty_documents"]), (&json!(2), &json!(1)));
    let plain = [&pack[..], &["--no-end-token", "--begin-token"]].concat();
    assert_eq!(json_of(&plain)["summary"]["tokens"], json!(chat_tokens + 4));

    // A packed file in place of documents gives the same run.
    let train = workshop.path("train.jsonl");
    let pack = [
        "data",
        "pack",
        "--model",
        text(&teacher),
        "--input",
        text(&train),
        "--output",
        text(&packed),
        "--sequence-length",
        "32",
    ];
    succeed(&pack);
    let more = ["--steps", "4", "--batch-size", "2"];
    succeed(&borrowed(&workshop.distill("documents", &more)));
    succeed(&borrowed(&workshop.distill("packed", &[&more[..], &["--train", text(&packed)]].concat())));
    let metrics = |run: &str| fs::read(workshop.path(run).join("metrics.jsonl")).unwrap();
    assert_eq!(metrics("documents"), metrics("packed"));
    let other_length =
        workshop.distill("other", &["--steps", "4", "--train", text(&packed), "--sequence-length", "48"]);
    let said = fail(&borrowed(&other_length));
    assert!(said.contains("does not fit this run: the sequence length was 32, is now 48"), "{said}");
    let mut bytes = fs::read(&packed).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&packed, bytes).unwrap();
    let said = fail(&borrowed(&workshop.distill("damaged", &["--steps", "4", "--train", text(&packed)])));
    assert!(said.contains("x.tokens cannot be used as a token file") && said.contains("were changed"), "{said}");
}

#[test]
fn distillation_brings_a_hybrid_nearer_to_its_teacher() {
    let workshop = Workshop::new();
    let more = ["--steps", "60", "--batch-size", "4", "--micro-batch", "4", "--learning-rate", "3e-3"];
    let out = succeed(&[&borrowed(&workshop.distill("run", &more))[..], &["--json"]].concat());
    let model = workshop.path("run").join("model");
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap()["model"], json!(model));
    let losses = losses(&workshop.path("run"));
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    let (first, last) = (mean(&losses[..5]), mean(&losses[55..]));
    assert!(last < 0.5 * first, "from {first} to {last}");
    let inspection = json_of(&["inspect", text(&model), "--json"]);
    let mixers: Vec<&str> =
        inspection["layers"].as_array().unwrap().iter().map(|layer| layer["mixer"].as_str().unwrap()).collect();
    assert_eq!(mixers, ["attention", "mamba", "attention", "mamba"]);
    let generated = json_of(&["generate", text(&model), "--prompt", "one", "--max-tokens", "3", "--greedy", "--json"]);
    assert!(generated["token_ids"].as_array().unwrap().len() <= 3);
    assert!(model.join("tokenizer.json").exists() && model.join("tokenizer_config.json").exists());

    // A later stage: the hybrid loses another attention layer.
    let stage = workshop.distill("stage", &["--steps", "2", "--student", text(&model), "--layers", "0"]);
    succeed(&borrowed(&stage)[..]);
    let inspection = json_of(&["inspect", text(&workshop.path("stage").join("model")), "--json"]);
    assert_eq!(inspection["layers"][0]["mixer"], "mamba");
    assert_eq!(inspection["layers"][1]["mixer"], "mamba");
}

/// Element types of a saved model by tensor name.
fn stored_types(model: &Path) -> std::collections::BTreeMap<String, String> {
    let bytes = fs::read(model.join("model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    tensors.iter().map(|(name, tensor)| (name.to_owned(), format!("{:?}", tensor.dtype()))).collect()
}

#[test]
fn a_later_stage_keeps_the_form_of_its_student() {
    let workshop = Workshop::new();
    let (teacher, student) = (workshop.path("teacher"), workshop.path("student"));
    fs::write(teacher.join("of-the-teacher.txt"), "teacher").unwrap();
    succeed(&borrowed(&workshop.distill("first", &["--steps", "1"])));
    let first = workshop.path("first").join("model");
    assert!(stored_types(&first).values().all(|dtype| dtype == "BF16"));
    // The hybrid goes on in float32, with a file and a chat template of its own.
    let options = model::checkpoint::SaveOptions {
        dtype: Some(autograd::DType::F32),
        carry_from: Some(&first),
        ..Default::default()
    };
    Model::load(&first, &Device::cpu(), Precision::F32).unwrap().save(&student, &options).unwrap();
    fs::remove_file(student.join("of-the-teacher.txt")).unwrap();
    fs::write(student.join("of-the-student.txt"), "student").unwrap();
    fs::write(student.join("chat_template.jinja"), format!("{}{{# the student's #}}", support::TEMPLATE)).unwrap();

    succeed(&borrowed(&workshop.distill("second", &["--steps", "1", "--student", text(&student), "--layers", "0"])));
    let second = workshop.path("second").join("model");
    assert!(second.join("of-the-student.txt").exists() && !second.join("of-the-teacher.txt").exists());
    assert!(fs::read_to_string(second.join("chat_template.jinja")).unwrap().contains("the student's"));
    let types = stored_types(&second);
    assert!(types.values().all(|dtype| dtype == "F32"), "{types:?}");
    assert!(types.contains_key("model.layers.0.mixer.in_proj.weight"));
}

#[test]
fn runs_inside_the_teacher_s_folder_are_not_carried_into_models() {
    let workshop = Workshop::new();
    let teacher = workshop.path("teacher");
    fs::create_dir(teacher.join("licences")).unwrap();
    fs::write(teacher.join("licences").join("LICENSE"), "free").unwrap();
    for run in ["first", "second"] {
        let folder = teacher.join("runs").join(run);
        let more = ["--steps", "1", "--run", text(&folder)];
        let mut arguments = workshop.distill("unused", &more);
        let given = arguments.iter().position(|argument| argument == "--run").unwrap();
        arguments.drain(given..given + 2);
        succeed(&borrowed(&arguments));
        let mut names: Vec<String> = files_below(&folder.join("model")).into_keys().collect();
        names.sort();
        assert_eq!(
            names,
            ["config.json", "licences/LICENSE", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
        );
    }
    let imported = workshop.path("imported");
    succeed(&["import", text(&teacher), text(&imported)]);
    assert!(imported.join("licences").exists() && !imported.join("runs").exists());
}

#[test]
fn folders_of_other_things_are_refused_and_left_as_they_are() {
    let workshop = Workshop::new();
    let foreign = workshop.path("foreign");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("metrics.jsonl"), "mine").unwrap();
    let before = files_below(&foreign);
    let said = fail(&borrowed(&workshop.distill("foreign", &["--steps", "1"])));
    assert!(said.contains("foreign is no run's folder: it holds metrics.jsonl but no config.toml"), "{said}");
    let said = fail(&["demo", "--export", text(&foreign)]);
    assert!(said.contains("foreign has other things in it"), "{said}");
    let said = fail(&["demo", "--out", text(&foreign)]);
    assert!(said.contains("foreign has other things in it: name a new or empty folder with --out"), "{said}");
    let said = fail(&["import", text(&workshop.path("teacher")), text(&foreign)]);
    assert!(said.contains("foreign: exists and is not empty"), "{said}");
    assert_eq!(files_below(&foreign), before);
    // A run file that was edited is somebody's, too.
    let world = workshop.path("world");
    succeed(&["demo", "--export", text(&world)]);
    succeed(&["demo", "--export", text(&world)]);
    let edited = world.join("distill.toml");
    fs::write(&edited, fs::read_to_string(&edited).unwrap() + "# mine\n").unwrap();
    let before = files_below(&world);
    let said = fail(&["demo", "--export", text(&world)]);
    assert!(
        said.contains("distill.toml is there and has other contents than what would be written: keep it"),
        "{said}"
    );
    assert!(files_below(&world) == before);
}

#[test]
fn biases_that_a_graft_cannot_keep_are_spoken_of() {
    let workshop = Workshop::new();
    let teacher = workshop.path("teacher");
    let mut config = support::config_json(VOCABULARY);
    config["model_type"] = json!("llama");
    config["architectures"] = json!(["LlamaForCausalLM"]);
    config["attention_bias"] = json!(true);
    let config = model::config::ModelConfig::from_json(config.as_object().unwrap()).unwrap();
    let mut biased = Model::random(config, 1, &Device::cpu()).unwrap();
    let id = biased.parameters.find("model.layers.3.self_attn.q_proj.bias").unwrap();
    let bias = autograd::Tensor::filled(&Device::cpu(), &[64], autograd::DType::F32, 0.5).unwrap();
    biased.parameters.set(id, bias).unwrap();
    biased.save(&teacher, &model::checkpoint::SaveOptions { replace: true, ..Default::default() }).unwrap();
    support::write_tokenizer(&teacher);
    let said = |layers: &str| {
        let output = run(&borrowed(&workshop.distill(layers, &["--steps", "1", "--layers", layers])));
        assert!(output.status.success(), "{}", stderr(&output));
        stderr(&output)
    };
    assert!(said("1,3").contains("warning: the teacher's attention has biases (q, k, v or o) in layers 3 that"));
    assert!(!said("1,2").contains("biases"));
}

#[test]
fn training_only_the_mixers_leaves_everything_else_alone() {
    let workshop = Workshop::new();
    let more = ["--steps", "3", "--batch-size", "2", "--trainable", "mixers", "--set", "model.recompute_layers=true"];
    succeed(&borrowed(&workshop.distill("run", &more)));
    let load = |folder: &Path| Model::load(folder, &Device::cpu(), Precision::F32).unwrap().parameters;
    let (teacher, student) = (load(&workshop.path("teacher")), load(&workshop.path("run").join("model")));
    let mut equal = 0;
    for (_, parameter) in student.iter() {
        if let Some(id) = teacher.find(&parameter.name) {
            let original = teacher.get(id).value.to_vec::<f32>().unwrap();
            assert_eq!(parameter.value.to_vec::<f32>().unwrap(), original, "{}", parameter.name);
            equal += 1;
        }
    }
    assert!(equal > 20);
    let frozen = |name: &str| !name.contains(".mixer.");
    let header =
        fs::read(workshop.path("run").join("checkpoints").join("step-000003").join("weights.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&header).unwrap();
    assert!(!tensors.names().into_iter().any(frozen), "a checkpoint holds what is trained");
}

#[test]
fn a_model_is_trained_from_random_weights_and_further() {
    let workshop = Workshop::new();
    let source = workshop.path("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("config.json"), support::config_json(VOCABULARY).to_string()).unwrap();
    support::write_tokenizer(&source);
    let arguments = |run: &str, source: &Path, more: &[&str]| -> Vec<String> {
        let (train, run) = (workshop.path("train.jsonl"), workshop.path(run));
        ["train", "--source", text(source), "--train", text(&train), "--run", text(&run), "--sequence-length", "32"]
            .iter()
            .chain(more)
            .map(|argument| (*argument).to_owned())
            .collect()
    };
    let more = ["--steps", "60", "--batch-size", "4", "--micro-batch", "4", "--learning-rate", "5e-3"];
    succeed(&borrowed(&arguments("first", &source, &more)));
    let first = losses(&workshop.path("first"));
    assert!(first[0] > 5.0 && first[59] < 3.0, "from {} to {}", first[0], first[59]);
    let trained = workshop.path("first").join("model");
    let more = ["--steps", "2", "--init", "weights", "--learning-rate", "1e-9"];
    succeed(&borrowed(&arguments("second", &trained, &more)));
    let second = losses(&workshop.path("second"));
    assert!(second[0] < 3.0, "{} after {}", second[0], first[59]);

    // Sizes that no machine has room for.
    let mut config = support::config_json(1 << 24);
    config["hidden_size"] = json!(1 << 24);
    fs::write(source.join("config.json"), config.to_string()).unwrap();
    let said = fail(&borrowed(&arguments("huge", &source, &["--steps", "1"])));
    assert!(said.contains("config.json: vocab_size and hidden_size: the model has"), "{said}");
    assert!(said.contains("more than the") && said.contains("make the model smaller"), "{said}");
    assert!(!workshop.path("huge").exists());
}

#[test]
fn the_configuration_is_printed_and_a_printed_one_is_a_run_file() {
    let workshop = Workshop::new();
    let printed = succeed(&[&borrowed(&workshop.distill("run", &["--steps", "7"]))[..], &["--print-config"]].concat());
    assert!(printed.contains("steps = 7") && printed.contains("layers = [1, 3]"), "{printed}");
    assert!(!workshop.path("run").exists());
    let file = workshop.path("run.toml");
    fs::write(&file, &printed).unwrap();
    let again = succeed(&["distill", "--config", text(&file), "--run", "unused", "--print-config"]);
    assert_eq!(again, printed);
}

/// What is wrong is said once, naming what and where, and nothing is written.
#[test]
fn bad_input_is_refused_before_anything_is_written() {
    let workshop = Workshop::new();
    let data = workshop.path("bad.jsonl");
    let refused = |more: &[&str], expected: &[&str]| {
        let said = fail(&borrowed(&workshop.distill("refused", &[&["--steps", "3"], more].concat())));
        for part in expected {
            assert!(said.contains(part), "{more:?}: {said:?} does not say {part:?}");
        }
        assert_eq!(said.matches("error:").count(), 1, "{said}");
        assert!(
            !workshop.path("refused").exists(),
            "{more:?} left {:?}",
            files_below(&workshop.path("refused")).keys()
        );
    };
    let missing = workshop.path("missing");
    refused(&["--teacher", text(&missing)], &["missing", "config.json"]);
    let source_first =
        format!("error: preparing the train data: opening the data file {}: No such file", missing.display());
    refused(&["--train", text(&missing)], &[&source_first]);
    refused(&["--layers", "4"], &["model.layers names layer 4, but the teacher has layers 0 to 3"]);
    refused(&["--layers", "1,1"], &["model.layers names layer 1 twice"]);
    refused(&["--layers", "x"], &["--layers x: write numbers and ranges"]);
    refused(
        &["--set", "training.lerning_rate=1"],
        &["unknown key `training.lerning_rate`", "`training.learning_rate`?"],
    );
    refused(&["--batch-size", "0"], &["training.batch_size is 0"]);
    refused(&["--batch-size", "10000000000"], &["training.batch_size is 10000000000: it must be from 1 to 1048576"]);
    refused(
        &["--batch-size", "1000000", "--micro-batch", "1000000", "--sequence-length", "10000000"],
        &["training.micro_batch: the logits of 1000000 sequences of 10000000 tokens", "more than the", "(now 1000000)"],
    );
    refused(&["--device", "tpu"], &["tpu"]);
    let run_file = workshop.path("run.toml");
    fs::write(&run_file, "[training]\nbatchsize = 4\n").unwrap();
    refused(
        &["--config", text(&run_file)],
        &["run.toml", "unknown key `training.batchsize`", "`training.batch_size`?"],
    );
    fs::write(&run_file, "[training\n").unwrap();
    refused(&["--config", text(&run_file)], &["run.toml is not TOML"]);

    let with_data = |bytes: &[u8], expected: &[&str]| {
        fs::write(&data, bytes).unwrap();
        refused(&["--train", text(&data)], expected);
    };
    with_data(b"{\"text\": 1}", &[&format!("error: preparing the train data: {} line 1: not a doc", data.display())]);
    with_data(b"", &["bad.jsonl: there is nothing to learn in it (0 documents kept"]);
    with_data(b"\n\n", &["there is nothing to learn in it"]);
    with_data(b"{\"text\": \"x\"}\n{\"text\": \"\xff\"}\n", &["bad.jsonl line 2: not UTF-8 at byte 11"]);
    with_data(b"{\"text\": \"x\"}\n{\"text\": \n", &["bad.jsonl line 2: not a document"]);
    let long = json!({ "id": "the long one", "text": "x".repeat(40) }).to_string();
    with_data(
        long.as_bytes(),
        &["bad.jsonl line 1 (id the long one): the document has 41 tokens, more than a sequence of 32", "split"],
    );
    with_data(
        b"{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}]}",
        &["bad.jsonl line 1: no message is the assistant's"],
    );

    // Positions that the model was not made for are spoken of: documents that long may be meant.
    let output = run(&borrowed(&workshop.distill("long", &["--steps", "1", "--sequence-length", "300"])));
    let said = stderr(&output);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("warning: data.sequence_length is 300, but the model was made for 256 positions"), "{said}");

    // Long documents may be cut or left out, and are counted.
    fs::write(&data, format!("{long}\n{{\"text\": \"short\"}}\n")).unwrap();
    for (how, expected) in [("split", "1 long documents split"), ("drop", "1 long documents dropped")] {
        let more = ["--steps", "1", "--train", text(&data), "--long-documents", how];
        let output = run(&borrowed(&workshop.distill(how, &more)));
        assert!(output.status.success() && stderr(&output).contains(expected), "{}", stderr(&output));
    }

    // The tokenizer knows tokens that the model does not.
    let small = workshop.path("small");
    support::write_model(&small, 200, 3);
    fs::write(&data, "{\"text\": \"\u{1f600}\"}\n").unwrap();
    let more = ["--teacher", text(&small), "--train", text(&data), "--set", "data.end_token=false"];
    refused(&more, &["bad.jsonl line 1: token id", "is outside the model's vocabulary of 200 tokens"]);

    // Vocabularies that differ in size, or in meaning.
    refused(&["--student", text(&small)], &["the vocabularies differ", "has 258 tokens", "has 200"]);
    let swapped = workshop.path("swapped");
    support::write_model(&swapped, VOCABULARY, 3);
    let tokenizer = fs::read_to_string(swapped.join("tokenizer.json")).unwrap();
    let swap = [("\"A\":65", "\"A\":66"), ("\"B\":66", "\"B\":65")];
    let tokenizer = swap.iter().fold(tokenizer, |text, (from, to)| text.replacen(from, to, 1));
    fs::write(swapped.join("tokenizer.json"), tokenizer).unwrap();
    refused(&["--student", text(&swapped)], &["the vocabularies differ", "different meanings to token ids"]);
}

#[test]
fn a_loss_that_is_not_finite_stops_before_the_update() {
    let workshop = Workshop::new();
    let more = ["--steps", "9", "--batch-size", "2", "--checkpoint-every", "1", "--learning-rate", "1e30"];
    let said = fail(&borrowed(&workshop.distill("run", &more)));
    assert!(said.contains("error: step 2: nothing was updated or saved: the loss is "), "{said}");
    assert!(said.contains("the first tensor that is not finite: the model's logits"), "{said}");
    let checkpoints: Vec<String> = files_below(&workshop.path("run").join("checkpoints")).into_keys().collect();
    assert!(
        checkpoints.iter().all(|name| name.starts_with("step-000001/")) && checkpoints.len() == 3,
        "{checkpoints:?}"
    );
    assert_eq!(losses(&workshop.path("run")).len(), 1);
    assert!(!workshop.path("run").join("model").exists());
    // The last good checkpoint loads: the same command gets as far again.
    let again = run(&borrowed(&workshop.distill("run", &more)));
    assert!(stderr(&again).contains("continuing after step 1"), "{}", stderr(&again));
}
