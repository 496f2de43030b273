//! What a run does: a TOML file, flags, and defaults, resolved into one [`RunConfig`].
//!
//! Defaults depend on the task; the file overrides them, flags override the file. Unknown keys are refused, naming the
//! nearest known one. The resolved configuration is written into the run's folder, and a run that is continued must have
//! the same one.

mod check;
mod resolve;

use std::path::PathBuf;

use autograd::ops::Divergence;
use autograd::optimizer::{AdamWOptions, Decay, Schedule};
use clap::ValueEnum;
use model::initialise::Start;
use serde::{Deserialize, Serialize};

pub use resolve::{Override, differences, read, resolve, to_toml};

use crate::data::{LongDocuments, PositionsThatCount};
use crate::rank::{Method, Metric};

/// Fewer losses say little about what is usual.
pub const LEAST_SPIKE_WINDOW: usize = 16;

/// What a run does with its model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// Distils a teacher into a hybrid of it.
    Distill,
    /// Trains a model on the data alone.
    Train,
}

/// A run, resolved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// What is done; set by the command.
    pub task: Task,
    /// Where it is computed: `cpu`, `cuda:N`, `sim` or `auto`.
    pub device: String,
    /// The models.
    pub model: ModelSection,
    /// The documents.
    pub data: DataSection,
    /// Steps, batches and the optimizer.
    pub training: TrainingSection,
    /// What is minimised.
    pub loss: LossSection,
    /// `distill`: how layers are replaced one group after the other.
    pub stages: StagesSection,
    /// When the run is saved. The only section that may change when a run is continued.
    pub checkpoint: CheckpointSection,
    /// When the validation data is looked at.
    pub evaluation: EvaluationSection,
}

/// How the trained model begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Init {
    /// `distill`: new mixers start from the teacher's attention as published (Mamba in the Llama).
    #[serde(alias = "mil")]
    Paper,
    /// `distill`: the same with every query chunk meeting its own keys.
    Aligned,
    /// `distill`: the same with steps as long as they were meant to be, although dt_proj's bias enters twice.
    AlignedBiasOnce,
    /// `distill`: the same with a convolution that begins by passing the current token on.
    IdentityConvolution,
    /// `distill`: the same with a state as wide as a head.
    WholeHead,
    /// `train`: random weights for the configuration in `source`.
    Random,
    /// `train`: the weights in `source`.
    Weights,
}

impl Init {
    /// What new mixers start as; `None` for those of `train`, which has none.
    pub fn start(self) -> Option<Start> {
        Some(match self {
            Self::Paper => Start::Paper,
            Self::Aligned => Start::Aligned,
            Self::AlignedBiasOnce => Start::AlignedBiasOnce,
            Self::IdentityConvolution => Start::IdentityConvolution,
            Self::WholeHead => Start::WholeHead,
            Self::Random | Self::Weights => return None,
        })
    }
}

/// Section `[model]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSection {
    /// `distill`: folder of the model to learn from.
    pub teacher: Option<PathBuf>,
    /// `distill`: folder of a hybrid from an earlier run to go on from; the teacher itself when absent.
    pub student: Option<PathBuf>,
    /// `train`: folder with the configuration and tokenizer (and the weights, where `init` asks for them).
    pub source: Option<PathBuf>,
    /// `distill`: layers, counted from 0, whose attention is replaced.
    pub layers: Vec<usize>,
    /// How the trained model begins.
    pub init: Init,
    /// Whether layers are computed again in the reverse pass instead of kept: less memory, about a third more time.
    pub recompute_layers: bool,
}

/// Section `[data]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSection {
    /// Training documents: jsonl, or a token file of `grafter data pack`.
    pub train: Option<PathBuf>,
    /// Validation documents, of either kind.
    pub validation: Option<PathBuf>,
    /// `distill`: what the teacher says of the training rows, by `grafter teach`; it is then not asked.
    pub train_targets: Option<PathBuf>,
    /// `distill`: the same of the validation rows.
    pub validation_targets: Option<PathBuf>,
    /// Tokens of a row.
    pub sequence_length: usize,
    /// What to do with a document longer than a row.
    pub long_documents: LongDocuments,
    /// Whether the model's begin-of-sequence token is put before each text.
    pub begin_token: bool,
    /// Whether the model's end-of-sequence token is put after each text.
    pub end_token: bool,
}

/// Which parameters are trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trainable {
    /// All of them.
    All,
    /// Those of the Mamba mixers.
    Mixers,
}

/// In which element type models compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum PrecisionKind {
    /// Matrices and activations in f32.
    F32,
    /// Matrices and activations in bf16, sums in f32; the optimizer keeps f32 weights.
    Bf16,
}

/// How the learning rate falls after warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecayKind {
    /// Not at all.
    Constant,
    /// In a straight line.
    Linear,
    /// Along half a cosine.
    Cosine,
}

