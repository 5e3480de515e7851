//! Calls that merge profiles: flame graphs, comparisons, and pprof.

use std::{borrow::Cow, sync::Arc};

use gannet_proto::{
    foreign::{pyroscope_querier as api, pyroscope_querier::ProfileFormat, pyroscope_types as types},
    pprof::{self, FlameTree, Merger, Profile, Side},
};
use tonic::Status;
use ulid::Ulid;

use super::{
    flamegraph::{CallTree, node_limit},
    scope::{Range, Scope, parse_selector},
};
use crate::{
    clickhouse::TableKind,
    profile_type::ProfileType,
    query::{Merged, Query, QueryError, SpanFilter, TableRange},
};

/// Frames of a call site: those of the deepest stack.
const MAX_CALL_SITE: usize = pprof::MAX_STACK_FRAMES;
/// Ids of profiles or spans of one request.
const MAX_IDS: usize = 1024;

/// One side of a request: the profiles and stacks that it selects.
#[derive(Debug, Clone)]
pub(super) struct Stacks {
    pub(super) wanted: ProfileType,
    selector: String,
    range: Range,
    call_site: Vec<String>,
    ids: Vec<Ulid>,
    spans: SpanFilter,
}

/// Merged profiles, and the position of the selected sample type in each.
type Parts = Vec<(Arc<Merged>, usize)>;

impl Stacks {
    /// Checks the parts of a request that all calls have.
    pub(super) fn new(profile_type: &str, selector: &str, range: Range) -> Result<Self, Status> {
        parse_selector("label_selector", selector)?;
        Ok(Self {
            wanted: ProfileType::parse(profile_type)?,
            selector: selector.to_owned(),
            range,
            call_site: Vec::new(),
            ids: Vec::new(),
            spans: SpanFilter::All,
        })
    }

    fn below(mut self, selector: Option<types::StackTraceSelector>) -> Result<Self, Status> {
        let call_site = selector.unwrap_or_default().call_site;
        if call_site.len() > MAX_CALL_SITE {
            return Err(Status::invalid_argument(format!(
                "stack_trace_selector.call_site: {} functions, and a stack has at most {MAX_CALL_SITE}",
                call_site.len()
            )));
        }
        self.call_site = call_site.into_iter().map(|location| location.name).collect();
        Ok(self)
    }

    fn of_profiles(mut self, ids: &[String]) -> Result<Self, Status> {
        check_count("profile_id_selector", ids)?;
        self.ids = ids.iter().map(|id| parse_id(id)).collect::<Result<_, _>>()?;
        Ok(self)
    }

    fn of_spans(mut self, spans: Vec<String>, traces: Vec<String>) -> Result<Self, Status> {
        if !spans.is_empty() && !traces.is_empty() {
            return Err(Status::invalid_argument(
                "span_selector and trace_id_selector: give one of them, not both",
            ));
        }
        check_hex("span_selector", &spans, 16)?;
        check_hex("trace_id_selector", &traces, 32)?;
        self.spans = SpanFilter::of_checked(spans, traces);
        Ok(self)
    }

    pub(super) fn of_stacktraces(request: api::SelectMergeStacktracesRequest) -> Result<Self, Status> {
        let range = Range::required(request.start, request.end)?;
        Self::new(&request.profile_type_id, &request.label_selector, range)?
            .below(request.stack_trace_selector)?
            .of_profiles(&request.profile_id_selector)?
            .of_spans(request.span_selector, request.trace_id_selector)
    }

