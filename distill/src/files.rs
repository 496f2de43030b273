//! Files that are there whole or not at all.
//!
//! Everything that a run must not lose is written beside its final place, flushed to the disk, and renamed. What a
//! reader sees under the final name is therefore complete, whenever the process dies; after a power loss too, as far as
//! the file system keeps its promises.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use crate::interruption::Interruption;

/// Ends the names of files and folders that are being written.
const PARTIAL: &str = ".partial";

/// Writes a file: `write` fills it, then it takes its name. On an error nothing changes under that name.
///
/// # Errors
/// Those of `write`, as they are: what it reads may be at fault, not this file. A folder that cannot be written, a full
/// disk, naming this file.
pub fn write_file<T>(path: &Path, write: impl FnOnce(&mut Writer) -> Result<T>) -> Result<T> {
    let real = real_path(path)?;
    let path = real.as_path();
    let partial = partial_sibling(path)?;
    let written = fill(&partial, path, write).and_then(|value| {
        fs::rename(&partial, path).and_then(|()| sync_folder(parent(path))).map_err(in_writing(path))?;
        Ok(value)
    });
    if written.is_err() {
        // The first error is the one to report; a leftover is removed by the next start.
        let _ = fs::remove_file(&partial);
    }
    written
}

/// As [`write_file`], but a file that is there already stays, and must have the same contents.
///
/// # Errors
/// As [`write_file`]; other contents, naming the file.
pub fn write_same_file(path: &Path, write: impl FnOnce(&mut Writer) -> Result<()>) -> Result<()> {
    if !path.exists() {
        return write_file(path, write);
    }
    let wanted = partial_sibling(path)?;
    let hash = |path: &Path| hash_file(path, &Interruption::new());
    let same = fill(&wanted, path, write).and_then(|()| Ok(hash(&wanted)? == hash(path)?));
    // Found again and removed by the next attempt, should it stay.
    let _ = fs::remove_file(&wanted);
    if !same? {
        bail!(
            "{} is there and has other contents than what would be written: keep it and name another folder, or remove it",
            path.display()
        );
    }
    Ok(())
}

/// Where a file is to be put: a rename would put it in the place of a device, and of a link what should be behind it.
fn real_path(path: &Path) -> Result<PathBuf> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => {
            bail!("writing {}: it is a folder: name a file", path.display())
        }
        Ok(metadata) if !metadata.is_file() => {
            bail!("{} is no file that can be replaced: name another", path.display())
        }
        Ok(_) => Ok(fs::canonicalize(path).map_err(in_writing(path))?),
        Err(_) => Ok(path.to_owned()),
    }
}

/// That [`write_file`] can write a file, once [`create_parent`] has made its folder: for before the work that it is the result
/// of. Leaves nothing behind.
///
/// # Errors
/// As [`check_folder`]; a folder or a device of this name.
pub fn check_file(path: &Path) -> Result<()> {
    check_folder(parent(&real_path(path)?))
}

/// That files can be written in a folder, once it is made where it is not there: for before the work that they are the result
/// of. Leaves nothing behind.
///
/// # Errors
/// A file where a folder should be; one that cannot be written. Both are named.
pub fn check_folder(path: &Path) -> Result<()> {
    let there = path.ancestors().find(|folder| folder.exists()).unwrap_or(Path::new("."));
    if !there.is_dir() {
        bail!("writing {}: {} is no folder: name another place", path.display(), there.display());
    }
    // Permissions do not tell everything: the file system may be read-only.
    let attempt = there.join(format!(".grafter-{}{PARTIAL}", process::id()));
    let made = OpenOptions::new().write(true).create(true).truncate(true).open(&attempt);
    let gone = |error: io::Error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) };
    made.and_then(|_| fs::remove_file(&attempt).or_else(gone)).with_context(|| {
        format!("nothing can be written in {}: name another place, or change its permissions", there.display())
    })
}

/// Writes a value as JSON for people to read.
///
/// # Errors
/// As [`write_file`].
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    write_file(path, |writer| {
        serde_json::to_writer_pretty(&mut *writer, value)?;
        Ok(writer.write_all(b"\n")?)
    })
}

/// Reads a JSON file; `None` where there is none.
///
/// # Errors
/// A file that cannot be read or is not what this version writes.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    if !path.exists() {
        return Ok(None);
    }
    let text = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    serde_json::from_slice(&text)
        .map(Some)
        .with_context(|| format!("{} is not what this version writes", path.display()))
}

/// Writes a folder: `write` fills an empty one, then it takes its name, which must be free. On an error nothing
/// appears under that name.
///
/// # Errors
/// Those of `write`; a parent that cannot be written, a full disk, a name that is taken.
pub fn write_folder<T>(path: &Path, write: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    let partial = partial_sibling(path)?;
    let fill = || -> Result<T> {
        if partial.exists() {
            fs::remove_dir_all(&partial).context("removing what an earlier attempt left")?;
        }
        fs::create_dir(&partial)?;
        let value = write(&partial)?;
        sync_folder(&partial)?;
        fs::rename(&partial, path).context("putting the finished folder in its place")?;
        sync_folder(parent(path))?;
        Ok(value)
    };
    let written = fill();
    if written.is_err() {
        let _ = fs::remove_dir_all(&partial);
    }
    written.with_context(|| format!("writing {}", path.display()))
}

