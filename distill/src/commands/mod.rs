//! The command line: one file per subcommand, and what they share.

mod bench;
mod data;
mod demo;
mod devices;
mod distill;
mod eval;
mod generate;
mod import;
mod inspect;
mod merge;
mod output;
mod precision;
mod rank;
mod report;
mod run_flags;
mod sft;
mod teach;
mod train;

use std::io::Write;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::interruption::Interrupted;
use crate::train::Progress;

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  an error, explained on standard error
  2  a wrong command line
  3  interrupted (SIGINT, SIGTERM or SIGHUP); the same command continues from the newest checkpoint";

/// Exit code of an error.
const FAILED: u8 = 1;
/// Exit code of a run that a signal ended.
const INTERRUPTED: u8 = 3;

/// Turns pretrained transformers into Mamba hybrids.
#[derive(Parser)]
#[command(name = "grafter", version, about, after_help = EXIT_CODES)]
#[command(disable_help_subcommand = true, args_override_self = true)]
struct CommandLine {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Import(import::Arguments),
    Inspect(inspect::Arguments),
    Devices(devices::Arguments),
    Rank(rank::Arguments),
    Teach(teach::Arguments),
    Distill(Box<distill::Arguments>),
    Train(train::Arguments),
    Sft(sft::Arguments),
    Merge(merge::Arguments),
    Generate(generate::Arguments),
    Eval(eval::Arguments),
    Data(data::Arguments),
    Report(report::Arguments),
    Bench(bench::Arguments),
    Demo(demo::Arguments),
}

/// Runs the program with the process's arguments.
pub fn main() -> ExitCode {
    let command = match CommandLine::try_parse() {
        Ok(command_line) => command_line.command,
        Err(error) => {
            // Help and version are no errors, and a reader that left early is none either.
            let _ = error.print();
            return ExitCode::from(error.exit_code() as u8);
        }
    };
    // On a worker of the thread pool: an operator that is entered from outside pays a hand-over to the pool and back.
    let result = rayon::scope(|_| run(command));
    match result {
        Ok(code) => code,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {}", chain(&error));
            ExitCode::from(FAILED)
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Import(arguments) => import::run(arguments),
        Command::Inspect(arguments) => inspect::run(arguments),
        Command::Devices(arguments) => devices::run(arguments),
        Command::Rank(arguments) => rank::run(arguments),
        Command::Teach(arguments) => teach::run(arguments),
        Command::Distill(arguments) => distill::run(*arguments),
        Command::Train(arguments) => train::run(arguments),
        Command::Sft(arguments) => sft::run(arguments),
        Command::Merge(arguments) => merge::run(arguments),
        Command::Generate(arguments) => generate::run(arguments),
        Command::Eval(arguments) => eval::run(arguments),
        Command::Data(arguments) => data::run(arguments),
        Command::Report(arguments) => report::run(arguments),
        Command::Bench(arguments) => bench::run(arguments),
        Command::Demo(arguments) => demo::run(arguments),
    }
}

/// Whether the reader of standard output left: what it wanted it has.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let broken = |error: &std::io::Error| error.kind() == std::io::ErrorKind::BrokenPipe;
    error.chain().any(|cause| cause.downcast_ref().is_some_and(broken))
}

/// An error with its causes on one line, each said once: libraries differ in whether a message repeats its cause.
fn chain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// The end of work that a signal interrupted, which says how it goes on. Other errors stay errors.
fn interrupted(error: anyhow::Error, progress: &mut Progress, then: &str) -> Result<ExitCode> {
    let Some(Interrupted { signal }) = error.downcast_ref::<Interrupted>() else { return Err(error) };
    progress.say(&format!("interrupted by {signal}; {then}"));
    Ok(ExitCode::from(INTERRUPTED))
}

/// The successful end of a command.
fn done() -> Result<ExitCode> {
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use anyhow::Context;
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed_and_every_command_explains_itself() {
        CommandLine::command().debug_assert();
        for command in CommandLine::command().get_subcommands() {
            assert!(command.get_about().is_some(), "{} has no description", command.get_name());
            let help = command.clone().render_long_help().to_string();
            assert!(help.contains("Example"), "{} shows no example", command.get_name());
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{} {} is not explained", command.get_name(), argument.get_id());
            }
        }
    }

    #[test]
    fn a_cause_is_said_once() {
        let cause = std::io::Error::from(std::io::ErrorKind::NotFound);
        let repeated = anyhow::Error::new(cause).context("cannot open x: entity not found").context("loading");
        assert_eq!(chain(&repeated), "loading: cannot open x: entity not found");
        let plain: Result<()> = Err(anyhow::anyhow!("no")).context("why");
        assert_eq!(chain(&plain.unwrap_err()), "why: no");
    }
}
