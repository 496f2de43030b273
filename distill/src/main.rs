//! The program `grafter`.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    grafter_distill::commands::main()
}
