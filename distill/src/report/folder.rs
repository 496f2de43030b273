//! What a run's folder holds, as far as it goes: a run may still be going on.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use model::config::ModelConfig;
use model::initialise::hybrid_config;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::config::{self, RunConfig, StagesSection, Task};
use crate::rank::{self, Ranking};
use crate::stages::{self, Part};
use crate::train::{Record, StepRecord, TimingRecord, ValidationRecord};

/// Everything that a report shows.
pub(super) struct Contents {
    /// The folder's name, after that of the folder it is in.
    pub name: String,
    /// What the run does; absent in a ranking's folder.
    pub config: Option<RunConfig>,
    /// The run's stages that were begun; one where it has no schedule.
    pub stages: Vec<Stage>,
    /// How many stages there will be.
    pub planned_stages: usize,
    /// Layers of the model, where that can be found out.
    pub layers: Option<usize>,
    /// Rankings in the folder, and those of the run's models beside it, with a name each.
    pub rankings: Vec<(String, Ranking)>,
    /// Evaluations, by name.
    pub evaluations: Vec<Evaluation>,
    /// Files that could not be used, and why.
    pub notes: Vec<String>,
    /// Whether the model is there.
    pub finished: bool,
}

/// A stage, or a whole run that has none.
pub(super) struct Stage {
    /// As it is called in tables and plots.
    pub name: String,
    /// How its layers were picked.
    pub method: String,
    /// Layers that it replaces.
    pub new_layers: Vec<usize>,
    /// Layers that are Mamba after it.
    pub mamba_layers: Vec<usize>,
    /// Updates that it has to make.
    pub steps: u64,
    /// Its learning rate after warm-up.
    pub learning_rate: f64,
    /// What it trains, and why; empty where that is not known.
    pub parts: Vec<Part>,
    /// Its updates so far.
    pub updates: Vec<StepRecord>,
    /// Its looks at the validation data so far.
    pub validations: Vec<ValidationRecord>,
    /// What took how long.
    pub timing: Vec<TimingRecord>,
    /// Whether its model is there.
    pub finished: bool,
}

/// What was measured of a model: a file in the run's `evaluations/`.
#[derive(Deserialize)]
pub(super) struct Evaluation {
    /// The file's name without its ending.
    #[serde(skip)]
    pub name: String,
    /// What was measured.
    pub task: String,
    /// The measures that are numbers.
    #[serde(deserialize_with = "numbers")]
    pub metrics: Vec<(String, Measure)>,
    /// What the model was asked, and what it answered; samples of another form are left out.
    #[serde(default, alias = "items", deserialize_with = "samples")]
    pub samples: Vec<Sample>,
}

/// A measure, written as a number or as an object of these.
#[derive(Clone, Copy, Deserialize)]
pub(super) struct Measure {
    /// The number.
    pub value: f64,
    /// Its standard error, where it has one.
    #[serde(default)]
    pub standard_error: Option<f64>,
}

/// A question and an answer.
#[derive(Deserialize)]
pub(super) struct Sample {
    /// The question.
    pub prompt: String,
    /// The right answer.
    #[serde(default)]
    pub expected: Option<Value>,
    /// What the model said.
    pub answer: Value,
    /// Whether that is right.
    #[serde(default)]
    pub right: Option<bool>,
}

/// Reads a run's folder, or a ranking's.
///
/// # Errors
/// A folder that holds neither; files that are not what this version writes, named. Of a file that is being written the
/// last line may be torn: it is left out.
pub(super) fn read(folder: &Path) -> Result<Contents> {
    let config_path = folder.join("config.toml");
    let own = if folder.join("ranking.json").is_file() { Some(rank::read(folder)?) } else { None };
    if !config_path.is_file() && own.is_none() {
        if !folder.is_dir() {
            bail!("{} is no folder: give the folder of a run (--run) or of a ranking (--out)", folder.display());
        }
        bail!(
            "{} is neither a run's folder (it has no config.toml) nor a finished ranking's (no ranking.json)",
            folder.display()
        );
    }
    let full = folder.canonicalize().with_context(|| format!("reading {}", folder.display()))?;
    let mut contents = Contents {
        name: named(&full),
        config: None,
        stages: Vec::new(),
        planned_stages: 0,
        layers: None,
        rankings: Vec::new(),
        evaluations: Vec::new(),
        notes: Vec::new(),
        finished: own.is_some(),
    };
    if let Some(own) = own {
        contents.rankings.push((contents.name.clone(), own));
        return Ok(contents);
    }
    let config = config::read(&config_path)?;
    contents.finished = folder.join("model").is_dir();
    contents.planned_stages = config.stages.schedule.len().max(1);
    contents.stages = if config.stages.schedule.is_empty() { vec![single(folder, &config)?] } else { staged(folder)? };
    let model = base(&config).or_else(|| ModelConfig::read(&folder.join("model")).ok());
    contents.layers = model.map(|model| model.mixers.len());
    read_rankings(&full, &config, &mut contents)?;
    read_evaluations(folder, &mut contents)?;
    contents.config = Some(config);
    Ok(contents)
}

