//! Fresh weights, and the graft: a hybrid whose new Mamba mixers start from the teacher's attention.
//!
//! The graft is MIL, "Mamba in the Llama" (Wang et al. 2024), in the form of M1 and Apriel-H1: with `[z; x; B; C]` the
//! rows of in_proj, `x ← W_v`, `B ← W_k`, `C ← W_q`, `out_proj ← W_o`; everything else of the mixer is fixed or random.

use std::path::PathBuf;

use autograd::ops::MOST_GPU_STATES;
use autograd::{DType, Parameter, Parameters, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use runtime::Device;

use crate::architecture::{parameter_specs, size_keys};
use crate::checkpoint::ParameterSpec;
use crate::config::{MambaConfig, MixerKind, ModelConfig};
use crate::model::Model;
use crate::{Error, Result};

/// How a graft is made.
#[derive(Clone, Debug, PartialEq)]
pub struct GraftOptions {
    /// Seed of the random parts. Each layer draws from its own stream, so that its weights do not depend on which other
    /// layers are replaced.
    pub seed: u64,
    /// What new mixers start as.
    pub start: Start,
}

/// What a new mixer starts as. Every one is a mixer of the published form, in a checkpoint of the published form.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Start {
    /// As published. Two things about it look unintended: of W_q's chunks of `d_state` rows only one in
    /// `head size / d_state` meets its own keys after the mixer's repeat, and dt_proj's bias, drawn so that softplus of it
    /// lies between `dt_min` and `dt_max`, enters twice.
    #[default]
    Paper,
    /// Chunks of W_q (rows) and W_o (columns) are permuted so that every query chunk meets its own key and value chunk.
    Aligned,
    /// The same, and dt_proj's bias is drawn so that softplus of twice the bias lies between `dt_min` and `dt_max`.
    AlignedBiasOnce,
    /// The same, and the convolution passes the current token on: it begins without the tokens before it and without bias.
    IdentityConvolution,
    /// The same, and the state is as wide as a head (`d_state` = head size), so that a query meets the whole of its key.
    /// Decay rates are those of 16 states, repeated. Costs as many times the scan's work as there are chunks in a head.
    WholeHead,
}

impl Start {
    fn aligns(self) -> bool {
        self != Self::Paper
    }

    fn counts_bias_once(self) -> bool {
        !matches!(self, Self::Paper | Self::Aligned)
    }

    fn passes_current_token(self) -> bool {
        matches!(self, Self::IdentityConvolution | Self::WholeHead)
    }
}

/// Every parameter of a new model; see [`Model::random`].
pub(crate) fn random_parameters(config: &ModelConfig, seed: u64, device: &Device) -> Result<Parameters> {
    let deviation = config.source.get("initializer_range").and_then(|value| value.as_f64()).unwrap_or(0.02);
    let mut parameters = Parameters::default();
    for (index, spec) in parameter_specs(config, |_| DType::F32).into_iter().enumerate() {
        let mut random = stream(seed, index as u64);
        // Memory first: sizes in a configuration may be beyond any machine, and that is an error, not an abort.
        let mut host =
            Tensor::zeros(&Device::cpu(), &spec.shape, DType::F32).map_err(|error| too_large(&spec, &error))?;
        let values = host.make_mut::<f32>()?;
        match mamba_part(&spec, config) {
            Some((geometry, part)) => mamba_values(values, geometry, part, config.hidden_size, &mut random),
            None => match spec.shape.len() {
                1 if spec.name.ends_with(".bias") => values.fill(0.0),
                1 => values.fill(1.0),
                _ => values.fill_with(|| (normal(&mut random) * deviation) as f32),
            },
        }
        let value = if device.is_cpu() { host } else { Tensor::from_slice(device, &spec.shape, values)? };
        push(&mut parameters, &spec, value);
    }
    Ok(parameters)
}

