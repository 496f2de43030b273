//! Prints the GPU kernels: `ptx list` their names, `ptx dump KERNEL` the text of one, `ptx write FOLDER` all texts.

#![forbid(unsafe_code)]

use std::fs;
use std::io::{self, Write as _};
use std::path::PathBuf;

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
    /// Writes the PTX text of every kernel, each to a file of its own, `KERNEL.ptx`.
    Write {
        /// Where to; it is made if it is not there.
        folder: PathBuf,
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
                    "{:<40} {:<7} {:>4} threads  {}",
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
        Command::Write { folder } => {
            fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
            for kernel in kernels {
                let path = folder.join(format!("{}.ptx", kernel.name));
                fs::write(&path, &kernel.text).with_context(|| format!("writing {}", path.display()))?;
            }
        }
    }
    Ok(())
}
