//! One case as it runs: its tensors, and what was computed from them.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use autograd::{DType, Gradients, Tape, Tensor, Var};
use runtime::Device;
use safetensors::SafeTensors;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::array::Array;
use super::manifest::{Fixture, Precision};
use crate::compare::Bounds;

/// A case with its tensors.
pub struct Case<'a> {
    /// What the manifest says.
    pub fixture: &'a Fixture,
    /// Where to compute.
    pub device: &'a Device,
    /// Element type of inputs and weights.
    pub precision: Precision,
    folder: &'a Path,
    arrays: BTreeMap<String, Array>,
    read: RefCell<BTreeSet<String>>,
}

/// What a case's computation gave.
#[derive(Default)]
pub struct Outcome {
    /// To be compared.
    pub results: Vec<Computed>,
    /// Tensors that look like results by their names and are inputs of this case.
    pub inputs: BTreeSet<String>,
    /// Results that are not compared, and why.
    pub omitted: BTreeMap<String, String>,
}

/// One result.
pub struct Computed {
    /// The stored tensor that it is compared with.
    pub tensor: String,
    /// How it came about, where there is more to say than that it was computed.
    pub way: Option<String>,
    /// The result in the stored tensor's layout.
    pub got: Array,
    /// What to compare with where it is not the whole stored tensor as it is.
    pub expected: Option<Array>,
    /// The bounds where they are not the manifest's.
    pub bounds: Option<Bounds>,
}

impl<'a> Case<'a> {
    /// Reads a case's tensors.
    ///
    /// # Errors
    /// A file that cannot be read or lies outside the folder; a tensor that the manifest names and the file lacks, or
    /// that has another shape.
    pub fn load(folder: &'a Path, fixture: &'a Fixture, device: &'a Device, precision: Precision) -> Result<Self> {
        let path = inside(folder, &fixture.file)?;
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let file = SafeTensors::deserialize(&bytes).with_context(|| format!("{} is damaged", path.display()))?;
        let mut arrays = BTreeMap::new();
        for (name, view) in file.tensors() {
            let array = Array::decode(&view).with_context(|| format!("{}: tensor {name}", path.display()))?;
            let Some(declared) = fixture.tensors.get(&name) else {
                bail!("{}: tensor {name} is not in the manifest", path.display());
            };
            ensure!(
                declared.shape == array.shape,
                "{}: tensor {name} has shape {:?}, the manifest says {:?}",
                path.display(),
                array.shape,
                declared.shape
            );
            arrays.insert(name, array);
        }
        if let Some(name) = fixture.tensors.keys().find(|name| !arrays.contains_key(*name)) {
            bail!("{}: tensor {name} is missing, the manifest names it", path.display());
        }
        Ok(Self { fixture, device, precision, folder, arrays, read: RefCell::default() })
    }

    /// Whether the case stores a tensor of that name.
    pub fn has(&self, name: &str) -> bool {
        self.arrays.contains_key(name)
    }

