//! The teacher's part of a distillation, done beforehand: its likeliest tokens at every position, with their log-probabilities and
//! the mass of the rest, on the disk. Runs that learn from them never run the teacher.
//!
//! What is lost: tokens that are not listed are one to the divergence, so that it is too small by what they differ
//! among each other. `docs/teach.md` measures it.
//!
//! The folder: `settings.json`, `data/rows.tokens` (the packed rows; distil on these or on the same documents), `targets.bin`, which
//! grows; `progress.json` says how many of its rows count; at the end `targets.json`. A call that was interrupted or killed goes on
//! after the rows that count, and ends with the same bytes.

mod targets;

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use autograd::Tape;
use autograd::ops::TopLogProbabilities;
use model::chat::ChatTemplate;
use model::tokenizer::Tokenizer;
use model::{Model, Precision, TokenBatch};
use runtime::Device;
use serde::{Deserialize, Serialize};

pub use targets::{Description, Targets};

use crate::config::PrecisionKind;
use crate::data::{self, LongDocuments, PackOptions, TokenFile};
use crate::interruption::Interruption;
use crate::train::Progress;
use crate::train::models::{encoder, model_hash, tokenizer_hash};
use crate::{begun, files};
use targets::{DESCRIPTION, TARGETS, bytes_of};

const PROGRESS: &str = "progress.json";
/// Rows after which what was written is flushed to the disk and counts.
const ROWS_THAT_COUNT_TOGETHER: u64 = 64;

/// What is to be said of what.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TeachConfig {
    /// Folder of the teacher.
    pub teacher: PathBuf,
    /// Documents: jsonl, or a packed token file.
    pub data: PathBuf,
    /// Tokens of a row.
    pub sequence_length: usize,
    /// What to do with a document longer than a row.
    pub long_documents: LongDocuments,
    /// Whether the model's begin-of-sequence token is put before each text.
    pub begin_token: bool,
    /// Whether the model's end-of-sequence token is put after each text.
    pub end_token: bool,
    /// Tokens listed of every position.
    pub top: usize,
    /// Divides the teacher's logits.
    pub temperature: f64,
    /// Rows computed at once.
    pub micro_batch: usize,
    /// Element type of matrices and activations.
    pub precision: PrecisionKind,
    /// Where it is computed.
    pub device: String,
}

/// How many rows of `targets.bin` count, and the sum of their tails' probabilities.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct Done {
    rows: u64,
    tail: f64,
}

impl TeachConfig {
    fn check(&self) -> Result<()> {
        let lengths = PackOptions::SEQUENCE_LENGTHS;
        ensure!(
            lengths.contains(&self.sequence_length),
            "--sequence-length is {}: it must be from {} to {}",
            self.sequence_length,
            lengths.start(),
            lengths.end()
        );
        ensure!(self.top >= 1, "--top is 0: at least one token must be listed");
        ensure!(self.micro_batch >= 1, "--micro-batch is 0: it must be at least 1");
        ensure!(
            (1e-6..=1e6).contains(&self.temperature),
            "--temperature is {}: it must be from 0.000001 to 1000000",
            self.temperature
        );
        Ok(())
    }
}

/// Makes the targets, going on where an earlier call in the same folder was interrupted.
///
/// # Errors
/// Everything that is wrong with settings, model or data; settings, model or data other than those that the folder began with;
/// logits that are not finite; a full disk (what counts stays); an interruption.
pub fn run(
    config: &TeachConfig,
    folder: &Path,
    interruption: &Interruption,
    progress: &mut Progress,
) -> Result<Description> {
    config.check()?;
    let device: Device = config.device.parse()?;
    let tokenizer = Tokenizer::load(&config.teacher)?;
    let tokenizer_hash = tokenizer_hash(&config.teacher)?;
    let template = ChatTemplate::load(&config.teacher)?;
    let teacher_hash = model_hash(&config.teacher, interruption)?;
    let hashes = BTreeMap::from([
        ("teacher".to_owned(), teacher_hash.clone()),
        ("tokenizer".to_owned(), tokenizer_hash.clone()),
        ("data".to_owned(), files::hash_file(&config.data, interruption)?),
    ]);
    let _lock = begun::open(folder, "teaching", config, &hashes)?;
    if folder.join(DESCRIPTION).exists() {
        progress.say(&format!("the targets in {} are finished", folder.display()));
        return Ok(Targets::open(folder, interruption)?.description().clone());
    }
    let precision = match config.precision {
        PrecisionKind::F32 => Precision::AsStored,
        PrecisionKind::Bf16 => Precision::Bf16,
    };
    let teacher = Model::load(&config.teacher, &device, precision)
        .with_context(|| format!("loading {}", config.teacher.display()))?;
    let vocabulary = teacher.config.vocabulary_size;
    ensure!(config.top <= vocabulary, "--top is {}: the teacher's vocabulary has {vocabulary} tokens", config.top);
    let encoder =
        encoder(&teacher.config, &tokenizer, &tokenizer_hash, template.as_ref(), config.begin_token, config.end_token)?;
    files::create_folder(&folder.join("data"))?;
    let options = PackOptions { sequence_length: config.sequence_length, long_documents: config.long_documents };
    let will_pack = || progress.say(&format!("packing {}", config.data.display()));
    let cache = folder.join("data").join("rows.tokens");
    let rows = data::prepare(&config.data, &cache, &encoder, options, interruption, will_pack)?;
    let mut description = Description {
        teacher: teacher_hash,
        rows: rows.rows_hash().to_owned(),
        sequences: rows.sequences(),
        sequence_length: config.sequence_length,
        top: config.top,
        temperature: config.temperature,
        mean_tail: 0.0,
        sha256: String::new(),
    };
    let tail = say_everything(config, folder, &teacher, &rows, &description, interruption, progress)?;
    description.mean_tail = tail / (description.sequences as f64 * description.sequence_length as f64);
    description.sha256 = files::hash_file(&folder.join(TARGETS), interruption)?;
    // Last: its presence means that all is there.
    files::write_json(&folder.join(DESCRIPTION), &description)?;
    Ok(description)
}

