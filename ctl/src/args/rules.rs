//! Arguments of the commands `rules` and `rollout`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use gannet_base::TimeSpan;

/// Commands of `gannetctl rules`.
#[derive(Debug, Subcommand)]
pub(crate) enum Rules {
    /// Replace all rules of a scope with the rules in the files
    #[command(after_help = "Examples:\n  \
        gannetctl rules apply -f rules.yaml\n  \
        gannetctl rules apply -f a.yaml -f b.yaml --scope shop --wait\n  \
        gannetctl rules apply -f rules.yaml --dry-run\n  \
        gannetctl rules apply -f rules.yaml --canary 10 --soak 10m\n\n\
        --dry-run asks each node what it would sample now. With --wait the exit code is 1 if a node rejects the rules.")]
    Apply {
        #[command(flatten)]
        files: RuleFiles,
        #[command(flatten)]
        scope: ScopeArg,
        /// Change the scope only if it still has this etag (`rules list -o json` shows it)
        #[arg(long)]
        etag: Option<String>,
        /// Accept files without rules, which removes all rules of the scope
        #[arg(long)]
        allow_empty: bool,
        /// Change nothing: validate the rules and show what each node would sample
        #[arg(long, conflicts_with = "wait")]
        dry_run: bool,
        /// Stage the rules: apply them to this percentage of the nodes (1 to 99). The other nodes keep their rules until
        /// `rollout resume`. A node that rejects the rules pauses the rollout
        #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(1..=99))]
        canary: Option<u32>,
        /// Apply staged rules to all nodes after this time, if no node has rejected them
        #[arg(long, value_name = "DURATION", requires = "canary")]
        soak: Option<TimeSpan>,
        /// Wait until every connected node has answered
        #[arg(long)]
        wait: bool,
        /// Stop waiting after this time and fail
        #[arg(long, value_name = "DURATION", requires = "wait")]
        timeout: Option<TimeSpan>,
    },
    /// List the rules of all scopes
    List {
        /// List only the rules of this scope
        #[arg(long)]
        scope: Option<String>,
    },
    /// Print the rules of a scope as a rule file
    #[command(
        after_help = "Examples:\n  gannetctl rules show > rules.yaml\n  gannetctl rules show slow-checkout -o json"
    )]
    Show {
        /// Print only this rule
        id: Option<String>,
        #[command(flatten)]
        scope: ScopeArg,
    },
    /// Delete rules of a scope
    #[command(
        after_help = "Examples:\n  gannetctl rules delete slow-checkout\n  gannetctl rules delete --all --scope shop"
    )]
    Delete {
        /// The rules to delete
        #[arg(required_unless_present = "all", conflicts_with = "all")]
        ids: Vec<String>,
        /// Delete the scope with all its rules
        #[arg(long)]
        all: bool,
        #[command(flatten)]
        scope: ScopeArg,
        /// Change the scope only if it still has this etag
        #[arg(long)]
        etag: Option<String>,
    },
    /// Validate rule files without a collector
    Validate {
        #[command(flatten)]
        files: RuleFiles,
    },
    /// Show the state of a rule on a node, and why it does or does not sample each process there
    #[command(
        after_help = "Examples:\n  gannetctl rules explain slow-checkout --node n1\n  gannetctl rules explain slow-checkout --node n1 --pid 4711"
    )]
    Explain {
        /// Id of the rule
        id: String,
        /// Name of the node
        #[arg(long)]
        node: String,
        /// Look for the rule only in this scope
        #[arg(long)]
        scope: Option<String>,
        /// Explain only this process, instead of those that match or nearly match
        #[arg(long, default_value_t = 0, hide_default_value = true)]
        pid: u32,
        /// Maximum number of processes
        #[arg(long, default_value_t = 20)]
        limit: u32,
    },
    /// Show who changed the rules and how each node answered, newest first
    #[command(
        after_help = "Examples:\n  gannetctl rules audit\n  gannetctl rules audit --node n1 --limit 20\n  gannetctl rules audit -o json"
    )]
    Audit {
        /// Show only changes of this scope
        #[arg(long, default_value = "", hide_default_value = true)]
        scope: String,
        /// Show only answers of this node
        #[arg(long, default_value = "", hide_default_value = true)]
        node: String,
        /// Maximum number of entries
        #[arg(long, default_value_t = 100)]
        limit: u32,
    },
}

/// Files with rules.
#[derive(Debug, Args)]
pub(crate) struct RuleFiles {
    /// Read rules from this YAML or JSON file, or from standard input for `-`. Several files form one rule set
    #[arg(short = 'f', long = "file", value_name = "FILE", required = true, num_args = 1..)]
    pub(crate) files: Vec<PathBuf>,
}

/// A named rule set.
#[derive(Debug, Args)]
pub(crate) struct ScopeArg {
    /// The scope: a named set of rules
    #[arg(long, default_value = "default")]
    pub(crate) scope: String,
}

/// Commands of `gannetctl rollout`.
#[derive(Debug, Subcommand)]
pub(crate) enum Rollout {
    /// Show how each node answers a revision of the rules, until all have answered
    #[command(after_help = "The exit code is 1 if a node rejected the revision.\n\n\
        Examples:\n  gannetctl rollout watch\n  gannetctl rollout watch 17 --follow\n  gannetctl rollout watch -o json | jq .")]
    Watch {
        /// The revision; by default the newest
        #[arg(default_value_t = 0, hide_default_value = true)]
        revision: u64,
        /// Continue after all nodes have answered, until Ctrl-C
        #[arg(long)]
        follow: bool,
        /// Stop waiting after this time and fail
        #[arg(long, value_name = "DURATION")]
        timeout: Option<TimeSpan>,
    },
    /// Apply staged rules (`rules apply --canary`) to more nodes, or to all
    Resume {
        #[command(flatten)]
        scope: ScopeArg,
        /// Percentage of the nodes; by default all nodes
        #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(1..=100))]
        percent: Option<u32>,
    },
    /// Withdraw staged rules: all nodes get the previous rules of the scope
    Abort {
        #[command(flatten)]
        scope: ScopeArg,
    },
}