    /// Merges the selected profiles. Those with different sample types stay apart.
    async fn merged(&self, query: &Arc<Query>) -> Result<Parts, Status> {
        let (this, scoped) = (self.clone(), Arc::clone(query));
        let selector = parse_selector("label_selector", &self.selector)?;
        let found = if query.has_tables() && this.ids.is_empty() {
            let scope = query.timed("pyroscope_select", move |_| {
                Ok(Arc::new(Scope::new(&scoped, selector, Some(this.wanted), this.range)))
            });
            let scope = scope.await?;
            let mut filter = scope.filter();
            let keep_kind = |kind: &TableKind| scope.takes_kind(&kind.name, &kind.types);
            query.found_in(scope.table_range(), move |entry| filter.takes(entry), keep_kind).await?
        } else {
            let find = query.timed("pyroscope_select", move |q| {
                let scope = Arc::new(Scope::new(&scoped, selector, Some(this.wanted), this.range));
                let (TableRange { series, from_ms, until_ms, .. }, mut filter) =
                    (scope.table_range(), scope.filter());
                q.find_profiles(&series, from_ms, until_ms, |entry| {
                    (this.ids.is_empty() || this.ids.contains(&entry.key.id)) && filter.takes(entry)
                })
            });
            find.await?
        };
        let mut parts = Vec::new();
        for (types, merged) in query.merge_found(found).await? {
            let types: Vec<&str> = types.iter().map(String::as_str).collect();
            let kinds = ProfileType::of_profile(Some(&self.wanted.name), &types);
            let is_wanted = |kind: &ProfileType| {
                (&kind.sample_type, &kind.sample_unit) == (&self.wanted.sample_type, &self.wanted.sample_unit)
            };
            parts.extend(kinds.iter().position(is_wanted).map(|index| (merged, index)));
        }
        Ok(parts)
    }

    /// Returns a merged profile with the selected samples alone.
    fn select<'p>(&self, profile: &'p Profile) -> Result<Cow<'p, Profile>, QueryError> {
        let selected = self.spans.of(Cow::Borrowed(profile));
        if self.call_site.is_empty() {
            return Ok(selected);
        }
        let below = pprof::stacks_below(&selected, &self.call_site)
            .map_err(|error| QueryError::Invalid(error.to_string()))?;
        let mut below = below.into_iter();
        let mut profile = selected.into_owned();
        profile.sample.retain(|_| below.next().unwrap_or(false));
        Ok(Cow::Owned(profile))
    }

    /// Adds the selected stacks to one side of a tree. Blocking.
    fn add_to(&self, tree: &mut FlameTree, parts: &Parts, side: Side) -> Result<(), QueryError> {
        for (merged, index) in parts {
            tree.add(&*self.select(&merged.profile)?, *index, side)
                .map_err(|error| QueryError::Invalid(error.to_string()))?;
        }
        Ok(())
    }

    /// Returns the selected stacks as a tree.
    pub(super) async fn tree(self, query: &Arc<Query>) -> Result<CallTree, Status> {
        let parts = self.merged(query).await?;
        let tree = query.timed("pyroscope_flamegraph", move |_| {
            let mut tree = FlameTree::new();
            self.add_to(&mut tree, &parts, Side::Main)?;
            Ok(CallTree::new(&tree))
        });
        Ok(tree.await?)
    }

    /// Returns the selected stacks as a profile with one sample type. It is empty if there are none.
    async fn profile(self, query: &Arc<Query>) -> Result<Profile, Status> {
        let parts = self.merged(query).await?;
        let profile = query.timed("pyroscope_merge", move |_| {
            let mut merger = Merger::new();
            for (merged, index) in &parts {
                let mut part = self.select(&merged.profile)?.into_owned();
                pprof::select_type(&mut part, *index);
                if let [_] = parts.as_slice() {
                    return Ok(part);
                }
                merger.add(&part).map_err(|error| QueryError::Invalid(error.to_string()))?;
            }
            Ok(merger.finish().unwrap_or_default())
        });
        Ok(profile.await?)
    }
}

/// Returns two selections as a tree with two sides.
pub(super) async fn compare(query: &Arc<Query>, left: Stacks, right: Stacks) -> Result<CallTree, Status> {
    let (left_parts, right_parts) = (left.merged(query).await?, right.merged(query).await?);
    let tree = query.timed("pyroscope_diff", move |_| {
        let mut tree = FlameTree::new();
        left.add_to(&mut tree, &left_parts, Side::Main)?;
        right.add_to(&mut tree, &right_parts, Side::Base)?;
        Ok(CallTree::new(&tree))
    });
    Ok(tree.await?)
}

fn check_count(field: &str, ids: &[String]) -> Result<(), Status> {
    if ids.len() > MAX_IDS {
        return Err(Status::invalid_argument(format!(
            "{field}: {} ids, and at most {MAX_IDS} are allowed",
            ids.len()
        )));
    }
    Ok(())
}

