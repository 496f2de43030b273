//! Models of one architecture as one: every weight between theirs.
//!
//! Tensor by tensor from mapped files, a piece at a time, so that memory does not grow with the models.

use std::path::{Path, PathBuf};

use rayon::prelude::*;

use crate::architecture::parameter_specs;
use crate::checkpoint::{
    NewFolder, SaveOptions, StoredType, TensorToWrite, View, WeightFiles, carry, check, file_name, first_not_finite,
    from_f32, not_finite, to_f32, write_tensors,
};
use crate::config::ModelConfig;
use crate::{Error, Result, json};

/// Elements that are merged and written at a time.
const CHUNK: usize = 1 << 20;
/// How far the weights' sum may be from 1.
const SUM_TOLERANCE: f64 = 1e-6;
/// Cosine above which two tensors count as parallel: the sphere's formula divides by the sine.
const PARALLEL: f64 = 0.9995;

/// How weights are put together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MergeMethod {
    /// The weighted mean.
    Linear,
    /// Of two models: along the arc between two tensors, taken as vectors (Shoemake 1985). Between nearly parallel
    /// tensors it is the weighted mean.
    Slerp,
}

/// What a merge has made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MergeSummary {
    /// Tensors written.
    pub tensors: usize,
    /// Numbers written.
    pub parameters: u64,
    /// Bytes of weights written.
    pub bytes: u64,
}

/// A model that is merged, with its share.
#[derive(Clone, Debug, PartialEq)]
pub struct MergeSource {
    /// Its folder.
    pub folder: PathBuf,
    /// Its weight. All sum to 1.
    pub weight: f64,
}

/// Makes `output` a folder of the models of `sources`, merged.
///
/// Sums are formed in f64 from the weights widened to f32 and rounded once, to the element type that the tensor has in
/// the first model, whose configuration and other files (tokenizer, templates, code) are carried over. The folder appears
/// whole or not at all. `progress` is called before each tensor with the bytes written and the bytes in all.
///
/// # Errors
/// [`Error::Merge`] for weights that do not sum to 1, fewer than two models, slerp of other than two, and models whose
/// configurations compute differently; [`Error::MissingTensor`], [`Error::TensorShape`] and
/// [`Error::UnexpectedTensors`] for models of different shapes; [`Error::Tensor`] for a weight that is not finite;
/// [`Error::Format`] when `output` exists and is not empty; [`Error::Io`] when something cannot be written.
pub fn merge(
    sources: &[MergeSource],
    method: MergeMethod,
    output: &Path,
    mut progress: impl FnMut(u64, u64),
) -> Result<MergeSummary> {
    let first = check_sources(sources, method)?;
    let mut config = ModelConfig::read(&first.folder)?;
    let files = sources.iter().map(|source| WeightFiles::open(&source.folder)).collect::<Result<Vec<_>>>()?;
    files[0].resolve(&mut config)?;
    let specs = parameter_specs(&config, |name| files[0].stored_dtype(name));
    for source in &sources[1..] {
        check_configuration(&config, first, source)?;
    }
    let views = files.iter().map(|files| check(files, &config, &specs)).collect::<Result<Vec<_>>>()?;
    let mut tensors = Vec::with_capacity(specs.len());
    for (spec, view) in specs.iter().zip(&views[0]) {
        let name = file_name(&config, &spec.name);
        tensors.push(TensorToWrite { name, dtype: view.float_type()?, shape: spec.shape.clone() });
    }
    let bytes = tensors.iter().map(TensorToWrite::bytes).sum();
    let shares: Vec<f64> = sources.iter().map(|source| source.weight).collect();

    let new = NewFolder::create(output, false)?;
    json::write(&new.path().join("config.json"), &config.to_json())?;
    let mut done = 0;
    write_tensors(new.path(), &tensors, SaveOptions::default().shard_bytes, |index, write| {
        progress(done, bytes);
        done += tensors[index].bytes();
        let parts: Vec<Part<'_>> = views.iter().map(|views| Part::new(&views[index])).collect::<Result<_>>()?;
        let factors = match method {
            MergeMethod::Linear => shares.clone(),
            MergeMethod::Slerp => arc_factors(&parts[0], &parts[1], shares[1]).to_vec(),
        };
        merge_tensor(&parts, &factors, &tensors[index], write)
    })?;
    carry(&first.folder, new.path())?;
    new.commit()?;
    Ok(MergeSummary { tensors: tensors.len(), parameters: tensors.iter().map(TensorToWrite::elements).sum(), bytes })
}

