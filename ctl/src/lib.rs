//! The command line of Gannet: what is said to the collector and how its answers are shown.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

mod args;
mod audit;
mod capture;
mod check;
mod client;
mod flame;
mod nodes;
mod output;
mod profiles;
mod rollout;
mod rules;

use std::io;

pub use args::{Cli, parse};
use args::{Command, Format, Output};
use client::Collector;
pub use output::Console;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The collector cannot be dialled as asked.
    #[error(transparent)]
    Dial(#[from] gannet_proto::connect::DialError),
    /// The collector refused, or did not answer.
    #[error("{text}{}", client::lines(.violations))]
    Call {
        /// What it said.
        text: String,
        /// What is wrong with which field.
        violations: Vec<(String, String)>,
    },
    /// A file that cannot be read or written.
    #[error("{file}: {source}")]
    File {
        /// Which.
        file: String,
        /// What the system said.
        source: io::Error,
    },
    /// Rules that are not as they should be: one line each.
    #[error("{}", .0.join("\n"))]
    Rules(Vec<String>),
    /// A profile that cannot be used.
    #[error(transparent)]
    Profile(#[from] gannet_proto::pprof::PprofError),
    /// Nobody reads the output any more, or it cannot be written.
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
    /// Anything else, in words.
    #[error("{0}")]
    Failed(String),
    /// The command was given something that makes no sense.
    #[error("{0}")]
    Usage(String),
    /// The answer is no, and everything about it was printed.
    #[error("no")]
    No,
}

impl Error {
    fn exit_code(&self) -> u8 {
        match self {
            // `gannetctl … | head` is no failure.
            Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => 0,
            Self::Usage(_) => 2,
            _ => 1,
        }
    }
}

/// Does what the command line asks for. Returns the exit code: 0 done, 1 failed, 2 wrong usage.
pub async fn run(cli: Cli, console: &mut Console<'_>) -> u8 {
    let Err(error) = dispatch(cli, console).await else { return 0 };
    let code = error.exit_code();
    if code != 0 && !matches!(error, Error::No) {
        for line in error.to_string().lines() {
            // If even this cannot be written the exit code still says it.
            let _ = writeln!(console.err, "gannetctl: {}", output::clean(line));
        }
    }
    code
}

async fn dispatch(cli: Cli, console: &mut Console<'_>) -> Result<(), Error> {
    let Cli { dial, output, command } = cli;
    let (format, file) = match output {
        Output::Format(format) => (format, None),
        Output::File(file) => (Format::Table, Some(file)),
    };
    let takes_file = matches!(
        command,
        Command::Profile(_) | Command::Profiles(args::Profiles::Get { .. } | args::Profiles::Merge { .. })
    );
    if let Some(file) = file.as_ref().filter(|_| !takes_file) {
        return Err(Error::Usage(format!(
            "-o {}: this command's result is no profile; it is printed as table, json or yaml",
            file.display()
        )));
    }
    match command {
        Command::Rules(args::Rules::Validate { files }) => rules::check_files(&files, format, console),
        Command::Flame(args) if args.input.is_some() => flame::show_file(&args, format, console),
        command => {
            let collector = Collector::new(dial.into())?;
            match command {
                Command::Rules(command) => rules::run(command, &collector, format, console).await,
                Command::Rollout(command) => rollout::run(command, &collector, format, console).await,
                Command::Profile(args) => {
                    capture::run(&args, file.as_deref(), &collector, format, console).await
                }
                Command::Check { node } => check::run(node.as_deref(), &collector, format, console).await,
                Command::Diff { top, base } => {
                    let command = args::Profiles::Diff { top, base };
                    profiles::run(command, None, &collector, format, console).await
                }
                Command::Nodes => nodes::list(&collector, format, console).await,
                Command::Profiles(command) => profiles::run(command, file, &collector, format, console).await,
                Command::Flame(args) => flame::show(&args, &collector, format, console).await,
                Command::Top(args::Top { top }) => {
                    profiles::top(&top, None, &collector, format, console).await
                }
            }
        }
    }
}
