//! Runs a folder of parity cases: results and gradients that other implementations computed.

#![forbid(unsafe_code)]

use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use runtime::Device;
use tools::parity::{self, Options, Precision};

/// Compares grafter with the cases of a fixture folder (format grafter-parity/1). Exit code 1 if any case fails, is of
/// an unknown kind, lacks a tensor or gives a value that is not a number.
#[derive(Parser)]
#[command(name = "parity")]
struct Arguments {
    /// The folder with manifest.json.
    folder: PathBuf,
    /// Where to compute: cpu, cuda:N, auto.
    #[arg(long, default_value = "cpu")]
    device: Device,
    /// Only cases whose file or op contains this.
    #[arg(long)]
    filter: Option<String>,
    /// Multiplies the fp32 bounds, for devices whose instructions are approximate; every case says so.
    #[arg(long, default_value_t = 1.0)]
    fp32_scale: f64,
    /// Element type of inputs and weights; the manifest's bounds for it apply.
    #[arg(long, value_enum, default_value = "fp32")]
    precision: Precision,
    /// Every tensor of every case, not only the worst one and those that fail.
    #[arg(long)]
    tensors: bool,
    /// One JSON document instead of text.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether everything passed.
fn run(arguments: Arguments) -> Result<bool> {
    let options = Options {
        device: arguments.device,
        precision: arguments.precision,
        filter: arguments.filter,
        fp32_scale: arguments.fp32_scale,
    };
    let mut output = io::stdout().lock();
    let report = parity::run(&arguments.folder, &options, |case| {
        if !arguments.json {
            // A reader that has gone away is no reason to stop: the exit code still tells.
            let _ = output.write_all(case.to_text(arguments.tensors).as_bytes());
        }
    })?;
    if arguments.json {
        serde_json::to_writer_pretty(&mut output, &report)?;
        writeln!(output)?;
    } else {
        let _ = writeln!(output, "{}", report.summary());
    }
    Ok(report.passed())
}
