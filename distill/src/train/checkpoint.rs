//! A run's state on disk: what is trained, the optimizer's moments, and where the data stand.
//!
//! `RUN/checkpoints/step-000120/` holds `weights.safetensors` (f32, the trained parameters; where the model reads them in
//! bf16, as the optimizer keeps them), `optimizer.safetensors`
//! (`NAME.first_moment`, `NAME.second_moment`) and `state.json`, which has the checksums of both. A folder gets that
//! name when all of it is on the disk, so every folder so called is whole; the newest one that passes its checksums is
//! what a run continues from.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use autograd::optimizer::{AdamW, AdamWOptions};
use autograd::{DType, Parameters, Tensor};
use runtime::Device;
use serde::{Deserialize, Serialize};

use super::tensor_file::{self, TensorFile};
use crate::data::Identity;
use crate::files;

const VERSION: u32 = 1;
const WEIGHTS: &str = "weights.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";

/// Data of a run, as the checkpoint knows them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DataState {
    /// What the rows were made from.
    pub identity: Identity,
    /// SHA-256 of the rows.
    pub rows: String,
    /// SHA-256 of what the teacher says of them, where that is known beforehand.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub targets: Option<String>,
}

/// What a run continues with, beside weights and moments.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct State {
    /// Version of this format.
    pub version: u32,
    /// Updates made.
    pub step: u64,
    /// Rows seen: the position in the data.
    pub sequences: u64,
    /// Positions that counted so far.
    pub tokens: u64,
    /// Batches that were passed over: updates that the optimizer did not make.
    #[serde(default)]
    pub passed_over: u64,
    /// Seed of the rows' order and of new weights.
    pub seed: u64,
    /// Length of `metrics.jsonl`.
    pub metrics_bytes: u64,
    /// SHA-256 of the resolved configuration without `[checkpoint]`.
    pub config: String,
    /// SHA-256 of the models that the run began with, by role.
    pub models: BTreeMap<String, String>,
    /// The data, by role.
    pub data: BTreeMap<String, DataState>,
}

#[derive(Serialize, Deserialize)]
struct StateFile {
    #[serde(flatten)]
    state: State,
    weights_sha256: String,
    optimizer_sha256: String,
}

/// A checkpoint that passed its checksums.
pub(super) struct Checkpoint {
    pub path: PathBuf,
    pub state: State,
    weights: TensorFile,
    optimizer: TensorFile,
}

impl State {
    pub const VERSION: u32 = VERSION;
}

/// Writes the checkpoint of `state.step` and removes those beyond the newest `keep`.
///
/// # Errors
/// Values that are not finite; a disk that is full or a folder that cannot be written. Earlier checkpoints are as they
/// were then.
pub(super) fn save(
    folder: &Path,
    state: &State,
    parameters: &Parameters,
    optimizer: &AdamW,
    keep: usize,
) -> Result<PathBuf> {
    let path = folder.join(name(state.step));
    let write = || -> Result<()> {
        files::create_folder(folder)?;
        if path.exists() {
            // Only one that failed its checksums can be here: the run continued from an older one.
            files::remove_folder(&path)?;
        }
        files::write_folder(&path, |partial| {
            let weights: Vec<(String, &Tensor)> = parameters
                .iter()
                .zip(optimizer.masters())
                .filter(|((_, parameter), _)| parameter.trainable)
                .map(|((_, parameter), master)| (parameter.name.clone(), master.as_ref().unwrap_or(&parameter.value)))
                .collect();
            let mut moments: Vec<(String, &Tensor)> = Vec::new();
            for ((_, parameter), pair) in parameters.iter().zip(optimizer.moments()) {
                if let Some((first, second)) = pair {
                    moments.push((first_moment(&parameter.name), first));
                    moments.push((second_moment(&parameter.name), second));
                }
            }
            let file = StateFile {
                state: state.clone(),
                weights_sha256: tensor_file::write(&partial.join(WEIGHTS), &weights)?,
                optimizer_sha256: tensor_file::write(&partial.join(OPTIMIZER), &moments)?,
            };
            files::fill_file(&partial.join(STATE), |writer| {
                serde_json::to_writer_pretty(&mut *writer, &file)?;
                Ok(writer.write_all(b"\n")?)
            })
        })
    };
    write().with_context(|| {
        let kept = match steps(folder).ok().and_then(|steps| steps.last().copied()) {
            Some(step) => format!("the checkpoint of step {step} is untouched"),
            None => "there is no earlier one".to_owned(),
        };
        format!(
            "saving the checkpoint of step {} failed ({kept}; mend the cause and run the same command again)",
            state.step
        )
    })?;
    let mut older = steps(folder)?;
    older.retain(|step| *step < state.step);
    for step in older.iter().rev().skip(keep.saturating_sub(1)) {
        files::remove_folder(&folder.join(name(*step)))?;
    }
    Ok(path)
}

