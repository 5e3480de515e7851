//! The command line: its commands, options and environment variables.

mod debuginfo;
mod profiles;
mod rules;

use std::{ffi::OsString, path::PathBuf};

use clap::{Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand, ValueEnum};
pub(crate) use debuginfo::DebugInfo;
use gannet_base::{CompletionArgs, ManArgs, Renamed};
use gannet_proto::connect::Dial;
pub(crate) use profiles::{
    Base, Delete, Flame, Form, Manual, Open, Profiles, Select, Spans, SqlArgs, TopArgs, moment,
};
pub(crate) use rules::{Rollout, RuleFiles, Rules, ScopeArg};

/// Control Gannet: set profiling rules, follow them to the nodes, read profiles
#[derive(Debug, Parser)]
#[command(
    name = "gannetctl",
    version,
    propagate_version = true,
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage.\n\n\
                  To use it as `kubectl gannet`, link it as `kubectl-gannet` in a directory of your PATH."
)]
pub struct Cli {
    /// Print results as table, json or yaml; `profiles query` also prints csv, and a command whose result is a profile takes
    /// a file name
    #[arg(short = 'o', long = "output", value_name = "FORMAT", global = true, default_value = "table", value_parser = output)]
    pub(crate) output: Output,
    #[command(flatten)]
    pub(crate) dial: DialArgs,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The value of `-o`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Output {
    Format(Format),
    /// Rows of a query, separated by commas.
    Csv,
    File(PathBuf),
}

/// Reads the value of `-o`. A name with a dot or a slash is a file name, and `-` is standard output.
fn output(text: &str) -> Result<Output, String> {
    match Format::from_str(text, false) {
        Ok(format) => Ok(Output::Format(format)),
        Err(_) if text.eq_ignore_ascii_case("csv") => Ok(Output::Csv),
        Err(_) if text == "-" || text.contains(['.', '/']) => Ok(Output::File(text.into())),
        Err(_) => Err("give table, json, yaml, or for a profile the name of a file".to_owned()),
    }
}

/// A form of results.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// A table for people
    Table,
    /// JSON for programs
    Json,
    /// YAML, which rule files use
    Yaml,
}

/// Options of the connection to the collector.
#[derive(Debug, Args)]
#[command(next_help_heading = "Connection")]
pub(crate) struct DialArgs {
    /// Address of the collector's gRPC services. It must be an https:// address unless it is loopback or --insecure is
    /// given
    #[arg(
        long,
        value_name = "URL",
        env = "GANNET_ENDPOINT",
        global = true,
        default_value = "http://127.0.0.1:4100"
    )]
    pub(crate) endpoint: String,
    /// Allow plaintext to an address that is not loopback
    #[arg(long, env = "GANNETCTL_INSECURE", global = true)]
    pub(crate) insecure: bool,
    /// Trust this certificate authority (PEM) instead of those of the system
    #[arg(long, value_name = "FILE", env = "GANNETCTL_TLS_CA", global = true)]
    pub(crate) tls_ca: Option<PathBuf>,
    /// Authenticate with this certificate (PEM); needs --tls-key
    #[arg(long, value_name = "FILE", env = "GANNETCTL_TLS_CERT", global = true)]
    pub(crate) tls_cert: Option<PathBuf>,
    /// The private key of --tls-cert (PEM)
    #[arg(long, value_name = "FILE", env = "GANNETCTL_TLS_KEY", global = true)]
    pub(crate) tls_key: Option<PathBuf>,
    /// Send the bearer token in this file
    #[arg(long, value_name = "FILE", env = "GANNETCTL_TOKEN_FILE", global = true)]
    pub(crate) token_file: Option<PathBuf>,
}

/// Flags and variables whose names have changed.
const RENAMED: Renamed = Renamed {
    flags: &[("--collector", "--endpoint")],
    variables: &[
        ("GANNET_COLLECTOR", "GANNET_ENDPOINT"),
        ("GANNET_INSECURE", "GANNETCTL_INSECURE"),
        ("GANNET_TLS_CA", "GANNETCTL_TLS_CA"),
        ("GANNET_TLS_CERT", "GANNETCTL_TLS_CERT"),
        ("GANNET_TLS_KEY", "GANNETCTL_TLS_KEY"),
        ("GANNET_TOKEN_FILE", "GANNETCTL_TOKEN_FILE"),
    ],
};

