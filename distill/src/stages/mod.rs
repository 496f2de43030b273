//! Distillation in stages: a few layers at a time, each stage from the hybrid of the one before.
//!
//! A stage ranks the layers that still have attention ([`rank`]), replaces the least important ones and trains. New
//! mixers start from the original teacher's attention, everything else from the previous hybrid; the teacher of every
//! stage is the original one; warm-up and decay begin anew.
//!
//! One folder holds all: `config.toml`, `stages.json` (what each stage did, and what was trained in it and why),
//! `stage-01/ranking/` and `stage-01/run/` (an ordinary run with logs, checkpoints and `model/`), and so on; at the end
//! `model/`. Killing the process at any moment and giving the same command again continues to the same bits.

mod plan;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use autograd::DType;
use model::architecture::parameter_specs;
use model::config::{MixerKind, ModelConfig};
use model::initialise::{check_states, hybrid_config};
use serde::{Deserialize, Serialize};

pub use plan::{Plan, PlannedStage, plan};

use crate::config::{self, RunConfig, StageTarget, StagesSection, Trainable};
use crate::files;
use crate::interruption::{Interrupted, Interruption};
use crate::rank::{self, Method, RankConfig};
use crate::train::{self, Outcome, Progress, Record, RunFolder, read_metrics};

/// What each stage did, a list in `RUN/stages.json`.
pub const STAGES: &str = "stages.json";

/// One stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StageRecord {
    /// Counted from 1.
    pub stage: usize,
    /// Its folder in the run's: `ranking/` (where layers were ranked) and `run/` are in it.
    pub folder: String,
    /// What it ends with.
    pub target: StageTarget,
    /// How layers were ranked; absent where the schedule names them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ranked_by: Option<Method>,
    /// Layers that it replaced.
    pub new_layers: Vec<usize>,
    /// All layers that are Mamba after it.
    pub mamba_layers: Vec<usize>,
    /// Its updates.
    pub steps: u64,
    /// Its learning rate after warm-up.
    pub learning_rate: f64,
    /// What it trained, and why.
    pub parts: Vec<Part>,
    /// Loss on the validation data before its first update; absent without validation data.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation_before: Option<f64>,
    /// The same after its last; absent until then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation_after: Option<f64>,
    /// Whether its model is there.
    pub finished: bool,
}

/// Some of a stage's parameters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Which.
    pub what: String,
    /// How many numbers.
    pub parameters: u64,
    /// What they start from.
    pub from: String,
    /// Whether they are trained.
    pub trained: bool,
    /// Why, or why not.
    pub why: String,
}

/// Runs all stages in `folder`, going on where an earlier call was ended. `from_stage` (counted from 1) takes earlier
/// stages as they are, and does that one and later ones with this configuration: what another one left of them is
/// removed.
///
/// # Errors
/// As [`train::run`] and [`rank::run`]; a schedule that the model does not allow; a configuration other than the run's,
/// without `from_stage`.
pub fn run(
    config: &RunConfig,
    folder: &Path,
    from_stage: Option<usize>,
    interruption: &Interruption,
    progress: &mut Progress,
) -> Result<Outcome> {
    let count = config.stages.schedule.len();
    check_schedule(config)?;
    let open = RunFolder::open(folder)?;
    if let Some(from) = from_stage {
        ensure!((1..=count).contains(&from), "--from-stage is {from}: the schedule has stages 1 to {count}");
        discard_changed(config, folder, from)?;
    } else if open.config().exists() {
        let differences = config::differences(&config::read(&open.config())?, config)?;
        ensure!(
            differences.is_empty(),
            "the run in {} began with another configuration: {}; give the same one, start a new run folder, or change \
             later stages only (--from-stage)",
            open.config().display(),
            differences.join("; ")
        );
    }
    files::write_file(&open.config(), |writer| Ok(writer.write_all(config::to_toml(config)?.as_bytes())?))?;
    let earlier = read(folder)?.unwrap_or_default();
    let mut records = Vec::new();
    for number in 1..=count {
        let stage = Stage::new(config, folder, number)?;
        let kept = from_stage.is_some_and(|from| number < from);
        let earlier = earlier.iter().find(|record| record.stage == number && record.finished);
        match stage.run(kept.then_some(earlier).flatten(), &mut records, interruption, progress) {
            Ok(Outcome::Finished { .. }) => {}
            Ok(interrupted) => return Ok(interrupted),
            Err(error) => match error.downcast_ref::<Interrupted>() {
                Some(Interrupted { signal }) => return Ok(Outcome::Interrupted { signal, step: 0 }),
                None => return Err(error.context(format!("stage {number}"))),
            },
        }
    }
    let model = folder.join("model");
    if model.exists() {
        files::remove_folder(&model)?;
    }
    link_folder(&stage_folder(folder, count).join("run").join("model"), &model)?;
    Ok(Outcome::Finished { model })
}