/// The newest checkpoint that passes its checksums; `None` when there is none at all. `warn` hears of damaged ones.
///
/// # Errors
/// When there are checkpoints and all are damaged.
pub(super) fn latest(folder: &Path, mut warn: impl FnMut(&str)) -> Result<Option<Checkpoint>> {
    if !folder.exists() {
        return Ok(None);
    }
    files::remove_leftovers(folder)?;
    let steps = steps(folder)?;
    for step in steps.iter().rev() {
        let path = folder.join(name(*step));
        match open(&path) {
            Ok(checkpoint) => return Ok(Some(checkpoint)),
            Err(error) => warn(&format!("the checkpoint {} is damaged and passed over: {error:#}", path.display())),
        }
    }
    ensure!(
        steps.is_empty(),
        "every checkpoint in {} is damaged: remove the folder to begin anew, or put a good one back",
        folder.display()
    );
    Ok(None)
}

impl Checkpoint {
    /// Puts weights into `parameters` and returns the optimizer.
    ///
    /// # Errors
    /// When the trained parameters are not those of the checkpoint.
    pub fn restore(&self, parameters: &mut Parameters, options: AdamWOptions, device: &Device) -> Result<AdamW> {
        let place = || format!("continuing from {}", self.path.display());
        let (mut moments, mut masters) = (Vec::with_capacity(parameters.len()), Vec::with_capacity(parameters.len()));
        let mut used = 0;
        for (_, parameter) in parameters.iter_mut() {
            if !parameter.trainable {
                moments.push(None);
                masters.push(None);
                continue;
            }
            let shape = parameter.value.shape().to_vec();
            let Some(value) = self.weights.read(&parameter.name, &shape, device).with_context(place)? else {
                bail!("{}: it has no {}", place(), parameter.name);
            };
            let dtype = parameter.value.dtype();
            parameter.value = value.cast(dtype)?;
            masters.push((dtype != DType::F32).then_some(value));
            used += 1;
            let first = self.optimizer.read(&first_moment(&parameter.name), &shape, device).with_context(place)?;
            let second = self.optimizer.read(&second_moment(&parameter.name), &shape, device).with_context(place)?;
            moments.push(first.zip(second));
        }
        let stored = self.weights.names()?.len();
        ensure!(stored == used, "{}: it has {stored} trained parameters, the model has {used}", place());
        let updates = self.state.step - self.state.passed_over;
        Ok(AdamW::restore(options, parameters, updates, moments, masters)?)
    }
}

fn open(path: &Path) -> Result<Checkpoint> {
    let text = fs::read(path.join(STATE)).context("reading state.json")?;
    let file: StateFile = serde_json::from_slice(&text).context("state.json is not what this version writes")?;
    ensure!(
        file.state.version == VERSION,
        "it has version {}, this grafter reads version {VERSION}",
        file.state.version
    );
    let weights = TensorFile::open(&path.join(WEIGHTS), &file.weights_sha256)?;
    let optimizer = TensorFile::open(&path.join(OPTIMIZER), &file.optimizer_sha256)?;
    Ok(Checkpoint { path: path.to_owned(), state: file.state, weights, optimizer })
}

