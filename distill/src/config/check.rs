//! Ranges, and what goes together.

use anyhow::{Result, bail, ensure};

use super::{DivergenceKind, LEAST_SPIKE_WINDOW, RunConfig, StageTarget, Task};
use crate::data::PackOptions;
use crate::rank::Metric;

/// No update needs more rows; beyond that one never ends.
const GREATEST_BATCH: usize = 1 << 20;

/// Refuses a configuration that makes no sense.
///
/// # Errors
/// The first key at fault, its value, and what would be right.
pub(super) fn check(config: &RunConfig) -> Result<()> {
    model(config)?;
    data(config)?;
    training(config)?;
    loss(config)?;
    targets(config)?;
    stages(config)?;
    ensure!(config.checkpoint.keep >= 1, "checkpoint.keep is 0: at least one checkpoint must be kept");
    ensure!(
        config.evaluation.sequences >= 1,
        "evaluation.sequences is 0: leave data.validation out to evaluate nothing"
    );
    Ok(())
}

fn model(config: &RunConfig) -> Result<()> {
    let model = &config.model;
    match config.task {
        Task::Distill => {
            ensure!(
                model.teacher.is_some(),
                "model.teacher is missing: the folder of the model to learn from (--teacher)"
            );
            ensure!(
                model.source.is_none(),
                "model.source is for `grafter train`: distillation starts from model.teacher"
            );
            ensure!(
                model.init.start().is_some(),
                "model.init: \"random\" and \"weights\" are for `grafter train`; use paper, aligned, aligned_bias_once, \
                 identity_convolution or whole_head"
            );
            ensure!(
                !model.layers.is_empty() || model.student.is_some() || !config.stages.schedule.is_empty(),
                "model.layers is empty: name the layers to replace (--layers 1,3), the stages (--schedule 2,3), or a \
                 hybrid to go on from (--student)"
            );
            ensure!(
                model.layers.is_empty() || config.stages.schedule.is_empty(),
                "model.layers and stages.schedule are both given: the stages' layers are in the schedule"
            );
            for (index, layer) in model.layers.iter().enumerate() {
                ensure!(!model.layers[..index].contains(layer), "model.layers names layer {layer} twice");
            }
        }
        Task::Train => {
            ensure!(
                model.source.is_some(),
                "model.source is missing: a folder with config.json and tokenizer.json (--source)"
            );
            ensure!(
                model.init.start().is_none(),
                "model.init: how mixers start is for `grafter distill`; use \"random\" or \"weights\""
            );
            let teacher_keys = [
                ("model.teacher", model.teacher.is_some()),
                ("model.student", model.student.is_some()),
                ("model.layers", !model.layers.is_empty()),
                ("stages.schedule", !config.stages.schedule.is_empty()),
            ];
            let weights = config.loss.teacher_weights().map(|(key, weight)| (key, weight != 0.0));
            if let Some((key, _)) = teacher_keys.iter().chain(&weights).find(|(_, given)| *given) {
                bail!("{key} is for `grafter distill`: `grafter train` has no teacher");
            }
        }
    }
    Ok(())
}

fn data(config: &RunConfig) -> Result<()> {
    let data = &config.data;
    ensure!(data.train.is_some(), "data.train is missing: a jsonl file (--train)");
    ensure!(
        PackOptions::SEQUENCE_LENGTHS.contains(&data.sequence_length),
        "data.sequence_length is {}: it must be from {} to {}",
        data.sequence_length,
        PackOptions::SEQUENCE_LENGTHS.start(),
        PackOptions::SEQUENCE_LENGTHS.end()
    );
    Ok(())
}

fn training(config: &RunConfig) -> Result<()> {
    let training = &config.training;
    ensure!(training.steps >= 1, "training.steps is missing or 0: how many updates to make (--steps)");
    ensure!(
        (1..=GREATEST_BATCH).contains(&training.batch_size),
        "training.batch_size is {}: it must be from 1 to {GREATEST_BATCH}",
        training.batch_size
    );
    ensure!(
        (1..=training.batch_size).contains(&training.micro_batch),
        "training.micro_batch is {}: it must be from 1 to training.batch_size, which is {}",
        training.micro_batch,
        training.batch_size
    );
    within("training.learning_rate", training.learning_rate, 0.0, f64::from(f32::MAX), "above 0", false)?;
    within(
        "training.minimum_learning_rate",
        training.minimum_learning_rate,
        0.0,
        training.learning_rate,
        "from 0 to training.learning_rate",
        true,
    )?;
    within("training.mixer_rate", training.mixer_rate, 0.0, f64::from(f32::MAX), "above 0", false)?;
    ensure!(
        training.warmup_steps <= training.steps,
        "training.warmup_steps is {}, more than training.steps, which is {}",
        training.warmup_steps,
        training.steps
    );
    if let Some(decay_steps) = training.decay_steps {
        ensure!(
            decay_steps > training.warmup_steps,
            "training.decay_steps is {decay_steps}: decay must end after the warm-up of {} steps",
            training.warmup_steps
        );
    }
    within("training.gradient_clip", training.gradient_clip, 0.0, f64::MAX, "0 (no limit) or above", true)?;
    within("training.weight_decay", training.weight_decay, 0.0, f64::from(f32::MAX), "0 or above", true)?;
    for (key, beta) in [("training.beta1", training.beta1), ("training.beta2", training.beta2)] {
        ensure!((0.0..1.0).contains(&beta), "{key} is {beta}: it must be at least 0 and below 1");
    }
    within("training.epsilon", training.epsilon, 0.0, 1.0, "above 0 and at most 1", false)?;
    within("training.spike_threshold", training.spike_threshold, 0.0, 1e6, "0 (none is passed over) or above", true)?;
    ensure!(
        training.spike_window >= LEAST_SPIKE_WINDOW,
        "training.spike_window is {}: it must be at least {LEAST_SPIKE_WINDOW}",
        training.spike_window
    );
    // TOML has signed integers only, and the resolved configuration is TOML.
    ensure!(
        i64::try_from(training.seed).is_ok(),
        "training.seed is {}: it must be at most {}",
        training.seed,
        i64::MAX
    );
    Ok(())
}

