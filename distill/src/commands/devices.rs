//! `grafter devices`.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use runtime::cuda;
use serde_json::{Value, json};

use super::{done, output};
use crate::memory;

const EXAMPLES: &str = "\
Example:
  grafter devices --json";

/// List the devices that can compute
///
/// The CPU, and every GPU with its memory and driver version; where there is none, one line that says why.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: Arguments) -> Result<ExitCode> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let memory = memory::machine_bytes();
    let gpus = cuda::devices();
    if arguments.json {
        let mut devices = vec![json!({ "name": "cpu", "threads": threads, "memory_bytes": memory })];
        for gpu in gpus.as_deref().unwrap_or_default() {
            devices.push(json!({
                "name": format!("cuda:{}", gpu.ordinal),
                "product": gpu.name,
                "compute_capability": format!("{}.{}", gpu.compute_capability.0, gpu.compute_capability.1),
                "memory_bytes": gpu.total_memory,
                "free_memory_bytes": gpu.free_memory,
                "driver_version": gpu.driver_version,
                "cuda_version": format!("{}.{}", gpu.cuda_version.0, gpu.cuda_version.1),
            }));
        }
        let why = gpus.as_ref().err().map_or(Value::Null, |error| Value::from(error.to_string()));
        output::json(&json!({ "devices": devices, "no_gpu_because": why }))?;
        return done();
    }
    let memory = memory.map(|memory| format!("  {} of memory", output::bytes(memory))).unwrap_or_default();
    output::line(&format!("cpu  {threads} threads{memory}"))?;
    match gpus {
        Ok(gpus) => {
            for gpu in &gpus {
                output::line(&gpu.to_string())?;
            }
            if gpus.is_empty() {
                output::line("no GPU: the driver shows none")?;
            }
        }
        Err(error) => output::line(&error.to_string())?,
    }
    done()
}
