//! The runtime supplies the driver's symbols itself. Its list must be exactly what the bindings declare: a name too few is
//! a link error in whatever comes to use it, so it is found here and not there.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

#[test]
fn the_list_of_driver_symbols_is_that_of_the_bindings() {
    // Packages of other platforms need not be on this machine.
    let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let arguments = ["metadata", "--format-version", "1", "--offline", "--locked", "--filter-platform", &platform];
    let Ok(output) = Command::new("cargo").args(arguments).output() else {
        println!("skipped: there is no cargo here to ask where the bindings' source is");
        return;
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let bindings = metadata["packages"]
        .as_array()
        .unwrap()
        .iter()
        .find(|package| package["name"] == "cust_raw")
        .map(|package| PathBuf::from(package["manifest_path"].as_str().unwrap()))
        .unwrap();

    let declared = fs::read_to_string(bindings.with_file_name("src").join("cuda.rs")).unwrap();
    let declared: BTreeSet<&str> = declared
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("pub fn cu"))
        .map(|rest| &rest[..rest.find('(').unwrap()])
        .collect();
    assert!(declared.len() > 300, "the bindings' source no longer looks as it did: {} functions", declared.len());

    let list = Path::new(metadata["workspace_root"].as_str().unwrap()).join("runtime/src/cuda/symbols.rs");
    let list = fs::read_to_string(list).unwrap();
    let listed: BTreeSet<&str> = list.lines().filter_map(|line| line.trim().strip_prefix("cu")).collect();
    assert_eq!(listed, declared);
}
