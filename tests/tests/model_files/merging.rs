//! Models merged weight by weight, against the formulas in f64.

use std::fs;
use std::path::{Path, PathBuf};

use model::Model;
use model::checkpoint::SaveOptions;
use model::config::ModelConfig;
use model::merge::{MergeMethod, MergeSource, merge};
use runtime::Device;
use serde_json::json;

use crate::folders::*;

/// Three hybrids of other weights, with a tokenizer each.
fn hybrids(parent: &Path) -> Vec<PathBuf> {
    let config = ModelConfig::from_json(&hybrid_config()).unwrap();
    (0..3u64)
        .map(|seed| {
            let folder = parent.join(format!("model-{seed}"));
            let model = Model::random(config.clone(), seed, &Device::cpu()).unwrap();
            model.save(&folder, &SaveOptions::default()).unwrap();
            fs::write(folder.join("tokenizer.json"), format!("\"{seed}\"")).unwrap();
            folder
        })
        .collect()
}

fn sources(folders: &[PathBuf], weights: &[f64]) -> Vec<MergeSource> {
    folders.iter().zip(weights).map(|(folder, &weight)| MergeSource { folder: folder.clone(), weight }).collect()
}

fn numbers(bytes: &[u8]) -> Vec<f64> {
    bytes.chunks_exact(4).map(|bytes| f64::from(f32::from_le_bytes(bytes.try_into().unwrap()))).collect()
}

fn tensors(folder: &Path) -> Vec<(String, Vec<f64>)> {
    let tensors = read_tensors(&folder.join("model.safetensors"));
    tensors.into_iter().map(|(name, (_, _, bytes))| (name, numbers(&bytes))).collect()
}

fn refusal(sources: &[MergeSource], method: MergeMethod, output: &Path) -> String {
    let message = merge(sources, method, output, |_, _| {}).unwrap_err().to_string();
    assert!(!output.exists(), "{message}");
    message
}

#[test]
fn a_mean_is_that_of_every_weight() {
    let scratch = tempfile::tempdir().unwrap();
    let folders = hybrids(scratch.path());
    let (weights, output) = ([0.5, 0.75, -0.25], scratch.path().join("merged"));
    let mut reported = Vec::new();
    let summary =
        merge(&sources(&folders, &weights), MergeMethod::Linear, &output, |done, all| reported.push((done, all)));
    let summary = summary.unwrap();
    let (merged, given) = (tensors(&output), folders.iter().map(|folder| tensors(folder)).collect::<Vec<_>>());
    assert_eq!(merged.len(), given[0].len());
    for (index, (name, values)) in merged.iter().enumerate() {
        for (position, value) in values.iter().enumerate() {
            let sum: f64 = given.iter().zip(weights).map(|(given, weight)| weight * given[index].1[position]).sum();
            assert_eq!(*value, f64::from(sum as f32), "{name} at {position}");
        }
    }
    assert_eq!((summary.tensors, reported.len()), (merged.len(), merged.len()));
    assert_eq!(summary.parameters as usize, merged.iter().map(|(_, values)| values.len()).sum::<usize>());
    assert!(reported.is_sorted() && reported.iter().all(|(done, all)| done < all && *all == summary.bytes));
    assert_eq!(fs::read_to_string(output.join("tokenizer.json")).unwrap(), "\"0\"");
    Model::load(&output, &Device::cpu(), model::Precision::F32).unwrap();
}

#[test]
fn a_model_merged_with_itself_is_itself() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = random_folder(scratch.path(), "model", &mistral_config());
    let thirds = [1.0 / 3.0; 3];
    for (name, method, weights) in
        [("linear", MergeMethod::Linear, &thirds[..]), ("slerp", MergeMethod::Slerp, &[0.3, 0.7][..])]
    {
        let output = scratch.path().join(name);
        let same = vec![folder.clone(); weights.len()];
        merge(&sources(&same, weights), method, &output, |_, _| {}).unwrap();
        assert_eq!(
            fs::read(output.join("model.safetensors")).unwrap(),
            fs::read(folder.join("model.safetensors")).unwrap(),
            "{name}"
        );
    }
}