fn too_large(spec: &ParameterSpec, error: &autograd::Error) -> Error {
    Error::Configuration {
        path: PathBuf::from("config.json"),
        key: size_keys(&spec.name).to_owned(),
        problem: format!("give the tensor {} the shape {:?}: {error}; make them smaller", spec.name, spec.shape),
    }
}

/// A hybrid of `base` with the attention of `layers` replaced by Mamba mixers that start from the same layers of
/// `teacher`; everything else comes from `base` (the teacher itself for a first graft, the previous hybrid for a later
/// stage). All parameters of the result are f32 and trainable; those that need no conversion share the base's memory
/// until they are first updated. Biases of replaced attention are lost: see [`layers_losing_biases`].
///
/// # Errors
/// [`Error::Graft`] for a layer that does not exist, is named twice, or has no attention in base or teacher; for head
/// sizes that `d_state` does not divide; for a teacher of another geometry; for more states than the teacher's device scans.
pub fn graft(base: &Model, teacher: &Model, layers: &[usize], options: &GraftOptions) -> Result<Model> {
    check_layers(base, teacher, layers)?;
    if !layers.is_empty() {
        check_states(&base.config, options.start, &teacher_device(teacher))?;
    }
    let config = hybrid_config(&base.config, layers, options.start);
    if let Some(geometry) = &config.mamba {
        check_geometry(&config, geometry)?;
    }
    let mut parameters = Parameters::default();
    for spec in parameter_specs(&config, |_| DType::F32) {
        let new_mixer = layers.iter().find(|layer| spec.name.starts_with(&format!("model.layers.{layer}.mixer.")));
        let value = match new_mixer {
            Some(&layer) => grafted(&spec, &config, teacher, layer, options)?,
            None => {
                let name = &spec.name;
                let id = base.parameters.find(name).ok_or_else(|| Error::NoSuchParameter { name: name.clone() })?;
                base.parameters.get(id).value.cast(DType::F32)?
            }
        };
        push(&mut parameters, &spec, value);
    }
    Model::new(config, parameters)
}

/// The configuration of such a hybrid. A base without Mamba layers gives the geometry that MIL needs: one scan channel
/// per query dimension, one x and B channel per key dimension. One with Mamba layers has its geometry already.
pub fn hybrid_config(base: &ModelConfig, layers: &[usize], start: Start) -> ModelConfig {
    let mut config = base.clone();
    for &layer in layers {
        config.mixers[layer] = MixerKind::Mamba;
    }
    config.mamba = Some(base.mamba.clone().unwrap_or_else(|| default_geometry(base, start)));
    config
}

/// That a device runs the mixers that a graft on `base` makes: GPUs scan at most [`MOST_GPU_STATES`] states of a channel.
///
/// # Errors
/// [`Error::Graft`] for more.
pub fn check_states(base: &ModelConfig, start: Start, device: &Device) -> Result<()> {
    let (states, advice) = match &base.mamba {
        Some(geometry) => (geometry.d_state, "like those that the model has (ssm_cfg.d_state): use --device cpu"),
        None => (
            default_geometry(base, start).d_state,
            "as many as a head has dimensions (--init whole_head, model.init): use another --init, or --device cpu",
        ),
    };
    if device.is_cpu() || states <= MOST_GPU_STATES {
        return Ok(());
    }
    Err(Error::Graft {
        message: format!(
            "{device} scans channels of at most {MOST_GPU_STATES} states, and new mixers would have {states}, {advice}"
        ),
    })
}

/// Which of `layers` have biases in the teacher's attention that are not zero. A graft loses them: the mixer's projections
/// have none (neither has the published teacher), so that what they did is for training to learn again.
///
/// # Errors
/// When a bias cannot be read from its device.
pub fn layers_losing_biases(teacher: &Model, layers: &[usize]) -> Result<Vec<usize>> {
    let mut losing = Vec::new();
    for &layer in layers {
        for name in ["q", "k", "v", "o"] {
            let Some(id) = teacher.parameters.find(&format!("model.layers.{layer}.self_attn.{name}_proj.bias")) else {
                continue;
            };
            if teacher.parameters.get(id).value.to_f32_vec()?.iter().any(|&bias| bias != 0.0) {
                losing.push(layer);
                break;
            }
        }
    }
    Ok(losing)
}

