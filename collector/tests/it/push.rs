//! Profiles that clients of Pyroscope push.

use gannet_collector::{Collector, Running};
use gannet_proto::{
    foreign::{
        pyroscope::{PushRequest, RawProfileSeries, RawSample},
        pyroscope_types::LabelPair,
    },
    pprof::{MAX_STACK_FRAMES, Profile, encode},
};
use prost::Message as _;
use rstest::rstest;
use serde_json::{Value, json};

use crate::support::{Answer, CPU, config_with, get, now_ms, post, profile, start};

const PUSH: &str = "/push.v1.PusherService/Push";
const PROTO: (&str, &str) = ("content-type", "application/proto");

/// Returns a profile that starts now.
fn fresh(types: [(&str, &str); 2], stacks: &[(&str, i64)]) -> Profile {
    Profile { time_nanos: now_ms() as i64 * 1_000_000, ..profile(types, stacks) }
}

fn series(labels: &[(&str, &str)], profiles: &[(&str, Vec<u8>)]) -> RawProfileSeries {
    let pair = |(name, value): &(&str, &str)| LabelPair { name: (*name).into(), value: (*value).into() };
    let sample = |(id, raw): &(&str, Vec<u8>)| RawSample { raw_profile: raw.clone(), id: (*id).into() };
    RawProfileSeries {
        labels: labels.iter().map(pair).collect(),
        samples: profiles.iter().map(sample).collect(),
    }
}

async fn push(running: &Running, series: Vec<RawProfileSeries>) -> Answer {
    let message = PushRequest { series }.encode_to_vec();
    post(running.http_addr, PUSH, &[PROTO, ("user-agent", "pyroscope-rs/1.0 reqwest")], &message).await
}

async fn stored(running: &Running) -> Vec<Value> {
    let list = get(running.http_addr, "/api/v1/profiles?from=now-1h").await.json();
    list["profiles"].as_array().unwrap().clone()
}

