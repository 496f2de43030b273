//! The weight files of a model folder, mapped and checked.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use autograd::DType;
use safetensors::Dtype;

use super::convert::{self, StoredType};
use super::header::{self, Entry};
use super::map::MappedFile;
use super::names;
use crate::config::{MambaConfig, MixerKind, ModelConfig};
use crate::{Error, Result, json};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The tensors of a model folder under their canonical names (`model.layers.0.mixer.in_proj.weight`), whatever the
/// files call them.
#[derive(Debug)]
pub struct WeightFiles {
    folder: PathBuf,
    files: Vec<MappedFile>,
    tensors: BTreeMap<String, Stored>,
}

#[derive(Debug)]
struct Stored {
    file: usize,
    entry: Entry,
}

/// What is known of a stored tensor without reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Element type in the file.
    pub dtype: Dtype,
    /// Shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// Bytes in the file.
    pub bytes: usize,
    /// The file.
    pub path: PathBuf,
}

/// A tensor, or the rows of one, ready to be read.
pub(crate) struct View<'a> {
    file: &'a MappedFile,
    range: Range<usize>,
    /// The name in the file.
    pub(crate) name: &'a str,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
}

impl<'a> View<'a> {
    /// The file.
    pub(crate) fn path(&self) -> &'a Path {
        self.file.path()
    }

    /// The elements, little-endian and row-major.
    pub(crate) fn bytes(&self) -> Result<&'a [u8]> {
        Ok(self.file.bytes()?.get(self.range.clone()).unwrap_or_default())
    }

    /// The element type, if weights can have it.
    pub(crate) fn float_type(&self) -> Result<StoredType> {
        StoredType::from_safetensors(self.dtype).ok_or_else(|| {
            let problem = format!("has element type {}: expected F32, BF16 or F16", self.dtype);
            Error::tensor(self.path(), self.name, problem)
        })
    }
}

impl WeightFiles {
    /// Maps `model.safetensors`, or the files that `model.safetensors.index.json` names. Links are followed.
    ///
    /// # Errors
    /// Files that are missing, truncated or malformed; an index that does not match its files, or that names a file
    /// outside the folder.
    pub fn open(folder: &Path) -> Result<Self> {
        json::expect_folder(folder)?;
        let single = folder.join(SINGLE);
        let index = folder.join(INDEX);
        let mut weights = Self { folder: folder.to_owned(), files: Vec::new(), tensors: BTreeMap::new() };
        if single.exists() {
            weights.add_file(&single)?;
        } else if index.exists() {
            weights.add_shards(&index)?;
        } else {
            return Err(Error::format(folder, no_weights(folder)));
        }
        Ok(weights)
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The canonical names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// What is known of a tensor without reading it.
    pub fn info(&self, name: &str) -> Option<TensorInfo> {
        let stored = self.tensors.get(name)?;
        Some(TensorInfo {
            dtype: stored.entry.dtype,
            shape: stored.entry.shape.clone(),
            bytes: stored.entry.end - stored.entry.begin,
            path: self.files[stored.file].path().to_owned(),
        })
    }

    /// The element type in which a tensor can be kept in memory without loss: bf16 if it is stored so, f32 otherwise.
    pub fn stored_dtype(&self, name: &str) -> DType {
        match self.stored_or_fused(name).map(|stored| stored.entry.dtype) {
            Some(Dtype::BF16) => DType::Bf16,
            _ => DType::F32,
        }
    }

    /// A tensor's values, row-major, widened to f32.
    ///
    /// # Errors
    /// [`Error::MissingTensor`]; [`Error::Tensor`] for element types other than F32, BF16 and F16.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let view = self.view(name, None).ok_or_else(|| self.missing(name))?;
        let mut values = vec![f32::NAN; view.shape.iter().product()];
        convert::to_f32(view.float_type()?, view.bytes()?, &mut values);
        Ok(values)
    }

    /// Sets what only the weights know: the rank of the mixers' step-size projections.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] when a Mamba layer has none; [`Error::Tensor`] when two layers differ.
    pub fn resolve(&self, config: &mut ModelConfig) -> Result<()> {
        let Some(geometry) = &mut config.mamba else { return Ok(()) };
        let mut first: Option<(usize, String)> = None;
        for (layer, _) in config.mixers.iter().enumerate().filter(|(_, mixer)| **mixer == MixerKind::Mamba) {
            let name = format!("model.layers.{layer}.mixer.dt_in_proj.weight");
            let view = self.view(&name, Some(geometry)).ok_or_else(|| self.missing(&name))?;
            let rank = view.shape.first().copied().unwrap_or(0);
            match &first {
                Some((other, of)) if *other != rank => {
                    return Err(Error::tensor(
                        view.path(),
                        view.name,
                        format!(
                            "the step-size projection has rank {rank}, that of {of} has {other}: expected the same"
                        ),
                    ));
                }
                Some(_) => {}
                None => first = Some((rank, name)),
            }
        }
        if let Some((rank, _)) = first {
            geometry.dt_rank = rank;
        }
        Ok(())
    }

