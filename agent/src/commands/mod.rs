//! The verbs of `gannet-agent`.

pub mod check;
mod local;
pub mod record;
pub mod run;
mod target_ends;
pub mod top;

use clap::{CommandFactory as _, Parser, Subcommand};
use gannet_base::{CompletionArgs, ManArgs};

use crate::{access, config::RunOptions, model::KernelSymbolLog, symbols};
use record::RecordArgs;
use top::TopArgs;

/// Observes all processes of this node and samples those that a rule matches
#[derive(Parser)]
#[command(name = "gannet-agent", version = gannet_proto::VERSION)]
pub struct Cli {
    /// The verb and its arguments.
    #[command(subcommand)]
    pub verb: Verb,
}

/// Verbs and their arguments.
#[derive(Subcommand)]
pub enum Verb {
    /// Sample this node as rules ask, send profiles to the collector and receive its rules
    Run(Box<RunOptions>),
    /// Sample programs for a while and write one profile; needs no collector
    Record(RecordArgs),
    /// Show live which processes use the CPUs, and in which functions
    Top(TopArgs),
    /// Check whether this machine can run the agent, and print what to do if not
    Check {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
        /// Check also whether the names of this process's interpreted functions can be read
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        pid: Option<u32>,
        /// Arguments of `--file`.
        #[command(flatten)]
        file: check::FileArgs,
    },
    /// Print a script that completes commands in a shell
    Completion(CompletionArgs),
    /// Print the manual
    Man(ManArgs),
    /// Reads debug information in a confined child process.
    #[command(name = symbols::DEBUG_INFO_VERB, hide = true)]
    ReadDebugInfo {
        /// Memory that it may use beside the file, in bytes.
        memory_bytes: u64,
        /// Addresses to symbolize, in hexadecimal, separated by commas.
        addresses: String,
        /// Directories of files to which debug information refers.
        directories: Vec<std::path::PathBuf>,
    },
    /// Waits for the recorder, then becomes the command.
    #[command(name = record::HELD_VERB, hide = true)]
    HeldCommand {
        /// File descriptor that becomes readable when the command may start.
        descriptor: i32,
        /// The command and its arguments.
        #[arg(last = true)]
        command: Vec<String>,
    },
}

/// Returns the description of the command line, for parsing, completions, man pages and the reference.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Ends the workers, as the last step of a program, and closes what they share. Calls that no signal ends are left behind, and logged. Then standard
/// output and error are closed, because a reader of them would wait for such a call too.
pub fn end_workers() {
    // A worker that is left behind shares all descriptors.
    KernelSymbolLog::of_this_kernel().forget_namer();
    access::node().end();
}
