//! Minimal-loss Mamba replacement (MMR): each layer's attention alone becomes a Mamba mixer that starts from the
//! original teacher's attention (MIL), learns for some updates against the teacher with reverse KL, and the divergence
//! that is left is the layer's score.
//!
//! Only the new mixer learns. So everything below its layer stays as it is, and is the same for all candidates above:
//! for every batch the trunk is computed once for a group of candidates, which learn side by side on it, and so are the
//! teacher's logits. All candidates see the same rows in the same order, and every candidate's arithmetic is its own:
//! scores do not depend on how candidates are grouped.

use anyhow::{Context, Result, ensure};
use autograd::ops::{self, Divergence, DivergenceOptions};
use autograd::optimizer::{self, AdamW, AdamWOptions, Decay, Schedule};
use autograd::{Gradients, Tape, Tensor, Var};
use model::Model;
use model::initialise::graft;

use super::store::Store;
use super::{Bench, Cost, Found, LayerScore, RankConfig};
use crate::config::PrecisionKind;
use crate::data::{self, Batch, PositionsThatCount, Sampler, Sequence, TokenFile};
use crate::interruption::Interruption;
use crate::train::Progress;

const OPTIMIZER: AdamWOptions = AdamWOptions { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.0 };
/// Greatest norm of a candidate's gradients.
const CLIP: f64 = 1.0;

/// A model with one layer replaced.
struct Candidate {
    layer: usize,
    model: Model,
    optimizer: AdamW,
}

/// Rows computed at once, with what all candidates of a group share.
struct Shared {
    batch: Batch,
    /// What enters each candidate's layer.
    entering: Vec<Tensor>,
    teacher_logits: Tensor,
}

/// Scores every layer that is not known yet.
pub(super) fn rank(
    bench: &Bench<'_>,
    file: &TokenFile,
    store: &mut Store,
    interruption: &Interruption,
    progress: &mut Progress,
) -> Result<Found> {
    let unknown: Vec<usize> = bench.layers.iter().copied().filter(|&layer| store.known(layer).is_none()).collect();
    for layers in unknown.chunks(bench.config.together) {
        progress.say(&format!("layers {layers:?}: {} updates of each new mixer", bench.config.steps));
        let group = Group::new(bench, file, layers)?;
        for score in group.learn(interruption)? {
            progress.say(&format!(
                "layer {}: divergence {:.6} left, {:.6} at the start",
                score.layer,
                score.score,
                score.score_at_start.unwrap_or(f64::NAN)
            ));
            store.add(score)?;
        }
    }
    let scores = bench.layers.iter().filter_map(|&layer| store.known(layer).cloned()).collect();
    Ok(Found { baseline: None, scores, cost: cost(bench) })
}

/// Forward passes of layers. A trunk that goes all the way up gives the teacher's logits too, where the model is its own
/// teacher; naively every candidate computes teacher and trunk by itself.
fn cost(bench: &Bench<'_>) -> Cost {
    let config = bench.config;
    let layers = bench.model.config.mixers.len() as u64;
    let batches = (config.steps + config.average_last) * config.batch_size.div_ceil(config.micro_batch) as u64;
    let trunk = |group: &[usize]| match bench.teacher {
        None => layers,
        Some(_) => layers + group.last().map_or(0, |&layer| layer as u64),
    };
    let shared: u64 = bench.layers.chunks(config.together).map(trunk).sum();
    let above: u64 = bench.layers.iter().map(|&layer| layers - layer as u64).sum();
    Cost {
        layer_passes: batches * (shared + above),
        naive_layer_passes: batches * bench.layers.len() as u64 * 2 * layers,
    }
}

/// Candidates that learn side by side.
struct Group<'a> {
    bench: &'a Bench<'a>,
    file: &'a TokenFile,
    sampler: Sampler,
    candidates: Vec<Candidate>,
    /// By candidate, the sum of the scored rows' losses before anything was learned.
    before: Vec<f64>,
    /// The same after.
    after: Vec<f64>,
}

impl<'a> Group<'a> {
    fn new(bench: &'a Bench<'a>, file: &'a TokenFile, layers: &[usize]) -> Result<Self> {
        let candidates = layers.iter().map(|&layer| Candidate::new(bench, layer)).collect::<Result<_>>()?;
        let sampler = Sampler::new(bench.config.seed, file.sequences());
        let zeros = vec![0.0; layers.len()];
        Ok(Self { bench, file, sampler, candidates, before: zeros.clone(), after: zeros })
    }

    /// Lets all candidates learn, and scores them.
    fn learn(mut self, interruption: &Interruption) -> Result<Vec<LayerScore>> {
        let RankConfig { steps, average_last, .. } = *self.bench.config;
        // Before anything is learned, on the very rows that the score will come from: what then differs is learned.
        let scored = steps - average_last + 1..=steps;
        for step in scored {
            let (parts, positions) = self.parts(step)?;
            for rows in &parts {
                interruption.check()?;
                let shared = self.shared(rows)?;
                for (index, candidate) in self.candidates.iter().enumerate() {
                    let loss = candidate.loss(&Tape::inference(), &shared, index, positions)?.tensor().item()?;
                    candidate.check(loss, "before the first update")?;
                    self.before[index] += f64::from(loss);
                }
            }
        }
        for step in 1..=steps {
            let (parts, positions) = self.parts(step)?;
            let mut sums: Vec<Option<Gradients>> = self.candidates.iter().map(|_| None).collect();
            for rows in &parts {
                interruption.check()?;
                let shared = self.shared(rows)?;
                for (index, candidate) in self.candidates.iter().enumerate() {
                    let tape = Tape::new();
                    let value = candidate.loss(&tape, &shared, index, positions)?;
                    let loss = value.tensor().item()?;
                    candidate.check(loss, &format!("update {step}"))?;
                    if step > steps - average_last {
                        self.after[index] += f64::from(loss);
                    }
                    let gradients = tape.backward(&value)?;
                    match &mut sums[index] {
                        Some(sum) => sum.merge(gradients)?,
                        empty => *empty = Some(gradients),
                    }
                }
            }
            let rate = schedule(self.bench.config).rate(step) as f32;
            for (candidate, gradients) in self.candidates.iter_mut().zip(sums) {
                candidate.update(gradients.unwrap_or_default(), rate)?;
            }
        }
        let scores = self.candidates.iter().zip(self.before.iter().zip(&self.after));
        Ok(scores
            .map(|(candidate, (before, after))| LayerScore {
                layer: candidate.layer,
                score: after / average_last as f64,
                score_at_start: Some(before / average_last as f64),
            })
            .collect())
    }