async fn types(running: &Running) -> Vec<String> {
    let path = "/querier.v1.QuerierService/ProfileTypes";
    let types = post(running.http_addr, path, &[("content-type", "application/json")], b"{}").await.json();
    let types = types["profileTypes"].as_array().into_iter().flatten();
    types.map(|kind| kind["ID"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn a_pushed_profile_is_stored_once_and_shown() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let id = "4db10b29-e8c1-458d-b917-c3df6377d63d";
    let pprof = encode(&fresh(CPU, &[("main;work", 3)]));
    let labels = [
        ("__name__", "process_cpu"),
        ("service_name", "shop"),
        ("otel.scope.name", "x"),
        ("__session_id__", "1"),
    ];
    for _ in 0..2 {
        let answer = push(&running, vec![series(&labels, &[(id, pprof.clone())])]).await;
        assert_eq!((answer.status, answer.body.len()), (200, 0), "{}", answer.text());
    }
    let all = stored(&running).await;
    assert_eq!(all.len(), 1, "the second push has the same id");
    assert_eq!(all[0]["labels"], json!({ "otel_scope_name": "x", "service_name": "shop" }));
    assert_eq!((&all[0]["samples"], &all[0]["reason"]), (&json!(3), &json!("pushed by pyroscope-rs/1.0")));
    assert_eq!(all[0]["duration_ms"], 10_000);
    // Gannet's graph and Grafana's show it.
    let graph = get(running.http_addr, "/api/v1/flamegraph?query={service_name=\"shop\"}").await.json();
    assert_eq!(graph["total"], 30_000_000);
    assert_eq!(types(&running).await[0], "process_cpu:cpu:nanoseconds:cpu:nanoseconds");
    // The same in JSON, and compressed twice: as a message and as a profile.
    let message = json!({ "series": [{
        "labels": [{ "name": "service_name", "value": "json" }],
        "samples": [{ "rawProfile": base64(&pprof), "ID": "" }],
    }] });
    let json = ("content-type", "application/json");
    let answer = post(running.http_addr, PUSH, &[json], message.to_string().as_bytes()).await;
    assert_eq!((answer.status, answer.text().as_str()), (200, "{}"));
    let message = PushRequest { series: vec![series(&[], &[("", pprof)])] }.encode_to_vec();
    let gzip = encode_gzip(&message);
    let answer = post(running.http_addr, PUSH, &[PROTO, ("content-encoding", "gzip")], &gzip).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let services = get(running.http_addr, "/api/v1/labels/service_name/values").await.json();
    assert_eq!(services["values"], json!(["json", "shop", "unknown_service"]));
    running.shutdown().await;
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let group = |three: &[u8]| {
        let bits = (0..3).fold(0_u32, |bits, i| bits << 8 | u32::from(three.get(i).copied().unwrap_or(0)));
        let digit = |i: usize| {
            if i <= three.len() { DIGITS[(bits >> (18 - 6 * i) & 63) as usize] as char } else { '=' }
        };
        (0..4).map(digit).collect::<String>()
    };
    bytes.chunks(3).map(group).collect()
}

fn encode_gzip(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write as _;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Checks profiles whose sample types are equal: their names keep them apart.
#[tokio::test]
async fn block_and_mutex_profiles_stay_apart() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let types_of = [("contentions", "count"), ("delay", "nanoseconds")];
    let push_as = async |name: &str, n: i64| {
        let labels = [("__name__", name), ("service_name", "shop")];
        let pprof = encode(&fresh(types_of, &[("main;lock", n)]));
        assert_eq!(push(&running, vec![series(&labels, &[("", pprof)])]).await.status, 200);
    };
    push_as("godeltaprof_block", 3).await;
    push_as("mutex", 5).await;
    let found = types(&running).await;
    assert_eq!(
        found,
        ["block", "mutex"]
            .map(|name| ["contentions:count", "delay:nanoseconds"]
                .map(|kind| format!("{name}:{kind}:contentions:count")))
            .concat()
    );
    for (kind, total) in [(&found[0], "3"), (&found[2], "5")] {
        let request = json!({ "profileTypeID": kind, "labelSelector": "{}", "start": 1, "end": now_ms() });
        let path = "/querier.v1.QuerierService/SelectMergeStacktraces";
        let json = ("content-type", "application/json");
        let graph = post(running.http_addr, path, &[json], request.to_string().as_bytes()).await.json();
        assert_eq!(graph["flamegraph"]["total"], total, "{kind}");
    }
    running.shutdown().await;
}

/// Checks that the others of a message are stored if one is damaged.
#[tokio::test]
async fn a_damaged_profile_is_named_and_the_others_stay() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let good = encode(&fresh(CPU, &[("main;work", 3)]));
    let old = encode(&Profile { time_nanos: 1_000_000_000_000_000_000, ..fresh(CPU, &[("main", 1)]) });
    let of = |id: &'static str, raw: Vec<u8>| series(&[("service_name", id)], &[(id, raw)]);
    let mut no_types = fresh(CPU, &[("main", 1)]);
    no_types.sample_type.clear();
    for (id, raw, says) in [
        ("cut", good[..good.len() / 2].to_vec(), "cut short"),
        ("text", b"\xff\xff\xff".to_vec(), "not a pprof profile"),
        ("old", old, "keeps profiles for"),
        ("types", encode(&no_types), "no sample types"),
        ("bomb", encode_gzip(&vec![0; 128 << 20]), "larger than"),
    ] {
        let answer = push(&running, vec![of(id, raw), of("good", good.clone())]).await;
        let message = answer.json()["message"].as_str().unwrap().to_owned();
        assert_eq!((answer.status, &answer.json()["code"]), (400, &json!("invalid_argument")), "{message}");
        assert!(
            message.starts_with(&format!("series[0], profile `{id}`: ")) && message.contains(says),
            "{message}"
        );
    }
    assert_eq!(stored(&running).await.len(), 5);
    let labels: Vec<(String, String)> = (0..40).map(|i| (format!("l{i}"), "x".to_owned())).collect();
    let labels: Vec<(&str, &str)> =
        labels.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let answer = push(&running, vec![series(&labels, &[("", good.clone())])]).await;
    assert!(answer.status == 400 && answer.text().contains("at most 30"), "{}", answer.text());
    for (message, says) in [
        (vec![], "has no profile"),
        (vec![series(&[], &[])], "has no profile"),
        (vec![series(&[], &vec![("", good.clone()); 257])], "at most 256"),
    ] {
        let answer = push(&running, message).await;
        assert!(answer.status == 400 && answer.text().contains(says), "{}", answer.text());
    }
    let answer = post(running.http_addr, PUSH, &[PROTO], &vec![0; 10 << 20]).await;
    assert_eq!((answer.status, answer.headers["retry-after"].as_str()), (429, "1"));
    running.shutdown().await;
}

#[tokio::test]
async fn an_empty_profile_is_accepted_and_not_stored() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let empty = encode(&fresh(CPU, &[]));
    let deep = vec!["f"; MAX_STACK_FRAMES + 9].join(";");
    let deep = encode(&fresh(CPU, &[(&deep, 2)]));
    let answer = push(&running, vec![series(&[], &[("", empty), ("", deep)])]).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(stored(&running).await.len(), 1, "the deep stack is cut at the leaf");
    running.shutdown().await;
}

