//! Other software's models as clean Hugging Face folders: another folder, whose weights are checked and given their
//! current names, or a GGUF file, whose weights are dequantised to bf16.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use autograd::DType;

use crate::architecture::parameter_specs;
use crate::checkpoint::{
    NewFolder, ParameterSpec, SaveOptions, StoredType, TensorToWrite, WeightFiles, carry, check, file_name,
    first_not_finite, from_f32, not_finite, write_tensors,
};
use crate::config::{Family, ModelConfig};
use crate::gguf::{GgufFile, LlamaGguf};
use crate::{Error, Result, gguf, json};

/// What an import has made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImportSummary {
    /// What the source was: `GGUF` or `Hugging Face folder`.
    pub source: &'static str,
    /// The class of the model.
    pub family: Family,
    /// Tensors written.
    pub tensors: usize,
    /// Numbers written.
    pub parameters: u64,
    /// Bytes of weights written.
    pub bytes: u64,
    /// Tensors by the type that they had in the source.
    pub source_types: BTreeMap<String, usize>,
}

/// How far an import has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImportProgress<'a> {
    /// The tensor that is being written.
    pub tensor: &'a str,
    /// Bytes of weights written before it.
    pub bytes_done: u64,
    /// Bytes of weights in all.
    pub bytes_total: u64,
}