    /// The tensor `name`, or the part of a fused one that it is.
    ///
    /// Checkpoints from before August 2025, and M1's, store the step-size projection as the last rows of `in_proj`;
    /// `geometry` says how many rows `in_proj` has without it.
    pub(crate) fn view(&self, name: &str, geometry: Option<&MambaConfig>) -> Option<View<'_>> {
        let stored = self.stored_or_fused(name)?;
        let Entry { name: file_name, dtype, shape, begin, end } = &stored.entry;
        let file = &self.files[stored.file];
        let mut view = View { file, range: *begin..*end, name: file_name, dtype: *dtype, shape: shape.clone() };
        let own_rows = geometry.map(|geometry| 2 * (geometry.d_inner + geometry.d_xb));
        if let (Some(own_rows), &[rows, columns]) = (own_rows, shape.as_slice())
            && let Some(layer) =
                name.strip_suffix(".mixer.in_proj.weight").or(name.strip_suffix(".mixer.dt_in_proj.weight"))
            && !self.tensors.contains_key(&format!("{layer}.mixer.dt_in_proj.weight"))
        {
            if rows <= own_rows {
                // Nothing is fused: in_proj is as it should be, and the other is missing.
                return name.ends_with(".mixer.in_proj.weight").then_some(view);
            }
            let split = begin + own_rows * columns * dtype.bitsize() / 8;
            if name.ends_with(".mixer.in_proj.weight") {
                view.shape = vec![own_rows, columns];
                view.range = *begin..split;
            } else {
                view.shape = vec![rows - own_rows, columns];
                view.range = split..*end;
            }
        }
        Some(view)
    }

    /// The tensors that none of `wanted` is, by their names in the files.
    pub(crate) fn others(&self, wanted: &dyn Fn(&str) -> bool) -> Vec<String> {
        self.tensors
            .iter()
            .filter(|(name, _)| !wanted(name) && !names::is_derived_buffer(name))
            .map(|(_, stored)| stored.entry.name.clone())
            .collect()
    }

    /// The error for a tensor that is not there.
    pub(crate) fn missing(&self, name: &str) -> Error {
        let advice = match name {
            "lm_head.weight" => {
                "tie_word_embeddings is false in config.json, so a head of its own is needed; \
                 if the head is the embedding, set it to true"
            }
            "model.embed_tokens.weight" if self.tensors.contains_key("lm_head.weight") => {
                "only lm_head.weight is stored; a tied model is stored as its embedding"
            }
            _ => "config.json needs it; the weights are incomplete or belong to another model",
        };
        Error::MissingTensor { folder: self.folder.clone(), tensor: name.to_owned(), advice: advice.to_owned() }
    }

    fn stored_or_fused(&self, name: &str) -> Option<&Stored> {
        self.tensors.get(name).or_else(|| {
            let layer = name.strip_suffix(".mixer.dt_in_proj.weight")?;
            self.tensors.get(&format!("{layer}.mixer.in_proj.weight"))
        })
    }

    /// Adds all tensors of a file and returns their names in it.
    fn add_file(&mut self, path: &Path) -> Result<Vec<String>> {
        let file = MappedFile::open(path)?;
        let entries = header::read(&file)?;
        let index = self.files.len();
        let mut added = Vec::with_capacity(entries.len());
        for entry in entries {
            added.push(entry.name.clone());
            let canonical = names::canonical(&entry.name);
            if let Some(other) = self.tensors.get(&canonical) {
                let other_path = self.files.get(other.file).map_or(path, MappedFile::path);
                return Err(Error::tensor(
                    path,
                    &entry.name,
                    format!("stored twice: {} is in {} already", other.entry.name, other_path.display()),
                ));
            }
            self.tensors.insert(canonical, Stored { file: index, entry });
        }
        self.files.push(file);
        Ok(added)
    }

    fn add_shards(&mut self, index: &Path) -> Result<()> {
        let weight_map = header::read_index(index, &json::read_text(index)?)?;
        let mut shards: Vec<&str> = Vec::new();
        let mut shard_of: HashMap<&str, &str> = HashMap::with_capacity(weight_map.len());
        for (tensor, shard) in &weight_map {
            check_shard_name(index, tensor, shard)?;
            if shard_of.insert(tensor, shard).is_none() && !shards.contains(&shard.as_str()) {
                shards.push(shard);
            }
        }
        let mut found = HashMap::with_capacity(weight_map.len());
        for shard in shards {
            let path = self.folder.join(shard);
            if !path.exists() {
                return Err(Error::format(
                    &path,
                    format!("this file is missing, but {INDEX} names it; download it too"),
                ));
            }
            for tensor in self.add_file(&path)? {
                match shard_of.get(tensor.as_str()) {
                    Some(expected) if *expected == shard => {}
                    Some(expected) => {
                        let problem = format!("{INDEX} says that it is in {expected}");
                        return Err(Error::tensor(&path, &tensor, problem));
                    }
                    None => return Err(Error::tensor(&path, &tensor, format!("{INDEX} does not mention it"))),
                }
                found.insert(tensor, ());
            }
        }
        match weight_map.iter().find(|(tensor, _)| !found.contains_key(tensor)) {
            Some((tensor, shard)) => {
                Err(Error::tensor(index, tensor, format!("{shard} does not hold it, though this index says so")))
            }
            None => Ok(()),
        }
    }
}

/// An index may only name files of its own folder.
fn check_shard_name(index: &Path, tensor: &str, shard: &str) -> Result<()> {
    let plain = !shard.is_empty() && shard != "." && shard != ".." && !shard.contains(['/', '\\', '\0']);
    if plain && shard.ends_with(".safetensors") {
        return Ok(());
    }
    let shown = shard.escape_debug();
    Err(Error::tensor(
        index,
        tensor,
        format!("its file \"{shown}\" is refused: expected the plain name of a .safetensors file in the same folder"),
    ))
}

fn no_weights(folder: &Path) -> String {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) => return format!("cannot read this folder: {error}"),
    };
    let names: Vec<String> = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    let advice = if names.iter().any(|name| name.ends_with(".gguf")) {
        "; a GGUF file is imported by its own path"
    } else if names.iter().any(|name| name.ends_with(".bin") || name.ends_with(".pth")) {
        "; convert the PyTorch weights to safetensors first"
    } else {
        ""
    };
    format!("no weights here: expected {SINGLE} or {INDEX}{advice}")
}
