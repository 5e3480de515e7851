//! The command line of `gannet-agent`.

use std::{io, io::Write as _, process::ExitCode, time::Duration};

use clap::{ArgMatches, FromArgMatches as _};
use gannet_agent::{
    commands::{
        self, Cli, Verb,
        check::{self, CheckOptions},
        record,
        run::{self, RunError},
        top,
    },
    config::{ConfigError, RENAMED},
    symbols,
};
use gannet_base::logging::{self, LogFormat};

/// At the end, calls on other threads may take this long: a disk may not answer.
const BLOCKING_TIMEOUT: Duration = Duration::from_secs(2);
/// Exit code of wrong options, as clap has it.
const USAGE: u8 = 2;

/// Keeps the agent small. The C library's allocator is made for speed: it gives each thread a heap that holds on to freed
/// memory, and blocks of up to 32 MiB come from it once one of that size was freed. With these settings there are two
/// heaps, and large blocks go back to the kernel at once.
#[cfg(target_env = "gnu")]
fn keep_memory_small() {
    let settings =
        [(libc::M_ARENA_MAX, 2), (libc::M_MMAP_THRESHOLD, 256 << 10), (libc::M_TRIM_THRESHOLD, 512 << 10)];
    for (setting, value) in settings {
        // SAFETY: takes numbers only, and no other thread runs yet. The library ignores settings that it does not know.
        unsafe { libc::mallopt(setting, value) };
    }
}

#[cfg(not(target_env = "gnu"))]
fn keep_memory_small() {}

fn main() -> ExitCode {
    keep_memory_small();
    let parsed = RENAMED
        .matches(commands::command(), std::env::args_os())
        .and_then(|matches| Ok((Cli::from_arg_matches(&matches)?, matches)));
    let (cli, matches) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => error.exit(),
    };
    let code = match perform(cli.verb, &matches) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("gannet-agent: {}", gannet_base::with_causes(error.as_ref()));
            if is_usage(&error) { ExitCode::from(USAGE) } else { ExitCode::FAILURE }
        }
    };
    let _ = io::stdout().flush();
    commands::end_workers();
    code
}

/// Reports whether the options were wrong: in a flag, a variable or the configuration file.
fn is_usage(error: &anyhow::Error) -> bool {
    error.is::<ConfigError>() || matches!(error.downcast_ref(), Some(RunError::Config(_)))
}

fn start_log(format: LogFormat) {
    logging::init(format, "GANNET_AGENT_LOG", "info,libbpf=warn");
}

fn perform(verb: Verb, matches: &ArgMatches) -> anyhow::Result<ExitCode> {
    match verb {
        Verb::Run(options) => {
            let options = match matches.subcommand() {
                Some((_, matches)) => options.load(matches)?,
                None => *options,
            };
            if let Some(yaml) = options.printed()? {
                write!(io::stdout(), "{yaml}")?;
                return Ok(ExitCode::SUCCESS);
            }
            start_log(options.log_format());
            block_on(run::run(options))?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Record(args) => {
            start_log(LogFormat::Text);
            block_on(record::record(args))?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Top(args) => {
            start_log(LogFormat::Text);
            block_on(top::top(args))?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Check { json, pid, file } => {
            start_log(LogFormat::Text);
            if let Some(report) = check::check_file(&file) {
                let report = report?;
                let text = if json { report.to_json() + "\n" } else { report.to_string() };
                write!(io::stdout(), "{text}")?;
                return Ok(ExitCode::SUCCESS);
            }
            let report = check::check(&CheckOptions { pid, ..CheckOptions::default() });
            #[expect(clippy::print_stdout, reason = "the answer to the user")]
            if json {
                println!("{}", report.to_json());
            } else {
                print!("{report}");
            }
            Ok(ExitCode::from(report.exit_code()))
        }
        Verb::Completion(args) => {
            args.write(commands::command(), &mut io::stdout())?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Man(args) => {
            args.write(commands::command(), &mut io::stdout())?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::ReadDebugInfo { memory_bytes, addresses, directories } => {
            start_log(LogFormat::Text);
            symbols::read_debug_info(memory_bytes, &addresses, directories)?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::HeldCommand { descriptor, command } => {
            start_log(LogFormat::Text);
            Err(anyhow::Error::new(record::become_command(descriptor, &command))
                .context(format!("cannot run `{}`", command.join(" "))))
        }
    }
}

/// Runs a command to its end, and then what may still run beside it for a short time.
fn block_on<E: Into<anyhow::Error>>(command: impl Future<Output = Result<(), E>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let result = runtime.block_on(command);
    runtime.shutdown_timeout(BLOCKING_TIMEOUT);
    result.map_err(Into::into)
}
