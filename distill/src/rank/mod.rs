//! Which layers a model can do without: the order in which attention is replaced.
//!
//! Three estimators, from dear to cheap. [`Method::Loo`], leave one out: each layer in turn becomes the identity, and a
//! metric on held-out data gets worse by the layer's score. [`Method::Mmr`], minimal-loss Mamba replacement: each
//! layer's attention alone becomes a Mamba mixer that starts from it (MIL) and learns for some steps; its score is the
//! divergence from the teacher that is left. [`Method::Mse`]: how far such a mixer's output is from the attention's
//! before it learns anything. High scores mean important layers, whatever the method.
//!
//! A ranking is a folder: `settings.json`, `layers.jsonl` (a line per layer, as soon as it is known), and at the end
//! `ranking.json` and the plots. A ranking that was interrupted or killed goes on after the last whole line and ends with
//! the same bytes.

mod examination;
mod leave_one_out;
mod mixer_error;
pub(crate) mod plot;
mod replacement;
mod store;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use model::chat::ChatTemplate;
use model::config::{MixerKind, ModelConfig};
use model::initialise::{GraftOptions, check_states};
use model::tokenizer::Tokenizer;
use model::{Model, Precision};
use runtime::Device;
use serde::{Deserialize, Serialize};

use crate::config::{Init, PrecisionKind, RunConfig, Task};
use crate::data::{self, LongDocuments, PackOptions, TokenFile};
use crate::evaluate::questions;
use crate::files;
use crate::interruption::Interruption;
use crate::train::Progress;
use crate::train::models::{encoder, model_hash, tokenizer_hash};
use examination::Examination;
use store::Store;

/// How importance is estimated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Leave one out: each layer in turn becomes the identity
    Loo,
    /// Each layer's attention alone becomes a Mamba mixer that learns for some steps
    Mmr,
    /// Error of each new mixer's output before it learns
    Mse,
}

impl Method {
    /// What it is called on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Loo => "loo",
            Self::Mmr => "mmr",
            Self::Mse => "mse",
        }
    }
}

/// What leaving a layer out makes worse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Metric {
    /// Cross-entropy on documents
    Loss,
    /// Share of multiple-choice questions answered rightly, by the choices' likelihoods
    Accuracy,
    /// Share of questions whose generated answer is exactly right
    ExactMatch,
}

/// What is ranked, and how.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RankConfig {
    /// Folder of the model whose layers are ranked: a transformer, or a hybrid between two stages.
    pub model: PathBuf,
    /// Folder of the original teacher, from whose attention new mixers start and against which they learn; the model
    /// itself when absent.
    pub teacher: Option<PathBuf>,
    /// How importance is estimated.
    pub method: Method,
    /// `loo`: what gets worse.
    pub metric: Metric,
    /// Documents, or questions for the metrics that ask.
    pub data: PathBuf,
    /// Layers to rank; all with attention when empty.
    pub layers: Vec<usize>,
    /// Rows of documents, or questions, looked at (`loo`, `mse`): the first of the data.
    pub samples: u64,
    /// Tokens of a row.
    pub sequence_length: usize,
    /// What to do with a document longer than a row.
    pub long_documents: LongDocuments,
    /// Whether the model's begin-of-sequence token is put before each text.
    pub begin_token: bool,
    /// `mmr`: updates of each new mixer.
    pub steps: u64,
    /// `mmr`: the score is the mean loss of that many last updates.
    pub average_last: u64,
    /// `mmr`: rows of one update.
    pub batch_size: usize,
    /// Rows computed at once.
    pub micro_batch: usize,
    /// `mmr`: learning rate after a warm-up of a tenth of the steps.
    pub learning_rate: f64,
    /// `mmr`: layers whose mixers learn side by side; those below them are computed once for all. More is faster and
    /// takes more memory; scores do not depend on it.
    pub together: usize,
    /// `exact-match`: longest answer, in tokens.
    pub max_tokens: usize,
    /// `mmr`, `mse`: how new mixers start.
    pub init: Init,
    /// Seed of new mixers and of the rows' order.
    pub seed: u64,
    /// Element type of matrices and activations.
    pub precision: PrecisionKind,
    /// Where it is computed.
    pub device: String,
}

impl RankConfig {
    /// What holds where nothing else is said.
    pub fn new(model: PathBuf, method: Method, data: PathBuf) -> Self {
        Self {
            model,
            teacher: None,
            method,
            metric: Metric::Loss,
            data,
            layers: Vec::new(),
            samples: 16,
            sequence_length: 512,
            long_documents: LongDocuments::Refuse,
            begin_token: false,
            steps: 100,
            average_last: 10,
            batch_size: 8,
            micro_batch: 1,
            learning_rate: 5e-4,
            together: 4,
            max_tokens: 256,
            init: RunConfig::defaults(Task::Distill).model.init,
            seed: 0,
            precision: PrecisionKind::F32,
            device: "cpu".to_owned(),
        }
    }

    /// How new mixers are made.
    fn graft_options(&self) -> GraftOptions {
        GraftOptions { seed: self.seed, start: self.init.start().unwrap_or_default() }
    }

