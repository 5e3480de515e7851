//! The tools: names, descriptions, arguments, and the commands that answer them.

use std::{collections::BTreeMap, sync::Arc};

use gannet_proto::{
    control::ExplainRequest,
    labels::SERVICE_NAME,
    query::{SeriesInfo, SeriesRequest},
};
use rmcp::model::{Tool, ToolAnnotations};
use serde_json::{Map, Value};

use super::arguments::{Argument, Given, Kind, schema};
use crate::{
    args::{Flame, Format, TopArgs},
    client::Collector,
    error::Error,
    flame, profiles,
    render::{Console, count, show_time, table},
    rules,
};

/// Maximum number of frames of a flame graph. The rest becomes `[other]`.
const MAX_NODES: usize = 20_000;
/// Maximum number of values of a label in a list of services.
const MAX_VALUES: usize = 3;

const QUERY: Argument = Argument {
    name: "query",
    kind: Kind::Text,
    description: "Labels of the profiles, in PromQL's form: {service_name=\"checkout\", pod=~\"checkout-.*\"}. Not given: all profiles",
};
const SINCE: Argument = Argument {
    name: "since",
    kind: Kind::Text,
    description: "Profiles of the time before `until`: 15m, 1h30m, 7d. Not given: 1h. Not together with `from`",
};
const FROM: Argument = Argument {
    name: "from",
    kind: Kind::Text,
    description: "Profiles that start at this time or later: RFC 3339 (2026-01-31T12:00:00Z), now, or now-15m",
};
const UNTIL: Argument = Argument {
    name: "until",
    kind: Kind::Text,
    description: "Profiles that start before this time, in the form of `from`. Not given: now",
};
const TYPE: Argument = Argument {
    name: "type",
    kind: Kind::Text,
    description: "Sample type: cpu/nanoseconds, samples/count, offcpu/nanoseconds. Not given: the last type of the newest profile",
};

const SPAN: Argument = Argument {
    name: "span_id",
    kind: Kind::Text,
    description: "Only samples that were taken in one of these spans: ids of 16 hex digits, with commas between them. Not together with \
        `trace_id`",
};
const TRACE: Argument = Argument {
    name: "trace_id",
    kind: Kind::Text,
    description: "Only samples that were taken in one of these traces: ids of 32 hex digits, with commas between them",
};

const SERVICES: [Argument; 5] = [
    QUERY,
    SINCE,
    FROM,
    UNTIL,
    Argument {
        name: "limit",
        kind: Kind::Number(1.0, 1000.0, 50.0),
        description: "Services in the answer, those with the most samples first",
    },
];
const LIMIT: Argument =
    Argument { name: "limit", kind: Kind::Number(1.0, 200.0, 30.0), description: "Functions in the answer" };
const TOP: [Argument; 8] = [QUERY, SINCE, FROM, UNTIL, SPAN, TRACE, TYPE, LIMIT];
const DIFF: [Argument; 12] = [
    QUERY,
    SINCE,
    FROM,
    UNTIL,
    SPAN,
    TRACE,
    TYPE,
    LIMIT,
    Argument {
        name: "base_query",
        kind: Kind::Text,
        description: "Labels of the profiles to compare with. Not given: those of `query`",
    },
    Argument {
        name: "base_since",
        kind: Kind::Text,
        description: "Compare with profiles of the time before `base_until`: 15m, 1h",
    },
    Argument {
        name: "base_from",
        kind: Kind::Text,
        description: "Compare with profiles that start at this time or later: now-75m",
    },
    Argument {
        name: "base_until",
        kind: Kind::Text,
        description: "Compare with profiles that start before this time: now-60m",
    },
];
const FLAME: [Argument; 8] = [
    QUERY,
    SINCE,
    FROM,
    UNTIL,
    SPAN,
    TRACE,
    TYPE,
    Argument {
        name: "min_percent",
        kind: Kind::Number(0.0, 100.0, 1.0),
        description: "Leave out functions below this percentage of the total",
    },
];
const EXPLAIN: [Argument; 5] = [
    Argument { name: "rule", kind: Kind::Required, description: "Id of the rule" },
    Argument { name: "node", kind: Kind::Required, description: "Name of the node" },
    Argument { name: "scope", kind: Kind::Text, description: "Search the rule only in this scope" },
    Argument {
        name: "pid",
        kind: Kind::Number(0.0, 4_194_304.0, 0.0),
        description: "Explain only this process of the node. 0: processes that match or nearly match",
    },
    Argument { name: "limit", kind: Kind::Number(1.0, 200.0, 20.0), description: "Processes in the answer" },
];