/// The steps that have a checkpoint, in order.
pub(super) fn steps(folder: &Path) -> Result<Vec<u64>> {
    let mut steps = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let entry = entry?;
        if let Some(step) = entry.file_name().to_str().and_then(|name| name.strip_prefix("step-")?.parse().ok()) {
            steps.push(step);
        }
    }
    steps.sort_unstable();
    Ok(steps)
}

fn name(step: u64) -> String {
    format!("step-{step:06}")
}

fn first_moment(parameter: &str) -> String {
    format!("{parameter}.first_moment")
}

fn second_moment(parameter: &str) -> String {
    format!("{parameter}.second_moment")
}

#[cfg(test)]
mod tests {
    use autograd::{Gradients, Parameter, Tape, ops};

    use super::*;

    const OPTIONS: AdamWOptions = AdamWOptions { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 };

    fn parameters() -> Parameters {
        let mut parameters = Parameters::default();
        for (name, trainable) in [("a", true), ("frozen", false), ("never", true)] {
            let value = Tensor::from_slice(&Device::cpu(), &[2], &[1.0f32, -3.0]).unwrap();
            parameters.push(Parameter { name: name.to_owned(), value, trainable, decay: true, rate: 1.0 });
        }
        parameters
    }

    fn update(parameters: &mut Parameters, optimizer: &mut AdamW) {
        let gradients = {
            let tape = Tape::new();
            let a = parameters.var(&tape, parameters.find("a").unwrap());
            let loss = ops::sum(&tape, &ops::mul(&tape, &a, &a).unwrap()).unwrap();
            tape.backward(&loss).unwrap()
        };
        optimizer.update(parameters, &gradients, 0.1).unwrap();
    }

    fn state(step: u64) -> State {
        State {
            version: VERSION,
            step,
            sequences: 2 * step,
            tokens: 7 * step,
            passed_over: 0,
            seed: 3,
            metrics_bytes: 10,
            config: "c".to_owned(),
            models: BTreeMap::new(),
            data: BTreeMap::new(),
        }
    }

    fn values(parameters: &Parameters, name: &str) -> Vec<f32> {
        parameters.get(parameters.find(name).unwrap()).value.to_vec().unwrap()
    }

    #[test]
    fn a_restored_run_goes_on_to_the_same_bits() {
        let folder = tempfile::tempdir().unwrap();
        let mut whole = parameters();
        let mut optimizer = AdamW::new(OPTIONS, &whole);
        for _ in 0..3 {
            update(&mut whole, &mut optimizer);
        }
        save(folder.path(), &state(3), &whole, &optimizer, 2).unwrap();
        update(&mut whole, &mut optimizer);
        let checkpoint = latest(folder.path(), |_| panic!("nothing is damaged")).unwrap().unwrap();
        assert_eq!(checkpoint.state, state(3));
        let mut resumed = parameters();
        let mut restored = checkpoint.restore(&mut resumed, OPTIONS, &Device::cpu()).unwrap();
        assert_eq!(restored.steps(), 3);
        update(&mut resumed, &mut restored);
        assert_eq!(values(&resumed, "a"), values(&whole, "a"));
        assert_eq!(values(&resumed, "frozen"), [1.0, -3.0]);
        assert!(restored.moments()[2].is_none());
    }