    /// A stored tensor as it is.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn array(&self, name: &str) -> Result<&Array> {
        self.read.borrow_mut().insert(name.to_owned());
        self.arrays.get(name).with_context(|| format!("tensor {name} is missing"))
    }

    /// Whether anything has asked for the values of a stored tensor.
    pub(super) fn was_read(&self, name: &str) -> bool {
        self.read.borrow().contains(name)
    }

    /// Names of the stored tensors that begin with `prefix`, without it, in alphabetical order.
    pub fn names_after<'b>(&'b self, prefix: &'b str) -> impl Iterator<Item = &'b str> {
        self.arrays.keys().filter_map(move |name| name.strip_prefix(prefix))
    }

    /// A stored tensor on the device, in the element type that it has in this run.
    ///
    /// # Errors
    /// When there is none of that name; out of memory.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        self.upload(name, self.array(name)?)
    }

    /// A rearrangement of the stored tensor `name` on the device, in the element type that `name` has in this run.
    ///
    /// # Errors
    /// Out of memory.
    pub fn upload(&self, name: &str, array: &Array) -> Result<Tensor> {
        self.upload_as(if self.is_narrow(name) { DType::Bf16 } else { DType::F32 }, array)
    }

    /// As [`Case::upload`], for an operator's inputs that are f32 whatever the others are: with the values that `name`
    /// has in this run, held as f32.
    ///
    /// # Errors
    /// Out of memory.
    pub fn tensor_f32(&self, name: &str, array: &Array) -> Result<Tensor> {
        Ok(self.upload(name, array)?.cast(DType::F32)?)
    }

    /// An array on the device.
    ///
    /// # Errors
    /// Out of memory.
    pub fn upload_as(&self, dtype: DType, array: &Array) -> Result<Tensor> {
        let values: Vec<f32> = array.values.iter().map(|value| *value as f32).collect();
        Ok(Tensor::from_slice(self.device, &array.shape, &values)?.cast(dtype)?)
    }

    /// A stored tensor of ids or positions on the device, u32.
    ///
    /// # Errors
    /// When there is none of that name; a value that is no u32.
    pub fn integers(&self, name: &str) -> Result<Tensor> {
        Ok(Tensor::from_slice(self.device, &self.array(name)?.shape, &self.integer_values(name)?)?)
    }

    /// The values of a stored tensor of document lengths.
    ///
    /// # Errors
    /// When there is none of that name; a value that is no u32.
    pub fn lengths(&self, name: &str) -> Result<Vec<usize>> {
        Ok(self.integer_values(name)?.into_iter().map(|length| length as usize).collect())
    }

    /// The rows of a stored `[rows, time]` tensor of ids.
    ///
    /// # Errors
    /// When there is none of that name; a value that is no u32; another number of dimensions.
    pub fn integer_rows(&self, name: &str) -> Result<Vec<Vec<u32>>> {
        let [_, time] = self.array(name)?.shape[..] else { bail!("{name}: expected two dimensions") };
        Ok(self.integer_values(name)?.chunks_exact(time.max(1)).map(<[u32]>::to_vec).collect())
    }

    /// u32 `[rows, time]`: the start of each token's document, from a stored document number per token.
    ///
    /// # Errors
    /// As [`Case::integer_rows`]; a document that comes back after another, which starts cannot express.
    pub fn document_start(&self, name: &str) -> Result<Tensor> {
        let mut starts = Vec::new();
        for row in self.integer_rows(name)? {
            let (mut start, mut seen) = (0, BTreeSet::new());
            for (step, document) in row.iter().enumerate() {
                if step == 0 || row[step - 1] != *document {
                    ensure!(seen.insert(*document), "{name}: document {document} is in several pieces");
                    start = step as u32;
                }
                starts.push(start);
            }
        }
        Ok(Tensor::from_slice(self.device, &self.array(name)?.shape, &starts)?)
    }

    /// Gradients of `Σ output · cotangent`; consumes the tape.
    ///
    /// # Errors
    /// Those of the operators; a cotangent of another shape.
    pub fn backward(&self, tape: Tape<'_>, output: &Var, cotangent: &Array) -> Result<Gradients> {
        let seed = self.upload_as(output.dtype(), cotangent)?;
        Ok(tape.backward_from(vec![(output.clone(), seed)])?)
    }

    /// A scalar; `a.b` looks into an object.
    ///
    /// # Errors
    /// When it is missing or of another type.
    pub fn scalar<T: DeserializeOwned>(&self, key: &str) -> Result<T> {
        self.optional_scalar(key)?.with_context(|| format!("scalars.{key} is missing"))
    }

    /// A scalar that may be absent or null.
    ///
    /// # Errors
    /// When it is of another type.
    pub fn optional_scalar<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>> {
        let mut keys = key.split('.');
        let first = keys.next().and_then(|key| self.fixture.scalars.get(key));
        match keys.fold(first, |value: Option<&Value>, key| value?.get(key)) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => {
                let value = T::deserialize(value).with_context(|| format!("scalars.{key} is {value}"))?;
                Ok(Some(value))
            }
        }
    }

    /// The folder of a whole-model case.
    ///
    /// # Errors
    /// When the manifest names none, or one outside the fixture folder.
    pub fn model_folder(&self) -> Result<PathBuf> {
        self.path(self.fixture.model_dir.as_ref().context("the manifest has no model_dir")?)
    }

    /// A model folder beside the case's file.
    ///
    /// # Errors
    /// When the manifest does not name it.
    pub fn folder_beside(&self, name: &str) -> Result<PathBuf> {
        ensure!(self.fixture.dirs.contains_key(name), "the manifest's dirs have no {name}");
        Ok(self.path(&self.fixture.file)?.with_file_name(name))
    }

    /// A file or folder that the manifest names, relative to the manifest.
    ///
    /// # Errors
    /// A path that leads out of the fixture folder.
    pub fn path(&self, relative: &str) -> Result<PathBuf> {
        inside(self.folder, relative)
    }

    fn is_narrow(&self, name: &str) -> bool {
        self.precision == Precision::Bf16 && !self.fixture.bf16_keeps_fp32.iter().any(|kept| kept == name)
    }

    fn integer_values(&self, name: &str) -> Result<Vec<u32>> {
        self.array(name)?
            .values
            .iter()
            .map(|&value| {
                let fits = (0.0..=f64::from(u32::MAX)).contains(&value) && value.fract() == 0.0;
                ensure!(fits, "{name}: {value} is no u32");
                Ok(value as u32)
            })
            .collect()
    }
}