    fn check(&self) -> Result<()> {
        ensure!(
            self.init.start().is_some(),
            "--init: random and weights are for `grafter train`; use paper, aligned, aligned_bias_once, identity_convolution \
             or whole_head"
        );
        ensure!(
            PackOptions::SEQUENCE_LENGTHS.contains(&self.sequence_length),
            "--sequence-length is {}: it must be from {} to {}",
            self.sequence_length,
            PackOptions::SEQUENCE_LENGTHS.start(),
            PackOptions::SEQUENCE_LENGTHS.end()
        );
        for (flag, value) in [
            ("--samples", self.samples),
            ("--steps", self.steps),
            ("--average-last", self.average_last),
            ("--batch-size", self.batch_size as u64),
            ("--micro-batch", self.micro_batch as u64),
            ("--together", self.together as u64),
            ("--max-tokens", self.max_tokens as u64),
        ] {
            ensure!(value >= 1, "{flag} is 0: it must be at least 1");
        }
        ensure!(
            self.average_last <= self.steps,
            "--average-last is {}, more than --steps, which is {}",
            self.average_last,
            self.steps
        );
        ensure!(
            self.learning_rate > 0.0 && self.learning_rate <= f64::from(f32::MAX),
            "--learning-rate is {}: it must be above 0",
            self.learning_rate
        );
        ensure!(
            self.metric == Metric::Loss || self.method == Method::Loo,
            "--metric is for --method loo: the other methods measure the loss"
        );
        Ok(())
    }
}

/// One layer's score. Higher: more important.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerScore {
    /// The layer, counted from 0.
    pub layer: usize,
    /// `loo`: how much worse the metric is without the layer. `mmr`: the divergence that is left. `mse`: the error of
    /// the new mixer's output, divided by the attention's output squared.
    pub score: f64,
    /// `mmr`: the same before the first update, on the same rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score_at_start: Option<f64>,
}

/// A finished ranking, as `ranking.json` has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ranking {
    /// How it was made.
    pub settings: RankConfig,
    /// SHA-256 of what it was made from, by role: models, data, tokenizer.
    pub hashes: BTreeMap<String, String>,
    /// `loo`: the metric of the whole model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub baseline: Option<f64>,
    /// A score per layer, in the layers' order.
    pub scores: Vec<LayerScore>,
    /// The layers, least important first.
    pub least_important_first: Vec<usize>,
    /// What it took.
    pub cost: Cost,
}

/// How many layers were computed, a pass of one layer over one batch each. Counts, not times: they are the same in every
/// run, interrupted or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cost {
    /// Passes when everything that layers share is computed once, as here.
    pub layer_passes: u64,
    /// Passes when every layer's score is computed on its own.
    pub naive_layer_passes: u64,
}

impl Cost {
    /// How many times fewer layers were computed than naively.
    pub fn speed_up(&self) -> f64 {
        self.naive_layer_passes as f64 / self.layer_passes.max(1) as f64
    }
}

/// What methods work with.
struct Bench<'a> {
    config: &'a RankConfig,
    device: Device,
    model: Model,
    /// `None` where the model is its own teacher.
    teacher: Option<Model>,
    /// The layers to rank, in order.
    layers: Vec<usize>,
}

/// What a method found.
struct Found {
    baseline: Option<f64>,
    scores: Vec<LayerScore>,
    cost: Cost,
}