/// The command that answers a tool.
#[derive(Clone, Copy, Debug)]
enum Action {
    Services,
    Top,
    Diff,
    Flame,
    Explain,
}

/// A declared tool.
#[derive(Debug)]
pub(super) struct Declared {
    pub(super) name: &'static str,
    title: &'static str,
    description: &'static str,
    arguments: &'static [Argument],
    /// The advice at the end of a cut answer: how to get a shorter one.
    pub(super) cure: &'static str,
    action: Action,
}

/// Returns all tools.
pub(super) fn all() -> &'static [Declared] {
    const FEWER: &str = "; give a smaller limit, or a query";
    const ALL: [Declared; 5] = [
        Declared {
            name: "list_services",
            title: "Services with profiles",
            description: "Lists the services that have stored profiles in a range of time, with their namespaces, nodes, sample \
                types, numbers of profiles and samples, and the time of the newest profile. Use it first, to learn the values for `query`.",
            arguments: &SERVICES,
            cure: FEWER,
            action: Action::Services,
        },
        Declared {
            name: "top_functions",
            title: "Functions with the highest values",
            description: "Lists the functions that use most CPU time (or another sample type) in the selected profiles: self is the \
                function alone, total includes its callees.",
            arguments: &TOP,
            cure: FEWER,
            action: Action::Top,
        },
        Declared {
            name: "diff_functions",
            title: "Functions that changed",
            description: "Compares two selections of profiles, by range of time, by labels or both, and lists the functions whose share \
                of the total grew or shrank, the largest growth first. Changes are in percentage points, so ranges of different \
                length compare fairly. Example: since 15m with base_from now-75m and base_until now-60m.",
            arguments: &DIFF,
            cure: FEWER,
            action: Action::Diff,
        },
        Declared {
            name: "flame_graph",
            title: "Flame graph as text",
            description: "Shows the merged call tree of the selected profiles as an indented text, callers first, each line with the \
                share and the value of a function with its callees.",
            arguments: &FLAME,
            cure: "; give a larger min_percent, or a query",
            action: Action::Flame,
        },
        Declared {
            name: "explain_rule",
            title: "Explain a rule",
            description: "Explains what a profiling rule does on one node: whether it selects the node, whether the node has applied \
                it, its captures, and for each process whether it matches or why not. An error lists the nodes that exist.",
            arguments: &EXPLAIN,
            cure: FEWER,
            action: Action::Explain,
        },
    ];
    &ALL
}

impl Declared {
    /// Returns the tool in the form of the protocol.
    pub(super) fn tool(&self) -> Tool {
        let hints =
            ToolAnnotations::with_title(self.title).read_only(true).idempotent(true).open_world(false);
        Tool::new(self.name, self.description, Arc::new(schema(self.arguments)))
            .with_title(self.title)
            .with_annotations(hints)
    }

    /// Carries out a call. Errors name the argument or the failed request, and the cure.
    pub(super) async fn call(
        &self,
        arguments: Map<String, Value>,
        collector: &Collector,
    ) -> Result<String, String> {
        let given = Given::check(self.arguments, arguments)?;
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let mut console = Console { out: &mut out, err: &mut err, terminal: false };
        let done = self.act(&given, collector, &mut console).await?;
        done.map_err(|error| error.to_string())?;
        // Warnings about missing data come first, so that a cut does not remove them.
        err.extend(out);
        Ok(String::from_utf8_lossy(&err).into_owned())
    }