impl Outcome {
    /// A result in the stored tensor's layout, under the manifest's bounds.
    pub fn give(&mut self, tensor: &str, got: Array) {
        self.push(tensor, None, got, None, None);
    }

    /// As [`Outcome::give`], with a word on how it came about.
    pub fn give_also(&mut self, tensor: &str, way: &str, got: Array) {
        self.push(tensor, Some(way), got, None, None);
    }

    /// As [`Outcome::give_also`], under other bounds than the manifest's.
    pub fn give_within(&mut self, tensor: &str, way: &str, got: Array, bounds: Bounds) {
        self.push(tensor, Some(way), got, None, Some(bounds));
    }

    /// A result for a part of the stored tensor, under that tensor's bounds.
    pub fn give_part(&mut self, tensor: &str, way: &str, got: Array, expected: Array) {
        self.push(tensor, Some(way), got, Some(expected), None);
    }

    /// As [`Outcome::give_part`], under other bounds than the manifest's.
    pub fn give_part_within(&mut self, tensor: &str, way: &str, got: Array, expected: Array, bounds: Bounds) {
        self.push(tensor, Some(way), got, Some(expected), Some(bounds));
    }

    /// The gradient of `input`, rearranged into the stored tensor's layout.
    ///
    /// # Errors
    /// When no gradient reached the input; those of `arrange`.
    pub fn give_gradient(
        &mut self,
        tensor: &str,
        gradients: &Gradients,
        input: &Tensor,
        arrange: impl FnOnce(Array) -> Result<Array>,
    ) -> Result<()> {
        let gradient = gradients.get(input).with_context(|| format!("{tensor}: no gradient reached this input"))?;
        self.give(tensor, arrange(Array::read(gradient)?)?);
        Ok(())
    }

    /// A stored tensor that looks like a result by its name and is an input.
    pub fn is_input(&mut self, tensor: &str) {
        self.inputs.insert(tensor.to_owned());
    }

    /// A result that is not compared.
    pub fn omit(&mut self, tensor: &str, reason: &str) {
        self.omitted.insert(tensor.to_owned(), reason.to_owned());
    }

    fn push(&mut self, tensor: &str, way: Option<&str>, got: Array, expected: Option<Array>, bounds: Option<Bounds>) {
        self.results.push(Computed { tensor: tensor.to_owned(), way: way.map(str::to_owned), got, expected, bounds });
    }
}

/// `relative` below `folder`; nothing else can be reached.
fn inside(folder: &Path, relative: &str) -> Result<PathBuf> {
    let path = Path::new(relative);
    ensure!(
        !relative.is_empty() && path.components().all(|part| matches!(part, Component::Normal(_))),
        "{relative:?} leads out of {}",
        folder.display()
    );
    Ok(folder.join(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_inside() {
        let folder = Path::new("/fixtures");
        assert!(inside(folder, "ops/a.safetensors").is_ok());
        for bad in ["../a", "/etc/passwd", "a/../../b", ""] {
            assert!(inside(folder, bad).is_err(), "{bad}");
        }
    }
}