fn default_geometry(config: &ModelConfig, start: Start) -> MambaConfig {
    MambaConfig {
        d_inner: config.attention_heads * config.head_size,
        d_xb: config.key_value_heads * config.head_size,
        d_state: if start == Start::WholeHead { config.head_size } else { RATES },
        d_conv: 4,
        dt_rank: config.hidden_size.div_ceil(16),
        conv_bias: true,
        dt_proj_bias: true,
        repeat_before_conv: true,
        dt_min: 1e-3,
        dt_max: 0.1,
        dt_init_floor: 1e-4,
    }
}

fn check_layers(base: &Model, teacher: &Model, layers: &[usize]) -> Result<()> {
    let fail = |message: String| Err(Error::Graft { message });
    let count = base.config.mixers.len();
    for (index, &layer) in layers.iter().enumerate() {
        if layer >= count {
            return fail(format!(
                "layer {layer} does not exist: the model has layers 0 to {}",
                count.saturating_sub(1)
            ));
        }
        if layers[..index].contains(&layer) {
            return fail(format!("layer {layer} is named twice"));
        }
        if base.config.mixers[layer] != MixerKind::Attention {
            return fail(format!("layer {layer} has no attention to replace (it is {:?})", base.config.mixers[layer]));
        }
        if teacher.config.mixers.get(layer) != Some(&MixerKind::Attention) {
            return fail(format!("layer {layer} of the teacher has no attention to start from"));
        }
    }
    Ok(())
}

fn check_geometry(config: &ModelConfig, geometry: &MambaConfig) -> Result<()> {
    let queries = config.attention_heads * config.head_size;
    let keys = config.key_value_heads * config.head_size;
    if geometry.d_inner != queries || geometry.d_xb != keys {
        return Err(Error::Graft {
            message: format!(
                "d_inner {} and d_xb {} must be the attention's query width {queries} and key width {keys}",
                geometry.d_inner, geometry.d_xb
            ),
        });
    }
    if !config.head_size.is_multiple_of(geometry.d_state) {
        return Err(Error::Graft {
            message: format!(
                "heads of {} dimensions are no whole number of {}-wide chunks",
                config.head_size, geometry.d_state
            ),
        });
    }
    Ok(())
}

