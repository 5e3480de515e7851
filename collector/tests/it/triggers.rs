use std::fs;

use gannet_collector::{Collector, Running};
use gannet_proto::{
    control::{
        DeleteTriggersRequest, GetTriggersRequest, ListScopesRequest, Rule, SetTriggersRequest,
        trigger_service_client::TriggerServiceClient,
    },
    rules,
};
use tonic::{Code, transport::Channel};
use tonic_types::StatusExt as _;

use crate::{
    fleet::Agent,
    support::{channel, config, get, metric, start},
};

pub type Triggers = TriggerServiceClient<Channel>;

pub async fn triggers(running: &Running) -> Triggers {
    TriggerServiceClient::new(channel(running.grpc_addr).await)
}

pub fn parse(yaml: &str) -> Vec<Rule> {
    rules::parse(yaml, "test").unwrap()
}

/// Returns a request with one rule for all nodes.
pub fn one(id: &str) -> SetTriggersRequest {
    SetTriggersRequest {
        rules: parse(&format!("rules: [{{id: {id}, match: {{comm: [shop]}}}}]")),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_set_is_read_back_unchanged_also_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut client = triggers(&running).await;
    let rules = parse(
        "rules:\n- id: b\n  match: {comm: [shop, 'py*']}\n  capture: {hz: 49}\n  lifetime: {ttl: 1h}\n- id: a\n  match: {exe: [/usr/bin/x]}\n",
    );
    let request = SetTriggersRequest { scope: "team-a".into(), rules: rules.clone(), ..Default::default() };
    let answer = client.set_triggers(request).await.unwrap().into_inner();
    assert!(answer.changed && answer.revision == 1 && !answer.etag.is_empty(), "{answer:?}");
    let read = |client: Triggers| async {
        let mut client = client;
        let request = GetTriggersRequest { scope: "team-a".into() };
        client.get_triggers(request).await.unwrap().into_inner().scope.unwrap()
    };
    let scope = read(client.clone()).await;
    assert_eq!(scope.rules, rules::canonical(rules));
    assert_eq!((scope.revision, &scope.etag, scope.changed_by.as_str()), (1, &answer.etag, "anonymous"));
    assert!(scope.changed_at.is_some());
    drop(client);
    running.shutdown().await;
    let running = start(dir.path()).await;
    assert_eq!(read(triggers(&running).await).await, scope);
    let unknown =
        triggers(&running).await.get_triggers(GetTriggersRequest { scope: "x".into() }).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
    running.shutdown().await;
}

#[tokio::test]
async fn only_changed_content_gets_a_new_revision() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut client = triggers(&running).await;
    let first = client.set_triggers(one("a")).await.unwrap().into_inner();
    let again = client.set_triggers(one("a")).await.unwrap().into_inner();
    assert!(!again.changed);
    assert_eq!((again.revision, &again.etag), (first.revision, &first.etag));
    let other = client.set_triggers(one("b")).await.unwrap().into_inner();
    assert!(other.changed && other.revision == first.revision + 1 && other.etag != first.etag);
    running.shutdown().await;
}

#[tokio::test]
async fn a_stale_etag_is_aborted_with_the_present_one() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut client = triggers(&running).await;
    let first = client.set_triggers(one("a")).await.unwrap().into_inner();
    let with = |etag: &str, id: &str| SetTriggersRequest { etag: etag.to_owned(), ..one(id) };
    let second = client.set_triggers(with(&first.etag, "b")).await.unwrap().into_inner();
    let status = client.set_triggers(with(&first.etag, "c")).await.unwrap_err();
    assert_eq!(status.code(), Code::Aborted);
    assert!(status.message().contains(&second.etag), "{status}");
    let delete = DeleteTriggersRequest { etag: first.etag, ..Default::default() };
    assert_eq!(client.delete_triggers(delete).await.unwrap_err().code(), Code::Aborted);
    let elsewhere = SetTriggersRequest { scope: "none-yet".into(), ..with("1-x", "d") };
    assert_eq!(client.set_triggers(elsewhere).await.unwrap_err().code(), Code::Aborted);
    let scope = client.get_triggers(GetTriggersRequest::default()).await.unwrap().into_inner().scope.unwrap();
    assert_eq!((scope.rules[0].id.as_str(), scope.etag), ("b", second.etag));
    running.shutdown().await;
}

