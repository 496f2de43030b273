//! Writing to standard output. A reader that leaves early is an error of kind `BrokenPipe`, which ends the program
//! quietly.

use std::io::Write;

use anyhow::Result;
use serde::Serialize;

pub(super) use crate::units::{bytes, thousands};

/// Writes a line.
pub(super) fn line(text: &str) -> Result<()> {
    Ok(writeln!(std::io::stdout().lock(), "{text}")?)
}

/// Writes text as it is, and shows it at once.
pub(super) fn text(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    Ok(stdout.flush()?)
}

/// Writes a value as indented JSON.
pub(super) fn json(value: &impl Serialize) -> Result<()> {
    line(&serde_json::to_string_pretty(value)?)
}