/// One parameter of a new mixer.
fn grafted(
    spec: &ParameterSpec,
    config: &ModelConfig,
    teacher: &Model,
    layer: usize,
    options: &GraftOptions,
) -> Result<Tensor> {
    let attention = |name: &str| -> Result<Tensor> {
        let name = format!("model.layers.{layer}.self_attn.{name}_proj.weight");
        let id = teacher.parameters.find(&name).ok_or(Error::NoSuchParameter { name })?;
        Ok(teacher.parameters.get(id).value.cast(DType::F32)?)
    };
    let (geometry, part) = mamba_part(spec, config)
        .ok_or_else(|| Error::Graft { message: format!("{} is no parameter of a mixer", spec.name) })?;
    let hidden = config.hidden_size;
    // Part of the stream's number: a parameter's values must not depend on the order in which parameters are made.
    let mut random = stream(options.seed, (layer as u64) << 8 | part as u64);
    let device = teacher_device(teacher);
    let values = match part {
        Part::InProj => {
            let (query, key, value) = (attention("q")?, attention("k")?, attention("v")?);
            check_width(&query, geometry.d_inner * hidden)?;
            check_width(&key, geometry.d_xb * hidden)?;
            check_width(&value, geometry.d_xb * hidden)?;
            let mut rows = vec![0.0; geometry.d_inner * hidden];
            uniform(&mut rows, (hidden as f64).powf(-0.5), &mut random);
            rows.extend_from_slice(&value.to_f32_vec()?);
            rows.extend_from_slice(&key.to_f32_vec()?);
            let query = query.to_f32_vec()?;
            if options.start.aligns() {
                for chunk in aligned_chunks(config, geometry) {
                    rows.extend_from_slice(&query[chunk * geometry.d_state * hidden..][..geometry.d_state * hidden]);
                }
            } else {
                rows.extend_from_slice(&query);
            }
            rows
        }
        Part::OutProj => {
            let output = attention("o")?;
            check_width(&output, hidden * geometry.d_inner)?;
            if !options.start.aligns() {
                return Ok(output);
            }
            let output = output.to_f32_vec()?;
            let chunks = aligned_chunks(config, geometry);
            let mut columns = Vec::with_capacity(output.len());
            for row in output.chunks_exact(geometry.d_inner) {
                for chunk in &chunks {
                    columns.extend_from_slice(&row[chunk * geometry.d_state..][..geometry.d_state]);
                }
            }
            columns
        }
        _ => {
            let mut values = vec![0.0; spec.shape.iter().product()];
            mamba_values(&mut values, geometry, part, hidden, &mut random);
            match part {
                // Half of a bias that enters twice.
                Part::DtProjBias if options.start.counts_bias_once() => {
                    values.iter_mut().for_each(|bias| *bias *= 0.5);
                }
                Part::ConvolutionWeight if options.start.passes_current_token() => {
                    for taps in values.chunks_exact_mut(geometry.d_conv) {
                        taps.fill(0.0);
                        // The last tap is the current token's.
                        if let Some(current) = taps.last_mut() {
                            *current = 1.0;
                        }
                    }
                }
                Part::ConvolutionBias if options.start.passes_current_token() => values.fill(0.0),
                Part::ALog if options.start == Start::WholeHead => {
                    for (index, value) in values.iter_mut().enumerate() {
                        *value = logarithm(index % geometry.d_state % RATES + 1);
                    }
                }
                _ => {}
            }
            values
        }
    };
    Ok(Tensor::from_slice(&device, &spec.shape, &values)?)
}

/// For every chunk of C (and of out_proj's columns) the teacher's query chunk that belongs there, so that after the
/// mixer's repeat it meets the keys it met in attention: position `(g · s_count + s) · r + a` takes chunk
/// `s_count · (r · g + a) + s` (key head g, sub-chunk s, query head a of the group).
fn aligned_chunks(config: &ModelConfig, geometry: &MambaConfig) -> Vec<usize> {
    let sub_chunks = config.head_size / geometry.d_state;
    let repeats = config.attention_heads / config.key_value_heads;
    let mut chunks = Vec::with_capacity(geometry.d_inner / geometry.d_state);
    for key_head in 0..config.key_value_heads {
        for sub_chunk in 0..sub_chunks {
            for query_head in 0..repeats {
                chunks.push(sub_chunks * (repeats * key_head + query_head) + sub_chunk);
            }
        }
    }
    chunks
}

/// States of a published mixer, whose decay rates are 1 to 16.
const RATES: usize = 16;

/// Which parameter of a mixer a name is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    InProj,
    DtInProj,
    DtProjWeight,
    DtProjBias,
    ConvolutionWeight,
    ALog,
    D,
    OutProj,
    ConvolutionBias,
}

fn mamba_part<'a>(spec: &ParameterSpec, config: &'a ModelConfig) -> Option<(&'a MambaConfig, Part)> {
    let (_, name) = spec.name.split_once(".mixer.")?;
    let part = match name {
        "in_proj.weight" => Part::InProj,
        "dt_in_proj.weight" => Part::DtInProj,
        "dt_proj.weight" => Part::DtProjWeight,
        "dt_proj.bias" => Part::DtProjBias,
        "conv1d.weight" => Part::ConvolutionWeight,
        "conv1d.bias" => Part::ConvolutionBias,
        "A_log" => Part::ALog,
        "D" => Part::D,
        "out_proj.weight" => Part::OutProj,
        _ => return None,
    };
    Some((config.mamba.as_ref()?, part))
}

