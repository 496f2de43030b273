//! The header of a safetensors file, and the index of several.
//!
//! A file is `u64` header length, JSON header, data; little-endian. The header maps each tensor's name to its element
//! type, shape and byte range in the data (<https://github.com/huggingface/safetensors#format>). The library's own
//! reader would do, but it takes the last of two tensors with one name and does not say which tensor is wrong.

use std::collections::HashSet;
use std::fmt;
use std::path::Path;

use safetensors::Dtype;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;

use super::map::MappedFile;
use crate::{Error, Result};

/// Longest header that is read, as in the reference implementation.
const GREATEST_HEADER: u64 = 100_000_000;

/// Bytes of the header's length.
const LENGTH_BYTES: usize = 8;

/// A tensor of a file.
#[derive(Debug)]
pub(super) struct Entry {
    /// Its name in the file.
    pub(super) name: String,
    /// Its element type.
    pub(super) dtype: Dtype,
    /// Its shape.
    pub(super) shape: Vec<usize>,
    /// Its first byte in the file.
    pub(super) begin: usize,
    /// The byte after its last.
    pub(super) end: usize,
}

/// The tensors of a file in the order of their data, with everything checked: names are unique, ranges are those of
/// shape and element type, and together they cover the data exactly once.
pub(super) fn read(file: &MappedFile) -> Result<Vec<Entry>> {
    let path = file.path();
    let bytes = file.bytes()?;
    let fail = |problem: String| Error::format(path, problem);
    let Some((length, rest)) = bytes.split_at_checked(LENGTH_BYTES) else {
        return Err(fail(format!("{} bytes are too few for a safetensors file: was a download cut off?", bytes.len())));
    };
    let length = length.iter().rev().fold(0u64, |length, byte| length << 8 | u64::from(*byte));
    if length > GREATEST_HEADER {
        return Err(fail(format!(
            "the header would be {length} bytes, more than the {GREATEST_HEADER} that are allowed: this is no safetensors file"
        )));
    }
    let Some((header, data)) = rest.split_at_checked(length as usize) else {
        return Err(fail(format!(
            "truncated: the header takes {length} bytes but only {} follow its length; download the file again",
            rest.len()
        )));
    };
    let header = std::str::from_utf8(header).map_err(|error| fail(format!("the header is not UTF-8 text: {error}")))?;
    let header: UniqueEntries =
        serde_json::from_str(header).map_err(|error| fail(format!("the header is not valid JSON: {error}")))?;
    header.check(path, "the header")?;
    let data_begin = LENGTH_BYTES + length as usize;
    let mut entries = Vec::with_capacity(header.0.len());
    for (name, value) in header.0 {
        if name != "__metadata__" {
            entries.push(read_entry(path, name, &value, data_begin)?);
        } else if !value.is_object() {
            return Err(fail("the header's __metadata__ is not an object".to_owned()));
        }
    }
    entries.sort_by_key(|entry| (entry.begin, entry.end));
    check_cover(path, &entries, data_begin, data.len())?;
    Ok(entries)
}

fn read_entry(path: &Path, name: String, value: &Value, data_begin: usize) -> Result<Entry> {
    let fail = |problem: String| Error::tensor(path, &name, problem);
    let field = |key: &str| value.get(key).ok_or_else(|| fail(format!("the header gives no {key}")));
    let numbers = |key: &str| -> Result<Vec<usize>> {
        let numbers = field(key)?.as_array().and_then(|values| {
            values.iter().map(|value| value.as_u64().and_then(|value| usize::try_from(value).ok())).collect()
        });
        numbers.ok_or_else(|| fail(format!("{key} in the header is no list of whole numbers")))
    };
    let dtype = Dtype::deserialize(field("dtype")?)
        .map_err(|_| fail(format!("unknown element type {} in the header", value["dtype"])))?;
    let shape = numbers("shape")?;
    let offsets = numbers("data_offsets")?;
    let &[begin, end] = offsets.as_slice() else {
        return Err(fail(format!("data_offsets in the header has {} numbers: expected 2", offsets.len())));
    };
    if end < begin {
        return Err(fail(format!("data_offsets run backwards, from {begin} to {end}")));
    }
    let bits = shape.iter().try_fold(dtype.bitsize(), |bits, size| bits.checked_mul(*size));
    match bits {
        Some(bits) if bits % 8 == 0 && bits / 8 == end - begin => {}
        Some(bits) => {
            return Err(fail(format!(
                "{dtype} of shape {shape:?} takes {} bytes, but data_offsets give {}",
                bits.div_ceil(8),
                end - begin
            )));
        }
        None => return Err(fail(format!("shape {shape:?} is larger than any memory"))),
    }
    match (data_begin.checked_add(begin), data_begin.checked_add(end)) {
        (Some(begin), Some(end)) => Ok(Entry { name, dtype, shape, begin, end }),
        _ => Err(fail(format!("data_offsets {begin} to {end} lie outside any file"))),
    }
}

fn check_cover(path: &Path, entries: &[Entry], data_begin: usize, data_length: usize) -> Result<()> {
    let data_end = data_begin + data_length;
    if let Some(last) = entries.iter().max_by_key(|entry| entry.end)
        && last.end > data_end
    {
        return Err(Error::tensor(
            path,
            &last.name,
            format!(
                "its data end at byte {}, but the file has only {data_end} bytes: it is truncated, download it again",
                last.end
            ),
        ));
    }
    let mut covered = data_begin;
    let mut previous = "the header";
    for entry in entries {
        if entry.begin < covered {
            return Err(Error::tensor(path, &entry.name, format!("its data overlap with those of {previous}")));
        }
        if entry.begin > covered {
            return Err(Error::tensor(
                path,
                &entry.name,
                format!("{} bytes before its data belong to no tensor", entry.begin - covered),
            ));
        }
        covered = entry.end;
        previous = &entry.name;
    }
    if covered < data_end {
        return Err(Error::format(path, format!("{} bytes at the end belong to no tensor", data_end - covered)));
    }
    Ok(())
}

/// Which file holds which tensor, from an index (`model.safetensors.index.json`).
pub(super) fn read_index(path: &Path, text: &str) -> Result<Vec<(String, String)>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: UniqueEntries,
    }
    let index: Index = serde_json::from_str(text).map_err(|error| {
        Error::format(path, format!("not a valid index {{\"weight_map\": {{tensor: file}}}}: {error}"))
    })?;
    index.weight_map.check(path, "weight_map")?;
    let mut files = Vec::with_capacity(index.weight_map.0.len());
    for (tensor, file) in index.weight_map.0 {
        match file {
            Value::String(file) => files.push((tensor, file)),
            other => return Err(Error::tensor(path, &tensor, format!("its file is {other}: expected a string"))),
        }
    }
    Ok(files)
}

/// A JSON object with its entries in order, repeated keys included.
struct UniqueEntries(Vec<(String, Value)>);

impl UniqueEntries {
    /// Refuses repeated keys.
    fn check(&self, path: &Path, place: &str) -> Result<()> {
        let mut seen = HashSet::with_capacity(self.0.len());
        match self.0.iter().find(|(key, _)| !seen.insert(key)) {
            Some((key, _)) => Err(Error::tensor(path, key, format!("{place} has this name twice"))),
            None => Ok(()),
        }
    }
}

impl<'de> Deserialize<'de> for UniqueEntries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = UniqueEntries;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> std::result::Result<UniqueEntries, M::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(UniqueEntries(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}
