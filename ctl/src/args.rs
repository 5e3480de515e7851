//! What can be said on the command line.

use std::{path::PathBuf, time::Duration};

use clap::{Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand, ValueEnum};
use gannet_proto::{connect::Dial, query::Selection};
use jiff::Timestamp;

/// Talks to a Gannet collector: sets trigger rules, watches them reach the nodes, reads profiles.
#[derive(Debug, Parser)]
#[command(
    name = "gannetctl",
    version,
    propagate_version = true,
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage.\n\n\
                  Linked as `kubectl-gannet` somewhere in PATH it is also `kubectl gannet`."
)]
pub struct Cli {
    /// Where the collector is, and how to talk to it.
    #[command(flatten)]
    pub(crate) dial: DialArgs,
    /// How to print results: table, json or yaml. Where the result is a profile it may also be a file.
    #[arg(short = 'o', long = "output", value_name = "FORMAT", global = true, default_value = "table", value_parser = output)]
    pub(crate) output: Output,
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What `-o` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Output {
    Format(Format),
    File(PathBuf),
}

/// A name with a dot or a slash is a file's, and `-` is the standard output.
fn output(text: &str) -> Result<Output, String> {
    match Format::from_str(text, false) {
        Ok(format) => Ok(Output::Format(format)),
        Err(_) if text == "-" || text.contains(['.', '/']) => Ok(Output::File(text.into())),
        Err(_) => Err("it is one of table, json, yaml, or for a profile the name of a file".to_owned()),
    }
}

/// How results are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    Table,
    /// For programs.
    Json,
    /// For both.
    Yaml,
}

/// The collector's address and what authenticates it and us.
#[derive(Debug, Args)]
#[command(next_help_heading = "Connection")]
pub(crate) struct DialArgs {
    /// The collector's gRPC address. TLS (https://) unless it is loopback or --insecure is given.
    #[arg(
        long,
        value_name = "URL",
        env = "GANNET_COLLECTOR",
        global = true,
        default_value = "http://127.0.0.1:4100"
    )]
    pub(crate) collector: String,
    /// Allow plaintext to an address that is not loopback.
    #[arg(long, env = "GANNET_INSECURE", global = true)]
    pub(crate) insecure: bool,
    /// Trust the certificates of this authority (PEM) rather than the system's.
    #[arg(long, value_name = "FILE", env = "GANNET_TLS_CA", global = true)]
    pub(crate) tls_ca: Option<PathBuf>,
    /// Our own certificate (PEM), with --tls-key.
    #[arg(long, value_name = "FILE", env = "GANNET_TLS_CERT", global = true)]
    pub(crate) tls_cert: Option<PathBuf>,
    /// The key of our certificate (PEM).
    #[arg(long, value_name = "FILE", env = "GANNET_TLS_KEY", global = true)]
    pub(crate) tls_key: Option<PathBuf>,
    /// Send the bearer token that this file holds.
    #[arg(long, value_name = "FILE", env = "GANNET_TOKEN_FILE", global = true)]
    pub(crate) token_file: Option<PathBuf>,
}

