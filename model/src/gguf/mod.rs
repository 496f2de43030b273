//! GGUF files (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>), versions 2 and 3, little-endian.
//!
//! A file is a header, key-value pairs, tensor descriptions, and aligned tensor data. Every count and length in it is
//! held against the bytes that are left before anything is allocated.

mod blocks;
mod llama;
mod tokenizer;

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

pub use blocks::BlockType;
pub(crate) use llama::{LlamaGguf, Source};
pub(crate) use tokenizer::convert as tokenizer_files;

use crate::checkpoint::MappedFile;
use crate::{Error, Result};

const MAGIC: &[u8; 4] = b"GGUF";

/// Alignment of tensor data unless `general.alignment` says otherwise.
const DEFAULT_ALIGNMENT: u64 = 32;

/// Arrays of arrays deeper than this are refused.
const GREATEST_DEPTH: usize = 4;

/// A mapped GGUF file.
#[derive(Debug)]
pub struct GgufFile {
    file: MappedFile,
    metadata: BTreeMap<String, MetadataValue>,
    tensors: Vec<GgufTensor>,
}

/// A value of a GGUF key.
#[derive(Clone, Debug, PartialEq)]
pub enum MetadataValue {
    /// Any of the integer types.
    Integer(i128),
    /// Either of the float types; f32 values stay what they are.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// A string.
    Text(String),
    /// A list of values of one type.
    List(Vec<MetadataValue>),
}

/// What a GGUF file says of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GgufTensor {
    /// Its name, for example `blk.0.attn_q.weight`.
    pub name: String,
    /// How its elements are stored.
    pub kind: BlockType,
    /// Its shape, outermost dimension first (the file has them the other way around).
    pub shape: Vec<usize>,
    /// Its first byte in the file.
    begin: usize,
    /// Its size in the file.
    bytes: usize,
}

impl GgufFile {
    /// Maps a file and reads everything but the tensors' data.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] and [`Error::Tensor`] for files that are malformed or of another kind.
    pub fn open(path: &Path) -> Result<Self> {
        let file = MappedFile::open(path)?;
        let (metadata, tensors) = Parser { path, bytes: file.bytes()?, position: 0 }.parse()?;
        Ok(Self { file, metadata, tensors })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The value of a key.
    pub fn value(&self, key: &str) -> Option<&MetadataValue> {
        self.metadata.get(key)
    }

    /// The tensors in the order of the file.
    pub fn tensors(&self) -> &[GgufTensor] {
        &self.tensors
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&GgufTensor> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    /// A tensor's values, row-major, computed in f32.
    ///
    /// # Errors
    /// [`Error::Format`] when the file has shrunk.
    pub fn read(&self, tensor: &GgufTensor) -> Result<Vec<f32>> {
        let bytes = self.file.bytes()?.get(tensor.begin..tensor.begin + tensor.bytes).unwrap_or_default();
        Ok(tensor.kind.dequantise(bytes))
    }

    fn fail(&self, key: &str, problem: impl Into<String>) -> Error {
        Error::Configuration { path: self.path().to_owned(), key: key.to_owned(), problem: problem.into() }
    }

    fn optional<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&'a MetadataValue) -> Option<T>,
    ) -> Result<Option<T>> {
        match self.value(key) {
            None => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| self.fail(key, format!("expected {expected}"))),
        }
    }

    fn required<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.fail(key, "this key is missing"))
    }

    fn integer(&self, key: &str) -> Result<Option<u32>> {
        self.optional(key, "an integer", |value| match value {
            MetadataValue::Integer(value) => u32::try_from(*value).ok(),
            _ => None,
        })
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        self.optional(key, "a finite number", |value| match value {
            MetadataValue::Float(value) if value.is_finite() => Some(*value),
            _ => None,
        })
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.optional(key, "true or false", |value| match value {
            MetadataValue::Bool(value) => Some(*value),
            _ => None,
        })
    }

    fn text(&self, key: &str) -> Result<Option<&str>> {
        self.optional(key, "a string", MetadataValue::as_text)
    }

    fn texts(&self, key: &str) -> Result<Option<Vec<&str>>> {
        self.optional(key, "a list of strings", |value| value.as_list()?.iter().map(MetadataValue::as_text).collect())
    }

    fn integers(&self, key: &str) -> Result<Option<Vec<i128>>> {
        self.optional(key, "a list of integers", |value| {
            let integer = |value: &MetadataValue| match value {
                MetadataValue::Integer(value) => Some(*value),
                _ => None,
            };
            value.as_list()?.iter().map(integer).collect()
        })
    }

    fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>> {
        self.optional(key, "a list of numbers", |value| {
            let number = |value: &MetadataValue| match value {
                MetadataValue::Float(value) if !value.is_nan() => Some(*value),
                _ => None,
            };
            value.as_list()?.iter().map(number).collect()
        })
    }
}

