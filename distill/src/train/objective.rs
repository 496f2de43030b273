//! What a run minimises, and the search for the first tensor that is not finite.

use anyhow::{Result, bail};
use autograd::ops::{self, Divergence, DivergenceOptions, HeadLabels, HeadTeacher, TeacherSource};
use autograd::{DType, Gradients, Parameters, Tape, Tensor, Var};
use model::Model;

use super::matching;
use crate::config::LossSection;
use crate::data::{Batch, PositionsThatCount};

/// `divergence_weight · divergence + cross_entropy_weight · cross-entropy`, and what else has a weight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Objective {
    divergence: Divergence,
    student_temperature: f32,
    teacher_temperature: f32,
    divergence_weight: f64,
    cross_entropy_weight: f64,
    /// Divergences beside the first, with their weights.
    further: [(Divergence, f64); 2],
    matching_weight: f64,
    /// The last update with matching; 0: all have it.
    matching_steps: u64,
    pub positions: PositionsThatCount,
}

/// A loss and what it was made of, in nats per position.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Loss {
    pub total: f64,
    pub divergence: Option<f64>,
    pub cross_entropy: Option<f64>,
}

/// A loss that was computed but not yet read: the host has not waited for the device.
#[derive(Clone)]
pub(super) struct Unread {
    total: Tensor,
    divergence: Option<Tensor>,
    cross_entropy: Option<Tensor>,
}

impl Loss {
    /// Reads losses, and another number, if there is one: the host waits once.
    ///
    /// # Errors
    /// Driver errors.
    pub fn read(losses: &[Unread], other: Option<&Tensor>) -> Result<(Vec<Self>, Option<f64>)> {
        let mut tensors = Vec::new();
        for loss in losses {
            tensors.push(&loss.total);
            tensors.extend(loss.divergence.iter().chain(&loss.cross_entropy));
        }
        tensors.extend(other);
        let Some(first) = tensors.first() else { return Ok((Vec::new(), None)) };
        let values = ops::stack(first.device(), &tensors)?.to_vec::<f32>()?;
        let mut values = values.into_iter().map(f64::from);
        let losses = losses
            .iter()
            .map(|loss| Self {
                total: values.next().unwrap_or(f64::NAN),
                divergence: loss.divergence.as_ref().and_then(|_| values.next()),
                cross_entropy: loss.cross_entropy.as_ref().and_then(|_| values.next()),
            })
            .collect();
        Ok((losses, values.next()))
    }

    /// Every part of it multiplied by `factor`.
    pub fn scaled(self, factor: f64) -> Self {
        Self {
            total: self.total * factor,
            divergence: self.divergence.map(|part| part * factor),
            cross_entropy: self.cross_entropy.map(|part| part * factor),
        }
    }

    /// Adds the share of another part of the batch.
    pub fn add(&mut self, other: Self) {
        self.total += other.total;
        for (sum, part) in [(&mut self.divergence, other.divergence), (&mut self.cross_entropy, other.cross_entropy)] {
            if let Some(part) = part {
                *sum = Some(sum.unwrap_or(0.0) + part);
            }
        }
    }
}

impl Objective {
    pub fn new(section: &LossSection) -> Self {
        let temperature = section.temperature as f32;
        Self {
            divergence: section.divergence.into(),
            student_temperature: if section.temperature_on_teacher_only { 1.0 } else { temperature },
            teacher_temperature: temperature,
            divergence_weight: section.divergence_weight,
            cross_entropy_weight: section.cross_entropy_weight,
            further: [
                (Divergence::ForwardKl, section.forward_kl_weight),
                (Divergence::JensenShannon, section.jensen_shannon_weight),
            ],
            matching_weight: section.mixer_matching_weight,
            matching_steps: section.mixer_matching_steps,
            positions: section.mask,
        }
    }

    /// What this update minimises, counted from 1.
    pub fn of_step(self, step: u64) -> Self {
        let matches = self.matching_steps == 0 || step <= self.matching_steps;
        Self { matching_weight: if matches { self.matching_weight } else { 0.0 }, ..self }
    }