impl From<DialArgs> for Dial {
    fn from(args: DialArgs) -> Self {
        let DialArgs { collector, insecure, tls_ca, tls_cert, tls_key, token_file } = args;
        Self { url: collector, insecure, ca: tls_ca, cert: tls_cert, key: tls_key, token_file }
    }
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Set, read and explain trigger rules.
    #[command(subcommand)]
    Rules(Rules),
    /// Follow a revision of the rules to the nodes.
    #[command(subcommand)]
    Rollout(Rollout),
    /// List the nodes: connection, version, rules, losses.
    #[command(
        after_help = "Examples:\n  gannetctl nodes\n  gannetctl nodes -o json | jq '.nodes[] | select(.connected | not) | .name'"
    )]
    Nodes,
    /// List, fetch, merge and compare stored profiles.
    #[command(subcommand)]
    Profiles(Profiles),
    /// Show a selection as a flame graph in the terminal, or as a tree where the output is not one.
    #[command(after_help = "Examples:\n  \
        gannetctl flame --query '{service_name=\"checkout\"}' --since 15m\n  \
        gannetctl flame --query '{node=\"n1\"}' --since 15m --base-from now-2h --base-until now-1h\n  \
        gannetctl flame --input profile.pb.gz | less\n\n\
        Keys: arrows or hjkl move, Enter zooms in, Backspace out, / searches, n and N step through matches, q quits.")]
    Flame(Flame),
    /// Show the functions that cost most in a selection.
    #[command(after_help = "Examples:\n  \
        gannetctl top --query '{service_name=\"checkout\"}' --since 15m\n  \
        gannetctl top --type samples/count --limit 20 -o json")]
    Top(Top),
    /// Compare two selections function by function: what became dearer, what became cheaper.
    #[command(after_help = "Examples:\n  \
        gannetctl diff --query '{service_name=\"checkout\"}' --since 15m --base-from now-75m --base-until now-60m\n  \
        gannetctl diff --query '{pod=\"a\"}' --base-query '{pod=\"b\"}'")]
    Diff {
        #[command(flatten)]
        top: TopArgs,
        #[command(flatten)]
        base: Base,
    },
    /// Profile processes of one node now, and write the profile to a file.
    #[command(
        after_help = "No rule is changed; the collector also stores the profile, as any other.\n\nExamples:\n  \
        gannetctl profile --node n1 --pid 4711 --for 30s -o slow.pb.gz\n  \
        gannetctl profile --node n1 --comm 'python3*' --hz 199 --off-cpu -o python.pb.gz\n  \
        gannetctl profile --node n1 --pod shop/checkout-7d9f -o checkout.pb.gz && gannetctl flame --input checkout.pb.gz"
    )]
    Profile(Manual),
    /// Look whether collector and nodes are in order; what is not is listed with its cure.
    #[command(
        after_help = "Exits 1 if anything is wrong. `gannet-agent check` on a machine tells whether an agent can work there.\n\n\
        Examples:\n  gannetctl check\n  gannetctl check --node n1 -o json"
    )]
    Check {
        /// Only this node.
        #[arg(long)]
        node: Option<String>,
    },
}

/// A capture by hand.
#[derive(Debug, Args)]
pub(crate) struct Manual {
    /// The node; may be left out if only one is connected.
    #[arg(long)]
    pub(crate) node: Option<String>,
    /// Only these processes, by their ids on the node.
    #[arg(long, value_name = "PID", num_args = 1..)]
    pub(crate) pid: Vec<u32>,
    /// Only processes of these command names; `python3*` is a prefix.
    #[arg(long, value_name = "NAME", num_args = 1..)]
    pub(crate) comm: Vec<String>,
    /// Only processes of these executables; a path as the process sees it, `/usr/lib/jvm/*` is a prefix.
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub(crate) exe: Vec<String>,
    /// Only processes of these control groups.
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub(crate) cgroup: Vec<String>,
    /// Only processes of this pod.
    #[arg(long, value_name = "NAMESPACE/NAME")]
    pub(crate) pod: Option<String>,
    /// Only processes of pods with these labels: app=checkout.
    #[arg(long, value_name = "SELECTOR", default_value = "", hide_default_value = true)]
    pub(crate) pod_labels: String,
    /// Only processes of these namespaces.
    #[arg(long, value_name = "NAME", num_args = 1..)]
    pub(crate) namespace: Vec<String>,
    /// Only processes of containers of these names.
    #[arg(long, value_name = "NAME", num_args = 1..)]
    pub(crate) container: Vec<String>,
    /// For how long: 1s to 10m.
    #[arg(long = "for", value_name = "DURATION", value_parser = duration, default_value = "30s")]
    pub(crate) lasting: Duration,
    /// Samples a second and CPU.
    #[arg(long, default_value_t = gannet_proto::rules::TRIGGERED_HZ)]
    pub(crate) hz: u32,
    /// Take blocked time rather than CPU time.
    #[arg(long)]
    pub(crate) off_cpu: bool,
}

