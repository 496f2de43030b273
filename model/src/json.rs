//! JSON files: read whole with errors that name the file, written so that a reader never sees half of one.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use serde_json::{Map, Value};

use crate::{Error, Result};

/// Refuses a file where a model folder is expected.
pub(crate) fn expect_folder(path: &Path) -> Result<()> {
    if path.is_file() {
        return Err(Error::format(
            path,
            "is a file, but a model folder is expected: give the folder that holds config.json and the weights; a GGUF \
             file becomes one with `grafter import`",
        ));
    }
    Ok(())
}

/// The object in a JSON file.
pub(crate) fn read_object(path: &Path) -> Result<Map<String, Value>> {
    match read_value(path)? {
        Value::Object(object) => Ok(object),
        _ => Err(Error::format(path, "expected a JSON object { … } at the top")),
    }
}

/// The value in a JSON file.
pub(crate) fn read_value(path: &Path) -> Result<Value> {
    let text = read_text(path)?;
    serde_json::from_str(&text).map_err(|error| Error::format(path, format!("not valid JSON: {error}")))
}

/// A UTF-8 file.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    let bytes = fs::read(path).map_err(Error::io("read", path))?;
    String::from_utf8(bytes).map_err(|error| {
        Error::format(path, format!("not UTF-8 text: byte {} is not", error.utf8_error().valid_up_to()))
    })
}

/// Writes a JSON value, indented by two, with a final newline, and waits until it is on the disk.
pub(crate) fn write(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    let mut file = BufWriter::new(File::create(path).map_err(Error::io("create", path))?);
    serde_json::to_writer_pretty(&mut file, value).map_err(|error| Error::io("write", path)(error.into()))?;
    file.write_all(b"\n").map_err(Error::io("write", path))?;
    let file = file.into_inner().map_err(|error| Error::io("write", path)(error.into_error()))?;
    file.sync_all().map_err(Error::io("write", path))
}
