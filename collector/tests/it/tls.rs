//! TLS, client certificates, roles and tokens.

use std::{path::Path, sync::Arc};

use axum::{Json, Router, routing::post};
use gannet_collector::{Collector, NodeIdentity, TlsOptions};
use gannet_proto::{
    control::{
        AgentMessage, ListScopesRequest, NodeHello, SetTriggersRequest, agent_message,
        agent_service_client::AgentServiceClient, trigger_service_client::TriggerServiceClient,
    },
    query::{
        DeleteProfilesRequest, ListDeletionsRequest, ListProfilesRequest,
        deletion_service_client::DeletionServiceClient, query_service_client::QueryServiceClient,
    },
    rules,
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, IsCa, KeyPair};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::mpsc,
};
use tokio_rustls::TlsConnector;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Code, Status,
    transport::{Certificate, Channel, ClientTlsConfig, Identity},
};

use crate::{
    support::{Pusher, batch, channel, config_with, eventually, get_over, now_ms},
    triggers::one,
};

/// A certificate authority.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// A certificate and its key, in PEM.
pub struct Pair {
    pub cert: String,
    pub key: String,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self { issuer: CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap() }
    }

    pub fn pem(&self) -> String {
        self.issuer.pem()
    }

    /// Issues a certificate with this common name and organization, for this DNS name.
    fn issue(&self, name: &str, group: &str, dns: &str) -> Pair {
        let key = KeyPair::generate().unwrap();
        let names = if dns.is_empty() { Vec::new() } else { vec![dns.to_owned()] };
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.distinguished_name.push(DnType::OrganizationName, group);
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        Pair { cert: cert.pem(), key: key.serialize_pem() }
    }

    /// Issues a certificate for this DNS name.
    pub fn sign(&self, name: &str) -> Pair {
        let key = KeyPair::generate().unwrap();
        let cert =
            CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, &self.issuer).unwrap();
        Pair { cert: cert.pem(), key: key.serialize_pem() }
    }
}

fn files(dir: &Path, server: &Pair, client_ca: Option<&Authority>) -> TlsOptions {
    let write = |name: &str, text: &str| {
        let path = dir.join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    TlsOptions {
        tls_client_ca: client_ca.map(|ca| write("ca.pem", &ca.pem())),
        ..TlsOptions::new(write("cert.pem", &server.cert), write("key.pem", &server.key))
    }
}

async fn dial(
    addr: std::net::SocketAddr,
    ca: &Authority,
    client: Option<&Pair>,
) -> Result<Channel, tonic::transport::Error> {
    let mut tls =
        ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca.pem())).domain_name("localhost");
    if let Some(pair) = client {
        tls = tls.identity(Identity::from_pem(&pair.cert, &pair.key));
    }
    Channel::from_shared(format!("https://{addr}")).unwrap().tls_config(tls).unwrap().connect().await
}

async fn https(
    addr: std::net::SocketAddr,
    ca: &Authority,
    client: Option<&Pair>,
    path: &str,
) -> std::io::Result<crate::support::Answer> {
    get_over(connect(addr, ca, client).await?, path).await
}

async fn connect(
    addr: std::net::SocketAddr,
    ca: &Authority,
    client: Option<&Pair>,
) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.pem().as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let config = match client {
        None => builder.with_no_client_auth(),
        Some(pair) => {
            let cert = CertificateDer::from_pem_slice(pair.cert.as_bytes()).unwrap();
            let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).unwrap();
            builder.with_client_auth_cert(vec![cert], key).unwrap()
        }
    };
    let tcp = TcpStream::connect(addr).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, tcp).await
}

