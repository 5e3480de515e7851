//! Arguments of the commands that read stored profiles, and of `profile`, which takes a new one.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Subcommand};
use gannet_base::TimeSpan;
use gannet_proto::query::{DeleteProfilesRequest, Selection};
use jiff::Timestamp;

use crate::export::FileFormat;

/// The spans or traces whose samples a command reads; all samples by default.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct Spans {
    /// Only samples of one of these spans: ids of 16 hex digits
    #[arg(long, value_name = "ID", value_delimiter = ',', conflicts_with = "trace_id")]
    pub(crate) span_id: Vec<String>,
    /// Only samples of one of these traces: ids of 32 hex digits
    #[arg(long, value_name = "ID", value_delimiter = ',')]
    pub(crate) trace_id: Vec<String>,
}

/// Stored profiles, chosen by labels and time, and their samples, by spans.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Selection")]
pub(crate) struct Select {
    /// Profiles with these labels: '{service_name="checkout",pod=~"checkout-.*"}'. By default all
    #[arg(short = 'q', long, default_value = "", hide_default_value = true)]
    pub(crate) query: String,
    /// Profiles of the last 15m, 1h30m, ... By default of the last hour
    #[arg(long, value_name = "DURATION", conflicts_with = "from")]
    pub(crate) since: Option<TimeSpan>,
    /// Profiles that start at this time or later: RFC 3339, `now`, or `now-15m`
    #[arg(long, value_name = "TIME", value_parser = moment)]
    pub(crate) from: Option<Timestamp>,
    /// Profiles that start before this time, in the same form
    #[arg(long, value_name = "TIME", value_parser = moment)]
    pub(crate) until: Option<Timestamp>,
    /// Only the profile with this id
    #[arg(long, value_name = "ID", default_value = "", hide_default_value = true)]
    pub(crate) profile: String,
    #[command(flatten)]
    pub(crate) spans: Spans,
}

/// The base of a comparison.
#[expect(
    clippy::struct_field_names,
    reason = "the fields are flags, and `Select` has the same ones without `base-`"
)]
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Comparison")]
pub(crate) struct Base {
    /// Labels of the profiles to compare with; by default those of --query
    #[arg(long, value_name = "QUERY")]
    pub(crate) base_query: Option<String>,
    /// Compare with the profiles of the last 2h, ...; ends at --base-until
    #[arg(long, value_name = "DURATION", conflicts_with = "base_from")]
    pub(crate) base_since: Option<TimeSpan>,
    /// Compare with profiles that start at this time or later
    #[arg(long, value_name = "TIME", value_parser = moment)]
    pub(crate) base_from: Option<Timestamp>,
    /// Compare with profiles that start before this time
    #[arg(long, value_name = "TIME", value_parser = moment)]
    pub(crate) base_until: Option<Timestamp>,
}

/// The format of a file.
#[derive(Clone, Copy, Debug, Default, Args)]
pub(crate) struct Form {
    /// Write this format, whatever the ending of the file
    #[arg(long = "as", value_name = "FORMAT", value_enum)]
    pub(crate) form: Option<FileFormat>,
}

