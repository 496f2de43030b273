//! Prints the GPU kernels: `ptx list` their names, `ptx dump KERNEL` the text of one, `ptx write FOLDER` all texts.
//! `ptx run FILE` runs a text on the simulator.

#![forbid(unsafe_code)]

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, anyhow, bail};
use clap::{Parser, Subcommand};
use runtime::sim::Case;

/// Lists grafter's GPU kernels and prints their PTX.
#[derive(Parser)]
#[command(name = "ptx")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// One line per kernel: its name, the target, threads per block, parameters.
    List {
        /// Names only, for scripts.
        #[arg(long)]
        names: bool,
    },
    /// The PTX text of one kernel.
    Dump {
        /// The kernel's name as `ptx list` prints it.
        kernel: String,
        /// The text for GPUs on which launches overlap, compute capability 9.0 and newer.
        #[arg(long)]
        overlapping: bool,
    },
    /// Runs a PTX file on the simulator, as the directives in it say, and prints what is in memory afterwards.
    ///
    /// Directives are comments: `//: block 32`, `//: parameter x read f32 = 1 2 3`, `//: parameter y write f32[3]`,
    /// `//: expect y = 2 4 6`, `//: fault out of bounds`; the documentation of `runtime::sim::case` has them all, and
    /// runtime/tests/ptx a hundred examples. Exit code 1: a fault, or other values than expected.
    Run {
        /// The file.
        file: PathBuf,
        /// Print how many instructions ran, too.
        #[arg(long)]
        instructions: bool,
    },
    /// Writes the PTX texts of every kernel, `KERNEL.ptx` and, for GPUs on which launches overlap, `KERNEL.overlapping.ptx`.
    Write {
        /// Where to; it is made if it is not there.
        folder: PathBuf,
    },
}

fn main() -> Result<ExitCode> {
    let kernels = kernels_ptx::catalogue();
    let mut output = io::stdout().lock();
    match Arguments::parse().command {
        Command::List { names: true } => {
            for kernel in kernels {
                writeln!(output, "{}", kernel.name)?;
            }
        }
        Command::List { names: false } => {
            for kernel in kernels {
                let parameters: Vec<String> = kernel
                    .parameters
                    .iter()
                    .map(|parameter| format!("{}: {}", parameter.name, parameter.kind))
                    .collect();
                writeln!(
                    output,
                    "{:<40} {:<7} {:>4} threads  {}",
                    kernel.name,
                    kernel.target,
                    kernel.threads_per_block(),
                    parameters.join(", ")
                )?;
            }
        }
        Command::Dump { kernel: wanted, overlapping } => {
            let Some(kernel) = kernels.into_iter().find(|kernel| kernel.name == wanted) else {
                bail!("no kernel is named \"{wanted}\": `ptx list` prints the names");
            };
            let text = if overlapping { kernel.overlapping_text() } else { Some(kernel.text) };
            let Some(text) = text else { bail!("launches of \"{wanted}\" never overlap") };
            output.write_all(text.as_bytes()).context("writing to standard output")?;
        }
        Command::Write { folder } => {
            fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
            for kernel in kernels {
                let write = |ending: &str, text: &str| {
                    let path = folder.join(format!("{}{ending}", kernel.name));
                    fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
                };
                write(".ptx", &kernel.text)?;
                if let Some(text) = kernel.overlapping_text() {
                    write(".overlapping.ptx", &text)?;
                }
            }
        }
        Command::Run { file, instructions } => return run(&file, instructions, &mut output),
    }
    Ok(ExitCode::SUCCESS)
}

fn run(file: &Path, instructions: bool, output: &mut impl io::Write) -> Result<ExitCode> {
    let text = fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
    let case = Case::parse(&text).map_err(|problem| anyhow!("{}: {problem}", file.display()))?;
    let report = case.run(&text);
    for (name, values) in &report.memory {
        writeln!(output, "{name} = {}", values.join(" "))?;
    }
    if instructions {
        for (name, count) in &report.instructions {
            writeln!(output, "{count:>10} {name}")?;
        }
    }
    if let Some(fault) = &report.fault {
        writeln!(output, "fault: {fault}")?;
    }
    for difference in &report.differences {
        writeln!(output, "not as expected: {difference}")?;
    }
    Ok(if report.differences.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