/// Makes `output` a Hugging Face folder of the model in `source`, which is a Hugging Face folder or a GGUF file.
///
/// Weights of a folder keep their element types and get their current names (a fused step-size projection is split);
/// its other files are carried over. Weights of a GGUF file become bf16; `config.json`, `tokenizer.json`,
/// `tokenizer_config.json`, `special_tokens_map.json` and `generation_config.json` are made from its keys. The folder
/// appears whole or not at all. `progress` is called before each tensor.
///
/// # Errors
/// Whatever is wrong with the source; [`Error::Format`] when `output` exists and is not empty; [`Error::Io`] when
/// something cannot be written.
pub fn import(source: &Path, output: &Path, mut progress: impl FnMut(ImportProgress<'_>)) -> Result<ImportSummary> {
    if source.is_dir() {
        import_folder(source, output, &mut progress)
    } else if source.exists() {
        import_gguf(source, output, &mut progress)
    } else {
        Err(Error::format(source, "there is nothing here: expected a Hugging Face folder or a GGUF file"))
    }
}

fn import_folder(source: &Path, output: &Path, progress: &mut dyn FnMut(ImportProgress<'_>)) -> Result<ImportSummary> {
    let mut config = ModelConfig::read(source)?;
    let files = WeightFiles::open(source)?;
    files.resolve(&mut config)?;
    let specs = parameter_specs(&config, |name| files.stored_dtype(name));
    let views = check(&files, &config, &specs)?;
    let mut tensors = Vec::with_capacity(specs.len());
    for (spec, view) in specs.iter().zip(&views) {
        let dtype = view.float_type()?;
        tensors.push(TensorToWrite { name: file_name(&config, &spec.name), dtype, shape: spec.shape.clone() });
    }
    let new = NewFolder::create(output, false)?;
    json::write(&new.path().join("config.json"), &config.to_json())?;
    let mut report = Report::new("Hugging Face folder", config.family, &tensors, progress);
    write_tensors(new.path(), &tensors, SaveOptions::default().shard_bytes, |index, write| {
        let (view, tensor) = (&views[index], &tensors[index]);
        report.begin(tensor, tensor.dtype.safetensors_name());
        let bytes = view.bytes()?;
        if let Some(position) = first_not_finite(bytes, tensor.dtype) {
            return Err(not_finite(view.path(), view.name, &tensor.shape, position));
        }
        write(bytes)
    })?;
    carry(source, new.path())?;
    let summary = report.summary;
    new.commit()?;
    Ok(summary)
}

fn import_gguf(source: &Path, output: &Path, progress: &mut dyn FnMut(ImportProgress<'_>)) -> Result<ImportSummary> {
    let llama = LlamaGguf::new(GgufFile::open(source)?)?;
    let config = ModelConfig::from_json(&llama.config).map_err(|error| in_gguf(error, source))?;
    let text = gguf::tokenizer_files(&llama.file)?;
    let specs = parameter_specs(&config, |_| DType::Bf16);
    let sources = llama.sources()?;
    let tensors: Vec<TensorToWrite> = specs
        .iter()
        .map(|spec| TensorToWrite { name: spec.name.clone(), dtype: StoredType::Bf16, shape: spec.shape.clone() })
        .collect();
    check_sources(source, &specs, &sources)?;
    let new = NewFolder::create(output, false)?;
    for (name, value) in [
        ("config.json", &serde_json::Value::Object(llama.config.clone())),
        ("tokenizer.json", &text.tokenizer),
        ("tokenizer_config.json", &text.tokenizer_config),
        ("special_tokens_map.json", &text.special_tokens_map),
        ("generation_config.json", &text.generation_config),
    ] {
        json::write(&new.path().join(name), value)?;
    }
    let mut report = Report::new("GGUF", config.family, &tensors, progress);
    write_tensors(new.path(), &tensors, SaveOptions::default().shard_bytes, |index, write| {
        let tensor = &tensors[index];
        let Some(origin) = sources.get(&tensor.name) else { return Ok(()) };
        report.begin(tensor, &format!("{:?}", origin.tensor.kind));
        let bytes = from_f32(&llama.read(origin)?, tensor.dtype);
        if let Some(position) = first_not_finite(&bytes, tensor.dtype) {
            return Err(not_finite(source, &origin.tensor.name, &tensor.shape, position));
        }
        write(&bytes)
    })?;
    let summary = report.summary;
    new.commit()?;
    Ok(summary)
}

fn check_sources(path: &Path, specs: &[ParameterSpec], sources: &BTreeMap<String, gguf::Source>) -> Result<()> {
    for spec in specs {
        let Some(origin) = sources.get(&spec.name) else {
            return Err(Error::MissingTensor {
                folder: path.to_owned(),
                tensor: spec.name.clone(),
                advice: "the file's keys need it; the file is incomplete".to_owned(),
            });
        };
        if origin.tensor.shape != spec.shape {
            return Err(Error::tensor(
                path,
                &origin.tensor.name,
                format!("has shape {:?}, but {:?} follows from the file's keys", origin.tensor.shape, spec.shape),
            ));
        }
    }
    let others: Vec<String> = sources
        .iter()
        .filter(|(name, _)| !specs.iter().any(|spec| spec.name == **name))
        .map(|(_, origin)| origin.tensor.name.clone())
        .collect();
    match others.first() {
        Some(first) => Err(Error::tensor(path, first, "the file's keys have no place for it")),
        None => Ok(()),
    }
}

fn in_gguf(error: Error, file: &Path) -> Error {
    match error {
        Error::Configuration { key, problem, .. } => Error::Configuration { path: PathBuf::from(file), key, problem },
        other => other,
    }
}

struct Report<'a> {
    summary: ImportSummary,
    progress: &'a mut dyn FnMut(ImportProgress<'_>),
    done: u64,
}

impl<'a> Report<'a> {
    fn new(
        source: &'static str,
        family: Family,
        tensors: &[TensorToWrite],
        progress: &'a mut dyn FnMut(ImportProgress<'_>),
    ) -> Self {
        let summary = ImportSummary {
            source,
            family,
            tensors: tensors.len(),
            parameters: tensors.iter().map(TensorToWrite::elements).sum(),
            bytes: tensors.iter().map(TensorToWrite::bytes).sum(),
            source_types: BTreeMap::new(),
        };
        Self { summary, progress, done: 0 }
    }

    fn begin(&mut self, tensor: &TensorToWrite, source_type: &str) {
        let bytes_total = self.summary.bytes;
        (self.progress)(ImportProgress { tensor: &tensor.name, bytes_done: self.done, bytes_total });
        self.done += tensor.bytes();
        *self.summary.source_types.entry(source_type.to_owned()).or_default() += 1;
    }
}