    /// Whether nothing but the batch decides what is launched and with which numbers, so that the launches can be replayed.
    pub fn repeats(&self) -> bool {
        // The matching uploads constants in passing.
        self.matching_weight == 0.0
    }

    /// The share of some rows in the loss of a whole batch, in which `positions` positions count. Without a teacher the
    /// divergence is left out; the cross-entropy is computed when it has a weight or `with_cross_entropy` asks for it.
    ///
    /// # Errors
    /// Those of the models.
    pub fn compute<'a>(
        &self,
        tape: &Tape<'a>,
        student: &'a Model,
        teacher: Option<&Model>,
        batch: &'a Batch,
        positions: u64,
        with_cross_entropy: bool,
    ) -> Result<(Var, Unread)> {
        let denominator = positions as f32;
        // The teacher first: what its layers need in passing is free again before the student's are kept.
        let teacher = self.teacher(teacher).filter(|_| batch.targets.is_none());
        let mut mixer_inputs = None;
        let teacher_states = match teacher {
            Some(teacher) => {
                let tape = Tape::inference();
                let hidden = if self.matching_weight > 0.0 {
                    let (hidden, inputs) = matching::Inputs::of(teacher, student, batch)?;
                    mixer_inputs = Some((inputs, teacher));
                    hidden
                } else {
                    teacher.hidden(&tape, &batch.tokens)?.tensor().clone()
                };
                Some((hidden, teacher.head_weight(&tape).tensor().clone()))
            }
            None => None,
        };
        let head_teacher = |divergence: Divergence, weight: f64| {
            let states = || teacher_states.as_ref().map(|(hidden, head)| TeacherSource::Head { hidden, head });
            let source = batch.targets.as_ref().map(TeacherSource::Top).or_else(states);
            // What was said beforehand has its temperature in it.
            let teacher_temperature = if batch.targets.is_some() { 1.0 } else { self.teacher_temperature };
            source.filter(|_| weight > 0.0).map(|source| HeadTeacher {
                source,
                options: DivergenceOptions {
                    divergence,
                    student_temperature: self.student_temperature,
                    teacher_temperature,
                    mask: Some(&batch.mask),
                    denominator,
                },
                weight: weight as f32,
            })
        };
        let head_labels = (self.cross_entropy_weight > 0.0 || with_cross_entropy).then_some(HeadLabels {
            labels: &batch.labels,
            denominator,
            weight: self.cross_entropy_weight as f32,
        });
        let hidden = student.hidden(tape, &batch.tokens)?;
        let head = student.head_weight(tape);
        let (mut divergence, mut cross_entropy) = (None, None);
        let mut total: Option<Var> = None;
        let mut add = |term: Var| -> Result<()> {
            total = Some(match total.take() {
                Some(total) => ops::add(tape, &total, &term)?,
                None => term,
            });
            Ok(())
        };
        {
            let _range = runtime::range("head and losses");
            let first = head_teacher(self.divergence, self.divergence_weight);
            if first.is_some() || head_labels.is_some() {
                let loss = ops::head_loss(tape, &hidden, &head, first, head_labels)?;
                (divergence, cross_entropy) = (loss.divergence, loss.cross_entropy);
                add(loss.loss)?;
            }
            for (which, weight) in self.further {
                if let Some(further) = head_teacher(which, weight) {
                    add(ops::head_loss(tape, &hidden, &head, Some(further), None)?.loss)?;
                }
            }
        }
        if let Some((inputs, teacher)) = &mixer_inputs
            && let Some(loss) = inputs.loss(tape, student, teacher, batch, positions)?
        {
            add(ops::scale(tape, &loss, self.matching_weight as f32)?)?;
        }
        let Some(total) = total else { bail!("nothing in the loss has a weight") };
        let unread = Unread { total: total.tensor().clone(), divergence, cross_entropy };
        Ok((total, unread))
    }

    /// The teacher, if the loss looks at it.
    fn teacher<'a>(&self, teacher: Option<&'a Model>) -> Option<&'a Model> {
        let further = self.further.iter().map(|(_, weight)| *weight);
        let weights = further.chain([self.divergence_weight, self.matching_weight]);
        teacher.filter(|_| weights.into_iter().any(|weight| weight > 0.0))
    }

    fn teacher_logits(&self, teacher: Option<&Model>, batch: &Batch) -> Result<Option<Tensor>> {
        match self.teacher(teacher) {
            Some(teacher) => Ok(Some(teacher.logits(&Tape::inference(), &batch.tokens)?.tensor().clone())),
            None => Ok(None),
        }
    }

    /// That a loss which was computed from these rows is a number.
    ///
    /// # Errors
    /// If it is not, naming the first tensor at fault: logits are computed once more to find it.
    pub fn check_finite(&self, loss: &Loss, student: &Model, teacher: Option<&Model>, batch: &Batch) -> Result<()> {
        if loss.total.is_finite() {
            return Ok(());
        }
        let mut culprit = first_bad_parameter("weight", &student.parameters)
            .or_else(|| teacher.and_then(|teacher| first_bad_parameter("teacher's weight", &teacher.parameters)));
        if culprit.is_none() && !is_finite(student.logits(&Tape::inference(), &batch.tokens)?.tensor()) {
            culprit = Some("the model's logits".to_owned());
        }
        if culprit.is_none() && self.teacher_logits(teacher, batch)?.is_some_and(|logits| !is_finite(&logits)) {
            culprit = Some("the teacher's logits".to_owned());
        }
        let culprit = culprit.unwrap_or_else(|| "the loss itself".to_owned());
        bail!("the loss is {}; the first tensor that is not finite: {culprit}", loss.total);
    }
}