impl From<DialArgs> for Dial {
    fn from(args: DialArgs) -> Self {
        let DialArgs { endpoint, insecure, tls_ca, tls_cert, tls_key, token_file } = args;
        Self {
            url: endpoint,
            insecure,
            ca: tls_ca,
            cert: tls_cert,
            key: tls_key,
            token_file,
            ..Self::default()
        }
    }
}

/// The commands of gannetctl.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Set, list and explain rules
    #[command(subcommand)]
    Rules(Rules),
    /// Follow a revision of the rules to the nodes
    #[command(subcommand)]
    Rollout(Rollout),
    /// List the nodes with their version, rules and lost samples
    #[command(
        after_help = "Examples:\n  gannetctl nodes\n  gannetctl nodes -o json | jq '.nodes[] | select(.connected | not) | .name'"
    )]
    Nodes,
    /// List, download, convert, merge and compare stored profiles
    #[command(subcommand)]
    Profiles(Profiles),
    /// Store debug information at the collector, which then names the functions of stripped programs
    #[command(subcommand, name = "debuginfo")]
    DebugInfo(DebugInfo),
    /// Show profiles as an interactive flame graph, or as a tree if the output is not a terminal
    #[command(after_help = "Examples:\n  \
        gannetctl flame --query '{service_name=\"checkout\"}' --since 15m\n  \
        gannetctl flame --query '{node=\"n1\"}' --since 15m --base-from now-2h --base-until now-1h\n  \
        gannetctl flame --input profile.pb.gz | less\n\n\
        Keys: arrows or hjkl move, Enter zooms in, Backspace zooms out, / searches, n and N step through matches, q quits.")]
    Flame(Flame),
    /// Show the functions with the highest values
    #[command(after_help = "Examples:\n  \
        gannetctl top --query '{service_name=\"checkout\"}' --since 15m\n  \
        gannetctl top --type samples/count --limit 20 -o json")]
    Top(TopArgs),
    /// Compare two selections and show which functions use more or less than before
    #[command(after_help = "Examples:\n  \
        gannetctl diff --query '{service_name=\"checkout\"}' --since 15m --base-from now-75m --base-until now-60m\n  \
        gannetctl diff --query '{pod=\"a\"}' --base-query '{pod=\"b\"}'")]
    Diff {
        #[command(flatten)]
        top: TopArgs,
        #[command(flatten)]
        base: Base,
    },
    /// Profile processes of one node now and write the profile to a file
    #[command(
        after_help = "This changes no rule. The collector stores the profile like any other.\n\nExamples:\n  \
        gannetctl profile --node n1 --pid 4711 --for 30s -o slow.pb.gz\n  \
        gannetctl profile --node n1 --comm 'python3*' --hz 199 --off-cpu -o python.pb.gz\n  \
        gannetctl profile --node n1 --runtime java --namespace shop -o java.pb.gz\n  \
        gannetctl profile --node n1 --pod shop/checkout-7d9f -o checkout.pb.gz && gannetctl flame --input checkout.pb.gz"
    )]
    Profile(Manual),
    /// Let an assistant read profiles: serve the Model Context Protocol on standard input and output
    #[command(
        after_help = "The tools only read: list_services, top_functions, diff_functions, flame_graph, explain_rule.\n\n\
        Example, in the configuration of a client:\n  \
        { \"mcpServers\": { \"gannet\": { \"command\": \"gannetctl\", \"args\": [\"mcp\", \"--endpoint\", \"https://collector:4100\"] } } }"
    )]
    Mcp,
    /// Check the collector and the nodes, and list each problem with its remedy
    #[command(
        after_help = "The exit code is 1 if there is a problem. To check whether an agent can work on a machine, run \
        `gannet-agent check` there.\n\n\
        Examples:\n  gannetctl check\n  gannetctl check --node n1 -o json"
    )]
    Check {
        /// Check only this node
        #[arg(long)]
        node: Option<String>,
    },
    /// Print a shell script that completes commands and options
    #[command(after_help = "Example:\n  source <(gannetctl completion bash)")]
    Completion(CompletionArgs),
    /// Print the man page, or write the man pages of all commands
    #[command(
        after_help = "Examples:\n  gannetctl man | man -l -\n  gannetctl man --dir /usr/local/share/man/man1"
    )]
    Man(ManArgs),
}