/// The model that a run begins with, if it is still there.
fn base(config: &RunConfig) -> Option<ModelConfig> {
    let model = &config.model;
    let folder = model.student.as_ref().or(model.teacher.as_ref()).or(model.source.as_ref())?;
    ModelConfig::read(folder).ok()
}

/// The one stage of a run without a schedule.
fn single(folder: &Path, config: &RunConfig) -> Result<Stage> {
    let base = base(config);
    let earlier = base.as_ref().map(stages::mamba_layers).unwrap_or_default();
    let new_layers = if config.task == Task::Distill { config.model.layers.clone() } else { Vec::new() };
    let mut mamba_layers = [earlier.clone(), new_layers.clone()].concat();
    mamba_layers.sort_unstable();
    mamba_layers.dedup();
    let parts = match (&base, config.task) {
        (Some(base), Task::Distill) => {
            let hybrid = hybrid_config(base, &new_layers, config.model.init.start().unwrap_or_default());
            stages::parts(&hybrid, &new_layers, !earlier.is_empty(), config.training.trainable)
        }
        _ => Vec::new(),
    };
    let mut stage = Stage {
        name: if config.task == Task::Distill { "distillation" } else { "training" }.to_owned(),
        method: if new_layers.is_empty() { "–" } else { "named" }.to_owned(),
        new_layers,
        mamba_layers,
        steps: config.training.steps,
        learning_rate: config.training.learning_rate,
        parts,
        updates: Vec::new(),
        validations: Vec::new(),
        timing: Vec::new(),
        finished: folder.join("model").is_dir(),
    };
    read_logs(folder, &mut stage)?;
    Ok(stage)
}

/// The stages that were begun.
fn staged(folder: &Path) -> Result<Vec<Stage>> {
    let mut found = Vec::new();
    for record in stages::read(folder)?.unwrap_or_default() {
        let method = match record.ranked_by {
            Some(method) => method.name().to_owned(),
            None => "named".to_owned(),
        };
        let mut stage = Stage {
            name: format!("stage {}", record.stage),
            method,
            new_layers: record.new_layers,
            mamba_layers: record.mamba_layers,
            steps: record.steps,
            learning_rate: record.learning_rate,
            parts: record.parts,
            updates: Vec::new(),
            validations: Vec::new(),
            timing: Vec::new(),
            finished: record.finished,
        };
        // From its number, not from a path in the file, which could lead anywhere.
        read_logs(&folder.join(format!("stage-{:02}", record.stage)).join("run"), &mut stage)?;
        found.push(stage);
    }
    Ok(found)
}

fn read_logs(folder: &Path, stage: &mut Stage) -> Result<()> {
    for record in read_lines(&folder.join("metrics.jsonl"))? {
        match record {
            Record::Step(step) => stage.updates.push(step),
            Record::Validation(validation) => stage.validations.push(validation),
        }
    }
    stage.timing = read_lines(&folder.join("timing.jsonl"))?;
    Ok(())
}

/// The whole lines of a log that somebody may be writing; none where there is no log yet.
fn read_lines<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    let whole = text.split_inclusive(|&byte| byte == b'\n').filter(|line| line.ends_with(b"\n"));
    whole
        .enumerate()
        .map(|(index, line)| {
            serde_json::from_slice(line)
                .with_context(|| format!("{} line {} is not what this version writes", path.display(), index + 1))
        })
        .collect()
}

/// Rankings of the stages and in other folders of the run; beside it, those of its own models.
fn read_rankings(folder: &Path, config: &RunConfig, contents: &mut Contents) -> Result<()> {
    let mut found = Vec::new();
    for inside in folders(folder)? {
        let name = name_of(&inside);
        match name.strip_prefix("stage-").and_then(|number| number.parse::<usize>().ok()) {
            Some(number) => found.push((format!("before stage {number}"), inside.join("ranking"), true)),
            None => found.push((name, inside, true)),
        }
    }
    for beside in folder.parent().map(folders).transpose().unwrap_or_default().unwrap_or_default() {
        if beside != folder {
            found.push((name_of(&beside), beside, false));
        }
    }
    let same = |a: &Path, b: &Path| a == b || a.canonicalize().is_ok_and(|a| b.canonicalize().is_ok_and(|b| a == b));
    for (name, path, own) in found {
        if !path.join("ranking.json").is_file() {
            continue;
        }
        match rank::read(&path) {
            Ok(ranking) => {
                let models = [&config.model.teacher, &config.model.student, &config.model.source];
                if own || models.into_iter().flatten().any(|model| same(model, &ranking.settings.model)) {
                    contents.rankings.push((name, ranking));
                }
            }
            // What lies beside the run is somebody else's.
            Err(error) if own => contents.notes.push(format!("{error:#}")),
            Err(_) => {}
        }
    }
    Ok(())
}

