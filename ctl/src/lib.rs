//! gannetctl, the command line of Gannet: sends requests to a collector and prints the answers.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

mod args;
mod audit;
mod capture;
mod check;
mod client;
mod debuginfo;
mod deletion;
mod error;
mod export;
mod flame;
mod mcp;
mod nodes;
mod open;
mod profiles;
mod render;
mod rollout;
mod rules;
mod sql;

pub use args::{Cli, command, parse};
use args::{Command, Format, Output};
use client::Collector;
use error::Error;
pub use render::Console;

/// Runs the command and prints its result. Returns the exit code: 0 done, 1 failed, 2 wrong usage.
pub async fn run(cli: Cli, console: &mut Console<'_>) -> u8 {
    let Err(error) = dispatch(cli, console).await else { return 0 };
    let code = error.exit_code();
    if code != 0 && !matches!(error, Error::CheckFailed) {
        for line in error.to_string().lines() {
            // If standard error is closed, the exit code still reports the failure.
            let _ = writeln!(console.err, "gannetctl: {}", render::clean(line));
        }
    }
    code
}

async fn dispatch(cli: Cli, console: &mut Console<'_>) -> Result<(), Error> {
    let Cli { dial, output, mut command } = cli;
    let (format, file) = match output {
        Output::Format(format) => (format, None),
        Output::Csv => {
            let Command::Profiles(args::Profiles::Query(args)) = &mut command else {
                return Err(Error::Usage(
                    "-o csv: only `profiles query` has rows for it; print this as table, json or yaml"
                        .to_owned(),
                ));
            };
            args.csv = true;
            (Format::Table, None)
        }
        Output::File(file) => (Format::Table, Some(file)),
    };
    let takes_file = matches!(
        command,
        Command::Profile(_)
            | Command::Profiles(
                args::Profiles::Get { .. } | args::Profiles::Merge { .. } | args::Profiles::Convert { .. }
            )
    );
    if let Some(file) = file.as_ref().filter(|_| !takes_file) {
        return Err(Error::Usage(format!(
            "-o {}: the result of this command is no profile; print it as table, json or yaml",
            file.display()
        )));
    }
    // Only commands that need a collector check the connection options.
    let connect = || Collector::new(dial.into());
    match command {
        Command::Completion(args) => Ok(args.write(args::command(), console.out)?),
        Command::Man(args) => Ok(args.write(args::command(), console.out)?),
        Command::Rules(args::Rules::Validate { files }) => rules::validate(&files, format, console),
        Command::Profiles(args::Profiles::Convert { file: from, out, sample_type, form }) => {
            let to = file.unwrap_or(out);
            profiles::convert(&from, &to, &sample_type, form, format, console)
        }
        Command::Profiles(args::Profiles::Open(args::Open { file: Some(file), port, .. })) => {
            Err(open::file(&file, port))
        }
        Command::Flame(args) if args.input.is_some() => flame::show_file(&args, format, console),
        Command::Rules(command) => rules::run(command, &connect()?, format, console).await,
        Command::Rollout(command) => rollout::run(command, &connect()?, format, console).await,
        Command::Profile(args) => capture::run(&args, file.as_deref(), &connect()?, format, console).await,
        Command::Check { node } => check::run(node.as_deref(), &connect()?, format, console).await,
        Command::Diff { top, base } => {
            let command = args::Profiles::Diff { top, base };
            profiles::run(command, None, &connect()?, format, console).await
        }
        Command::Mcp => mcp::serve(connect()?).await,
        Command::DebugInfo(command) => debuginfo::run(command, &connect()?, format, console).await,
        Command::Nodes => nodes::list(&connect()?, format, console).await,
        Command::Profiles(command) => profiles::run(command, file, &connect()?, format, console).await,
        Command::Flame(args) => flame::show(&args, &connect()?, format, console).await,
        Command::Top(args) => profiles::top(&args, None, &connect()?, format, console).await,
    }
}
