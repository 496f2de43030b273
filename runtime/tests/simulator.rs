//! The simulator against the instruction set: every file in `tests/ptx` is a small kernel with the values that the PTX ISA
//! says come out of it, or with the fault that is in it. `runtime::sim::case` describes the directives in the files.
//!
//! An H100 gives the same values, to the bit, in all files without a fault, except for `%smid`, `%warpid` and `%nwarpid`,
//! which number what a GPU has, and for the approximations of sin, cos and tanh, which are coarser there.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use runtime::sim::Case;

fn files(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/ptx").join(folder);
    let mut files: Vec<PathBuf> =
        fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file()).collect();
    files.sort();
    files
}

/// Runs every file of a folder; all that differs, by file.
fn check(folder: &str) -> usize {
    let mut wrong = Vec::new();
    let files = files(folder);
    for path in &files {
        let text = fs::read_to_string(path).unwrap();
        let name = path.file_name().unwrap().to_string_lossy();
        match Case::parse(&text) {
            Ok(case) => {
                wrong.extend(case.run(&text).differences.iter().map(|difference| format!("{name}: {difference}")));
            }
            Err(problem) => wrong.push(format!("{name}: {problem}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    files.len()
}

#[test]
fn instructions_do_what_the_instruction_set_says() {
    assert!(check("") > 60);
}

#[test]
fn diverged_lanes_meet_again() {
    assert!(check("divergence") > 5);
}

#[test]
fn planted_faults_are_found_and_their_clean_twins_pass() {
    assert!(check("faults") > 30);
}
