//! Per-mixer output matching: every Mamba mixer of the student is fed what enters the same layer of the teacher, and its
//! output is held against that of the teacher's mixer there. So all mixers learn side by side, each from inputs that no
//! other one has spoilt.
//!
//! The loss of a position is the Euclidean norm of the difference, as in Fast-LLM's activation distillation; the mean is
//! over positions that count and over mixers.

use anyhow::{Result, ensure};
use autograd::ops;
use autograd::{DType, Tape, Tensor, Var};
use model::Model;
use model::config::MixerKind;

use crate::data::Batch;

/// Keeps the direction of no difference at all a number.
const LEAST_SQUARE: f32 = 1e-20;

/// What enters the teacher's layers where the student has Mamba mixers.
pub(super) struct Inputs {
    /// By layer.
    entering: Vec<(usize, Tensor)>,
}

impl Inputs {
    /// Runs the teacher: its states before the head, and what the student's mixers are to be fed.
    ///
    /// # Errors
    /// Those of the model; a student without Mamba mixers.
    pub fn of(teacher: &Model, student: &Model, batch: &Batch) -> Result<(Tensor, Self)> {
        let tape = Tape::inference();
        let mamba = |layer: usize| student.config.mixers.get(layer) == Some(&MixerKind::Mamba);
        let mut entering = Vec::new();
        if mamba(0) {
            entering.push((0, teacher.embedded(&tape, &batch.tokens)?.tensor().clone()));
        }
        let hidden = teacher.hidden_observed(&tape, &batch.tokens, |layer, after| {
            if mamba(layer + 1) {
                entering.push((layer + 1, after.tensor().clone()));
            }
        })?;
        ensure!(
            !entering.is_empty(),
            "loss.mixer_matching_weight is above 0, but the model has no Mamba mixer to match"
        );
        Ok((hidden.tensor().clone(), Self { entering }))
    }

    /// The share of these rows in the loss of a whole batch, in which `positions` positions count; a scalar f32.
    ///
    /// # Errors
    /// Those of the models.
    pub fn loss(
        &self,
        tape: &Tape<'_>,
        student: &Model,
        teacher: &Model,
        batch: &Batch,
        positions: u64,
    ) -> Result<Option<Var>> {
        let width = student.config.hidden_size;
        let inference = Tape::inference();
        let device = batch.counts.device();
        // The row of a position that counts is 1, that of another is 0.
        let rows = [vec![0.0f32; width], vec![1.0; width]].concat();
        let rows = Var::constant(&Tensor::from_slice(device, &[2, width], &rows)?);
        let ones = Var::constant(&Tensor::filled(device, &[width], DType::F32, 1.0)?);
        let mask = ops::embedding(&inference, &batch.counts, &rows, student.activations)?;
        let mut total: Option<Var> = None;
        for (layer, entering) in &self.entering {
            let input = Var::constant(entering);
            let Some(target) = teacher.mixer_output(&inference, *layer, &input, &batch.tokens)? else { continue };
            let Some(found) = student.mixer_output(tape, *layer, &input, &batch.tokens)? else { continue };
            let difference = ops::sub(tape, &found, &target)?;
            // The gradient of a norm is the difference's direction, and the norm is their product: with the direction as
            // a constant, value and gradient are both right.
            let constant = Var::constant(difference.tensor());
            let direction = ops::rms_norm(&inference, &constant, &ones, LEAST_SQUARE)?;
            let direction = ops::mul(&inference, &direction, &mask)?;
            let norms = ops::sum(tape, &ops::mul(tape, &difference, &direction)?)?;
            total = Some(match total {
                Some(total) => ops::add(tape, &total, &norms)?,
                None => norms,
            });
        }
        let share = (positions as f64 * self.entering.len() as f64 * (width as f64).sqrt()).recip();
        total.map(|total| Ok(ops::scale(tape, &total, share as f32)?)).transpose()
    }
}

#[cfg(test)]
mod tests {
    use model::config::ModelConfig;
    use model::initialise::{GraftOptions, Start, graft};
    use runtime::Device;

    use super::*;
    use crate::data::{PositionsThatCount, Sequence};

