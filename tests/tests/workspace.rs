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
    let Some(metadata) = metadata() else { return };
    assert_eq!(forbidden(&metadata), Vec::<String>::new());
}

#[test]
fn a_forbidden_edge_is_found_whatever_its_kind() {
    let Some(real) = metadata() else { return };
    for kind in [Value::Null, Value::from("dev"), Value::from("build")] {
        let mut metadata = real.clone();
        let packages = metadata["packages"].as_array_mut().unwrap();
        let autograd = packages.iter_mut().find(|package| package["name"] == "grafter-autograd").unwrap();
        let edge = serde_json::json!({"name": "grafter-model", "kind": kind});
        autograd["dependencies"].as_array_mut().unwrap().push(edge);
        assert_eq!(forbidden(&metadata), ["grafter-autograd must not depend on grafter-model"]);
    }
    let mut metadata = real;
    metadata["packages"][0]["name"] = Value::from("grafter-elsewhere");
    assert!(forbidden(&metadata).contains(&"grafter-elsewhere is not in the table of crates".to_owned()));
}

#[test]
fn external_versions_are_named_once_in_the_root() {
    let Some(metadata) = metadata() else { return };
    let root = root();
    for package in metadata["packages"].as_array().unwrap() {
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
fn every_dependency_has_its_reason_and_every_reason_its_dependency() {
    let Some(metadata) = metadata() else { return };
    let used: BTreeSet<String> = metadata["packages"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|package| package["dependencies"].as_array().unwrap())
        .map(|dependency| dependency["name"].as_str().unwrap().to_owned())
        .filter(|name| !name.starts_with("grafter-"))
        .collect();
    assert!(used.len() > 5);
    let named = named_versions(&fs::read_to_string(root().join("Cargo.toml")).unwrap());
    let reasons = reasons(&fs::read_to_string(root().join("docs/dependencies.md")).unwrap());
    assert_eq!(named, used, "left: the root's [workspace.dependencies]; right: what its crates use");
    assert_eq!(reasons, used, "left: the rows of docs/dependencies.md; right: what the crates use");
}

#[test]
fn dependencies_and_reasons_are_read_rightly() {
    let manifest = "[workspace]\nmembers = []\n[workspace.dependencies]\nours = { path = \"ours\" }\n# Why.\na-b = \"1\"\n\n\
                    c = { version = \"2\" }\n[profile.release]\ndebug = 1\n";
    assert_eq!(named_versions(manifest), BTreeSet::from(["a-b".to_owned(), "c".to_owned()]));
    let page = "| crate | used by |\n|---|---|\n| a-b | x |\nSee | c |\n| d | y |\n";
    assert_eq!(reasons(page), BTreeSet::from(["a-b".to_owned(), "d".to_owned()]));
}

/// External crates under `[workspace.dependencies]` of a manifest.
fn named_versions(manifest: &str) -> BTreeSet<String> {
    manifest
        .lines()
        .map(str::trim)
        .skip_while(|line| *line != "[workspace.dependencies]")
        .skip(1)
        .take_while(|line| !line.starts_with('['))
        .filter(|line| !line.is_empty() && !line.starts_with('#') && !line.contains("path ="))
        .map(|line| line.split('=').next().unwrap_or_default().trim().to_owned())
        .collect()
}

/// First column of the table of a Markdown page.
fn reasons(page: &str) -> BTreeSet<String> {
    let rows = page.lines().filter(|line| line.starts_with("| "));
    let first = rows.map(|row| row.split('|').nth(1).unwrap_or_default().trim());
    first.filter(|name| *name != "crate").map(str::to_owned).collect()
}

#[test]
fn unsafe_code_is_where_it_may_be() {
    let Some(metadata) = metadata() else { return };
    let root = root();
    let mut sources = Vec::new();
    for package in metadata["packages"].as_array().unwrap() {
        rust_files(Path::new(package["manifest_path"].as_str().unwrap()).parent().unwrap(), &mut sources);
    }
    assert!(sources.len() > 50);
    let (mut holders, mut allowing) = (BTreeSet::new(), BTreeSet::new());
    for path in &sources {
        let relative = path.strip_prefix(&root).unwrap().to_string_lossy().into_owned();
        let text = fs::read_to_string(path).unwrap();
        if has_unsafe_code(&text) {
            holders.insert(relative.clone());
        }
        if lints_unsafe_code(&text, "allow") || lints_unsafe_code(&text, "expect") {
            allowing.insert(relative);
        }
    }
    let allowed = |file: &String| file.starts_with("runtime/") || file == MAPS_FILES;
    let elsewhere: Vec<&String> = holders.iter().filter(|file| !allowed(file)).collect();
    assert!(elsewhere.is_empty(), "unsafe code outside runtime and {MAPS_FILES}: {elsewhere:?}");
    assert!(holders.contains(MAPS_FILES), "the search finds nothing");
    assert_eq!(allowing, BTreeSet::from([MAPS_FILES.to_owned()]), "files that allow unsafe code");
    for package in metadata["packages"].as_array().unwrap() {
        let level = match package["name"].as_str().unwrap() {
            "grafter-runtime" => continue,
            "grafter-model" => "deny",
            _ => "forbid",
        };
        for target in package["targets"].as_array().unwrap() {
            let kind = target["kind"][0].as_str().unwrap();
            if !["lib", "bin"].contains(&kind) {
                continue;
            }
            let path = target["src_path"].as_str().unwrap();
            assert!(
                lints_unsafe_code(&fs::read_to_string(path).unwrap(), level),
                "{path} does not {level} unsafe code: add #![{level}(unsafe_code)]"
            );
        }
    }
}

/// Whether the text sets the lint on unsafe code to a level, for the whole file or a part.
fn lints_unsafe_code(text: &str, level: &str) -> bool {
    let attribute = format!("[{level}({}_code", "unsafe");
    text.lines().map(str::trim).any(|line| line.starts_with('#') && line.contains(&attribute))
}

#[test]
fn unsafe_code_is_told_from_talk_about_it() {
    let keyword = "unsafe";
    for code in
        [format!("{keyword} {{ call() }}"), format!("pub {keyword} fn f()"), format!("{keyword} impl Send for X")]
    {
        assert!(has_unsafe_code(&code), "{code}");
    }
    assert!(lints_unsafe_code(&format!("#![deny({keyword}_code)]"), "deny"));
    assert!(lints_unsafe_code(&format!("  #[allow({keyword}_code, dead_code)]"), "allow"));
    assert!(!lints_unsafe_code(&format!("// not #![deny({keyword}_code)]"), "deny"));
    assert!(!lints_unsafe_code(&format!("#![deny({keyword}_code)]"), "forbid"));
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

/// What Cargo knows of the workspace's own packages; `None`, and a line that says so, where there is no Cargo: compiled
/// tests can be run on a machine without Rust.
fn metadata() -> Option<Value> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(&cargo)
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output();
    match output {
        Ok(output) => {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            Some(serde_json::from_slice(&output.stdout).unwrap())
        }
        Err(error) => {
            println!("skipped: cannot run {}: {error}", cargo.display());
            None
        }
    }
}

/// The workspace's folder: the parent of this crate's.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
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