    #[test]
    fn parameters_in_bf16_go_on_from_the_bits_that_the_optimizer_keeps() {
        let folder = tempfile::tempdir().unwrap();
        let narrow = || {
            let mut narrow = parameters();
            for (_, parameter) in narrow.iter_mut() {
                parameter.value = parameter.value.cast(DType::Bf16).unwrap();
            }
            narrow
        };
        let update = |parameters: &mut Parameters, optimizer: &mut AdamW| {
            let mut gradients = Gradients::default();
            let gradient = Tensor::from_slice(&Device::cpu(), &[2], &[0.5f32, -1.0]).unwrap();
            gradients.add(&parameters.get(parameters.find("a").unwrap()).value, gradient).unwrap();
            optimizer.update(parameters, &gradients, 1e-4).unwrap();
        };
        let mut whole = narrow();
        let mut optimizer = AdamW::new(OPTIONS, &whole);
        update(&mut whole, &mut optimizer);
        save(folder.path(), &state(1), &whole, &optimizer, 1).unwrap();
        let mut resumed = narrow();
        let checkpoint = latest(folder.path(), |_| ()).unwrap().unwrap();
        let mut restored = checkpoint.restore(&mut resumed, OPTIONS, &Device::cpu()).unwrap();
        assert_eq!(resumed.get(resumed.find("a").unwrap()).value.dtype(), DType::Bf16);
        update(&mut whole, &mut optimizer);
        update(&mut resumed, &mut restored);
        let master = |optimizer: &AdamW| optimizer.masters()[0].as_ref().unwrap().to_vec::<f32>().unwrap();
        assert_eq!(master(&restored), master(&optimizer));
        assert!(master(&restored)[0] > 0.999 && master(&restored)[0] < 1.0, "a change that bf16 does not hold");
    }

    #[test]
    fn the_newest_are_kept_and_a_damaged_one_is_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let parameters = parameters();
        let optimizer = AdamW::new(OPTIONS, &parameters);
        for step in 1..=4 {
            save(folder.path(), &state(step), &parameters, &optimizer, 2).unwrap();
        }
        assert_eq!(steps(folder.path()).unwrap(), [3, 4]);
        let weights = folder.path().join("step-000004").join(WEIGHTS);
        let bytes = fs::read(&weights).unwrap();
        fs::write(&weights, &bytes[..bytes.len() - 4]).unwrap();
        let mut warnings = Vec::new();
        let checkpoint = latest(folder.path(), |warning| warnings.push(warning.to_owned())).unwrap().unwrap();
        assert_eq!(checkpoint.state.step, 3);
        assert!(warnings[0].contains("step-000004") && warnings[0].contains("was changed or cut off"), "{warnings:?}");
        save(folder.path(), &state(4), &parameters, &optimizer, 2).unwrap();
        assert_eq!(latest(folder.path(), |_| panic!("mended")).unwrap().unwrap().state.step, 4);
        for step in [3, 4] {
            fs::write(folder.path().join(name(step)).join(STATE), "{}").unwrap();
        }
        let message = format!("{:#}", latest(folder.path(), |_| ()).err().unwrap());
        assert!(message.contains("every checkpoint in") && message.contains("is damaged"), "{message}");
    }

    #[test]
    fn a_checkpoint_that_cannot_be_written_leaves_the_last_one() {
        let folder = tempfile::tempdir().unwrap();
        let mut parameters = parameters();
        let optimizer = AdamW::new(OPTIONS, &parameters);
        save(folder.path(), &state(1), &parameters, &optimizer, 1).unwrap();
        let id = parameters.find("a").unwrap();
        parameters.get_mut(id).value = Tensor::from_slice(&Device::cpu(), &[2], &[0.0, f32::INFINITY]).unwrap();
        let message = format!("{:#}", save(folder.path(), &state(2), &parameters, &optimizer, 1).unwrap_err());
        assert!(message.contains("saving the checkpoint of step 2 failed"), "{message}");
        assert!(message.contains("the checkpoint of step 1 is untouched"), "{message}");
        assert!(message.contains("a holds a value that is not finite"), "{message}");
        assert_eq!(steps(folder.path()).unwrap(), [1]);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no leftovers");
        // A file where the folder should be: nothing can be written.
        let blocked = folder.path().join("blocked");
        fs::write(&blocked, "").unwrap();
        let message = format!("{:#}", save(&blocked, &state(2), &parameters, &optimizer, 1).unwrap_err());
        assert!(message.contains("blocked") && message.contains("there is no earlier one"), "{message}");
    }
}
