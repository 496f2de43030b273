//! That the files of `tests/ptx` have every operation that the simulator can decode.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use super::decode::decode;

/// The names of an enum's variants in the source that declares it.
fn variants<'a>(source: &'a str, name: &str) -> Vec<&'a str> {
    let body = source.split_once(&format!("pub(super) enum {name} {{\n")).unwrap().1;
    let body = body.split_once("\n}").unwrap().0;
    // Variants are indented once, their fields twice.
    let lines = body.lines().filter_map(|line| line.strip_prefix("    "));
    lines
        .filter(|line| line.starts_with(|first: char| first.is_ascii_uppercase()))
        .map(|line| line.split(|character: char| !character.is_ascii_alphanumeric()).next().unwrap())
        .collect()
}

/// What stands behind `label` in a printed operation: `Some("Add")` of `Binary32 { op: Add, … }`.
fn field<'a>(printed: &'a str, label: &str) -> Option<&'a str> {
    let value = printed.split_once(&format!("{label}: "))?.1;
    value.split(|character: char| !character.is_ascii_alphanumeric()).next()
}

#[test]
fn every_operation_has_a_file_with_the_values_that_it_gives() {
    let source = include_str!("program.rs");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/ptx");
    let (mut operations, mut of) = (BTreeSet::new(), BTreeSet::new());
    for group in ["", "divergence"] {
        for entry in fs::read_dir(folder.join(group)).unwrap() {
            let path = entry.unwrap().path();
            if !path.is_file() {
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            // A file of several entries is about choosing one.
            let Ok(program) = decode(&text, None) else { continue };
            for instruction in &program.instructions {
                let printed = format!("{:?}", instruction.op);
                let name =
                    printed.split(|character: char| !character.is_ascii_alphanumeric()).next().unwrap().to_owned();
                if let Some(field) = field(&printed, "op") {
                    of.insert((name.clone(), field.to_owned()));
                }
                operations.insert(name);
            }
        }
    }
    let mut missing: Vec<String> =
        variants(source, "Op").into_iter().filter(|name| !operations.contains(*name)).map(str::to_owned).collect();
    for group in
        ["Unary32", "Binary32", "Ternary32", "Unary64", "Binary64", "Ternary64", "Shift", "Widen", "Narrow", "FloatOp"]
    {
        let names = variants(source, group);
        assert!(names.len() >= 2, "{group}: {names:?}");
        // Operations with a name of their own that take one of these.
        let holders: &[&str] = match group {
            "Shift" => &["Shift64"],
            "FloatOp" => &["Float32", "Bf16"],
            _ => &[group],
        };
        let has = |name: &str| holders.iter().any(|holder| of.contains(&((*holder).to_owned(), name.to_owned())));
        let absent = names.into_iter().filter(|name| !has(name));
        missing.extend(absent.map(|name| format!("{group}::{name}")));
    }
    assert!(missing.is_empty(), "no file in tests/ptx has {}", missing.join(", "));
}