fn read_evaluations(folder: &Path, contents: &mut Contents) -> Result<()> {
    let folder = folder.join("evaluations");
    if !folder.is_dir() {
        return Ok(());
    }
    let entries = fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))?;
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.retain(|path| {
        path.extension().is_some_and(|extension| extension == "json") && !name_of(path).starts_with('.')
    });
    paths.sort();
    for path in paths {
        let text = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        match serde_json::from_slice::<Evaluation>(&text) {
            Ok(mut evaluation) => {
                evaluation.name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
                contents.evaluations.push(evaluation);
            }
            Err(error) => contents.notes.push(format!("evaluations/{} is not an evaluation: {error}", name_of(&path))),
        }
    }
    Ok(())
}

/// The folders in a folder, in order.
fn folders(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    let mut folders: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    folders.retain(|path| path.is_dir());
    folders.sort();
    Ok(folders)
}

/// A folder's name with that of the folder it is in: many runs are called `run`.
fn named(folder: &Path) -> String {
    let above = folder.parent().map(name_of).filter(|name| !name.is_empty());
    above.map(|above| format!("{above}/")).unwrap_or_default() + &name_of(folder)
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The numbers of an object, in its order.
fn numbers<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<(String, Measure)>, D::Error> {
    let measure = |value: Value| match value.as_f64() {
        Some(value) => Some(Measure { value, standard_error: None }),
        None => serde_json::from_value(value).ok(),
    };
    let mut metrics = serde_json::Map::deserialize(deserializer)?;
    // `grafter eval` writes the error of NAME as NAME_standard_error.
    for name in metrics.keys().cloned().collect::<Vec<_>>() {
        if let Some(error) = metrics.get(&format!("{name}_standard_error")).and_then(Value::as_f64) {
            metrics.remove(&format!("{name}_standard_error"));
            let value = metrics[&name].clone();
            metrics.insert(name, serde_json::json!({ "value": value, "standard_error": error }));
        }
    }
    Ok(metrics.into_iter().filter_map(|(name, value)| Some((name, measure(value)?))).collect())
}

/// The elements of a list that are samples.
fn samples<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<Sample>, D::Error> {
    let samples = Vec::<Value>::deserialize(deserializer)?;
    Ok(samples.into_iter().filter_map(|sample| as_sample(&sample).or(serde_json::from_value(sample).ok())).collect())
}

/// An item of `grafter eval`: a question with choices, or with answers in words.
fn as_sample(item: &Value) -> Option<Sample> {
    let prompt = item["prompt"].as_str()?.to_owned();
    if let Some(choices) = item["choices"].as_array() {
        let (answer, chosen) = (item["answer"].as_u64()?, item["chosen"].as_u64()?);
        let choice = |index: u64| {
            let choice = choices.get(index as usize)?;
            Some(choice.get("text").unwrap_or(choice).clone())
        };
        let (expected, said) = (choice(answer), choice(chosen)?);
        return Some(Sample { prompt, expected, answer: said, right: Some(answer == chosen) });
    }
    let first = item["answers"].as_array()?.first()?;
    let expected = item["right"].as_array().and_then(|right| right.first()).cloned();
    Some(Sample { prompt, expected, answer: first["text"].clone(), right: first["right"].as_bool() })
}

impl Contents {
    /// Updates made and to be made, as far as that is known.
    pub fn progress(&self) -> (u64, u64) {
        let done = self.stages.iter().map(|stage| stage.updates.len() as u64).sum();
        let begun: u64 = self.stages.iter().map(|stage| stage.steps).sum();
        let later = self.config.iter().flat_map(|config| {
            (self.stages.len()..self.planned_stages)
                .map(|stage| StagesSection::entry(&config.stages.steps, stage).unwrap_or(config.training.steps))
        });
        (done, begun + later.sum::<u64>())
    }

    /// Evaluations by task, in the order of their names.
    pub fn tasks(&self) -> BTreeMap<&str, Vec<&Evaluation>> {
        let mut tasks: BTreeMap<&str, Vec<&Evaluation>> = BTreeMap::new();
        for evaluation in &self.evaluations {
            tasks.entry(&evaluation.task).or_default().push(evaluation);
        }
        tasks
    }
}