#[tokio::test]
async fn a_retry_by_request_id_gets_the_same_answer() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut client = triggers(&running).await;
    let with = |request_id: &str, id: &str| SetTriggersRequest { request_id: request_id.into(), ..one(id) };
    let first = client.set_triggers(with("r-1", "a")).await.unwrap().into_inner();
    // Another client changed the scope in the meantime. The retry must not bring the old set back.
    client.set_triggers(one("b")).await.unwrap();
    let retried = client.set_triggers(with("r-1", "a")).await.unwrap().into_inner();
    assert_eq!((retried.revision, &retried.etag, retried.changed), (first.revision, &first.etag, true));
    let status = client.set_triggers(with("r-1", "other")).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("request_id"), "{status}");
    let delete = DeleteTriggersRequest { request_id: "r-2".into(), ..Default::default() };
    let gone = client.delete_triggers(delete.clone()).await.unwrap().into_inner();
    drop(client);
    running.shutdown().await;
    let running = start(dir.path()).await;
    let mut client = triggers(&running).await;
    assert_eq!(client.set_triggers(with("r-1", "a")).await.unwrap().into_inner().revision, first.revision);
    assert_eq!(client.delete_triggers(delete).await.unwrap().into_inner(), gone);
    assert_eq!(client.list_scopes(ListScopesRequest {}).await.unwrap().into_inner().scopes.len(), 0);
    running.shutdown().await;
}

#[tokio::test]
async fn an_empty_set_needs_allow_empty() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut client = triggers(&running).await;
    client.set_triggers(one("a")).await.unwrap();
    let status = client.set_triggers(SetTriggersRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("allow_empty"), "{status}");
    let meant = SetTriggersRequest { allow_empty: true, ..Default::default() };
    assert!(client.set_triggers(meant).await.unwrap().into_inner().changed);
    running.shutdown().await;
}

#[tokio::test]
async fn validate_only_reports_everything_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut client = triggers(&running).await;
    client.set_triggers(one("a")).await.unwrap();
    let _agent = Agent::connect(&running, "n1", "").await;
    let check = SetTriggersRequest { validate_only: true, ..one("b") };
    let answer = client.set_triggers(check).await.unwrap().into_inner();
    assert!(answer.changed && answer.revision == 1, "{answer:?}");
    assert_eq!(answer.nodes, ["n1"]);
    let mut bad = SetTriggersRequest { validate_only: true, ..one("b") };
    bad.rules[0].id = "B!".into();
    assert_eq!(client.set_triggers(bad).await.unwrap_err().code(), Code::InvalidArgument);
    let scope = client.get_triggers(GetTriggersRequest::default()).await.unwrap().into_inner().scope.unwrap();
    assert_eq!((scope.revision, scope.rules[0].id.as_str()), (1, "a"));
    running.shutdown().await;
}

