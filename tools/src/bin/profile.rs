//! Where the time of kernels goes: `profile step` for a whole distillation step, `profile operator` for single operators.

#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use autograd::DType;
use clap::{Args, Parser, Subcommand, ValueEnum};
use runtime::{Device, DeviceKind};
use tools::profile::{
    Ceilings, Inputs, Launches, Line, Step, StepOptions, Summary, Table, compare, gap_seconds, launches_of, lines,
    summarise, write_trace,
};

/// Repeats before anything is measured: kernels are compiled, memory is reserved, clocks rise.
const WARM_UP: usize = 3;
/// Steps that are measured unless told.
const STEPS: usize = 5;
/// Repeats of an operator that are measured unless told.
const REPEATS: usize = 20;

/// Prints, per kernel: calls, median time, share, and speeds beside what the device reaches (measured first).
#[derive(Parser)]
#[command(
    name = "profile",
    after_help = "Examples:
  profile step smollm2 --layers 10,15,20 --device cuda:0 --trace step.json
  profile step smollm2 --layers 10,15,20 --device cuda:0 --json new.json --compare old.json
  profile operator --device cuda:0 --json new.json --markdown new.md --compare docs/performance.json
  profile operator selective_scan attention_forward --device cuda:0
  profile operator --list
  profile render docs/performance.json --into docs/performance.md

Exit codes: 0 measured; 1 an error, or with --compare something became slower."
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// A whole distillation step: teacher, student forward and backward, optimizer.
    Step {
        /// Folder of the teacher.
        teacher: PathBuf,
        /// Layers whose attention becomes a Mamba mixer, from 0.
        #[arg(long, value_delimiter = ',', default_value = "10,15,20")]
        layers: Vec<usize>,
        /// Rows of the batch.
        #[arg(long, default_value_t = 8)]
        batch: usize,
        /// Tokens of a row.
        #[arg(long, default_value_t = 2048)]
        sequence: usize,
        /// Documents that share a row.
        #[arg(long, default_value_t = 3)]
        documents: usize,
        /// Compute layers again in the reverse pass instead of keeping what they made.
        #[arg(long)]
        recompute_layers: bool,
        #[command(flatten)]
        common: Common,
    },
    /// Single operators at the sizes of real models: a table of times, what they reach, what is asked, and peers.
    Operator {
        /// Which, by the beginning of their names; their kernels are shown as well. All, without kernels, when none is named.
        names: Vec<String>,
        /// Print the names and sizes and do nothing.
        #[arg(long)]
        list: bool,
        /// Cuts every size down to this, to try the command where times mean nothing.
        #[arg(long, default_value_t = usize::MAX, hide_default_value = true)]
        limit: usize,
        /// Writes the table as Markdown.
        #[arg(long, value_name = "FILE")]
        markdown: Option<PathBuf>,
        #[command(flatten)]
        common: Common,
    },
    /// Prints the Markdown of a table that `operator --json` wrote; needs no GPU.
    Render {
        /// The table.
        table: PathBuf,
        /// Puts it into this file instead, between the lines `<!-- profile operator -->` and `<!-- end -->`.
        #[arg(long, value_name = "FILE")]
        into: Option<PathBuf>,
    },
}

#[derive(Args)]
struct Common {
    /// Where to compute: cuda:N, or sim to see what is launched.
    #[arg(long, default_value = "cuda:0")]
    device: String,
    /// Element type of matrices and activations.
    #[arg(long, value_enum, default_value_t = Precision::Bf16)]
    precision: Precision,
    /// Repeats that are measured; 5 of a step and 20 of an operator unless given.
    #[arg(long)]
    repeats: Option<usize>,
    /// Writes a trace of one repeat (a step, or all calls in a row of an operator), for ui.perfetto.dev or chrome://tracing.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Writes the figures as JSON, for a later --compare.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Compares with the figures of an earlier --json and fails when something became slower.
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,
    /// By how much a time may grow before --compare calls it slower.
    #[arg(long, default_value_t = 0.05)]
    tolerance: f64,
}

#[derive(Clone, Copy, ValueEnum)]
enum Precision {
    F32,
    Bf16,
}

impl Precision {
    fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::Bf16,
        }
    }
}

