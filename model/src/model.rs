//! The model: embedding, layers, final norm, head.

use std::path::Path;

use autograd::ops;
use autograd::{DType, ParameterId, Parameters, Tape, Tensor, Var};
use runtime::Device;

use crate::architecture::parameter_specs;
use crate::batch::TokenBatch;
use crate::checkpoint::{self, SaveOptions, WeightFiles};
use crate::config::ModelConfig;
use crate::initialise;
use crate::mixer::{Mixer, MixerCache, Projection};
use crate::{Error, Result};

/// In which type matrices are kept in memory, and what layers pass on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// Everything in f32: for training.
    F32,
    /// Matrices in bf16 where the checkpoint has bf16, f32 otherwise: half the memory and no loss. Activations in f32.
    AsStored,
    /// Matrices and activations in bf16, sums in f32: what a GPU's matrix units are fast at.
    Bf16,
}

impl Precision {
    /// What a checkpoint is best used in without training: as it is stored on the CPU, which computes in f32 whatever weights are
    /// kept in; on GPUs in bf16 where the checkpoint's matrices are bf16, in f32 elsewhere.
    ///
    /// # Errors
    /// A folder that is no model.
    pub fn for_use(folder: &Path, device: &Device) -> Result<Self> {
        if device.is_cpu() {
            return Ok(Self::AsStored);
        }
        Ok(match WeightFiles::open(folder)?.stored_dtype("model.embed_tokens.weight") {
            DType::Bf16 => Self::Bf16,
            _ => Self::F32,
        })
    }
}

/// A transformer or hybrid with its weights.
#[derive(Clone, Debug)]
pub struct Model {
    /// What it is made of.
    pub config: ModelConfig,
    /// Its weights, in checkpoint names.
    pub parameters: Parameters,
    /// Whether training keeps only each layer's input and computes the layer again in the reverse pass.
    pub checkpoint_layers: bool,
    /// Element type of what the layers pass on: f32 or bf16.
    pub activations: DType,
    embedding: ParameterId,
    layers: Vec<Option<Layer>>,
    norm: ParameterId,
    /// The embedding itself when tied.
    head: ParameterId,
}

/// `h + mixer(norm(h))`, then `a + mlp(norm(a))`.
#[derive(Clone, Debug)]
struct Layer {
    input_norm: ParameterId,
    mixer: Mixer,
    post_norm: ParameterId,
    gate: Projection,
    up: Projection,
    down: Projection,
    epsilon: f32,
}

/// What decoding continues from: each layer's state, and how many tokens it has seen.
#[derive(Clone, Debug)]
pub struct Cache {
    layers: Vec<Option<MixerCache>>,
    length: usize,
}

impl Model {
    /// Reads a Hugging Face folder.
    ///
    /// # Errors
    /// Everything that is wrong with the folder, each naming file and tensor.
    pub fn load(folder: &Path, device: &Device, precision: Precision) -> Result<Self> {
        Self::load_while(folder, device, precision, || true)
    }

    /// As [`Model::load`], as long as `goes_on`, which is asked before each tensor, says yes.
    ///
    /// # Errors
    /// As [`Model::load`]; [`Error::Stopped`] when `goes_on` says no.
    pub fn load_while(
        folder: &Path,
        device: &Device,
        precision: Precision,
        goes_on: impl FnMut() -> bool,
    ) -> Result<Self> {
        let mut config = ModelConfig::read(folder)?;
        let files = WeightFiles::open(folder)?;
        files.resolve(&mut config)?;
        let specs = parameter_specs(&config, |name| match precision {
            Precision::F32 => DType::F32,
            Precision::AsStored => files.stored_dtype(name),
            Precision::Bf16 => DType::Bf16,
        });
        let parameters = checkpoint::load(&files, &config, &specs, device, goes_on)?;
        let mut model = Self::new(config, parameters)?;
        if precision == Precision::Bf16 {
            model.activations = DType::Bf16;
        }
        Ok(model)
    }

    /// The same model with matrices and activations in bf16 ([`Precision::Bf16`]).
    ///
    /// # Errors
    /// Out of memory.
    pub fn into_bf16(mut self) -> Result<Self> {
        for spec in parameter_specs(&self.config, |_| DType::Bf16) {
            if let Some(id) = self.parameters.find(&spec.name) {
                let value = self.parameters.get(id).value.cast(spec.dtype)?;
                self.parameters.get_mut(id).value = value;
            }
        }
        self.activations = DType::Bf16;
        Ok(self)
    }

    /// A model with fresh weights: matrices normal with the configuration's `initializer_range` (0.02 unless given),
    /// norms 1, Mamba mixers as M1 initialises them. The same seed gives the same weights.
    ///
    /// # Errors
    /// Out of memory.
    pub fn random(config: ModelConfig, seed: u64, device: &Device) -> Result<Self> {
        let parameters = initialise::random_parameters(&config, seed, device)?;
        Self::new(config, parameters)
    }

