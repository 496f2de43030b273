//! What a run would do and take: `grafter distill --dry-run`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use model::config::{MixerKind, ModelConfig};
use serde::Serialize;

use super::{base_of, check_schedule, mamba_layers};
use crate::config::{RunConfig, StageTarget, StagesSection, Task};
use crate::interruption::Interruption;
use crate::rank::Method;
use crate::train;

/// Updates that are timed; the first, which fills pools, is not counted.
const MEASURED: u64 = 4;

/// A run before it is made.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// Its stages; one where there is no schedule.
    pub stages: Vec<PlannedStage>,
    /// Tokens of all stages, padding included.
    pub tokens: u64,
    /// The most bytes of device memory held while updates were measured.
    pub memory_bytes: u64,
    /// Bytes of all that is trained with its moments: what one checkpoint takes on the disk.
    pub checkpoint_bytes: u64,
    /// Seconds of one update, the median of a few measured ones, with as many Mamba layers as the last stage has.
    pub seconds_per_update: f64,
    /// Estimate for everything, rankings included, checkpoints and validation not.
    pub seconds: f64,
}

/// A stage before it is made.
#[derive(Clone, Debug, Serialize)]
pub struct PlannedStage {
    /// Counted from 1.
    pub stage: usize,
    /// Mamba layers after it.
    pub mamba_layers: usize,
    /// Which, where that is known beforehand.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Vec<usize>>,
    /// How layers are ranked before it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ranked_by: Option<Method>,
    /// Estimate for the ranking.
    pub ranking_seconds: f64,
    /// Updates.
    pub steps: u64,
    /// Tokens, padding included.
    pub tokens: u64,
    /// Estimate for the updates.
    pub seconds: f64,
}

/// Measures a few updates in a folder of its own, which is removed again, and says what the whole run would take. Nothing
/// is written in the run's folder.
///
/// # Errors
/// Everything that would end the run before its first updates.
pub fn plan(config: &RunConfig, interruption: &Interruption) -> Result<Plan> {
    let model = match config.task {
        Task::Distill => {
            check_schedule(config)?;
            ModelConfig::read(&base_of(config, Path::new(""), 1)?)?
        }
        Task::Train => ModelConfig::read(config.model.source.as_ref().context("model.source is missing")?)?,
    };
    let scratch = Scratch::new()?;
    let measured = train::measure(&stand_in(config, &model), &scratch.0, MEASURED, interruption)?;
    drop(scratch);
    let layers = model.mixers.len() as f64;
    // Forward passes of the teacher and the student, and a reverse pass of two: a share of an update per row.
    let passes = if config.task == Task::Distill { 4.0 } else { 3.0 };
    let forward = measured.seconds / (passes * config.training.batch_size as f64);
    let row_tokens = config.training.batch_size as u64 * config.data.sequence_length as u64;
    let mut before = mamba_layers(&model).len();
    let mut stages = Vec::new();
    let single = [StageTarget::Layers([mamba_layers(&model), config.model.layers.clone()].concat())];
    let schedule = if config.stages.schedule.is_empty() { &single[..] } else { &config.stages.schedule };
    for (index, target) in schedule.iter().enumerate() {
        let steps = StagesSection::entry(&config.stages.steps, index).unwrap_or(config.training.steps);
        let (count, named, ranked_by) = match target {
            StageTarget::Count(count) => (*count, None, StagesSection::entry(&config.stages.rank, index)),
            StageTarget::Layers(layers) => (layers.len(), Some(layers.clone()), None),
        };
        let candidates = model.mixers.len().saturating_sub(before) as f64;
        let samples = config.stages.rank_samples as f64;
        let ranking_seconds = match ranked_by {
            None => 0.0,
            // The trunk once, and for every layer half of the layers.
            Some(Method::Loo) => samples * forward * (1.0 + candidates / 2.0),
            // Trunk and teacher for four candidates at a time; for each half of the layers, there and back.
            Some(Method::Mmr) => {
                let rows = config.stages.rank_steps as f64 * config.training.batch_size as f64;
                rows * forward * (2.0 * (candidates / 4.0).ceil() + 1.5 * candidates)
            }
            Some(Method::Mse) => samples * forward * (1.0 + 2.0 * candidates / layers),
        };
        stages.push(PlannedStage {
            stage: index + 1,
            mamba_layers: count,
            layers: named,
            ranked_by,
            ranking_seconds,
            steps,
            tokens: steps * row_tokens,
            seconds: steps as f64 * measured.seconds,
        });
        before = count;
    }
    Ok(Plan {
        tokens: stages.iter().map(|stage| stage.tokens).sum(),
        seconds: stages.iter().map(|stage| stage.seconds + stage.ranking_seconds).sum(),
        memory_bytes: measured.peak_memory_bytes,
        checkpoint_bytes: measured.checkpoint_bytes,
        seconds_per_update: measured.seconds,
        stages,
    })
}

/// The run whose updates are measured: the last stage's, with the last layers in place of those that will be picked.
fn stand_in(config: &RunConfig, model: &ModelConfig) -> RunConfig {
    let mut run = config.clone();
    run.stages.schedule.clear();
    run.data.validation = None;
    let done = mamba_layers(model);
    match config.stages.schedule.last() {
        None => {}
        Some(StageTarget::Layers(layers)) => {
            run.model.layers = layers.iter().copied().filter(|layer| !done.contains(layer)).collect();
        }
        Some(StageTarget::Count(count)) => {
            let attention = (0..model.mixers.len()).rev().filter(|&layer| model.mixers[layer] == MixerKind::Attention);
            run.model.layers = attention.take(count.saturating_sub(done.len())).collect();
        }
    }
    run
}

/// A folder for one measurement, removed when it is over.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("grafter-plan-{}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("making the folder {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Left behind it would only take room in the system's own temporary folder.
        let _ = fs::remove_dir_all(&self.0);
    }
}