    fn models() -> (Model, Model) {
        let source = serde_json::json!({
            "model_type": "llama", "hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 2,
            "num_key_value_heads": 1, "num_hidden_layers": 3, "vocab_size": 11, "initializer_range": 0.3,
        });
        let config = ModelConfig::from_json(source.as_object().unwrap()).unwrap();
        let teacher = Model::random(config, 3, &Device::cpu()).unwrap();
        let student = graft(&teacher, &teacher, &[0, 2], &GraftOptions { seed: 1, start: Start::Paper }).unwrap();
        (student, teacher)
    }

    fn batch() -> Batch {
        let sequence = Sequence {
            tokens: vec![1, 2, 3, 4, 5, 6],
            answers: vec![false, true, true, false, true, true],
            padding: vec![false; 6],
            document_lengths: vec![3, 3],
        };
        Batch::new(&Device::cpu(), &[sequence], PositionsThatCount::Answers).unwrap()
    }

    fn loss(student: &Model, teacher: &Model) -> f32 {
        let batch = batch();
        let (_, inputs) = Inputs::of(teacher, student, &batch).unwrap();
        inputs.loss(&Tape::inference(), student, teacher, &batch, 4).unwrap().unwrap().tensor().item().unwrap()
    }

    #[test]
    fn it_is_the_mean_norm_of_the_differences_at_the_positions_that_count() {
        let (student, teacher) = models();
        let batch = batch();
        let tape = Tape::inference();
        let mut stream = teacher.embedded(&tape, &batch.tokens).unwrap();
        let mut sum = 0.0;
        for layer in 0..3 {
            if layer != 1 {
                let output = |model: &Model| {
                    let output = model.mixer_output(&tape, layer, &stream, &batch.tokens).unwrap().unwrap();
                    output.tensor().to_vec::<f32>().unwrap()
                };
                let (found, target) = (output(&student), output(&teacher));
                // Positions 0, 1, 3 and 4 predict an answer.
                for position in [0, 1, 3, 4] {
                    let place = position * 32..(position + 1) * 32;
                    let square: f64 =
                        found[place.clone()].iter().zip(&target[place]).map(|(a, b)| f64::from(a - b).powi(2)).sum();
                    sum += square.sqrt();
                }
            }
            stream = teacher.through(&tape, &stream, &batch.tokens, layer..layer + 1).unwrap();
        }
        let expected = sum / 8.0;
        let found = f64::from(loss(&student, &teacher));
        assert!((found - expected).abs() <= 1e-5 * expected, "{found} instead of {expected}");
    }

    #[test]
    fn its_gradient_is_that_of_finite_differences() {
        let (mut student, teacher) = models();
        let batch = batch();
        let id = student.parameters.find("model.layers.2.mixer.out_proj.weight").unwrap();
        let gradient = {
            let (_, inputs) = Inputs::of(&teacher, &student, &batch).unwrap();
            let tape = Tape::new();
            let loss = inputs.loss(&tape, &student, &teacher, &batch, 4).unwrap().unwrap();
            let gradients = tape.backward(&loss).unwrap();
            gradients.get(&student.parameters.get(id).value).unwrap().to_vec::<f32>().unwrap()
        };
        let values = student.parameters.get(id).value.to_vec::<f32>().unwrap();
        let shape = student.parameters.get(id).value.shape().to_vec();
        let mut at = |place: usize, change: f32| {
            let mut moved = values.clone();
            moved[place] += change;
            student.parameters.set(id, Tensor::from_slice(&Device::cpu(), &shape, &moved).unwrap()).unwrap();
            f64::from(loss(&student, &teacher))
        };
        let greatest = gradient.iter().map(|value| value.abs()).fold(0.0, f32::max);
        for place in [0, 17, 333, 1000] {
            let step = 2e-2;
            let slope = (at(place, step) - at(place, -step)) / (2.0 * f64::from(step));
            let error = (slope - f64::from(gradient[place])).abs();
            // Two f32 losses near 1 differ in their last bits: about 1e-7 / 4e-2.
            assert!(error <= 1e-2 * f64::from(greatest) + 1e-5, "{place}: {slope} and {}", gradient[place]);
        }
    }
}
