//! The binary `profile`: what it writes, and what its exit code says.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

fn profile(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_profile")).args(arguments).output().unwrap()
}

fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::create_dir_all(&folder).unwrap();
    folder
}

const SMALL: [&str; 7] = ["operator", "cast_to_bf16", "swiglu", "--device", "sim", "--limit", "16"];

/// Measures small problems, changes each time by `factor`, and returns what comparing with them says.
fn compared_with(factor: f64, folder: &Path) -> Output {
    let json = folder.join(format!("{factor}.json"));
    let json = json.to_str().unwrap();
    let measured = profile(&[&SMALL[..], &["--json", json]].concat());
    assert!(measured.status.success(), "{measured:?}");
    let mut table: Value = serde_json::from_str(&fs::read_to_string(json).unwrap()).unwrap();
    let lines = table["lines"].as_array_mut().unwrap();
    assert_eq!(lines.len(), 3);
    for line in lines {
        line["seconds"] = (line["seconds"].as_f64().unwrap() * factor).into();
    }
    fs::write(json, table.to_string()).unwrap();
    profile(&[&SMALL[..], &["--compare", json]].concat())
}

#[test]
fn comparing_fails_when_a_line_became_slower_and_only_then() {
    let folder = folder("compare");
    let slower = compared_with(1e-3, &folder);
    let text = String::from_utf8_lossy(&slower.stdout).into_owned();
    assert_eq!(slower.status.code(), Some(1), "{text}");
    assert!(text.contains("swiglu_forward is slower by"), "{text}");
    let faster = compared_with(1e3, &folder);
    let text = String::from_utf8_lossy(&faster.stdout).into_owned();
    assert_eq!(faster.status.code(), Some(0), "{text}");
    assert!(text.contains("swiglu_forward is faster by"), "{text}");
}

#[test]
fn a_table_is_put_between_the_marks_of_a_page() {
    let folder = folder("render");
    let (json, markdown, page) = (folder.join("table.json"), folder.join("table.md"), folder.join("page.md"));
    let paths = [&json, &markdown, &page].map(|path| path.to_str().unwrap());
    let measured = profile(&[&SMALL[..], &["--json", paths[0], "--markdown", paths[1]]].concat());
    assert!(measured.status.success(), "{measured:?}");
    let table = fs::read_to_string(&markdown).unwrap();
    assert!(table.contains("| swiglu_backward | 16384 x 14336 |"), "{table}");
    assert_eq!(profile(&["render", paths[0]]).stdout, table.as_bytes());

    fs::write(&page, "head\n<!-- profile operator -->\nold\n<!-- end -->\ntail\n").unwrap();
    assert!(profile(&["render", paths[0], "--into", paths[2]]).status.success());
    let expected = format!("head\n<!-- profile operator -->\n\n{table}\n<!-- end -->\ntail\n");
    assert_eq!(fs::read_to_string(&page).unwrap(), expected);
    fs::write(&page, "without marks").unwrap();
    assert_eq!(profile(&["render", paths[0], "--into", paths[2]]).status.code(), Some(1));
}

#[test]
fn a_name_that_no_operator_has_is_an_error() {
    let output = profile(&["operator", "quicksort", "--device", "sim"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--list"), "{output:?}");
}

#[test]
fn the_page_shows_the_committed_figures() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
    let json = docs.join("performance.json");
    let rendered = profile(&["render", json.to_str().unwrap()]);
    assert!(rendered.status.success(), "{rendered:?}");
    let table = String::from_utf8(rendered.stdout).unwrap();
    let page = fs::read_to_string(docs.join("performance.md")).unwrap();
    let shown = format!("<!-- profile operator -->\n\n{table}\n<!-- end -->\n");
    assert!(page.contains(&shown), "profile render docs/performance.json --into docs/performance.md");
}
