//! A run's folder and who may write in it.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::events::EVENTS;
use crate::files;

/// An open run folder. While it is open no other process can open it.
pub(crate) struct RunFolder {
    path: PathBuf,
    /// Holds the lock; the system lets go of it however the process ends.
    _lock: Option<File>,
}

impl RunFolder {
    /// Opens the folder, making it where there is none, and clears it of half-written files.
    ///
    /// # Errors
    /// When it cannot be made, another process has it open, or it holds other things than a run.
    pub fn open(path: &Path) -> Result<Self> {
        files::create_folder(path)?;
        let lock = lock(path)?;
        check_is_run(path)?;
        files::remove_leftovers(path)?;
        Ok(Self { path: path.to_owned(), _lock: lock })
    }

    /// The resolved configuration.
    pub fn config(&self) -> PathBuf {
        self.path.join("config.toml")
    }

    /// The loss log.
    pub fn metrics(&self) -> PathBuf {
        self.path.join("metrics.jsonl")
    }

    /// What took how long.
    pub fn timing(&self) -> PathBuf {
        self.path.join("timing.jsonl")
    }

    /// What TensorBoard reads.
    pub fn events(&self) -> PathBuf {
        self.path.join(EVENTS)
    }

    /// Packed data.
    pub fn data(&self) -> PathBuf {
        self.path.join("data")
    }

    /// The checkpoints.
    pub fn checkpoints(&self) -> PathBuf {
        self.path.join("checkpoints")
    }

    /// The finished model.
    pub fn model(&self) -> PathBuf {
        self.path.join("model")
    }
}

impl Drop for RunFolder {
    /// A run that failed before it wrote anything leaves no empty folders behind.
    fn drop(&mut self) {
        for folder in [self.data(), self.path.clone()] {
            // Fails where something is inside, which is what is wanted.
            let _ = fs::remove_dir(folder);
        }
    }
}

/// Refuses a folder with contents that no run put there. Before a run has written its configuration it has at most
/// begun to pack its data.
fn check_is_run(path: &Path) -> Result<()> {
    if path.join("config.toml").exists() {
        return Ok(());
    }
    for entry in fs::read_dir(path).with_context(|| format!("reading the folder {}", path.display()))? {
        let name = entry.with_context(|| format!("reading the folder {}", path.display()))?.file_name();
        if name != "data" && !name.to_string_lossy().starts_with(".config.toml") {
            bail!(
                "{} is no run's folder: it holds {} but no config.toml; name a new or empty folder with --run",
                path.display(),
                name.to_string_lossy()
            );
        }
    }
    Ok(())
}

/// Locks the folder itself, so that no lock file lies about. Where folders cannot be opened nothing is locked.
pub(crate) fn lock(path: &Path) -> Result<Option<File>> {
    if !cfg!(unix) {
        return Ok(None);
    }
    let folder = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    match folder.try_lock() {
        Ok(()) => Ok(Some(folder)),
        Err(TryLockError::WouldBlock) => {
            bail!("another grafter is working in {}: wait for it, or stop it first", path.display())
        }
        // Some network file systems know no locks; one process at a time is then the user's care.
        Err(TryLockError::Error(_)) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_process_at_a_time_and_no_trace_of_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        let open = RunFolder::open(&path).unwrap();
        let message = RunFolder::open(&path).err().unwrap().to_string();
        assert!(message.contains("another grafter is working in"), "{message}");
        drop(open);
        assert!(!path.exists());
        let open = RunFolder::open(&path).unwrap();
        fs::write(open.config(), "x").unwrap();
        drop(open);
        assert!(path.join("config.toml").exists());
    }

    #[test]
    fn a_folder_with_other_things_in_it_is_refused_and_left_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        fs::create_dir(path.join("data")).unwrap();
        fs::write(path.join(".thesis.txt.partial"), "the only copy").unwrap();
        fs::write(path.join("thesis.txt"), "the only copy").unwrap();
        let message = RunFolder::open(path).err().unwrap().to_string();
        assert!(message.contains("is no run's folder: it holds ") && message.contains("--run"), "{message}");
        // Not even what looks half-written is touched.
        assert_eq!(fs::read_dir(path).unwrap().count(), 3);
        for name in ["thesis.txt", ".thesis.txt.partial"] {
            assert_eq!(fs::read(path.join(name)).unwrap(), b"the only copy");
            fs::remove_file(path.join(name)).unwrap();
        }
        // What a run leaves that was killed while it packed its data, or while it wrote its configuration, is its own.
        fs::write(path.join("data").join("train.tokens"), "").unwrap();
        fs::write(path.join(".config.toml.partial"), "tas").unwrap();
        drop(RunFolder::open(path).unwrap());
        assert!(!path.join(".config.toml.partial").exists());
    }
}
