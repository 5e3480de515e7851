//! Requests to nodes, and the audit log of their answers.

use gannet_collector::{Collector, RulesLocation};
use gannet_proto::control::{
    CaptureChunk, CaptureDone, CaptureProgress, CaptureRequest, CaptureStarted, ExplainRequest,
    ExplainResponse, ListAuditRequest, ListScopesRequest, Match, NodeHello, NodePreview, NodeStatus,
    RulePreview, RuleStatus, SetTriggersRequest, agent_message, answer, capture_progress,
    fleet_service_client::FleetServiceClient, node_rollout::State, question, rule_status,
};
use tonic::Code;

use crate::{
    fleet::{Agent, becomes},
    support::{channel, config_with, eventually, start},
    triggers::{one, triggers},
};

fn able(node: &str) -> NodeHello {
    NodeHello {
        node: node.into(),
        version: "1".into(),
        features: vec!["questions".into(), "capture".into()],
        ..NodeHello::default()
    }
}

#[tokio::test]
async fn validate_only_asks_the_matching_nodes() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut client = triggers(&running).await;
    let mut agent = Agent::with(&running, able("new")).await;
    let _old = Agent::connect(&running, "old", "").await;
    client.set_triggers(SetTriggersRequest { scope: "other".into(), ..one("there") }).await.unwrap();
    let set = agent.rules().await;
    agent.apply(&set, Vec::new()).await;

    let ask = {
        let mut client = client.clone();
        let check = SetTriggersRequest { validate_only: true, ..one("wanted") };
        tokio::spawn(async move { client.set_triggers(check).await })
    };
    let question = agent.question().await;
    let Some(question::Question::Preview(preview)) = question.question else { panic!("{question:?}") };
    // The complete set that the node would have, so that it checks caps and names over all rules.
    let ids: Vec<_> = preview.rules.iter().map(|rule| rule.id.as_str()).collect();
    assert_eq!(ids, ["there", "wanted"]);
    let rule = |id: &str, samples_per_second| RulePreview {
        rule_id: id.into(),
        processes: 3,
        samples_per_second,
        ..RulePreview::default()
    };
    let answer = NodePreview { rules: vec![rule("there", 5.0), rule("wanted", 40.0)], ..Default::default() };
    agent.answer(&question.id, answer::Answer::Preview(answer)).await;
    let answer = ask.await.unwrap().unwrap().into_inner();
    assert_eq!(answer.nodes, ["new", "old"]);
    assert_eq!(answer.previews.len(), 2);
    assert_eq!(answer.previews[0].rules, [rule("wanted", 40.0)]);
    assert!((answer.previews[0].samples_per_second - 40.0).abs() < 1e-9);
    assert!(answer.previews[1].unanswered.contains("update its agent"), "{:?}", answer.previews[1]);
    // No rules were pushed.
    agent.receives_nothing().await;
    running.shutdown().await;
}

#[tokio::test]
async fn an_explanation_comes_from_the_node_or_names_the_obstacle() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut agent = Agent::with(&running, able("n1")).await;
    let _old = Agent::connect(&running, "old", "").await;
    let client = FleetServiceClient::new(channel(running.grpc_addr).await);
    let explain = |node: &str| {
        let mut client = client.clone();
        let request = ExplainRequest { node: node.into(), rule_id: "a".into(), ..ExplainRequest::default() };
        tokio::spawn(async move { client.explain(request).await })
    };
    let asked = explain("n1");
    let question = agent.question().await;
    assert!(matches!(question.question, Some(question::Question::Explain(_))), "{question:?}");
    let answer = ExplainResponse { processes_seen: 9, processes_matched: 2, ..Default::default() };
    agent.answer(&question.id, answer::Answer::Explain(answer.clone())).await;
    assert_eq!(asked.await.unwrap().unwrap().into_inner(), answer);

    let asked = explain("n1");
    let question = agent.question().await;
    agent.answer(&question.id, answer::Answer::Refused("it has no rule `a`".into())).await;
    let status = asked.await.unwrap().unwrap_err();
    assert!(
        status.code() == Code::FailedPrecondition && status.message().contains("it has no rule `a`"),
        "{status}"
    );
    for (node, code) in [("nobody", Code::NotFound), ("old", Code::FailedPrecondition)] {
        assert_eq!(explain(node).await.unwrap().unwrap_err().code(), code);
    }
    // The node disconnects during a request.
    let asked = explain("n1");
    agent.question().await;
    drop(agent);
    assert_eq!(asked.await.unwrap().unwrap_err().code(), Code::Unavailable);
    running.shutdown().await;
}