#[tokio::test]
async fn with_a_certificate_both_listeners_speak_only_tls() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Authority::new();
    let tls = files(dir.path(), &ca.sign("localhost"), None);
    // With TLS the collector may listen on any address.
    let config = config_with(&dir.path().join("data"), |config| {
        config.tls = tls;
        config.server.grpc_listen = ([0, 0, 0, 0], 0).into();
        config.server.http_listen = ([0, 0, 0, 0], 0).into();
    });
    let running = Collector::start(config).await.unwrap();
    let local = |port| std::net::SocketAddr::from(([127, 0, 0, 1], port));
    let (grpc, http) = (local(running.grpc_addr.port()), local(running.http_addr.port()));
    let mut pusher = Pusher::over(dial(grpc, &ca, None).await.unwrap()).await.unwrap();
    pusher.store(batch("shop", now_ms(), &[("main", 1)])).await;
    let answer = https(http, &ca, None, "/api/v1/labels").await.unwrap();
    assert_eq!(answer.status, 200, "{}", answer.text());
    // Plaintext fails, and so does a client that trusts another authority.
    let plain = Channel::from_shared(format!("http://{grpc}")).unwrap().connect_lazy();
    assert!(QueryServiceClient::new(plain).list_profiles(ListProfilesRequest::default()).await.is_err());
    assert!(dial(grpc, &Authority::new(), None).await.is_err());
    assert!(https(http, &Authority::new(), None, "/livez").await.is_err());
    running.shutdown().await;
}

#[tokio::test]
async fn with_a_client_authority_only_its_clients_and_probes_get_in() {
    let dir = tempfile::tempdir().unwrap();
    let (ca, clients, strangers) = (Authority::new(), Authority::new(), Authority::new());
    let tls = files(dir.path(), &ca.sign("localhost"), Some(&clients));
    let running = Collector::start(config_with(&dir.path().join("data"), |config| {
        config.tls = tls;
        config.server.debug_listen = Some(([127, 0, 0, 1], 0).into());
    }))
    .await
    .unwrap();
    let (grpc, http) = (running.grpc_addr, running.http_addr);
    let (client, stranger) = (clients.sign("agent"), strangers.sign("agent"));
    for who in [None, Some(&stranger)] {
        // Under TLS 1.3 the refusal shows with the first call.
        let refused = match dial(grpc, &ca, who).await {
            Err(_) => true,
            Ok(channel) => {
                QueryServiceClient::new(channel).list_profiles(ListProfilesRequest::default()).await.is_err()
            }
        };
        assert!(refused);
    }
    let known = dial(grpc, &ca, Some(&client)).await.unwrap();
    let rule = rules::parse("rules: [{id: a, match: {comm: [x]}}]", "test").unwrap();
    let mut triggers = TriggerServiceClient::new(known);
    triggers.set_triggers(SetTriggersRequest { rules: rule, ..Default::default() }).await.unwrap();
    let scope = triggers
        .get_triggers(gannet_proto::control::GetTriggersRequest::default())
        .await
        .unwrap()
        .into_inner();
    let who = scope.scope.unwrap().changed_by;
    assert!(who.contains("(certificate sha256:") && who.len() > 40, "{who}");

    let page = https(http, &ca, None, "/").await.unwrap();
    assert_eq!(page.status, 401);
    assert!(page.text().contains("--tls-client-ca"), "{}", page.text());
    let call = https(http, &ca, None, "/pyroscope/render").await.unwrap();
    assert_eq!((call.status, call.json()["code"].as_str()), (401, Some("unauthenticated")));
    for path in ["/livez", "/readyz"] {
        assert_eq!(https(http, &ca, None, path).await.unwrap().status, 200);
    }
    assert_eq!(https(http, &ca, Some(&client), "/api/v1/rules").await.unwrap().status, 200);
    assert!(https(http, &ca, Some(&stranger), "/livez").await.is_err());

    // A client on this machine needs no certificate. A foreign page that reaches it by another name gets nothing.
    let local = running.debug_addr.unwrap();
    let answer = get_over(TcpStream::connect(local).await.unwrap(), "/api/v1/rules").await.unwrap();
    assert_eq!(answer.status, 200, "{}", answer.text());
    let mut stream = TcpStream::connect(local).await.unwrap();
    let request = "GET /api/v1/rules HTTP/1.1\r\nHost: rebound.example:80\r\nConnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    assert!(text.starts_with("HTTP/1.1 403"), "{text}");
    running.shutdown().await;
}