/// The stages that a run's folder holds; `None` where it is not one in stages.
///
/// # Errors
/// A file that cannot be read.
pub fn read(folder: &Path) -> Result<Option<Vec<StageRecord>>> {
    let path = folder.join(STAGES);
    if !path.exists() {
        return Ok(None);
    }
    let text = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    serde_json::from_slice(&text)
        .map(Some)
        .with_context(|| format!("{} is not what this version writes", path.display()))
}

fn stage_folder(folder: &Path, number: usize) -> PathBuf {
    folder.join(format!("stage-{number:02}"))
}

/// The folder of the model that a stage starts with.
fn base_of(config: &RunConfig, folder: &Path, number: usize) -> Result<PathBuf> {
    if number > 1 {
        return Ok(stage_folder(folder, number - 1).join("run").join("model"));
    }
    let base = config.model.student.as_ref().or(config.model.teacher.as_ref());
    base.cloned().context("model.teacher is missing")
}

pub(crate) fn mamba_layers(model: &ModelConfig) -> Vec<usize> {
    (0..model.mixers.len()).filter(|&layer| model.mixers[layer] == MixerKind::Mamba).collect()
}

/// That the first model has what the schedule asks for, and that the device runs what comes of it; later stages follow from it.
fn check_schedule(config: &RunConfig) -> Result<()> {
    let teacher = config.model.teacher.as_ref().context("model.teacher is missing")?;
    let teacher = ModelConfig::read(teacher)?;
    let base = ModelConfig::read(&base_of(config, Path::new(""), 1)?)?;
    if !config.stages.schedule.is_empty() {
        check_states(&base, config.model.init.start().unwrap_or_default(), &config.device.parse()?)?;
    }
    let mut done = mamba_layers(&base);
    let most = done.len() + base.count_mixers(MixerKind::Attention);
    let mut count = done.len();
    for (index, target) in config.stages.schedule.iter().enumerate() {
        let stage = index + 1;
        match target {
            StageTarget::Count(wanted) => {
                ensure!(
                    (count + 1..=most).contains(wanted),
                    "stages.schedule: stage {stage} ends with {wanted} Mamba layers, but the model has {count} before it \
                     and can have at most {most}"
                );
                count = *wanted;
            }
            StageTarget::Layers(layers) => {
                if let Some(missing) = done.iter().find(|layer| !layers.contains(layer)) {
                    bail!("stages.schedule: stage {stage} leaves out layer {missing}, which is Mamba before it");
                }
                if let Some(layer) = layers.iter().find(|&&layer| layer >= base.mixers.len()) {
                    let last = base.mixers.len() - 1;
                    bail!("stages.schedule: stage {stage} names layer {layer}, but the model has layers 0 to {last}");
                }
                let replaceable = |layer: usize| {
                    done.contains(&layer)
                        || (base.mixers[layer] == MixerKind::Attention
                            && teacher.mixers.get(layer) == base.mixers.get(layer))
                };
                if let Some(layer) = layers.iter().find(|&&layer| !replaceable(layer)) {
                    bail!("stages.schedule: stage {stage} names layer {layer}, which has no attention to replace");
                }
                ensure!(
                    layers.len() > count,
                    "stages.schedule: stage {stage} names {} layers, but {count} are Mamba before it",
                    layers.len()
                );
                done.clone_from(layers);
                count = layers.len();
            }
        }
    }
    Ok(())
}

/// Removes what another configuration left of stage `from` and later ones.
fn discard_changed(config: &RunConfig, folder: &Path, from: usize) -> Result<()> {
    for number in 1..from {
        ensure!(
            stage_folder(folder, number).join("run").join("model").exists(),
            "--from-stage is {from}, but stage {number} is not finished in {}",
            folder.display()
        );
    }
    for number in from..=config.stages.schedule.len() {
        let path = stage_folder(folder, number);
        if path.exists() && !Stage::new(config, folder, number)?.is_as_begun()? {
            let mut later: Vec<PathBuf> = fs::read_dir(folder)
                .with_context(|| format!("reading {}", folder.display()))?
                .filter_map(|entry| Some(entry.ok()?.path()))
                .filter(|other| *other >= path && is_stage(other))
                .collect();
            // The last first: a stage never stands on one that is gone.
            later.sort();
            for stage in later.iter().rev() {
                files::remove_folder(stage)?;
            }
            return Ok(());
        }
    }
    Ok(())
}