#[tokio::test]
async fn a_capture_streams_to_its_caller_and_ends_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut agent = Agent::with(&running, able("n1")).await;
    let mut client = FleetServiceClient::new(channel(running.grpc_addr).await);
    let request = CaptureRequest {
        node: "n1".into(),
        r#match: Some(Match { pids: vec![42], ..Match::default() }),
        ..CaptureRequest::default()
    };
    let part = |message| answer::Answer::Capture(CaptureProgress { message: Some(message) });
    let capture = {
        let (mut client, request) = (client.clone(), request.clone());
        tokio::spawn(async move { client.capture(request).await })
    };
    let question = agent.question().await;
    let Some(question::Question::Capture(asked)) = &question.question else { panic!("{question:?}") };
    assert_eq!((asked.hz, asked.duration.map(|d| d.seconds)), (99, Some(30)), "defaults are filled in");
    agent.answer(&question.id, part(capture_progress::Message::Started(CaptureStarted::default()))).await;
    let mut parts = capture.await.unwrap().unwrap().into_inner();
    assert!(matches!(
        parts.message().await.unwrap().unwrap().message,
        Some(capture_progress::Message::Started(_))
    ));
    for data in [b"one".to_vec(), b"two".to_vec()] {
        let chunk = CaptureChunk { data, ..CaptureChunk::default() };
        agent.answer(&question.id, part(capture_progress::Message::Chunk(chunk))).await;
    }
    let done = CaptureDone { samples: 7, ..CaptureDone::default() };
    agent.answer(&question.id, part(capture_progress::Message::Done(done))).await;
    let mut whole = Vec::new();
    let mut samples = 0;
    while let Some(CaptureProgress { message }) = parts.message().await.unwrap() {
        match message.unwrap() {
            capture_progress::Message::Chunk(chunk) => whole.extend(chunk.data),
            capture_progress::Message::Done(done) => samples = done.samples,
            capture_progress::Message::Started(_) => panic!("twice"),
        }
    }
    assert_eq!((whole.as_slice(), samples), (&b"onetwo"[..], 7));

    // The caller disconnects, and the node gets a cancellation.
    let capture = {
        let (mut client, request) = (client.clone(), request.clone());
        tokio::spawn(async move { client.capture(request).await })
    };
    let question = agent.question().await;
    agent.answer(&question.id, part(capture_progress::Message::Started(CaptureStarted::default()))).await;
    drop(capture.await.unwrap().unwrap());
    let cancel = agent.question().await;
    assert_eq!(cancel.id, question.id);
    assert!(matches!(cancel.question, Some(question::Question::Cancel(_))), "{cancel:?}");

    for (change, words) in [
        ((|r: &mut CaptureRequest| r.r#match = None) as fn(&mut CaptureRequest), "match"),
        (|r| r.hz = 5000, "hz"),
        (|r| r.duration = Some(prost_types::Duration { seconds: 3600, nanos: 0 }), "duration"),
        (|r| r.pod = "no-namespace".into(), "namespace/name"),
    ] {
        let mut wrong = request.clone();
        change(&mut wrong);
        let status = client.capture(wrong).await.unwrap_err();
        assert!(status.code() == Code::InvalidArgument && status.message().contains(words), "{status}");
    }
    running.shutdown().await;
}

#[tokio::test]
async fn the_audit_log_survives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut client = triggers(&running).await;
    let mut agent = Agent::connect(&running, "n1", "").await;
    client.set_triggers(one("a")).await.unwrap();
    let set = agent.rules().await;
    agent.reject(&set, "capture.hz").await;
    becomes(&client, 1, "n1", State::Rejected).await;
    client.set_triggers(one("b")).await.unwrap();
    let set = agent.rules().await;
    agent.apply(&set, Vec::new()).await;
    becomes(&client, 2, "n1", State::Applied).await;
    let status = |state: rule_status::State| NodeStatus {
        active_revision: 2,
        rules: vec![RuleStatus { rule_id: "b".into(), state: state.into(), ..RuleStatus::default() }],
        ..NodeStatus::default()
    };
    for state in [rule_status::State::Capturing, rule_status::State::Expired, rule_status::State::Expired] {
        agent.send(agent_message::Message::Status(status(state))).await;
    }
    let entries = |client: &crate::triggers::Triggers| {
        let mut client = client.clone();
        async move { client.list_audit(ListAuditRequest::default()).await.unwrap().into_inner().entries }
    };
    eventually("all entries are written", || async { entries(&client).await.len() == 5 }).await;
    drop((agent, client));
    running.shutdown().await;
    let running = start(dir.path()).await;
    let mut client = triggers(&running).await;
    let found: Vec<_> = entries(&client)
        .await
        .into_iter()
        .map(|e| (e.action.clone(), e.revision, e.state(), e.added.join(","), e.removed.join(",")))
        .collect();
    let entry = |action: &str, revision, state, added: &str, removed: &str| {
        (action.to_owned(), revision, state, added.to_owned(), removed.to_owned())
    };
    let none = State::Unspecified;
    assert_eq!(
        found,
        [
            entry("expired", 2, none, "", "b"),
            entry("answer", 2, State::Applied, "", ""),
            entry("set", 2, none, "b", "a"),
            entry("answer", 1, State::Rejected, "", ""),
            entry("set", 1, none, "a", ""),
        ]
    );
    let of_node = ListAuditRequest { node: "n1".into(), limit: 1, ..ListAuditRequest::default() };
    assert_eq!(client.list_audit(of_node).await.unwrap().into_inner().entries.len(), 1);
    let too_many = ListAuditRequest { limit: 100_000, ..ListAuditRequest::default() };
    assert_eq!(client.list_audit(too_many).await.unwrap_err().code(), Code::InvalidArgument);
    running.shutdown().await;
}