/// Section `[training]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainingSection {
    /// Updates in all.
    pub steps: u64,
    /// Rows of one update.
    pub batch_size: usize,
    /// Rows that are computed at once; less takes less memory and gives the same gradients up to rounding.
    pub micro_batch: usize,
    /// On a GPU: whether the launches of an update are captured once and then replayed together, where a batch is one
    /// micro-batch. The same numbers either way, sooner.
    pub graphs: bool,
    /// Element type of matrices and activations.
    pub precision: PrecisionKind,
    /// The rate at the end of the warm-up.
    pub learning_rate: f64,
    /// The rate at the end of the decay.
    pub minimum_learning_rate: f64,
    /// By how much the rates of Mamba mixers are multiplied, as they are further from their goal than what the teacher gave. 4
    /// for distillation, 1 with `init = "paper"`, with `trainable = "mixers"` and in other tasks, unless it is set.
    /// 1 is not written, as earlier versions had no such key: their runs can be continued.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub mixer_rate: f64,
    /// Steps of linear warm-up.
    pub warmup_steps: u64,
    /// How the rate falls after warm-up.
    pub decay: DecayKind,
    /// The step at which the rate reaches its minimum; the one after the last when absent.
    pub decay_steps: Option<u64>,
    /// Which parameters are trained.
    pub trainable: Trainable,
    /// Greatest norm of all gradients together; 0: no limit.
    pub gradient_clip: f64,
    /// Decoupled weight decay; norms, biases, `A_log` and `D` are never decayed.
    pub weight_decay: f64,
    /// Decay of AdamW's first moment.
    pub beta1: f64,
    /// Decay of AdamW's second moment.
    pub beta2: f64,
    /// AdamW's epsilon.
    pub epsilon: f64,
    /// A batch whose loss lies so many standard deviations above the mean of those before it changes nothing: it is
    /// counted, and passed over. 0: none is.
    pub spike_threshold: f64,
    /// How many losses before it a batch is held against; at least 16 must be there.
    pub spike_window: usize,
    /// Seed of everything random: new weights and the order of rows.
    pub seed: u64,
}

fn one() -> f64 {
    1.0
}

fn is_one(value: &f64) -> bool {
    *value == 1.0
}

/// Which divergence of student `q` from teacher `p`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DivergenceKind {
    /// `Σ q (ln q - ln p)`.
    ReverseKl,
    /// `Σ p (ln p - ln q)`.
    ForwardKl,
    /// `½ KL(q ‖ m) + ½ KL(p ‖ m)`, `m = (q + p) / 2`.
    JensenShannon,
    /// `-Σ p ln q`.
    SoftCrossEntropy,
}

/// Section `[loss]`: `divergence_weight · divergence + cross_entropy_weight · cross-entropy`, and what else has a weight,
/// averaged over the positions of the whole batch that count.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossSection {
    /// `distill`: which divergence.
    pub divergence: DivergenceKind,
    /// `distill`: divides the logits.
    pub temperature: f64,
    /// Whether the temperature divides the teacher's logits alone (as Fast-LLM does) or both (equation 5).
    pub temperature_on_teacher_only: bool,
    /// Weight of the divergence; 0 for `train`.
    pub divergence_weight: f64,
    /// Weight of the cross-entropy against the data.
    pub cross_entropy_weight: f64,
    /// `distill`: weight of the forward KL divergence, beside the one above.
    pub forward_kl_weight: f64,
    /// `distill`: weight of the Jensen-Shannon divergence, beside the one above.
    pub jensen_shannon_weight: f64,
    /// `distill`: weight of the mean norm of the differences between the outputs of the student's Mamba mixers and of the
    /// teacher's mixers, all fed what enters the teacher's.
    pub mixer_matching_weight: f64,
    /// `distill`: for how many updates, from the first; 0: for all.
    pub mixer_matching_steps: u64,
    /// Which positions count.
    pub mask: PositionsThatCount,
}

/// How many layers a stage ends with, or which.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum StageTarget {
    /// So many Mamba layers in all, the new ones picked by a ranking.
    Count(usize),
    /// These layers, those of earlier stages among them.
    Layers(Vec<usize>),
}

/// Section `[stages]`. Lists with an entry per stage may be shorter than the schedule: the last entry holds for the rest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StagesSection {
    /// What each stage ends with, as in `[25, 27, 30]`; empty: one stage, with `model.layers`.
    pub schedule: Vec<StageTarget>,
    /// By stage: how layers are ranked before it.
    pub rank: Vec<Method>,
    /// What leaving a layer out makes worse.
    pub rank_metric: Metric,
    /// Data to rank with; where absent the validation data for `loo` and `mse` (training data where there are none), and
    /// the training data for `mmr`.
    pub rank_data: Option<PathBuf>,
    /// `loo`, `mse`: rows or questions looked at.
    pub rank_samples: u64,
    /// `mmr`: updates of each new mixer.
    pub rank_steps: u64,
    /// `mmr`: learning rate of the new mixers.
    pub rank_learning_rate: f64,
    /// By stage: updates; `training.steps` when empty.
    pub steps: Vec<u64>,
    /// By stage: the rate at the end of the warm-up; `training.learning_rate` when empty.
    pub learning_rates: Vec<f64>,
}

