use gannet_collector::Running;
use gannet_proto::{
    control::{SetTriggersRequest, node_rollout::State},
    ingest::Batch,
    pprof::{GUESSED_FROM, check, decode, encode},
    profiles::Label,
};
use rstest::rstest;
use serde_json::{Value, json};

use crate::{
    fleet::Agent,
    support::{CPU, Pusher, Stacks, batch, get, now_ms, profile, start},
    triggers::{parse, triggers},
};

async fn api(running: &Running, path: &str) -> Value {
    let answer = get(running.http_addr, &format!("/api/v1{path}")).await;
    assert_eq!(answer.status, 200, "{path}: {}", answer.text());
    assert_eq!(answer.headers["content-type"], "application/json", "{path}");
    answer.json()
}

#[tokio::test]
async fn the_api_answers_in_its_shape() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut pusher = Pusher::open(running.grpc_addr).await;
    let t = now_ms() - 60_000;
    let sent = batch("shop", t, &[("main;work", 3), ("main;idle", 1)]);
    pusher.store(sent.clone()).await;
    pusher.store(batch("cart", t + 1, &[("main;add", 2)])).await;
    assert_eq!(api(&running, "/labels").await, json!({ "names": ["node", "service_name"] }));
    assert_eq!(api(&running, "/labels/service_name/values").await, json!({ "values": ["cart", "shop"] }));
    let shop = r#"query={service_name="shop"}"#;
    assert_eq!(
        api(&running, &format!("/series?{shop}&from=now-10m&until=now")).await,
        json!({ "series": [{
            "labels": { "node": "n1", "service_name": "shop" }, "profiles": 1, "samples": 4,
            "first_ms": t, "last_ms": t, "sample_types": ["cpu/nanoseconds", "samples/count"],
        }] })
    );
    let list = api(&running, "/profiles?limit=1").await;
    assert_eq!(list["profiles"].as_array().unwrap().len(), 1);
    let token = list["next_page_token"].as_str().unwrap();
    assert_eq!(
        api(&running, &format!("/profiles?limit=1&page_token={token}")).await,
        json!({
            "profiles": [{
                "id": sent.batch_id, "labels": { "node": "n1", "service_name": "shop" }, "start_ms": t,
                "duration_ms": 10_000, "sample_types": ["samples/count", "cpu/nanoseconds"], "samples": 4,
                "bytes": sent.pprof.len(), "rule_id": "r1", "revision": 7, "reason": "always",
            }],
            "next_page_token": "",
        })
    );
    let one = get(running.http_addr, &format!("/api/v1/profiles/{}", sent.batch_id)).await;
    assert_eq!(one.body, sent.pprof);
    assert!(one.headers["content-disposition"].contains(&format!("{}.pb.gz", sent.batch_id)));
    let merged = get(running.http_addr, "/api/v1/merge").await;
    assert!(merged.headers["content-disposition"].ends_with(".pb.gz\""));
    assert_eq!(check(&decode(&merged.body, 1 << 20).unwrap()).unwrap().totals[0], 6);

    let graph = api(&running, &format!("/flamegraph?{shop}&type=samples/count")).await;
    assert_eq!(
        (&graph["unit"], &graph["sample_type"], &graph["total"]),
        (&json!("count"), &json!("samples/count"), &json!(4))
    );
    assert_eq!(
        (&graph["profiles"], &graph["base_total"], &graph["base_profiles"]),
        (&json!(1), &json!(0), &json!(0))
    );
    let main = &graph["root"]["children"][0];
    assert_eq!((&main["name"], &main["total"], &main["file"]), (&json!("main"), &json!(4), &json!("shop")));
    assert_eq!(
        main["children"][0],
        json!({ "name": "work", "file": "shop", "total": 3, "self": 3, "children": [] })
    );
    let diff =
        api(&running, &format!("/flamegraph?{shop}&type=samples/count&base_query={{service_name=\"cart\"}}"))
            .await;
    assert_eq!((&diff["total"], &diff["base_total"]), (&json!(4), &json!(2)));
    let top = api(&running, &format!("/top?{shop}&type=samples/count&limit=1")).await;
    assert_eq!(top["rows"].as_array().unwrap().len(), 1);
    assert_eq!(
        top["rows"][0],
        json!({ "name": "work", "file": "shop", "self": 3, "total": 3, "base_self": 0, "base_total": 0 })
    );
    let line =
        api(&running, &format!("/timeline?from={t}&until={}&step_ms=10000&type=samples/count", t + 20_000))
            .await;
    assert_eq!(
        line,
        json!({
            "unit": "count", "sample_type": "samples/count", "step_ms": 10_000,
            "points": [
                { "t_ms": t, "value": 6, "profiles": 2 }, { "t_ms": t + 10_000, "value": 0, "profiles": 0 },
            ],
        })
    );
    running.shutdown().await;
}

