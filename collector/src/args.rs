//! The command line of the collector.

use std::{ffi::OsString, path::PathBuf};

use clap::{Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use gannet_base::Renamed;
use gannet_symbols::dwarf::DEBUG_INFO_VERB;

use crate::config::{Config, DataLocation};

/// Store the profiles of Gannet's agents, show them, and send the agents their rules
#[derive(Debug, Parser)]
#[command(name = "gannet-collector", version)]
struct Cli {
    #[command(subcommand)]
    command: Option<Verb>,
    /// Read options from this YAML file; its keys are the option names with `_` for `-` (`grpc_listen: 0.0.0.0:4100`)
    #[arg(long, value_name = "FILE", env = "GANNET_COLLECTOR_CONFIG")]
    config: Option<PathBuf>,
    /// Print the options in force as YAML, in the form that --config reads, and exit
    #[arg(long)]
    print_config: bool,
    #[command(flatten)]
    options: Config,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Print the definition of the TriggerRule custom resource
    Crd,
    /// Read all stored profiles and report each faulty object with its cure
    ///
    /// It changes nothing, and a collector may run meanwhile. It exits with 1 after a fault, and with 2 if it cannot read
    /// the store.
    Verify {
        /// Location of the profiles, as the collector has it: a directory or a bucket
        #[arg(long, id = "verify_data", value_name = "DIR|URL")]
        data: Option<DataLocation>,
    },
    /// Read all stored profiles, and set unreadable objects aside
    ///
    /// It moves them into `set-aside` in --data, and deletes nothing. Objects with some readable profiles stay. Stop the collector
    /// of the directory first. It exits with 1 if faults are left, and with 2 if it cannot read the store.
    Repair {
        /// Location of the profiles, as the collector has it: a directory or a bucket
        #[arg(long, id = "repair_data", value_name = "DIR|URL")]
        data: Option<DataLocation>,
    },
    /// Show one profile of a file on the page, for this machine alone
    ///
    /// It prints the link of the page and shows the profile until Ctrl-C. It reads pprof of any tool. Samples with a negative value
    /// are left out.
    Open {
        /// The profile, or standard input for `-`
        file: PathBuf,
        /// The service of the profile on the page. By default the name of the file
        #[arg(long)]
        name: Option<String>,
        /// Port on 127.0.0.1. By default a free one
        #[arg(long, default_value_t = 0, hide_default_value = true)]
        port: u16,
    },
    /// Reads debug information in a confined child process.
    #[command(name = DEBUG_INFO_VERB, hide = true)]
    ReadDebugInfo {
        /// Memory that the child may use beside the file, in bytes.
        memory_bytes: u64,
        /// Addresses to symbolize, in hexadecimal, separated by commas.
        addresses: String,
        /// Directories to search for files that the debug information refers to.
        directories: Vec<PathBuf>,
    },
    /// Delete stored profiles by their labels and times
    ///
    /// Without --yes it only counts them. Stop the collector of the directory first, or all collectors of the bucket. It also removes
    /// the tables (--table), and the next collector writes them again. It exits with 1 if it cannot read some objects, which may hold
    /// such profiles, and with 2 if it cannot read the store.
    Delete {
        /// Location of the profiles, as the collector has it: a directory or a bucket
        #[arg(long, id = "delete_data", value_name = "DIR|URL")]
        data: Option<DataLocation>,
        #[command(flatten)]
        deletion: Deletion,
        /// Delete the counted profiles
        #[arg(long)]
        yes: bool,
    },
    /// Write stored profiles into one file, by their labels and times
    ///
    /// The file has each profile as its agent sent it, with labels and ledger. `gannet-collector import` adds it to another store.
    /// It changes nothing in the store, and a collector may run meanwhile. It exits with 1 if it cannot read some objects or profiles,
    /// which are not in the file, and with 2 if it cannot read the store or write the file.
    Export {
        /// Location of the profiles, as the collector has it: a directory or a bucket
        #[arg(long, id = "export_data", value_name = "DIR|URL")]
        data: Option<DataLocation>,
        #[command(flatten)]
        options: ExportOptions,
    },
    /// Add the profiles of an exported file to a store
    ///
    /// It checks the complete file first, and adds nothing of a damaged one. Profiles that the store has are not added again, so the
    /// command can be repeated after an interruption. Stop the collector of the directory first; those of a bucket may run. The
    /// collector removes profiles older than --retention-age. It exits with 2 if it cannot import the file.
    Import {
        /// Location of the profiles, as the collector has it: a directory or a bucket
        #[arg(long, id = "import_data", value_name = "DIR|URL")]
        data: Option<DataLocation>,
        /// The file of `gannet-collector export`
        file: PathBuf,
    },
}

/// The profiles that `gannet-collector export` writes, and the file.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct ExportOptions {
    /// Labels of the profiles, like `{service_name="checkout"}`
    #[arg(long, id = "export_query", value_name = "QUERY", default_value = "{}")]
    pub query: String,
    /// Only profiles that start at this time or later: Unix milliseconds, `now-7d`, or RFC 3339
    #[arg(long, value_name = "TIME")]
    pub from: Option<String>,
    /// Only profiles that start before this time
    #[arg(long, value_name = "TIME")]
    pub until: Option<String>,
    /// File to write, a tar archive. Until it is complete, its name ends in `.partial`
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
}

