//! Staged rollouts: rules that reach some of the nodes first.

use gannet_proto::{
    control::{
        AbortRolloutRequest, GetTriggersRequest, NodeHello, ResumeRolloutRequest, RuleError,
        SetTriggersRequest, Staging, node_rollout::State,
    },
    rules::canary_rank,
};
use prost_types::Duration;
use tonic::Code;

use crate::{
    fleet::{Agent, becomes, rollout, state},
    support::{eventually, metric, start},
    triggers::{Triggers, one, triggers},
};

/// Returns names of nodes whose ranks are below and above 50 percent.
fn halves() -> (String, String) {
    let name = |wanted: bool| {
        (0..10_000).map(|i| format!("node-{i}")).find(|name| (canary_rank(name) < 50) == wanted).unwrap()
    };
    (name(true), name(false))
}

fn half(id: &str, soak: Option<Duration>) -> SetTriggersRequest {
    SetTriggersRequest { staging: Some(Staging { percent: 50, soak }), ..one(id) }
}

async fn scope_rules(client: &Triggers) -> Vec<String> {
    let request = GetTriggersRequest::default();
    let scope = client.clone().get_triggers(request).await.unwrap().into_inner().scope.unwrap();
    scope.rules.into_iter().map(|rule| rule.id).collect()
}

#[tokio::test]
async fn a_staged_set_reaches_the_other_nodes_when_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut client = triggers(&running).await;
    let (first, rest) = halves();
    let mut first_agent = Agent::connect(&running, &first, "").await;
    let mut rest_agent = Agent::connect(&running, &rest, "").await;
    client.set_triggers(one("old")).await.unwrap();
    for agent in [&mut first_agent, &mut rest_agent] {
        let set = agent.rules().await;
        agent.apply(&set, Vec::new()).await;
    }
    becomes(&client, 1, &rest, State::Applied).await;

    let answer = client.set_triggers(half("new", None)).await.unwrap().into_inner();
    assert_eq!((answer.revision, answer.changed), (2, true));
    let set = first_agent.rules().await;
    assert_eq!(set.rules[0].id, "new");
    first_agent.apply(&set, Vec::new()).await;
    becomes(&client, 2, &first, State::Applied).await;
    rest_agent.receives_nothing().await;
    let held = becomes(&client, 2, &rest, State::Skipped).await;
    assert!(held.note.contains("default"), "{held:?}");
    assert_eq!(rollout(&client, 2).await.staged["default"].percent, 50);
    // Setting the same rules again changes nothing.
    assert!(!client.set_triggers(half("new", None)).await.unwrap().into_inner().changed);

    // A node that reconnects with the former rules has the right ones.
    drop(rest_agent);
    becomes(&client, 2, &rest, State::Offline).await;
    let old = gannet_proto::rules::digest(&one("old").rules);
    let mut rest_agent = Agent::connect(&running, &rest, &old).await;
    rest_agent.receives_nothing().await;

    let back = ResumeRolloutRequest { percent: 20, ..Default::default() };
    assert_eq!(client.resume_rollout(back).await.unwrap_err().code(), Code::InvalidArgument);
    let answer = client.resume_rollout(ResumeRolloutRequest::default()).await.unwrap().into_inner();
    let set = rest_agent.rules().await;
    assert_eq!((set.revision, set.rules[0].id.as_str()), (answer.revision, "new"));
    rest_agent.apply(&set, Vec::new()).await;
    becomes(&client, answer.revision, &rest, State::Applied).await;
    first_agent.receives_nothing().await;
    assert_eq!(state(&client, answer.revision, &first).await.state(), State::Applied);
    let over = client.resume_rollout(ResumeRolloutRequest::default()).await.unwrap_err();
    assert!(over.code() == Code::FailedPrecondition && over.message().contains("not staged"), "{over}");
    running.shutdown().await;
}

