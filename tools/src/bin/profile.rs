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
use runtime::{Device, LaunchRecord};
use tools::profile::{BESIDE, CASES, Ceilings, Step, StepOptions, Summary, compare, run_case, summarise, write_trace};

/// Repeats before anything is measured: kernels are compiled, memory is reserved, clocks rise.
const WARM_UP: usize = 3;

/// Prints, per kernel: calls, median time, share, and speeds beside what the device reaches (measured first).
#[derive(Parser)]
#[command(
    name = "profile",
    after_help = "Examples:
  profile step smollm2 --layers 10,15,20 --device cuda:0 --trace step.json
  profile step smollm2 --layers 10,15,20 --device cuda:0 --json new.json --compare old.json
  profile operator selective_scan attention --device cuda:0
  profile operator --list

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
    /// Single operators at the sizes of real models, forward and backward.
    Operator {
        /// Which; all when none is named.
        names: Vec<String>,
        /// Print the names and sizes and do nothing.
        #[arg(long)]
        list: bool,
        #[command(flatten)]
        common: Common,
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
    /// Repeats that are measured.
    #[arg(long, default_value_t = 5)]
    repeats: usize,
    /// Writes a trace of one repeat, for ui.perfetto.dev or chrome://tracing.
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
            for case in CASES {
                writeln!(output, "{:<24} {}", case.name, case.sizes)?;
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Operator { names, common, .. } => {
            if let Some(unknown) = names.iter().find(|name| !CASES.iter().any(|case| case.name == **name)) {
                bail!("no operator is named \"{unknown}\": `profile operator --list` prints the names");
            }
            let device: Device = common.device.parse()?;
            let ceilings = Ceilings::measure(&device)?;
            let dtype = common.precision.dtype();
            let (mut summaries, mut measured) = (Vec::new(), Vec::new());
            for case in CASES.iter().filter(|case| names.is_empty() || names.iter().any(|name| name == case.name)) {
                let title = format!("{} {} in {dtype}, forward and backward", case.name, case.sizes);
                let run = || run_case(case, &device, dtype);
                device.reset_peak_memory();
                let summary = measure(&common, &device, ceilings, title, None, run)?;
                measured.push((case.name, own_seconds(&summary), device.memory_usage().peak));
                summaries.push(summary);
            }
            let code = report(&common, &summaries)?;
            for (name, other) in BESIDE {
                let find = |name: &str| measured.iter().find(|(measured, ..)| *measured == name);
                if let (Some((_, seconds, peak)), Some((_, beside, _))) = (find(name), find(other)) {
                    writeln!(
                        io::stdout(),
                        "{name}: {:.3} ms without making its inputs, {:.3} of {other}'s products ({:.3} ms); peak memory {:.2} GiB",
                        seconds.all * 1e3,
                        seconds.all / beside.products,
                        beside.products * 1e3,
                        *peak as f64 / f64::from(1 << 30)
                    )?;
                }
            }
            Ok(code)
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
            let summary = measure(&common, &device, ceilings, title, Some(tokens), || step.run().map(drop))?;
            let memory = device.memory_usage();
            let code = report(&common, &[summary])?;
            writeln!(io::stdout(), "peak memory of the pool: {:.2} GiB", memory.peak as f64 / (1_u64 << 30) as f64)?;
            Ok(code)
        }
    }
}

/// Times `run` by the host's clock, then records its launches.
fn measure(
    common: &Common,
    device: &Device,
    ceilings: Option<Ceilings>,
    title: String,
    tokens: Option<usize>,
    mut run: impl FnMut() -> Result<()>,
) -> Result<Summary> {
    let repeats = common.repeats.max(1);
    for _ in 0..WARM_UP {
        run()?;
    }
    device.synchronize()?;
    let mut times = Vec::new();
    for _ in 0..repeats {
        let start = Instant::now();
        run()?;
        device.synchronize()?;
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    let recording = device.record_launches()?;
    let mut launches: Vec<Vec<LaunchRecord>> = Vec::new();
    for _ in 0..repeats {
        run()?;
        launches.push(recording.take_records()?);
    }
    drop(recording);
    if let (Some(path), Some(last)) = (&common.trace, launches.last()) {
        write_trace(path, last)?;
    }
    // Gaps count within a repeat: taking the records waits for the device.
    let parts: Vec<(f64, f64)> = launches
        .iter()
        .map(|launches| {
            let (_, busy, gaps) = summarise(launches, 1);
            (busy, gaps)
        })
        .collect();
    let (kernels, busy_seconds, _) = summarise(&launches.concat(), repeats);
    Ok(Summary {
        title,
        device: device.to_string(),
        repeats,
        seconds: times[times.len() / 2],
        tokens,
        busy_seconds,
        gap_seconds: parts.iter().map(|(_, gaps)| gaps).sum::<f64>() / repeats as f64,
        ceilings,
        kernels,
    })
}

/// Seconds of an operator's own kernels.
struct OwnSeconds {
    /// All but those that make inputs.
    all: f64,
    /// Matrix products.
    products: f64,
}

fn own_seconds(summary: &Summary) -> OwnSeconds {
    let of = |wanted: fn(&str) -> bool| {
        summary.kernels.iter().filter(|kernel| wanted(&kernel.name)).map(|kernel| kernel.total_seconds).sum()
    };
    OwnSeconds {
        all: of(|name| !name.starts_with("fill_") && !name.starts_with("cast_")),
        products: of(|name| name.starts_with("matrix_product")),
    }
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
    for now in summaries {
        let Some(before) = earlier.iter().find(|before| before.title == now.title) else {
            bail!("{} has no measurement of \"{}\"", path.display(), now.title);
        };
        pairs.push((before.clone(), now));
    }
    Ok(pairs)
}