    /// A model from a configuration and its parameters.
    ///
    /// # Errors
    /// [`Error::NoSuchParameter`] when one is missing.
    pub fn new(config: ModelConfig, parameters: Parameters) -> Result<Self> {
        let find = |name: &str| parameters.find(name).ok_or_else(|| Error::NoSuchParameter { name: name.to_owned() });
        let embedding = find("model.embed_tokens.weight")?;
        let norm = find("model.norm.weight")?;
        let head = if config.tied_embeddings { embedding } else { find("lm_head.weight")? };
        let layers = (0..config.mixers.len())
            .map(|layer| Layer::new(&config, &parameters, layer))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            config,
            parameters,
            checkpoint_layers: false,
            activations: DType::F32,
            embedding,
            layers,
            norm,
            head,
        })
    }

    /// Writes a Hugging Face folder, whole or not at all.
    ///
    /// # Errors
    /// Files that cannot be written.
    pub fn save(&self, folder: &Path, options: &SaveOptions<'_>) -> Result<()> {
        checkpoint::save(folder, &self.config, &self.parameters, options)
    }

    /// Next-token logits, `[batch, time, vocabulary]`, in the activations' type.
    ///
    /// # Errors
    /// Those of the operators; a token id outside the vocabulary.
    pub fn logits<'a>(&'a self, tape: &Tape<'a>, batch: &'a TokenBatch) -> Result<Var> {
        let hidden = self.hidden(tape, batch)?;
        self.head(tape, &hidden)
    }

    /// The residual stream after the final norm, `[batch, time, hidden]`.
    ///
    /// # Errors
    /// Those of the operators; a token id outside the vocabulary.
    pub fn hidden<'a>(&'a self, tape: &Tape<'a>, batch: &'a TokenBatch) -> Result<Var> {
        self.hidden_observed(tape, batch, |_, _| {})
    }

    /// As [`Model::hidden`]; `observe` sees the residual stream after every layer.
    ///
    /// # Errors
    /// As [`Model::hidden`].
    pub fn hidden_observed<'a>(
        &'a self,
        tape: &Tape<'a>,
        batch: &'a TokenBatch,
        mut observe: impl FnMut(usize, &Var),
    ) -> Result<Var> {
        let mut hidden = self.embed(tape, &batch.tokens)?;
        for index in 0..self.layers.len() {
            hidden = self.layer(tape, index, hidden, batch)?;
            observe(index, &hidden);
        }
        self.final_norm(tape, &hidden)
    }

    /// The residual stream that enters the first layer, `[batch, time, hidden]`.
    ///
    /// # Errors
    /// Those of the operator; a token id outside the vocabulary.
    pub fn embedded(&self, tape: &Tape<'_>, batch: &TokenBatch) -> Result<Var> {
        self.embed(tape, &batch.tokens)
    }

    /// The residual stream after some of the layers in order, from what enters the first of them: `[batch, time,
    /// hidden]` to the same. [`Model::embedded`], all layers and [`Model::logits_of`] make [`Model::logits`]; whoever
    /// compares models that differ in one layer computes what lies below it once.
    ///
    /// # Errors
    /// Those of the operators.
    pub fn through<'a>(
        &'a self,
        tape: &Tape<'a>,
        hidden: &Var,
        batch: &'a TokenBatch,
        layers: std::ops::Range<usize>,
    ) -> Result<Var> {
        let mut hidden = hidden.clone();
        for index in layers {
            hidden = self.layer(tape, index, hidden, batch)?;
        }
        Ok(hidden)
    }

    /// Next-token logits, `[batch, time, vocabulary]`, from the residual stream after the last layer.
    ///
    /// # Errors
    /// Those of the operators.
    pub fn logits_of(&self, tape: &Tape<'_>, hidden: &Var) -> Result<Var> {
        let normed = self.final_norm(tape, hidden)?;
        self.head(tape, &normed)
    }

    /// What the mixer of one layer adds to the residual stream that enters the layer, `[batch, time, hidden]`; `None`
    /// where the layer is the identity.
    ///
    /// # Errors
    /// Those of the operators.
    pub fn mixer_output(&self, tape: &Tape<'_>, layer: usize, hidden: &Var, batch: &TokenBatch) -> Result<Option<Var>> {
        let Some(layer) = &self.layers[layer] else { return Ok(None) };
        let normed = layer.norm(tape, &self.parameters, layer.input_norm, hidden)?;
        layer.mixer.forward(tape, &self.parameters, &normed, batch).map(Some)
    }

    /// The head's weight, `[vocabulary, hidden]`, for operators that take it with the [`Model::hidden`] states: the embedding's
    /// where the two are tied.
    pub fn head_weight(&self, tape: &Tape<'_>) -> Var {
        self.parameters.var(tape, self.head)
    }

    /// From the final norm's output to logits: `[…, hidden]` to `[…, vocabulary]`.
    ///
    /// # Errors
    /// Those of the operator.
    pub fn head(&self, tape: &Tape<'_>, hidden: &Var) -> Result<Var> {
        Ok(ops::linear(tape, hidden, &self.parameters.var(tape, self.head), None)?)
    }

    /// Reads whole prompts, one document per row: the logits of each row's last token (f32 `[batch, vocabulary]`) and
    /// the cache to decode from.
    ///
    /// # Errors
    /// Those of the operators; an empty prompt.
    pub fn prefill(&self, batch: &TokenBatch) -> Result<(Tensor, Cache)> {
        if batch.time() == 0 {
            return Err(Error::Batch { message: "an empty prompt: give at least one token".to_owned() });
        }
        let tape = Tape::inference();
        let mut hidden = self.embed(&tape, &batch.tokens)?;
        let mut layers = Vec::with_capacity(self.layers.len());
        for (index, layer) in self.layers.iter().enumerate() {
            let mut cache = None;
            if let Some(layer) = layer {
                let normed = layer.norm(&tape, &self.parameters, layer.input_norm, &hidden)?;
                let (mixed, filled) = layer.mixer.prefill(&self.parameters, &normed, batch)?;
                hidden = ops::add(&tape, &hidden, &Var::constant(&mixed))?;
                cache = Some(filled);
            }
            // Nothing reads the last layer's other steps.
            if index + 1 == self.layers.len() {
                hidden = Var::constant(&ops::last_step(&hidden)?);
            }
            if let Some(layer) = layer {
                hidden = layer.mlp_block(&tape, &self.parameters, &hidden)?;
            }
            layers.push(cache);
        }
        let normed = self.final_norm(&tape, &hidden)?;
        let logits = self.head(&tape, &normed)?.cast(DType::F32)?;
        Ok((logits, Cache { layers, length: batch.time() }))
    }

    /// Reads one more token per row and returns its logits, f32 `[batch, vocabulary]`.
    ///
    /// # Errors
    /// Those of the operators; a batch of another size than the cache's.
    pub fn step(&self, tokens: &[u32], cache: &mut Cache) -> Result<Tensor> {
        let batch = tokens.len();
        let device = self.device();
        let positions = Tensor::from_slice(device, &[batch, 1], &vec![cache.length as u32; batch])?;
        cache.reserve(cache.length + 1)?;
        let logits = self.step_on_device(&Tensor::from_slice(device, &[batch, 1], tokens)?, &positions, cache)?;
        cache.length += 1;
        Ok(logits.cast(DType::F32)?)
    }

    /// As [`Model::step`], with nothing that depends on values: tokens and positions are u32 `[batch, 1]` on the device, the cache
    /// has room for them, and its length stays. The logits, `[batch, vocabulary]`, are in the activations' type.
    pub(crate) fn step_on_device(&self, tokens: &Tensor, positions: &Tensor, cache: &mut Cache) -> Result<Tensor> {
        let tape = Tape::inference();
        let mut hidden = self.embed(&tape, tokens)?;
        for (layer, cache) in self.layers.iter().zip(&mut cache.layers) {
            if let (Some(layer), Some(cache)) = (layer, cache) {
                let normed = layer.norm(&tape, &self.parameters, layer.input_norm, &hidden)?;
                let mixed = layer.mixer.step(&self.parameters, &normed, Some(&hidden), positions, cache)?;
                hidden = layer.mlp_step(&self.parameters, &Var::constant(&mixed))?;
            }
        }
        let normed = self.final_norm(&tape, &hidden)?;
        Ok(self.head(&tape, &normed)?.reshape(&tape, &[tokens.count(), self.config.vocabulary_size])?.tensor().clone())
    }

    /// The device that holds the weights.
    pub fn device(&self) -> &Device {
        self.parameters.get(self.embedding).value.device()
    }

    /// The residual stream after one layer.
    fn layer<'a>(&'a self, tape: &Tape<'a>, index: usize, hidden: Var, batch: &'a TokenBatch) -> Result<Var> {
        let Some(layer) = &self.layers[index] else { return Ok(hidden) };
        let _range = runtime::range(&format!("layer {index}"));
        if !self.checkpoint_layers {
            return layer.forward(tape, &self.parameters, &hidden, batch);
        }
        let parameters = &self.parameters;
        let mut outputs = tape.checkpoint(&[&hidden], move |tape, inputs| {
            layer.forward(tape, parameters, &inputs[0], batch).map(|output| vec![output]).map_err(Error::into_autograd)
        })?;
        Ok(outputs.swap_remove(0))
    }

    fn embed(&self, tape: &Tape<'_>, tokens: &Tensor) -> Result<Var> {
        Ok(ops::embedding(tape, tokens, &self.parameters.var(tape, self.embedding), self.activations)?)
    }

    fn final_norm(&self, tape: &Tape<'_>, hidden: &Var) -> Result<Var> {
        Ok(ops::rms_norm(tape, hidden, &self.parameters.var(tape, self.norm), self.config.rms_norm_epsilon)?)
    }
}

