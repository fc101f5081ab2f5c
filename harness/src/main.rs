//! The `protohead` program.

mod audio;
mod commands;
mod device;
mod error;
mod files;
mod memory;
mod output;
mod signals;
mod tensors;
mod training;

use std::path::Path;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::error::Error;
use crate::output::{complain, lost, tell};

/// Trains and evaluates three-head cosine classifiers, and applies the ops of protohead to files.
#[derive(Parser)]
#[command(
    name = "protohead",
    version,
    about,
    max_term_width = 100,
    after_help = "On an error: one line on standard error (of predict one for each file that it cannot read), exit code 2, and no output file. The exit code is also 2 if results could not be written to standard output."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Trains on the base classes, replaces their class weights by class means, and evaluates every session.
    Train(commands::train::Train),
    /// Evaluates every session of a finished run, and prints the table; writes nothing.
    Evaluate(commands::train::Evaluate),
    /// Says which keyword each of some WAV files is, by a finished run.
    Predict(commands::predict::Arguments),
    /// Teaches a finished run another keyword, from a few recordings of it: `predict` knows it from then on.
    Enroll(commands::enroll::Arguments),
    /// Cosine cross-entropy of the tensors in a file, with its gradients.
    Loss(commands::loss::Arguments),
    /// Class means of the embeddings in a file.
    Prototypes(commands::prototypes::Arguments),
    /// What this build and machine can run on, and what `auto` picks.
    Devices,
}

#[global_allocator]
static ALLOCATOR: memory::Allocator = memory::Allocator;

fn run(cli: Cli, matches: &ArgMatches) -> Result<(), Error> {
    let given = |option: &str| {
        let of_command = matches.subcommand().map(|(_, of_command)| of_command);
        of_command.and_then(|of_command| of_command.value_source(option))
            == Some(ValueSource::CommandLine)
    };
    match cli.command {
        Command::Train(arguments) => commands::train::train(&arguments, &given),
        Command::Evaluate(arguments) => commands::train::evaluate(&arguments),
        Command::Predict(arguments) => commands::predict::run(&arguments),
        Command::Enroll(arguments) => commands::enroll::run(&arguments),
        Command::Loss(arguments) => commands::loss::run(&arguments),
        Command::Prototypes(arguments) => commands::prototypes::run(&arguments),
        Command::Devices => commands::devices::run(),
    }
}

/// The exit code of a user's mistake.
const MISTAKE: u8 = 2;

fn main() -> ExitCode {
    // SAFETY: no other thread runs yet. Burn loads records on this device; its default would be CUDA.
    unsafe { std::env::set_var("BURN_DEVICE", "flex") };
    let parsed = Cli::command().try_get_matches();
    let (cli, matches) = match parsed.and_then(|m| Ok((Cli::from_arg_matches(&m)?, m))) {
        Ok(parsed) => parsed,
        Err(error) if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            tell(error.to_string().trim_end());
            return ExitCode::from(MISTAKE);
        }
        Err(error) if error.use_stderr() => {
            // clap explains at length; its first paragraph says what is wrong, and a tip what may have been meant.
            let text = error.to_string();
            let mut lines = text.lines().map(str::trim);
            let mut said: Vec<&str> = lines.by_ref().take_while(|line| !line.is_empty()).collect();
            said.extend(lines.filter(|line| line.starts_with("tip: a similar")));
            complain(said.join(" ").trim_start_matches("error: "));
            return ExitCode::from(MISTAKE);
        }
        Err(help) => help.exit(),
    };
    let watched = signals::watch().map_err(|error| Error::Usage(format!("signals: {error}")));
    let ended = watched
        .and_then(|()| run(cli, &matches))
        .and_then(|()| match lost() {
            Some(source) => Err(Error::io(Path::new("standard output"))(source)),
            None => Ok(()),
        });
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(error);
            ExitCode::from(MISTAKE)
        }
    }
}
