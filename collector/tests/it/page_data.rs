//! The parts of the HTTP API that only the page uses: heat maps and annotations.

use gannet_collector::Running;
use gannet_proto::ingest::Batch;
use rstest::rstest;
use serde_json::{Value, json};

use crate::{
    support::{Pusher, batch, get, labels, now_ms, start},
    triggers::{one, triggers},
};

async fn api(running: &Running, path: &str) -> Value {
    let answer = get(running.http_addr, &format!("/api/v1{path}")).await;
    assert_eq!(answer.status, 200, "{path}: {}", answer.text());
    answer.json()
}

/// Checks that rows by a label hold its sums, the largest row first, and that a series without the label has a row.
#[tokio::test]
async fn a_heat_map_by_label_has_a_row_for_each_value() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let (mut pusher, t) = (Pusher::open(running.grpc_addr).await, now_ms() - 60_000);
    let of_pod = |pod: &str, batch: Batch| {
        let pairs = [("service_name", "shop"), ("node", "n1"), ("pod", pod)];
        Batch { labels: labels(&pairs[..if pod.is_empty() { 2 } else { 3 }]), ..batch }
    };
    pusher.store(of_pod("a", batch("shop", t, &[("main", 3)]))).await;
    pusher.store(of_pod("b", batch("shop", t + 1, &[("main", 5)]))).await;
    pusher.store(of_pod("b", batch("shop", t + 2, &[("main", 4)]))).await;
    pusher.store(of_pod("b", batch("shop", t + 25_000, &[("main", 7)]))).await;
    pusher.store(of_pod("", batch("shop", t + 10_000, &[("main", 1)]))).await;
    let range = format!("from={t}&until={}", t + 30_000);
    assert_eq!(
        api(&running, &format!("/heatmap?{range}&step_ms=10000&type=samples/count&by=pod")).await,
        json!({
            "unit": "count", "sample_type": "samples/count", "from_ms": t, "step_ms": 10_000,
            "rows": [
                { "name": "b", "cells": [9, 0, 7] },
                { "name": "a", "cells": [3, 0, 0] },
                { "name": "", "cells": [0, 1, 0] },
            ],
        })
    );
    let selected = format!("/heatmap?{range}&step_ms=15000&type=samples/count&by=pod&query={{pod=\"b\"}}");
    assert_eq!(api(&running, &selected).await["rows"], json!([{ "name": "b", "cells": [9, 7] }]));
    running.shutdown().await;
}

#[tokio::test]
async fn values_of_a_label_beyond_the_limit_share_a_row() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let (mut pusher, t) = (Pusher::open(running.grpc_addr).await, now_ms() - 60_000);
    let batches: Vec<Batch> =
        (1..=45).map(|count| batch(&format!("s{count:02}"), t, &[("main", count)])).collect();
    pusher.store_all(&batches).await;
    let path = format!("/heatmap?from={t}&until={}&step_ms=10000&type=samples/count&by=service_name", t + 1);
    let map = api(&running, &path).await;
    let rows = map["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 40);
    assert_eq!(rows[0], json!({ "name": "s45", "cells": [45] }));
    assert_eq!(rows[39], json!({ "name": "[other]", "cells": [21] }));
    running.shutdown().await;
}

/// Checks that each profile is in the row of its value for each second, and counts once.
#[tokio::test]
async fn a_heat_map_by_value_counts_profiles() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let (mut pusher, t) = (Pusher::open(running.grpc_addr).await, now_ms() - 60_000);
    // 0.1, 2 and 2 samples a second; the last profile is of one second.
    pusher.store(batch("shop", t, &[("main", 1)])).await;
    pusher.store(batch("shop", t + 1, &[("main", 20)])).await;
    let second = prost_types::Duration { seconds: 1, nanos: 0 };
    pusher.store(Batch { duration: Some(second), ..batch("shop", t + 12_000, &[("main", 2)]) }).await;
    let range = format!("from={t}&until={}", t + 20_000);
    let map = api(&running, &format!("/heatmap?{range}&step_ms=10000&type=samples/count")).await;
    let rows = map["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 20);
    let close = |value: &Value, wanted: f64| (value.as_f64().unwrap() - wanted).abs() < 1e-9;
    assert!(close(&rows[0]["low"], 0.0) && close(&rows[19]["high"], 2.0), "{map}");
    for (at, row) in rows.iter().enumerate() {
        let wanted = if at == 1 {
            json!([1, 0])
        } else if at == 19 {
            json!([1, 1])
        } else {
            json!([0, 0])
        };
        assert_eq!(row["cells"], wanted, "row {at}");
    }
    // Values that differ by a tenth have all rows between them.
    pusher.store(batch("steady", t, &[("main", 1000)])).await;
    pusher.store(batch("steady", t + 1, &[("main", 1100)])).await;
    let steady =
        format!("/heatmap?{range}&step_ms=20000&type=samples/count&query={{service_name=\"steady\"}}");
    let map = api(&running, &steady).await;
    let rows = map["rows"].as_array().unwrap();
    assert!(close(&rows[0]["low"], 100.0) && close(&rows[19]["high"], 110.0), "{map}");
    assert_eq!((&rows[0]["cells"], &rows[19]["cells"]), (&json!([1]), &json!([1])));
    let empty = api(&running, "/heatmap?from=1000&until=2000&step_ms=1000&type=samples/count").await;
    assert_eq!(empty["rows"], json!([]));
    running.shutdown().await;
}

