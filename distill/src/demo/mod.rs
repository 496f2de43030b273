//! `grafter demo`: the whole job in a small world, with nothing but what the binary carries.
//!
//! The teacher does four-operand arithmetic step by step. The demo replaces the attention of half its layers by Mamba
//! mixers, shows that the hybrid is broken, distils it, and shows what it knows again.

mod evaluate;
pub mod task;
pub mod world;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use model::chat::ChatTemplate;
use model::config::MixerKind;
use model::initialise::{GraftOptions, graft};
use model::tokenizer::Tokenizer;
use model::{Model, Precision};
use runtime::Device;
use serde::Serialize;

pub use evaluate::{Evaluation, LONG_CONTEXT, evaluate};
use task::{Problem, Problems, Split};

use crate::config::{self, Override, RunConfig, Task};
use crate::files;
use crate::interruption::Interrupted;
use crate::report::{Curve, Page, Plot, Table};
use crate::train::{self, Interruption, Outcome, Progress, Record, read_metrics};

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
    /// The hybrid as it was grafted.
    pub hybrid_before: Evaluation,
    /// The hybrid after distillation.
    pub hybrid_after: Evaluation,
    /// How long distillation took, in seconds; 0 when an earlier call had done it.
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
    let world = world::write(&folder.join("world"))?;
    let config = run_config(&world)?;
    let tokenizer = Tokenizer::load(&world.teacher)?;
    let template = ChatTemplate::load(&world.teacher)?.context("the demo's teacher has a chat template")?;
    let exam: Vec<Problem> = Problems::new(Split::Unseen, EXAM_SEED).take(problems).collect();
    let examine = |model: &Model| evaluate(model, &tokenizer, &template, &exam, &device, interruption);

    let teacher = Model::load(&world.teacher, &device, Precision::AsStored)?;
    progress.say(&format!("examining the teacher on {problems} unseen problems"));
    let teacher_evaluation = examine(&teacher)?;
    let options = GraftOptions { seed: config.training.seed, align: config.model.mil_align };
    let grafted = graft(&teacher, &teacher, &config.model.layers, &options)?;
    progress.say(&format!("examining the hybrid with layers {:?} replaced, before distillation", config.model.layers));
    let before = examine(&grafted)?;
    drop(grafted);

    progress.say("distilling");
    let start = Instant::now();
    let run_folder = folder.join("run");
    let model = match train::run(&config, &run_folder, interruption, progress)? {
        Outcome::Finished { model } => model,
        Outcome::Interrupted { signal, .. } => return Err(Interrupted { signal }.into()),
    };
    let distillation_seconds = start.elapsed().as_secs_f64();
    let hybrid = Model::load(&model, &device, Precision::AsStored)?;
    progress.say("examining the hybrid after distillation");
    let after = examine(&hybrid)?;

    let summary = Summary {
        problems,
        replaced_layers: config.model.layers.clone(),
        teacher: teacher_evaluation,
        hybrid_before: before,
        hybrid_after: after,
        distillation_seconds,
        report: folder.join("report.html"),
        model,
    };
    let page = report(&summary, &exam, &hybrid, &config, &run_folder)?;
    files::write_file(&summary.report, |writer| Ok(std::io::Write::write_all(writer, page.as_bytes())?))?;
    Ok(summary)
}

impl Summary {
    /// The comparison of the three models.
    pub fn table(&self) -> Table {
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
        Table {
            header: [
                "model",
                "answers right",
                "loss (nats/token)",
                "cache per 2,048-token sequence",
                "tokens/s (batched)",
                "tokens/s (one sequence at 2,048)",
            ]
            .map(String::from)
            .to_vec(),
            rows: vec![
                row("teacher", &self.teacher),
                row("hybrid, before", &self.hybrid_before),
                row("hybrid, after", &self.hybrid_after),
            ],
        }
    }

    /// The share of the teacher's accuracy that the distilled hybrid keeps.
    pub fn accuracy_kept(&self) -> f64 {
        self.hybrid_after.accuracy / self.teacher.accuracy
    }
}

