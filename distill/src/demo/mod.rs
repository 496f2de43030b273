//! `grafter demo`: the whole job in a small world, with nothing but what the binary carries.
//!
//! The teacher does four-operand arithmetic step by step. The demo ranks its layers, replaces the attention of the two
//! least important ones by Mamba mixers in two stages, and examines the teacher, the hybrid as it would be without
//! distillation, and the hybrid with it.

mod evaluate;
pub mod reasoning;
pub mod task;
pub mod world;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use model::chat::ChatTemplate;
use model::initialise::{GraftOptions, graft};
use model::tokenizer::Tokenizer;
use model::{Model, Precision};
use runtime::Device;
use serde::Serialize;
use serde_json::json;

pub use evaluate::{Evaluation, LONG_CONTEXT, evaluate};
use task::{Problem, Problems, Split, answer_of};

use crate::config::{self, Override, RunConfig, Task};
use crate::files;
use crate::interruption::Interrupted;
use crate::report;
use crate::stages;
use crate::train::{Interruption, Outcome, Progress};

/// Seed of the problems that the models are examined on; neither training nor validation draws them.
const EXAM_SEED: u64 = 3;

/// What the demo found.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Number of unseen problems that every model was examined on.
    pub problems: usize,
    /// The layers whose attention was replaced.
    pub replaced_layers: Vec<usize>,
    /// The teacher.
    pub teacher: Evaluation,
    /// The hybrid as it is grafted, without distillation.
    pub hybrid_before: Evaluation,
    /// The hybrid after distillation.
    pub hybrid_after: Evaluation,
    /// How long rankings and distillation took, in seconds; about 0 when an earlier call had done them.
    pub distillation_seconds: f64,
    /// The page with curves and examples.
    pub report: PathBuf,
    /// The distilled hybrid: a Hugging Face folder.
    pub model: PathBuf,
}

/// How a demo ended.
#[derive(Clone, Debug)]
pub enum DemoOutcome {
    /// Everything was done.
    Finished(Box<Summary>),
    /// A signal ended it; the same command goes on.
    Interrupted {
        /// What ended it.
        signal: &'static str,
    },
}

/// Runs the demo in `folder`. A demo that was interrupted goes on where it was.
///
/// # Errors
/// A folder with other things in it; files that cannot be written.
pub fn run(
    folder: &Path,
    problems: usize,
    interruption: &Interruption,
    progress: &mut Progress,
) -> Result<DemoOutcome> {
    match distil_and_examine(folder, problems, interruption, progress) {
        Ok(summary) => Ok(DemoOutcome::Finished(Box::new(summary))),
        Err(error) => match error.downcast_ref::<Interrupted>() {
            Some(Interrupted { signal }) => Ok(DemoOutcome::Interrupted { signal }),
            None => Err(error),
        },
    }
}

fn distil_and_examine(
    folder: &Path,
    problems: usize,
    interruption: &Interruption,
    progress: &mut Progress,
) -> Result<Summary> {
    check_folder(folder)?;
    let device = Device::cpu();
    let world = world::write(&folder.join("world"), world::Existing::Replace)?;
    let config = run_config(&world)?;
    let tokenizer = Tokenizer::load(&world.teacher)?;
    let template = ChatTemplate::load(&world.teacher)?.context("the demo's teacher has a chat template")?;
    let exam: Vec<Problem> = Problems::new(Split::Unseen, EXAM_SEED).take(problems).collect();
    let examine = |model: &Model| evaluate(model, &tokenizer, &template, &exam, &device, interruption);

    let teacher = Model::load(&world.teacher, &device, Precision::AsStored)?;
    progress.say(&format!("examining the teacher on {problems} unseen problems"));
    let teacher_evaluation = examine(&teacher)?;
    progress.say("ranking, replacing and distilling, in two stages");
    let start = Instant::now();
    let run_folder = folder.join("run");
    let model = match stages::run(&config, &run_folder, None, interruption, progress)? {
        Outcome::Finished { model } => model,
        Outcome::Interrupted { signal, .. } => return Err(Interrupted { signal }.into()),
    };
    let distillation_seconds = start.elapsed().as_secs_f64();
    let hybrid = Model::load(&model, &device, Precision::AsStored)?;
    progress.say("examining the hybrid");
    let after = examine(&hybrid)?;

    let layers = stages::mamba_layers(&hybrid.config);
    let options = GraftOptions { seed: config.training.seed, start: config.model.init.start().unwrap_or_default() };
    let grafted = graft(&teacher, &teacher, &layers, &options)?;
    progress.say(&format!("examining the hybrid with layers {layers:?} replaced, but without distillation"));
    let before = examine(&grafted)?;

    write_evaluation(&run_folder, "1-teacher", &teacher_evaluation, &exam)?;
    write_evaluation(&run_folder, "2-hybrid-before", &before, &exam)?;
    write_evaluation(&run_folder, "3-hybrid-after", &after, &exam)?;
    let summary = Summary {
        problems,
        replaced_layers: layers,
        teacher: teacher_evaluation,
        hybrid_before: before,
        hybrid_after: after,
        distillation_seconds,
        report: folder.join("report.html"),
        model,
    };
    report::write(&run_folder, &summary.report)?;
    Ok(summary)
}