impl Cache {
    /// Tokens read so far.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Bytes of all layers' states.
    pub fn bytes(&self) -> usize {
        self.layers.iter().flatten().map(|cache| cache.bytes(self.length)).sum()
    }

    /// The layers' tensors, for tests that watch whether they stay in place.
    #[cfg(test)]
    pub(crate) fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.layers.iter().flatten().flat_map(MixerCache::tensors)
    }

    /// Makes room for `length` tokens; whether that moved any layer's cache.
    ///
    /// # Errors
    /// Out of memory.
    pub(crate) fn reserve(&mut self, length: usize) -> Result<bool> {
        let mut moved = false;
        for cache in self.layers.iter_mut().flatten() {
            moved |= cache.reserve(length)?;
        }
        Ok(moved)
    }

    /// Counts a token that was read by [`Model::step_on_device`].
    pub(crate) fn advance(&mut self) {
        self.length += 1;
    }
}

impl Layer {
    fn new(config: &ModelConfig, parameters: &Parameters, index: usize) -> Result<Option<Self>> {
        let Some(mixer) = Mixer::new(config, parameters, index)? else { return Ok(None) };
        let prefix = format!("model.layers.{index}.");
        let find = |name: &str| {
            let name = format!("{prefix}{name}");
            parameters.find(&name).ok_or(Error::NoSuchParameter { name })
        };
        Ok(Some(Self {
            input_norm: find("input_layernorm.weight")?,
            mixer,
            post_norm: find("post_attention_layernorm.weight")?,
            gate: Projection::new(parameters, &prefix, "mlp.gate_proj")?,
            up: Projection::new(parameters, &prefix, "mlp.up_proj")?,
            down: Projection::new(parameters, &prefix, "mlp.down_proj")?,
            epsilon: config.rms_norm_epsilon,
        }))
    }

