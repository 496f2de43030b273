//! Files mapped into memory: the one place outside `runtime` that needs `unsafe`.
#![allow(unsafe_code)]

use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::{Error, Result};

/// A whole file, read-only, in the address space. Pages are read when they are first touched and can be dropped again
/// by the system, so a mapped file costs no memory of its own.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    file: File,
    map: Mmap,
}

impl MappedFile {
    /// Maps a regular file (links are followed).
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be opened or mapped, [`Error::Format`] when it is no regular file.
    pub fn open(path: &Path) -> Result<Self> {
        // Opening a pipe waits for whoever writes into it; what became of the name since is asked once more.
        let is_file = |metadata: std::io::Result<std::fs::Metadata>| match metadata {
            Ok(metadata) if metadata.is_file() => Ok(()),
            Ok(_) => Err(Error::format(path, "expected a file, found something else")),
            Err(error) => Err(Error::io("open", path)(error)),
        };
        is_file(std::fs::metadata(path))?;
        let file = File::open(path).map_err(Error::io("open", path))?;
        is_file(file.metadata())?;
        // SAFETY: the map is read-only and private to this value, and lives as long as it. What Rust cannot know is
        // whether another process changes the file meanwhile. Changed bytes are only ever read as numbers or checked
        // text, every value of which is valid, so they give wrong results but nothing undefined in what is built from
        // them; a file that shrinks would end the process with SIGBUS when the lost pages are touched, never read
        // other memory. `bytes` looks at the file's length before each use to turn that into an error in all but a
        // deliberate race, and our own writers never shrink a file: they write a new one and rename it.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
        Ok(Self { path: path.to_owned(), file, map })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length of the file when it was opened, in bytes.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether the file was empty.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// The file's bytes.
    ///
    /// # Errors
    /// [`Error::Format`] when the file has become shorter since it was opened.
    pub fn bytes(&self) -> Result<&[u8]> {
        let now = self.file.metadata().map_err(Error::io("read", &self.path))?.len();
        if now < self.map.len() as u64 {
            return Err(Error::format(
                &self.path,
                format!("shrank from {} to {now} bytes while it was in use", self.map.len()),
            ));
        }
        Ok(&self.map)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn a_pipe_is_refused_at_once() {
        let path = std::env::temp_dir().join(format!("grafter-pipe-{}", std::process::id()));
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        let message = MappedFile::open(&path).unwrap_err().to_string();
        std::fs::remove_file(&path).unwrap();
        assert!(message.contains("expected a file, found something else"), "{message}");
    }

    #[test]
    fn a_file_that_shrinks_is_an_error_and_a_folder_is_refused() {
        let folder = std::env::temp_dir().join(format!("grafter-map-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("weights");
        std::fs::write(&path, [7u8; 10_000]).unwrap();
        let map = MappedFile::open(&path).unwrap();
        assert_eq!((map.len(), map.bytes().unwrap()[9_999]), (10_000, 7));
        File::options().write(true).open(&path).unwrap().set_len(100).unwrap();
        let message = map.bytes().unwrap_err().to_string();
        assert!(message.contains("shrank from 10000 to 100 bytes"), "{message}");
        std::fs::write(&path, []).unwrap();
        assert!(MappedFile::open(&path).unwrap().bytes().unwrap().is_empty());
        assert!(MappedFile::open(&folder).unwrap_err().to_string().contains("expected a file"));
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