fn is_stage(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("stage-"))
}

/// A stage as the configuration describes it.
struct Stage<'a> {
    config: &'a RunConfig,
    folder: &'a Path,
    number: usize,
    /// The model that it starts with.
    base: PathBuf,
    target: &'a StageTarget,
    /// How layers are ranked, where they are.
    ranking: Option<RankConfig>,
    /// The run, its layers still to be picked.
    training: RunConfig,
}

/// What a stage was begun with, in its `stage.json`.
#[derive(PartialEq, Serialize, Deserialize)]
struct Begun {
    target: StageTarget,
    ranking: Option<RankConfig>,
    training: String,
}

impl<'a> Stage<'a> {
    fn new(config: &'a RunConfig, folder: &'a Path, number: usize) -> Result<Self> {
        let stages = &config.stages;
        let index = number - 1;
        let target = stages.schedule.get(index).context("no such stage")?;
        let base = base_of(config, folder, number)?;
        let method = StagesSection::entry(&stages.rank, index).context("stages.rank is empty")?;
        let ranking = match target {
            StageTarget::Count(_) => Some(ranking_of(config, &base, method)?),
            StageTarget::Layers(_) => None,
        };
        let mut training = config.clone();
        training.stages = RunConfig::defaults(config.task).stages;
        training.model.student = (Some(&base) != config.model.teacher.as_ref()).then(|| base.clone());
        if let Some(steps) = StagesSection::entry(&stages.steps, index) {
            training.training.steps = steps;
        }
        if let Some(rate) = StagesSection::entry(&stages.learning_rates, index) {
            training.training.learning_rate = rate;
        }
        Ok(Self { config, folder, number, base, target, ranking, training })
    }

    fn path(&self) -> PathBuf {
        stage_folder(self.folder, self.number)
    }

    fn begun(&self) -> Result<Begun> {
        let training = config::to_toml(&RunConfig {
            checkpoint: RunConfig::defaults(self.config.task).checkpoint,
            ..self.training.clone()
        })?;
        Ok(Begun { target: self.target.clone(), ranking: self.ranking.clone(), training })
    }

    fn is_as_begun(&self) -> Result<bool> {
        let path = self.path().join("stage.json");
        if !path.exists() {
            return Ok(false);
        }
        let text = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        Ok(serde_json::from_slice::<Begun>(&text).is_ok_and(|begun| self.begun().is_ok_and(|own| own == begun)))
    }

    /// Ranks, picks, trains. A stage that is `kept` stays as it is.
    fn run(
        &self,
        kept: Option<&StageRecord>,
        records: &mut Vec<StageRecord>,
        interruption: &Interruption,
        progress: &mut Progress,
    ) -> Result<Outcome> {
        interruption.check()?;
        let run_folder = self.path().join("run");
        let model = run_folder.join("model");
        if model.exists() && (kept.is_some() || self.is_as_begun()?) {
            let record = match kept {
                Some(record) => record.clone(),
                None => self.finished(&read_layers(&run_folder)?)?,
            };
            progress.say(&format!("stage {} is finished: Mamba layers {:?}", self.number, record.mamba_layers));
            records.push(record);
            self.write_records(records)?;
            return Ok(Outcome::Finished { model });
        }
        files::create_folder(&self.path())?;
        files::remove_leftovers(&self.path())?;
        if self.path().join("stage.json").exists() {
            ensure!(
                self.is_as_begun()?,
                "{} began with another configuration: give the same one, or --from-stage {}",
                self.path().display(),
                self.number
            );
        }
        files::write_json(&self.path().join("stage.json"), &self.begun()?)?;
        let new_layers = self.pick(interruption, progress)?;
        let record = self.record(&new_layers)?;
        progress.say(&format!(
            "stage {} of {}: layers {new_layers:?} become Mamba, {} in all; {} updates",
            self.number,
            self.config.stages.schedule.len(),
            record.mamba_layers.len(),
            record.steps
        ));
        for part in &record.parts {
            progress.say(&format!(
                "  {:<28} {:>13} {:<8} {:<26} {}",
                part.what,
                part.parameters,
                if part.trained { "trained" } else { "frozen" },
                part.from,
                part.why
            ));
        }
        records.push(record);
        self.write_records(records)?;
        let mut training = self.training.clone();
        training.model.layers.clone_from(&new_layers);
        let outcome = train::run(&training, &run_folder, interruption, progress)?;
        if let Outcome::Finished { .. } = outcome {
            records.pop();
            records.push(self.finished(&new_layers)?);
            self.write_records(records)?;
        }
        Ok(outcome)
    }

