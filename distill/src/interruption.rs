//! SIGINT, SIGTERM and SIGHUP end a run: while it prepares at once, and while it trains after the step in hand.

use std::fmt;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

/// Whether somebody asked the run to end.
#[derive(Clone, Debug, Default)]
pub struct Interruption {
    signal: Arc<AtomicUsize>,
}

impl Interruption {
    /// One that only [`Interruption::interrupt`] sets off.
    pub fn new() -> Self {
        Self::default()
    }

    /// One that SIGINT, SIGTERM and SIGHUP set off. A second SIGINT or SIGTERM ends the process at once, with `exit_code`: the
    /// last checkpoint is then what the run continues from.
    ///
    /// # Errors
    /// When the system does not let the signals be handled.
    pub fn on_signals(exit_code: i32) -> Result<Self> {
        let interruption = Self::new();
        let seen = Arc::new(AtomicBool::new(false));
        // A terminal that is closed sends it, and a shell may pass it on a second time: nobody is in a hurry then.
        if !ignores_hangup() {
            flag::register_usize(SIGHUP, Arc::clone(&interruption.signal), SIGHUP as usize)
                .context("installing the handler of SIGHUP")?;
        }
        for signal in [SIGINT, SIGTERM] {
            // In this order: the first signal finds `seen` unset and sets it.
            flag::register_conditional_shutdown(signal, exit_code, Arc::clone(&seen))
                .and_then(|_| flag::register(signal, Arc::clone(&seen)))
                .and_then(|_| flag::register_usize(signal, Arc::clone(&interruption.signal), signal as usize))
                .context("installing the handler of SIGINT and SIGTERM")?;
        }
        Ok(interruption)
    }

    /// Asks the run to end after the step in hand.
    pub fn interrupt(&self) {
        self.signal.store(SIGINT as usize, Ordering::Relaxed);
    }

    /// Ends what is being prepared when the run was asked to end.
    ///
    /// # Errors
    /// [`Interrupted`], which whoever can end in order catches.
    pub fn check(&self) -> Result<()> {
        match self.requested() {
            Some(signal) => Err(Interrupted { signal }.into()),
            None => Ok(()),
        }
    }

    /// What asked the run to end, by name.
    pub fn requested(&self) -> Option<&'static str> {
        match self.signal.load(Ordering::Relaxed) {
            0 => None,
            signal if signal == SIGTERM as usize => Some("SIGTERM"),
            signal if signal == SIGHUP as usize => Some("SIGHUP"),
            _ => Some("SIGINT"),
        }
    }
}

/// Whether whoever began the process (`nohup`) wants it to outlive its terminal. Where the system does not tell (it does on
/// Linux), signals of hanging up are left alone.
fn ignores_hangup() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    ignored.is_none_or(|signals| signals >> (SIGHUP - 1) & 1 == 1)
}

/// The error of work that was left because the run was asked to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interrupted {
    /// What asked for it.
    pub signal: &'static str,
}

impl fmt::Display for Interrupted {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "interrupted by {}", self.signal)
    }
}

impl std::error::Error for Interrupted {}