/// Commands of `gannetctl profiles`.
#[derive(Debug, Subcommand)]
pub(crate) enum Profiles {
    /// List profiles, newest first
    #[command(after_help = "Example:\n  gannetctl profiles list --query '{comm=\"postgres\"}' --since 1h")]
    List {
        /// Maximum number of profiles; 0 lists all
        #[arg(long, default_value_t = 100)]
        limit: usize,
        #[command(flatten)]
        select: Select,
    },
    /// Download one profile, as pprof or for another tool
    #[command(
        after_help = "Examples:\n  gannetctl profiles get 01JAZ… -O slow.pb.gz && go tool pprof -top slow.pb.gz\n  \
        gannetctl profiles get 01JAZ… -O slow.speedscope.json"
    )]
    Get {
        /// The profile's id, from `profiles list`
        id: String,
        /// Write to this file, or to standard output for `-`; by default to ID.pb.gz. The ending chooses the format: .pb.gz,
        /// .folded, .speedscope.json, .firefox.json, .perf, .otlp.json
        #[arg(short = 'O', long, value_name = "FILE")]
        out: Option<PathBuf>,
        #[command(flatten)]
        form: Form,
        #[command(flatten)]
        spans: Spans,
    },
    /// Convert a pprof file for another tool; needs no collector
    #[command(after_help = "Examples:\n  gannetctl profiles convert slow.pb.gz -O slow.firefox.json\n  \
        gannetctl profiles convert slow.pb.gz --as folded | flamegraph.pl > slow.svg\n  \
        gannetctl profiles convert slow.pb.gz --as otlp | curl -H content-type:application/json --data-binary @- \
        http://otel-collector:4318/v1development/profiles")]
    Convert {
        /// The pprof file to convert
        file: PathBuf,
        /// Write to this file, or to standard output for `-`. The ending chooses the format: .pb.gz, .folded,
        /// .speedscope.json, .firefox.json, .perf, .otlp.json
        #[arg(short = 'O', long, value_name = "FILE", default_value = "-")]
        out: PathBuf,
        /// The sample type that folded, firefox and perf show. By default the last type of the profile
        #[arg(long = "type", value_name = "TYPE", default_value = "", hide_default_value = true)]
        sample_type: String,
        #[command(flatten)]
        form: Form,
    },
    /// Show one profile in the browser, on a page of this machine
    ///
    /// The profile is a pprof file of any tool, or the merged profiles of a collector. The command prints the link of the page and
    /// shows the profile until Ctrl-C. It starts gannet-collector, which has the page.
    #[command(after_help = "Examples:\n  gannetctl profiles open slow.pb.gz\n  \
        gannetctl profiles open --query '{service_name=\"checkout\"}' --since 1h")]
    Open(Open),
    /// Merge the selected profiles into one file, as pprof or for another tool
    #[command(
        after_help = "Example:\n  gannetctl profiles merge --query '{service_name=\"checkout\"}' --since 1h -O checkout.pb.gz"
    )]
    Merge {
        /// Merge only profiles with this sample type; needed if the selection holds several kinds of profiles
        #[arg(long = "type", value_name = "TYPE", default_value = "", hide_default_value = true)]
        sample_type: String,
        /// Write to this file, or to standard output for `-`. The ending chooses the format: .pb.gz, .folded,
        /// .speedscope.json, .firefox.json, .perf, .otlp.json
        #[arg(short = 'O', long, value_name = "FILE", default_value = "merged.pb.gz")]
        out: PathBuf,
        #[command(flatten)]
        form: Form,
        #[command(flatten)]
        select: Select,
    },
    /// Delete profiles while the collector runs, for good
    ///
    /// The command prints what it would delete, and asks. After that no query of this collector returns the profiles, and none of other
    /// collectors of the same bucket within seconds. The collector removes them from its objects and tables in the background:
    /// `profiles deletions` shows the deletions that it has not carried out yet. Profiles that arrive later stay, also those of the same
    /// time. The caller needs the role editor, and the audit log has an entry.
    #[command(
        after_help = "Examples:\n  gannetctl profiles delete --selector '{service_name=\"checkout\"}' --until now-7d --dry-run\n  \
        gannetctl profiles delete --selector '{namespace=\"shop\",pod=~\"web-.*\"}' --since 2h --yes"
    )]
    Delete(Delete),
    /// List the deletions of profiles that the collector has not carried out yet
    Deletions,
    /// Run a read-only SQL query over the tables that the collector writes with --table
    #[command(
        after_help = "The tables are samples, profiles, stacks, frames and labels; docs/storage.md describes their columns and \
        has more queries. The dialect is that of SQLite, times are UTC.\n\nExamples:\n  \
        gannetctl profiles query --sql \"SELECT service_name, sum(value) / 1e9 AS cpu_seconds FROM samples \
        WHERE type = 'cpu/nanoseconds' AND date = date('now') GROUP BY 1 ORDER BY 2 DESC\"\n  \
        gannetctl profiles query --sql - -o csv < hot.sql > hot.csv"
    )]
    Query(SqlArgs),
    /// Compare two selections and show which functions use more or less than before
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

/// Arguments of `profiles query`.
#[derive(Debug, Args)]
pub(crate) struct SqlArgs {
    /// One SELECT; `-` reads it from standard input
    #[arg(long, value_name = "QUERY")]
    pub(crate) sql: String,
    /// Show at most this many rows; the collector has a limit of its own
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) limit: u32,
    /// End the query after this time; the collector has a limit of its own
    #[arg(long, value_name = "DURATION")]
    pub(crate) timeout: Option<TimeSpan>,
    /// Print the rows as CSV, for `-o csv`.
    #[arg(skip)]
    pub(crate) csv: bool,
}

/// Arguments of `profiles open`.
#[derive(Debug, Args)]
pub(crate) struct Open {
    /// The pprof file to show; needs no collector
    #[arg(conflicts_with_all = ["query", "since", "from", "until", "profile", "sample_type", "span_id", "trace_id"])]
    pub(crate) file: Option<PathBuf>,
    /// Merge only profiles with this sample type; needed if the selection holds several kinds of profiles
    #[arg(long = "type", value_name = "TYPE", default_value = "", hide_default_value = true)]
    pub(crate) sample_type: String,
    /// Port of the page on 127.0.0.1. By default a free one
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    pub(crate) port: u16,
    #[command(flatten)]
    pub(crate) select: Select,
}

