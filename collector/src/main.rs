//! The program `gannet-collector`.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read as _, Write as _},
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use gannet_base::logging::{self, LogFormat};
use gannet_collector::{
    ArgsError, Collector, Config, ConfigError, Deleted, Deletion, ExportOptions, Exported, Imported,
    Invocation, StartError, Verified, parse,
};
use gannet_symbols::dwarf::read_debug_info;
use tokio::{
    runtime::Runtime,
    signal::unix::{SignalKind, signal},
};

/// Exit code of wrong usage.
const USAGE: u8 = 2;
/// Filter of the log without `GANNET_COLLECTOR_LOG`. The collector itself reports the failures that the kube crate logs.
const LOG_FILTER: &str = "info,kube_client::client::builder=off";
/// Address space of a thread's stack. Graphs of the deepest stacks are encoded and dropped by recursion.
const STACK_BYTES: usize = 16 << 20;

fn main() -> ExitCode {
    let config = match parse(std::env::args_os()) {
        Ok(Invocation::Run(config)) => *config,
        Ok(Invocation::Print(text)) => {
            let written = io::stdout().write_all(text.as_bytes());
            return if written.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
        }
        Ok(Invocation::Verify(config)) => return verify(&config),
        Ok(Invocation::Repair(config)) => return repair(&config),
        Ok(Invocation::Delete(config, deletion, is_dry)) => return delete(&config, &deletion, is_dry),
        Ok(Invocation::Export(config, options)) => return export(&config, &options),
        Ok(Invocation::Import(config, file)) => return import(&config, &file),
        Ok(Invocation::Open(file, name, port)) => return open(&file, name, port),
        Ok(Invocation::ReadDebugInfo(memory_bytes, addresses, directories)) => {
            let read = read_debug_info(memory_bytes, &addresses, directories);
            return if read.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
        }
        Err(ArgsError::Usage(error)) => {
            // Prints help to standard output and errors to standard error.
            let _ = error.print();
            return u8::try_from(error.exit_code()).map_or(ExitCode::FAILURE, ExitCode::from);
        }
        Err(error) => return fail(&error.into(), USAGE),
    };
    logging::init(config.log_format, "GANNET_COLLECTOR_LOG", LOG_FILTER);
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().thread_stack_size(STACK_BYTES).build();
    let ended = runtime.context("cannot start threads").and_then(|runtime| runtime.block_on(run(config)));
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let is_usage = matches!(
                error.downcast_ref::<StartError>(),
                Some(StartError::Config(ConfigError::Incomplete(_)))
            );
            fail(&error, if is_usage { USAGE } else { 1 })
        }
    }
}

/// Shows a profile until SIGINT or SIGTERM.
fn open(file: &Path, name: Option<String>, port: u16) -> ExitCode {
    logging::init(LogFormat::Text, "GANNET_COLLECTOR_LOG", "warn");
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().thread_stack_size(STACK_BYTES).build();
    let name = name.unwrap_or_else(|| match file.file_name().map(OsStr::to_string_lossy) {
        Some(name) if name != "-" => name.trim_end_matches(".gz").trim_end_matches(".pb").to_owned(),
        _ => "profile".to_owned(),
    });
    let shown = runtime.context("cannot start threads").and_then(|runtime| {
        runtime.block_on(async {
            let mut bytes = Vec::new();
            // One byte more, for the error of a larger file.
            let max_bytes = gannet_collector::MAX_OPEN_BYTES as u64 + 1;
            let read = match file.to_str() {
                Some("-") => io::stdin().take(max_bytes).read_to_end(&mut bytes),
                _ => File::open(file).and_then(|file| file.take(max_bytes).read_to_end(&mut bytes)),
            };
            read.with_context(|| file.display().to_string())?;
            // Not before: a signal ends a program that waits for its input.
            let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
            let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
            let opened = gannet_collector::open(bytes, name, port).await;
            let opened = opened.with_context(|| file.display().to_string())?;
            writeln!(io::stdout(), "{}", opened.link)?;
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            opened.close().await;
            Ok(())
        })
    });
    match shown {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error, 1),
    }
}

/// Runs a command on a store, which returns the number of things that are not as they should be. The program exits with 1 if there are
/// any, and with 2 after an error.
fn on_store(command: impl FnOnce(&Runtime) -> anyhow::Result<u64>) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    match runtime.context("cannot start threads").and_then(|runtime| command(&runtime)) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => fail(&error, USAGE),
    }
}

/// Reads the store and prints its faults.
fn verify(config: &Config) -> ExitCode {
    on_store(|runtime| {
        let mut out = io::stdout().lock();
        let verified = runtime.block_on(gannet_collector::verify(config, |object, fault| {
            // Without a reader, the exit code still shows the faults.
            let _ = writeln!(out, "{object}: {fault}");
        }))?;
        writeln!(out, "{}", summary(verified))?;
        Ok(verified.faults)
    })
}

