//! A run: from a resolved configuration to a trained model.
//!
//! Everything a run knows lies in its folder: `config.toml`, `metrics.jsonl` (what was computed), `timing.jsonl` (how
//! long it took), both once more for TensorBoard (`events.out.tfevents.…`), `data/` (packed tokens), `checkpoints/`, and
//! at the end `model/`. A run that is killed at any moment and started again with the same command continues from its
//! newest checkpoint and ends with the same bits: every update is a function of the checkpoint's state, and what was
//! written after it is dropped.

mod checkpoint;
pub(crate) mod events;
mod folder;
mod guard;
mod matching;
mod metrics;
pub(crate) mod models;
mod objective;
mod progress;
mod replay;
mod tensor_file;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use autograd::optimizer::{self, AdamW};
use autograd::{Gradients, Tape};
use model::checkpoint::SaveOptions;
use runtime::{Device, DeviceKind};

pub use metrics::{Record, StepRecord, TimingRecord, ValidationRecord, read_metrics};
pub use progress::Progress;

use crate::config::{self, RunConfig};
use crate::data::{self, Batch, PackOptions, PositionsThatCount, Sampler, Sequence, TokenFile};
use crate::files;
use crate::interruption::Interrupted;
pub use crate::interruption::Interruption;
use crate::teach::Targets;
use checkpoint::{Checkpoint, DataState, State};
use events::Events;
pub(crate) use folder::{RunFolder, lock as lock_folder};
use guard::SpikeGuard;
use metrics::Log;
use models::Models;
use objective::{Loss, Objective, Unread, first_bad_gradient};
use replay::Replay;

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All updates were made; the model is in this folder.
    Finished {
        /// `RUN/model`.
        model: PathBuf,
    },
    /// A signal ended it; what was done is saved.
    Interrupted {
        /// What ended it.
        signal: &'static str,
        /// Updates made; 0 when it came before the first.
        step: u64,
    },
}

/// Runs `config` in `folder`, from its newest checkpoint where there is one.
///
/// # Errors
/// Everything that is wrong with models, data or configuration, before anything is written; a configuration, model or
/// data other than those the run began with; a loss or gradient that is not finite, before the update; files that
/// cannot be written. Earlier checkpoints stay as they are.
pub fn run(config: &RunConfig, folder: &Path, interruption: &Interruption, progress: &mut Progress) -> Result<Outcome> {
    let device: Device = config.device.parse()?;
    let run = RunFolder::open(folder)?;
    let resumed = checkpoint::latest(&run.checkpoints(), |warning| progress.say(warning))?;
    if run.config().exists() {
        check_same_config(config, &run)?;
    }
    if let Some(checkpoint) = &resumed {
        check_config_unchanged(config, &run, &checkpoint.state)?;
        if checkpoint.state.step >= config.training.steps && run.model().exists() {
            progress.say(&format!("all {} updates are made", config.training.steps));
            return Ok(Outcome::Finished { model: run.model() });
        }
    }
    let done = resumed.as_ref().map_or(0, |checkpoint| checkpoint.state.step);
    let prepared = prepare(config, &device, run, resumed, interruption, progress);
    let trained = prepared.and_then(|trainer| trainer.run(interruption, progress));
    // Only what makes no update ends in this way; the others are asked after each step.
    match trained {
        Err(error) => match error.downcast_ref::<Interrupted>() {
            Some(Interrupted { signal }) => Ok(Outcome::Interrupted { signal, step: done }),
            None => Err(error),
        },
        outcome => outcome,
    }
}

/// What a few updates took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Measurement {
    /// Seconds of one update: the median without the first.
    pub seconds: f64,
    /// The most bytes of device memory held.
    pub peak_memory_bytes: u64,
    /// Bytes of what is trained and its moments.
    pub checkpoint_bytes: u64,
}