/// Arguments of `flame`.
#[derive(Debug, Args)]
pub(crate) struct Flame {
    /// Show this pprof file; needs no collector
    #[arg(long, value_name = "FILE", conflicts_with_all = ["query", "since", "from", "until", "profile", "span_id", "trace_id", "base_query", "base_since", "base_from", "base_until"])]
    pub(crate) input: Option<PathBuf>,
    /// The sample type: cpu/nanoseconds, samples/count, offcpu/nanoseconds. By default the last type of the profile
    #[arg(long = "type", value_name = "TYPE", default_value = "", hide_default_value = true)]
    pub(crate) sample_type: String,
    /// Show at most this many functions; the smallest subtrees become `[other]`
    #[arg(long, value_name = "N", default_value_t = 20_000)]
    pub(crate) max_nodes: usize,
    /// Show the C functions of interpreters between the functions that they run
    #[arg(long)]
    pub(crate) interpreter_frames: bool,
    /// Leave out frames that say what a stack lacks, such as `[truncated]` and `[unknown]`; their values stay with their
    /// callers
    #[arg(long)]
    pub(crate) hide_error_frames: bool,
    /// Print the tree even if the output is a terminal
    #[arg(long)]
    pub(crate) tree: bool,
    /// In the tree, omit functions below this percentage of the total
    #[arg(long, value_name = "PERCENT", default_value_t = 0.5)]
    pub(crate) min_percent: f64,
    #[command(flatten)]
    pub(crate) select: Select,
    #[command(flatten)]
    pub(crate) base: Base,
}

/// Arguments of `profiles delete`.
#[derive(Debug, Args)]
pub(crate) struct Delete {
    /// Profiles with these labels: '{service_name="checkout",pod=~"checkout-.*"}'. Without it, a range is needed
    #[arg(
        short = 'q',
        long,
        visible_alias = "query",
        value_name = "QUERY",
        default_value = "",
        hide_default_value = true
    )]
    pub(crate) selector: String,
    /// Profiles of the last 15m, 1h30m, ..., before --until. By default of any time
    #[arg(long, value_name = "DURATION", conflicts_with = "from")]
    pub(crate) since: Option<TimeSpan>,
    /// Profiles that start at this time or later: RFC 3339, `now`, or `now-15m`
    #[arg(long, value_name = "TIME", value_parser = moment)]
    pub(crate) from: Option<Timestamp>,
    /// Profiles that start before this time, in the same form
    #[arg(long, value_name = "TIME", value_parser = moment)]
    pub(crate) until: Option<Timestamp>,
    /// Only print what the command would delete
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Delete without a question
    #[arg(long, conflicts_with = "dry_run")]
    pub(crate) yes: bool,
}

impl Delete {
    /// Converts the flags to a dry run. Resolves `--since` against the present time, so that the deletion has the same range.
    pub(crate) fn request(&self) -> DeleteProfilesRequest {
        let Self { selector, since, from, until, .. } = self;
        DeleteProfilesRequest {
            query: selector.clone(),
            from: start(*since, *from, *until).map(wire),
            until: until.map(wire),
            dry_run: true,
        }
    }
}

/// Arguments of a table of functions.
#[derive(Debug, Args)]
pub(crate) struct TopArgs {
    /// The sample type: cpu/nanoseconds, samples/count, offcpu/nanoseconds. By default the last type of the profile
    #[arg(long = "type", value_name = "TYPE", default_value = "", hide_default_value = true)]
    pub(crate) sample_type: String,
    /// Maximum number of functions
    #[arg(long, default_value_t = 40)]
    pub(crate) limit: u32,
    /// Count the C functions of interpreters as functions, instead of the functions that they run
    #[arg(long)]
    pub(crate) interpreter_frames: bool,
    /// Leave out frames that say what a stack lacks, such as `[truncated]` and `[unknown]`
    #[arg(long)]
    pub(crate) hide_error_frames: bool,
    #[command(flatten)]
    pub(crate) select: Select,
}