/// The first parameter, in the model's order, that holds a NaN or an infinity.
pub(super) fn first_bad_parameter(what: &str, parameters: &Parameters) -> Option<String> {
    let (_, parameter) = parameters.iter().find(|(_, parameter)| !is_finite(&parameter.value))?;
    Some(format!("the {what} {}", parameter.name))
}

/// The first parameter, in the model's order, whose gradient holds a NaN or an infinity.
pub(super) fn first_bad_gradient(parameters: &Parameters, gradients: &Gradients) -> Option<String> {
    let bad = |tensor: &Tensor| gradients.get(tensor).is_some_and(|gradient| !is_finite(gradient));
    let (_, parameter) = parameters.iter().find(|(_, parameter)| bad(&parameter.value))?;
    Some(format!("the gradient of {}", parameter.name))
}

fn is_finite(tensor: &Tensor) -> bool {
    if tensor.dtype() == DType::U32 {
        return true;
    }
    // A tensor that cannot be read is at fault too.
    tensor.to_f32_vec().is_ok_and(|values| values.iter().all(|value| value.is_finite()))
}

#[cfg(test)]
mod tests {
    use autograd::Tensor;
    use model::config::ModelConfig;
    use runtime::Device;

    use super::*;
    use crate::config::{DivergenceKind, RunConfig, Task};
    use crate::data::Sequence;

