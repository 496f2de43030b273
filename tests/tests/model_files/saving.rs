//! A model folder appears whole or not at all, and an old one is never lost.

use std::fs;
use std::path::Path;

use model::checkpoint::SaveOptions;
use model::{Model, Precision};
use runtime::Device;

use crate::folders::*;

fn replacing() -> SaveOptions<'static> {
    SaveOptions { replace: true, ..SaveOptions::default() }
}

/// The names in a folder, hidden ones included.
fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn other_files_are_carried_over_and_weights_are_not() {
    let scratch = tempfile::tempdir().unwrap();
    let source = random_folder(scratch.path(), "source", &mistral_config());
    for (name, text) in [
        ("tokenizer.json", "{}"),
        ("tokenizer.model", "\u{1}\u{2}"),
        ("modeling_apriel_hybrid_ssm.py", "print()"),
        ("chat_template.jinja", "{{ x }}"),
        ("LICENSE", "free"),
        ("training_args.bin", "args"),
        ("pytorch_model.bin", "weights"),
        ("consolidated.safetensors", "weights"),
        ("model.safetensors.index.json", "{}"),
        ("model.gguf", "weights"),
    ] {
        fs::write(source.join(name), text).unwrap();
    }
    for name in ["additional_chat_templates", "original", ".git"] {
        fs::create_dir(source.join(name)).unwrap();
    }
    fs::write(source.join("additional_chat_templates/tool.jinja"), "tool").unwrap();
    fs::write(source.join("original/consolidated.00.pth"), "weights").unwrap();
    fs::write(source.join(".git/HEAD"), "ref").unwrap();
    let copy = scratch.path().join("copy");
    let options = SaveOptions { carry_from: Some(&source), ..SaveOptions::default() };
    random_model(&mistral_config()).save(&copy, &options).unwrap();
    assert_eq!(
        names(&copy),
        [
            "LICENSE",
            "additional_chat_templates",
            "chat_template.jinja",
            "config.json",
            "model.safetensors",
            "modeling_apriel_hybrid_ssm.py",
            "tokenizer.json",
            "tokenizer.model",
            "training_args.bin"
        ]
    );
    assert_eq!(fs::read_to_string(copy.join("additional_chat_templates/tool.jinja")).unwrap(), "tool");
    assert_eq!(fs::read_to_string(copy.join("tokenizer.model")).unwrap(), "\u{1}\u{2}");
}

#[test]
fn an_existing_folder_is_replaced_only_on_demand_and_only_if_it_is_a_model() {
    let scratch = tempfile::tempdir().unwrap();
    let model = random_model(&mistral_config());
    let target = scratch.path().join("model");
    fs::create_dir(&target).unwrap();
    model.save(&target, &SaveOptions::default()).unwrap();
    let before = snapshot(scratch.path());
    let message = model.save(&target, &SaveOptions::default()).unwrap_err().to_string();
    assert!(message.contains("exists and is not empty: choose another folder"), "{message}");
    assert!(snapshot(scratch.path()) == before);
    fs::write(target.join("stale"), "").unwrap();
    model.save(&target, &replacing()).unwrap();
    assert!(snapshot(scratch.path()) == before, "the old folder is gone with all its files");

    let other = scratch.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("thesis.tex"), "years of work").unwrap();
    let message = model.save(&other, &replacing()).unwrap_err().to_string();
    assert!(message.contains("it is no model folder and is not replaced"), "{message}");
    let message = model.save(&other.join("thesis.tex"), &replacing()).unwrap_err().to_string();
    assert!(message.contains("exists and is no folder"), "{message}");
    assert_eq!(names(&other), ["thesis.tex"]);
}