#[tokio::test]
async fn unusable_certificates_are_named_at_start() {
    let dir = tempfile::tempdir().unwrap();
    let (ca, other) = (Authority::new(), Authority::new());
    let good = files(dir.path(), &ca.sign("localhost"), None);
    let key = dir.path().join("other-key.pem");
    std::fs::write(&key, other.sign("localhost").key).unwrap();
    let missing = dir.path().join("missing.pem");
    let cases = [
        (TlsOptions { tls_cert: Some(missing.clone()), ..good.clone() }, "--tls-cert"),
        (TlsOptions { tls_cert: good.tls_key.clone(), ..good.clone() }, "no certificate"),
        (TlsOptions { tls_key: good.tls_cert.clone(), ..good.clone() }, "no private key"),
        (TlsOptions { tls_key: Some(key), ..good.clone() }, "does not go with"),
        (TlsOptions { tls_client_ca: Some(missing), ..good.clone() }, "--tls-client-ca"),
    ];
    for (tls, says) in cases {
        let config = config_with(&dir.path().join("data"), |config| config.tls = tls);
        let error = Collector::start(config).await.err().expect(says).to_string();
        assert!(error.contains(says), "{error}");
    }
}

/// Opens a control stream as this node, and returns whether it gets rules or a refusal.
async fn hello(channel: Channel, node: &str, token: Option<&str>) -> Result<(), Status> {
    let (out, receiver) = mpsc::channel(4);
    let hello = NodeHello { node: node.into(), ..NodeHello::default() };
    out.send(AgentMessage { message: Some(agent_message::Message::Hello(hello)) }).await.unwrap();
    let mut request = tonic::Request::new(ReceiverStream::new(receiver));
    if let Some(token) = token {
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    }
    let mut stream = AgentServiceClient::new(channel).connect(request).await?.into_inner();
    stream.message().await.map(|message| assert!(message.is_some(), "rules are pushed"))
}