    /// The rows of an update, as they are computed together, and how many positions count in all of them.
    fn parts(&mut self, step: u64) -> Result<(Vec<Vec<Sequence>>, u64)> {
        let config = self.bench.config;
        let first = (step - 1) * config.batch_size as u64;
        let rows: Vec<Sequence> = (first..first + config.batch_size as u64)
            .map(|at| self.file.sequence(self.sampler.row(at)))
            .collect::<Result<_>>()?;
        let positions = rows.iter().map(|row| data::positions_that_count(row, PositionsThatCount::Answers)).sum();
        ensure!(positions > 0, "no position of update {step} counts: use a greater --batch-size");
        Ok((rows.chunks(config.micro_batch).map(<[Sequence]>::to_vec).collect(), positions))
    }

    /// The trunk below every candidate, and the teacher's logits.
    fn shared(&self, rows: &[Sequence]) -> Result<Shared> {
        let model = &self.bench.model;
        let batch = Batch::new(&self.bench.device, rows, PositionsThatCount::Answers)?;
        let (entering, teacher_logits) = {
            let tape = Tape::inference();
            let mut hidden = model.embedded(&tape, &batch.tokens)?;
            let mut entering = Vec::with_capacity(self.candidates.len());
            let mut below = 0;
            for candidate in &self.candidates {
                hidden = model.through(&tape, &hidden, &batch.tokens, below..candidate.layer)?;
                below = candidate.layer;
                entering.push(hidden.tensor().clone());
            }
            let logits = match &self.bench.teacher {
                Some(teacher) => teacher.logits(&tape, &batch.tokens)?,
                None => {
                    let layers = model.config.mixers.len();
                    model.logits_of(&tape, &model.through(&tape, &hidden, &batch.tokens, below..layers)?)?
                }
            };
            (entering, logits.tensor().clone())
        };
        Ok(Shared { batch, entering, teacher_logits })
    }
}

fn schedule(config: &RankConfig) -> Schedule {
    Schedule {
        base: config.learning_rate,
        minimum: config.learning_rate,
        warmup_steps: config.steps / 10,
        decay_steps: config.steps + 1,
        decay: Decay::Constant,
    }
}

impl Candidate {
    fn new(bench: &Bench<'_>, layer: usize) -> Result<Self> {
        let teacher = bench.teacher.as_ref().unwrap_or(&bench.model);
        let options = bench.config.graft_options();
        let mut model = graft(&bench.model, teacher, &[layer], &options)?;
        if bench.config.precision == PrecisionKind::Bf16 {
            model = model.into_bf16()?;
        }
        let mixer = format!("model.layers.{layer}.mixer.");
        for (_, parameter) in model.parameters.iter_mut() {
            parameter.trainable = parameter.name.starts_with(&mixer);
            if !parameter.trainable
                && let Some(id) = bench.model.parameters.find(&parameter.name)
            {
                // All candidates use the ranked model's own memory.
                parameter.value = bench.model.parameters.get(id).value.clone();
            }
        }
        let optimizer = AdamW::new(OPTIMIZER, &model.parameters);
        Ok(Self { layer, model, optimizer })
    }

    /// The share of some rows in the divergence of a whole update.
    fn loss<'a>(&'a self, tape: &Tape<'a>, shared: &'a Shared, index: usize, positions: u64) -> Result<Var> {
        let layers = self.model.config.mixers.len();
        let entering = Var::constant(&shared.entering[index]);
        let hidden = self.model.through(tape, &entering, &shared.batch.tokens, self.layer..layers)?;
        let options = DivergenceOptions {
            divergence: Divergence::ReverseKl,
            student_temperature: 1.0,
            teacher_temperature: 1.0,
            mask: Some(&shared.batch.mask),
            denominator: positions as f32,
        };
        Ok(ops::divergence(tape, &self.model.logits_of(tape, &hidden)?, &shared.teacher_logits, options)?.loss)
    }

    fn check(&self, loss: f32, when: &str) -> Result<()> {
        ensure!(
            loss.is_finite(),
            "layer {}: the divergence is {loss} at {when}: use a smaller --learning-rate",
            self.layer
        );
        Ok(())
    }

    fn update(&mut self, mut gradients: Gradients, rate: f32) -> Result<()> {
        let norm = optimizer::gradient_norm(&self.model.parameters, &gradients)?;
        ensure!(norm.is_finite(), "layer {}: a gradient is not finite: use a smaller --learning-rate", self.layer);
        optimizer::clip_gradients(&mut gradients, norm, CLIP)?;
        self.optimizer
            .update(&mut self.model.parameters, &gradients, rate)
            .with_context(|| format!("layer {}", self.layer))
    }
}