/// Values of a mixer's parameter that owe nothing to attention, as PyTorch's constructors and M1 draw them.
fn mamba_values(values: &mut [f32], geometry: &MambaConfig, part: Part, hidden: usize, random: &mut ChaCha8Rng) {
    match part {
        Part::InProj | Part::DtInProj => uniform(values, (hidden as f64).powf(-0.5), random),
        Part::OutProj => uniform(values, (geometry.d_inner as f64).powf(-0.5), random),
        Part::DtProjWeight => uniform(values, (geometry.dt_rank as f64).powf(-0.5), random),
        Part::DtProjBias => values.fill_with(|| step_size_bias(geometry, random) as f32),
        Part::ConvolutionWeight | Part::ConvolutionBias => uniform(values, (geometry.d_conv as f64).powf(-0.5), random),
        Part::ALog => {
            for (index, value) in values.iter_mut().enumerate() {
                *value = logarithm(index % geometry.d_state + 1);
            }
        }
        Part::D => values.fill(1.0),
    }
}

/// `ln(number)` from f32 parts: the logarithm of a mantissa between √½ and √2 plus that of the power of two. PyTorch's
/// f32 logarithm gives the same bits for all of 1 to 16, where the nearest f32 is another at 7; published hybrids start
/// from those.
fn logarithm(number: usize) -> f32 {
    let exponent = (number as f64 / std::f64::consts::SQRT_2).log2().floor() as i32 + 1;
    let mantissa = number as f64 / 2f64.powi(exponent);
    mantissa.ln() as f32 + exponent as f32 * std::f32::consts::LN_2
}

/// The bias whose softplus is a step size drawn log-uniformly from `[dt_min, dt_max]`.
fn step_size_bias(geometry: &MambaConfig, random: &mut ChaCha8Rng) -> f64 {
    let (low, high) = (geometry.dt_min.ln(), geometry.dt_max.ln());
    let step = (unit(random) * (high - low) + low).exp().max(geometry.dt_init_floor);
    step + (-(-step).exp_m1()).ln()
}

fn uniform(values: &mut [f32], bound: f64, random: &mut ChaCha8Rng) {
    values.fill_with(|| ((2.0 * unit(random) - 1.0) * bound) as f32);
}

/// Uniform in [0, 1) with 53 random bits.
fn unit(random: &mut ChaCha8Rng) -> f64 {
    (random.next_u64() >> 11) as f64 * (0.5f64).powi(53)
}

/// Standard normal (Box and Muller).
fn normal(random: &mut ChaCha8Rng) -> f64 {
    let radius = (-2.0 * (1.0 - unit(random)).ln()).sqrt();
    radius * (std::f64::consts::TAU * unit(random)).cos()
}

fn stream(seed: u64, number: u64) -> ChaCha8Rng {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(number);
    random
}

fn push(parameters: &mut Parameters, spec: &ParameterSpec, value: Tensor) {
    let name = spec.name.clone();
    parameters.push(Parameter { name, value, trainable: spec.trainable, decay: spec.decay, rate: 1.0 });
}

fn check_width(tensor: &Tensor, count: usize) -> Result<()> {
    if tensor.count() == count {
        return Ok(());
    }
    Err(Error::Graft {
        message: format!(
            "the teacher's attention has a weight of shape {:?}, expected {count} elements",
            tensor.shape()
        ),
    })
}

