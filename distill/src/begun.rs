//! Folders of long work that may be interrupted: what it was begun with, and who works in it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::files;
use crate::train::lock_folder;

const SETTINGS: &str = "settings.json";

/// What the work was begun with.
#[derive(Serialize, Deserialize)]
struct Begun {
    settings: Value,
    /// SHA-256 of what it is made from, by role.
    hashes: BTreeMap<String, String>,
}

/// Opens the folder of such work (`what` it is called, in a word), making it where there is none; other processes are kept out as
/// long as the file that is returned is open. What may change from one call to the next is no part of `settings`.
///
/// # Errors
/// A folder with other things in it, or begun with other settings, models or data, naming the differences; one that another
/// process has open.
pub(crate) fn open(
    folder: &Path,
    what: &str,
    settings: &impl Serialize,
    hashes: &BTreeMap<String, String>,
) -> Result<Option<File>> {
    files::create_folder(folder)?;
    let lock = lock_folder(folder)?;
    let wanted = Begun { settings: serde_json::to_value(settings)?, hashes: hashes.clone() };
    let path = folder.join(SETTINGS);
    match files::read_json::<Begun>(&path)? {
        Some(begun) => {
            let differences = differences(&begun, &wanted);
            ensure!(
                differences.is_empty(),
                "the {what} in {} began differently: {}; give the same, or name a new folder with --out",
                folder.display(),
                differences.join("; ")
            );
            files::remove_leftovers(folder)?;
        }
        None => {
            let mut entries = fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
            let other = entries.find_map(|entry| entry.ok().map(|entry| entry.file_name()));
            let other = other.filter(|name| !name.to_string_lossy().starts_with(".settings.json"));
            ensure!(
                other.is_none(),
                "{} is no {what}'s folder: it holds {}; name a new or empty folder with --out",
                folder.display(),
                other.unwrap_or_default().to_string_lossy()
            );
            files::write_json(&path, &wanted)?;
        }
    }
    Ok(lock)
}

/// In what two beginnings differ, in words.
fn differences(begun: &Begun, wanted: &Begun) -> Vec<String> {
    let flat = |begun: &Begun| -> Vec<(String, String)> {
        let settings = begun.settings.as_object().into_iter().flatten();
        let mut keys: Vec<(String, String)> = settings.map(|(key, value)| (key.clone(), text(value))).collect();
        let hashes = begun.hashes.iter();
        keys.extend(
            hashes.map(|(role, hash)| (format!("the {role}'s SHA-256"), hash.get(..12).unwrap_or(hash).to_owned())),
        );
        keys
    };
    let (begun, wanted) = (flat(begun), flat(wanted));
    let value = |keys: &[(String, String)], wanted: &str| {
        keys.iter().find(|(key, _)| key == wanted).map_or("none".to_owned(), |(_, value)| value.clone())
    };
    let mut keys: Vec<&String> = begun.iter().map(|(key, _)| key).collect();
    keys.extend(wanted.iter().map(|(key, _)| key).filter(|key| !begun.iter().any(|(known, _)| known == *key)));
    keys.into_iter()
        .filter(|key| value(&begun, key) != value(&wanted, key))
        .map(|key| format!("{key} was {}, is now {}", value(&begun, key), value(&wanted, key)))
        .collect()
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => "none".to_owned(),
        other => other.to_string(),
    }
}