/// Rule verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Rules {
    /// Replace the whole rule set of a scope by what the files hold.
    #[command(after_help = "Examples:\n  \
        gannetctl rules apply -f rules.yaml\n  \
        gannetctl rules apply -f a.yaml -f b.yaml --scope shop --wait\n  \
        gannetctl rules apply -f rules.yaml --dry-run\n  \
        gannetctl rules apply -f rules.yaml --canary 10 --soak 10m\n\n\
        --dry-run asks each node what it would sample now. --wait exits 1 if a node rejects the rules.")]
    Apply {
        #[command(flatten)]
        files: RuleFiles,
        #[command(flatten)]
        scope: ScopeArg,
        /// Only if the scope still has this etag (see `rules list -o json`).
        #[arg(long)]
        etag: Option<String>,
        /// Allow files without any rule: this removes all rules of the scope.
        #[arg(long)]
        allow_empty: bool,
        /// Let the collector and the nodes check everything, show what would be sampled, and change nothing.
        #[arg(long, conflicts_with = "wait")]
        dry_run: bool,
        /// Try it on so many percent of the nodes first (1 to 99); the others keep what they have until `rollout
        /// resume`. A node that rejects it pauses the rollout.
        #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(1..=99))]
        canary: Option<u32>,
        /// Go on to all nodes when the first ones have had it for this time and none has rejected it.
        #[arg(long, value_name = "DURATION", value_parser = duration, requires = "canary")]
        soak: Option<Duration>,
        /// Wait until every connected node has answered.
        #[arg(long)]
        wait: bool,
        /// Give up waiting after this time.
        #[arg(long, value_name = "DURATION", value_parser = duration, requires = "wait")]
        timeout: Option<Duration>,
    },
    /// List the rules of all scopes.
    List {
        /// Only this scope.
        #[arg(long)]
        scope: Option<String>,
    },
    /// Print rules as they would be written in a file.
    #[command(
        after_help = "Examples:\n  gannetctl rules show > rules.yaml\n  gannetctl rules show slow-checkout -o json"
    )]
    Show {
        /// Only this rule.
        id: Option<String>,
        #[command(flatten)]
        scope: ScopeArg,
    },
    /// Remove rules from a scope.
    #[command(
        after_help = "Examples:\n  gannetctl rules delete slow-checkout\n  gannetctl rules delete --all --scope shop"
    )]
    Delete {
        /// The rules to remove.
        #[arg(required_unless_present = "all", conflicts_with = "all")]
        ids: Vec<String>,
        /// Remove the scope with all its rules.
        #[arg(long)]
        all: bool,
        #[command(flatten)]
        scope: ScopeArg,
        /// Only if the scope still has this etag.
        #[arg(long)]
        etag: Option<String>,
    },
    /// Check rule files without a collector.
    Validate {
        #[command(flatten)]
        files: RuleFiles,
    },
    /// Say what became of one rule on one node, and why each process there is or is not profiled by it.
    #[command(
        after_help = "Examples:\n  gannetctl rules explain slow-checkout --node n1\n  gannetctl rules explain slow-checkout --node n1 --pid 4711"
    )]
    Explain {
        /// The rule.
        id: String,
        /// The node.
        #[arg(long)]
        node: String,
        /// Only in this scope.
        #[arg(long)]
        scope: Option<String>,
        /// Only this process; else those that match and those that come closest.
        #[arg(long, default_value_t = 0, hide_default_value = true)]
        pid: u32,
        /// At most so many processes.
        #[arg(long, default_value_t = 20)]
        limit: u32,
    },
    /// Show who changed the rules, when, and what each node made of it, newest first.
    #[command(
        after_help = "Examples:\n  gannetctl rules audit\n  gannetctl rules audit --node n1 --limit 20\n  gannetctl rules audit -o json"
    )]
    Audit {
        /// Only changes of this scope.
        #[arg(long, default_value = "", hide_default_value = true)]
        scope: String,
        /// Only answers of this node.
        #[arg(long, default_value = "", hide_default_value = true)]
        node: String,
        /// At most so many entries.
        #[arg(long, default_value_t = 100)]
        limit: u32,
    },
}

/// Where rules are read from.
#[derive(Debug, Args)]
pub(crate) struct RuleFiles {
    /// A rule file, YAML or JSON; `-` is the standard input. May be given several times.
    #[arg(short = 'f', long = "file", value_name = "FILE", required = true, num_args = 1..)]
    pub(crate) files: Vec<PathBuf>,
}