    fn forward(&self, tape: &Tape<'_>, parameters: &Parameters, hidden: &Var, batch: &TokenBatch) -> Result<Var> {
        let normed = self.norm(tape, parameters, self.input_norm, hidden)?;
        let mixed = self.mixer.forward(tape, parameters, &normed, batch)?;
        let weight = parameters.var(tape, self.post_norm);
        let (normed, hidden) = ops::rms_norm_residual(tape, hidden, &mixed, &weight, self.epsilon)?;
        self.mlp(tape, parameters, &normed, &hidden)
    }

    fn mlp_block(&self, tape: &Tape<'_>, parameters: &Parameters, hidden: &Var) -> Result<Var> {
        self.mlp(tape, parameters, &self.norm(tape, parameters, self.post_norm, hidden)?, hidden)
    }

    /// The MLP of the normalised residual stream, added to the stream.
    fn mlp(&self, tape: &Tape<'_>, parameters: &Parameters, normed: &Var, hidden: &Var) -> Result<Var> {
        let gate = self.gate.apply(tape, parameters, normed)?;
        let up = self.up.apply(tape, parameters, normed)?;
        let activated = ops::swiglu(tape, &gate, &up)?;
        self.down.apply_onto(tape, parameters, hidden, &activated)
    }

    /// As [`Layer::mlp_block`] without a tape, in fewer launches on GPUs.
    fn mlp_step(&self, parameters: &Parameters, hidden: &Var) -> Result<Var> {
        let tape = Tape::inference();
        if self.gate.bias.is_some() || self.up.bias.is_some() {
            return self.mlp_block(&tape, parameters, hidden);
        }
        let normed = self.norm(&tape, parameters, self.post_norm, hidden)?;
        let value = |projection: &Projection| &parameters.get(projection.weight).value;
        let activated = ops::linear_swiglu(&normed, value(&self.gate), value(&self.up))?;
        self.down.apply_onto(&tape, parameters, hidden, &Var::constant(&activated))
    }

    fn norm(&self, tape: &Tape<'_>, parameters: &Parameters, weight: ParameterId, hidden: &Var) -> Result<Var> {
        Ok(ops::rms_norm(tape, hidden, &parameters.var(tape, weight), self.epsilon)?)
    }
}