#[tokio::test]
async fn every_wrong_field_is_named_with_its_path_and_rule() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut client = triggers(&running).await;
    client.set_triggers(SetTriggersRequest { scope: "other".into(), ..one("taken") }).await.unwrap();
    let mut rules = parse(
        "rules: [{id: a, match: {comm: [x]}}, {id: b, match: {comm: [x]}}, {id: c, match: {comm: [x]}}]",
    );
    rules[1].r#match.as_mut().unwrap().comm = vec!["a-name-of-sixteen".into()];
    rules[2].capture = Some(gannet_proto::control::Capture { hz: 5000, ..Default::default() });
    rules.push(rules[0].clone());
    rules.push(Rule { id: "taken".into(), ..rules[0].clone() });
    let status = client.set_triggers(SetTriggersRequest { rules, ..Default::default() }).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    let details = status.get_details_bad_request().expect("google.rpc.BadRequest");
    let of = |field: &str| {
        let found: Vec<_> = details.field_violations.iter().filter(|v| v.field == field).collect();
        assert_eq!(found.len(), 1, "{field} in {details:?}");
        found[0].description.clone()
    };
    assert!(of("rules[1].match.comm[0]").contains("rule `b`"));
    assert!(of("rules[2].capture.hz").contains("5000"));
    assert!(of("rules[3].id").contains("rules[0]"));
    assert!(of("rules[4].id").contains("scope `other`"));
    assert!(status.message().contains("rules[2].capture.hz"), "{status}");
    let scope =
        client.set_triggers(SetTriggersRequest { scope: "No!".into(), ..one("a") }).await.unwrap_err();
    assert_eq!(scope.get_details_bad_request().unwrap().field_violations[0].field, "scope");
    assert_eq!(client.list_scopes(ListScopesRequest {}).await.unwrap().into_inner().scopes.len(), 1);
    running.shutdown().await;
}

#[tokio::test]
async fn deleting_a_scope_leaves_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut client = triggers(&running).await;
    client.set_triggers(SetTriggersRequest { scope: "x".into(), ..one("a") }).await.unwrap();
    client.set_triggers(SetTriggersRequest { scope: "y".into(), ..one("b") }).await.unwrap();
    let delete = DeleteTriggersRequest { scope: "x".into(), ..Default::default() };
    assert_eq!(client.delete_triggers(delete.clone()).await.unwrap().into_inner().revision, 3);
    let status = client.delete_triggers(delete).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    let left = client.list_scopes(ListScopesRequest {}).await.unwrap().into_inner();
    assert_eq!((left.revision, left.scopes.len(), left.scopes[0].scope.as_str()), (3, 1, "y"));
    running.shutdown().await;
}

#[tokio::test]
async fn a_damaged_rule_file_is_reported_and_never_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    triggers(&running).await.set_triggers(one("a")).await.unwrap();
    triggers(&running).await.set_triggers(one("b")).await.unwrap();
    running.shutdown().await;
    let file = dir.path().join("rules/rules.pb");
    let mut damaged = fs::read(&file).unwrap();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    fs::write(&file, &damaged).unwrap();

    let running = Collector::start(config(dir.path())).await.expect("it keeps serving");
    let ready = get(running.http_addr, "/readyz").await;
    assert_eq!(ready.status, 503);
    assert!(ready.text().contains("rules.pb.prev"), "{}", ready.text());
    assert_eq!(get(running.http_addr, "/livez").await.status, 200);
    assert_eq!(metric(running.http_addr, "gannet_collector_rules_corrupt").await as u64, 1);
    let mut client = triggers(&running).await;
    for status in [
        client.set_triggers(one("c")).await.unwrap_err(),
        client.list_scopes(ListScopesRequest {}).await.unwrap_err(),
        client.delete_triggers(DeleteTriggersRequest::default()).await.unwrap_err(),
    ] {
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert!(status.message().contains("damaged"), "{status}");
    }
    let mut agent = Agent::connect(&running, "n1", "some-digest").await;
    agent.receives_nothing().await;
    assert_eq!(fs::read(&file).unwrap(), damaged, "the file is as it was");
    drop((agent, client));
    running.shutdown().await;

    // The cure in the message works.
    fs::copy(dir.path().join("rules/rules.pb.prev"), &file).unwrap();
    let running = start(dir.path()).await;
    let scope =
        triggers(&running).await.get_triggers(GetTriggersRequest::default()).await.unwrap().into_inner();
    assert_eq!(scope.scope.unwrap().rules[0].id, "a");
    assert_eq!(get(running.http_addr, "/readyz").await.status, 200);
    running.shutdown().await;
}