/// Makes `steps` updates of a run in a folder of its own, and saves nothing of them.
///
/// # Errors
/// As [`run`].
pub(crate) fn measure(
    config: &RunConfig,
    folder: &Path,
    steps: u64,
    interruption: &Interruption,
) -> Result<Measurement> {
    let device: Device = config.device.parse()?;
    let progress = &mut Progress::silent();
    let mut trainer = prepare(config, &device, RunFolder::open(folder)?, None, interruption, progress)?;
    let mut seconds = Vec::new();
    for _ in 0..steps {
        interruption.check()?;
        let start = Instant::now();
        trainer.step(progress)?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    let counted = seconds.get_mut(1..).unwrap_or_default();
    counted.sort_by(f64::total_cmp);
    let trained = trainer.models.student.parameters.iter().filter(|(_, parameter)| parameter.trainable);
    let numbers: usize = trained.map(|(_, parameter)| parameter.value.count()).sum();
    Ok(Measurement {
        seconds: counted.get(counted.len() / 2).copied().unwrap_or_default(),
        peak_memory_bytes: device.memory_usage().peak as u64,
        // Weights and two moments in f32.
        checkpoint_bytes: 3 * (numbers * size_of::<f32>()) as u64,
    })
}

/// Everything up to the first update.
fn prepare<'a>(
    config: &'a RunConfig,
    device: &Device,
    run: RunFolder,
    resumed: Option<Checkpoint>,
    interruption: &Interruption,
    progress: &mut Progress,
) -> Result<Trainer<'a>> {
    let mut models = Models::new(config, device, interruption)?;
    let state = resumed.as_ref().map(|checkpoint| &checkpoint.state);
    let data = Data::prepare(config, &models, &run, state, interruption, progress)?;
    files::write_file(&run.config(), |writer| {
        Ok(std::io::Write::write_all(writer, config::to_toml(config)?.as_bytes())?)
    })?;
    let (state, optimizer) = match &resumed {
        Some(checkpoint) => {
            check_models(&models, &checkpoint.state)?;
            let options = config.training.optimizer();
            let optimizer = checkpoint.restore(&mut models.student.parameters, options, device)?;
            progress.say(&format!(
                "continuing after step {} from {}",
                checkpoint.state.step,
                checkpoint.path.display()
            ));
            (checkpoint.state.clone(), optimizer)
        }
        None => {
            let state = first_state(config, &models, &data)?;
            (state, AdamW::new(config.training.optimizer(), &models.student.parameters))
        }
    };
    let metrics = Log::open(&run.metrics(), state.metrics_bytes)?;
    let records = read_metrics(&run.metrics())?;
    let guard = SpikeGuard::new(&config.training, &records);
    let timing = Log::open(&run.timing(), metrics::timing_bytes(&run.timing(), state.step))?;
    let events = Events::open(&run.events(), &records, &events::read_timing(&run.timing()))?;
    progress.say(&models.description());
    for warning in &models.warnings {
        progress.say(warning);
    }
    warn_of_long_rows(config, &models, progress);
    Ok(Trainer {
        config,
        run,
        device: device.clone(),
        objective: Objective::new(&config.loss),
        sampler: Sampler::new(config.training.seed, data.train.file.sequences()),
        models,
        data,
        optimizer,
        replays: config.training.graphs && matches!(device.kind(), DeviceKind::Cuda(_)),
        replay: None,
        launched: false,
        fresh: resumed.is_none(),
        state,
        guard,
        metrics,
        timing,
        events,
    })
}

/// A row may be longer than what the model was made for, since each of its documents begins at position 0; a document
/// should not be.
fn warn_of_long_rows(config: &RunConfig, models: &Models, progress: &mut Progress) {
    let (length, positions) = (config.data.sequence_length, models.student.config.max_positions);
    if length > positions {
        progress.say(&format!(
            "warning: data.sequence_length is {length}, but the model was made for {positions} positions \
             (max_position_embeddings): of a document longer than that it sees positions that it does not know; use \
             data.sequence_length = {positions} if there are such documents"
        ));
    }
}

/// Rows, and what the teacher says of them where that is known beforehand.
struct Rows {
    file: TokenFile,
    targets: Option<Targets>,
}

struct Data {
    train: Rows,
    validation: Option<Rows>,
}