    /// The layers that this stage replaces.
    fn pick(&self, interruption: &Interruption, progress: &mut Progress) -> Result<Vec<usize>> {
        let done = mamba_layers(&ModelConfig::read(&self.base)?);
        let mut picked = match (self.target, &self.ranking) {
            (StageTarget::Count(count), Some(settings)) => {
                progress.say(&format!("stage {}: ranking layers", self.number));
                let ranking = rank::run(settings, &self.path().join("ranking"), interruption, progress)?;
                ranking.least_important_first.into_iter().take(count.saturating_sub(done.len())).collect()
            }
            (StageTarget::Layers(layers), _) => layers.clone(),
            (StageTarget::Count(_), None) => Vec::new(),
        };
        picked.retain(|layer| !done.contains(layer));
        picked.sort_unstable();
        Ok(picked)
    }

    fn record(&self, new_layers: &[usize]) -> Result<StageRecord> {
        let base = ModelConfig::read(&self.base)?;
        let earlier = mamba_layers(&base);
        let hybrid = hybrid_config(&base, new_layers, self.training.model.init.start().unwrap_or_default());
        Ok(StageRecord {
            stage: self.number,
            folder: format!("stage-{:02}", self.number),
            target: self.target.clone(),
            ranked_by: self.ranking.as_ref().map(|ranking| ranking.method),
            new_layers: new_layers.to_vec(),
            mamba_layers: mamba_layers(&hybrid),
            steps: self.training.training.steps,
            learning_rate: self.training.training.learning_rate,
            parts: parts(&hybrid, new_layers, !earlier.is_empty(), self.training.training.trainable),
            validation_before: None,
            validation_after: None,
            finished: false,
        })
    }

    /// The record of a stage whose run is finished.
    fn finished(&self, new_layers: &[usize]) -> Result<StageRecord> {
        let mut record = self.record(new_layers)?;
        let mut validations = read_metrics(&self.path().join("run").join("metrics.jsonl"))?.into_iter().filter_map(
            |record| match record {
                Record::Validation(validation) => Some(validation.validation_loss),
                Record::Step(_) => None,
            },
        );
        record.validation_before = validations.next();
        record.validation_after = validations.next_back().or(record.validation_before);
        record.finished = true;
        Ok(record)
    }

    fn write_records(&self, records: &[StageRecord]) -> Result<()> {
        files::write_json(&self.folder.join(STAGES), &records)
    }
}

/// The layers that a stage's run replaces.
fn read_layers(run: &Path) -> Result<Vec<usize>> {
    Ok(config::read(&run.join("config.toml"))?.model.layers)
}

fn ranking_of(config: &RunConfig, base: &Path, method: Method) -> Result<RankConfig> {
    let stages = &config.stages;
    let teacher = config.model.teacher.as_ref().context("model.teacher is missing")?;
    let own = match method {
        Method::Mmr => config.data.train.as_ref(),
        Method::Loo | Method::Mse => config.data.validation.as_ref().or(config.data.train.as_ref()),
    };
    // Questions are for leaving layers out; the other methods read documents.
    let asks = stages.rank_metric != rank::Metric::Loss;
    let given = stages.rank_data.as_ref().filter(|_| !asks || method == Method::Loo);
    let data = given.or(own).cloned().context("data.train is missing")?;
    let mut ranking = RankConfig::new(base.to_owned(), method, data);
    ranking.teacher = (base != teacher).then(|| teacher.clone());
    if method == Method::Loo {
        ranking.metric = stages.rank_metric;
    }
    ranking.samples = stages.rank_samples;
    ranking.steps = stages.rank_steps;
    ranking.average_last = stages.rank_steps.min(10);
    ranking.learning_rate = stages.rank_learning_rate;
    ranking.sequence_length = config.data.sequence_length;
    ranking.long_documents = config.data.long_documents;
    ranking.begin_token = config.data.begin_token;
    ranking.batch_size = config.training.batch_size;
    ranking.micro_batch = config.training.micro_batch;
    ranking.init = config.model.init;
    ranking.seed = config.training.seed;
    ranking.precision = config.training.precision;
    ranking.device.clone_from(&config.device);
    Ok(ranking)
}