/// The profiles that `gannet-collector delete` deletes.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Deletion {
    /// Labels of the profiles, like `{service_name="checkout"}`; `{}` matches all
    #[arg(long, id = "delete_query", value_name = "QUERY")]
    pub query: String,
    /// Only profiles that start at this time or later: Unix milliseconds, `now-7d`, or RFC 3339
    #[arg(long, value_name = "TIME")]
    pub from: Option<String>,
    /// Only profiles that start before this time
    #[arg(long, value_name = "TIME")]
    pub until: Option<String>,
}

/// Flags and environment variables that have new names.
const RENAMED: Renamed = Renamed {
    flags: &[
        ("--listen", "--grpc-listen"),
        ("--http", "--http-listen"),
        ("--http-local", "--debug-listen"),
        ("--log-json", "--log-format json"),
    ],
    variables: &[
        ("GANNET_COLLECTOR_LISTEN", "GANNET_COLLECTOR_GRPC_LISTEN"),
        ("GANNET_COLLECTOR_HTTP", "GANNET_COLLECTOR_HTTP_LISTEN"),
        ("GANNET_COLLECTOR_HTTP_LOCAL", "GANNET_COLLECTOR_DEBUG_LISTEN"),
        ("GANNET_COLLECTOR_LOG_JSON", "GANNET_COLLECTOR_LOG_FORMAT"),
        ("GANNET_LOG", "GANNET_COLLECTOR_LOG"),
    ],
};

/// The command line as an instruction.
#[derive(Debug)]
pub enum Invocation {
    /// Run the collector.
    Run(Box<Config>),
    /// Print this text and exit.
    Print(String),
    /// Verify the store of this configuration.
    Verify(Box<Config>),
    /// Repair the store of this configuration.
    Repair(Box<Config>),
    /// Delete these profiles from the store of this configuration. If the last value is true, only count them.
    Delete(Box<Config>, Deletion, bool),
    /// Write profiles of the store of this configuration into a file.
    Export(Box<Config>, ExportOptions),
    /// Add the profiles of this file to the store of this configuration.
    Import(Box<Config>, PathBuf),
    /// Show the profile of a file (`-`: standard input) under this name on this port, or a free one for 0.
    Open(PathBuf, Option<String>, u16),
    /// Read debug information, as [`gannet_symbols::dwarf::read_debug_info`] does with these arguments.
    ReadDebugInfo(u64, String, Vec<PathBuf>),
}