#[tokio::test]
async fn two_collectors_on_one_rule_store_agree() {
    let dir = tempfile::tempdir().unwrap();
    let shared = RulesLocation::File(Some(dir.path().join("shared")));
    let on = |name: &str| config_with(&dir.path().join(name), |config| config.rules_store = shared.clone());
    let left = Collector::start(on("left")).await.unwrap();
    let right = Collector::start(on("right")).await.unwrap();
    let (mut to_left, mut to_right) = (triggers(&left).await, triggers(&right).await);
    let mut agent = Agent::connect(&right, "n1", "").await;
    let first = to_left.set_triggers(one("a")).await.unwrap().into_inner();
    let set = agent.rules().await;
    assert_eq!((set.revision, set.rules[0].id.as_str()), (first.revision, "a"));
    agent.apply(&set, Vec::new()).await;
    // A stale etag is stale on both, and concurrent changes make one sequence of revisions.
    let stale = SetTriggersRequest { etag: "0-x".into(), ..one("b") };
    assert_eq!(to_right.set_triggers(stale).await.unwrap_err().code(), Code::Aborted);
    let mut changes = Vec::new();
    for i in 0..10 {
        for client in [&to_left, &to_right] {
            let mut client = client.clone();
            let scope = format!("s{}-{}", i, changes.len());
            let request = SetTriggersRequest { scope, ..one(&format!("r{}", changes.len())) };
            changes.push(tokio::spawn(async move { client.set_triggers(request).await }));
        }
    }
    let mut revisions = Vec::new();
    for change in changes {
        revisions.push(change.await.unwrap().unwrap().into_inner().revision);
    }
    revisions.sort_unstable();
    assert_eq!(revisions, (2..=21).collect::<Vec<_>>());
    eventually("both have all scopes", || async {
        let list = |client: &crate::triggers::Triggers| {
            let mut client = client.clone();
            async move { client.list_scopes(ListScopesRequest {}).await.unwrap().into_inner() }
        };
        let (left, right) = (list(&to_left).await, list(&to_right).await);
        left == right && left.revision == 21 && left.scopes.len() == 21
    })
    .await;
    // A node that changes collectors has the rules already.
    let digest = loop {
        let set = agent.rules().await;
        agent.apply(&set, Vec::new()).await;
        if set.revision == 21 {
            break set.digest;
        }
    };
    drop(agent);
    let mut agent = Agent::connect(&left, "n1", &digest).await;
    agent.receives_nothing().await;

    // The file disappears while they run. No collector takes that for an empty set, and the next change writes all rules.
    std::fs::remove_file(dir.path().join("shared/rules.pb")).unwrap();
    agent.receives_nothing().await;
    to_left.set_triggers(one("c")).await.unwrap();
    let set = agent.rules().await;
    assert_eq!((set.revision, set.rules.len()), (22, 21));
    left.shutdown().await;
    right.shutdown().await;
}