/// What a stage trains, and why.
pub(crate) fn parts(hybrid: &ModelConfig, new_layers: &[usize], later: bool, trainable: Trainable) -> Vec<Part> {
    let what = |name: &str| -> &'static str {
        if name.contains(".mixer.") {
            let new = new_layers.iter().any(|layer| name.starts_with(&format!("model.layers.{layer}.")));
            if new { "new Mamba mixers" } else { "earlier Mamba mixers" }
        } else if name.contains(".self_attn.") {
            "attention that is kept"
        } else if name.contains(".mlp.") {
            "MLPs"
        } else if name.starts_with("model.layers.") || name == "model.norm.weight" {
            "norms"
        } else {
            "embedding and head"
        }
    };
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    for spec in parameter_specs(hybrid, |_| DType::F32) {
        *counts.entry(what(&spec.name)).or_default() += spec.shape.iter().product::<usize>() as u64;
    }
    let order =
        ["new Mamba mixers", "earlier Mamba mixers", "attention that is kept", "MLPs", "norms", "embedding and head"];
    let rest = if later { "the previous hybrid" } else { "the teacher" };
    let part = |what: &&str| -> Option<Part> {
        let mixers = what.ends_with("mixers");
        let new = what.starts_with("new");
        let trained = mixers || trainable == Trainable::All;
        let why = match (trainable, mixers) {
            (Trainable::All, true) => "mixers are what is learned",
            (Trainable::All, false) => "adapts to the mixers: the published recipe trains all",
            (Trainable::Mixers, true) => "training.trainable is \"mixers\"",
            (Trainable::Mixers, false) => "training.trainable is \"mixers\"; shared with the teacher where equal",
        };
        Some(Part {
            what: (*what).to_owned(),
            parameters: counts.get(what).copied()?,
            from: if new { "the teacher's attention".to_owned() } else { rest.to_owned() },
            trained,
            why: why.to_owned(),
        })
    };
    order.iter().filter_map(part).collect()
}

/// The same files under another folder's name, without a second copy where the file system can.
fn link_folder(source: &Path, target: &Path) -> Result<()> {
    files::write_folder(target, |partial| {
        for entry in fs::read_dir(source).with_context(|| format!("reading {}", source.display()))? {
            let path = entry?.path();
            let Some(name) = path.file_name() else { continue };
            let to = partial.join(name);
            fs::hard_link(&path, &to)
                .or_else(|_| fs::copy(&path, &to).map(|_| ()))
                .with_context(|| format!("copying {}", path.display()))?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use model::initialise::Start;

    use super::*;

    #[test]
    fn the_table_says_what_is_trained_and_why() {
        let source = serde_json::json!({
            "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
            "num_key_value_heads": 1, "num_hidden_layers": 3, "vocab_size": 11, "tie_word_embeddings": true,
        });
        let teacher = ModelConfig::from_json(source.as_object().unwrap()).unwrap();
        let first = hybrid_config(&teacher, &[1], Start::Paper);
        let names = |parts: &[Part]| parts.iter().map(|part| part.what.clone()).collect::<Vec<_>>();
        let all = parts(&first, &[1], false, Trainable::All);
        assert_eq!(names(&all), ["new Mamba mixers", "attention that is kept", "MLPs", "norms", "embedding and head"]);
        assert!(all.iter().all(|part| part.trained));
        assert_eq!((all[0].from.as_str(), all[1].from.as_str()), ("the teacher's attention", "the teacher"));
        let total: u64 = all.iter().map(|part| part.parameters).sum();
        let expected: usize =
            parameter_specs(&first, |_| DType::F32).iter().map(|spec| spec.shape.iter().product::<usize>()).sum();
        assert_eq!(total, expected as u64);
        let second = parts(&hybrid_config(&first, &[2], Start::Paper), &[2], true, Trainable::Mixers);
        let trained: Vec<&str> = second.iter().filter(|part| part.trained).map(|part| part.what.as_str()).collect();
        assert_eq!(trained, ["new Mamba mixers", "earlier Mamba mixers"]);
        assert_eq!(second[1].from, "the previous hybrid");
    }
}