/// Why a command line cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum ArgsError {
    /// Wrong usage, or a request for help. [`clap::Error`] prints it.
    #[error(transparent)]
    Usage(#[from] clap::Error),
    /// The file of `--config` cannot be used.
    #[error(transparent)]
    File(#[from] gannet_base::ConfigError),
    /// The resource definition cannot be made, which means a faulty build.
    #[error("this program was built without the definition of the TriggerRule resource")]
    Crd,
}

/// Returns the description of all commands and options, for the documentation.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Parses a command line, and adds the environment, the config file and the defaults. The first argument is the name of
/// the program.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Invocation, ArgsError> {
    let matches = RENAMED.matches(command(), arguments)?;
    let Cli { command, config, print_config, options: _ } = Cli::from_arg_matches(&matches)?;
    if let Some(Verb::ReadDebugInfo { memory_bytes, addresses, directories }) = command {
        return Ok(Invocation::ReadDebugInfo(memory_bytes, addresses, directories));
    }
    if let Some(Verb::Open { file, name, port }) = command {
        return Ok(Invocation::Open(file, name, port));
    }
    if let Some(Verb::Crd) = &command {
        return crate::custom_resource().map(Invocation::Print).ok_or(ArgsError::Crd);
    }
    let mut options: Config = gannet_base::effective(&matches, config.as_deref(), &[], &RENAMED)?;
    if let Some(Verb::Verify { data }) = &command {
        options.data = data.clone().unwrap_or(options.data);
        return Ok(Invocation::Verify(Box::new(options)));
    }
    if let Some(Verb::Repair { data }) = &command {
        options.data = data.clone().unwrap_or(options.data);
        return Ok(Invocation::Repair(Box::new(options)));
    }
    match command {
        Some(Verb::Delete { data, deletion, yes }) => {
            options.data = data.unwrap_or(options.data);
            return Ok(Invocation::Delete(Box::new(options), deletion, !yes));
        }
        Some(Verb::Export { data, options: export }) => {
            options.data = data.unwrap_or(options.data);
            return Ok(Invocation::Export(Box::new(options), export));
        }
        Some(Verb::Import { data, file }) => {
            options.data = data.unwrap_or(options.data);
            return Ok(Invocation::Import(Box::new(options), file));
        }
        _ => {}
    }
    if print_config {
        return Ok(Invocation::Print(gannet_base::to_yaml(&options)?));
    }
    Ok(Invocation::Run(Box::new(options)))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::DataLocation;

    fn run(args: &[&str]) -> Result<Invocation, ArgsError> {
        parse(["gannet-collector"].iter().chain(args).map(OsString::from))
    }

    fn config(args: &[&str]) -> Config {
        match run(args).unwrap() {
            Invocation::Run(config) => *config,
            other => panic!("{other:?}"),
        }
    }

    fn file(dir: &Path, text: &str) -> String {
        let path = dir.join("collector.yaml");
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    }

    #[test]
    fn the_file_sets_every_kind_of_option() {
        let dir = tempfile::tempdir().unwrap();
        let text = "data: s3://bucket/path\nlocal: /var/lib/x\ngrpc_listen: 0.0.0.0:4100\nrole: [editor=anna, 'agent=*']\n\
                    node_identity: token\nretention_age: 2d\nretention_bytes: 1GiB\nforward: [parca=http://p:7070]\n\
                    insecure: true\nmax_nodes: 7\nlog_format: json\n";
        let path = file(dir.path(), text);
        let config = config(&["--config", &path, "--max-nodes", "9"]);
        assert_eq!(config.data.to_string(), "s3://bucket/path");
        assert_eq!(config.directory(), Path::new("/var/lib/x"));
        assert_eq!(config.auth.role.len(), 2);
        assert_eq!((config.store.retention_bytes.0, config.fleet.max_nodes), (1 << 30, 9));
        assert!(config.server.insecure && config.server.debug_listen.is_none());
    }

    #[test]
    fn the_printed_configuration_reads_back_as_itself() {
        let dir = tempfile::tempdir().unwrap();
        let args = [
            "--data",
            "/d",
            "--role",
            "viewer=group:dev,agent=*",
            "--tls-cert",
            "c",
            "--retention-age",
            "90m",
        ];
        let Invocation::Print(text) = run(&[&args[..], &["--print-config"]].concat()).unwrap() else {
            panic!("it runs")
        };
        let printed = config(&["--config", &file(dir.path(), &text)]);
        assert_eq!(printed, config(&args));
        assert_eq!(printed.data, DataLocation::Directory("/d".into()));
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line() {
        let dir = tempfile::tempdir().unwrap();
        for (text, parts) in [
            ("data: /d\nretention: 7d\n", ["line 2", "unknown key `retention`"]),
            ("http_local: 127.0.0.1:1\n", ["line 1", "`http_local` is now `debug_listen`"]),
            ("retention_bytes: much\n", ["line 1: retention_bytes: ", "much"]),
        ] {
            let error = run(&["--config", &file(dir.path(), text)]).unwrap_err().to_string();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        }
    }

    #[test]
    fn verify_takes_the_location_before_or_behind_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(dir.path(), "data: /from/file\n");
        for (args, data) in [
            (&["verify", "--data", "/d"][..], "/d"),
            (&["--data", "/d", "verify"], "/d"),
            (&["--data", "/e", "verify", "--data", "s3://b/c"], "s3://b/c"),
            (&["--config", &path, "verify"], "/from/file"),
        ] {
            let Invocation::Verify(config) = run(args).unwrap() else { panic!("{args:?}") };
            assert_eq!(config.data.to_string(), data);
        }
    }

    #[test]
    fn an_old_name_is_answered_with_the_new_one() {
        for (old, new) in RENAMED.flags {
            let error = run(&[old]).unwrap_err().to_string();
            assert_eq!(error.trim(), format!("error: {old} is now {new}"));
        }
    }
}
