//! A whole distillation step: teacher forward, student forward and backward, clipping, AdamW.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use autograd::ops::{self, Divergence, DivergenceOptions, HeadTeacher, TeacherSource};
use autograd::optimizer::{AdamW, AdamWOptions, clip_factor, gradient_norm};
use autograd::{DType, Gradients, Tape, Tensor};
use model::initialise::{GraftOptions, Start, graft};
use model::{Model, Precision, TokenBatch};
use runtime::cuda::Graph;
use runtime::{Device, LaunchRecord};

use super::lines::zipf;

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
    captured: Option<Captured>,
}

/// The launches up to the gradients, with what they leave.
struct Captured {
    graph: Graph,
    gradients: Gradients,
    loss: Tensor,
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
        let mut student = graft(&teacher, &teacher, &options.layers, &GraftOptions { seed: 0, start: Start::Paper })?;
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
            noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            zipf((noise >> 11) as f64 / (1_u64 << 53) as f64, teacher.config.vocabulary_size)
        };
        let rows: Vec<Vec<u32>> =
            (0..options.batch).map(|_| (0..options.sequence).map(|_| token()).collect()).collect();
        let lengths = document_lengths(options.sequence, options.documents);
        let batch = TokenBatch::new(device, &rows, Some(&vec![lengths; options.batch]))?;
        Ok(Self { options, teacher, student, optimizer, batch, captured: None })
    }

    /// Tokens of one step.
    pub fn tokens(&self) -> usize {
        self.options.batch * self.options.sequence
    }

    /// The part of the causal triangle that the documents of a row leave: a kernel's description knows how long rows are, but
    /// not where documents begin.
    pub fn visible_part(&self) -> f64 {
        let pairs = |length: usize| length as f64 * (length as f64 + 1.0);
        let documents = document_lengths(self.options.sequence, self.options.documents);
        documents.into_iter().map(pairs).sum::<f64>() / pairs(self.options.sequence)
    }

    /// Counts, of the operations of attention, those that the documents leave.
    pub fn count_visible(&self, launches: &mut [LaunchRecord]) {
        count_visible(launches, self.visible_part());
    }

    /// One update, as `grafter distill` makes it: the head and the divergence together, and one wait of the host, for the
    /// gradients' norm.
    ///
    /// # Errors
    /// Those of the operators; out of memory.
    pub fn run(&mut self) -> Result<f32> {
        let (gradients, loss) = match &self.captured {
            Some(captured) => {
                captured.graph.replay()?;
                (captured.gradients.clone(), captured.loss.clone())
            }
            None => self.gradients()?,
        };
        let _range = runtime::range("optimizer");
        let norm = gradient_norm(&self.student.parameters, &gradients)?;
        self.optimizer.update_scaled(&mut self.student.parameters, &gradients, 1e-5, clip_factor(norm, 1.0))?;
        Ok(loss.item()?)
    }

    /// Captures what leads to the gradients: later updates replay it, as those of `grafter distill` do. To be called after
    /// an update, and on a GPU.
    ///
    /// # Errors
    /// As [`Step::run`]; driver errors.
    pub fn capture(&mut self) -> Result<()> {
        let device = self.student.device().clone();
        let (graph, (gradients, loss)) = device.capture(|| self.gradients())?;
        self.captured = Some(Captured { graph, gradients, loss });
        Ok(())
    }

    fn gradients(&self) -> Result<(Gradients, Tensor)> {
        let inference = Tape::inference();
        let target = {
            let _range = runtime::range("teacher");
            self.teacher.hidden(&inference, &self.batch)?
        };
        let target_head = self.teacher.head_weight(&inference);
        let tape = Tape::new();
        let loss = {
            let _range = runtime::range("student");
            let hidden = self.student.hidden(&tape, &self.batch)?;
            let options = DivergenceOptions {
                divergence: Divergence::ReverseKl,
                student_temperature: 1.0,
                teacher_temperature: 1.0,
                mask: None,
                denominator: self.tokens() as f32,
            };
            let teacher = HeadTeacher {
                source: TeacherSource::Head { hidden: target.tensor(), head: target_head.tensor() },
                options,
                weight: 1.0,
            };
            let _range = runtime::range("head and losses");
            ops::head_loss(&tape, &hidden, &self.student.head_weight(&tape), Some(teacher), None)?.loss
        };
        drop(target);
        let value = loss.tensor().clone();
        let _range = runtime::range("backward");
        Ok((tape.backward(&loss)?, value))
    }
}

/// The lengths of the documents of a row: equal, but that the first takes what is left over.
fn document_lengths(sequence: usize, documents: usize) -> Vec<usize> {
    let documents = documents.clamp(1, sequence);
    let mut lengths = vec![sequence / documents; documents];
    lengths[0] += sequence % documents;
    lengths
}

/// The kernels of attention whose operations are products over pairs of tokens; the others go over tokens.
fn goes_over_pairs(kernel: &str) -> bool {
    kernel.starts_with("attention_")
        && ["_forward", "_query_gradient", "_key_gradients"].iter().any(|part| kernel.contains(part))
}

fn count_visible(launches: &mut [LaunchRecord], part: f64) {
    for launch in launches.iter_mut().filter(|launch| goes_over_pairs(&launch.kernel)) {
        if let Some(work) = &mut launch.work {
            work.operations = (work.operations as f64 * part).round() as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use kernels_ptx::Work;

    use super::*;

    #[test]
    fn only_pairs_within_a_document_are_counted() {
        assert_eq!(document_lengths(2048, 3), [684, 682, 682]);
        assert_eq!(document_lengths(2, 5), [1, 1]);
        // Of a row of 4 tokens in two documents, 2 × 3 of 10 pairs are left.
        let launch = |kernel: &str| LaunchRecord {
            kernel: kernel.into(),
            grid: [1; 3],
            block: [32, 1, 1],
            start: Duration::ZERO,
            duration: Duration::from_micros(1),
            work: Some(Work { bytes: 7, operations: 1000 }),
            ranges: Vec::new(),
        };
        let mut launches =
            ["attention_forward_64", "attention_key_gradients_64", "attention_delta_bf16", "matrix_product_nn"]
                .map(launch);
        count_visible(&mut launches, 0.6);
        assert_eq!(launches.each_ref().map(|launch| launch.work.unwrap().operations), [600, 600, 1000, 1000]);
        assert!(launches.iter().all(|launch| launch.work.unwrap().bytes == 7));
    }
}
