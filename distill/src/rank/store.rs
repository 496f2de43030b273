//! A ranking's folder.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{LayerScore, Method, RankConfig, Ranking, plot};
use crate::{begun, files};

/// The finished ranking.
pub(super) const RANKING: &str = "ranking.json";
const LAYERS: &str = "layers.jsonl";
const DATA: &str = "data";

/// An open folder. While it is open no other process can open it.
pub(super) struct Store {
    folder: PathBuf,
    log: File,
    /// What is known already, by layer.
    known: BTreeMap<usize, LayerScore>,
    _lock: Option<File>,
}

impl Store {
    /// Opens the folder of a ranking, making it where there is none.
    ///
    /// # Errors
    /// A folder with other things in it, or with a ranking of other settings, models or data, naming the differences;
    /// one that another process has open.
    pub fn open(folder: &Path, settings: &RankConfig, hashes: &BTreeMap<String, String>) -> Result<Self> {
        let lock = begun::open(folder, "ranking", settings, hashes)?;
        let path = folder.join(LAYERS);
        let (known, bytes) = known(&path)?;
        let log = OpenOptions::new()
            .append(true)
            .create(true)
            .open(&path)
            .and_then(|log| log.set_len(bytes).map(|()| log))
            .with_context(|| format!("opening {}", path.display()))?;
        Ok(Self { folder: folder.to_owned(), log, known, _lock: lock })
    }

    /// The ranking, when an earlier call finished it.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn finished(&self) -> Result<Option<Ranking>> {
        files::read_json(&self.folder.join(RANKING))
    }

    /// What is known of a layer.
    pub fn known(&self, layer: usize) -> Option<&LayerScore> {
        self.known.get(&layer)
    }

    /// Keeps what was found out about a layer; it is on the disk when this returns.
    ///
    /// # Errors
    /// A full disk.
    pub fn add(&mut self, score: LayerScore) -> Result<()> {
        let mut line = serde_json::to_vec(&score)?;
        line.push(b'\n');
        let place = || format!("writing {}; what was ranked before is kept", self.folder.join(LAYERS).display());
        self.log.write_all(&line).and_then(|()| self.log.sync_data()).with_context(place)?;
        self.known.insert(score.layer, score);
        Ok(())
    }

    /// Writes the finished ranking and its plots.
    ///
    /// # Errors
    /// A full disk.
    pub fn finish(&self, ranking: &Ranking) -> Result<()> {
        let write = |name: &str, text: String| {
            files::write_file(&self.folder.join(name), |writer| Ok(writer.write_all(text.as_bytes())?))
        };
        write("importance.svg", plot::bars(ranking)?)?;
        if ranking.settings.method == Method::Mmr {
            write("change-of-rank.svg", plot::slopes(ranking))?;
        }
        // Last: its presence means that all is there.
        files::write_json(&self.folder.join(RANKING), ranking)
    }
}

/// Where the documents go once they are packed.
pub(super) fn packed_data(folder: &Path) -> Result<PathBuf> {
    files::create_folder(&folder.join(DATA))?;
    Ok(folder.join(DATA).join("documents.tokens"))
}

/// The whole lines of a log and how many bytes they take; a line that a killed process left torn ends it.
fn known(path: &Path) -> Result<(BTreeMap<usize, LayerScore>, u64)> {
    let mut known = BTreeMap::new();
    if !path.exists() {
        return Ok((known, 0));
    }
    let text = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    let mut bytes = 0;
    for line in text.split_inclusive(|&byte| byte == b'\n') {
        let Ok(score) = serde_json::from_slice::<LayerScore>(line) else { break };
        if !line.ends_with(b"\n") {
            break;
        }
        bytes += line.len() as u64;
        known.insert(score.layer, score);
    }
    Ok((known, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hashes() -> BTreeMap<String, String> {
        BTreeMap::from([("data".to_owned(), "0123456789abcdef".to_owned())])
    }

    #[test]
    fn whole_lines_are_known_again_and_torn_ones_dropped() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("ranking");
        let config = RankConfig::new("m".into(), Method::Loo, "d".into());
        let score = |layer: usize| LayerScore { layer, score: 1.0 / 3.0, score_at_start: Some(0.1) };
        let mut store = Store::open(&folder, &config, &hashes()).unwrap();
        assert!(Store::open(&folder, &config, &hashes()).err().unwrap().to_string().contains("another grafter"));
        store.add(score(2)).unwrap();
        store.add(score(0)).unwrap();
        drop(store);
        let path = folder.join(LAYERS);
        let whole = fs::read(&path).unwrap();
        let mut torn = whole.clone();
        torn.extend(b"{\"layer\":1,\"score\":0.3");
        fs::write(&path, torn).unwrap();
        let store = Store::open(&folder, &config, &hashes()).unwrap();
        assert_eq!(store.known(2), Some(&score(2)));
        assert_eq!((store.known(0), store.known(1)), (Some(&score(0)), None));
        assert_eq!(fs::read(&path).unwrap(), whole);
    }

    #[test]
    fn a_full_disk_is_named_and_what_was_known_stays() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("ranking");
        let config = RankConfig::new("m".into(), Method::Loo, "d".into());
        let mut store = Store::open(&folder, &config, &hashes()).unwrap();
        let score = |layer: usize| LayerScore { layer, score: 0.5, score_at_start: None };
        store.add(score(0)).unwrap();
        // Every write to it fails.
        store.log = OpenOptions::new().append(true).open("/dev/full").unwrap();
        let message = format!("{:#}", store.add(score(1)).unwrap_err());
        assert!(message.contains("layers.jsonl; what was ranked before is kept: No space left"), "{message}");
        assert!(store.known(1).is_none());
        drop(store);
        let store = Store::open(&folder, &config, &hashes()).unwrap();
        assert_eq!((store.known(0), store.known(1)), (Some(&score(0)), None));
    }

    #[test]
    fn another_beginning_is_refused_by_name() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("ranking");
        let config = RankConfig::new("m".into(), Method::Loo, "d".into());
        drop(Store::open(&folder, &config, &hashes()).unwrap());
        let other = RankConfig { samples: 3, teacher: Some("t".into()), ..config.clone() };
        let mut changed = hashes();
        changed.insert("data".to_owned(), "ffff".to_owned());
        let message = Store::open(&folder, &other, &changed).err().unwrap().to_string();
        for expected in [
            "samples was 16, is now 3",
            "teacher was none, is now \"t\"",
            "the data's SHA-256 was 0123456789ab, is now ffff",
        ] {
            assert!(message.contains(expected), "{message}");
        }
        let taken = parent.path().join("taken");
        fs::create_dir(&taken).unwrap();
        fs::write(taken.join("thesis.txt"), "the only copy").unwrap();
        let message = Store::open(&taken, &config, &hashes()).err().unwrap().to_string();
        assert!(message.contains("is no ranking's folder: it holds thesis.txt"), "{message}");
        assert_eq!(fs::read_dir(&taken).unwrap().count(), 1);
    }
}