fn main() -> Result<ExitCode> {
    match Arguments::parse().command {
        Command::Operator { list: true, .. } => {
            let mut output = io::stdout().lock();
            for line in lines() {
                writeln!(output, "{:<28} {}", line.name, line.sizes)?;
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Operator { names, limit, markdown, common, .. } => {
            operators(&names, limit, markdown.as_deref(), &common)
        }
        Command::Render { table, into } => {
            let markdown = Table::load(&table)?.markdown();
            match into {
                Some(path) => put_between_marks(&path, &markdown)?,
                None => write!(io::stdout(), "{markdown}")?,
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Step { teacher, layers, batch, sequence, documents, recompute_layers, common } => {
            let device: Device = common.device.parse()?;
            let ceilings = Ceilings::measure(&device)?;
            let dtype = common.precision.dtype();
            let title = format!(
                "distillation step of {} in {dtype}, {batch} x {sequence} tokens in {documents} documents each",
                teacher.display()
            );
            let mut step = Step::new(
                StepOptions { teacher, layers, batch, sequence, documents, dtype, recompute_layers },
                &device,
            )?;
            let tokens = step.tokens();
            let summary = measure(&common, &device, ceilings, title, tokens, &mut step)?;
            let memory = device.memory_usage();
            let code = report(&common, &[summary])?;
            writeln!(io::stdout(), "peak memory of the pool: {:.2} GiB", memory.peak as f64 / (1_u64 << 30) as f64)?;
            Ok(code)
        }
    }
}

/// Measures lines of the table, prints them, and writes and compares what is wanted.
fn operators(names: &[String], limit: usize, markdown: Option<&Path>, common: &Common) -> Result<ExitCode> {
    let all = lines();
    for name in names {
        if !all.iter().any(|line| line.name.starts_with(name.as_str())) {
            bail!("no operator's name begins with \"{name}\": `profile operator --list` prints the names");
        }
    }
    let is_whole = |name: &String| all.iter().any(|line| line.name == *name);
    let chosen = |line: &&Line| {
        let named = |name: &String| line.name == *name || !is_whole(name) && line.name.starts_with(name.as_str());
        names.is_empty() || names.iter().any(named)
    };
    let device: Device = common.device.parse()?;
    let before = common.compare.as_deref().map(Table::load).transpose()?;
    let dtype = common.precision.dtype();
    let repeats = common.repeats.unwrap_or(REPEATS);
    let command = std::iter::once("profile".to_owned()).chain(std::env::args().skip(1)).collect::<Vec<_>>().join(" ");
    let ceilings = Ceilings::measure(&device)?;
    let mut table = Table::new(&device, dtype, command, repeats, ceilings)?;
    let inputs = Inputs::new(&device, dtype, limit);
    let mut output = io::stdout().lock();
    for line in all.iter().filter(chosen) {
        table.measure(line, &inputs)?;
        if !names.is_empty() || common.trace.is_some() {
            let launches = launches_of(line, &inputs, repeats)?;
            if let (Some(path), Some(last)) = (&common.trace, launches.of_repeats.last()) {
                write_trace(path, last)?;
            }
            let title = format!("{} {} in {dtype}", line.name, line.sizes);
            let seconds = table.lines.last().map_or(f64::NAN, |line| line.seconds);
            writeln!(output, "{}", summary(&device, ceilings, title, None, seconds, &launches)?.table())?;
        }
        // The next line's memory is of other sizes.
        device.trim_memory()?;
    }
    write!(output, "{}", table.text())?;
    if let Some(path) = &common.json {
        write_file(path, &(serde_json::to_string_pretty(&table)? + "\n"))?;
    }
    if let Some(path) = markdown {
        write_file(path, &table.markdown())?;
    }
    let Some(before) = before else { return Ok(ExitCode::SUCCESS) };
    let (changes, lost) = table.compare(&before, common.tolerance, names.is_empty());
    for change in changes {
        writeln!(output, "{change}")?;
    }
    Ok(if lost { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn write_file(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}

/// Replaces what stands between the marks of a file.
fn put_between_marks(path: &Path, markdown: &str) -> Result<()> {
    const MARKS: [&str; 2] = ["<!-- profile operator -->\n", "<!-- end -->\n"];
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let parts = text.split_once(MARKS[0]).and_then(|(head, rest)| Some((head, rest.split_once(MARKS[1])?.1)));
    let Some((head, tail)) = parts else {
        bail!("{} has no lines `{}` and `{}`", path.display(), MARKS[0].trim_end(), MARKS[1].trim_end());
    };
    write_file(path, &format!("{head}{}\n{markdown}\n{}{tail}", MARKS[0], MARKS[1]))
}

/// Times steps by the host's clock, then records their launches.
fn measure(
    common: &Common,
    device: &Device,
    ceilings: Option<Ceilings>,
    title: String,
    tokens: usize,
    step: &mut Step,
) -> Result<Summary> {
    let repeats = common.repeats.unwrap_or(STEPS).max(1);
    let launched = median_seconds(device, step, repeats)?;
    let recording = device.record_launches()?;
    let mut launches = Launches { of_repeats: Vec::new(), calls: 1 };
    for _ in 0..repeats {
        step.run()?;
        let mut of_step = recording.take_records()?;
        step.count_visible(&mut of_step);
        launches.of_repeats.push(of_step);
    }
    drop(recording);
    if let (Some(path), Some(last)) = (&common.trace, launches.of_repeats.last()) {
        write_trace(path, last)?;
    }
    let mut replayed = None;
    if matches!(device.kind(), DeviceKind::Cuda(_)) {
        step.capture()?;
        replayed = Some(median_seconds(device, step, repeats)?);
    }
    let mut summary = summary(device, ceilings, title, Some(tokens), replayed.unwrap_or(launched), &launches)?;
    summary.launched_seconds = replayed.map(|_| launched);
    Ok(summary)
}

/// Median seconds of a step by the host's clock.
fn median_seconds(device: &Device, step: &mut Step, repeats: usize) -> Result<f64> {
    for _ in 0..WARM_UP {
        step.run()?;
    }
    device.synchronize()?;
    let mut times = Vec::new();
    for _ in 0..repeats {
        let start = Instant::now();
        step.run()?;
        device.synchronize()?;
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

/// Adds up launches. `seconds` are those of a call.
fn summary(
    device: &Device,
    ceilings: Option<Ceilings>,
    title: String,
    tokens: Option<usize>,
    seconds: f64,
    launches: &Launches,
) -> Result<Summary> {
    let (repeats, calls) = (launches.of_repeats.len(), launches.calls);
    let all = launches.of_repeats.concat();
    let (kernels, busy_seconds) = summarise(&all, repeats * calls);
    let event_seconds = ceilings.map_or(0.0, |ceilings| ceilings.event_seconds);
    Ok(Summary {
        title,
        device: device.to_string(),
        repeats,
        calls: Some(calls),
        seconds,
        launched_seconds: None,
        tokens,
        busy_seconds,
        gap_seconds: gap_seconds(&all, repeats * calls, seconds, event_seconds),
        ceilings,
        kernels,
    })
}

/// Prints, writes and compares.
fn report(common: &Common, summaries: &[Summary]) -> Result<ExitCode> {
    let mut output = io::stdout().lock();
    for summary in summaries {
        writeln!(output, "{}", summary.table())?;
    }
    if let Some(path) = &common.json {
        let file = File::create(path).with_context(|| format!("creating {}", path.display()))?;
        serde_json::to_writer_pretty(file, summaries).with_context(|| format!("writing {}", path.display()))?;
    }
    let Some(path) = &common.compare else { return Ok(ExitCode::SUCCESS) };
    let mut slower = false;
    for (before, now) in pairs(path, summaries)? {
        for change in compare(&before, now) {
            let verdict = if change.ratio() > 1.0 + common.tolerance {
                slower = true;
                "slower"
            } else if change.ratio() < 1.0 - common.tolerance {
                "faster"
            } else {
                continue;
            };
            writeln!(
                output,
                "{verdict} by {:+5.1} %  {:>9.1} us, was {:>9.1} us  {}",
                100.0 * (change.ratio() - 1.0),
                change.now * 1e6,
                change.before * 1e6,
                change.what
            )?;
        }
    }
    Ok(if slower { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Each of today's measurements with the earlier one of the same title.
fn pairs<'a>(path: &Path, summaries: &'a [Summary]) -> Result<Vec<(Summary, &'a Summary)>> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let earlier: Vec<Summary> = serde_json::from_str(&text)
        .with_context(|| format!("{} is not what `profile --json` writes", path.display()))?;
    let mut pairs = Vec::new();
    for summary in summaries {
        let Some(before) = earlier.iter().find(|before| before.title == summary.title) else {
            bail!("{} has no measurement of \"{}\"", path.display(), summary.title);
        };
        pairs.push((before.clone(), summary));
    }
    Ok(pairs)
}
