//! Leave one out: each layer in turn becomes the identity (equation 4 of the Apriel-H1 report).
//!
//! What enters a layer does not depend on whether that layer is there, so it is computed once and kept: the residual
//! stream of all held-out batches moves up a layer at a time, and a score costs the layers above alone. For `L` layers
//! that is `L + L (L - 1) / 2` passes of a layer instead of `L + L (L - 1)`: half. Generated answers feed every token
//! back through all layers, so there nothing can be shared.

use std::ops::Range;

use anyhow::{Context, Result};
use autograd::{Tape, Tensor, Var};
use model::Model;
use model::config::MixerKind;

use super::examination::{Examination, Predictions};
use super::store::Store;
use super::{Bench, Cost, Found, LayerScore, Metric};
use crate::interruption::Interruption;
use crate::train::Progress;

/// Scores every layer.
pub(super) fn rank(
    bench: &Bench<'_>,
    examination: &Examination<'_>,
    store: &mut Store,
    interruption: &Interruption,
    progress: &mut Progress,
) -> Result<Found> {
    let mut without = Without { store, progress, metric: metric_name(bench.config.metric), values: Vec::new() };
    let (whole, cost) = match examination {
        Examination::Predictions(predictions) => predict(bench, predictions, &mut without, interruption)?,
        Examination::Answers(answers) => {
            for &layer in &bench.layers {
                let other = without_layer(&bench.model, layer)?;
                without.layer(layer, || answers.value(&other, bench.config, interruption))?;
            }
            let layers = bench.model.config.mixers.len() as u64;
            let passes = layers + bench.layers.len() as u64 * (layers - 1);
            let whole = answers.value(&bench.model, bench.config, interruption).context("the whole model")?;
            (whole, Cost { layer_passes: passes, naive_layer_passes: passes })
        }
    };
    let scores = without.values.into_iter().map(|(layer, value)| LayerScore {
        layer,
        score: examination.score(whole, value),
        score_at_start: None,
    });
    Ok(Found { baseline: Some(whole), scores: scores.collect(), cost })
}

fn metric_name(metric: Metric) -> &'static str {
    match metric {
        Metric::Loss => "loss",
        Metric::Accuracy => "accuracy",
        Metric::ExactMatch => "exact match",
    }
}

/// The metric without each layer, kept as soon as it is known. The whole model's is known last, so that the log holds
/// these and not yet the scores.
struct Without<'a> {
    store: &'a mut Store,
    progress: &'a mut Progress,
    metric: &'static str,
    values: Vec<(usize, f64)>,
}

impl Without<'_> {
    fn layer(&mut self, layer: usize, compute: impl FnOnce() -> Result<f64>) -> Result<()> {
        let value = match self.store.known(layer) {
            Some(known) => known.score,
            None => {
                let value = compute().with_context(|| format!("without layer {layer}"))?;
                self.store.add(LayerScore { layer, score: value, score_at_start: None })?;
                self.progress.say(&format!("layer {layer}: {} {value:.6} without it", self.metric));
                value
            }
        };
        self.values.push((layer, value));
        Ok(())
    }
}

/// Moves the residual stream of all batches up layer by layer. Returns the whole model's metric.
fn predict(
    bench: &Bench<'_>,
    predictions: &Predictions,
    without: &mut Without<'_>,
    interruption: &Interruption,
) -> Result<(f64, Cost)> {
    let model = &bench.model;
    let layers = model.config.mixers.len();
    let batches = predictions.batches();
    let through = |batch: usize, hidden: &Tensor, range: Range<usize>| -> Result<Tensor> {
        interruption.check()?;
        let tape = Tape::inference();
        Ok(model.through(&tape, &Var::constant(hidden), &batches[batch].tokens, range)?.tensor().clone())
    };
    let mut entering: Vec<Tensor> = batches
        .iter()
        .map(|batch| Ok(model.embedded(&Tape::inference(), &batch.tokens)?.tensor().clone()))
        .collect::<Result<_>>()?;
    for layer in 0..layers {
        if bench.layers.contains(&layer) {
            let above = |batch: usize| through(batch, &entering[batch], layer + 1..layers);
            without.layer(layer, || predictions.value(model, above))?;
        }
        for (batch, hidden) in entering.iter_mut().enumerate() {
            *hidden = through(batch, hidden, layer..layer + 1)?;
        }
    }
    let whole = predictions.value(model, |batch| Ok(entering[batch].clone())).context("the whole model")?;
    let (layers, batches) = (layers as u64, batches.len() as u64);
    let above: u64 = bench.layers.iter().map(|&layer| layers - 1 - layer as u64).sum();
    let cost = Cost {
        layer_passes: batches * (layers + above),
        naive_layer_passes: batches * (layers + bench.layers.len() as u64 * (layers - 1)),
    };
    Ok((whole, cost))
}

