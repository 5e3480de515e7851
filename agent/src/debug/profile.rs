//! Profiles on request: `/debug/profile` and the flame graph of the last windows.

use std::time::{Duration, SystemTime};

use axum::{
    extract::{Query, State},
    http::{StatusCode, header},
    response::{IntoResponse as _, Response},
};
use gannet_proto::{
    control::{Match, capture},
    pprof,
};
use serde::Deserialize;

use super::{Shared, ViewQuery, failed};
use crate::{
    cgroup::find_container,
    engine::{EngineError, ManualCapture},
    node::Node,
    output::{Details, Format, OutputError, render},
    pods::MAX_LABEL_WAIT,
    rules::CaptureError,
};

/// `/debug/profile` requests that run at one time.
pub(super) const MAX_PROFILES: usize = 4;
/// Time for symbolizing the last window of a profile: the wait for names of pods, and some more.
const WINDOW_TIMEOUT: Duration = Duration::from_secs(17);
const _: () = assert!(WINDOW_TIMEOUT.as_secs() > MAX_LABEL_WAIT.as_secs());
/// Time for unwinding and symbolizing the last window of a capture.
const CAPTURE_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest time that `/debug/profile` samples.
const MAX_SECONDS: u64 = 600;

/// Draws a flame graph of the last windows.
pub(super) async fn flame(State(shared): State<Shared>, Query(query): Query<ViewQuery>) -> Response {
    let merged = match shared.node.recent.merged(None, query.pid) {
        Ok(merged) => merged,
        Err(error) => return failed(&error),
    };
    let title = format!("{}: the last windows", shared.node.config.node);
    let details = Details {
        title,
        ledger: shared.node.ledger.snapshot(),
        interpreter_frames: false,
        hide_error_frames: false,
    };
    match merged.map_or(Err(OutputError::Empty), |profile| render(&profile, Format::Svg, &details)) {
        Ok(bytes) => (
            [
                (header::CONTENT_TYPE, "image/svg+xml"),
                // The picture contains its own script and style and may do nothing else.
                (
                    header::CONTENT_SECURITY_POLICY,
                    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'",
                ),
            ],
            bytes,
        )
            .into_response(),
        Err(OutputError::Empty) => {
            (StatusCode::NOT_FOUND, "no samples in the last windows; does a rule match a running process?\n")
                .into_response()
        }
        Err(error) => failed(&error),
    }
}

/// Parameters of `/debug/profile`.
#[derive(Deserialize)]
pub(super) struct ProfileQuery {
    pid: Option<u32>,
    comm: Option<String>,
    container: Option<String>,
    seconds: Option<u64>,
    hz: Option<u32>,
    kind: Option<String>,
}

/// Starts a capture of the processes that the query names and returns its profile. If it names none, collects the samples
/// of the rules in force.
pub(super) async fn profile(State(shared): State<Shared>, Query(query): Query<ProfileQuery>) -> Response {
    let seconds = query.seconds.unwrap_or(10);
    if !(1..=MAX_SECONDS).contains(&seconds) {
        return (StatusCode::BAD_REQUEST, format!("seconds={seconds}: give 1 to {MAX_SECONDS}\n"))
            .into_response();
    }
    let Ok(_permit) = shared.profiles.try_acquire() else {
        return (
            StatusCode::TOO_MANY_REQUESTS,
            format!("{MAX_PROFILES} profiles are in progress; try again\n"),
        )
            .into_response();
    };
    match manual(&query, Duration::from_secs(seconds)) {
        Ok(Some(manual)) => return capture(&shared.node, manual).await,
        Ok(None) => {}
        Err(error) => return (StatusCode::BAD_REQUEST, error).into_response(),
    }
    let node = &shared.node;
    // Samples from before the request do not belong to it.
    if let Err(error) = node.engine.flush().await {
        return failed(&error);
    }
    let begun = SystemTime::now();
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    let next = node.recent.next();
    if let Err(error) = node.engine.flush().await {
        return failed(&error);
    }
    // The last window is not symbolized yet. Without samples there is none to wait for.
    let _ = tokio::time::timeout(WINDOW_TIMEOUT, next).await;
    // A window has the time of its start, which is just before the request.
    let since = begun.checked_sub(Duration::from_millis(50)).unwrap_or(begun);
    match node.recent.merged(Some(since), query.pid) {
        Ok(Some(profile)) => attached(&profile),
        Ok(None) => (
            StatusCode::NOT_FOUND,
            "no samples: no rule matches the process, or it used no CPU; /debug/processes shows which\n",
        )
            .into_response(),
        Err(error) => failed(&error),
    }
}

fn attached(profile: &gannet_proto::profiles::Profile) -> Response {
    (
        [
            (header::CONTENT_TYPE, "application/octet-stream"),
            (header::CONTENT_DISPOSITION, "attachment; filename=\"profile.pb.gz\""),
        ],
        pprof::encode(profile),
    )
        .into_response()
}

/// Returns the capture that a query asks for; none if it names no processes.
fn manual(query: &ProfileQuery, duration: Duration) -> Result<Option<ManualCapture>, String> {
    let ProfileQuery { pid, comm, container, seconds: _, hz, kind } = query;
    if pid.is_none() && comm.is_none() && container.is_none() {
        return Ok(None);
    }
    let cgroup = match container {
        None => Vec::new(),
        Some(id) => {
            let path = find_container(id).ok_or_else(|| {
                format!(
                    "container={id}: no process of this container runs on the node; give the start of its id\n"
                )
            })?;
            vec![format!("{path}/*"), path]
        }
    };
    let kind = match kind.as_deref() {
        None | Some("on_cpu") => capture::Kind::OnCpu,
        Some("off_cpu") => capture::Kind::OffCpu,
        Some(other) => return Err(format!("kind={other}: give on_cpu or off_cpu\n")),
    };
    Ok(Some(ManualCapture {
        matches: Match {
            pids: pid.iter().copied().collect(),
            comm: comm.iter().cloned().collect(),
            cgroup,
            ..Match::default()
        },
        hz: hz.unwrap_or(99),
        kinds: vec![kind],
        duration,
        evidence: "requested on the node's debug page".into(),
    }))
}

/// Runs a capture to its end.
async fn capture(node: &Node, manual: ManualCapture) -> Response {
    let running = match node.engine.capture_now(manual).await {
        Ok(running) => running,
        Err(error @ CaptureError::Invalid(_)) => {
            return (StatusCode::BAD_REQUEST, format!("{error}\n")).into_response();
        }
        Err(error) => return (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")).into_response(),
    };
    let collecting = node.recent.collect(running.capture);
    let Ok(last) = running.over.await else { return failed(&EngineError::Ended) };
    match tokio::time::timeout(CAPTURE_TIMEOUT, collecting.finish(last)).await {
        // This page asks for one kind.
        Ok(Ok((profiles, ..))) => match profiles.first() {
            Some((_, profile)) => attached(profile),
            None => (
                StatusCode::NOT_FOUND,
                "no samples: no matching process runs, it used no CPU, or this node denies it\n",
            )
                .into_response(),
        },
        Ok(Err(error)) => failed(&error),
        Err(_) => failed(&"its frames were not symbolized in time"),
    }
}
