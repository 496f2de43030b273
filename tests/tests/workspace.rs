//! What the workspace promises about itself: which crate may know which, where `unsafe` may be, that versions are named
//! once.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Every crate of the workspace and those of ours that it may depend on, in any way (ARCHITECTURE.md, "The crates").
const ALLOWED: &[(&str, &[&str])] = &[
    ("grafter-kernels-ptx", &[]),
    ("grafter-runtime", &["grafter-kernels-ptx"]),
    ("grafter-autograd", &["grafter-runtime", "grafter-kernels-ptx"]),
    ("grafter-model", &["grafter-autograd", "grafter-runtime"]),
    ("grafter-distill", &["grafter-model", "grafter-autograd", "grafter-runtime"]),
    ("grafter-tools", &["grafter-model", "grafter-autograd", "grafter-runtime", "grafter-kernels-ptx"]),
    (
        "grafter-tests",
        &[
            "grafter-distill",
            "grafter-tools",
            "grafter-model",
            "grafter-autograd",
            "grafter-runtime",
            "grafter-kernels-ptx",
        ],
    ),
];

/// The one file outside `runtime` that may hold unsafe code: it maps files.
const MAPS_FILES: &str = "model/src/checkpoint/map.rs";

#[test]
fn crates_know_only_those_they_may() {
    assert_eq!(forbidden(&metadata()), Vec::<String>::new());
}

#[test]
fn a_forbidden_edge_is_found_whatever_its_kind() {
    for kind in [Value::Null, Value::from("dev"), Value::from("build")] {
        let mut metadata = metadata();
        let packages = metadata["packages"].as_array_mut().unwrap();
        let autograd = packages.iter_mut().find(|package| package["name"] == "grafter-autograd").unwrap();
        let edge = serde_json::json!({"name": "grafter-model", "kind": kind});
        autograd["dependencies"].as_array_mut().unwrap().push(edge);
        assert_eq!(forbidden(&metadata), ["grafter-autograd must not depend on grafter-model"]);
    }
    let mut metadata = metadata();
    metadata["packages"][0]["name"] = Value::from("grafter-elsewhere");
    assert!(forbidden(&metadata).contains(&"grafter-elsewhere is not in the table of crates".to_owned()));
}

#[test]
fn external_versions_are_named_once_in_the_root() {
    let root = root();
    for package in metadata()["packages"].as_array().unwrap() {
        let path = PathBuf::from(package["manifest_path"].as_str().unwrap());
        let manifest: Vec<String> = fs::read_to_string(&path).unwrap().lines().map(str::to_owned).collect();
        let mut in_dependencies = false;
        for line in manifest.iter().map(|line| line.trim()) {
            if line.starts_with('[') {
                in_dependencies = line.contains("dependencies");
            } else if in_dependencies && !line.is_empty() && !line.starts_with('#') {
                assert!(
                    line.contains("workspace = true"),
                    "{}: {line:?} names a version of its own: put it into [workspace.dependencies]",
                    path.strip_prefix(&root).unwrap().display()
                );
            }
        }
    }
}

#[test]
fn every_direct_dependency_has_its_reason() {
    let reasons = fs::read_to_string(root().join("docs/dependencies.md")).unwrap();
    let metadata = metadata();
    let names: BTreeSet<&str> = metadata["packages"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|package| package["dependencies"].as_array().unwrap())
        .map(|dependency| dependency["name"].as_str().unwrap())
        .filter(|name| !name.starts_with("grafter-"))
        .collect();
    assert!(names.len() > 5);
    for name in names {
        assert!(reasons.contains(&format!("| {name} |")), "docs/dependencies.md gives no reason for {name}");
    }
}

#[test]
fn unsafe_code_is_where_it_may_be() {
    let root = root();
    let mut sources = Vec::new();
    for package in metadata()["packages"].as_array().unwrap() {
        rust_files(Path::new(package["manifest_path"].as_str().unwrap()).parent().unwrap(), &mut sources);
    }
    assert!(sources.len() > 50);
    let mut holders = BTreeSet::new();
    for path in &sources {
        let relative = path.strip_prefix(&root).unwrap().to_string_lossy().into_owned();
        if has_unsafe_code(&fs::read_to_string(path).unwrap()) {
            holders.insert(relative);
        }
    }
    let allowed = |file: &String| file.starts_with("runtime/") || file == MAPS_FILES;
    let elsewhere: Vec<&String> = holders.iter().filter(|file| !allowed(file)).collect();
    assert!(elsewhere.is_empty(), "unsafe code outside runtime and {MAPS_FILES}: {elsewhere:?}");
    assert!(holders.contains(MAPS_FILES), "the search finds nothing");
    for (folder, level) in [
        ("kernels-ptx", "forbid"),
        ("autograd", "forbid"),
        ("model", "deny"),
        ("distill", "forbid"),
        ("tools", "forbid"),
    ] {
        let text = fs::read_to_string(root.join(folder).join("src/lib.rs")).unwrap();
        assert!(
            text.contains(&format!("#![{level}(unsafe_code)]")),
            "{folder}/src/lib.rs does not {level} unsafe code"
        );
    }
}

#[test]
fn unsafe_code_is_told_from_talk_about_it() {
    let keyword = "unsafe";
    for code in
        [format!("{keyword} {{ call() }}"), format!("pub {keyword} fn f()"), format!("{keyword} impl Send for X")]
    {
        assert!(has_unsafe_code(&code), "{code}");
    }
    for talk in [format!("// {keyword} {{"), format!("/// not {keyword} fn"), format!("#![forbid({keyword}_code)]")] {
        assert!(!has_unsafe_code(&talk), "{talk}");
    }
}

/// Whether the text holds an unsafe block, function, trait or implementation.
fn has_unsafe_code(text: &str) -> bool {
    // Spelled in two parts, so that this file does not find itself.
    let starts = ["{", "fn ", "impl ", "impl<", "trait ", "extern "].map(|next| format!("{} {next}", "unsafe"));
    text.lines()
        .map(|line| line.split("//").next().unwrap_or_default())
        .any(|line| starts.iter().any(|start| line.contains(start)))
}

/// Edges of the workspace that the table does not allow, and crates that it does not know.
fn forbidden(metadata: &Value) -> Vec<String> {
    let mut found = Vec::new();
    for package in metadata["packages"].as_array().unwrap() {
        let name = package["name"].as_str().unwrap();
        let Some((_, allowed)) = ALLOWED.iter().find(|(known, _)| *known == name) else {
            found.push(format!("{name} is not in the table of crates"));
            continue;
        };
        for dependency in package["dependencies"].as_array().unwrap() {
            let dependency = dependency["name"].as_str().unwrap();
            if dependency.starts_with("grafter-") && !allowed.contains(&dependency) {
                found.push(format!("{name} must not depend on {dependency}"));
            }
        }
    }
    found
}

/// What Cargo knows of the workspace's own packages.
fn metadata() -> Value {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn root() -> PathBuf {
    PathBuf::from(metadata()["workspace_root"].as_str().unwrap())
}

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}
