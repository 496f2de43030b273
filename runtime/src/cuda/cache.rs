//! Machine code kept on disk: a second start compiles nothing.
//!
//! One file per kernel text, GPU model and driver, in `kernels` under the cache folder: `$GRAFTER_CACHE`, or else
//! `$XDG_CACHE_HOME/grafter`, or else `~/.cache/grafter`; `GRAFTER_CACHE=off` keeps nothing. The folder may be deleted at
//! any time. A file's name is the SHA-256 of all that its contents depend on; the file holds that name again and the
//! SHA-256 of the code, so that a damaged, cut off or renamed file is known for one and thrown away. Files are written
//! aside and renamed: other processes see a whole file or none. They are not forced to the disk: what a power failure cuts
//! off is known for damaged, too.
//!
//! Nothing here fails a load: what cannot be read is compiled again, what cannot be written is a warning, once.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};

use sha2::{Digest, Sha256};

/// First line of every file. The number changes with the layout and with how texts are compiled.
const MAGIC: &str = "grafter machine code 1";

/// The machine code of one kind of GPU under one driver.
pub(super) struct Cache {
    /// `None` keeps nothing.
    folder: Option<PathBuf>,
    /// All but the text that machine code depends on.
    compiler: String,
}

impl Cache {
    /// The cache in this folder, for what a compiler makes: `compiler` names the GPU model and the driver's version.
    pub(super) fn new(folder: Option<PathBuf>, compiler: String) -> Self {
        Self { folder, compiler }
    }

    /// The machine code of a text, if a whole file of it is there. A damaged one is removed.
    pub(super) fn get(&self, text: &str) -> Option<Vec<u8>> {
        let key = self.key(text);
        let path = self.path(&key)?;
        let file = fs::read(&path).ok()?;
        let code = read(&file, &key);
        if code.is_none() {
            let _ = fs::remove_file(&path);
        }
        code.map(<[u8]>::to_vec)
    }

    /// Keeps the machine code of a text.
    pub(super) fn put(&self, text: &str, code: &[u8]) {
        let key = self.key(text);
        let Some(path) = self.path(&key) else { return };
        if let Err(error) = write(&path, &key, code) {
            static WARNED: Once = Once::new();
            WARNED.call_once(|| {
                eprintln!(
                    "warning: compiled kernels cannot be kept in {} ({error}): every start compiles them anew; \
                     GRAFTER_CACHE names another folder, GRAFTER_CACHE=off keeps none",
                    path.parent().unwrap_or(&path).display()
                );
            });
        }
    }

    /// Removes the machine code of a text: the driver does not take it.
    pub(super) fn discard(&self, text: &str) {
        if let Some(path) = self.path(&self.key(text)) {
            let _ = fs::remove_file(path);
        }
    }

    fn key(&self, text: &str) -> String {
        let mut digest = Sha256::new();
        for part in [MAGIC, &self.compiler, text] {
            // With its length, no part runs over into the next.
            digest.update((part.len() as u64).to_le_bytes());
            digest.update(part);
        }
        hexadecimal(&digest.finalize())
    }

    fn path(&self, key: &str) -> Option<PathBuf> {
        Some(self.folder.as_ref()?.join("kernels").join(format!("{key}.cubin")))
    }
}

/// The cache folder that the environment names; `None` for none.
pub(super) fn folder() -> Option<PathBuf> {
    folder_of(|name| env::var_os(name).filter(|value| !value.is_empty()))
}

fn folder_of(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    match variable("GRAFTER_CACHE") {
        Some(value) if value == "off" => None,
        Some(value) => Some(value.into()),
        // The XDG specification: a relative path is none.
        None => variable("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
            .or_else(|| Some(PathBuf::from(variable("HOME")?).join(".cache")))
            .map(|caches| caches.join("grafter")),
    }
}

/// The code of a file whose three lines of header fit it.
fn read<'a>(file: &'a [u8], key: &str) -> Option<&'a [u8]> {
    let header = MAGIC.len() + 1 + 2 * (64 + 1);
    let (header, code) = file.split_at_checked(header)?;
    (header == self::header(key, code).as_bytes()).then_some(code)
}

fn header(key: &str, code: &[u8]) -> String {
    format!("{MAGIC}\n{key}\n{}\n", hexadecimal(&Sha256::digest(code)))
}

