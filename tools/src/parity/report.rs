//! What a run of the harness found, as text and as JSON.

use std::fmt::Write as _;

use serde::Serialize;

use super::case::Computed;
use super::manifest::Fixture;
use crate::compare::{Bounds, Comparison};

/// A run over a folder.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Where it was computed.
    pub device: String,
    /// Key of the bounds that applied.
    pub precision: &'static str,
    /// Factor on fp32 bounds.
    pub fp32_scale: f64,
    /// In the order of the manifest.
    pub cases: Vec<CaseReport>,
}

/// The outcome of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Everything that must be compared is within its bounds.
    Passed,
    /// Something is not.
    Failed,
    /// The case does not apply to this precision.
    Skipped,
}

/// One case.
#[derive(Debug, Serialize)]
pub struct CaseReport {
    /// The case's file.
    pub file: String,
    /// Its kind.
    pub op: String,
    /// How it went.
    pub status: Status,
    /// What went wrong outside any comparison, or why the case was skipped.
    pub messages: Vec<String>,
    /// The factor on its bounds, if there was one.
    pub bounds_scaled_by: Option<f64>,
    /// Every comparison made.
    pub comparisons: Vec<TensorReport>,
    /// Stored tensors that were not compared, and why.
    pub not_compared: Vec<NotCompared>,
    /// Time that the case took.
    pub milliseconds: f64,
}

/// A comparison with one stored tensor. Measures that are not numbers are null in JSON.
#[derive(Debug, Serialize)]
pub struct TensorReport {
    /// The stored tensor.
    pub tensor: String,
    /// How the result came about, where there is more to say than that it was computed.
    pub way: Option<String>,
    /// Whether it is within its bounds.
    pub passed: bool,
    /// Elements compared.
    pub count: usize,
    /// Root mean square of the differences.
    pub rms_absolute: f64,
    /// Greatest difference.
    pub max_absolute: f64,
    /// Relative root mean square (absolute where everything expected is zero).
    pub rms_relative: f64,
    /// Relative maximum (absolute where everything expected is zero).
    pub max_relative: f64,
    /// Bound on `rms_relative`.
    pub allowed_rms: Option<f64>,
    /// Bound on `max_relative`.
    pub allowed_max: Option<f64>,
    /// The element that differs most, or why nothing could be compared.
    pub worst: Option<String>,
    /// The measures as fractions of their bounds: the greater one.
    #[serde(skip)]
    pub fraction: f64,
}

/// A stored tensor that was not compared.
#[derive(Debug, Serialize)]
pub struct NotCompared {
    /// The stored tensor.
    pub tensor: String,
    /// Why.
    pub reason: String,
}

impl Report {
    /// Number of cases with that outcome.
    pub fn count(&self, status: Status) -> usize {
        self.cases.iter().filter(|case| case.status == status).count()
    }

    /// Whether nothing failed and something ran.
    pub fn passed(&self) -> bool {
        self.count(Status::Failed) == 0 && self.count(Status::Passed) > 0
    }

    /// One line: how many cases went how.
    pub fn summary(&self) -> String {
        let comparisons: usize = self.cases.iter().map(|case| case.comparisons.len()).sum();
        format!(
            "{} passed, {} failed, {} skipped; {comparisons} comparisons; {} on {}{}",
            self.count(Status::Passed),
            self.count(Status::Failed),
            self.count(Status::Skipped),
            self.precision,
            self.device,
            if self.fp32_scale == 1.0 { String::new() } else { format!("; fp32 bounds ×{}", self.fp32_scale) },
        )
    }
}

impl CaseReport {
    pub(super) fn new(fixture: &Fixture) -> Self {
        Self {
            file: fixture.file.clone(),
            op: fixture.op.clone(),
            status: Status::Passed,
            messages: Vec::new(),
            bounds_scaled_by: None,
            comparisons: Vec::new(),
            not_compared: Vec::new(),
            milliseconds: 0.0,
        }
    }

    pub(super) fn fail(&mut self, message: String) {
        self.status = Status::Failed;
        self.messages.push(message);
    }

    pub(super) fn skip(&mut self, message: String) {
        self.status = Status::Skipped;
        self.messages.push(message);
    }