/// Checks that profiles of one rule that touch in time are one capture, and that profiles of continuous rules or without a
/// rule are none.
#[tokio::test]
async fn annotations_have_captures_and_changes_of_rules() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let before = now_ms();
    triggers(&running).await.set_triggers(one("hot")).await.unwrap();
    let (mut pusher, t) = (Pusher::open(running.grpc_addr).await, now_ms() - 200_000);
    let captured = |service: &str, at: u64, reason: &str| Batch {
        rule_id: "hot".into(),
        reason: reason.into(),
        ..batch(service, at, &[("main", 1)])
    };
    pusher.store(batch("shop", t, &[("main", 1)])).await;
    pusher.store(Batch { rule_id: String::new(), ..captured("shop", t, "exec") }).await;
    pusher.store(captured("shop", t + 10_000, "pressure; cpu some 41 %")).await;
    pusher.store(captured("cart", t + 1_000, "pre-trigger")).await;
    pusher.store(captured("shop", t + 20_000, "pressure; cpu some 44 %")).await;
    pusher.store(captured("shop", t + 120_000, "exec")).await;
    let range = format!("from={t}&until=now");
    let answer = api(&running, &format!("/annotations?{range}")).await;
    assert_eq!(
        answer["captures"],
        json!([
            {
                "rule_id": "hot", "start_ms": t + 1_000, "end_ms": t + 30_000, "reason": "pressure; cpu some 41 %",
                "profiles": 3, "services": ["cart", "shop"], "nodes": ["n1"],
            },
            {
                "rule_id": "hot", "start_ms": t + 120_000, "end_ms": t + 130_000, "reason": "exec",
                "profiles": 1, "services": ["shop"], "nodes": ["n1"],
            },
        ])
    );
    let changes = answer["changes"].as_array().unwrap();
    assert_eq!(changes.len(), 1, "{answer}");
    let mut change = changes[0].clone();
    assert!(change["at_ms"].as_u64().unwrap() >= before, "{change}");
    change.as_object_mut().unwrap().remove("at_ms");
    assert_eq!(
        change,
        json!({
            "action": "set", "who": "anonymous", "scope": "default", "revision": 1, "added": ["hot"], "removed": [],
            "changed": [], "note": "",
        })
    );
    assert_eq!((&answer["older_changes"], &answer["older_captures"]), (&json!(0), &json!(0)));
    let cart = api(&running, &format!("/annotations?{range}&query={{service_name=\"cart\"}}")).await;
    assert_eq!(cart["captures"].as_array().unwrap().len(), 1);
    assert_eq!(cart["captures"][0]["services"], json!(["cart"]));
    let past = api(&running, "/annotations?from=1000&until=2000").await;
    assert_eq!((&past["captures"], &past["changes"]), (&json!([]), &json!([])));
    running.shutdown().await;
}

#[tokio::test]
async fn annotations_leave_out_and_count_the_oldest_captures() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let (mut pusher, t) = (Pusher::open(running.grpc_addr).await, now_ms() - 20_000_000);
    let batches: Vec<Batch> = (0..503)
        .map(|at| Batch { reason: "exec".into(), ..batch("shop", t + at * 30_000, &[("main", 1)]) })
        .collect();
    pusher.store_all(&batches).await;
    let answer = api(&running, &format!("/annotations?from={t}&until=now")).await;
    let captures = answer["captures"].as_array().unwrap();
    assert_eq!((captures.len(), &answer["older_captures"]), (500, &json!(3)));
    assert_eq!(captures[0]["start_ms"], t + 90_000);
    running.shutdown().await;
}

#[rstest]
#[case("/heatmap?step_ms=1000", "type")]
#[case("/heatmap?type=samples/count", "step_ms")]
#[case("/heatmap?type=samples/count&step_ms=0", "step_ms")]
#[case("/heatmap?type=samples/count&step_ms=x", "step_ms")]
#[case("/heatmap?type=samples/count&step_ms=1000&from=now-1h&until=now", "longer step")]
#[case("/heatmap?type=samples/count&step_ms=1000&row=pod", "`row`")]
#[case("/annotations?type=x", "`type`")]
#[case("/annotations?from=now&until=now-5m", "range is empty")]
#[tokio::test]
async fn wrong_requests_name_the_parameter(#[case] path: &str, #[case] named: &str) {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let answer = get(running.http_addr, &format!("/api/v1{path}")).await;
    assert_eq!(answer.status, 400, "{}", answer.text());
    let error = answer.json()["error"].as_str().unwrap().to_owned();
    assert!(error.contains(named), "{error}");
    running.shutdown().await;
}
