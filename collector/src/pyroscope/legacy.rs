//! The endpoints of Pyroscope that are older than its query service: `/pyroscope/render` and `/pyroscope/render-diff`.

use std::{collections::HashMap, sync::Arc};

use axum::{
    extract::{Query as UrlQuery, State},
    http::HeaderMap,
    response::Response,
};
use gannet_proto::foreign::pyroscope_querier::Level;
use serde_json::{Value, json};
use tonic::Status;

use super::{
    flamegraph::node_limit,
    metadata::check_names,
    profiles::{Stacks, compare},
    scope::{Range, parse_selector},
    series::{Grid, Points, sums},
    wire,
};
use crate::{profile_type::ProfileType, query::Query, time};

/// Points of a timeline, and the shortest step, in seconds.
const TIMELINE_POINTS: u64 = 1500;
const MIN_STEP_S: u64 = 15;

type Params = UrlQuery<HashMap<String, String>>;

pub(super) async fn render(
    State(query): State<Arc<Query>>,
    headers: HeaderMap,
    UrlQuery(params): Params,
) -> Response {
    respond(&headers, single(&query, &params).await)
}

pub(super) async fn render_diff(
    State(query): State<Arc<Query>>,
    headers: HeaderMap,
    UrlQuery(params): Params,
) -> Response {
    respond(&headers, double(&query, &params).await)
}

fn respond(headers: &HeaderMap, answer: Result<Value, Status>) -> Response {
    match answer {
        Ok(answer) => wire::json_response(headers, answer.to_string().into_bytes()),
        Err(status) => wire::error_response(&status),
    }
}

/// Returns a parameter, or an empty text if it is missing.
fn text<'a>(params: &'a HashMap<String, String>, name: &str) -> &'a str {
    params.get(name).map_or("", String::as_str)
}

/// Splits `process_cpu:cpu:nanoseconds:cpu:nanoseconds{service_name="a"}` into the profile type and the conditions.
fn split_query<'a>(name: &str, query: &'a str) -> Result<(&'a str, &'a str), Status> {
    let (profile_type, selector) = query.split_at(query.find('{').unwrap_or(query.len()));
    if profile_type.trim().is_empty() {
        return Err(Status::invalid_argument(format!(
            "{name}: write a profile type and conditions, as in \
             process_cpu:cpu:nanoseconds:cpu:nanoseconds{{service_name=\"checkout\"}}"
        )));
    }
    Ok((profile_type.trim(), selector))
}

fn range(params: &HashMap<String, String>, from: &str, until: &str) -> Result<Range, Status> {
    let now = time::now_ms();
    let at = |name: &str, default: &str| {
        let text = Some(text(params, name)).filter(|text| !text.is_empty()).unwrap_or(default);
        parse_time(text, now).map_err(|error| Status::invalid_argument(format!("{name}: {error}")))
    };
    let (start, end) = (at(from, "now-1h")?, at(until, "now")?);
    Range::required(start as i64, end as i64)
}

/// Parses a time: seconds since 1970, or by the number of digits milliseconds, microseconds or nanoseconds; or `now-1h`.
pub(super) fn parse_time(text: &str, now_ms: u64) -> Result<u64, String> {
    match (text.parse::<u64>(), text.len()) {
        (Ok(s), ..=10) => Ok(s * 1000),
        (Ok(us), 16) => Ok(us / 1000),
        (Ok(ns), 19) => Ok(ns / 1_000_000),
        (Ok(ms), 13) => Ok(ms),
        (Ok(_), _) => Err(format!("`{text}` has not the digits of seconds, ms, us or ns since 1970")),
        (Err(_), _) => time::parse(text, now_ms),
    }
}

fn max_nodes(params: &HashMap<String, String>) -> Result<usize, Status> {
    let given = ["max-nodes", "maxNodes"].into_iter().map(|name| text(params, name));
    match given.into_iter().find(|text| !text.is_empty()) {
        None => node_limit(None),
        Some(text) => node_limit(Some(text.parse().map_err(|_| {
            Status::invalid_argument(format!("max-nodes: `{text}` is not a number that fits"))
        })?)),
    }
}

fn stacks(
    params: &HashMap<String, String>,
    [query, from, until]: [&str; 3],
) -> Result<(Stacks, Range), Status> {
    let (profile_type, selector) = split_query(query, text(params, query))?;
    let range = range(params, from, until)?;
    Ok((Stacks::new(profile_type, selector, range)?, range))
}