/// Returns a batch whose stacks rest on a guess from the caller of the leaf.
fn guessed(service: &str, start_ms: u64, stacks: Stacks<'_>) -> Batch {
    let mut profile = profile(CPU, stacks);
    let key = profile.string_table.len() as i64;
    profile.string_table.push(GUESSED_FROM.to_owned());
    for sample in &mut profile.sample {
        sample.label.push(Label { key, num: 1, ..Label::default() });
    }
    Batch { pprof: encode(&profile), ..batch(service, start_ms, stacks) }
}

#[tokio::test]
async fn a_flame_graph_counts_guesses_on_each_side() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let (mut pusher, t) = (Pusher::open(running.grpc_addr).await, now_ms() - 60_000);
    let stack = "main;work";
    pusher.store(batch("shop", t, &[(stack, 3)])).await;
    pusher.store(guessed("shop", t + 1, &[(stack, 2)])).await;
    pusher.store(guessed("cart", t, &[(stack, 7)])).await;
    let compared = "query={service_name=\"shop\"}&base_query={service_name=\"cart\"}";
    let graph = api(&running, &format!("/flamegraph?{compared}&type=samples/count")).await;
    assert_eq!((&graph["root"]["guessed"], &graph["root"]["base_guessed"]), (&json!(2), &json!(7)));
    assert_eq!(
        graph["root"]["children"][0],
        json!({
            "name": "main", "file": "shop", "total": 5, "base_total": 7, "guessed": 2, "base_guessed": 7,
            "children": [{
                "name": "work", "file": "shop", "total": 5, "self": 5, "base_total": 7, "base_self": 7,
                "children": [],
            }],
        })
    );
    running.shutdown().await;
}

#[tokio::test]
async fn nodes_rules_and_rollout_show_what_was_set_and_answered() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut agent = Agent::connect(&running, "n1", "").await;
    let yaml = "rules: [{id: a, match: {comm: ['py*']}, capture: {hz: 49, duration: 30s, cooldown: 1m}, when: [{exec: {}}]}]";
    let request = SetTriggersRequest { rules: parse(yaml), ..Default::default() };
    let set = triggers(&running).await.set_triggers(request).await.unwrap().into_inner();
    let rules = api(&running, "/rules").await;
    assert_eq!(rules["revision"], 1);
    let scope = &rules["scopes"][0];
    assert_eq!((&scope["scope"], &scope["etag"]), (&json!("default"), &json!(set.etag)));
    assert_eq!(scope["changed_by"], "anonymous");
    assert!(scope["changed_at_ms"].as_u64().unwrap() > now_ms() - 60_000);
    assert_eq!(scope["rules"][0]["match"]["comm"], json!(["py*"]));
    assert_eq!(scope["rules"][0]["capture"]["duration"], "30s");
    let received = agent.rules().await;
    let before = api(&running, "/rollout").await;
    assert_eq!(
        (&before["settled"], &before["nodes"][0]["state"]),
        (&json!(false), &json!(State::Pending.as_str_name()))
    );
    agent.apply(&received, vec![]).await;
    crate::support::eventually("applied", || async {
        api(&running, "/rollout?revision=1").await["settled"] == true
    })
    .await;
    let nodes = api(&running, "/nodes").await;
    let node = &nodes["nodes"][0];
    assert_eq!(
        (&node["name"], &node["connected"], &node["kernel"]),
        (&json!("n1"), &json!(true), &json!("6.1"))
    );
    assert_eq!((&node["rollout"]["state"], &node["rollout"]["revision"]), (&json!("APPLIED"), &json!(1)));
    assert_eq!(get(running.http_addr, "/api/v1/rollout?revision=9").await.status, 404);
    running.shutdown().await;
}

