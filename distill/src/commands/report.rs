//! `grafter report`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

use super::{done, output};
use crate::report;

const EXAMPLES: &str = "\
Examples:
  grafter report runs/staged                      # writes runs/staged/report.html
  grafter report runs/staged --out staged.html
  grafter report ranks/mmr                        # a ranking alone

Shown is what is there: evaluations are the JSON files in RUN/evaluations/, with \"task\" and \"metrics\" in each (`grafter
eval ... --out` writes such files); rankings are those in the run's folder, and those of its models beside it.";

/// Write a run's configuration, stages, curves, rankings, evaluations and speed as one HTML file
///
/// The file needs nothing else: no network, no scripts. A run that is still going on can be looked at, too.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// Folder of a run (distill, with stages or without, train, sft), or of a ranking
    #[arg(value_name = "RUN")]
    run: PathBuf,
    /// The file to write [default: RUN/report.html]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

pub(super) fn run(arguments: Arguments) -> Result<ExitCode> {
    let out = arguments.out.unwrap_or_else(|| arguments.run.join("report.html"));
    report::write(&arguments.run, &out)?;
    output::line(&format!("report  {}", out.display()))?;
    done()
}