/// The model with a layer as the identity; its weights are the model's own.
fn without_layer(model: &Model, layer: usize) -> Result<Model> {
    let mut config = model.config.clone();
    config.mixers[layer] = MixerKind::Identity;
    let mut other = Model::new(config, model.parameters.clone())?;
    other.activations = model.activations;
    Ok(other)
}

#[cfg(test)]
mod tests {
    use runtime::Device;

    use super::*;
    use crate::data::{Batch, PositionsThatCount, Sequence};
    use crate::evaluate::questions::{Choice, MultipleChoice};
    use crate::rank::{Method, RankConfig};

    fn model() -> Model {
        let source = serde_json::json!({
            "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
            "num_key_value_heads": 1, "num_hidden_layers": 4, "vocab_size": 19, "initializer_range": 0.3,
        });
        let config = model::config::ModelConfig::from_json(source.as_object().unwrap()).unwrap();
        Model::random(config, 5, &Device::cpu()).unwrap()
    }

    fn questions() -> Vec<MultipleChoice> {
        (0..7u32)
            .map(|question| MultipleChoice {
                place: String::new(),
                id: None,
                task: None,
                prompt: String::new(),
                choices: (0..3u32)
                    .map(|choice| Choice {
                        text: "x".repeat(2 + choice as usize),
                        tokens: vec![1 + question, 2, 3 + question, 5 + choice, 6 + (question * choice) % 11],
                        prompt: 3,
                    })
                    .collect(),
                answer: question as usize % 3,
            })
            .collect()
    }

    /// Every choice alone in a row, through a model that has the layer as its identity.
    fn naive(model: &Model, without: Option<usize>) -> f64 {
        let model = without.map_or_else(|| model.clone(), |layer| without_layer(model, layer).unwrap());
        let right = questions().into_iter().filter(|question| {
            let losses: Vec<f64> = question
                .choices
                .iter()
                .map(|choice| {
                    let count = choice.tokens.len();
                    let row = Sequence {
                        tokens: choice.tokens.clone(),
                        answers: (0..count).map(|at| at >= choice.prompt).collect(),
                        padding: vec![false; count],
                        document_lengths: vec![count],
                    };
                    let batch = Batch::new(&Device::cpu(), &[row], PositionsThatCount::Answers).unwrap();
                    let tape = Tape::inference();
                    let logits = model.logits(&tape, &batch.tokens).unwrap();
                    let loss = autograd::ops::cross_entropy(&tape, &logits, &batch.labels, 1.0).unwrap().loss;
                    f64::from(loss.item().unwrap()) / choice.text.len() as f64
                })
                .collect();
            let best = (0..3).min_by(|a, b| losses[*a].total_cmp(&losses[*b])).unwrap();
            best == question.answer
        });
        right.count() as f64 / 7.0
    }

    #[test]
    fn scores_are_those_of_models_without_the_layer() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = RankConfig::new("m".into(), Method::Loo, "d".into());
        config.sequence_length = 12;
        config.micro_batch = 3;
        let model = model();
        let bench = Bench {
            config: &config,
            device: Device::cpu(),
            model: model.clone(),
            teacher: None,
            layers: vec![0, 1, 2, 3],
        };
        let examination = Examination::accuracy(&questions(), &config, &Device::cpu()).unwrap();
        let mut store = Store::open(&folder.path().join("ranking"), &config, &Default::default()).unwrap();
        let found = rank(&bench, &examination, &mut store, &Interruption::new(), &mut Progress::silent()).unwrap();
        let whole = naive(&model, None);
        assert_eq!(found.baseline, Some(whole));
        for score in &found.scores {
            assert_eq!(score.score, whole - naive(&model, Some(score.layer)), "layer {}", score.layer);
        }
        // 2 + ... of 4 layers: 4 + 3 + 2 + 1 + 0 passes a batch instead of 4 + 4 * 3.
        assert_eq!(found.cost.layer_passes * 16, found.cost.naive_layer_passes * 10);
    }
}