/// The run of `distill.toml`, its files where this demo keeps them.
fn run_config(world: &world::World) -> Result<RunConfig> {
    let set = |key: &str, path: &Path| Override::flag("the demo", key, path.to_string_lossy().into_owned());
    let paths = [
        set("model.teacher", &world.teacher),
        set("data.train", &world.train),
        set("data.validation", &world.validation),
    ];
    config::resolve(Task::Distill, Some(&world.distill_run), &paths)
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

fn report(summary: &Summary, exam: &[Problem], hybrid: &Model, run_config: &RunConfig, run: &Path) -> Result<String> {
    let mut page = Page::new("grafter demo");
    let layers = hybrid.config.mixers.len();
    page.paragraph(&format!(
        "A small transformer that does four-operand arithmetic step by step ({layers} layers) became a hybrid: the \
         attention of layers {:?} was replaced by Mamba mixers that start from the attention's own weights, and the \
         hybrid was distilled against the original with reverse KL for {} updates in {:.0} s.",
        summary.replaced_layers, run_config.training.steps, summary.distillation_seconds
    ));
    page.heading("Teacher and hybrid");
    page.paragraph(&format!(
        "Exact match of the final answer on {} problems that no model has seen. The hybrid keeps {:.1} % of the \
         teacher's accuracy. Caches are as this device keeps them (f32); at this size the models are too small for the \
         cache to set the speed.",
        summary.problems,
        100.0 * summary.accuracy_kept()
    ));
    page.table(&summary.table());

    let records = read_metrics(&run.join("metrics.jsonl"))?;
    let mut steps = Vec::new();
    let mut validation = Vec::new();
    let mut norms = Vec::new();
    let mut rates = Vec::new();
    for record in &records {
        match record {
            Record::Step(step) => {
                steps.push((step.step as f64, step.loss));
                norms.push((step.step as f64, step.gradient_norm));
                rates.push((step.step as f64, step.learning_rate));
            }
            Record::Validation(record) => validation.push((record.step as f64, record.validation_loss)),
        }
    }
    page.heading("Distillation");
    let plot = |title: &str, y_label: &str, logarithmic: bool, curves: Vec<Curve>| Plot {
        title: title.to_owned(),
        x_label: "update".to_owned(),
        y_label: y_label.to_owned(),
        logarithmic,
        curves,
    };
    let curve = |name: &str, points: Vec<(f64, f64)>| Curve { name: name.to_owned(), points };
    page.plot(&plot(
        "Reverse KL from the teacher",
        "nats per token",
        true,
        vec![
            curve("training", steps.clone()),
            curve("training, mean of 50 updates", moving_mean(&steps, 50)),
            curve("unseen problems", validation),
        ],
    ))?;
    page.plot(&plot("Gradient norm before clipping", "norm", true, vec![curve("all parameters", norms)]))?;
    page.plot(&plot("Learning rate", "rate", false, vec![curve("AdamW", rates)]))?;

    page.heading("The same problems, three models");
    page.table(&Table {
        header: ["problem", "right", "teacher", "hybrid, before", "hybrid, after"].map(String::from).to_vec(),
        rows: exam
            .iter()
            .enumerate()
            .take(12)
            .map(|(index, problem)| {
                vec![
                    problem.question.clone(),
                    problem.answer.to_string(),
                    summary.teacher.solutions[index].clone(),
                    summary.hybrid_before.solutions[index].clone(),
                    summary.hybrid_after.solutions[index].clone(),
                ]
            })
            .collect(),
    });
    page.heading("Layers of the hybrid");
    page.table(&Table {
        header: ["layer", "mixer"].map(String::from).to_vec(),
        rows: hybrid
            .config
            .mixers
            .iter()
            .enumerate()
            .map(|(layer, mixer)| {
                let name = match mixer {
                    MixerKind::Attention => "attention",
                    MixerKind::Mamba => "Mamba",
                    MixerKind::Identity => "identity",
                };
                vec![layer.to_string(), name.to_owned()]
            })
            .collect(),
    });
    page.heading("Configuration");
    page.preformatted(&config::to_toml(run_config)?);
    Ok(page.finish())
}

/// The mean of every point's y with those before it, `count` in all.
fn moving_mean(points: &[(f64, f64)], count: usize) -> Vec<(f64, f64)> {
    points
        .windows(count.max(1))
        .map(|window| {
            let mean = window.iter().map(|point| point.1).sum::<f64>() / window.len() as f64;
            (window[window.len() - 1].0, mean)
        })
        .collect()
}