#[tokio::test]
async fn roles_and_node_names_follow_the_certificate() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Authority::new();
    let tls = files(dir.path(), &ca.sign("localhost"), Some(&ca));
    let roles = ["editor=anna", "viewer=group:developers", "agent=group:agents"];
    let config = config_with(&dir.path().join("data"), |config| {
        config.tls = tls;
        config.auth.role = roles.map(|role| role.parse().unwrap()).to_vec();
        config.auth.node_identity = NodeIdentity::Certificate;
    });
    let running = Collector::start(config).await.unwrap();
    let as_who = async |pair: &Pair| dial(running.grpc_addr, &ca, Some(pair)).await.unwrap();
    let anna = as_who(&ca.issue("anna", "people", "")).await;
    let bert = as_who(&ca.issue("bert", "developers", "")).await;
    let agent = as_who(&ca.issue("gannet-agent", "agents", "n1.example")).await;
    let nobody = as_who(&ca.issue("nobody", "people", "")).await;

    TriggerServiceClient::new(anna.clone()).set_triggers(one("a")).await.unwrap();
    for (who, name) in [(&bert, "bert"), (&agent, "gannet-agent"), (&nobody, "nobody")] {
        let status = TriggerServiceClient::new(who.clone()).set_triggers(one("b")).await.unwrap_err();
        assert_eq!(status.code(), Code::PermissionDenied, "{name}");
        assert!(status.message().contains(name) && status.message().contains("--role editor="), "{status}");
    }
    for (who, may) in [(&anna, true), (&bert, true), (&agent, false), (&nobody, false)] {
        let listed = TriggerServiceClient::new(who.clone()).list_scopes(ListScopesRequest {}).await;
        assert_eq!(listed.is_ok(), may, "{listed:?}");
    }
    // A dry run requires the editor role, too. The list of deletions does not.
    for (who, may_list, may_delete) in
        [(&anna, true, true), (&bert, true, false), (&agent, false, false), (&nobody, false, false)]
    {
        let mut client = DeletionServiceClient::new(who.clone());
        let listed = client.list_deletions(ListDeletionsRequest {}).await;
        assert_eq!(listed.is_ok(), may_list, "{listed:?}");
        for dry_run in [true, false] {
            let until = Some(crate::support::at(1000));
            let request = DeleteProfilesRequest { dry_run, until, ..DeleteProfilesRequest::default() };
            let deleted = client.delete_profiles(request).await;
            let refusal = deleted.as_ref().err().map(tonic::Status::code);
            assert_eq!(refusal, (!may_delete).then_some(Code::PermissionDenied), "{deleted:?}");
        }
    }
    let audit = std::fs::read_to_string(dir.path().join("data/rules/audit.jsonl")).unwrap();
    let deletions: Vec<&str> = audit.lines().filter(|line| line.contains("delete-profiles")).collect();
    assert!(deletions.len() == 1 && deletions[0].contains("\"who\":\"anna (certificate"), "{deletions:?}");
    let scope = TriggerServiceClient::new(bert.clone())
        .get_triggers(gannet_proto::control::GetTriggersRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert!(scope.scope.unwrap().changed_by.starts_with("anna (certificate sha256:"));

    // An agent may speak only for the node that its certificate names.
    hello(agent.clone(), "n1.example", None).await.unwrap();
    let status = hello(agent.clone(), "n2.example", None).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    assert!(status.message().contains("n2.example") && status.message().contains("n1.example"), "{status}");
    let status = hello(bert, "bert", None).await.unwrap_err();
    assert!(status.message().contains("the role agent"), "{status}");
    let refused = Pusher::over(agent).await.err().expect("the pusher calls itself n1");
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");

    // The page requires the viewer role too.
    let by =
        async |pair: &Pair| https(running.http_addr, &ca, Some(pair), "/api/v1/rules").await.unwrap().status;
    assert_eq!(by(&ca.issue("carl", "developers", "")).await, 200);
    assert_eq!(by(&ca.issue("nobody", "people", "")).await, 403);
    // So does Grafana, which gets the reason in the form that it reads.
    let (carl, stranger) = (ca.issue("carl", "developers", ""), ca.issue("nobody", "people", ""));
    let path = "/pyroscope/render?query=a:b:c:d:e";
    let answer = https(running.http_addr, &ca, Some(&stranger), path).await.unwrap();
    assert_eq!((answer.status, answer.json()["code"].as_str()), (403, Some("permission_denied")));
    assert_eq!(https(running.http_addr, &ca, Some(&carl), path).await.unwrap().status, 200);
    // A client of Pyroscope needs the agent role to push, and may not take a node's name.
    let push = async |pair: &Pair, name: &str| {
        let tls = connect(running.http_addr, &ca, Some(pair)).await.unwrap();
        let path = format!("/ingest?format=folded&name={name}");
        crate::support::post_over(tls, &path, &[], b"main 1").await
    };
    let sdk = ca.issue("n1.example", "agents", "");
    assert_eq!(push(&carl, "shop").await.status, 403);
    assert_eq!(push(&sdk, "shop").await.status, 200);
    assert_eq!(push(&sdk, "shop{node=n1.example}").await.status, 200);
    let refused = push(&sdk, "shop{node=n2.example}").await;
    assert!(refused.status == 403 && refused.text().contains("node is `n2.example`"), "{}", refused.text());
    running.shutdown().await;
}

#[tokio::test]
async fn a_verified_agent_cannot_push_for_another_node() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Authority::new();
    let config = config_with(&dir.path().join("data"), |config| {
        config.tls = files(dir.path(), &ca.sign("localhost"), Some(&ca));
        config.auth.node_identity = NodeIdentity::Certificate;
    });
    let running = Collector::start(config).await.unwrap();
    let agent = dial(running.grpc_addr, &ca, Some(&ca.issue("n1", "agents", ""))).await.unwrap();
    let mut pusher = Pusher::over(agent).await.unwrap();
    pusher.store(batch("shop", now_ms(), &[("main", 1)])).await;
    let mut other = batch("shop", now_ms(), &[("main", 1)]);
    other.labels.insert("node".into(), "n2".into());
    match pusher.push(other).await {
        gannet_proto::ingest::push_response::Message::Refused(refused) => {
            assert_eq!(refused.code, "wrong_node");
            assert!(refused.reason.contains("n2"), "{}", refused.reason);
        }
        taken => panic!("{taken:?}"),
    }
    running.shutdown().await;
}

