//! `grafter demo`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

use super::{INTERRUPTED, done, output};
use crate::demo::world::{self, Existing};
use crate::demo::{self, DemoOutcome, Summary, reasoning};
use crate::train::{Interruption, Progress};

const EXAMPLES: &str = "\
Examples:
  grafter demo
  grafter demo --export world     # the teacher, its problems, and the run files that made and distil it
  grafter demo --export-reasoning reasoning   # a larger world, whose teacher is to be trained: docs/reproduction.md";

/// Distil a small teacher into a hybrid, from nothing but this program
///
/// The teacher does four-operand arithmetic step by step. Its layers are ranked, and the two least important lose their
/// attention to Mamba mixers in two stages; a table shows what teacher, hybrid without distillation and distilled hybrid
/// answer on unseen problems, and a page (as of `grafter report`) shows the rest.
/// Takes at most three minutes on two cores.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// Folder for everything that the demo writes
    #[arg(long, value_name = "FOLDER", default_value = "grafter-demo")]
    out: PathBuf,
    /// Unseen problems to examine the models on
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u16).range(1..=2000))]
    problems: u16,
    /// Write the demo's world into FOLDER and do nothing else
    #[arg(long, value_name = "FOLDER")]
    export: Option<PathBuf>,
    /// Write a larger world into FOLDER and do nothing else: arithmetic and algebra of five difficulties, for a teacher of 12
    /// layers that is to be trained
    #[arg(long, value_name = "FOLDER", conflicts_with = "export")]
    export_reasoning: Option<PathBuf>,
    /// Problems of the larger world to train on
    #[arg(long, value_name = "N", default_value_t = 300_000, requires = "export_reasoning")]
    training_problems: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: Arguments) -> Result<ExitCode> {
    if let Some(folder) = &arguments.export {
        let world = world::write(folder, Existing::Refuse)?;
        output::line(&format!("teacher   {}", world.teacher.display()))?;
        output::line(&format!("problems  {}", world.train.display()))?;
        output::line(&format!("run file  {}", world.distill_run.display()))?;
        output::line(&format!("in stages {}", world.staged_run.display()))?;
        return done();
    }
    if let Some(folder) = &arguments.export_reasoning {
        let world = reasoning::write(folder, arguments.training_problems)?;
        output::line(&format!("teacher    {} (to be trained)", world.teacher.display()))?;
        output::line(&format!("problems   {}", world.train.display()))?;
        output::line(&format!("validation {}", world.validation.display()))?;
        output::line(&format!("exam       {}", world.exam.display()))?;
        return done();
    }
    let interruption = Interruption::on_signals(INTERRUPTED.into())?;
    let mut progress = Progress::on_stderr();
    match demo::run(&arguments.out, arguments.problems.into(), &interruption, &mut progress)? {
        DemoOutcome::Finished(summary) if arguments.json => output::json(&summary)?,
        DemoOutcome::Finished(summary) => print(&summary)?,
        DemoOutcome::Interrupted { signal } => {
            progress.say(&format!("interrupted by {signal}: the same command continues"));
            return Ok(ExitCode::from(INTERRUPTED));
        }
    }
    done()
}

fn print(summary: &Summary) -> Result<()> {
    let (header, rows) = summary.table();
    let header: Vec<String> = header.into_iter().map(String::from).collect();
    let widths: Vec<usize> = (0..header.len())
        .map(|column| {
            let cells = rows.iter().map(|row| &row[column]).chain([&header[column]]);
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        })
        .collect();
    let line = |cells: &[String]| -> Result<()> {
        let padded = cells.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| {
            if column == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
        });
        output::line(padded.collect::<Vec<_>>().join("  ").trim_end())
    };
    output::line("")?;
    line(&header)?;
    for row in &rows {
        line(row)?;
    }
    output::line("")?;
    output::line(&format!(
        "layers {:?} of the teacher became Mamba; the hybrid keeps {:.1} % of its accuracy on {} unseen problems",
        summary.replaced_layers,
        100.0 * summary.accuracy_kept(),
        summary.problems
    ))?;
    output::line(&format!("report  {}", summary.report.display()))?;
    output::line(&format!("model   {}", summary.model.display()))
}
