//! The `protohead` program.

mod audio;
mod commands;
mod device;
mod error;
mod output;
mod tensors;
mod training;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::error::Error;

/// Trains and evaluates three-head cosine classifiers, and applies the ops of protohead to files.
#[derive(Parser)]
#[command(version, about, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Trains the base session, replaces the prototypes, and evaluates every session.
    Train(commands::train::Train),
    /// Evaluates every session of a finished run.
    Evaluate(commands::train::Evaluate),
    /// Cosine cross-entropy of the tensors in a file, with its gradients.
    Loss(commands::loss::Arguments),
    /// Class means of the embeddings in a file.
    Prototypes(commands::prototypes::Arguments),
    /// What this build and machine can run on, and what `auto` picks.
    Devices,
}

// Training allocates and frees tensors of megabytes all the time; glibc gives their pages back each time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn run(cli: Cli) -> Result<(), Error> {
    match cli.command {
        Command::Train(arguments) => commands::train::train(&arguments),
        Command::Evaluate(arguments) => commands::train::evaluate(&arguments),
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
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() => {
            // clap explains at length; its first paragraph says what is wrong.
            let text = error.to_string();
            let paragraph: Vec<&str> = text
                .lines()
                .take_while(|line| !line.is_empty())
                .map(str::trim)
                .collect();
            eprintln!(
                "protohead: {}",
                paragraph.join(" ").trim_start_matches("error: ")
            );
            return ExitCode::from(MISTAKE);
        }
        Err(help) => help.exit(),
    };
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("protohead: {}", error.to_string().replace('\n', " "));
            ExitCode::from(MISTAKE)
        }
    }
}