/// Ranks layers, going on where an earlier call in the same folder was interrupted.
///
/// # Errors
/// Everything that is wrong with settings, models or data, before anything is written; settings, models or data other
/// than those that the ranking in the folder began with; an interruption; values that are not finite.
pub fn run(
    config: &RankConfig,
    folder: &Path,
    interruption: &Interruption,
    progress: &mut Progress,
) -> Result<Ranking> {
    config.check()?;
    let device: Device = config.device.parse()?;
    let layers = layers_to_rank(config)?;
    // The other methods make new mixers.
    if config.method != Method::Loo {
        check_states(&ModelConfig::read(&config.model)?, config.graft_options().start, &device)?;
    }
    let tokenizer = Tokenizer::load(&config.model)?;
    let tokenizer_hash = tokenizer_hash(&config.model)?;
    let template = ChatTemplate::load(&config.model)?;

    let mut hashes = BTreeMap::new();
    hashes.insert("model".to_owned(), model_hash(&config.model, interruption)?);
    if let Some(teacher) = &config.teacher {
        hashes.insert("teacher".to_owned(), model_hash(teacher, interruption)?);
    }
    hashes.insert("tokenizer".to_owned(), tokenizer_hash.clone());
    hashes.insert("data".to_owned(), files::hash_file(&config.data, interruption)?);
    let mut store = Store::open(folder, config, &hashes)?;
    if let Some(ranking) = store.finished()? {
        progress.say(&format!("the ranking in {} is finished", folder.display()));
        return Ok(ranking);
    }

    let model = load(&config.model, &device, config.precision, Precision::F32)?;
    let teacher = match &config.teacher {
        Some(folder) => Some(load(folder, &device, config.precision, Precision::AsStored)?),
        None => None,
    };
    let encoder = encoder(
        &model.config,
        &tokenizer,
        &tokenizer_hash,
        template.as_ref(),
        config.begin_token,
        !model.config.eos_tokens.is_empty(),
    )?;
    let documents = |progress: &mut Progress| -> Result<TokenFile> {
        let options = PackOptions { sequence_length: config.sequence_length, long_documents: config.long_documents };
        let cache = store::packed_data(folder)?;
        let will_pack = || progress.say(&format!("packing {}", config.data.display()));
        data::prepare(&config.data, &cache, &encoder, options, interruption, will_pack)
    };
    let bench = Bench { config, device, model, teacher, layers };
    let found = match config.method {
        Method::Loo => {
            let examination = match config.metric {
                Metric::Loss => Examination::loss(&documents(progress)?, config, &bench.device)?,
                Metric::Accuracy => {
                    let questions =
                        questions::multiple_choice(&config.data, config.samples, questions::PROMPT, &tokenizer)?;
                    Examination::accuracy(&questions, config, &bench.device)?
                }
                Metric::ExactMatch => {
                    let template = template.as_ref();
                    let questions =
                        questions::to_answer(&config.data, config.samples, questions::PROMPT, &tokenizer, template)?;
                    Examination::exact_match(questions, &tokenizer)
                }
            };
            leave_one_out::rank(&bench, &examination, &mut store, interruption, progress)?
        }
        Method::Mmr => replacement::rank(&bench, &documents(progress)?, &mut store, interruption, progress)?,
        Method::Mse => mixer_error::rank(&bench, &documents(progress)?, interruption)?,
    };
    let ranking = Ranking {
        settings: config.clone(),
        hashes,
        baseline: found.baseline,
        least_important_first: least_important_first(&found.scores),
        scores: found.scores,
        cost: found.cost,
    };
    store.finish(&ranking)?;
    Ok(ranking)
}

/// The ranking that `folder` holds.
///
/// # Errors
/// When there is none, or it is not finished.
pub fn read(folder: &Path) -> Result<Ranking> {
    files::read_json(&folder.join(store::RANKING))?
        .with_context(|| format!("{} holds no finished ranking: it has no {}", folder.display(), store::RANKING))
}

/// Layers by rising score; of equal ones the later layer first, since early layers are the ones others build on.
fn least_important_first(scores: &[LayerScore]) -> Vec<usize> {
    let mut order: Vec<&LayerScore> = scores.iter().collect();
    order.sort_by(|a, b| a.score.total_cmp(&b.score).then(b.layer.cmp(&a.layer)));
    order.into_iter().map(|score| score.layer).collect()
}

fn layers_to_rank(config: &RankConfig) -> Result<Vec<usize>> {
    let model = ModelConfig::read(&config.model)?;
    if config.layers.is_empty() {
        let attention = |layer: &usize| model.mixers[*layer] == MixerKind::Attention;
        let layers: Vec<usize> = (0..model.mixers.len()).filter(attention).collect();
        ensure!(!layers.is_empty(), "{} has no layer with attention left to rank", config.model.display());
        return Ok(layers);
    }
    let mut layers = config.layers.clone();
    layers.sort_unstable();
    layers.dedup();
    for &layer in &layers {
        match model.mixers.get(layer) {
            Some(MixerKind::Attention) => {}
            Some(kind) => bail!("layer {layer} has no attention to rank (it is {kind:?})"),
            None => bail!("layer {layer} does not exist: the model has layers 0 to {}", model.mixers.len() - 1),
        }
    }
    Ok(layers)
}

/// `wide` is what weights are kept in where computing is in f32: a mixer learns on top of them, or they are only read.
fn load(folder: &Path, device: &Device, precision: PrecisionKind, wide: Precision) -> Result<Model> {
    let precision = match precision {
        PrecisionKind::F32 => wide,
        PrecisionKind::Bf16 => Precision::Bf16,
    };
    Model::load(folder, device, precision).with_context(|| format!("loading {}", folder.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_important_comes_first_and_of_equals_the_later() {
        let score = |layer: usize, score: f64| LayerScore { layer, score, score_at_start: None };
        let scores = [score(0, 2.0), score(1, -0.5), score(2, 0.25), score(3, 0.25)];
        assert_eq!(least_important_first(&scores), [1, 3, 2, 0]);
    }

    #[test]
    fn settings_out_of_range_are_named() {
        let good = RankConfig::new("m".into(), Method::Mmr, "d".into());
        good.check().unwrap();
        let message = |change: &dyn Fn(&mut RankConfig)| {
            let mut config = good.clone();
            change(&mut config);
            config.check().unwrap_err().to_string()
        };
        assert!(message(&|config| config.steps = 3).contains("--average-last is 10, more than --steps, which is 3"));
        assert!(message(&|config| config.together = 0).contains("--together is 0"));
        assert!(message(&|config| config.learning_rate = f64::NAN).contains("--learning-rate is NaN"));
        assert!(message(&|config| config.metric = Metric::Accuracy).contains("--metric is for --method loo"));
        assert!(message(&|config| config.sequence_length = 1).contains("--sequence-length is 1"));
    }
}
