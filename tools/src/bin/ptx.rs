//! Prints the GPU kernels: `ptx list` their names, `ptx dump KERNEL` the text of one.

#![forbid(unsafe_code)]

use std::io::{self, Write as _};

use anyhow::{Context as _, Result, bail};
use clap::{Parser, Subcommand};

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
    },
}

fn main() -> Result<()> {
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
                    "{:<16} {:<7} {:>4} threads  {}",
                    kernel.name,
                    kernel.target,
                    kernel.threads_per_block(),
                    parameters.join(", ")
                )?;
            }
        }
        Command::Dump { kernel: wanted } => {
            let Some(kernel) = kernels.into_iter().find(|kernel| kernel.name == wanted) else {
                bail!("no kernel is named \"{wanted}\": `ptx list` prints the names");
            };
            output.write_all(kernel.text.as_bytes()).context("writing to standard output")?;
        }
    }
    Ok(())
}