/// Section `[checkpoint]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointSection {
    /// Steps from one checkpoint to the next; 0: only at the end and when interrupted.
    pub every: u64,
    /// How many are kept.
    pub keep: usize,
}

/// Section `[evaluation]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvaluationSection {
    /// Steps from one look at the validation data to the next, beside one before the first and one after the last
    /// step; 0: only those two.
    pub every: u64,
    /// Rows looked at, the first of the validation data.
    pub sequences: u64,
}

impl RunConfig {
    /// What holds where nothing else is said.
    pub fn defaults(task: Task) -> Self {
        let distill = task == Task::Distill;
        Self {
            task,
            device: "cpu".to_owned(),
            model: ModelSection {
                teacher: None,
                student: None,
                source: None,
                layers: Vec::new(),
                init: if distill { Init::IdentityConvolution } else { Init::Random },
                recompute_layers: false,
            },
            data: DataSection {
                train: None,
                validation: None,
                train_targets: None,
                validation_targets: None,
                sequence_length: 512,
                long_documents: LongDocuments::Refuse,
                begin_token: false,
                end_token: true,
            },
            training: TrainingSection {
                steps: 0,
                batch_size: 8,
                micro_batch: 1,
                graphs: true,
                precision: PrecisionKind::F32,
                learning_rate: if distill { 5e-5 } else { 1e-3 },
                minimum_learning_rate: 0.0,
                mixer_rate: if distill { 4.0 } else { 1.0 },
                warmup_steps: 0,
                decay: DecayKind::Linear,
                decay_steps: None,
                trainable: Trainable::All,
                gradient_clip: 1.0,
                weight_decay: 0.01,
                beta1: 0.9,
                beta2: 0.95,
                epsilon: 1e-8,
                spike_threshold: 0.0,
                spike_window: 128,
                seed: 0,
            },
            loss: LossSection {
                divergence: DivergenceKind::ReverseKl,
                temperature: 1.0,
                temperature_on_teacher_only: false,
                divergence_weight: if distill { 1.0 } else { 0.0 },
                cross_entropy_weight: if distill { 0.0 } else { 1.0 },
                forward_kl_weight: 0.0,
                jensen_shannon_weight: 0.0,
                mixer_matching_weight: 0.0,
                mixer_matching_steps: 0,
                mask: PositionsThatCount::Answers,
            },
            stages: StagesSection {
                schedule: Vec::new(),
                rank: vec![Method::Loo, Method::Mmr],
                rank_metric: Metric::Loss,
                rank_data: None,
                rank_samples: 16,
                rank_steps: 100,
                rank_learning_rate: 5e-4,
                steps: Vec::new(),
                learning_rates: Vec::new(),
            },
            checkpoint: CheckpointSection { every: 100, keep: 2 },
            evaluation: EvaluationSection { every: 100, sequences: 16 },
        }
    }
}

impl RunConfig {
    /// Whether the teacher must be asked: for training, or for validation.
    pub fn asks_teacher(&self) -> bool {
        let data = &self.data;
        data.train_targets.is_none() || (data.validation.is_some() && data.validation_targets.is_none())
    }
}

impl LossSection {
    /// The weights of everything that looks at a teacher, by key.
    pub fn teacher_weights(&self) -> [(&'static str, f64); 4] {
        [
            ("loss.divergence_weight", self.divergence_weight),
            ("loss.forward_kl_weight", self.forward_kl_weight),
            ("loss.jensen_shannon_weight", self.jensen_shannon_weight),
            ("loss.mixer_matching_weight", self.mixer_matching_weight),
        ]
    }
}

impl StagesSection {
    /// An entry of a list with one per stage, whose last one holds for the rest; stages are counted from 0.
    pub fn entry<T: Copy>(list: &[T], stage: usize) -> Option<T> {
        list.get(stage).or(list.last()).copied()
    }
}

impl TrainingSection {
    /// The learning rate's course.
    pub fn schedule(&self) -> Schedule {
        Schedule {
            base: self.learning_rate,
            minimum: self.minimum_learning_rate,
            warmup_steps: self.warmup_steps,
            decay_steps: self.decay_steps.unwrap_or(self.steps + 1),
            decay: match self.decay {
                DecayKind::Constant => Decay::Constant,
                DecayKind::Linear => Decay::Linear,
                DecayKind::Cosine => Decay::Cosine,
            },
        }
    }

    /// The optimizer's constants.
    pub fn optimizer(&self) -> AdamWOptions {
        AdamWOptions { beta1: self.beta1, beta2: self.beta2, epsilon: self.epsilon, weight_decay: self.weight_decay }
    }
}

impl From<DivergenceKind> for Divergence {
    fn from(kind: DivergenceKind) -> Self {
        match kind {
            DivergenceKind::ReverseKl => Self::ReverseKl,
            DivergenceKind::ForwardKl => Self::ForwardKl,
            DivergenceKind::JensenShannon => Self::JensenShannon,
            DivergenceKind::SoftCrossEntropy => Self::SoftCrossEntropy,
        }
    }
}
