//! A whole distillation step: teacher forward, student forward and backward, clipping, AdamW.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use autograd::ops::{self, Divergence, DivergenceOptions};
use autograd::optimizer::{AdamW, AdamWOptions, clip_gradients, gradient_norm};
use autograd::{DType, Tape};
use model::initialise::{GraftOptions, graft};
use model::{Model, Precision, TokenBatch};
use runtime::Device;

/// What is distilled.
#[derive(Clone, Debug)]
pub struct StepOptions {
    /// Folder of the teacher.
    pub teacher: PathBuf,
    /// Layers whose attention becomes a Mamba mixer.
    pub layers: Vec<usize>,
    /// Rows of the batch.
    pub batch: usize,
    /// Tokens of a row.
    pub sequence: usize,
    /// Documents that share a row.
    pub documents: usize,
    /// Element type of matrices and activations.
    pub dtype: DType,
    /// Whether layers are computed again in the reverse pass instead of kept.
    pub recompute_layers: bool,
}

/// Everything that a step needs.
pub struct Step {
    options: StepOptions,
    teacher: Model,
    student: Model,
    optimizer: AdamW,
    batch: TokenBatch,
}

impl Step {
    /// Loads the teacher and makes its hybrid; tokens mean nothing, but are as unevenly distributed as those of text.
    ///
    /// # Errors
    /// A teacher that does not load, layers that it does not have, out of memory.
    pub fn new(options: StepOptions, device: &Device) -> Result<Self> {
        ensure!(
            options.batch > 0 && options.sequence > 0,
            "a batch of no tokens: give --batch and --sequence of at least 1"
        );
        let bf16 = options.dtype == DType::Bf16;
        let precision = if bf16 { Precision::Bf16 } else { Precision::F32 };
        let teacher = Model::load(&options.teacher, device, precision)?;
        let mut student = graft(&teacher, &teacher, &options.layers, &GraftOptions { seed: 0, align: false })?;
        if bf16 {
            student = student.into_bf16()?;
        }
        student.checkpoint_layers = options.recompute_layers;
        let optimizer = AdamW::new(
            AdamWOptions { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.01 },
            &student.parameters,
        );
        let mut noise = 1_u64;
        let mut token = || {
            // Zipf's law: in text, a few tokens are most of all tokens.
            noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let uniform = (noise >> 11) as f64 / (1_u64 << 53) as f64;
            (teacher.config.vocabulary_size as f64).powf(uniform) as u32 - 1
        };
        let rows: Vec<Vec<u32>> =
            (0..options.batch).map(|_| (0..options.sequence).map(|_| token()).collect()).collect();
        let documents = options.documents.clamp(1, options.sequence);
        let mut lengths = vec![options.sequence / documents; documents];
        lengths[0] += options.sequence % documents;
        let batch = TokenBatch::new(device, &rows, Some(&vec![lengths; options.batch]))?;
        Ok(Self { options, teacher, student, optimizer, batch })
    }

    /// Tokens of one step.
    pub fn tokens(&self) -> usize {
        self.options.batch * self.options.sequence
    }

    /// One update. Waits for its loss and its gradient norm, as training does.
    ///
    /// # Errors
    /// Those of the operators; out of memory.
    pub fn run(&mut self) -> Result<f32> {
        let target = {
            let _range = runtime::range("teacher");
            self.teacher.logits(&Tape::inference(), &self.batch)?
        };
        let tape = Tape::new();
        let loss = {
            let _range = runtime::range("student");
            let logits = self.student.logits(&tape, &self.batch)?;
            let options = DivergenceOptions {
                divergence: Divergence::ReverseKl,
                student_temperature: 1.0,
                teacher_temperature: 1.0,
                mask: None,
                denominator: self.tokens() as f32,
            };
            ops::divergence(&tape, &logits, target.tensor(), options)?.loss
        };
        drop(target);
        let value = loss.item()?;
        let mut gradients = {
            let _range = runtime::range("backward");
            tape.backward(&loss)?
        };
        let _range = runtime::range("optimizer");
        let norm = gradient_norm(&self.student.parameters, &gradients)?;
        clip_gradients(&mut gradients, norm, 1.0)?;
        self.optimizer.update(&mut self.student.parameters, &gradients, 1e-5)?;
        Ok(value)
    }
}