fn form(parts: &[(&str, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (name, content) in parts {
        let head = format!(
            "--BOUND\r\nContent-Disposition: form-data; name=\"{name}\"; filename=\"{name}\"\r\n\
             Content-Type: application/octet-stream\r\n\r\n"
        );
        body.extend_from_slice(head.as_bytes());
        body.extend_from_slice(content);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(b"--BOUND--\r\n");
    body
}

#[tokio::test]
async fn the_old_endpoint_takes_bodies_forms_and_lines() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let pprof = encode(&Profile { time_nanos: 0, ..profile(CPU, &[("main;work", 3)]) });
    let multipart = ("content-type", "multipart/form-data; boundary=BOUND");
    let config = br#"{"delay":{"display-name":"block_duration"}}"#;
    let locks = encode(&fresh([("contentions", "count"), ("delay", "nanoseconds")], &[("main;lock", 1)]));
    let seconds = now_ms() / 1000 - 60;
    let query = |app: &str, more: &str| {
        format!(
            "/ingest?name={app}{{region=eu,otel.scope.name=a/b}}&from={seconds}&until={}&{more}",
            seconds + 10
        )
    };
    for (path, headers, body) in [
        (query("body", "format=pprof&spyName=nodespy"), vec![], pprof.clone()),
        (format!("/pyroscope{}", query("form", "")), vec![multipart], form(&[("profile", &pprof)])),
        (
            query("locks", "spyName=gospy"),
            vec![multipart],
            form(&[("profile", &locks), ("sample_type_config", config)]),
        ),
        (query("folded", "format=folded&sampleRate=10"), vec![], b"main;work 3\n".to_vec()),
    ] {
        let answer = post(running.http_addr, &path, &headers, &body).await;
        assert_eq!(answer.status, 200, "{path}: {}", answer.text());
    }
    let mut all = stored(&running).await;
    all.sort_by_key(|profile| profile["labels"]["service_name"].as_str().unwrap().to_owned());
    let reasons: Vec<&str> = all.iter().map(|profile| profile["reason"].as_str().unwrap()).collect();
    assert_eq!(reasons, ["pushed by nodespy", "pushed", "pushed", "pushed by gospy"]);
    assert_eq!(all[0]["labels"], json!({ "otel_scope_name": "a/b", "region": "eu", "service_name": "body" }));
    assert_eq!((&all[0]["start_ms"], &all[1]["duration_ms"]), (&json!(seconds * 1000), &json!(10_000)));
    assert_eq!(all[3]["labels"]["profile_name"], "block");
    let graph = get(running.http_addr, "/api/v1/flamegraph?query={service_name=\"folded\"}").await.json();
    assert_eq!(graph["total"], 300_000_000);
    running.shutdown().await;
}

#[rstest]
#[case("/ingest", "", b"", "name")]
#[case("/ingest?name=a{b", "", b"", "name")]
#[case("/ingest?name=a&format=jfr", "", b"", "folded or lines")]
#[case("/ingest?name=a&format=trie", "", b"", "`trie`")]
#[case("/ingest?name=a&format=folded&sampleRate=0", "", b"", "sampleRate")]
#[case("/ingest?name=a&format=folded&from=soon", "", b"", "from")]
#[case("/ingest?name=a&format=folded", "", b"main", "line 1")]
#[case("/ingest?name=a&format=folded", "", b"\xff 1", "UTF-8")]
#[case("/ingest?name=a&format=pprof", "", b"x", "not a pprof")]
#[case("/ingest?name=a", "multipart/form-data; boundary=BOUND", b"damaged", "form is damaged")]
#[case("/ingest?name=a", "multipart/form-data", b"", "form is damaged")]
#[case(
    "/ingest?name=a",
    "multipart/form-data; boundary=B",
    b"--B\r\nContent-Disposition: form-data; name=\"x\"\r\n\r\n\r\n--B--\r\n",
    "profile"
)]
#[case(
    "/ingest?name=a",
    "multipart/form-data; boundary=B",
    b"--B\r\nContent-Disposition: form-data; name=\"prev_profile\"\r\n\r\nx\r\n--B--\r\n",
    "prev_profile"
)]
#[tokio::test]
async fn a_bad_ingest_gets_a_reason(
    #[case] path: &str,
    #[case] kind: &str,
    #[case] body: &[u8],
    #[case] says: &str,
) {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let answer = post(running.http_addr, path, &[("content-type", kind)], body).await;
    assert_eq!(answer.status, 400, "{}", answer.text());
    assert!(answer.json()["message"].as_str().unwrap().contains(says), "{}", answer.text());
    running.shutdown().await;
}

/// Checks that a page in a browser cannot push to a collector on the user's machine, and that the loopback listener takes
/// nothing.
#[tokio::test]
async fn browsers_and_the_loopback_listener_cannot_push() {
    let dir = tempfile::tempdir().unwrap();
    let running = Collector::start(config_with(dir.path(), |config| {
        config.server.debug_listen = Some(([127, 0, 0, 1], 0).into());
    }))
    .await
    .unwrap();
    let path = "/ingest?name=a&format=folded";
    for header in [("origin", "http://evil.example"), ("sec-fetch-site", "cross-site")] {
        let answer = post(running.http_addr, path, &[("content-type", "text/plain"), header], b"a 1").await;
        assert_eq!((answer.status, &answer.json()["code"]), (403, &json!("permission_denied")));
    }
    let debug = running.debug_addr.unwrap();
    assert_eq!(post(debug, path, &[], b"a 1").await.status, 404);
    assert_eq!(post(debug, PUSH, &[PROTO], b"").await.status, 501);
    assert_eq!(stored(&running).await.len(), 0);
    // Node's fetch sends this one.
    let node = [("sec-fetch-mode", "cors")];
    assert_eq!(post(running.http_addr, path, &node, b"a 1").await.status, 200);
    running.shutdown().await;
}