/// Which rule set.
#[derive(Debug, Args)]
pub(crate) struct ScopeArg {
    /// The rule set.
    #[arg(long, default_value = "default")]
    pub(crate) scope: String,
}

/// Rollout verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Rollout {
    /// Show what becomes of a revision, node by node, until every node has answered.
    #[command(after_help = "Exits 1 if a node rejected it.\n\n\
        Examples:\n  gannetctl rollout watch\n  gannetctl rollout watch 17 --follow\n  gannetctl rollout watch -o json | jq .")]
    Watch {
        /// The revision; the newest if not given.
        #[arg(default_value_t = 0, hide_default_value = true)]
        revision: u64,
        /// Go on when every node has answered.
        #[arg(long)]
        follow: bool,
        /// Give up after this time.
        #[arg(long, value_name = "DURATION", value_parser = duration)]
        timeout: Option<Duration>,
    },
    /// Bring staged rules (`rules apply --canary`) to more nodes, or to all.
    Resume {
        #[command(flatten)]
        scope: ScopeArg,
        /// To so many percent of the nodes; to all if not given.
        #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(1..=100))]
        percent: Option<u32>,
    },
    /// Take staged rules back: all nodes get what they had before.
    Abort {
        #[command(flatten)]
        scope: ScopeArg,
    },
}

/// Which profiles.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Selection")]
pub(crate) struct Select {
    /// Labels: '{service_name="checkout",pod=~"checkout-.*"}'. All profiles if not given.
    #[arg(short = 'q', long, default_value = "", hide_default_value = true)]
    pub(crate) query: String,
    /// How far back: 15m, 1h30m. An hour if nothing else is given.
    #[arg(long, value_name = "DURATION", value_parser = duration, conflicts_with = "from")]
    pub(crate) since: Option<Duration>,
    /// The first moment: RFC 3339, `now`, or `now-15m`.
    #[arg(long, value_name = "TIME", value_parser = moment)]
    pub(crate) from: Option<Timestamp>,
    /// The moment after the last, in the same form.
    #[arg(long, value_name = "TIME", value_parser = moment)]
    pub(crate) until: Option<Timestamp>,
    /// Only the profile with this id.
    #[arg(long, value_name = "ID", default_value = "", hide_default_value = true)]
    pub(crate) profile: String,
}

/// What to compare with.
#[expect(clippy::struct_field_names, reason = "the names of the flags, beside those of `Select`")]
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Comparison")]
pub(crate) struct Base {
    /// Labels of what to compare with; those of --query if only a time is given.
    #[arg(long, value_name = "QUERY")]
    pub(crate) base_query: Option<String>,
    /// How far back to begin: 2h.
    #[arg(long, value_name = "DURATION", value_parser = duration, conflicts_with = "base_from")]
    pub(crate) base_since: Option<Duration>,
    /// The first moment of what to compare with.
    #[arg(long, value_name = "TIME", value_parser = moment)]
    pub(crate) base_from: Option<Timestamp>,
    /// The moment after the last of what to compare with.
    #[arg(long, value_name = "TIME", value_parser = moment)]
    pub(crate) base_until: Option<Timestamp>,
}