/// Writes a new file and flushes it to the disk: for files in a folder that [`write_folder`] is filling.
///
/// # Errors
/// Those of `write`, as they are, and of the file system, naming the file.
pub fn fill_file<T>(path: &Path, write: impl FnOnce(&mut Writer) -> Result<T>) -> Result<T> {
    fill(path, path, write)
}

fn fill<T>(place: &Path, name: &Path, write: impl FnOnce(&mut Writer) -> Result<T>) -> Result<T> {
    let file = NamedFile { file: File::create(place).map_err(in_writing(name))?, name: name.to_owned() };
    let mut writer = BufWriter::with_capacity(1 << 20, file);
    let value = write(&mut writer)?;
    writer.flush()?;
    writer.get_ref().file.sync_all().map_err(in_writing(name))?;
    Ok(value)
}

/// What fills a file.
pub type Writer = BufWriter<NamedFile>;

/// A file being written, whose errors name it: whoever fills it also reads others.
#[derive(Debug)]
pub struct NamedFile {
    file: File,
    name: PathBuf,
}

impl Write for NamedFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes).map_err(in_writing(&self.name))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush().map_err(in_writing(&self.name))
    }
}

impl Seek for NamedFile {
    fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
        self.file.seek(position).map_err(in_writing(&self.name))
    }
}

/// The same error, of the same kind, with the file's name.
fn in_writing(name: &Path) -> impl FnOnce(io::Error) -> io::Error {
    move |error| match error.kind() {
        // Whoever writes tries again, and must see it as it is.
        ErrorKind::Interrupted => error,
        kind => io::Error::new(kind, format!("writing {}: {error}", name.display())),
    }
}

/// Removes a folder so that no reader ever sees half of it: it loses its name first.
///
/// # Errors
/// When it cannot be renamed or removed.
pub fn remove_folder(path: &Path) -> Result<()> {
    let partial = partial_sibling(path)?;
    let remove = || -> Result<()> {
        fs::rename(path, &partial)?;
        fs::remove_dir_all(&partial)?;
        Ok(())
    };
    remove().with_context(|| format!("removing {}", path.display()))
}

/// Removes what a killed process left half-written in a folder.
///
/// # Errors
/// When the folder cannot be read or a leftover cannot be removed.
pub fn remove_leftovers(folder: &Path) -> Result<()> {
    let remove = || -> Result<()> {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if is_partial(&path) {
                if path.is_dir() { fs::remove_dir_all(&path)? } else { fs::remove_file(&path)? }
            }
        }
        Ok(())
    };
    remove().with_context(|| format!("clearing {} of what an earlier run left half-written", folder.display()))
}

/// Makes a folder and the folders above it.
///
/// # Errors
/// When one cannot be made, such as where a file has its name.
pub fn create_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("making the folder {}", path.display()))
}

/// Makes the folder that a file is to be in.
///
/// # Errors
/// As [`create_folder`].
pub fn create_parent(path: &Path) -> Result<()> {
    create_folder(parent(path))
}

/// A writer that also computes the SHA-256 of what passes through.
#[derive(Debug)]
pub struct HashingWriter<W> {
    inner: W,
    hasher: Sha256,
}

impl<W: Write> HashingWriter<W> {
    /// Writes to `inner`.
    pub fn new(inner: W) -> Self {
        Self { inner, hasher: Sha256::new() }
    }

    /// The hash of everything written, in hexadecimal.
    pub fn finish(self) -> String {
        hexadecimal(&self.hasher.finalize())
    }
}

impl<W: Write> Write for HashingWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

/// The SHA-256 of a file's bytes, in hexadecimal.
///
/// # Errors
/// When it cannot be read; when `interruption` ends it, since weights and data may be large.
pub fn hash_file(path: &Path, interruption: &Interruption) -> Result<String> {
    let hash = || -> Result<String> {
        let mut file = File::open(path)?;
        let mut hasher = Sha256::new();
        let mut block = vec![0; 1 << 20];
        loop {
            interruption.check()?;
            match file.read(&mut block)? {
                0 => return Ok(hexadecimal(&hasher.finalize())),
                count => hasher.update(&block[..count]),
            }
        }
    };
    hash().with_context(|| format!("reading {}", path.display()))
}

/// The SHA-256 of some bytes, in hexadecimal.
pub fn hash_bytes(bytes: &[u8]) -> String {
    hexadecimal(&Sha256::digest(bytes))
}

/// Bytes as lower-case hexadecimal digits.
pub fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn partial_sibling(path: &Path) -> Result<PathBuf> {
    let Some(name) = path.file_name() else { bail!("{} does not name a file or folder", path.display()) };
    Ok(path.with_file_name(format!(".{}{PARTIAL}", name.to_string_lossy())))
}