/// Arguments of `profile`.
#[derive(Debug, Args)]
pub(crate) struct Manual {
    /// The node; optional if only one is connected
    #[arg(long)]
    pub(crate) node: Option<String>,
    /// Only these processes, by their ids on the node
    #[arg(long, value_name = "PID", num_args = 1..)]
    pub(crate) pid: Vec<u32>,
    /// Only processes with these command names; `python3*` matches a prefix
    #[arg(long, value_name = "NAME", num_args = 1..)]
    pub(crate) comm: Vec<String>,
    /// Only processes with these executables, as the process sees the path; `/usr/lib/jvm/*` matches a prefix
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub(crate) exe: Vec<String>,
    /// Only processes in these control groups
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub(crate) cgroup: Vec<String>,
    /// Only processes of this pod
    #[arg(long, value_name = "NAMESPACE/NAME")]
    pub(crate) pod: Option<String>,
    /// Only processes of pods with these labels: app=checkout
    #[arg(long, value_name = "SELECTOR", default_value = "", hide_default_value = true)]
    pub(crate) pod_labels: String,
    /// Only processes of pods in these namespaces
    #[arg(long, value_name = "NAME", num_args = 1..)]
    pub(crate) namespace: Vec<String>,
    /// Only processes of containers with these names
    #[arg(long, value_name = "NAME", num_args = 1..)]
    pub(crate) container: Vec<String>,
    /// Only processes of these language runtimes: dotnet, erlang, go, java, luajit, node, perl, php, python, ruby
    #[arg(long, value_name = "NAME", num_args = 1..)]
    pub(crate) runtime: Vec<String>,
    /// Only processes whose runtime has one of these versions: 17, 3.11
    #[arg(long, value_name = "VERSION", num_args = 1.., requires = "runtime")]
    pub(crate) runtime_version: Vec<String>,
    /// Only processes that declare one of these names for their service; `shop-*` matches a prefix
    #[arg(long, value_name = "NAME", num_args = 1..)]
    pub(crate) service: Vec<String>,
    /// How long to capture: 1s to 10m
    #[arg(long = "for", value_name = "DURATION", default_value = "30s")]
    pub(crate) lasting: TimeSpan,
    /// Samples per second and CPU
    #[arg(long, default_value_t = gannet_proto::rules::TRIGGERED_HZ)]
    pub(crate) hz: u32,
    /// Sample where threads wait (off-CPU time) instead of where they run
    #[arg(long)]
    pub(crate) off_cpu: bool,
}

/// Reads a time: RFC 3339, `now`, or `now-` followed by a duration.
pub(crate) fn moment(text: &str) -> Result<Timestamp, String> {
    let form = || "write a time as RFC 3339 (2026-01-31T12:00:00Z), `now`, or `now-15m`".to_owned();
    match text.trim().strip_prefix("now") {
        Some("") => Ok(Timestamp::now()),
        Some(rest) => {
            let back = rest.strip_prefix('-').ok_or_else(form)?;
            let back: TimeSpan = back.parse().map_err(|error| format!("{error}"))?;
            Timestamp::now().checked_sub(Duration::from(back)).map_err(|_| form())
        }
        None => text.parse().map_err(|_| form()),
    }
}

fn wire(at: Timestamp) -> prost_types::Timestamp {
    prost_types::Timestamp { seconds: at.as_second(), nanos: at.subsec_nanosecond() }
}

/// Returns the start of a range: `since` before its end, or `from`.
fn start(since: Option<TimeSpan>, from: Option<Timestamp>, until: Option<Timestamp>) -> Option<Timestamp> {
    match since {
        Some(since) => {
            let end = until.unwrap_or_else(Timestamp::now);
            Some(end.checked_sub(Duration::from(since)).unwrap_or(Timestamp::UNIX_EPOCH))
        }
        None => from,
    }
}

impl Select {
    /// Converts the flags to a request. Resolves `--since` against the present time.
    pub(crate) fn selection(&self) -> Selection {
        let Self { query, since, from, until, profile, spans: Spans { span_id, trace_id } } = self;
        Selection {
            query: query.clone(),
            from: start(*since, *from, *until).map(wire),
            until: until.map(wire),
            profile_id: profile.clone(),
            span_id: span_id.clone(),
            trace_id: trace_id.clone(),
        }
    }
}

impl Base {
    /// Reports whether the command line asks for a comparison.
    pub(crate) fn is_given(&self) -> bool {
        let Self { base_query, base_since, base_from, base_until } = self;
        base_query.is_some() || base_since.is_some() || base_from.is_some() || base_until.is_some()
    }

    /// Converts the flags to a request. Labels or times that are not given are those of `main`, and so are the spans.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_span_counts_back_from_its_end() {
        let until: Timestamp = "2026-01-31T12:00:00Z".parse().unwrap();
        let select = Select {
            since: Some(TimeSpan::from_secs(60)),
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
