//! `grafter report`.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;

use super::{done, output};
use crate::files;
use crate::report::{self, Comparison};

const EXAMPLES: &str = "\
Examples:
  grafter report runs/staged                      # writes runs/staged/report.html
  grafter report runs/staged --out staged.html
  grafter report ranks/mmr                        # a ranking alone
  grafter report runs/paper-1 runs/paper-2 runs/aligned-1 runs/aligned-2 --out comparison
  grafter report --models results --out comparison

Shown is what is there: evaluations are the JSON files in RUN/evaluations/, with \"task\" and \"metrics\" in each (`grafter
eval ... --out` writes such files); rankings are those in the run's folder, and those of its models beside it.

Several runs are compared: a table of validation losses, and OUT/losses.svg. Folders that differ in the number at the end of
their names are seeds of one variant; the first variant is what the others are held against. With --models, folders in
RESULTS with exam.json (`grafter eval --task generation --out`) and perhaps bench.json (`grafter bench --json`) are compared:
a table, OUT/scores.svg and OUT/score-against-speed.svg.";

/// Write a run's configuration, stages, curves, rankings, evaluations and speed as one HTML file, or compare several
///
/// The file needs nothing else: no network, no scripts. A run that is still going on can be looked at, too.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// Folder of a run (distill, with stages or without, train, sft), or of a ranking; several runs are compared
    #[arg(value_name = "RUN", required_unless_present = "models")]
    runs: Vec<PathBuf>,
    /// Compare the scores and speeds in the folders of this folder
    #[arg(long, value_name = "RESULTS", conflicts_with = "runs")]
    models: Option<PathBuf>,
    /// The file to write [default: RUN/report.html]; the folder for plots, when something is compared
    #[arg(long, value_name = "OUT")]
    out: Option<PathBuf>,
}

pub(super) fn run(arguments: Arguments) -> Result<ExitCode> {
    let Arguments { runs, models, out } = arguments;
    if let ([run], None) = (runs.as_slice(), &models) {
        if let Some(out) = &out {
            files::check_file(out).context("--out")?;
        }
        let out = out.unwrap_or_else(|| run.join("report.html"));
        report::write(run, &out)?;
        output::line(&format!("report  {}", out.display()))?;
        return done();
    }
    let folder = out.context("comparing writes several files: name their folder (--out DIR)")?;
    files::check_folder(&folder).context("--out")?;
    let Comparison { plots, table } = match &models {
        Some(models) => report::compare_models(models)?,
        None => report::compare_runs(&runs)?,
    };
    output::line(table.trim_end())?;
    files::create_folder(&folder)?;
    for (name, drawing) in plots {
        let path = folder.join(name);
        files::write_file(&path, |writer| Ok(writer.write_all(drawing.as_bytes())?))?;
        output::line(&format!("plot  {}", path.display()))?;
    }
    done()
}