#[tokio::test]
async fn changed_certificates_are_used_without_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (Authority::new(), Authority::new());
    let tls = files(dir.path(), &old.sign("localhost"), Some(&old));
    let reload_interval = std::time::Duration::from_millis(50);
    let config = config_with(&dir.path().join("data"), |config| {
        config.tls = TlsOptions { reload_interval, ..tls.clone() };
    });
    let running = Collector::start(config).await.unwrap();
    let lists = async |ca: &Authority| match dial(running.grpc_addr, ca, Some(&ca.sign("anna"))).await {
        Err(_) => false,
        Ok(channel) => {
            QueryServiceClient::new(channel).list_profiles(ListProfilesRequest::default()).await.is_ok()
        }
    };
    let standing = dial(running.grpc_addr, &old, Some(&old.sign("anna"))).await.unwrap();
    let mut standing = QueryServiceClient::new(standing);
    standing.list_profiles(ListProfilesRequest::default()).await.unwrap();
    assert!(!lists(&new).await);
    // After half of a change the former certificates stay in use.
    let pair = new.sign("localhost");
    std::fs::write(tls.tls_cert.as_ref().unwrap(), &pair.cert).unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    assert!(lists(&old).await);
    std::fs::write(tls.tls_key.as_ref().unwrap(), &pair.key).unwrap();
    std::fs::write(tls.tls_client_ca.as_ref().unwrap(), new.pem()).unwrap();
    eventually("the new ones are in use", || async { lists(&new).await }).await;
    assert!(!lists(&old).await, "who has a certificate of the former authority is a stranger now");
    // Open connections stay.
    standing.list_profiles(ListProfilesRequest::default()).await.unwrap();
    let answer = https(running.http_addr, &new, Some(&new.sign("anna")), "/api/v1/labels").await.unwrap();
    assert_eq!(answer.status, 200);
    running.shutdown().await;
}

/// Starts an API server that knows two tokens with the audience `gannet`.
async fn api_server(dir: &Path) -> std::path::PathBuf {
    let review = async |Json(review): Json<Value>| {
        let user = |name: &str, node: Value| {
            json!({
                "username": name, "groups": ["system:serviceaccounts"],
                "extra": { "authentication.kubernetes.io/node-name": [node] },
            })
        };
        let status = match review["spec"]["token"].as_str().unwrap() {
            "of-an-agent" => json!({
                "authenticated": true, "audiences": ["gannet"],
                "user": user("system:serviceaccount:gannet:agent", json!("n1")),
            }),
            "of-an-editor" => json!({
                "authenticated": true, "audiences": ["gannet"],
                "user": user("system:serviceaccount:gannet:editor", json!("n9")),
            }),
            // The answer of an API server that ignores audiences.
            "for-another-audience" => json!({ "authenticated": true, "user": user("x", json!("n1")) }),
            _ => json!({ "authenticated": false, "error": "invalid bearer token" }),
        };
        let answer = json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "metadata": {},
            "spec": review["spec"], "status": status,
        });
        (axum::http::StatusCode::CREATED, Json(answer))
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = format!("http://{}", listener.local_addr().unwrap());
    let router = Router::new().route("/apis/authentication.k8s.io/v1/tokenreviews", post(review));
    tokio::spawn(async move { axum::serve(listener, router).await });
    crate::kubernetes::kubeconfig(dir, &server)
}