impl MetadataValue {
    fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    fn as_list(&self) -> Option<&[MetadataValue]> {
        match self {
            Self::List(values) => Some(values),
            _ => None,
        }
    }
}

struct Parser<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    position: usize,
}

type Parsed = (BTreeMap<String, MetadataValue>, Vec<GgufTensor>);

impl<'a> Parser<'a> {
    fn parse(mut self) -> Result<Parsed> {
        if self.take(4, "the magic number")? != MAGIC {
            return Err(self.fail("this is no GGUF file: it does not begin with \"GGUF\""));
        }
        let version = self.u32("the version")?;
        if !(2..=3).contains(&version) {
            let advice = if version.swap_bytes() <= 3 { " (the file is big-endian)" } else { "" };
            return Err(self.fail(format!("GGUF version {version} is not supported: expected 2 or 3{advice}")));
        }
        let tensor_count = self.count("the number of tensors", 24)?;
        let key_count = self.count("the number of keys", 13)?;
        let mut metadata = BTreeMap::new();
        for _ in 0..key_count {
            let key = self.text("a key")?;
            let kind = self.u32("a value's type")?;
            let value = self.value(kind, 0)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(self.fail(format!("the key {key} appears twice")));
            }
        }
        let alignment = match metadata.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(MetadataValue::Integer(alignment @ 1..=65_536)) if alignment.count_ones() == 1 => *alignment as u64,
            Some(_) => return Err(self.fail("general.alignment is no power of two up to 65536")),
        };
        let mut tensors = Vec::with_capacity(tensor_count);
        for _ in 0..tensor_count {
            tensors.push(self.tensor(alignment)?);
        }
        self.place(&mut tensors, alignment)?;
        Ok((metadata, tensors))
    }

    /// A tensor's description; its `begin` still counts from the beginning of the data.
    fn tensor(&mut self, alignment: u64) -> Result<GgufTensor> {
        let name = self.text("a tensor's name")?;
        let fail = |problem: String| Error::tensor(self.path, &name, problem);
        let dimensions = self.u32("a tensor's number of dimensions")?;
        if !(1..=4).contains(&dimensions) {
            return Err(fail(format!("{dimensions} dimensions: expected 1 to 4")));
        }
        let mut shape = Vec::with_capacity(4);
        for _ in 0..dimensions {
            let size = self.u64("a tensor's dimensions")?;
            shape.push(usize::try_from(size).unwrap_or(usize::MAX));
        }
        shape.reverse();
        let kind = self.u32("a tensor's type")?;
        let offset = self.u64("a tensor's offset")?;
        let fail = |problem: String| Error::tensor(self.path, &name, problem);
        let kind = BlockType::from_id(kind).map_err(fail)?;
        let columns = shape.last().copied().unwrap_or(0);
        if !columns.is_multiple_of(kind.block_elements()) {
            let block = kind.block_elements();
            return Err(fail(format!("rows of {columns} elements are no whole number of {kind:?} blocks of {block}")));
        }
        let elements = shape.iter().try_fold(1usize, |product, size| product.checked_mul(*size));
        let bytes = elements.and_then(|elements| (elements / kind.block_elements()).checked_mul(kind.block_bytes()));
        let Some(bytes) = bytes else { return Err(fail(format!("shape {shape:?} is larger than any memory"))) };
        if !offset.is_multiple_of(alignment) {
            return Err(fail(format!("its offset {offset} is no multiple of the alignment {alignment}")));
        }
        let begin = usize::try_from(offset).unwrap_or(usize::MAX);
        Ok(GgufTensor { name, kind, shape, begin, bytes })
    }

    /// Makes offsets absolute and checks that the tensors lie in the file, side by side, under unique names.
    fn place(&self, tensors: &mut [GgufTensor], alignment: u64) -> Result<()> {
        let data = self.position.next_multiple_of(alignment as usize);
        let mut names = HashSet::new();
        for tensor in tensors.iter_mut() {
            let end = data.checked_add(tensor.begin).and_then(|begin| begin.checked_add(tensor.bytes));
            if end.is_none_or(|end| end > self.bytes.len()) {
                return Err(Error::tensor(
                    self.path,
                    &tensor.name,
                    format!(
                        "its data end beyond the file's {} bytes: it is truncated, download it again",
                        self.bytes.len()
                    ),
                ));
            }
            tensor.begin += data;
            if !names.insert(tensor.name.clone()) {
                return Err(Error::tensor(self.path, &tensor.name, "the file has this name twice"));
            }
        }
        let mut order: Vec<&GgufTensor> = tensors.iter().collect();
        order.sort_by_key(|tensor| tensor.begin);
        match order.windows(2).find(|pair| pair[0].begin + pair[0].bytes > pair[1].begin) {
            Some(pair) => {
                let problem = format!("its data overlap with those of {}", pair[0].name);
                Err(Error::tensor(self.path, &pair[1].name, problem))
            }
            None => Ok(()),
        }
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<MetadataValue> {
        const WHAT: &str = "a value";
        Ok(match kind {
            0 => MetadataValue::Integer(i128::from(self.array::<1>(WHAT)?[0])),
            1 => MetadataValue::Integer(i128::from(i8::from_le_bytes(self.array(WHAT)?))),
            2 => MetadataValue::Integer(i128::from(u16::from_le_bytes(self.array(WHAT)?))),
            3 => MetadataValue::Integer(i128::from(i16::from_le_bytes(self.array(WHAT)?))),
            4 => MetadataValue::Integer(i128::from(u32::from_le_bytes(self.array(WHAT)?))),
            5 => MetadataValue::Integer(i128::from(i32::from_le_bytes(self.array(WHAT)?))),
            6 => MetadataValue::Float(f64::from(f32::from_le_bytes(self.array(WHAT)?))),
            7 => match self.array::<1>(WHAT)?[0] {
                0 => MetadataValue::Bool(false),
                1 => MetadataValue::Bool(true),
                other => return Err(self.fail(format!("a truth value is {other}: expected 0 or 1"))),
            },
            8 => MetadataValue::Text(self.text("a string")?),
            9 => self.list(depth)?,
            10 => MetadataValue::Integer(i128::from(u64::from_le_bytes(self.array(WHAT)?))),
            11 => MetadataValue::Integer(i128::from(i64::from_le_bytes(self.array(WHAT)?))),
            12 => MetadataValue::Float(f64::from_le_bytes(self.array(WHAT)?)),
            other => return Err(self.fail(format!("a value has the unknown type {other}: the file is damaged"))),
        })
    }

    fn list(&mut self, depth: usize) -> Result<MetadataValue> {
        if depth >= GREATEST_DEPTH {
            return Err(self.fail("lists within lists are nested too deeply"));
        }
        let kind = self.u32("a list's type")?;
        let least_bytes = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            9 => 12,
            _ => 8,
        };
        let count = self.count("a list's length", least_bytes)?;
        let mut values = Vec::with_capacity(count);
        for _ in 0..count {
            values.push(self.value(kind, depth + 1)?);
        }
        Ok(MetadataValue::List(values))
    }

    /// A count of things that take at least `least_bytes` each.
    fn count(&mut self, what: &str, least_bytes: usize) -> Result<usize> {
        let count = self.u64(what)?;
        let left = self.bytes.len() - self.position;
        match usize::try_from(count) {
            Ok(count) if count <= left / least_bytes => Ok(count),
            _ => Err(self.fail(format!("{what} is {count}, but only {left} bytes follow: truncated or damaged"))),
        }
    }

    fn text(&mut self, what: &str) -> Result<String> {
        let length = self.u64(what)?;
        let bytes = self.take(usize::try_from(length).unwrap_or(usize::MAX), what)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(self.fail(format!("{what} is not UTF-8 text"))),
        }
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N, what)?);
        Ok(array)
    }

    fn take(&mut self, count: usize, what: &str) -> Result<&'a [u8]> {
        let taken = self.position.checked_add(count).and_then(|end| self.bytes.get(self.position..end));
        match taken {
            Some(bytes) => {
                self.position += count;
                Ok(bytes)
            }
            None => Err(self.fail(format!("ends within {what}: truncated or damaged"))),
        }
    }

    fn fail(&self, problem: impl Into<String>) -> Error {
        Error::format(self.path, format!("byte {}: {}", self.position, problem.into()))
    }
}