#[test]
fn slerp_goes_along_the_arc() {
    let scratch = tempfile::tempdir().unwrap();
    let folders = hybrids(scratch.path());
    // A tensor without a direction, whose mean is taken.
    let zero = "model.norm.weight";
    edit_tensors(&folders[0], |tensors| tensors.get_mut(zero).unwrap().2.fill(0));
    let output = scratch.path().join("merged");
    merge(&sources(&folders[..2], &[0.75, 0.25]), MergeMethod::Slerp, &output, |_, _| {}).unwrap();
    let (merged, from, to) = (tensors(&output), tensors(&folders[0]), tensors(&folders[1]));
    let mut arcs = 0;
    for ((name, values), (from, to)) in
        merged.iter().zip(from.iter().map(|(_, from)| from).zip(to.iter().map(|(_, to)| to)))
    {
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let cosine = dot(from, to) / (dot(from, from) * dot(to, to)).sqrt();
        let factors = if cosine.abs() <= 0.9995 {
            arcs += 1;
            let angle = cosine.acos();
            [(0.75 * angle).sin() / angle.sin(), (0.25 * angle).sin() / angle.sin()]
        } else {
            [0.75, 0.25]
        };
        for ((value, from), to) in values.iter().zip(from).zip(to) {
            let expected = factors[0] * from + factors[1] * to;
            assert!((value - expected).abs() <= 1e-7 * (from.abs() + to.abs()), "{name}: {value}, expected {expected}");
        }
    }
    assert!(arcs > 5, "{arcs} tensors had an arc");
}

#[test]
fn what_cannot_be_merged_is_named_and_nothing_is_written() {
    let scratch = tempfile::tempdir().unwrap();
    let folders = hybrids(scratch.path());
    let output = scratch.path().join("merged");
    let (linear, slerp) = (MergeMethod::Linear, MergeMethod::Slerp);
    let half = |other: &Path| sources(&[folders[0].clone(), other.to_owned()], &[0.5, 0.5]);
    let expect = |message: String, parts: &[&str]| {
        for part in parts {
            assert!(message.contains(part), "{message:?} does not say {part:?}");
        }
    };
    expect(refusal(&sources(&folders, &[0.5, 0.5, 0.5]), linear, &output), &["sum to 1.5", "expected 1"]);
    expect(refusal(&sources(&folders, &[f64::NAN, 0.5, 0.5]), linear, &output), &["model-0", "NaN"]);
    expect(refusal(&sources(&folders[..1], &[1.0]), linear, &output), &["at least two"]);
    expect(refusal(&sources(&folders, &[0.2, 0.3, 0.5]), slerp, &output), &["between two models", "use linear"]);
    expect(refusal(&sources(&folders[..2], &[1.5, -0.5]), slerp, &output), &["from 0 to 1"]);
    expect(refusal(&half(&scratch.path().join("nowhere")), linear, &output), &["nowhere"]);

    let other = random_folder(scratch.path(), "transformer", &mistral_config());
    expect(refusal(&half(&other), linear, &output), &["model-0", "transformer", "mixers"]);
    let mut config = hybrid_config();
    config.insert("intermediate_size".to_owned(), json!(48));
    let other = random_folder(scratch.path(), "wider", &config);
    expect(refusal(&half(&other), linear, &output), &["wider", "mlp.", "[40, 24]", "[48, 24]"]);
    edit_config(&folders[2], "rope_theta", json!(5000.0));
    expect(refusal(&half(&folders[2]), linear, &output), &["model-2", "rotary base"]);

    edit_tensors(&folders[1], |tensors| {
        tensors.get_mut("model.norm.weight").unwrap().2[4..8].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    expect(refusal(&half(&folders[1]), linear, &output), &["model-1", "model.norm.weight", "[1]", "NaN"]);
    edit_tensors(&folders[1], |tensors| drop(tensors.remove("model.norm.weight")));
    expect(refusal(&half(&folders[1]), linear, &output), &["model-1", "model.norm.weight"]);

    fs::create_dir(&output).unwrap();
    fs::write(output.join("mine"), "").unwrap();
    let before = snapshot(scratch.path());
    let message = merge(&half(&folders[0]), linear, &output, |_, _| {}).unwrap_err().to_string();
    assert!(message.contains("exists and is not empty"), "{message}");
    assert!(snapshot(scratch.path()) == before);
}
