//! A model folder that appears whole or not at all.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// A folder under construction: everything is written into a hidden sibling of the target and renamed at the end.
///
/// Dropped before [`NewFolder::commit`], it removes what it wrote. A process that is killed leaves the sibling behind;
/// the next attempt at the same target removes it.
#[derive(Debug)]
pub(crate) struct NewFolder {
    target: PathBuf,
    temporary: PathBuf,
    previous: PathBuf,
    committed: bool,
}

impl NewFolder {
    /// Prepares to write `target`. It must not exist, or be an empty folder, or, with `replace`, be a model folder.
    pub(crate) fn create(target: &Path, replace: bool) -> Result<Self> {
        let target = fs::canonicalize(target).unwrap_or_else(|_| target.to_owned());
        let (Some(name), Some(parent)) = (target.file_name(), target.parent()) else {
            return Err(Error::format(&target, "is no place for a new folder: give a folder name"));
        };
        let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        let sibling = |suffix: &str| parent.join(format!(".{}.{suffix}", name.to_string_lossy()));
        let (temporary, previous) = (sibling("partial"), sibling("previous"));
        if !target.exists() && previous.exists() {
            // A replacement was killed between its two renames: the old folder is complete under its other name.
            fs::rename(&previous, &target).map_err(Error::io("restore", &target))?;
        }
        check_target(&target, replace)?;
        fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        remove(&temporary)?;
        fs::create_dir(&temporary).map_err(Error::io("create", &temporary))?;
        Ok(Self { target, temporary, previous, committed: false })
    }

    /// Where to write.
    pub(crate) fn path(&self) -> &Path {
        &self.temporary
    }

    /// Puts the folder in its place. An old one stays complete until the new one is: it is moved aside, and removed
    /// when the new one stands.
    pub(crate) fn commit(mut self) -> Result<()> {
        sync(&self.temporary)?;
        let replaced = match fs::remove_dir(&self.target) {
            Ok(()) => false,
            Err(error) if error.kind() == ErrorKind::NotFound => false,
            Err(_) => {
                remove(&self.previous)?;
                fs::rename(&self.target, &self.previous).map_err(Error::io("move aside", &self.target))?;
                true
            }
        };
        if let Err(error) = fs::rename(&self.temporary, &self.target) {
            if replaced {
                fs::rename(&self.previous, &self.target).map_err(Error::io("restore", &self.target))?;
            }
            return Err(Error::io("create", &self.target)(error));
        }
        self.committed = true;
        if let Some(parent) = self.target.parent() {
            sync(if parent.as_os_str().is_empty() { Path::new(".") } else { parent })?;
        }
        if replaced { remove(&self.previous) } else { Ok(()) }
    }
}

impl Drop for NewFolder {
    fn drop(&mut self) {
        if !self.committed {
            // Nothing more can be done about a failure here; the next attempt removes the remains.
            let _ = fs::remove_dir_all(&self.temporary);
        }
    }
}

/// Copies every file of `from` that is neither weights nor `config.json` into `into`, folders included, links as the
/// files they point to; `into` keeps what it has. Training runs that somebody keeps inside the model's folder stay there.
pub(crate) fn carry(from: &Path, into: &Path) -> Result<()> {
    for entry in fs::read_dir(from).map_err(Error::io("read", from))? {
        let entry = entry.map_err(Error::io("read", from))?;
        let (source, name) = (entry.path(), entry.file_name());
        let target = into.join(&name);
        let name = name.to_string_lossy();
        let is_folder = entry.file_type().map_err(Error::io("read", &source))?.is_dir();
        if is_folder && !name.starts_with('.') && !is_run(&source) {
            carry_folder(&source, &target)?;
        } else if !is_folder && source.is_file() && !is_weights(&name) && name != "config.json" && !target.exists() {
            copy(&source, &target)?;
        }
    }
    Ok(())
}

fn carry_folder(from: &Path, into: &Path) -> Result<()> {
    fs::create_dir(into).map_err(Error::io("create", into))?;
    carry(from, into)?;
    // A folder that held nothing but weights is not carried.
    if fs::read_dir(into).map_err(Error::io("read", into))?.next().is_none() {
        fs::remove_dir(into).map_err(Error::io("remove", into))?;
    }
    Ok(())
}

fn copy(from: &Path, into: &Path) -> Result<()> {
    let mut source = File::open(from).map_err(Error::io("read", from))?;
    let mut target = File::create(into).map_err(Error::io("create", into))?;
    io::copy(&mut source, &mut target).map_err(Error::io("write", into))?;
    target.sync_all().map_err(Error::io("write", into))
}

/// Whether a folder is a training run's: what `grafter distill` and `grafter train` write first into it.
fn is_run(folder: &Path) -> bool {
    ["config.toml", "metrics.jsonl"].iter().all(|name| folder.join(name).is_file())
}

/// Whether a file holds weights or lists files that do.
fn is_weights(name: &str) -> bool {
    const WEIGHTS: [&str; 11] = [
        ".safetensors",
        ".gguf",
        ".ggml",
        ".pt",
        ".pth",
        ".ckpt",
        ".h5",
        ".msgpack",
        ".onnx",
        ".onnx_data",
        ".index.json",
    ];
    WEIGHTS.iter().any(|ending| name.ends_with(ending)) || (name.ends_with(".bin") && name != "training_args.bin")
}

fn check_target(target: &Path, replace: bool) -> Result<()> {
    match fs::read_dir(target) {
        Ok(mut entries) => {
            if entries.next().is_none() || (replace && target.join("config.json").is_file()) {
                Ok(())
            } else if replace {
                Err(Error::format(target, "holds files but no config.json: it is no model folder and is not replaced"))
            } else {
                Err(Error::format(target, "exists and is not empty: choose another folder or remove this one"))
            }
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(_) if target.exists() && !target.is_dir() => {
            Err(Error::format(target, "exists and is no folder: choose another name"))
        }
        Err(error) => Err(Error::io("read", target)(error)),
    }
}

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", folder)(error)),
        _ => Ok(()),
    }
}

/// Waits until a folder's entries are on the disk.
fn sync(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::io("write", folder))
}