/// Returns the description of the command line, from which the parser, completions, man pages and the reference page
/// are made.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Reads the command line, the program's own name first. The error prints itself and has its exit code. An old name of
/// a flag or of an environment variable is an error that has the new name.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Cli, clap::Error> {
    let args: Vec<_> = args.into_iter().collect();
    let mut command = command();
    let called = args.first().map(PathBuf::from).and_then(|path| path.file_stem().map(ToOwned::to_owned));
    if called.is_some_and(|name| name == "kubectl-gannet") {
        command = command.bin_name("kubectl gannet");
    }
    Cli::from_arg_matches(&RENAMED.matches(command, args)?)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn read(line: &str) -> Result<Cli, clap::Error> {
        parse(line.split(' ').map(Into::into))
    }

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn the_reference_page_shows_global_options_once() {
        let page = gannet_base::reference::options(&command());
        assert_eq!(page.matches("`--endpoint URL` | `GANNET_ENDPOINT`").count(), 1, "{page}");
        assert!(page.contains("## `gannetctl rules apply`") && page.contains("`--soak DURATION`"), "{page}");
    }

    #[rstest]
    #[case("gannetctl nodes -o json")]
    #[case("gannetctl rules apply -f a.yaml b.yaml --scope shop --etag x --allow-empty --wait --timeout 1m")]
    #[case("gannetctl rules delete a b --scope shop")]
    #[case("gannetctl rollout watch 17 --follow")]
    #[case("gannetctl rollout resume --percent 50 --scope shop")]
    #[case("gannetctl rules apply -f a.yaml --canary 10 --soak 10m")]
    #[case("gannetctl profile --node n1 --comm python3* --for 5s -o x.pb.gz")]
    #[case("gannetctl profiles diff --since 15m --base-from now-75m --base-until now-60m --limit 5")]
    #[case(
        "gannetctl --endpoint https://c:4100 --tls-ca ca.pem flame --from 2026-01-31T12:00:00Z --min-percent 2"
    )]
    #[case("gannetctl profiles query --sql x --limit 5 --timeout 10s -o csv")]
    #[case("gannetctl debuginfo upload app.debug libapp.so.debug")]
    #[case("gannetctl debuginfo delete 0f2b1c3d")]
    #[case("gannetctl top --type cpu/nanoseconds --endpoint http://127.0.0.1:1")]
    fn command_lines_like_those_in_the_help_are_accepted(#[case] line: &str) {
        read(line).unwrap();
    }

    #[rstest]
    #[case("gannetctl", "Usage")]
    #[case("gannetctl rules apply", "--file")]
    #[case("gannetctl rules delete", "<IDS>...")]
    #[case("gannetctl top --since soon", "write it like 30s, 2m or 1h30m")]
    #[case("gannetctl top --from yesterday", "write a time as RFC 3339")]
    #[case("gannetctl top --since 1h --from now-2h", "cannot be used with")]
    #[case("gannetctl profiles query", "--sql <QUERY>")]
    #[case("gannetctl profiles query --sql x --limit 0", "1..")]
    #[case("gannetctl nodes -o xml", "table, json, yaml")]
    #[case("gannetctl rules apply -f a --soak 1m", "--canary")]
    #[case("gannetctl rules apply -f a --canary 100", "1..=99")]
    #[case("gannetctl nodes --collector http://127.0.0.1:1", "--collector is now --endpoint")]
    fn wrong_usage_is_explained_and_exits_with_2(#[case] line: &str, #[case] words: &str) {
        let error = read(line).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(error.exit_code(), 2);
    }

    #[test]
    fn help_of_the_kubectl_plugin_has_its_name() {
        let help = |name: &str| read(&format!("{name} rules --help")).unwrap_err().to_string();
        assert!(help("/usr/local/bin/kubectl-gannet").contains("Usage: kubectl gannet rules"));
        assert!(help("gannetctl").contains("Usage: gannetctl rules"));
    }
}