    fn model(seed: u64) -> Model {
        let source = serde_json::json!({
            "model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2,
            "num_key_value_heads": 1, "num_hidden_layers": 2, "vocab_size": 11,
        });
        let config = ModelConfig::from_json(source.as_object().unwrap()).unwrap();
        Model::random(config, seed, &Device::cpu()).unwrap()
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

    fn loss(student: &Model, teacher: &Model) -> Result<Loss> {
        let mut section = RunConfig::defaults(Task::Distill).loss;
        section.cross_entropy_weight = 0.5;
        let batch = batch();
        let objective = Objective::new(&section);
        let (_, unread) = objective.compute(&Tape::inference(), student, Some(teacher), &batch, 4, false)?;
        let (losses, _) = Loss::read(&[unread], None)?;
        objective.check_finite(&losses[0], student, Some(teacher), &batch)?;
        Ok(losses[0])
    }

    fn poison(model: &mut Model, name: &str) {
        let id = model.parameters.find(name).unwrap();
        let shape = model.parameters.get(id).value.shape().to_vec();
        let mut values = model.parameters.get(id).value.to_vec::<f32>().unwrap();
        values[3] = f32::NAN;
        model.parameters.set(id, Tensor::from_slice(&Device::cpu(), &shape, &values).unwrap()).unwrap();
    }

    #[test]
    fn the_loss_is_the_weighted_sum_of_its_parts() {
        let (student, teacher) = (model(1), model(2));
        let loss = self::loss(&student, &teacher).unwrap();
        let (divergence, cross_entropy) = (loss.divergence.unwrap(), loss.cross_entropy.unwrap());
        assert!(divergence > 0.0 && cross_entropy > 0.0);
        assert!((loss.total - (divergence + 0.5 * cross_entropy)).abs() < 1e-6);
        assert!(self::loss(&student, &student).unwrap().divergence.unwrap().abs() < 1e-6);
    }

    #[test]
    fn what_else_has_a_weight_is_added() {
        let (student, teacher) = (model(1), model(2));
        let total = |change: &dyn Fn(&mut LossSection)| {
            let mut section = RunConfig::defaults(Task::Distill).loss;
            section.divergence_weight = 0.0;
            change(&mut section);
            let batch = batch();
            let objective = Objective::new(&section);
            let (_, unread) =
                objective.compute(&Tape::inference(), &student, Some(&teacher), &batch, 4, false).unwrap();
            Loss::read(&[unread], None).unwrap().0[0].total
        };
        let of = |kind: DivergenceKind| {
            total(&|section| {
                section.divergence = kind;
                section.divergence_weight = 1.0;
            })
        };
        let [reverse, forward, middle] =
            [DivergenceKind::ReverseKl, DivergenceKind::ForwardKl, DivergenceKind::JensenShannon].map(of);
        let all = total(&|section| {
            section.divergence_weight = 1.0;
            section.forward_kl_weight = 0.5;
            section.jensen_shannon_weight = 2.0;
        });
        let expected = reverse + 0.5 * forward + 2.0 * middle;
        assert!((all - expected).abs() < 1e-5 * expected, "{all} instead of {expected}");
        assert!((total(&|section| section.forward_kl_weight = 1.0) - forward).abs() < 1e-6);
    }

    #[test]
    fn the_first_tensor_that_is_not_finite_is_named() {
        let good = model(1);
        let mut bad = model(1);
        poison(&mut bad, "model.layers.1.mlp.up_proj.weight");
        poison(&mut bad, "model.layers.0.self_attn.k_proj.weight");
        let message = loss(&bad, &good).unwrap_err().to_string();
        assert!(message.contains("the loss is NaN"), "{message}");
        assert!(message.ends_with("the weight model.layers.0.self_attn.k_proj.weight"), "{message}");
        let message = loss(&good, &bad).unwrap_err().to_string();
        assert!(message.ends_with("the teacher's weight model.layers.0.self_attn.k_proj.weight"), "{message}");
    }

    #[test]
    fn a_bad_gradient_is_named() {
        let model = model(1);
        let mut gradients = Gradients::default();
        for (index, (_, parameter)) in model.parameters.iter().enumerate() {
            let value = if index == 4 { f32::INFINITY } else { 1.0 };
            let gradient = Tensor::filled(&Device::cpu(), parameter.value.shape(), DType::F32, value).unwrap();
            gradients.add(&parameter.value, gradient).unwrap();
        }
        let (_, expected) = model.parameters.iter().nth(4).unwrap();
        let found = first_bad_gradient(&model.parameters, &gradients).unwrap();
        assert_eq!(found, format!("the gradient of {}", expected.name));
    }
}