fn check_sources(sources: &[MergeSource], method: MergeMethod) -> Result<&MergeSource> {
    let refuse = |message: String| Err(Error::Merge { message });
    let [first, _, ..] = sources else {
        return refuse(format!("{} model(s) given: expected at least two", sources.len()));
    };
    if method == MergeMethod::Slerp && sources.len() != 2 {
        return refuse(format!("slerp is between two models, {} are given: use linear", sources.len()));
    }
    for source in sources {
        if !source.weight.is_finite() {
            return refuse(format!("the weight of {} is {}", source.folder.display(), source.weight));
        }
        if method == MergeMethod::Slerp && !(0.0..=1.0).contains(&source.weight) {
            return refuse(format!(
                "slerp takes weights from 0 to 1, {} has {}",
                source.folder.display(),
                source.weight
            ));
        }
    }
    let sum: f64 = sources.iter().map(|source| source.weight).sum();
    if (sum - 1.0).abs() > SUM_TOLERANCE {
        return refuse(format!("the weights sum to {sum}: expected 1"));
    }
    Ok(first)
}

/// That another model computes with its weights what the first one does. Shapes are checked tensor by tensor.
fn check_configuration(config: &ModelConfig, first: &MergeSource, source: &MergeSource) -> Result<()> {
    let other = ModelConfig::read(&source.folder)?;
    let differences = [
        ("mixers", config.mixers != other.mixers),
        ("attention heads", config.attention_heads != other.attention_heads),
        ("key and value heads", config.key_value_heads != other.key_value_heads),
        ("epsilon of the norms", config.rms_norm_epsilon != other.rms_norm_epsilon),
        ("rotary base", config.rope_theta != other.rope_theta),
        ("rotary scaling", config.rope_scaling != other.rope_scaling),
        ("sliding window", config.sliding_window != other.sliding_window),
        ("tied embeddings", config.tied_embeddings != other.tied_embeddings),
    ];
    match differences.into_iter().find(|(_, differs)| *differs) {
        Some((what, _)) => Err(Error::Merge {
            message: format!(
                "{} and {} differ in config.json ({what}): only models of one architecture can be merged",
                first.folder.display(),
                source.folder.display()
            ),
        }),
        None => Ok(()),
    }
}

/// A source's tensor.
struct Part<'a> {
    view: &'a View<'a>,
    kind: StoredType,
    bytes: &'a [u8],
}

impl<'a> Part<'a> {
    fn new(view: &'a View<'a>) -> Result<Self> {
        let (kind, bytes) = (view.float_type()?, view.bytes()?);
        if let Some(position) = first_not_finite(bytes, kind) {
            return Err(not_finite(view.path(), view.name, &view.shape, position));
        }
        Ok(Self { view, kind, bytes })
    }

    fn elements(&self) -> usize {
        self.bytes.len() / self.kind.size()
    }

    /// The elements from `first` on, as many as a piece has.
    fn piece(&self, first: usize) -> Vec<f32> {
        let count = CHUNK.min(self.elements() - first);
        let mut values = vec![f32::NAN; count];
        let size = self.kind.size();
        to_f32(self.kind, &self.bytes[first * size..(first + count) * size], &mut values);
        values
    }
}

fn merge_tensor(
    parts: &[Part<'_>],
    factors: &[f64],
    tensor: &TensorToWrite,
    write: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    for first in (0..parts[0].elements()).step_by(CHUNK) {
        let mut sums = vec![0f64; CHUNK.min(parts[0].elements() - first)];
        for (part, factor) in parts.iter().zip(factors) {
            let values = part.piece(first);
            sums.par_iter_mut().zip(values).for_each(|(sum, value)| *sum += factor * f64::from(value));
        }
        let merged: Vec<f32> = sums.into_iter().map(|sum| sum as f32).collect();
        let bytes = from_f32(&merged, tensor.dtype);
        if let Some(position) = first_not_finite(&bytes, tensor.dtype) {
            let problem =
                format!("the merged value {} is too large for {}", merged[position], tensor.dtype.torch_name());
            return Err(Error::tensor(parts[0].view.path(), &tensor.name, problem));
        }
        write(&bytes)?;
    }
    Ok(())
}

/// What the ends of an arc are multiplied by for the point at `share` of the way from the first to the second.
fn arc_factors(from: &Part<'_>, to: &Part<'_>, share: f64) -> [f64; 2] {
    // Sums of pieces in order: the result is the same in every run.
    let (mut dot, mut from_squares, mut to_squares) = (0f64, 0f64, 0f64);
    for first in (0..from.elements()).step_by(CHUNK) {
        for (a, b) in from.piece(first).into_iter().zip(to.piece(first)) {
            let (a, b) = (f64::from(a), f64::from(b));
            dot += a * b;
            from_squares += a * a;
            to_squares += b * b;
        }
    }
    let cosine = dot / (from_squares.sqrt() * to_squares.sqrt());
    // Opposite tensors have no arc, and a tensor of zeros no direction.
    if cosine.is_nan() || cosine.abs() > PARALLEL {
        return [1.0 - share, share];
    }
    let angle = cosine.acos();
    [((1.0 - share) * angle).sin() / angle.sin(), (share * angle).sin() / angle.sin()]
}
