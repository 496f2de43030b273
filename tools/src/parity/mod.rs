//! The parity harness: runs cases that other implementations computed and compares.
//!
//! A fixture folder holds a `manifest.json` and a file of tensors per case. Each kind of case has one file here, which
//! computes with grafter what the case stores, and one line in `OPERATIONS`. A case fails when a result is outside its
//! bounds, is not a number, has another shape, or was not computed; when a tensor that the manifest names is missing;
//! and when its kind is unknown. Bounds come from the manifest; nothing here widens them but `fp32_scale`, which is
//! reported with every case.

mod adamw;
mod array;
mod attention;
mod case;
mod causal_conv1d;
mod cross_entropy;
mod distill_loss;
mod embedding;
mod full_model;
mod manifest;
mod mil;
mod mixer;
mod report;
mod rms_norm;
mod selective_scan;
mod swiglu;
mod training_run;

use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::time::Instant;

use anyhow::{Result, bail};
pub use array::Array;
pub use case::{Case, Outcome};
pub use manifest::{Fixture, Manifest, Precision};
pub use report::{CaseReport, NotCompared, Report, Status, TensorReport};
use runtime::Device;

use crate::compare::{Bounds, compare};

/// A kind of case.
struct Operation {
    /// `op` in the manifest.
    name: &'static str,
    /// Computes the case's results.
    run: fn(&Case<'_>, &mut Outcome) -> Result<()>,
    /// Whether it can run with bf16 inputs.
    bf16: bool,
}

/// Every kind of case that the harness knows.
const OPERATIONS: &[Operation] = &[
    Operation { name: "selective_scan", run: selective_scan::scan, bf16: true },
    Operation { name: "selective_state_update", run: selective_scan::steps, bf16: true },
    Operation { name: "causal_conv1d", run: causal_conv1d::convolution, bf16: true },
    Operation { name: "causal_conv1d_update", run: causal_conv1d::steps, bf16: true },
    Operation { name: "apriel_h1_mixer", run: mixer::apriel_h1, bf16: true },
    Operation { name: "m1_mixer", run: mixer::m1, bf16: true },
    Operation { name: "gqa_attention", run: attention::core, bf16: true },
    Operation { name: "attention_layer", run: attention::layer, bf16: true },
    Operation { name: "rmsnorm", run: rms_norm::run, bf16: true },
    Operation { name: "swiglu_mlp", run: swiglu::run, bf16: true },
    Operation { name: "embedding", run: embedding::run, bf16: true },
    Operation { name: "linear_cross_entropy", run: cross_entropy::run, bf16: true },
    Operation { name: "distill_loss", run: distill_loss::run, bf16: true },
    Operation { name: "full_model", run: full_model::run, bf16: false },
    Operation { name: "full_model_bf16_checkpoint", run: full_model::bf16_checkpoint, bf16: false },
    Operation { name: "mil_conversion", run: mil::run, bf16: false },
    Operation { name: "adamw_trajectory", run: adamw::run, bf16: false },
    Operation { name: "distillation_training_run", run: training_run::run, bf16: false },
];

/// What the names of results begin with.
const RESULTS: &[&str] = &["out.", "grad.", "step1.", "final.", "state."];

/// What to run and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where to compute.
    pub device: Device,
    /// In which element type.
    pub precision: Precision,
    /// Only cases whose file or kind contains this.
    pub filter: Option<String>,
    /// Factor on the fp32 bounds, for devices whose instructions are approximate.
    pub fp32_scale: f64,
}

/// Runs the cases of a fixture folder, and hands each report to `observe` as soon as it is there.
///
/// # Errors
/// A folder without a readable manifest; a filter that fits no case; a scale below 1.
pub fn run(folder: &Path, options: &Options, mut observe: impl FnMut(&CaseReport)) -> Result<Report> {
    if !(options.fp32_scale >= 1.0 && options.fp32_scale.is_finite()) {
        bail!("--fp32-scale is {}, expected a number of at least 1", options.fp32_scale);
    }
    let manifest = Manifest::read(folder)?;
    let chosen = |fixture: &&Fixture| {
        options.filter.as_ref().is_none_or(|filter| fixture.file.contains(filter) || fixture.op.contains(filter))
    };
    let mut cases = Vec::new();
    for fixture in manifest.fixtures.iter().filter(chosen) {
        let report = run_case(folder, fixture, options);
        observe(&report);
        cases.push(report);
    }
    if cases.is_empty() {
        bail!(
            "{}: no case{}",
            folder.display(),
            match &options.filter {
                Some(filter) => format!(" whose file or op contains {filter:?}"),
                None => String::new(),
            }
        );
    }
    Ok(Report {
        device: options.device.to_string(),
        precision: options.precision.key(),
        fp32_scale: options.fp32_scale,
        cases,
    })
}