fn check_hex(field: &str, ids: &[String], digits: usize) -> Result<(), Status> {
    check_count(field, ids)?;
    match ids.iter().find(|id| id.len() != digits || !id.bytes().all(|b| b.is_ascii_hexdigit())) {
        None => Ok(()),
        Some(id) => {
            let id: String = id.chars().take(64).collect();
            Err(Status::invalid_argument(format!("{field}: `{id}` has not {digits} hexadecimal digits")))
        }
    }
}

/// Parses the id of a profile: a ULID as Gannet writes it, or the same 128 bits as a UUID.
fn parse_id(text: &str) -> Result<Ulid, Status> {
    let uuid = || {
        let digits: String = text.chars().filter(|c| *c != '-').collect();
        u128::from_str_radix(&digits, 16).ok().filter(|_| digits.len() == 32).map(Ulid)
    };
    Ulid::from_string(text).ok().or_else(uuid).ok_or_else(|| {
        let text: String = text.chars().take(64).collect();
        Status::invalid_argument(format!("profile_id_selector: `{text}` is neither a UUID nor a ULID"))
    })
}

pub(super) async fn stacktraces(
    query: Arc<Query>,
    request: api::SelectMergeStacktracesRequest,
) -> Result<api::SelectMergeStacktracesResponse, Status> {
    let max_nodes = node_limit(request.max_nodes)?;
    let format = request.format();
    let stacks = Stacks::of_stacktraces(request)?;
    match format {
        ProfileFormat::Unspecified | ProfileFormat::Flamegraph => {
            let flamegraph = stacks.tree(&query).await?.flame_graph(max_nodes);
            Ok(api::SelectMergeStacktracesResponse { flamegraph: Some(flamegraph), pprof: None })
        }
        ProfileFormat::Pprof => {
            let profile = Some(stacks.profile(&query).await?);
            let pprof = Some(api::PprofProfile { profile });
            Ok(api::SelectMergeStacktracesResponse { flamegraph: None, pprof })
        }
        ProfileFormat::Tree | ProfileFormat::Dot => Err(unknown_format()),
    }
}

fn unknown_format() -> Status {
    Status::unimplemented("format: this server answers with a flame graph or pprof")
}

pub(super) async fn span_profile(
    query: Arc<Query>,
    request: api::SelectMergeSpanProfileRequest,
) -> Result<api::SelectMergeSpanProfileResponse, Status> {
    if matches!(request.format(), ProfileFormat::Tree | ProfileFormat::Dot | ProfileFormat::Pprof) {
        return Err(unknown_format());
    }
    let max_nodes = node_limit(request.max_nodes)?;
    let range = Range::required(request.start, request.end)?;
    let stacks = Stacks::new(&request.profile_type_id, &request.label_selector, range)?
        .of_spans(request.span_selector, Vec::new())?;
    let flamegraph = stacks.tree(&query).await?.flame_graph(max_nodes);
    Ok(api::SelectMergeSpanProfileResponse { flamegraph: Some(flamegraph) })
}

pub(super) async fn profile(
    query: Arc<Query>,
    request: api::SelectMergeProfileRequest,
) -> Result<Profile, Status> {
    let range = Range::required(request.start, request.end)?;
    // The profile is complete, whatever `max_nodes` says.
    Stacks::new(&request.profile_type_id, &request.label_selector, range)?
        .below(request.stack_trace_selector)?
        .of_profiles(&request.profile_id_selector)?
        .of_spans(Vec::new(), request.trace_id_selector)?
        .profile(&query)
        .await
}

pub(super) async fn diff(query: Arc<Query>, request: api::DiffRequest) -> Result<api::DiffResponse, Status> {
    let side = |name: &str, request: Option<api::SelectMergeStacktracesRequest>| {
        let request = request.ok_or_else(|| Status::invalid_argument(format!("{name}: is missing")))?;
        let named = |status: Status| Status::new(status.code(), format!("{name}: {}", status.message()));
        let max_nodes = node_limit(request.max_nodes).map_err(named)?;
        Ok::<_, Status>((Stacks::of_stacktraces(request).map_err(named)?, max_nodes))
    };
    let (left, right) = (side("left", request.left)?, side("right", request.right)?);
    let max_nodes = left.1.max(right.1);
    let flamegraph = compare(&query, left.0, right.0).await?.diff(max_nodes);
    Ok(api::DiffResponse { flamegraph: Some(flamegraph) })
}