#[rstest]
#[case("/labels?frm=now", 400, "`frm`")]
#[case("/labels?from=yesterday", 400, "from: `yesterday`")]
#[case("/labels?from=now&until=now-5m", 400, "range is empty")]
#[case("/series?query={a", 400, "character 3")]
#[case("/profiles?limit=many", 400, "limit")]
#[case("/profiles?page_token=x", 400, "page_token")]
#[case("/profiles/x", 400, "ULID")]
#[case("/profiles/01ARZ3NDEKTSV4RRFFQ69G5FAV", 404, "01ARZ3NDEKTSV4RRFFQ69G5FAV")]
#[case("/flamegraph?max_nodes=-1", 400, "max_nodes")]
#[case("/flamegraph?base_query=x", 400, "base: ")]
#[case("/timeline?step_ms=0", 400, "step")]
#[case("/merge", 404, "no profile")]
#[case("/rollout?revision=99", 404, "revision 99")]
#[case("/nothing", 404, "no such path")]
#[tokio::test]
async fn a_bad_request_gets_status_and_reason(#[case] path: &str, #[case] status: u16, #[case] says: &str) {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let answer = get(running.http_addr, &format!("/api/v1{path}")).await;
    assert_eq!(answer.status, status, "{}", answer.text());
    let error = answer.json()["error"].as_str().unwrap().to_owned();
    assert!(error.contains(says), "{error}");
    running.shutdown().await;
}

#[tokio::test]
async fn page_probes_and_metrics_have_security_headers() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    for path in ["/", "/livez", "/readyz", "/metrics", "/api/v1/nodes", "/nothing"] {
        let answer = get(running.http_addr, path).await;
        assert_eq!(answer.status, if path == "/nothing" { 404 } else { 200 }, "{path}: {}", answer.text());
        assert_eq!(answer.headers["x-content-type-options"], "nosniff", "{path}");
        let policy = &answer.headers["content-security-policy"];
        assert!(
            policy.contains("default-src 'none'") || policy.contains("default-src 'self'"),
            "{path}: {policy}"
        );
    }
    let page = get(running.http_addr, "/").await;
    assert!(page.headers["content-type"].starts_with("text/html"));
    let metrics = get(running.http_addr, "/metrics").await;
    assert!(metrics.headers["content-type"].starts_with("application/openmetrics-text"));
    assert!(metrics.text().contains("gannet_collector_build_info{version="), "{}", metrics.text());
    assert!(metrics.text().trim_end().ends_with("# EOF"));
    running.shutdown().await;
}

#[tokio::test]
async fn health_and_reflection_answer_for_every_service() {
    use tonic_health::pb::{
        HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
    };
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let channel = crate::support::channel(running.grpc_addr).await;
    let services = [
        "gannet.ingest.v1.IngestService",
        "gannet.query.v1.QueryService",
        "gannet.control.v1.TriggerService",
        "gannet.control.v1.FleetService",
        "gannet.control.v1.AgentService",
    ];
    for service in services.iter().copied().chain([""]) {
        let request = HealthCheckRequest { service: service.to_owned() };
        let health = HealthClient::new(channel.clone()).check(request).await.unwrap().into_inner();
        assert_eq!(health.status(), ServingStatus::Serving, "{service}");
    }
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers = ServerReflectionClient::new(channel)
        .server_reflection_info(tokio_stream::iter([request]))
        .await
        .unwrap()
        .into_inner();
    match answers.message().await.unwrap().unwrap().message_response.unwrap() {
        MessageResponse::ListServicesResponse(list) => {
            for service in services {
                assert!(list.service.iter().any(|s| s.name == service), "{service}");
            }
        }
        other => panic!("{other:?}"),
    }
    running.shutdown().await;
}