/// Reads the store, sets its faulty objects aside, and prints them.
fn repair(config: &Config) -> ExitCode {
    on_store(|runtime| {
        let (mut out, mut left) = (io::stdout().lock(), 0);
        let verified = runtime.block_on(gannet_collector::repair(config, |object, fault, repair| {
            left += u64::from(!repair.is_done());
            let _ = writeln!(out, "{object}: {fault}\n  {repair}");
        }))?;
        writeln!(out, "{}, {left} of them left", summary(verified))?;
        Ok(left)
    })
}

/// Deletes profiles, or counts them. Prints the number.
fn delete(config: &Config, deletion: &Deletion, is_dry: bool) -> ExitCode {
    on_store(|runtime| {
        let deleted = runtime.block_on(gannet_collector::delete(config, deletion, is_dry))?;
        let Deleted { profiles, bytes, objects, unreadable, has_tables } = deleted;
        let (verb, end) = match (is_dry, has_tables) {
            (true, true) => ("found", "; nothing is deleted: give --yes to delete them and the tables"),
            (true, false) => ("found", "; nothing is deleted: give --yes to delete them"),
            (false, true) => ("deleted", ", and the tables"),
            (false, false) => ("deleted", ""),
        };
        writeln!(io::stdout(), "{verb} {profiles} profiles of {bytes} bytes in {objects} objects{end}")?;
        if unreadable > 0 {
            eprintln!(
                "gannet-collector: cannot read {unreadable} objects, which may hold others; run `gannet-collector verify`"
            );
        }
        Ok(unreadable)
    })
}

/// Writes profiles into a file. Prints the number, and the progress as an error message, which no pipe takes for the result.
fn export(config: &Config, options: &ExportOptions) -> ExitCode {
    on_store(|runtime| {
        let mut progress = Progress::new();
        let exported = runtime.block_on(gannet_collector::export(config, options, |so_far| {
            let Exported { profiles, bytes, objects, .. } = so_far;
            progress.show(|| format!("{objects} objects read: {profiles} profiles of {bytes} bytes"));
        }))?;
        let Exported { profiles, bytes, damaged, unreadable, .. } = exported;
        writeln!(
            io::stdout(),
            "exported {profiles} profiles of {bytes} bytes to {}",
            options.output.display()
        )?;
        if damaged + unreadable > 0 {
            eprintln!(
                "gannet-collector: left out {damaged} damaged profiles, and {unreadable} unreadable objects, which may hold \
                 others; run `gannet-collector verify`"
            );
        }
        Ok(damaged + unreadable)
    })
}

/// Adds the profiles of a file to a store. Prints the number, and the progress as an error message.
fn import(config: &Config, file: &Path) -> ExitCode {
    on_store(|runtime| {
        let mut progress = Progress::new();
        let imported = runtime.block_on(gannet_collector::import(config, file, |so_far| {
            let Imported { added, known, .. } = so_far;
            progress.show(|| format!("{added} profiles added, {known} already there"));
        }));
        let Imported { added, bytes, known, expired } =
            imported.with_context(|| format!("cannot import {}", file.display()))?;
        let there = if known == 0 { String::new() } else { format!("; {known} were already there") };
        writeln!(io::stdout(), "imported {added} profiles of {bytes} bytes{there}")?;
        if expired > 0 {
            let age = config.store.retention_age;
            eprintln!(
                "gannet-collector: {expired} profiles are older than --retention-age ({age}), and the collector removes them; \
                 start it with a longer one to keep them"
            );
        }
        Ok(0)
    })
}

/// Prints a line now and then.
struct Progress(Instant);

impl Progress {
    fn new() -> Self {
        Self(Instant::now())
    }

    fn show(&mut self, line: impl FnOnce() -> String) {
        if self.0.elapsed() >= Duration::from_secs(10) {
            eprintln!("{}", line());
            self.0 = Instant::now();
        }
    }
}

/// Formats the totals of a check of the store.
fn summary(verified: Verified) -> String {
    let Verified { objects, profiles, bytes, table_files, faults } = verified;
    let found = if faults == 0 { "no".to_owned() } else { faults.to_string() };
    let tables = if table_files == 0 { String::new() } else { format!(" and {table_files} files of tables") };
    format!("{objects} objects with {profiles} sound profiles{tables} in {bytes} bytes: {found} faults")
}

/// Prints an error, whatever the filter of the log is.
fn fail(error: &anyhow::Error, code: u8) -> ExitCode {
    eprintln!("gannet-collector: {}", gannet_base::with_causes(error.as_ref()));
    ExitCode::from(code)
}

async fn run(config: Config) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    let data = config.data.clone();
    let scheme = if config.tls.is_on() { "https" } else { "http" };
    let mut running = Collector::start(config).await?;
    tracing::info!(
        %data,
        grpc = %running.grpc_addr,
        page = %format_args!("{scheme}://{}/", running.http_addr),
        "the collector accepts connections"
    );
    let failed = tokio::select! {
        _ = terminate.recv() => false,
        _ = interrupt.recv() => false,
        () = running.failed() => true,
    };
    running.shutdown().await;
    if failed {
        anyhow::bail!("a part of the collector has ended by itself; the log above has the reason");
    }
    Ok(())
}