impl Summary {
    /// The comparison of the three models: names of the columns, and a row per model.
    pub fn table(&self) -> (Vec<&'static str>, Vec<Vec<String>>) {
        let row = |name: &str, evaluation: &Evaluation| {
            vec![
                name.to_owned(),
                format!("{:.1} %", 100.0 * evaluation.accuracy),
                format!("{:.4}", evaluation.loss),
                format!("{:.0} KiB", evaluation.cache_bytes as f64 / 1024.0),
                format!("{:.0}", evaluation.tokens_per_second),
                format!("{:.0}", evaluation.tokens_per_second_long),
            ]
        };
        let header = vec![
            "model",
            "answers right",
            "loss (nats/token)",
            "cache per 2,048-token sequence",
            "tokens/s (batched)",
            "tokens/s (one sequence at 2,048)",
        ];
        let rows = vec![
            row("teacher", &self.teacher),
            row("hybrid, before", &self.hybrid_before),
            row("hybrid, after", &self.hybrid_after),
        ];
        (header, rows)
    }

    /// The share of the teacher's accuracy that the distilled hybrid keeps.
    pub fn accuracy_kept(&self) -> f64 {
        self.hybrid_after.accuracy / self.teacher.accuracy
    }
}

/// The run of `staged.toml`, its files where this demo keeps them.
fn run_config(world: &world::World) -> Result<RunConfig> {
    let set = |key: &str, path: &Path| Override::flag("the demo", key, path.to_string_lossy().into_owned());
    let paths = [
        set("model.teacher", &world.teacher),
        set("data.train", &world.train),
        set("data.validation", &world.validation),
    ];
    config::resolve(Task::Distill, Some(&world.staged_run), &paths)
}

/// A folder that is not there yet, is empty, or holds an earlier demo.
fn check_folder(folder: &Path) -> Result<()> {
    if !folder.exists() {
        return Ok(());
    }
    let mut entries = folder.read_dir().with_context(|| format!("reading the folder {}", folder.display()))?;
    if entries.next().is_some() && !folder.join("world").is_dir() {
        bail!("{} has other things in it: name a new or empty folder with --out", folder.display());
    }
    Ok(())
}

/// Writes what a model did with the exam into the run's `evaluations/`, for the report and for whoever wants to check.
fn write_evaluation(run: &Path, name: &str, evaluation: &Evaluation, exam: &[Problem]) -> Result<()> {
    let samples = exam.iter().zip(&evaluation.solutions).map(|(problem, solution)| {
        json!({
            "prompt": problem.question,
            "expected": problem.solution,
            "answer": solution,
            "right": answer_of(solution) == Some(problem.answer),
        })
    });
    let content = json!({
        "task": "four-operand arithmetic",
        "metrics": {
            "accuracy": evaluation.accuracy,
            "loss_in_nats_per_token": evaluation.loss,
            "cache_bytes_of_2048_tokens": evaluation.cache_bytes,
            "tokens_per_second_batched": evaluation.tokens_per_second,
            "tokens_per_second_at_2048_tokens": evaluation.tokens_per_second_long,
        },
        "samples": samples.collect::<Vec<_>>(),
    });
    let folder = run.join("evaluations");
    files::create_folder(&folder)?;
    files::write_json(&folder.join(format!("{name}.json")), &content)
}