#[tokio::test]
async fn tokens_are_reviewed_for_audience_role_and_node() {
    let dir = tempfile::tempdir().unwrap();
    let roles = ["editor=system:serviceaccount:gannet:editor", "agent=system:serviceaccount:gannet:agent"];
    let kubeconfig = api_server(dir.path()).await;
    let config = config_with(&dir.path().join("data"), |config| {
        config.kubeconfig = Some(kubeconfig);
        config.auth.token_audience = Some("gannet".into());
        config.auth.role = roles.map(|role| role.parse().unwrap()).to_vec();
        config.auth.node_identity = NodeIdentity::Token;
    });
    let running = Collector::start(config).await.unwrap();
    let set = async |token: Option<&str>| {
        let mut request = tonic::Request::new(one("a"));
        if let Some(token) = token {
            request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        }
        TriggerServiceClient::new(channel(running.grpc_addr).await).set_triggers(request).await
    };
    set(Some("of-an-editor")).await.unwrap();
    for (token, code, words) in [
        (None, Code::Unauthenticated, "--token-file"),
        (Some("made-up"), Code::Unauthenticated, "invalid bearer token"),
        (Some("for-another-audience"), Code::Unauthenticated, "audience gannet"),
        (Some("of-an-agent"), Code::PermissionDenied, "the role editor"),
    ] {
        let status = set(token).await.unwrap_err();
        assert!(status.code() == code && status.message().contains(words), "{token:?}: {status}");
    }
    let to = channel(running.grpc_addr).await;
    hello(to.clone(), "n1", Some("of-an-agent")).await.unwrap();
    let status = hello(to.clone(), "n2", Some("of-an-agent")).await.unwrap_err();
    assert!(status.code() == Code::PermissionDenied && status.message().contains("n1"), "{status}");
    let status = hello(to, "n9", Some("of-an-editor")).await.unwrap_err();
    assert!(status.message().contains("the role agent"), "{status}");
    running.shutdown().await;
}

#[tokio::test]
async fn the_collectors_own_token_is_read_for_each_request() {
    use axum::http::{HeaderMap, StatusCode};

    let dir = tempfile::tempdir().unwrap();
    let valid = std::sync::Arc::new(std::sync::Mutex::new("first".to_owned()));
    let seen = std::sync::Arc::clone(&valid);
    let review = async move |headers: HeaderMap, Json(review): Json<Value>| {
        let wanted = format!("Bearer {}", seen.lock().unwrap());
        if headers.get("authorization").and_then(|value| value.to_str().ok()) != Some(&wanted) {
            let refusal = json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 401,
                "message": "Unauthorized", "reason": "Unauthorized" });
            return (StatusCode::UNAUTHORIZED, Json(refusal));
        }
        let answer = json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "metadata": {}, "spec": review["spec"],
            "status": { "authenticated": true, "audiences": ["gannet"], "user": { "username": "editor" } },
        });
        (StatusCode::CREATED, Json(answer))
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = format!("http://{}", listener.local_addr().unwrap());
    let router = Router::new().route("/apis/authentication.k8s.io/v1/tokenreviews", post(review));
    tokio::spawn(async move { axum::serve(listener, router).await });
    let token = dir.path().join("token");
    std::fs::write(&token, "first\n").unwrap();
    let kubeconfig = crate::kubernetes::kubeconfig(dir.path(), &server);
    let with_token = std::fs::read_to_string(&kubeconfig).unwrap();
    let with_token =
        with_token.replace("\"user\":{}", &format!("\"user\":{}", json!({ "tokenFile": token })));
    std::fs::write(&kubeconfig, with_token).unwrap();
    let config = config_with(&dir.path().join("data"), |config| {
        config.kubeconfig = Some(kubeconfig);
        config.auth.token_audience = Some("gannet".into());
        config.auth.role = vec!["editor=editor".parse().unwrap()];
    });
    let running = Collector::start(config).await.unwrap();
    // A new token of the client each time, so that no answer is remembered.
    let set = async |client: &str| {
        let mut request = tonic::Request::new(one("a"));
        request.metadata_mut().insert("authorization", format!("Bearer {client}").parse().unwrap());
        TriggerServiceClient::new(channel(running.grpc_addr).await).set_triggers(request).await
    };
    set("client-1").await.unwrap();
    // From now on the API server knows only the next token.
    "second".clone_into(&mut valid.lock().unwrap());
    let status = set("client-2").await.unwrap_err();
    assert!(status.message().contains("Unauthorized"), "{status}");
    std::fs::write(&token, "second\n").unwrap();
    set("client-3").await.unwrap();
    running.shutdown().await;
}