fn stages(config: &RunConfig) -> Result<()> {
    let stages = &config.stages;
    let mut most = 0;
    for target in &stages.schedule {
        let count = match target {
            StageTarget::Count(count) => *count,
            StageTarget::Layers(layers) => {
                for (index, layer) in layers.iter().enumerate() {
                    ensure!(!layers[..index].contains(layer), "stages.schedule names layer {layer} twice in one stage");
                }
                layers.len()
            }
        };
        ensure!(
            count > most,
            "stages.schedule: a stage ends with {count} Mamba layers after one with {most}: each must have more"
        );
        most = count;
    }
    ensure!(!stages.rank.is_empty(), "stages.rank is empty: name a method (loo, mmr or mse)");
    let lists = [
        ("stages.rank", stages.rank.len()),
        ("stages.steps", stages.steps.len()),
        ("stages.learning_rates", stages.learning_rates.len()),
    ];
    if !stages.schedule.is_empty() {
        for (key, count) in lists {
            let stages = stages.schedule.len();
            // The methods' default has two.
            ensure!(count <= stages.max(2), "{key} has {count} entries, but there are {stages} stages");
        }
    }
    ensure!(stages.rank_samples >= 1, "stages.rank_samples is 0: it must be at least 1");
    ensure!(stages.rank_steps >= 1, "stages.rank_steps is 0: it must be at least 1");
    ensure!(stages.steps.iter().all(|&steps| steps >= 1), "stages.steps has a 0: each stage needs at least one update");
    ensure!(
        stages.steps.iter().all(|&steps| steps >= config.training.warmup_steps),
        "stages.steps has fewer than training.warmup_steps, which is {}",
        config.training.warmup_steps
    );
    within("stages.rank_learning_rate", stages.rank_learning_rate, 0.0, f64::from(f32::MAX), "above 0", false)?;
    for &rate in &stages.learning_rates {
        within("stages.learning_rates", rate, 0.0, f64::from(f32::MAX), "above 0", false)?;
        ensure!(
            rate >= config.training.minimum_learning_rate,
            "stages.learning_rates has {rate}, less than training.minimum_learning_rate"
        );
    }
    ensure!(
        stages.rank_metric == Metric::Loss || stages.rank_data.is_some(),
        "stages.rank_metric asks questions: name their file (stages.rank_data)"
    );
    Ok(())
}

fn loss(config: &RunConfig) -> Result<()> {
    let loss = &config.loss;
    within("loss.temperature", loss.temperature, 1e-6, 1e6, "from 0.000001 to 1000000", true)?;
    for (key, weight) in loss.teacher_weights() {
        within(key, weight, 0.0, 1e6, "0 or above", true)?;
    }
    within("loss.cross_entropy_weight", loss.cross_entropy_weight, 0.0, 1e6, "0 or above", true)?;
    let weights = loss.teacher_weights().map(|(_, weight)| weight);
    ensure!(
        weights.iter().chain([&loss.cross_entropy_weight]).any(|&weight| weight as f32 > 0.0),
        "loss.divergence_weight, loss.cross_entropy_weight and every other weight of the loss are 0 (in float32): nothing \
         would be learned"
    );
    Ok(())
}

/// Targets on the disk know the divergences alone, and have their temperature.
fn targets(config: &RunConfig) -> Result<()> {
    let (data, loss) = (&config.data, &config.loss);
    let given = [
        ("data.train_targets", data.train_targets.is_some()),
        ("data.validation_targets", data.validation_targets.is_some()),
    ];
    let Some((key, _)) = given.into_iter().find(|(_, given)| *given) else { return Ok(()) };
    ensure!(config.task == Task::Distill, "{key} is for `grafter distill`: `grafter train` has no teacher");
    ensure!(
        data.validation_targets.is_none() || data.validation.is_some(),
        "data.validation_targets is given, but data.validation is not: name the documents they are of"
    );
    ensure!(loss.mixer_matching_weight == 0.0, "loss.mixer_matching_weight needs the teacher itself: leave {key} out");
    ensure!(
        loss.divergence != DivergenceKind::SoftCrossEntropy,
        "loss.divergence is \"soft_cross_entropy\", which needs the teacher's whole distribution: leave {key} out, or take \
         \"forward_kl\", whose gradient is the same"
    );
    Ok(())
}

/// Whether a number lies in a range, as it is and as the f32 that computes; NaN lies in none.
fn within(key: &str, value: f64, low: f64, high: f64, range: &str, low_included: bool) -> Result<()> {
    let fits = (value > low || (low_included && value == low)) && value <= high;
    ensure!(fits, "{key} is {value}: it must be {range}");
    ensure!(
        low_included || value as f32 > low as f32,
        "{key} is {value}, which is {low} in float32: it must be {range}"
    );
    Ok(())
}