/// Profile verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Profiles {
    /// List profiles, newest first.
    #[command(after_help = "Example:\n  gannetctl profiles list --query '{comm=\"postgres\"}' --since 1h")]
    List {
        #[command(flatten)]
        select: Select,
        /// At most so many; 0 is all.
        #[arg(long, default_value_t = 100)]
        limit: usize,
    },
    /// Fetch one profile as gzip-compressed pprof.
    #[command(
        after_help = "Example:\n  gannetctl profiles get 01JAZ… -O slow.pb.gz && go tool pprof -top slow.pb.gz"
    )]
    Get {
        /// The profile's id, from `profiles list`.
        id: String,
        /// Where to; `-` is the standard output. ID.pb.gz if not given.
        #[arg(short = 'O', long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
    /// Merge all profiles of a selection into one file of gzip-compressed pprof.
    #[command(
        after_help = "Example:\n  gannetctl profiles merge --query '{service_name=\"checkout\"}' --since 1h -O checkout.pb.gz"
    )]
    Merge {
        #[command(flatten)]
        select: Select,
        /// The sample type; needed where the selection holds several kinds of profiles.
        #[arg(long = "type", value_name = "TYPE", default_value = "", hide_default_value = true)]
        sample_type: String,
        /// Where to; `-` is the standard output.
        #[arg(short = 'O', long, value_name = "FILE", default_value = "merged.pb.gz")]
        out: PathBuf,
    },
    /// Compare two selections function by function: what became dearer, what became cheaper.
    #[command(after_help = "Examples:\n  \
        gannetctl profiles diff --query '{service_name=\"checkout\"}' --since 15m --base-from now-75m --base-until now-60m\n  \
        gannetctl profiles diff --query '{pod=\"a\"}' --base-query '{pod=\"b\"}'")]
    Diff {
        #[command(flatten)]
        top: TopArgs,
        #[command(flatten)]
        base: Base,
    },
}

/// Of a flame graph.
#[derive(Debug, Args)]
pub(crate) struct Flame {
    #[command(flatten)]
    pub(crate) select: Select,
    #[command(flatten)]
    pub(crate) base: Base,
    /// Show this pprof file instead of asking a collector.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["query", "since", "from", "until", "profile", "base_query", "base_since", "base_from", "base_until"])]
    pub(crate) input: Option<PathBuf>,
    /// The sample type: cpu/nanoseconds, samples/count, offcpu/nanoseconds. The profile's last if not given.
    #[arg(long = "type", value_name = "TYPE", default_value = "", hide_default_value = true)]
    pub(crate) sample_type: String,
    /// Fold the smallest subtrees beyond so many functions.
    #[arg(long, value_name = "N", default_value_t = 20_000)]
    pub(crate) max_nodes: usize,
    /// Print the tree even on a terminal.
    #[arg(long)]
    pub(crate) tree: bool,
    /// In the tree, leave out what is below this share of the whole.
    #[arg(long, value_name = "PERCENT", default_value_t = 0.5)]
    pub(crate) min_percent: f64,
}

/// Of a table of functions.
#[derive(Debug, Args)]
pub(crate) struct TopArgs {
    #[command(flatten)]
    pub(crate) select: Select,
    /// The sample type: cpu/nanoseconds, samples/count, offcpu/nanoseconds. The profile's last if not given.
    #[arg(long = "type", value_name = "TYPE", default_value = "", hide_default_value = true)]
    pub(crate) sample_type: String,
    /// At most so many functions.
    #[arg(long, default_value_t = 40)]
    pub(crate) limit: u32,
}

/// Of `top`.
#[derive(Debug, Args)]
pub(crate) struct Top {
    #[command(flatten)]
    pub(crate) top: TopArgs,
}

fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|error| format!("{error}: write it like 30s, 15m or 1h30m"))
}

fn moment(text: &str) -> Result<Timestamp, String> {
    let form = || "a time is RFC 3339 (2026-01-31T12:00:00Z), `now`, or `now-15m`".to_owned();
    match text.trim().strip_prefix("now") {
        Some("") => Ok(Timestamp::now()),
        Some(rest) => {
            let back = rest.strip_prefix('-').ok_or_else(form)?;
            Timestamp::now().checked_sub(duration(back)?).map_err(|_| form())
        }
        None => text.parse().map_err(|_| form()),
    }
}

fn wire(at: Timestamp) -> prost_types::Timestamp {
    prost_types::Timestamp { seconds: at.as_second(), nanos: at.subsec_nanosecond() }
}

/// The start that `--since` means, counted back from the end.
fn start(since: Option<Duration>, from: Option<Timestamp>, until: Option<Timestamp>) -> Option<Timestamp> {
    match since {
        Some(since) => {
            Some(until.unwrap_or_else(Timestamp::now).checked_sub(since).unwrap_or(Timestamp::UNIX_EPOCH))
        }
        None => from,
    }
}

impl Select {
    /// As the collector is asked.
    pub(crate) fn selection(&self) -> Selection {
        let Self { query, since, from, until, profile } = self;
        Selection {
            query: query.clone(),
            from: start(*since, *from, *until).map(wire),
            until: until.map(wire),
            profile_id: profile.clone(),
        }
    }
}

