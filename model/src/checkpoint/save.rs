//! Writing a model folder.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use autograd::{DType, Parameter, Parameters};
use half::bf16;
use serde_json::{Map, Value, json};

use super::convert::{StoredType, first_not_finite, from_f32};
use super::files::WeightFiles;
use super::folder::{NewFolder, carry};
use super::load::not_finite;
use super::names;
use crate::config::{MixerKind, ModelConfig};
use crate::{Error, Result};

/// Elements that are converted and written at a time.
const CHUNK: usize = 1 << 20;

/// How a model is written.
#[derive(Clone, Debug)]
pub struct SaveOptions<'a> {
    /// Element type of every tensor in the files. `None`: as stored, which is for each tensor the type that it has in
    /// `carry_from`, or else the one that the configuration names (`torch_dtype`, `dtype`), or else the one in memory.
    pub dtype: Option<DType>,
    /// Weights are cut into files of at most this many bytes (a single larger tensor has a file of its own).
    pub shard_bytes: u64,
    /// A model folder whose other files (tokenizer, templates, generation settings, code, licence) are carried over.
    pub carry_from: Option<&'a Path>,
    /// Whether an existing model folder is replaced. The old one stays until the new one is complete.
    pub replace: bool,
}

impl Default for SaveOptions<'_> {
    fn default() -> Self {
        Self { dtype: None, shard_bytes: 5_000_000_000, carry_from: None, replace: false }
    }
}

/// Writes a folder that the Hugging Face class of `config` loads: `config.json`, `model.safetensors` or shards with an
/// index, and the files carried over.
///
/// The folder appears whole or not at all: it is written beside its place, flushed to the disk and renamed. Tensors are
/// converted piece by piece, so that no second copy of the weights is made. A head that is the embedding is not
/// written.
///
/// # Errors
/// [`Error::Format`] when the folder exists and may not be replaced; [`Error::Tensor`] for a weight that is not finite,
/// or not finite in the element type asked for; [`Error::Io`] when something cannot be written.
pub fn save(folder: &Path, config: &ModelConfig, parameters: &Parameters, options: &SaveOptions<'_>) -> Result<()> {
    if config.has_apriel2_names() && config.mixers.contains(&MixerKind::Identity) {
        return Err(Error::format(
            folder,
            "the apriel2 format has no identity layers: this model cannot be saved in it",
        ));
    }
    let carried = match options.carry_from {
        Some(source) if options.dtype.is_none() && source.join("config.json").exists() => {
            WeightFiles::open(source).ok()
        }
        _ => None,
    };
    let mut config_json = config.to_json();
    let named = dtype_keys(&config_json).into_iter().find_map(|(_, name)| StoredType::from_torch_name(&name));
    let mut sources: Vec<&Parameter> = Vec::with_capacity(parameters.len());
    let mut tensors = Vec::with_capacity(parameters.len());
    for (_, parameter) in parameters.iter() {
        if config.tied_embeddings && parameter.name == "lm_head.weight" {
            continue;
        }
        let carried = carried.as_ref().and_then(|files| files.info(&parameter.name));
        let dtype = options
            .dtype
            .map(in_file)
            .or(carried.and_then(|info| StoredType::from_safetensors(info.dtype)))
            .or(named)
            .unwrap_or(in_file(parameter.value.dtype()));
        sources.push(parameter);
        tensors.push(TensorToWrite {
            name: file_name(config, &parameter.name),
            dtype,
            shape: parameter.value.shape().to_vec(),
        });
    }
    name_dtype(&mut config_json, &tensors);
    let new = NewFolder::create(folder, options.replace)?;
    crate::json::write(&new.path().join("config.json"), &config_json)?;
    write_tensors(new.path(), &tensors, options.shard_bytes, |index, write| {
        write_parameter(sources[index], &tensors[index], folder, write)
    })?;
    if let Some(source) = options.carry_from {
        carry(source, new.path())?;
    }
    new.commit()
}

fn in_file(dtype: DType) -> StoredType {
    if dtype == DType::Bf16 { StoredType::Bf16 } else { StoredType::F32 }
}

/// A tensor of a new file.
#[derive(Clone, Debug)]
pub(crate) struct TensorToWrite {
    /// Its name in the file.
    pub(crate) name: String,
    /// Its element type in the file.
    pub(crate) dtype: StoredType,
    /// Its shape.
    pub(crate) shape: Vec<usize>,
}

impl TensorToWrite {
    /// Number of elements.
    pub(crate) fn elements(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64
    }

    /// Bytes in the file.
    pub(crate) fn bytes(&self) -> u64 {
        self.elements() * self.dtype.size() as u64
    }
}

/// The name under which the class of `config` stores a parameter.
pub(crate) fn file_name(config: &ModelConfig, name: &str) -> String {
    if config.has_apriel2_names() { names::apriel2(name) } else { name.to_owned() }
}