fn is_partial(path: &Path) -> bool {
    path.file_name().is_some_and(|name| {
        let name = name.to_string_lossy();
        name.starts_with('.') && name.ends_with(PARTIAL)
    })
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes names in a folder durable. Only Unix opens folders; elsewhere renaming has to be enough.
fn sync_folder(folder: &Path) -> io::Result<()> {
    if cfg!(unix) {
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn devices_are_refused_and_links_followed() {
        let folder = tempfile::tempdir().unwrap();
        let (target, link) = (folder.path().join("target"), folder.path().join("link"));
        fs::write(&target, "old").unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        write_file(&link, |writer| Ok(writer.write_all(b"new")?)).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read(&target).unwrap(), b"new");
        let pipe = folder.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let message = write_file(&pipe, |writer| Ok(writer.write_all(b"new")?)).unwrap_err().to_string();
        assert!(message.contains("is no file that can be replaced"), "{message}");
        assert!(!fs::metadata(&pipe).unwrap().is_file());
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        write_file(&path, |writer| Ok(writer.write_all(b"old")?)).unwrap();
        let error = write_file(&path, |writer| -> Result<()> {
            writer.write_all(b"half of the new")?;
            Err(std::io::Error::from(std::io::ErrorKind::StorageFull).into())
        });
        assert_eq!(format!("{:#}", error.unwrap_err()), "no storage space", "what fills the file speaks for itself");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn errors_of_the_file_itself_name_it() {
        let folder = tempfile::tempdir().unwrap();
        let message =
            |path: &Path| format!("{:#}", write_file(path, |writer| Ok(writer.write_all(b"x")?)).unwrap_err());
        let nowhere = folder.path().join("no such folder").join("file");
        assert!(message(&nowhere).starts_with(&format!("writing {}: No such file", nowhere.display())));
        let taken = folder.path().join("taken");
        fs::create_dir_all(taken.join("inside")).unwrap();
        assert!(message(&taken).starts_with(&format!("writing {}: ", taken.display())), "{}", message(&taken));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        // Every write to it fails.
        let full = fill_file(Path::new("/dev/full"), |writer| Ok(writer.write_all(&[0; 2 << 20])?)).unwrap_err();
        assert!(format!("{full:#}").starts_with("writing /dev/full: No space left"), "{full:#}");
        assert_eq!(full.downcast_ref::<io::Error>().unwrap().kind(), ErrorKind::StorageFull);
    }

    #[test]
    fn places_that_cannot_be_written_are_found_beforehand_and_nothing_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let (file, new) = (folder.path().join("file"), folder.path().join("new").join("newer"));
        fs::write(&file, "old").unwrap();
        check_file(&file).unwrap();
        check_file(&new).unwrap();
        check_folder(&new).unwrap();
        check_file(Path::new("a name in the current folder")).unwrap();
        let message = |checked: Result<()>| format!("{:#}", checked.unwrap_err());
        let of_folder = message(check_file(folder.path()));
        assert_eq!(of_folder, format!("writing {}: it is a folder: name a file", folder.path().display()));
        let below = message(check_file(&file.join("deep").join("file")));
        assert!(below.ends_with(&format!("{} is no folder: name another place", file.display())), "{below}");
        // Nobody may make files there, not even root.
        if cfg!(target_os = "linux") {
            let message = message(check_file(Path::new("/proc/new/file")));
            assert!(message.starts_with("nothing can be written in /proc: name another place, or "), "{message}");
        }
        assert_eq!(fs::read(&file).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(fs::read_dir(".").unwrap().all(|entry| !is_partial(&entry.unwrap().path())));
    }

    #[test]
    fn a_failed_folder_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("made");
        let error = write_folder(&path, |partial| -> Result<()> {
            fill_file(&partial.join("one"), |writer| Ok(writer.write_all(b"1")?))?;
            bail!("the second file failed")
        });
        assert!(format!("{:#}", error.unwrap_err()).contains("the second file failed"));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        write_folder(&path, |partial| fill_file(&partial.join("one"), |writer| Ok(writer.write_all(b"1")?))).unwrap();
        assert_eq!(fs::read(path.join("one")).unwrap(), b"1");
        remove_folder(&path).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn leftovers_of_a_killed_process_are_cleared() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join(".step-000004.partial")).unwrap();
        fs::write(folder.path().join(".step-000004.partial").join("weights"), b"half").unwrap();
        fs::write(folder.path().join(".state.json.partial"), b"half").unwrap();
        fs::write(folder.path().join("kept"), b"whole").unwrap();
        remove_leftovers(folder.path()).unwrap();
        let names: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["kept"]);
    }

    #[test]
    fn a_hash_is_the_published_one() {
        let digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(hash_bytes(b"abc"), digest);
        let mut writer = HashingWriter::new(Vec::new());
        writer.write_all(b"a").unwrap();
        writer.write_all(b"bc").unwrap();
        assert_eq!(writer.finish(), digest);
    }
}