    pub(super) fn add(&mut self, computed: &Computed, comparison: &Comparison, bounds: Bounds) {
        let passed = comparison.within(bounds);
        if !passed {
            self.status = Status::Failed;
        }
        let worst = comparison.worst.as_ref();
        self.comparisons.push(TensorReport {
            tensor: computed.tensor.clone(),
            way: computed.way.clone(),
            passed,
            count: comparison.count,
            rms_absolute: comparison.rms_absolute,
            max_absolute: comparison.max_absolute,
            rms_relative: comparison.relative_l2,
            max_relative: comparison.relative_max,
            allowed_rms: bounds.relative_l2,
            allowed_max: bounds.relative_max,
            worst: worst.map(|worst| format!("{:?}: {:e}, expected {:e}", worst.index, worst.got, worst.expected)),
            fraction: comparison.fraction_of(bounds),
        });
    }

    pub(super) fn add_failure(&mut self, computed: &Computed, message: String) {
        self.status = Status::Failed;
        self.comparisons.push(TensorReport {
            tensor: computed.tensor.clone(),
            way: computed.way.clone(),
            passed: false,
            count: computed.got.count(),
            rms_absolute: f64::NAN,
            max_absolute: f64::NAN,
            rms_relative: f64::NAN,
            max_relative: f64::NAN,
            allowed_rms: None,
            allowed_max: None,
            worst: Some(message),
            fraction: f64::INFINITY,
        });
    }

    pub(super) fn not_compared(&mut self, tensor: &str, reason: &str) {
        self.not_compared.push(NotCompared { tensor: tensor.to_owned(), reason: reason.to_owned() });
    }

    /// The case as lines of text: the verdict with its worst comparison; everything that failed (or, with
    /// `every_tensor`, everything); what was not compared.
    pub fn to_text(&self, every_tensor: bool) -> String {
        let mut text = String::new();
        let verdict = match self.status {
            Status::Passed => "pass",
            Status::Failed => "FAIL",
            Status::Skipped => "skip",
        };
        let _ = write!(text, "{verdict}  {} ({})", self.file, self.op);
        if !self.comparisons.is_empty() {
            let _ = write!(text, ", {} comparisons, {:.0} ms", self.comparisons.len(), self.milliseconds);
        }
        if let Some(factor) = self.bounds_scaled_by {
            let _ = write!(text, ", bounds ×{factor}");
        }
        text.push('\n');
        for message in &self.messages {
            let _ = writeln!(text, "      {message}");
        }
        let worst = self.comparisons.iter().max_by(|a, b| a.fraction.total_cmp(&b.fraction));
        for comparison in &self.comparisons {
            let is_worst = worst.is_some_and(|worst| std::ptr::eq(worst, comparison));
            if every_tensor || is_worst || !comparison.passed {
                let _ = writeln!(text, "      {}", comparison.to_text());
            }
        }
        for (reason, tensors) in self.reasons() {
            let _ = writeln!(text, "      not compared ({reason}): {}", tensors.join(" "));
        }
        text
    }

    fn reasons(&self) -> Vec<(&str, Vec<&str>)> {
        let mut reasons: Vec<(&str, Vec<&str>)> = Vec::new();
        for NotCompared { tensor, reason } in &self.not_compared {
            match reasons.iter_mut().find(|(known, _)| known == reason) {
                Some((_, tensors)) => tensors.push(tensor),
                None => reasons.push((reason, vec![tensor])),
            }
        }
        reasons
    }
}

impl TensorReport {
    fn to_text(&self) -> String {
        let allowed = |bound: Option<f64>| bound.map_or("any".to_owned(), |bound| format!("{bound:.1e}"));
        let mut text = if self.passed { "ok    ".to_owned() } else { "FAILS ".to_owned() };
        text.push_str(&self.tensor);
        if let Some(way) = &self.way {
            let _ = write!(text, " ({way})");
        }
        let _ = write!(
            text,
            ": rms {:.1e}, relative {:.1e} of {} allowed; max {:.1e}, relative {:.1e} of {} allowed",
            self.rms_absolute,
            self.rms_relative,
            allowed(self.allowed_rms),
            self.max_absolute,
            self.max_relative,
            allowed(self.allowed_max),
        );
        if let (false, Some(worst)) = (self.passed, &self.worst) {
            let _ = write!(text, "; {worst}");
        }
        text
    }
}