#[test]
fn a_weight_that_is_not_finite_stops_the_save_and_the_old_folder_stays() {
    let scratch = tempfile::tempdir().unwrap();
    let mut model = random_model(&mistral_config());
    let target = scratch.path().join("model");
    model.save(&target, &SaveOptions::default()).unwrap();
    let before = snapshot(scratch.path());
    let id = model.parameters.find("model.layers.1.mlp.up_proj.weight").unwrap();
    let spoil = |model: &mut Model, value: f32| {
        model.parameters.get_mut(id).value.make_mut::<f32>().unwrap()[24 * 3 + 1] = value;
    };
    spoil(&mut model, f32::NAN);
    let message = model.save(&target, &replacing()).unwrap_err().to_string();
    assert!(message.contains("model.layers.1.mlp.up_proj.weight: the element at [3, 1] is NaN"), "{message}");
    assert!(snapshot(scratch.path()) == before);
    spoil(&mut model, f32::MAX);
    let narrow = SaveOptions { dtype: Some(autograd::DType::Bf16), ..replacing() };
    let message = model.save(&target, &narrow).unwrap_err().to_string();
    assert!(message.contains("is too large for bfloat16: save in float32"), "{message}");
    assert!(snapshot(scratch.path()) == before);
}

#[test]
fn what_a_killed_process_left_behind_is_cleaned_up() {
    let scratch = tempfile::tempdir().unwrap();
    let model = random_model(&mistral_config());
    let target = scratch.path().join("model");
    model.save(&target, &SaveOptions::default()).unwrap();
    let complete = snapshot(&target);
    // Killed while writing the new folder, and, worse, between moving the old one aside and the new one in.
    fs::create_dir(scratch.path().join(".model.partial")).unwrap();
    fs::write(scratch.path().join(".model.partial/model.safetensors"), "half").unwrap();
    fs::rename(&target, scratch.path().join(".model.previous")).unwrap();
    let message = model.save(&target, &SaveOptions::default()).unwrap_err().to_string();
    assert!(message.contains("exists and is not empty"), "the old folder is back: {message}");
    assert!(snapshot(&target) == complete);
    model.save(&target, &replacing()).unwrap();
    assert_eq!(names(scratch.path()), ["model"]);
    assert!(snapshot(&target) == complete);
}

#[test]
fn a_place_that_cannot_be_written_is_named() {
    let scratch = tempfile::tempdir().unwrap();
    let model = random_model(&mistral_config());
    fs::write(scratch.path().join("file"), "").unwrap();
    let message = model.save(&scratch.path().join("file/model"), &SaveOptions::default()).unwrap_err().to_string();
    assert!(message.contains("cannot") && message.contains("file"), "{message}");
    assert_eq!(names(scratch.path()), ["file"]);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let locked = scratch.path().join("locked");
        fs::create_dir(&locked).unwrap();
        fs::set_permissions(&locked, fs::Permissions::from_mode(0o555)).unwrap();
        // The superuser may write anyway; then there is nothing to see here.
        if fs::write(locked.join("probe"), "").is_err() {
            let message = model.save(&locked.join("model"), &SaveOptions::default()).unwrap_err().to_string();
            assert!(message.contains("choose another place or change the permissions"), "{message}");
        }
        fs::set_permissions(&locked, fs::Permissions::from_mode(0o755)).unwrap();
    }
}

/// A disk that is full, as far as a process without privileges can arrange it: files may grow to 4 KiB only. The test
/// runs itself in a shell with that limit; without the limit's signal the write fails as on a full disk.
#[test]
#[cfg(target_os = "linux")]
fn a_disk_that_is_full_loses_nothing() {
    const PLACE: &str = "GRAFTER_TEST_FULL_DISK";
    if let Some(place) = std::env::var_os(PLACE) {
        let message = random_model(&mistral_config()).save(Path::new(&place), &replacing()).unwrap_err().to_string();
        assert!(message.contains("cannot write") && message.contains("model.safetensors"), "{message}");
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let target = scratch.path().join("model");
    let model = random_model(&mistral_config());
    model.save(&target, &SaveOptions::default()).unwrap();
    let before = snapshot(scratch.path());
    let status = std::process::Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 8; exec \"$0\" --exact saving::a_disk_that_is_full_loses_nothing"])
        .arg(std::env::current_exe().unwrap())
        .env(PLACE, &target)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status()
        .unwrap();
    assert!(status.success(), "the save did not fail as it should");
    assert!(snapshot(scratch.path()) == before);
    let again = Model::load(&target, &Device::cpu(), Precision::F32).unwrap();
    assert_eq!(values(&again), values(&model));
}