/// Checks that the collector reads all errors of an answer, and keeps the first 255 of them with the number of the others: those
/// name a rule of one staged scope, the last one names a rule of another.
#[tokio::test]
async fn the_last_of_many_errors_pauses_a_staged_rollout() {
    const LEFT_OUT: &str = "gannet_collector_fleet_rule_errors_left_out_total";
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut client = triggers(&running).await;
    let (first, _) = halves();
    let mut agent = Agent::connect(&running, &first, "").await;
    client.set_triggers(half("a", None)).await.unwrap();
    let set = agent.rules().await;
    agent.apply(&set, Vec::new()).await;
    becomes(&client, 1, &first, State::Applied).await;
    client.set_triggers(SetTriggersRequest { scope: "other".into(), ..half("b", None) }).await.unwrap();
    let set = agent.rules().await;
    let error =
        |rule_id: &str| RuleError { rule_id: rule_id.into(), field: "match".into(), reason: "no".into() };
    let mut errors = vec![error("b"); 299];
    errors.push(error("a"));
    agent.reject_with(&set, errors).await;
    eventually("both rollouts are paused", || async {
        let staged = rollout(&client, 0).await.staged;
        ["default", "other"].iter().all(|scope| !staged[*scope].paused.is_empty())
    })
    .await;
    let kept = state(&client, set.revision, &first).await.errors;
    assert_eq!((kept.len(), kept[254].rule_id.as_str()), (256, "b"));
    assert!(kept[255].reason.starts_with("45 further errors"), "{:?}", kept[255]);
    assert!((metric(running.http_addr, LEFT_OUT).await - 45.0).abs() < 0.5);
    running.shutdown().await;
}

#[tokio::test]
async fn a_rejection_pauses_a_staged_rollout_until_it_is_aborted() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut client = triggers(&running).await;
    let (first, rest) = halves();
    let mut first_agent = Agent::connect(&running, &first, "").await;
    let mut rest_agent = Agent::connect(&running, &rest, "").await;
    client.set_triggers(one("old")).await.unwrap();
    for agent in [&mut first_agent, &mut rest_agent] {
        let set = agent.rules().await;
        agent.apply(&set, Vec::new()).await;
    }
    becomes(&client, 1, &first, State::Applied).await;

    // Without the rejection it would complete at once.
    let soak = Some(Duration { seconds: 1, nanos: 0 });
    client.set_triggers(half("a", soak)).await.unwrap();
    let set = first_agent.rules().await;
    first_agent.reject(&set, "capture.hz").await;
    eventually("the rollout is paused", || async {
        !rollout(&client, 0).await.staged["default"].paused.is_empty()
    })
    .await;
    let paused = rollout(&client, 0).await.staged["default"].paused.clone();
    assert!(paused.contains(&first) && paused.contains("capture.hz"), "{paused}");
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    rest_agent.receives_nothing().await;

    // The pause survives a restart without the node that rejected the rules.
    drop((first_agent, rest_agent, client));
    running.shutdown().await;
    let running = start(dir.path()).await;
    let mut client = triggers(&running).await;
    let old = gannet_proto::rules::digest(&one("old").rules);
    let mut rest_agent = Agent::connect(&running, &rest, &old).await;
    rest_agent.receives_nothing().await;
    assert_eq!(rollout(&client, 0).await.staged["default"].paused, paused);
    client.abort_rollout(AbortRolloutRequest::default()).await.unwrap();
    assert_eq!(scope_rules(&client).await, ["old"]);
    rest_agent.receives_nothing().await;
    assert!(rollout(&client, 0).await.staged.is_empty());
    let audit = client.list_audit(gannet_proto::control::ListAuditRequest::default()).await.unwrap();
    let actions: Vec<String> = audit
        .into_inner()
        .entries
        .into_iter()
        .map(|entry| entry.action)
        .filter(|action| action != "answer")
        .collect();
    assert_eq!(actions, ["abort", "pause", "set", "set"]);
    running.shutdown().await;
}

#[tokio::test]
async fn a_staged_set_completes_after_its_soak() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut client = triggers(&running).await;
    let (first, rest) = halves();
    let mut rest_agent =
        Agent::with(&running, NodeHello { node: rest.clone(), ..NodeHello::default() }).await;
    let request = half("new", Some(Duration { seconds: 1, nanos: 0 }));
    client.set_triggers(request).await.unwrap();
    // Without a node that runs the rules it does not complete.
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    rest_agent.receives_nothing().await;
    let mut first_agent = Agent::connect(&running, &first, "").await;
    let set = first_agent.rules().await;
    first_agent.apply(&set, Vec::new()).await;
    let set = rest_agent.rules().await;
    assert_eq!((set.revision, set.rules[0].id.as_str()), (2, "new"));
    let wrong = SetTriggersRequest { staging: Some(Staging { percent: 0, soak: None }), ..one("x") };
    let status = client.set_triggers(wrong).await.unwrap_err();
    assert!(status.message().contains("staging.percent"), "{status}");
    running.shutdown().await;
}