impl Base {
    /// Whether a comparison was asked for.
    pub(crate) fn is_given(&self) -> bool {
        let Self { base_query, base_since, base_from, base_until } = self;
        base_query.is_some() || base_since.is_some() || base_from.is_some() || base_until.is_some()
    }

    /// As the collector is asked: what is not said is as in the selection.
    pub(crate) fn selection(&self, main: &Select) -> Selection {
        let Self { base_query, base_since, base_from, base_until } = self;
        let mut base = main.selection();
        base.profile_id.clear();
        if let Some(query) = base_query {
            base.query.clone_from(query);
        }
        if base_since.is_some() || base_from.is_some() || base_until.is_some() {
            base.from = start(*base_since, *base_from, *base_until).map(wire);
            base.until = base_until.map(wire);
        }
        base
    }
}

/// Reads the command line, the program's own name first. An error prints itself and knows its exit code.
pub fn parse(args: impl IntoIterator<Item = std::ffi::OsString>) -> Result<Cli, clap::Error> {
    let args: Vec<_> = args.into_iter().collect();
    let mut command = Cli::command();
    let called = args.first().map(PathBuf::from).and_then(|path| path.file_stem().map(ToOwned::to_owned));
    if called.is_some_and(|name| name == "kubectl-gannet") {
        command = command.bin_name("kubectl gannet");
    }
    Cli::from_arg_matches(&command.try_get_matches_from(args)?)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn read(line: &str) -> Result<Cli, clap::Error> {
        parse(line.split(' ').map(Into::into))
    }

    #[test]
    fn the_definition_holds_together() {
        Cli::command().debug_assert();
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
        "gannetctl --collector https://c:4100 --tls-ca ca.pem flame --from 2026-01-31T12:00:00Z --min-percent 2"
    )]
    #[case("gannetctl top --type cpu/nanoseconds --collector http://127.0.0.1:1")]
    fn what_the_help_promises_is_understood(#[case] line: &str) {
        read(line).unwrap();
    }

    #[rstest]
    #[case("gannetctl", "Usage")]
    #[case("gannetctl rules apply", "--file")]
    #[case("gannetctl rules delete", "<IDS>...")]
    #[case("gannetctl top --since soon", "write it like 30s, 15m or 1h30m")]
    #[case("gannetctl top --from yesterday", "a time is RFC 3339")]
    #[case("gannetctl top --since 1h --from now-2h", "cannot be used with")]
    #[case("gannetctl nodes -o xml", "table, json, yaml")]
    #[case("gannetctl rules apply -f a --soak 1m", "--canary")]
    #[case("gannetctl rules apply -f a --canary 100", "1..=99")]
    fn wrong_usage_is_explained_and_exits_with_2(#[case] line: &str, #[case] words: &str) {
        let error = read(line).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(error.exit_code(), 2);
    }

    #[test]
    fn the_kubectl_plugin_speaks_of_itself_by_that_name() {
        let help = |name: &str| read(&format!("{name} rules --help")).unwrap_err().to_string();
        assert!(help("/usr/local/bin/kubectl-gannet").contains("Usage: kubectl gannet rules"));
        assert!(help("gannetctl").contains("Usage: gannetctl rules"));
    }

    #[test]
    fn a_time_span_counts_back_from_its_end() {
        let until: Timestamp = "2026-01-31T12:00:00Z".parse().unwrap();
        let select = Select {
            since: Some(Duration::from_secs(60)),
            until: Some(until),
            query: "{a=\"b\"}".into(),
            ..Select::default()
        };
        let selection = select.selection();
        assert_eq!(selection.from.unwrap().seconds + 60, selection.until.unwrap().seconds);
        let base = Base { base_query: Some("{a=\"c\"}".into()), ..Base::default() };
        assert_eq!(base.selection(&select), Selection { query: "{a=\"c\"}".into(), ..selection.clone() });
        let base = Base { base_until: Some(until), ..Base::default() };
        let earlier = base.selection(&select);
        assert_eq!((earlier.query, earlier.from), (selection.query, None));
    }
}