/// Writes `tensors` into files of at most `shard_bytes` and waits until they are on the disk. `source` hands the
/// little-endian bytes of the tensor of an index to its second argument, in pieces of any size.
pub(crate) fn write_tensors(
    folder: &Path,
    tensors: &[TensorToWrite],
    shard_bytes: u64,
    mut source: impl FnMut(usize, &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()>,
) -> Result<()> {
    let shards = cut(tensors, shard_bytes);
    let mut weight_map = BTreeMap::new();
    for (number, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => "model.safetensors".to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        write_file(&folder.join(&name), tensors, shard, &mut source)?;
        weight_map.extend(shard.iter().map(|&index| (tensors[index].name.clone(), name.clone())));
    }
    if shards.len() == 1 {
        return Ok(());
    }
    let total_size: u64 = tensors.iter().map(TensorToWrite::bytes).sum();
    let total_parameters: u64 = tensors.iter().map(TensorToWrite::elements).sum();
    let index = json!({
        "metadata": { "total_parameters": total_parameters, "total_size": total_size },
        "weight_map": weight_map,
    });
    crate::json::write(&folder.join("model.safetensors.index.json"), &index)
}

/// Which tensors go into which file, in order.
fn cut(tensors: &[TensorToWrite], shard_bytes: u64) -> Vec<Vec<usize>> {
    let mut shards = vec![Vec::new()];
    let mut used = 0;
    for (index, tensor) in tensors.iter().enumerate() {
        let bytes = tensor.bytes();
        if used > 0 && used + bytes > shard_bytes {
            shards.push(Vec::new());
            used = 0;
        }
        if let Some(shard) = shards.last_mut() {
            shard.push(index);
        }
        used += bytes;
    }
    shards
}

fn write_file(
    path: &Path,
    tensors: &[TensorToWrite],
    shard: &[usize],
    source: &mut impl FnMut(usize, &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()>,
) -> Result<()> {
    // Wide elements first, as the reference implementation orders them, so that every tensor is aligned.
    let mut order = shard.to_vec();
    order.sort_by(|&a, &b| {
        let (a, b) = (&tensors[a], &tensors[b]);
        b.dtype.size().cmp(&a.dtype.size()).then_with(|| a.name.cmp(&b.name))
    });
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut end = 0;
    for &index in &order {
        let tensor = &tensors[index];
        let begin = end;
        end += tensor.bytes();
        header.insert(
            tensor.name.clone(),
            json!({ "dtype": tensor.dtype.safetensors_name(), "shape": tensor.shape, "data_offsets": [begin, end] }),
        );
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path).map_err(Error::io("create", path))?);
    file.write_all(&(header.len() as u64).to_le_bytes()).map_err(Error::io("write", path))?;
    file.write_all(&header).map_err(Error::io("write", path))?;
    for &index in &order {
        let mut written = 0;
        source(index, &mut |bytes| {
            written += bytes.len() as u64;
            file.write_all(bytes).map_err(Error::io("write", path))
        })?;
        let tensor = &tensors[index];
        if written != tensor.bytes() {
            let problem = format!("{written} bytes were given for {:?} in {:?}", tensor.shape, tensor.dtype);
            return Err(Error::tensor(path, &tensor.name, problem));
        }
    }
    let file = file.into_inner().map_err(|error| Error::io("write", path)(error.into_error()))?;
    file.sync_all().map_err(Error::io("write", path))
}

fn write_parameter(
    parameter: &Parameter,
    tensor: &TensorToWrite,
    folder: &Path,
    write: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let value = &parameter.value;
    match value.dtype() {
        DType::Bf16 => {
            let copy;
            let values: &[bf16] = if value.device().is_cpu() {
                value.host_slice()?
            } else {
                copy = value.to_vec()?;
                &copy
            };
            for (chunk, values) in values.chunks(CHUNK).enumerate() {
                let values: Vec<f32> = values.iter().map(|value| value.to_f32()).collect();
                write_chunk(&values, chunk, tensor, folder, write)?;
            }
        }
        _ => {
            let copy;
            let values: &[f32] = if value.device().is_cpu() {
                value.host_slice()?
            } else {
                copy = value.to_vec()?;
                &copy
            };
            for (chunk, values) in values.chunks(CHUNK).enumerate() {
                write_chunk(values, chunk, tensor, folder, write)?;
            }
        }
    }
    Ok(())
}

fn write_chunk(
    values: &[f32],
    chunk: usize,
    tensor: &TensorToWrite,
    folder: &Path,
    write: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let bytes = from_f32(values, tensor.dtype);
    match first_not_finite(&bytes, tensor.dtype) {
        None => write(&bytes),
        Some(position) if values[position].is_finite() => Err(Error::tensor(
            folder,
            &tensor.name,
            format!("{} is too large for {}: save in float32", values[position], tensor.dtype.torch_name()),
        )),
        Some(position) => Err(not_finite(folder, &tensor.name, &tensor.shape, chunk * CHUNK + position)),
    }
}

/// The keys that name an element type: transformers 5 says `dtype`, older versions `torch_dtype`.
fn dtype_keys(config: &Map<String, Value>) -> Vec<(&'static str, String)> {
    ["dtype", "torch_dtype"].into_iter().filter_map(|key| Some((key, config.get(key)?.as_str()?.to_owned()))).collect()
}

/// Makes the configuration name the element type of the files, where they have one.
fn name_dtype(config: &mut Map<String, Value>, tensors: &[TensorToWrite]) {
    let Some(first) = tensors.first() else { return };
    if tensors.iter().any(|tensor| tensor.dtype != first.dtype) {
        return;
    }
    for (key, name) in dtype_keys(config) {
        if StoredType::from_torch_name(&name) != Some(first.dtype) {
            config.insert(key.to_owned(), json!(first.dtype.torch_name()));
        }
    }
}
