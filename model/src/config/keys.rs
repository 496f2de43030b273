//! Reading keys of a JSON object with errors that name the key.

use std::path::PathBuf;

use serde_json::{Map, Value};

use crate::{Error, Result};

/// Sizes above this are refused: no model has them, and products of a few stay far from overflow.
const GREATEST_SIZE: u64 = 1 << 24;
/// More layers than this are refused.
const GREATEST_LAYERS: usize = 10_000;

/// An object of a configuration and the keys that lead to it.
pub(super) struct Keys<'a> {
    object: &'a Map<String, Value>,
    prefix: String,
}

impl<'a> Keys<'a> {
    /// The whole configuration.
    pub(super) fn new(object: &'a Map<String, Value>) -> Self {
        Self { object, prefix: String::new() }
    }

    /// An error about `key` of this object.
    pub(super) fn fail(&self, key: &str, problem: impl Into<String>) -> Error {
        Error::Configuration {
            path: PathBuf::from("config.json"),
            key: format!("{}{key}", self.prefix),
            problem: problem.into(),
        }
    }

    /// The value of `key`; absent and null are the same.
    pub(super) fn value(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    /// Whether `key` is there, be it null.
    pub(super) fn has(&self, key: &str) -> bool {
        self.object.contains_key(key)
    }

    /// The object under `key`.
    pub(super) fn child(&self, key: &str) -> Result<Option<Keys<'a>>> {
        self.optional(key, "an object { … }", Value::as_object)
            .map(|object| object.map(|object| Keys { object, prefix: format!("{}{key}.", self.prefix) }))
    }

    /// The object under `key`, which must be there.
    pub(super) fn required_child(&self, key: &str) -> Result<Keys<'a>> {
        self.child(key)?.ok_or_else(|| self.missing(key))
    }

    /// A positive whole number.
    pub(super) fn size(&self, key: &str) -> Result<Option<usize>> {
        self.optional(key, "a whole number from 1 to 16777216", |value| {
            value.as_u64().filter(|size| (1..=GREATEST_SIZE).contains(size)).map(|size| size as usize)
        })
    }

    /// A positive whole number that must be there.
    pub(super) fn required_size(&self, key: &str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| self.missing(key))
    }

    /// A number of layers that must be there.
    pub(super) fn required_layers(&self, key: &str) -> Result<usize> {
        let layers = self.required_size(key)?;
        if layers > GREATEST_LAYERS {
            return Err(self.fail(key, format!("{layers} layers: expected at most {GREATEST_LAYERS}")));
        }
        Ok(layers)
    }

    /// Refuses a size that follows from `key` and others when it is beyond reason.
    pub(super) fn check_size(&self, key: &str, size: usize) -> Result<()> {
        if size as u64 > GREATEST_SIZE {
            return Err(self.fail(key, format!("gives a width of {size}: expected at most {GREATEST_SIZE}")));
        }
        Ok(())
    }

    /// A finite number.
    pub(super) fn number(&self, key: &str) -> Result<Option<f64>> {
        self.optional(key, "a number", |value| value.as_f64().filter(|number| number.is_finite()))
    }

    /// A number that is finite and above zero as f32, too, which models compute in.
    pub(super) fn positive(&self, key: &str) -> Result<Option<f64>> {
        self.optional(key, "a number above 0", |value| {
            value.as_f64().filter(|number| *number as f32 > 0.0 && (*number as f32).is_finite())
        })
    }

    /// A truth value.
    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.optional(key, "true or false", Value::as_bool)
    }

    /// A string.
    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.optional(key, "a string", Value::as_str)
    }

    /// A list of strings.
    pub(super) fn texts(&self, key: &str) -> Result<Option<Vec<&'a str>>> {
        self.optional(key, "a list of strings", |value| value.as_array()?.iter().map(Value::as_str).collect())
    }

    /// A token id.
    pub(super) fn token(&self, key: &str) -> Result<Option<u32>> {
        self.optional(key, "a token id", as_token)
    }

    /// One token id or a list of them.
    pub(super) fn tokens(&self, key: &str) -> Result<Vec<u32>> {
        let tokens = self.optional(key, "a token id or a list of token ids", |value| match value {
            Value::Array(values) => values.iter().map(as_token).collect(),
            value => Some(vec![as_token(value)?]),
        })?;
        Ok(tokens.unwrap_or_default())
    }

    fn optional<T>(&self, key: &str, expected: &str, read: impl FnOnce(&'a Value) -> Option<T>) -> Result<Option<T>> {
        match self.value(key) {
            None => Ok(None),
            Some(value) => match read(value) {
                Some(read) => Ok(Some(read)),
                None => Err(self.fail(key, format!("expected {expected}, found {}", shortened(value)))),
            },
        }
    }

    fn missing(&self, key: &str) -> Error {
        self.fail(key, "this key is missing, and the model cannot be built without it")
    }
}

fn as_token(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|token| u32::try_from(token).ok())
}

fn shortened(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
