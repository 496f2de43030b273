//! What a person sees while a run goes on: a bar on a terminal, lines elsewhere; always on standard error.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::metrics::{StepRecord, ValidationRecord};

/// How often a line is written where there is no terminal.
const BETWEEN_LINES: Duration = Duration::from_secs(10);

/// Shows a run's progress.
pub struct Progress {
    form: Form,
}

enum Form {
    Silent,
    Bar(ProgressBar),
    Lines { total: u64, last: Option<Instant> },
}

impl Progress {
    /// Shows nothing.
    pub fn silent() -> Self {
        Self { form: Form::Silent }
    }

    /// A bar when standard error is a terminal, lines otherwise.
    pub fn on_stderr() -> Self {
        if !std::io::stderr().is_terminal() {
            return Self { form: Form::Lines { total: 0, last: None } };
        }
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed}<{eta} {msg}") {
            bar.set_style(style);
        }
        Self { form: Form::Bar(bar) }
    }

    /// Says how many updates there are and how many are done already.
    pub fn begin(&mut self, done: u64, total: u64) {
        match &mut self.form {
            Form::Silent => {}
            Form::Bar(bar) => {
                bar.set_length(total);
                bar.set_position(done);
                // The estimate must not count what another process did.
                bar.reset_eta();
            }
            Form::Lines { total: lines_total, .. } => *lines_total = total,
        }
    }

    /// Shows an update.
    pub fn step(&mut self, record: &StepRecord, tokens_per_second: f64) {
        let text = format!(
            "loss {:.4}  gradient {:.3}  rate {:.2e}  {tokens_per_second:.0} tokens/s",
            record.loss, record.gradient_norm, record.learning_rate
        );
        match &mut self.form {
            Form::Silent => {}
            Form::Bar(bar) => {
                bar.set_position(record.step);
                bar.set_message(text);
            }
            Form::Lines { total, last } => {
                if record.step == *total || last.is_none_or(|last| last.elapsed() >= BETWEEN_LINES) {
                    *last = Some(Instant::now());
                    line(&format!("step {}/{total}  {text}", record.step));
                }
            }
        }
    }

    /// Shows how many of something (`what` one of them is called) are done.
    pub fn count(&mut self, what: &str, done: u64, total: u64) {
        match &mut self.form {
            Form::Silent => {}
            Form::Bar(bar) => {
                bar.set_length(total);
                bar.set_position(done);
            }
            Form::Lines { last, .. } => {
                if done == total || last.is_none_or(|last| last.elapsed() >= BETWEEN_LINES) {
                    line(&format!("{what} {done}/{total}"));
                    *last = Some(Instant::now());
                }
            }
        }
    }

    /// Shows a look at the validation data.
    pub fn validation(&mut self, record: &ValidationRecord) {
        self.say(&format!(
            "step {}  validation loss {:.4}  cross-entropy {:.4}",
            record.step, record.validation_loss, record.validation_cross_entropy
        ));
    }

    /// Shows a message.
    pub fn say(&mut self, text: &str) {
        match &self.form {
            Form::Silent => {}
            Form::Bar(bar) => bar.suspend(|| line(text)),
            Form::Lines { .. } => line(text),
        }
    }

    /// Ends the show.
    pub fn end(&mut self) {
        if let Form::Bar(bar) = &self.form {
            bar.abandon();
        }
    }
}

/// Progress is a courtesy: a closed standard error does not end a run.
fn line(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}