fn run_case(folder: &Path, fixture: &Fixture, options: &Options) -> CaseReport {
    let start = Instant::now();
    let mut report = CaseReport::new(fixture);
    if options.precision == Precision::Fp32 && options.fp32_scale != 1.0 {
        report.bounds_scaled_by = Some(options.fp32_scale);
    }
    // A case that panics fails; the others still run.
    match panic::catch_unwind(AssertUnwindSafe(|| compute(folder, fixture, options))) {
        Ok(Ok(Computation::Skipped(reason))) => report.skip(reason),
        Ok(Ok(Computation::Done(case, outcome))) => judge(&case, outcome, options, &mut report),
        Ok(Err(error)) => report.fail(format!("{error:#}")),
        Err(_) => report.fail("panicked; the message is on standard error".to_owned()),
    }
    report.milliseconds = start.elapsed().as_secs_f64() * 1e3;
    report
}

enum Computation<'a> {
    Done(Case<'a>, Outcome),
    Skipped(String),
}

fn compute<'a>(folder: &'a Path, fixture: &'a Fixture, options: &'a Options) -> Result<Computation<'a>> {
    let Some(operation) = OPERATIONS.iter().find(|operation| operation.name == fixture.op) else {
        let known: Vec<&str> = OPERATIONS.iter().map(|operation| operation.name).collect();
        bail!("unknown op {:?}; known are {}", fixture.op, known.join(", "));
    };
    let case = Case::load(folder, fixture, &options.device, options.precision)?;
    if options.precision == Precision::Bf16 {
        if !operation.bf16 {
            return Ok(Computation::Skipped(format!("{} has no bf16 run", operation.name)));
        }
        if !fixture.has_bounds(Precision::Bf16) {
            return Ok(Computation::Skipped("the manifest has no bf16 bounds".to_owned()));
        }
    }
    let mut outcome = Outcome::default();
    (operation.run)(&case, &mut outcome)?;
    Ok(Computation::Done(case, outcome))
}

/// Compares every result, and finds every stored result that was not computed.
fn judge(case: &Case<'_>, outcome: Outcome, options: &Options, report: &mut CaseReport) {
    let fixture = case.fixture;
    let scale = if options.precision == Precision::Fp32 { options.fp32_scale } else { 1.0 };
    for computed in &outcome.results {
        // Another way to a result that this case does not store.
        let stored = case.has(&computed.tensor) || fixture.tolerance.contains_key(&computed.tensor);
        if !stored && computed.way.is_some() {
            continue;
        }
        let bounds = match (computed.bounds, fixture.bounds(&computed.tensor, options.precision)) {
            (Some(bounds), _) => Ok(Some(bounds)),
            (None, bounds) => bounds,
        };
        let comparison = bounds.and_then(|bounds| {
            let Some(bounds) = bounds else {
                // Some intermediates have no bf16 bounds.
                if computed.tensor.starts_with("mid.") {
                    return Ok(None);
                }
                bail!("the manifest has no {} bounds for it", options.precision.key());
            };
            let expected = match &computed.expected {
                Some(part) => part,
                None => case.array(&computed.tensor)?,
            };
            let comparison = compare((&computed.got.shape, &computed.got.values), (&expected.shape, &expected.values))?;
            Ok(Some((comparison, bounds.scaled(scale))))
        });
        match comparison {
            Ok(Some((comparison, bounds))) => report.add(computed, &comparison, bounds),
            Ok(None) => report.not_compared(&computed.tensor, "no bounds at this precision"),
            Err(error) => report.add_failure(computed, format!("{error:#}")),
        }
    }
    let given = |name: &str| outcome.results.iter().any(|computed| computed.tensor == name);
    let stored = fixture.tensors.keys().map(String::as_str);
    // A bound without a tensor is a tensor that is missing; the word for a whole case is no tensor's name.
    let bounded = fixture.tolerance.iter().filter(|(_, bounds)| bounds.is_object()).map(|(name, _)| name.as_str());
    let mut names: Vec<&str> = stored.chain(bounded).collect();
    names.sort_unstable();
    names.dedup();
    for name in names {
        if given(name) || outcome.inputs.contains(name) {
            continue;
        }
        if let Some(reason) = outcome.omitted.get(name) {
            report.not_compared(name, reason);
        } else if name.starts_with("mid.") && case.has(name) {
            report.not_compared(name, "an intermediate that the operators do not give out");
        } else if name.starts_with("diag.") {
            report.not_compared(name, "not the reference behaviour");
        } else if !case.has(name) {
            report.fail(format!("{name} has bounds but no values"));
        } else if RESULTS.iter().any(|prefix| name.starts_with(prefix)) || fixture.tolerance.contains_key(name) {
            report.fail(format!("{name} was not computed"));
        } else if !case.was_read(name) {
            report.fail(format!("{name} was not used: the case says more than was run"));
        }
    }
    if report.comparisons.is_empty() {
        report.fail("nothing was compared".to_owned());
    }
}

/// Bounds of exactly equal results, for tensors of integers and copied weights.
fn exact() -> Bounds {
    Bounds::exact()
}