impl Data {
    fn prepare(
        config: &RunConfig,
        models: &Models,
        run: &RunFolder,
        state: Option<&State>,
        interruption: &Interruption,
        progress: &mut Progress,
    ) -> Result<Self> {
        let encoder = models.encoder(config)?;
        let options =
            PackOptions { sequence_length: config.data.sequence_length, long_documents: config.data.long_documents };
        let mut prepare = |role: &str, source: &Path| -> Result<TokenFile> {
            if let Some(begun) = state.and_then(|state| state.data.get(role)) {
                let differences = data::differences(
                    &begun.identity,
                    &data::wanted_identity(source, &encoder, options, interruption)?,
                );
                ensure!(
                    differences.is_empty(),
                    "the {role} data are not those that the run began with: {}; put them back, or start a new run folder",
                    differences.join("; ")
                );
            }
            files::create_folder(&run.data())?;
            let cache = run.data().join(format!("{role}.tokens"));
            let will_pack = || progress.say(&format!("packing {}", source.display()));
            let file = data::prepare(source, &cache, &encoder, options, interruption, will_pack)
                .with_context(|| format!("preparing the {role} data"))?;
            if let Some(begun) = state.and_then(|state| state.data.get(role)) {
                ensure!(file.rows_hash() == begun.rows, "the {role} data give other tokens than when the run began");
            }
            let summary = file.summary();
            progress.say(&format!(
                "{role} data: {} documents, {} tokens in {} sequences of {}{}{}",
                summary.documents,
                summary.tokens,
                summary.sequences,
                file.identity().sequence_length,
                counted(summary.split_documents, "split"),
                counted(summary.dropped_documents, "dropped"),
            ));
            Ok(file)
        };
        let train = prepare("train", config.data.train.as_deref().context("data.train is missing")?)?;
        let validation = match &config.data.validation {
            Some(source) => Some(prepare("validation", source)?),
            None => None,
        };
        let teacher = models.hashes.get("teacher").map_or("", String::as_str);
        let with_targets = |file: TokenFile, role: &str, folder: &Option<PathBuf>| -> Result<Rows> {
            let Some(folder) = folder else { return Ok(Rows { file, targets: None }) };
            let key = format!("data.{role}_targets");
            let targets = Targets::open(folder, interruption).with_context(|| key.clone())?;
            targets.check(&key, teacher, &file, config.loss.temperature)?;
            let begun = state.and_then(|state| state.data.get(role)?.targets.as_ref());
            ensure!(
                begun.is_none_or(|begun| *begun == targets.description().sha256),
                "{key}: these are not the targets that the run began with: put them back, or start a new run folder"
            );
            Ok(Rows { file, targets: Some(targets) })
        };
        let (of_train, of_validation) = (&config.data.train_targets, &config.data.validation_targets);
        Ok(Self {
            train: with_targets(train, "train", of_train)?,
            validation: validation.map(|file| with_targets(file, "validation", of_validation)).transpose()?,
        })
    }

    fn state(&self) -> BTreeMap<String, DataState> {
        let state = |Rows { file, targets }: &Rows| DataState {
            identity: file.identity().clone(),
            rows: file.rows_hash().to_owned(),
            targets: targets.as_ref().map(|targets| targets.description().sha256.clone()),
        };
        let validation = self.validation.as_ref().map(|rows| ("validation".to_owned(), state(rows)));
        [("train".to_owned(), state(&self.train))].into_iter().chain(validation).collect()
    }
}

fn counted(count: u64, what: &str) -> String {
    if count == 0 { String::new() } else { format!(", {count} long documents {what}") }
}

fn config_hash(config: &RunConfig) -> Result<String> {
    let defaults = RunConfig::defaults(config.task).checkpoint;
    let text = config::to_toml(&RunConfig { checkpoint: defaults, ..config.clone() })?;
    Ok(files::hash_bytes(text.as_bytes()))
}

fn first_state(config: &RunConfig, models: &Models, data: &Data) -> Result<State> {
    Ok(State {
        version: State::VERSION,
        step: 0,
        sequences: 0,
        tokens: 0,
        passed_over: 0,
        seed: config.training.seed,
        metrics_bytes: 0,
        config: config_hash(config)?,
        models: models.hashes.clone(),
        data: data.state(),
    })
}

/// The run began with this very configuration.
fn check_same_config(config: &RunConfig, run: &RunFolder) -> Result<()> {
    let begun = config::read(&run.config())?;
    let differences = config::differences(&begun, config)?;
    ensure!(
        differences.is_empty(),
        "the run in {} began with another configuration: {}; give the same one, or start a new run folder",
        run.config().display(),
        differences.join("; ")
    );
    Ok(())
}