/// Fills `targets.bin` and returns the sum of all tails.
fn say_everything(
    config: &TeachConfig,
    folder: &Path,
    teacher: &Model,
    rows: &TokenFile,
    description: &Description,
    interruption: &Interruption,
    progress: &mut Progress,
) -> Result<f64> {
    let mut done: Done = files::read_json(&folder.join(PROGRESS))?.unwrap_or_default();
    let path = folder.join(TARGETS);
    let mut file = OpenOptions::new()
        .append(true)
        .create(true)
        .open(&path)
        .with_context(|| format!("opening {}", path.display()))?;
    let counts = done.rows * description.row_bytes() as u64;
    let there = file.metadata().with_context(|| format!("reading {}", path.display()))?.len();
    ensure!(
        counts <= there,
        "{} has {there} bytes where {counts} were written: it was cut off; start again in a new folder",
        path.display()
    );
    file.set_len(counts).with_context(|| format!("writing {}", path.display()))?;
    progress.begin(done.rows, description.sequences);
    let count = |file: &File, done: Done| -> Result<()> {
        file.sync_data().with_context(|| format!("writing {}", path.display()))?;
        files::write_json(&folder.join(PROGRESS), &done)
    };
    let mut counted = done.rows;
    while done.rows < description.sequences {
        if let Err(interrupted) = interruption.check() {
            count(&file, done)?;
            progress.end();
            return Err(interrupted);
        }
        let last = description.sequences.min(done.rows + config.micro_batch as u64);
        let top = said_of(config, teacher, rows, done.rows..last)?;
        let place = || format!("writing {}; {counted} rows that were written before count", path.display());
        file.write_all(&bytes_of(&top, (last - done.rows) as usize)?).with_context(place)?;
        let tail: f64 = top.tail.to_vec::<f32>()?.into_iter().map(|tail| f64::from(tail).exp()).sum();
        done = Done { rows: last, tail: done.tail + tail };
        if done.rows - counted >= ROWS_THAT_COUNT_TOGETHER || done.rows == description.sequences {
            count(&file, done)?;
            counted = done.rows;
        }
        progress.count("row", done.rows, description.sequences);
    }
    progress.end();
    Ok(done.tail)
}

/// What the teacher says of some rows.
fn said_of(
    config: &TeachConfig,
    teacher: &Model,
    file: &TokenFile,
    rows: std::ops::Range<u64>,
) -> Result<TopLogProbabilities> {
    let sequences = rows.clone().map(|row| file.sequence(row)).collect::<Result<Vec<_>>>()?;
    let tokens: Vec<Vec<u32>> = sequences.iter().map(|sequence| sequence.tokens.clone()).collect();
    let lengths: Vec<Vec<usize>> = sequences.into_iter().map(|sequence| sequence.document_lengths).collect();
    let batch = TokenBatch::new(teacher.device(), &tokens, Some(&lengths))?;
    let tape = Tape::inference();
    let hidden = teacher.hidden(&tape, &batch)?;
    let head = teacher.head_weight(&tape);
    let top = TopLogProbabilities::of_head(hidden.tensor(), head.tensor(), config.top, config.temperature as f32)?;
    let finite = top.log_probabilities.to_vec::<f32>()?.iter().all(|number| number.is_finite());
    ensure!(
        finite,
        "the teacher's logits of rows {} to {} are not all finite: `grafter inspect {}` names weights that are not; of rows \
         before, everything is kept",
        rows.start,
        rows.end - 1,
        config.teacher.display()
    );
    Ok(top)
}