async fn single(query: &Arc<Query>, params: &HashMap<String, String>) -> Result<Value, Status> {
    if !matches!(text(params, "format"), "" | "json") {
        return Err(Status::unimplemented("format: this server answers with json"));
    }
    let (profile_type, selector) = split_query("query", text(params, "query"))?;
    let selector = parse_selector("query", selector)?;
    let kind = ProfileType::parse(profile_type)?;
    let (stacks, range) = stacks(params, ["query", "from", "until"])?;
    let max_nodes = max_nodes(params)?;
    let group_by: Vec<String> =
        Some(text(params, "groupBy").to_owned()).filter(|name| !name.is_empty()).into_iter().collect();
    check_names("groupBy", &group_by)?;
    let step_s = ((range.end_ms - range.start_ms) / 1000 / TIMELINE_POINTS).max(MIN_STEP_S);
    let grid = Grid::new(range, step_s as f64)?;
    let wanted = kind.clone();
    let points = |group_by: Vec<String>| {
        let (selector, wanted) = (selector.clone(), wanted.clone());
        query.timed("pyroscope_select_series", move |q| sums(q, selector, wanted, grid, &group_by))
    };
    let all = points(Vec::new()).await?.into_values().next().unwrap_or_default();
    let groups = if group_by.is_empty() {
        Value::Null
    } else {
        let groups = points(group_by).await?.into_iter();
        let named = groups.map(|(mut labels, points)| {
            (labels.pop().unwrap_or_default().1, timeline(&points, range, step_s))
        });
        Value::Object(named.collect())
    };
    let graph = stacks.tree(query).await?.flame_graph(max_nodes);
    Ok(json!({
        "version": 1,
        "flamebearer": {
            "names": graph.names, "levels": levels(graph.levels), "numTicks": graph.total, "maxSelf": graph.max_self,
        },
        "metadata": metadata("single", &kind),
        "timeline": timeline(&all, range, step_s),
        "groups": groups,
        "heatmap": null,
    }))
}

async fn double(query: &Arc<Query>, params: &HashMap<String, String>) -> Result<Value, Status> {
    let (left, _) = stacks(params, ["leftQuery", "leftFrom", "leftUntil"])?;
    let (right, _) = stacks(params, ["rightQuery", "rightFrom", "rightUntil"])?;
    if left.wanted != right.wanted {
        return Err(Status::invalid_argument(format!(
            "leftQuery has the profile type {} and rightQuery {}: compare profiles of one type",
            left.wanted, right.wanted
        )));
    }
    let (max_nodes, kind) = (max_nodes(params)?, left.wanted.clone());
    let graph = compare(query, left, right).await?.diff(max_nodes);
    Ok(json!({
        "version": 1,
        "flamebearer": {
            "names": graph.names, "levels": levels(graph.levels), "numTicks": graph.total, "maxSelf": graph.max_self,
        },
        "metadata": metadata("double", &kind),
        "timeline": null,
        "groups": null,
        "heatmap": null,
        "leftTicks": graph.left_ticks,
        "rightTicks": graph.right_ticks,
    }))
}

fn levels(levels: Vec<Level>) -> Vec<Vec<i64>> {
    levels.into_iter().map(|level| level.values).collect()
}

/// Returns how a viewer shows the values.
fn metadata(format: &str, kind: &ProfileType) -> Value {
    let (units, rate) = match kind.sample_type.as_str() {
        "cpu" => ("samples", 1_000_000_000),
        "samples" | "goroutine" => ("objects", 100),
        name if name.ends_with("_objects") => ("objects", 100),
        _ => (kind.sample_unit.as_str(), 100),
    };
    json!({ "format": format, "spyName": "", "sampleRate": rate, "units": units, "name": kind.sample_type })
}

/// Returns values in steps from the start of the range on. A step without a profile is 0.
fn timeline(points: &Points, range: Range, step_s: u64) -> Value {
    let steps = (range.end_ms - range.start_ms) / (step_s * 1000) + 1;
    let at = |step: u64| points.get(&(range.start_ms + step * step_s * 1000)).copied().unwrap_or(0);
    json!({
        "startTime": range.start_ms / 1000,
        "samples": (0..steps).map(at).collect::<Vec<i64>>(),
        "durationDelta": step_s,
        "watermarks": null,
    })
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("1700000000", Some(1_700_000_000_000))]
    #[case("1700000000123", Some(1_700_000_000_123))]
    #[case("1700000000123456", Some(1_700_000_000_123))]
    #[case("1700000000123456789", Some(1_700_000_000_123))]
    #[case("now-1h", Some(1_400_000))]
    #[case("99999999999999999", None)]
    #[case("yesterday", None)]
    fn times_have_the_unit_of_their_digits(#[case] text: &str, #[case] want: Option<u64>) {
        assert_eq!(parse_time(text, 5_000_000).ok(), want);
    }
}