/// Nobody changed the configuration since the checkpoint was saved.
fn check_config_unchanged(config: &RunConfig, run: &RunFolder, state: &State) -> Result<()> {
    ensure!(
        config_hash(config)? == state.config,
        "{} was changed since the last checkpoint: put it back, or start a new run folder",
        run.config().display()
    );
    Ok(())
}

fn check_models(models: &Models, state: &State) -> Result<()> {
    for (role, hash) in &models.hashes {
        ensure!(
            state.models.get(role) == Some(hash),
            "the {role} model's files are not those that the run began with: put them back, or start a new run folder"
        );
    }
    Ok(())
}

struct Trainer<'a> {
    config: &'a RunConfig,
    run: RunFolder,
    device: Device,
    objective: Objective,
    sampler: Sampler,
    models: Models,
    data: Data,
    optimizer: AdamW,
    /// Whether updates may be replayed.
    replays: bool,
    replay: Option<Replay>,
    /// Whether this process has launched an update kernel by kernel.
    launched: bool,
    /// Whether no checkpoint was there to continue from.
    fresh: bool,
    state: State,
    guard: SpikeGuard,
    metrics: Log,
    timing: Log,
    events: Events,
}

impl Trainer<'_> {
    fn run(mut self, interruption: &Interruption, progress: &mut Progress) -> Result<Outcome> {
        let steps = self.config.training.steps;
        progress.begin(self.state.step, steps);
        interruption.check()?;
        if self.fresh {
            self.validate(interruption, progress)?;
        }
        while self.state.step < steps {
            self.step(progress).with_context(|| format!("step {}", self.state.step + 1))?;
            let step = self.state.step;
            if step == steps || is_due(step, self.config.evaluation.every) {
                // Belongs to its step, and is finished with it.
                self.validate(&Interruption::new(), progress)?;
            }
            let interrupted = interruption.requested();
            if step == steps || interrupted.is_some() || is_due(step, self.config.checkpoint.every) {
                self.save()?;
            }
            if let Some(signal) = interrupted.filter(|_| step < steps) {
                progress.end();
                return Ok(Outcome::Interrupted { signal, step });
            }
        }
        progress.end();
        self.finish()
    }

    /// One update.
    fn step(&mut self, progress: &mut Progress) -> Result<()> {
        let started = Instant::now();
        let training = &self.config.training;
        let first = self.state.sequences;
        let rows: Vec<u64> = (first..first + training.batch_size as u64).map(|at| self.sampler.row(at)).collect();
        let positions = positions_that_count(&self.data.train.file, &rows, self.objective.positions)?;
        ensure!(positions > 0, "no position of its {} rows counts in the loss: use larger batches", rows.len());
        let places = rows.len() * self.data.train.file.identity().sequence_length;
        let (gradients, unread) = self.gradients(&rows, places as u64, progress)?;
        let square_sum = optimizer::gradient_square_sum(&self.models.student.parameters, &gradients)?;
        // Here, and nowhere else in a step, the host waits for the device.
        let (losses, square_sum) = Loss::read(&unread, square_sum.as_ref())?;
        // From the mean over all places to the mean over those that count.
        let share = places as f64 / positions as f64;
        let mut loss = Loss::default();
        for (part, rows) in losses.into_iter().zip(rows.chunks(training.micro_batch)) {
            self.check_finite(&part, &self.data.train, rows).context("nothing was updated or saved")?;
            loss.add(part.scaled(share));
        }
        let parameters = &mut self.models.student.parameters;
        let gradient_norm = share * square_sum.unwrap_or_default().sqrt();
        if !gradient_norm.is_finite() {
            let culprit = first_bad_gradient(parameters, &gradients).unwrap_or_else(|| "their norm".to_owned());
            bail!("the gradients are not finite; the first tensor at fault: {culprit}. Nothing was updated or saved");
        }
        let step = self.state.step + 1;
        let learning_rate = training.schedule().rate(step);
        let passed_over = self.guard.judge(loss.total)?;
        if passed_over.is_none() {
            let limit = if training.gradient_clip > 0.0 { training.gradient_clip } else { f64::INFINITY };
            let scale = f64::from(optimizer::clip_factor(gradient_norm, limit)) * share;
            self.optimizer.update_scaled(parameters, &gradients, learning_rate as f32, scale as f32)?;
        }
        drop(gradients);
        self.state.step = step;
        self.state.sequences += rows.len() as u64;
        self.state.tokens += positions;
        self.state.passed_over = self.guard.passed_over();
        let record = StepRecord {
            step,
            loss: loss.total,
            divergence: loss.divergence,
            cross_entropy: loss.cross_entropy,
            gradient_norm,
            learning_rate,
            tokens: self.state.tokens,
            passed_over,
        };
        if let Some(score) = passed_over {
            progress.say(&format!(
                "step {step}: the loss {:.4} lies {score:.1} standard deviations above those before: the batch is passed \
                 over ({} so far)",
                loss.total, self.state.passed_over
            ));
        }
        self.metrics.write(&record)?;
        let tokens = rows.len() * self.data.train.file.identity().sequence_length;
        let timing = self.time("step", started, Some(tokens))?;
        progress.step(&record, timing.tokens_per_second.unwrap_or_default());
        self.events.write(&Record::Step(record), &timing)?;
        Ok(())
    }

    /// The whole batch's gradients and its micro-batches' losses, divided by the number of the batch's places, whether they
    /// count or not: that number is the same for every batch, as the launches are. Gradients of micro-batches are summed,
    /// so that the result does not depend on how the batch is cut, up to rounding: sums are then in another order.
    fn gradients(&mut self, rows: &[u64], places: u64, progress: &mut Progress) -> Result<(Gradients, Vec<Unread>)> {
        let objective = self.objective.of_step(self.state.step + 1);
        if let Some((gradients, unread)) = self.replayed(objective, rows, places, progress)? {
            return Ok((gradients, vec![unread]));
        }
        self.launched = true;
        let mut losses = Vec::new();
        let mut sum: Option<Gradients> = None;
        for rows in rows.chunks(self.config.training.micro_batch) {
            let batch = self.batch(&self.data.train, rows)?;
            let tape = Tape::new();
            let (student, teacher) = (&self.models.student, self.models.teacher.as_ref());
            let (value, loss) = objective.compute(&tape, student, teacher, &batch, places, false)?;
            losses.push(loss);
            let gradients = tape.backward(&value)?;
            match &mut sum {
                Some(sum) => sum.merge(gradients)?,
                None => sum = Some(gradients),
            }
        }
        Ok((sum.unwrap_or_default(), losses))
    }

    /// The same by replaying what was launched for an earlier batch, where that is the same but for the batch.
    fn replayed(
        &mut self,
        objective: Objective,
        rows: &[u64],
        places: u64,
        progress: &mut Progress,
    ) -> Result<Option<(Gradients, Unread)>> {
        let Rows { file, targets } = &self.data.train;
        let repeats = objective.repeats() && targets.is_none() && rows.len() <= self.config.training.micro_batch;
        // The first update of a process, also of one that continues a run, loads kernels and whatever else is made once, and
        // gives the student memory of its own.
        if !self.replays || !repeats || !self.launched {
            return Ok(None);
        }
        let (student, teacher) = (&self.models.student, self.models.teacher.as_ref());
        let sequences = read_rows(file, rows)?;
        if self.replay.as_ref().is_none_or(|replay| !replay.is_of(&objective, student, rows.len())) {
            // The old one's memory first.
            self.replay = None;
            let batch = Batch::new(&self.device, &sequences, objective.positions)?;
            match Replay::capture(objective, student, teacher, batch, places) {
                Ok(replay) => self.replay = Some(replay),
                Err(error) => {
                    progress.say(&format!("updates are not captured, but launched kernel by kernel: {error:#}"));
                    self.replays = false;
                    return Ok(None);
                }
            }
        }
        self.replay.as_mut().map(|replay| replay.run(&sequences)).transpose()
    }

    fn batch(&self, of: &Rows, rows: &[u64]) -> Result<Batch> {
        let targets = of.targets.as_ref().map(|targets| targets.rows(&self.device, rows)).transpose()?;
        Ok(Batch { targets, ..Batch::new(&self.device, &read_rows(&of.file, rows)?, self.objective.positions)? })
    }

    /// That the loss of these rows is a number.
    fn check_finite(&self, loss: &Loss, of: &Rows, rows: &[u64]) -> Result<()> {
        if loss.total.is_finite() {
            return Ok(());
        }
        let batch = self.batch(of, rows)?;
        self.objective.check_finite(loss, &self.models.student, self.models.teacher.as_ref(), &batch)
    }

    /// Looks at the first rows of the validation data, if there are any.
    fn validate(&mut self, interruption: &Interruption, progress: &mut Progress) -> Result<()> {
        let Some(validation) = &self.data.validation else { return Ok(()) };
        // Its memory is wanted.
        self.replay = None;
        let file = &validation.file;
        let started = Instant::now();
        let count = file.sequences().min(self.config.evaluation.sequences);
        let rows: Vec<u64> = (0..count).collect();
        let positions = positions_that_count(file, &rows, self.objective.positions)?;
        ensure!(positions > 0, "no position of the first {count} rows of validation data counts in the loss");
        let mut loss = Loss::default();
        let objective = self.objective.of_step(self.state.step);
        for rows in rows.chunks(self.config.training.micro_batch) {
            interruption.check()?;
            let place = || format!("validation after step {}", self.state.step);
            let (batch, tape) = (self.batch(validation, rows)?, Tape::inference());
            let (student, teacher) = (&self.models.student, self.models.teacher.as_ref());
            let (_, unread) =
                objective.compute(&tape, student, teacher, &batch, positions, true).with_context(place)?;
            for part in Loss::read(&[unread], None)?.0 {
                objective.check_finite(&part, student, teacher, &batch).with_context(place)?;
                loss.add(part);
            }
        }
        let record = ValidationRecord {
            step: self.state.step,
            validation_loss: loss.total,
            validation_divergence: loss.divergence,
            validation_cross_entropy: loss.cross_entropy.unwrap_or_default(),
            validation_tokens: positions,
        };
        self.metrics.write(&record)?;
        let tokens = rows.len() * file.identity().sequence_length;
        let timing = self.time("validation", started, Some(tokens))?;
        progress.validation(&record);
        self.events.write(&Record::Validation(record), &timing)?;
        Ok(())
    }

    fn save(&mut self) -> Result<()> {
        let started = Instant::now();
        // What the checkpoint counts on is on the disk before it.
        self.state.metrics_bytes = self.metrics.sync()?;
        checkpoint::save(
            &self.run.checkpoints(),
            &self.state,
            &self.models.student.parameters,
            &self.optimizer,
            self.config.checkpoint.keep,
        )?;
        let timing = self.time("checkpoint", started, None)?;
        self.events.pass(&timing);
        Ok(())
    }

    /// Writes the model, whole or not at all.
    fn finish(self) -> Result<Outcome> {
        let model = self.run.model();
        let options =
            SaveOptions { carry_from: Some(&self.models.files_from), replace: true, ..SaveOptions::default() };
        self.models.student.save(&model, &options).context("saving the finished model; its checkpoint is whole")?;
        Ok(Outcome::Finished { model })
    }

    fn time(&mut self, what: &str, started: Instant, tokens: Option<usize>) -> Result<TimingRecord> {
        let seconds = started.elapsed().as_secs_f64();
        let record = TimingRecord {
            step: self.state.step,
            what: what.to_owned(),
            seconds,
            tokens_per_second: tokens.map(|tokens| tokens as f64 / seconds.max(1e-9)),
            peak_memory_bytes: self.device.memory_usage().peak as u64,
        };
        self.timing.write(&record)?;
        Ok(record)
    }
}

/// The rows of one micro-batch: a whole batch may be larger than memory.
fn read_rows(file: &TokenFile, rows: &[u64]) -> Result<Vec<Sequence>> {
    rows.iter().map(|&row| file.sequence(row)).collect()
}

fn positions_that_count(file: &TokenFile, rows: &[u64], positions: PositionsThatCount) -> Result<u64> {
    rows.iter().map(|&row| Ok(data::positions_that_count(&file.sequence(row)?, positions))).sum()
}

fn is_due(step: u64, every: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}