fn teacher_device(teacher: &Model) -> Device {
    teacher.parameters.iter().next().map_or_else(Device::cpu, |(_, parameter)| parameter.value.device().clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(heads: usize, key_value_heads: usize, head_size: usize) -> ModelConfig {
        let json = serde_json::json!({
            "model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_size": 24, "head_dim": head_size,
            "intermediate_size": 32, "num_attention_heads": heads, "num_key_value_heads": key_value_heads,
            "num_hidden_layers": 3, "vocab_size": 11, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "max_position_embeddings": 64, "tie_word_embeddings": false,
        });
        ModelConfig::from_json(json.as_object().unwrap()).unwrap()
    }

    #[test]
    fn alignment_pairs_every_query_chunk_with_its_own_key_chunk() {
        // The 15B teacher's geometry: 32 query heads, 8 key heads, head size 128.
        let config = config(32, 8, 128);
        let geometry = default_geometry(&config, Start::Aligned);
        let (sub_chunks, repeats) = (8, 4);
        let met_by_mixer = |position: usize| position / repeats;
        let met_by_attention = |chunk: usize| chunk / sub_chunks / repeats * sub_chunks + chunk % sub_chunks;
        let chunks = aligned_chunks(&config, &geometry);
        let mut seen = chunks.clone();
        seen.sort_unstable();
        assert_eq!(seen, (0..256).collect::<Vec<_>>());
        assert!(chunks.iter().enumerate().all(|(position, &chunk)| met_by_mixer(position) == met_by_attention(chunk)));
        let published = (0..256).filter(|&chunk| met_by_mixer(chunk) == met_by_attention(chunk)).count();
        assert_eq!(published * 16, 512, "the published order pairs 512 of 4096 channels");
    }

    #[test]
    fn a_graft_takes_attention_apart_and_leaves_the_rest() {
        let teacher = Model::random(config(4, 2, 16), 7, &Device::cpu()).unwrap();
        let options = GraftOptions { seed: 3, start: Start::Paper };
        let hybrid = graft(&teacher, &teacher, &[1], &options).unwrap();
        let value = |model: &Model, name: &str| {
            model.parameters.get(model.parameters.find(name).unwrap()).value.to_f32_vec().unwrap()
        };
        let in_proj = value(&hybrid, "model.layers.1.mixer.in_proj.weight");
        let part = |rows: std::ops::Range<usize>| &in_proj[rows.start * 24..rows.end * 24];
        assert_eq!(part(64..96), value(&teacher, "model.layers.1.self_attn.v_proj.weight"));
        assert_eq!(part(96..128), value(&teacher, "model.layers.1.self_attn.k_proj.weight"));
        assert_eq!(part(128..192), value(&teacher, "model.layers.1.self_attn.q_proj.weight"));
        let bound = (24f32).powf(-0.5);
        assert!(part(0..64).iter().all(|z| z.abs() <= bound));
        assert_eq!(
            value(&hybrid, "model.layers.1.mixer.out_proj.weight"),
            value(&teacher, "model.layers.1.self_attn.o_proj.weight")
        );
        assert_eq!(value(&hybrid, "model.layers.1.mixer.A_log")[..2], [0.0, 2f32.ln()]);
        assert_eq!(value(&hybrid, "model.embed_tokens.weight"), value(&teacher, "model.embed_tokens.weight"));
        assert!(hybrid.parameters.find("model.layers.1.self_attn.q_proj.weight").is_none());
        for bias in value(&hybrid, "model.layers.1.mixer.dt_proj.bias") {
            let step = bias.exp().ln_1p();
            assert!((0.000_99..0.101).contains(&step), "{step}");
        }
        // Weight and bias of the convolution have one distribution but numbers of their own.
        let (weight, bias) =
            (value(&hybrid, "model.layers.1.mixer.conv1d.weight"), value(&hybrid, "model.layers.1.mixer.conv1d.bias"));
        assert!(bias.iter().all(|bias| bias.abs() <= 0.5));
        assert!(weight.iter().zip(&bias).all(|(weight, bias)| weight != bias));
        let other = graft(&teacher, &teacher, &[0, 1], &options).unwrap();
        assert_eq!(in_proj, value(&other, "model.layers.1.mixer.in_proj.weight"));
    }

    #[test]
    fn starts_differ_where_they_say_and_nowhere_else() {
        let teacher = Model::random(config(4, 2, 32), 7, &Device::cpu()).unwrap();
        let of = |start| graft(&teacher, &teacher, &[1], &GraftOptions { seed: 3, start }).unwrap();
        let value = |model: &Model, name: &str| {
            let name = format!("model.layers.1.mixer.{name}");
            model.parameters.get(model.parameters.find(&name).unwrap()).value.to_f32_vec().unwrap()
        };
        let same = |one: &Model, other: &Model, but: &[&str]| {
            for ((_, one), (_, other)) in one.parameters.iter().zip(other.parameters.iter()) {
                let name = one.name.strip_prefix("model.layers.1.mixer.").unwrap_or(&one.name);
                let equal = one.value.to_f32_vec().unwrap() == other.value.to_f32_vec().unwrap();
                assert_eq!(equal, !but.contains(&name), "{}", one.name);
            }
        };
        let [paper, aligned, once, identity, whole] =
            [Start::Paper, Start::Aligned, Start::AlignedBiasOnce, Start::IdentityConvolution, Start::WholeHead]
                .map(of);
        same(&paper, &aligned, &["in_proj.weight", "out_proj.weight"]);
        same(&aligned, &once, &["dt_proj.bias"]);
        same(&once, &identity, &["conv1d.weight", "conv1d.bias"]);
        for bias in value(&once, "dt_proj.bias") {
            let step = (2.0 * bias).exp().ln_1p();
            assert!((0.000_99..0.101).contains(&step), "{step}");
        }
        assert!(value(&identity, "conv1d.weight").chunks(4).all(|taps| taps == [0.0, 0.0, 0.0, 1.0]));
        // A head's chunks are whole, so that none has to move.
        assert_eq!(whole.config.mamba.as_ref().unwrap().d_state, 32);
        assert_eq!(value(&whole, "in_proj.weight"), value(&paper, "in_proj.weight"));
        assert_eq!(value(&whole, "out_proj.weight"), value(&paper, "out_proj.weight"));
        let rates = value(&whole, "A_log");
        assert_eq!(rates.len(), 128 * 32);
        assert!(rates.chunks(16).all(|rates| rates[0] == 0.0 && rates[15] == logarithm(16)));
        // A hybrid's geometry stays what it is.
        let later = graft(&whole, &teacher, &[2], &GraftOptions { seed: 3, start: Start::Aligned }).unwrap();
        assert_eq!(later.config.mamba.as_ref().unwrap().d_state, 32);
    }

    #[test]
    #[expect(clippy::approx_constant, reason = "these are the bits of a file, not constants of mathematics")]
    fn logarithms_have_the_bits_that_fast_llm_writes() {
        // A_log of a mixer that Fast-LLM's converter made (PyTorch, f32).
        let written: [f32; 16] = [
            0.0,
            0.693_147_2,
            1.098_612_3,
            1.386_294_4,
            1.609_438,
            1.791_759_5,
            1.945_910_2,
            2.079_441_5,
            2.197_224_6,
            2.302_585_1,
            2.397_895_3,
            2.484_906_7,
            2.564_949_3,
            2.639_057_4,
            2.708_050_3,
            2.772_588_7,
        ];
        for (number, written) in (1..).zip(written) {
            assert_eq!(logarithm(number).to_bits(), written.to_bits(), "ln {number}");
        }
        for number in 17..=256 {
            assert!((f64::from(logarithm(number)) - (number as f64).ln()).abs() <= 5e-7, "ln {number}");
        }
    }

    #[test]
    fn layers_whose_biases_are_lost_are_found() {
        let mut source = config(4, 2, 16).source;
        source.insert("model_type".to_owned(), "llama".into());
        source.insert("attention_bias".to_owned(), true.into());
        let mut teacher = Model::random(ModelConfig::from_json(&source).unwrap(), 7, &Device::cpu()).unwrap();
        assert_eq!(layers_losing_biases(&teacher, &[0, 1, 2]).unwrap(), [0; 0], "biases of zero are no loss");
        for (name, width) in [("0.self_attn.o_proj", 24), ("2.self_attn.k_proj", 32)] {
            let id = teacher.parameters.find(&format!("model.layers.{name}.bias")).unwrap();
            let mut bias = vec![0.0; width];
            bias[width - 1] = -0.5;
            teacher.parameters.set(id, Tensor::from_slice(&Device::cpu(), &[width], &bias).unwrap()).unwrap();
        }
        assert_eq!(layers_losing_biases(&teacher, &[0, 1, 2]).unwrap(), [0, 2]);
        assert_eq!(layers_losing_biases(&teacher, &[2, 1]).unwrap(), [2]);
        let options = GraftOptions { seed: 3, start: Start::Paper };
        let hybrid = graft(&teacher, &teacher, &[0], &options).unwrap();
        assert!(hybrid.parameters.find("model.layers.0.mixer.out_proj.bias").is_none());
        assert!(hybrid.parameters.find("model.layers.2.self_attn.k_proj.bias").is_some());
    }

    #[test]
    fn sizes_beyond_memory_are_an_error_that_names_their_keys() {
        let mut source = config(4, 2, 16).source;
        source.insert("vocab_size".to_owned(), (1 << 24).into());
        source.insert("hidden_size".to_owned(), (1 << 24).into());
        let config = ModelConfig::from_json(&source).unwrap();
        // 2⁵⁰ bytes.
        let message = Model::random(config, 1, &Device::cpu()).unwrap_err().to_string();
        assert!(
            message.contains("config.json: vocab_size and hidden_size: give the tensor model.embed_tokens"),
            "{message}"
        );
        assert!(message.contains("out of memory on cpu: 1125899906842624 bytes"), "{message}");
    }

    #[test]
    fn layers_that_cannot_be_replaced_are_named() {
        let teacher = Model::random(config(4, 2, 16), 7, &Device::cpu()).unwrap();
        let options = GraftOptions { seed: 3, start: Start::Aligned };
        let message = |layers: &[usize]| graft(&teacher, &teacher, layers, &options).unwrap_err().to_string();
        assert!(message(&[3]).contains("layer 3 does not exist: the model has layers 0 to 2"));
        assert!(message(&[1, 1]).contains("layer 1 is named twice"));
        let hybrid = graft(&teacher, &teacher, &[1], &options).unwrap();
        assert!(graft(&hybrid, &teacher, &[1], &options).unwrap_err().to_string().contains("no attention to replace"));
    }

    #[test]
    fn states_that_gpus_do_not_scan_are_refused_before_anything_runs() {
        let (cpu, sim) = (Device::cpu(), "sim".parse::<Device>().unwrap());
        let teacher = |head_size, device: &Device| Model::random(config(4, 2, head_size), 7, device).unwrap();
        let on = |teacher: &Model, base: &Model, layer, start| {
            graft(base, teacher, &[layer], &GraftOptions { seed: 3, start })
        };
        let (fits, wide) = (teacher(MOST_GPU_STATES, &sim), teacher(2 * MOST_GPU_STATES, &sim));
        on(&fits, &fits, 1, Start::WholeHead).unwrap();
        on(&wide, &wide, 1, Start::IdentityConvolution).unwrap();
        let message = on(&wide, &wide, 1, Start::WholeHead).unwrap_err().to_string();
        let expected = format!(
            "cannot graft: sim scans channels of at most {MOST_GPU_STATES} states, and new mixers would have {}, as many as \
             a head has dimensions (--init whole_head, model.init): use another --init, or --device cpu",
            2 * MOST_GPU_STATES
        );
        assert_eq!(message, expected);
        let wide = teacher(2 * MOST_GPU_STATES, &cpu);
        let hybrid = on(&wide, &wide, 1, Start::WholeHead).unwrap();
        // What is a hybrid already keeps its geometry, whatever the start.
        let message = check_states(&hybrid.config, Start::Paper, &sim).unwrap_err().to_string();
        assert!(message.ends_with("like those that the model has (ssm_cfg.d_state): use --device cpu"), "{message}");
    }
}
