//! f32 tensors in a safetensors file, written in one pass while its SHA-256 is computed.
//!
//! `model::checkpoint` writes model folders; a run's state is not one: it has moments, only what is trained, and must
//! be exact.

use std::borrow::Cow;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use autograd::Tensor;
use model::checkpoint::MappedFile;
use runtime::Device;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};

use crate::files::{self, HashingWriter, hash_bytes};

/// Writes a file and returns its SHA-256.
///
/// # Errors
/// A value that is not finite, naming the tensor; everything that can go wrong with a file.
pub(super) fn write(path: &Path, tensors: &[(String, &Tensor)]) -> Result<String> {
    let mut header = Map::new();
    let mut end = 0;
    for (name, tensor) in tensors {
        let begin = end;
        end += tensor.count() * size_of::<f32>();
        header.insert(name.clone(), json!({ "dtype": "F32", "shape": tensor.shape(), "data_offsets": [begin, end] }));
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    files::fill_file(path, |writer| {
        let mut writer = HashingWriter::new(writer);
        writer.write_all(&(header.len() as u64).to_le_bytes())?;
        writer.write_all(&header)?;
        for (name, tensor) in tensors {
            let values = if tensor.device().is_cpu() { tensor.host_f32()? } else { Cow::Owned(tensor.to_f32_vec()?) };
            ensure!(
                values.iter().all(|value| value.is_finite()),
                "{name} holds a value that is not finite: such a state is not saved"
            );
            for values in values.chunks(1 << 16) {
                let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                writer.write_all(&bytes)?;
            }
        }
        Ok(writer.finish())
    })
}

/// A file whose content is known to be whole.
pub(super) struct TensorFile {
    map: MappedFile,
}

impl TensorFile {
    /// Opens a file and checks it against its SHA-256.
    ///
    /// # Errors
    /// When it is missing, or was changed or cut off.
    pub fn open(path: &Path, sha256: &str) -> Result<Self> {
        let map = MappedFile::open(path)?;
        ensure!(hash_bytes(map.bytes()?) == sha256, "{} was changed or cut off (checksum differs)", path.display());
        Ok(Self { map })
    }

    /// Names of the tensors.
    ///
    /// # Errors
    /// When the file is not safetensors.
    pub fn names(&self) -> Result<Vec<String>> {
        Ok(self.tensors()?.names().into_iter().map(str::to_owned).collect())
    }

    /// The tensor called `name`; `None` when there is none.
    ///
    /// # Errors
    /// When it has another shape or type; out of memory.
    pub fn read(&self, name: &str, shape: &[usize], device: &Device) -> Result<Option<Tensor>> {
        let tensors = self.tensors()?;
        let Ok(view) = tensors.tensor(name) else { return Ok(None) };
        if view.dtype() != Dtype::F32 || view.shape() != shape {
            bail!(
                "{}: {name} is {:?} {:?}, expected F32 {shape:?}",
                self.map.path().display(),
                view.dtype(),
                view.shape()
            );
        }
        let values: Vec<f32> = view
            .data()
            .chunks_exact(size_of::<f32>())
            .map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
            .collect();
        Ok(Some(Tensor::from_slice(device, shape, &values)?))
    }

    fn tensors(&self) -> Result<SafeTensors<'_>> {
        SafeTensors::deserialize(self.map.bytes()?)
            .with_context(|| format!("{} is not a safetensors file", self.map.path().display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_come_back_bit_for_bit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let device = Device::cpu();
        let values: Vec<f32> = (0..6).map(|index| (index as f32).sqrt() * 1e-30).collect();
        let matrix = Tensor::from_slice(&device, &[2, 3], &values).unwrap();
        let vector = Tensor::from_slice(&device, &[1], &[-0.0f32]).unwrap();
        let hash = write(&path, &[("b".to_owned(), &matrix), ("a".to_owned(), &vector)]).unwrap();
        let file = TensorFile::open(&path, &hash).unwrap();
        let read = |name: &str, shape: &[usize]| file.read(name, shape, &device);
        assert_eq!(read("b", &[2, 3]).unwrap().unwrap().to_vec::<f32>().unwrap(), values);
        assert!(read("a", &[1]).unwrap().unwrap().to_vec::<f32>().unwrap()[0].is_sign_negative());
        assert!(read("c", &[1]).unwrap().is_none());
        assert!(read("b", &[3, 2]).unwrap_err().to_string().contains("b is F32 [2, 3], expected F32 [3, 2]"));
        let mut names = file.names().unwrap();
        names.sort();
        assert_eq!(names, ["a", "b"]);
    }

    #[test]
    fn damage_and_values_that_are_not_finite_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let tensor = |value: f32| Tensor::from_slice(&Device::cpu(), &[2], &[1.0, value]).unwrap();
        let hash = write(&path, &[("w".to_owned(), &tensor(2.0))]).unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let message = TensorFile::open(&path, &hash).err().unwrap().to_string();
        assert!(message.contains("x.safetensors was changed or cut off"), "{message}");
        let message = format!("{:#}", write(&path, &[("w".to_owned(), &tensor(f32::NAN))]).unwrap_err());
        assert!(message.contains("w holds a value that is not finite"), "{message}");
    }
}
