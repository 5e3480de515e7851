//! The command line of `gannet-agent`.

use std::{io::IsTerminal as _, process::ExitCode};

use clap::{Parser, Subcommand};
use gannet_agent::{
    check::{self, CheckOptions},
    config::RunArgs,
    record::{self, RecordArgs},
    run, symbols,
    watch::{self, TopArgs},
};
use tracing_subscriber::EnvFilter;

/// Watches every process of this node, samples those that a rule names.
#[derive(Parser)]
#[command(name = "gannet-agent", version = gannet_proto::VERSION)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Watch this node: sample what rules name, stream profiles to the collector, take its rules
    Run(Box<RunArgs>),
    /// Sample programs for a while and write one profile; needs no collector
    Record(RecordArgs),
    Top(TopArgs),
    /// Tell whether this machine can run the agent, and what to do if not
    Check {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    #[command(name = symbols::DEBUG_INFO_VERB, hide = true)]
    ReadDebugInfo {
        addresses: String,
    },
    #[command(name = record::HELD_VERB, hide = true)]
    HeldCommand {
        descriptor: i32,
        #[arg(last = true)]
        command: Vec<String>,
    },
}

/// The C library's allocator is made for speed: a heap for each thread that keeps what was freed, and blocks of up to
/// 32 MiB out of it once one of that size was freed. An agent is to be small: two heaps, and what is large goes back at
/// once.
#[cfg(target_env = "gnu")]
fn keep_memory_small() {
    let settings =
        [(libc::M_ARENA_MAX, 2), (libc::M_MMAP_THRESHOLD, 256 << 10), (libc::M_TRIM_THRESHOLD, 512 << 10)];
    for (setting, value) in settings {
        // SAFETY: takes numbers only; no other thread runs yet. What it does not know it leaves.
        unsafe { libc::mallopt(setting, value) };
    }
}

#[cfg(not(target_env = "gnu"))]
fn keep_memory_small() {}

fn main() -> ExitCode {
    keep_memory_small();
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_env_filter(
            EnvFilter::try_from_env("GANNET_LOG").unwrap_or_else(|_| EnvFilter::new("info,libbpf=warn")),
        )
        .init();
    match perform(cli.verb) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("gannet-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform(verb: Verb) -> anyhow::Result<ExitCode> {
    match verb {
        Verb::Run(args) => {
            runtime()?.block_on(run::run(*args))?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Record(args) => {
            runtime()?.block_on(record::record(args))?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Top(args) => {
            runtime()?.block_on(watch::watch(args))?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Check { json } => {
            let report = check::check(&CheckOptions::default());
            #[expect(clippy::print_stdout, reason = "what was asked for")]
            if json {
                println!("{}", report.to_json());
            } else {
                print!("{report}");
            }
            Ok(ExitCode::from(report.exit_code()))
        }
        Verb::ReadDebugInfo { addresses } => {
            symbols::read_debug_info(&addresses)?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::HeldCommand { descriptor, command } => {
            Err(anyhow::Error::new(record::become_command(descriptor, &command))
                .context(format!("cannot run `{}`", command.join(" "))))
        }
    }
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?)
}