    /// Runs the command. The outer error is for an invalid argument.
    async fn act(
        &self,
        given: &Given<'_>,
        collector: &Collector,
        console: &mut Console<'_>,
    ) -> Result<Result<(), Error>, String> {
        let top = || -> Result<TopArgs, String> {
            Ok(TopArgs {
                sample_type: given.text("type"),
                limit: given.number("limit") as u32,
                interpreter_frames: false,
                hide_error_frames: false,
                select: given.select()?,
            })
        };
        Ok(match self.action {
            Action::Services => {
                let request = SeriesRequest { selection: Some(given.select()?.selection()) };
                services(request, given.number("limit") as usize, collector, console).await
            }
            Action::Top => profiles::top(&top()?, None, collector, Format::Table, console).await,
            Action::Diff => {
                profiles::top(&top()?, Some(&given.base()?), collector, Format::Table, console).await
            }
            Action::Flame => {
                let args = Flame {
                    input: None,
                    sample_type: given.text("type"),
                    max_nodes: MAX_NODES,
                    interpreter_frames: false,
                    hide_error_frames: false,
                    tree: true,
                    min_percent: given.number("min_percent"),
                    select: given.select()?,
                    base: crate::args::Base::default(),
                };
                flame::show(&args, collector, Format::Table, console).await
            }
            Action::Explain => {
                let request = ExplainRequest {
                    node: given.text("node"),
                    rule_id: given.text("rule"),
                    pid: given.number("pid") as u32,
                    limit: given.number("limit") as u32,
                };
                let scope = given.optional("scope");
                rules::explain(request, scope.as_deref(), collector, Format::Table, console).await
            }
        })
    }
}

/// Prints the services that have profiles.
async fn services(
    request: SeriesRequest,
    limit: usize,
    collector: &Collector,
    console: &mut Console<'_>,
) -> Result<(), Error> {
    let answer = collector.query().series(request).await;
    let series = answer.map_err(|status| collector.fault(&status))?.into_inner().series;
    console.show(Format::Table, || Value::Null, || services_table(series, limit))
}

fn services_table(series: Vec<SeriesInfo>, limit: usize) -> String {
    let mut services: BTreeMap<String, Vec<SeriesInfo>> = BTreeMap::new();
    for info in series {
        services.entry(info.labels.get(SERVICE_NAME).cloned().unwrap_or_default()).or_default().push(info);
    }
    if services.is_empty() {
        return "no profiles in this selection; give a longer `since`, or another `query`\n".to_owned();
    }
    let sum = |series: &[SeriesInfo]| series.iter().map(|info| info.samples).sum::<u64>();
    let total = services.len();
    let mut services: Vec<_> = services.into_iter().collect();
    services.sort_by(|(a, x), (b, y)| sum(y).cmp(&sum(x)).then_with(|| a.cmp(b)));
    services.truncate(limit);
    let rows: Vec<_> = services
        .iter()
        .map(|(name, series)| {
            let labels = |label: &str| {
                some(series.iter().filter_map(|info| info.labels.get(label).map(String::as_str)).collect())
            };
            let types = series.iter().flat_map(|info| info.sample_types.iter().map(String::as_str)).collect();
            let newest = series.iter().filter_map(|info| info.last).max_by_key(|at| (at.seconds, at.nanos));
            [
                if name.is_empty() { "(none)".to_owned() } else { name.clone() },
                labels("namespace"),
                labels("node"),
                some(types),
                series.iter().map(|info| info.profiles).sum::<u64>().to_string(),
                sum(series).to_string(),
                show_time(newest),
            ]
        })
        .collect();
    let mut text = table(
        ["SERVICE_NAME", "NAMESPACE", "NODE", "SAMPLE TYPES", ">PROFILES", ">SAMPLES", "NEWEST PROFILE"],
        &rows,
    );
    if total > limit {
        text = text + "there are " + &count(total, "service") + "; a larger limit shows more\n";
    }
    text
}

/// Formats the first [`MAX_VALUES`] values, and the number of further ones.
fn some(mut values: Vec<&str>) -> String {
    values.sort_unstable();
    values.dedup();
    let more = values.len().saturating_sub(MAX_VALUES);
    values.truncate(MAX_VALUES);
    let shown = values.join(", ");
    if more > 0 { format!("{shown} and {more} more") } else { shown }
}
