//! How far a new mixer's output is from the attention's that it replaces, before it learns anything: the squared error
//! summed over positions and channels, divided by the attention's output squared. Every mixer is fed what the ranked
//! model's own layer gets, so one pass scores all layers.

use anyhow::{Result, ensure};
use autograd::Tape;
use model::initialise::graft;

use super::{Bench, Cost, Found, LayerScore};
use crate::config::PrecisionKind;
use crate::data::{Batch, PositionsThatCount, Sequence, TokenFile};
use crate::interruption::Interruption;

/// Scores every layer.
pub(super) fn rank(bench: &Bench<'_>, file: &TokenFile, interruption: &Interruption) -> Result<Found> {
    let config = bench.config;
    let model = &bench.model;
    let teacher = bench.teacher.as_ref().unwrap_or(model);
    let mut hybrid = graft(model, teacher, &bench.layers, &config.graft_options())?;
    if config.precision == PrecisionKind::Bf16 {
        hybrid = hybrid.into_bf16()?;
    }
    let layers = model.config.mixers.len();
    // Squared error and squared output, by layer.
    let mut sums = vec![(0.0, 0.0); layers];
    let rows: Vec<Sequence> =
        (0..file.sequences().min(config.samples)).map(|row| file.sequence(row)).collect::<Result<_>>()?;
    for rows in rows.chunks(config.micro_batch) {
        interruption.check()?;
        let batch = Batch::new(&bench.device, rows, PositionsThatCount::Answers)?;
        let mask = batch.mask.to_vec::<f32>()?;
        let tape = Tape::inference();
        let mut hidden = model.embedded(&tape, &batch.tokens)?;
        for layer in 0..layers {
            if bench.layers.contains(&layer) {
                let attention = model.mixer_output(&tape, layer, &hidden, &batch.tokens)?;
                let mixer = hybrid.mixer_output(&tape, layer, &hidden, &batch.tokens)?;
                if let (Some(attention), Some(mixer)) = (attention, mixer) {
                    let (attention, mixer) = (attention.tensor().to_f32_vec()?, mixer.tensor().to_f32_vec()?);
                    let width = model.config.hidden_size;
                    let positions = attention.chunks(width).zip(mixer.chunks(width)).zip(&mask);
                    for ((attention, mixer), _) in positions.filter(|(_, counts)| **counts > 0.0) {
                        for (&right, &found) in attention.iter().zip(mixer) {
                            let (right, found) = (f64::from(right), f64::from(found));
                            sums[layer].0 += (found - right) * (found - right);
                            sums[layer].1 += right * right;
                        }
                    }
                }
            }
            hidden = model.through(&tape, &hidden, &batch.tokens, layer..layer + 1)?;
        }
    }
    let mut scores = Vec::with_capacity(bench.layers.len());
    for &layer in &bench.layers {
        let (error, output) = sums[layer];
        let score = error / output;
        ensure!(score.is_finite(), "layer {layer}: its mixers' outputs are not finite, or nothing of the data counts");
        scores.push(LayerScore { layer, score, score_at_start: None });
    }
    let batches = rows.len().div_ceil(config.micro_batch) as u64;
    let (layers, ranked) = (layers as u64, bench.layers.len() as u64);
    // The trunk, and a mixer of each kind for every ranked layer; by itself every layer needs its own trunk.
    let below: u64 = bench.layers.iter().map(|&layer| layer as u64).sum();
    let cost =
        Cost { layer_passes: batches * (layers + 2 * ranked), naive_layer_passes: batches * (below + 2 * ranked) };
    Ok(Found { baseline: None, scores, cost })
}