fn write(path: &Path, key: &str, code: &[u8]) -> io::Result<()> {
    static FILES: AtomicU64 = AtomicU64::new(0);
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let aside = folder.join(format!(".{key}.{}-{}", process::id(), FILES.fetch_add(1, Ordering::Relaxed)));
    let written =
        fs::write(&aside, [header(key, code).as_bytes(), code].concat()).and_then(|()| fs::rename(&aside, path));
    if written.is_err() {
        let _ = fs::remove_file(&aside);
    }
    written
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(folder: &Path) -> Cache {
        Cache::new(Some(folder.to_owned()), "GPU 9.0, driver 1".to_owned())
    }

    fn files(folder: &Path) -> Vec<PathBuf> {
        fs::read_dir(folder.join("kernels")).unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    #[test]
    fn code_comes_back_for_the_same_text_gpu_and_driver_only() {
        let folder = tempfile::tempdir().unwrap();
        let own = cache(folder.path());
        assert_eq!(own.get("text"), None);
        for code in [&b""[..], b"code", b"longer code"] {
            own.put("text", code);
            assert_eq!(own.get("text").as_deref(), Some(code));
        }
        assert_eq!(own.get("text "), None);
        let other = Cache::new(Some(folder.path().to_owned()), "GPU 9.0, driver 2".to_owned());
        assert_eq!(other.get("text"), None);
        assert_eq!(files(folder.path()).len(), 1, "a file was left aside");
        own.discard("text");
        assert_eq!(own.get("text"), None);
        assert_eq!(files(folder.path()).len(), 0);
    }

    #[test]
    fn every_damage_is_found_and_the_file_removed() {
        let folder = tempfile::tempdir().unwrap();
        let cache = cache(folder.path());
        cache.put("text", b"some machine code");
        let path = files(folder.path()).pop().unwrap();
        let whole = fs::read(&path).unwrap();
        let mut damaged: Vec<Vec<u8>> = (0..whole.len()).map(|length| whole[..length].to_vec()).collect();
        damaged.extend((0..whole.len()).map(|position| {
            let mut file = whole.clone();
            file[position] ^= 1;
            file
        }));
        damaged.push([&whole[..], b"x"].concat());
        for file in damaged {
            fs::write(&path, file).unwrap();
            assert_eq!(cache.get("text"), None);
            assert!(!path.exists());
        }
        // Another text's whole file under this name.
        cache.put("other", b"other machine code");
        fs::rename(files(folder.path()).pop().unwrap(), &path).unwrap();
        assert_eq!(cache.get("text"), None);
        cache.put("text", b"some machine code");
        assert_eq!(cache.get("text").unwrap(), b"some machine code");
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_no_error() {
        let folder = tempfile::tempdir().unwrap();
        // A file where the folder would be: not even root can write there.
        fs::write(folder.path().join("kernels"), "").unwrap();
        let cache = cache(folder.path());
        cache.put("text", b"code");
        assert_eq!(cache.get("text"), None);
        cache.discard("text");
    }

    #[test]
    fn a_cache_that_is_off_keeps_nothing() {
        let cache = Cache::new(None, String::new());
        cache.put("text", b"code");
        assert_eq!(cache.get("text"), None);
        cache.discard("text");
    }

    #[test]
    fn the_environment_names_the_folder() {
        let folder = |variables: &[(&str, &str)]| {
            let value = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into());
            folder_of(value).map(|path| path.to_str().unwrap().to_owned())
        };
        assert_eq!(folder(&[("HOME", "/home/me")]).unwrap(), "/home/me/.cache/grafter");
        assert_eq!(folder(&[("HOME", "/home/me"), ("XDG_CACHE_HOME", "/caches")]).unwrap(), "/caches/grafter");
        assert_eq!(folder(&[("HOME", "/home/me"), ("XDG_CACHE_HOME", "caches")]).unwrap(), "/home/me/.cache/grafter");
        assert_eq!(folder(&[("HOME", "/home/me"), ("GRAFTER_CACHE", "/own")]).unwrap(), "/own");
        assert_eq!(folder(&[("HOME", "/home/me"), ("GRAFTER_CACHE", "off")]), None);
        assert_eq!(folder(&[]), None);
    }
}
