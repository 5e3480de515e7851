//! OTLP profiles, to receivers that record what they get, and from senders as OpenTelemetry's clients are.

use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router, body::Bytes, extract::State, http::HeaderMap, response::IntoResponse as _, routing::post,
};
use gannet_collector::{Collector, Running};
use gannet_proto::{
    ingest::Batch,
    pprof::{self, Merger, Profile},
    query::{ListProfilesRequest, Selection},
};
use opentelemetry_proto::tonic::collector::profiles::v1development::{
    ExportProfilesPartialSuccess, ExportProfilesServiceRequest, ExportProfilesServiceResponse,
    profiles_service_client::ProfilesServiceClient,
    profiles_service_server::{ProfilesService, ProfilesServiceServer},
};
use prost::Message as _;
use tokio::{net::TcpListener, sync::Semaphore};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Code, Request, Response, Status, codec::CompressionEncoding, metadata::MetadataMap};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::support::{
    Pusher, batch, channel, config_with, download, eventually, get, metric, now_ms, queries, start,
};

/// What the receiver answers next.
#[derive(Clone, Debug)]
enum Script {
    Fail(Code, Option<Duration>),
    Reject(i64),
    /// Refuses requests with more than one resource, or with this service.
    OnlyWithout(&'static str),
}

#[derive(Clone, Default)]
struct Receiver {
    requests: Arc<Mutex<Vec<ExportProfilesServiceRequest>>>,
    metadata: Arc<Mutex<Vec<MetadataMap>>>,
    script: Arc<Mutex<VecDeque<Script>>>,
    /// Requests wait here until the test lets them go on.
    gate: Option<Arc<Semaphore>>,
}

fn services(request: &ExportProfilesServiceRequest) -> Vec<String> {
    let resources = request.resource_profiles.iter().filter_map(|profiles| profiles.resource.as_ref());
    let services = resources.flat_map(|resource| &resource.attributes).filter(|a| a.key == "service.name");
    services.map(|a| format!("{:?}", a.value)).collect()
}

impl Receiver {
    fn answer(&self, request: ExportProfilesServiceRequest) -> Result<ExportProfilesServiceResponse, Status> {
        let mut script = self.script.lock().unwrap();
        match script.front().cloned() {
            Some(Script::OnlyWithout(service)) => {
                let services = services(&request);
                if services.iter().any(|have| have.contains(service)) {
                    return Err(Status::invalid_argument(format!("no {service} here")));
                }
            }
            Some(Script::Fail(code, after)) => {
                script.pop_front();
                let details = ErrorDetails::with_retry_info(after);
                return Err(Status::with_error_details(code, "scripted", details));
            }
            Some(Script::Reject(rejected_profiles)) => {
                script.pop_front();
                self.requests.lock().unwrap().push(request);
                let error_message = "two are enough".to_owned();
                let partial_success = Some(ExportProfilesPartialSuccess { rejected_profiles, error_message });
                return Ok(ExportProfilesServiceResponse { partial_success });
            }
            None => {}
        }
        drop(script);
        self.requests.lock().unwrap().push(request);
        Ok(ExportProfilesServiceResponse::default())
    }

    async fn grpc(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let service = ProfilesServiceServer::new(self.clone()).accept_compressed(CompressionEncoding::Gzip);
        let server = tonic::transport::Server::builder().add_service(service);
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        format!("otlp=http://{addr}")
    }

    /// Serves OTLP over HTTP. The scripted codes become statuses of HTTP.
    async fn http(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let export = async |State(receiver): State<Self>, headers: HeaderMap, body: Bytes| {
            assert_eq!(
                (&headers["content-type"], &headers["content-encoding"]),
                (&"application/x-protobuf".parse().unwrap(), &"gzip".parse().unwrap())
            );
            receiver.metadata.lock().unwrap().push(MetadataMap::from_headers(headers));
            let raw = pprof::inflate(&body, 8 << 20).unwrap();
            match receiver.answer(ExportProfilesServiceRequest::decode(&*raw).unwrap()) {
                Ok(response) => response.encode_to_vec().into_response(),
                Err(status) if status.code() == Code::Unavailable => {
                    (axum::http::StatusCode::SERVICE_UNAVAILABLE, [("retry-after", "1")], "scripted")
                        .into_response()
                }
                Err(_) => axum::http::StatusCode::BAD_REQUEST.into_response(),
            }
        };
        let router = Router::new().route("/v1development/profiles", post(export)).with_state(self.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        format!("otlp=http://{addr}/v1development/profiles")
    }

    fn all(&self) -> Vec<ExportProfilesServiceRequest> {
        self.requests.lock().unwrap().clone()
    }

    /// Number of resources in all requests.
    fn resources(&self) -> usize {
        self.all().iter().map(|request| request.resource_profiles.len()).sum()
    }
}

#[tonic::async_trait]
impl ProfilesService for Receiver {
    async fn export(
        &self,
        request: Request<ExportProfilesServiceRequest>,
    ) -> Result<Response<ExportProfilesServiceResponse>, Status> {
        if let Some(gate) = &self.gate {
            let _ = gate.acquire().await.unwrap();
        }
        self.metadata.lock().unwrap().push(request.metadata().clone());
        self.answer(request.into_inner()).map(Response::new)
    }
}

async fn forwarding(dir: &Path, target: &str) -> Running {
    let config = config_with(dir, |config| config.forward.forward = vec![target.parse().unwrap()]);
    Collector::start(config).await.unwrap()
}

/// Returns a batch whose profile has the time of the batch, as those of agents have.
fn of_now(service: &str) -> Batch {
    let now = now_ms();
    let mut batch = batch(service, now, &[("main;work", 3), ("main", 2)]);
    let mut profile = pprof::decode(&batch.pprof, 1 << 20).unwrap();
    profile.time_nanos = now as i64 * 1_000_000;
    batch.pprof = pprof::encode(&profile);
    batch
}

/// Stores profiles of these services.
async fn store(running: &Running, services: &[&str]) {
    let mut pusher = Pusher::open(running.grpc_addr).await;
    for service in services {
        pusher.store(of_now(service)).await;
    }
}

fn forward_lost(reason: &str) -> String {
    format!(r#"gannet_collector_forward_lost_profiles_total{{target="otlp",reason="{reason}"}}"#)
}

async fn count(addr: SocketAddr, name: &str) -> u64 {
    metric(addr, name).await as u64
}

const FORWARDED: &str = r#"gannet_collector_forward_profiles_total{target="otlp"}"#;

async fn requests_keep_the_rules(receiver: &Receiver, target: &str) {
    let dir = tempfile::tempdir().unwrap();
    receiver
        .script
        .lock()
        .unwrap()
        .push_back(Script::Fail(Code::Unavailable, Some(Duration::from_millis(20))));
    let running = forwarding(dir.path(), target).await;
    store(&running, &["shop", "pay"]).await;
    eventually("both profiles are there", || async { receiver.resources() == 2 }).await;
    for request in receiver.all() {
        assert_eq!(gannet_otlp::rules::breaches(&request), Vec::<String>::new());
        for resource in &request.resource_profiles {
            let attributes = &resource.resource.as_ref().unwrap().attributes;
            let keys: Vec<&str> = attributes.iter().map(|attribute| attribute.key.as_str()).collect();
            assert!(keys.contains(&"service.name") && keys.contains(&"k8s.node.name"), "{keys:?}");
            // One profile for each sample type: samples and time.
            assert_eq!(resource.scope_profiles[0].profiles.len(), 2);
        }
    }
    let metadata = receiver.metadata.lock().unwrap()[0].clone();
    assert_eq!(metadata.get("otlp-profiles-development-version").unwrap(), "1");
    let addr = running.http_addr;
    eventually("both are counted", || async move { count(addr, FORWARDED).await == 2 }).await;
    assert!(metric(addr, r#"gannet_collector_forward_retries_total{target="otlp"}"#).await >= 1.0);
    running.shutdown().await;
}

#[tokio::test]
async fn a_grpc_receiver_gets_requests_that_keep_all_rules() {
    let receiver = Receiver::default();
    let target = receiver.grpc().await;
    requests_keep_the_rules(&receiver, &target).await;
    // A receiver in Go answers with the compression of the request, whatever the client says that it reads.
    let read = receiver.metadata.lock().unwrap()[0].get("grpc-accept-encoding").cloned();
    assert!(read.is_some_and(|read| read.to_str().unwrap().contains("gzip")));
}

#[tokio::test]
async fn an_http_receiver_gets_requests_that_keep_all_rules() {
    let receiver = Receiver::default();
    let target = receiver.http().await;
    requests_keep_the_rules(&receiver, &target).await;
}

#[tokio::test]
async fn profiles_that_wait_travel_together() {
    let dir = tempfile::tempdir().unwrap();
    // Eight transmissions wait for the receiver, and the queue fills behind them.
    let gate = Arc::new(Semaphore::new(0));
    let receiver = Receiver { gate: Some(Arc::clone(&gate)), ..Receiver::default() };
    let running = forwarding(dir.path(), &receiver.grpc().await).await;
    let names: Vec<String> = (0..40).map(|number| format!("service{number}")).collect();
    store(&running, &names.iter().map(String::as_str).collect::<Vec<_>>()).await;
    gate.add_permits(1000);
    eventually("all profiles are there", || async { receiver.resources() == 40 }).await;
    let requests = receiver.all();
    assert!(requests.len() <= 20, "{} requests for 40 profiles", requests.len());
    for request in requests {
        assert_eq!(gannet_otlp::rules::breaches(&request), Vec::<String>::new());
    }
    running.shutdown().await;
}

#[tokio::test]
async fn a_refused_profile_takes_no_other_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let gate = Arc::new(Semaphore::new(0));
    let receiver = Receiver { gate: Some(Arc::clone(&gate)), ..Receiver::default() };
    receiver.script.lock().unwrap().push_back(Script::OnlyWithout("bad"));
    let running = forwarding(dir.path(), &receiver.grpc().await).await;
    let mut names: Vec<String> = (0..30).map(|number| format!("service{number}")).collect();
    names.insert(20, "bad".to_owned());
    store(&running, &names.iter().map(String::as_str).collect::<Vec<_>>()).await;
    gate.add_permits(1000);
    eventually("all others are there", || async { receiver.resources() == 30 }).await;
    let addr = running.http_addr;
    eventually("the bad one is counted", || async move { count(addr, &forward_lost("refused")).await == 1 })
        .await;
    assert_eq!(count(addr, FORWARDED).await, 30);
    running.shutdown().await;
}

#[tokio::test]
async fn profiles_that_a_receiver_rejects_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let receiver = Receiver::default();
    receiver.script.lock().unwrap().push_back(Script::Reject(2));
    let running = forwarding(dir.path(), &receiver.grpc().await).await;
    store(&running, &["shop"]).await;
    let addr = running.http_addr;
    eventually("the loss is counted", || async move { count(addr, &forward_lost("rejected")).await == 1 })
        .await;
    assert_eq!(count(addr, FORWARDED).await, 0);
    // Without an offer to try again, a request that is too much stays refused.
    receiver.script.lock().unwrap().push_back(Script::Fail(Code::ResourceExhausted, None));
    store(&running, &["pay"]).await;
    eventually("the refusal is counted", || async move { count(addr, &forward_lost("refused")).await == 1 })
        .await;
    running.shutdown().await;
}

/// Returns id, labels and content of the only profile of a service.
async fn stored(running: &Running, service: &str) -> (String, BTreeMap<String, String>, Profile) {
    let mut client = queries(running).await;
    let selector = format!(r#"{{service_name="{service}"}}"#);
    let selection = Some(Selection { query: selector, ..Selection::default() });
    let request = ListProfilesRequest { selection, ..ListProfilesRequest::default() };
    let listed = client.list_profiles(request).await.unwrap().into_inner().profiles;
    assert_eq!(listed.len(), 1, "{listed:?}");
    let id = listed[0].id.clone();
    let profile = pprof::decode(&download(running, &id).await.unwrap(), 8 << 20).unwrap();
    (id, listed[0].labels.clone(), profile)
}

fn normal(profile: &Profile) -> Vec<u8> {
    let mut merger = Merger::new();
    merger.add(profile).unwrap();
    merger.finish().unwrap().encode_to_vec()
}

/// One collector forwards to another: both have the same profile, with the same id, and once.
#[tokio::test]
async fn a_collector_takes_what_another_forwards() {
    let (near, far) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let receiver = start(far.path()).await;
    for target in [
        format!("otlp=http://{}", receiver.grpc_addr),
        format!("otlp=http://{}/v1development/profiles", receiver.http_addr),
    ] {
        let dir = near.path().join(target.len().to_string());
        let sender = forwarding(&dir, &target).await;
        let service = format!("shop{}", target.len());
        store(&sender, &[&service]).await;
        let addr = sender.http_addr;
        eventually("it is forwarded", || async move { count(addr, FORWARDED).await == 1 }).await;
        let (sent, got) = (stored(&sender, &service).await, stored(&receiver, &service).await);
        assert_eq!((&got.0, &got.1), (&sent.0, &sent.1));
        assert_eq!(normal(&got.2), normal(&sent.2));
        sender.shutdown().await;
    }
    receiver.shutdown().await;
}

/// Posts a body as a client of OTLP over HTTP. Returns status and body.
async fn post_profiles(addr: SocketAddr, headers: &[(&str, &str)], body: Vec<u8>) -> (u16, Vec<u8>) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(addr).await.unwrap();
    let headers: Vec<String> = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let head = format!(
        "POST /v1development/profiles HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {}\r\n{}\r\n",
        body.len(),
        headers.concat()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(&body).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
    let status = String::from_utf8_lossy(&answer[9..12]).parse().unwrap();
    (status, answer.split_off(end + 4))
}

const JSON: &str = r#"{
    "resourceProfiles": [{
        "resource": {"attributes": [{"key": "service.name", "value": {"stringValue": "from-json"}}]},
        "scopeProfiles": [{"profiles": [{
            "sampleType": {"typeStrindex": 1, "unitStrindex": 2}, "timeUnixNano": "TIME",
            "samples": [{"stackIndex": 1, "values": ["3"]}]
        }, {
            "sampleType": {"typeStrindex": 1, "unitStrindex": 2}, "timeUnixNano": "TIME",
            "samples": [{"stackIndex": 7, "values": ["3"]}]
        }]}]
    }],
    "dictionary": {
        "stringTable": ["", "samples", "count", "main"], "stackTable": [{}, {"locationIndices": [1]}],
        "locationTable": [{}, {"lines": [{"functionIndex": 1}]}], "functionTable": [{}, {"nameStrindex": 3}]
    }
}"#;

#[tokio::test]
async fn json_is_taken_and_a_bad_profile_in_it_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let body = JSON.replace("TIME", &format!("{}000000", now_ms()));
    let headers = [("content-type", "application/json")];
    let (status, answer) = post_profiles(running.http_addr, &headers, body.clone().into_bytes()).await;
    let answer: serde_json::Value = serde_json::from_slice(&answer).unwrap();
    assert_eq!((status, &answer["partialSuccess"]["rejectedProfiles"]), (200, &"1".into()), "{answer}");
    let why = answer["partialSuccess"]["errorMessage"].as_str().unwrap();
    assert!(why.contains("index 7 is not in stack_table"), "{why}");
    // The client sends it again, because the answer was lost: nothing is stored twice.
    post_profiles(running.http_addr, &headers, body.into_bytes()).await;
    let (_, labels, profile) = stored(&running, "from-json").await;
    assert_eq!(labels.len(), 1, "{labels:?}");
    assert_eq!(pprof::check(&profile).unwrap().totals, [3]);
    running.shutdown().await;
}

/// Each wrong request gets the status of OTLP, and a text that says what to do.
#[tokio::test]
async fn wrong_http_requests_are_refused_with_a_reason() {
    let dir = tempfile::tempdir().unwrap();
    let config = config_with(dir.path(), |config| {
        config.server.debug_listen = Some(([127, 0, 0, 1], 0).into());
    });
    let running = Collector::start(config).await.unwrap();
    let (json, protobuf) = (("content-type", "application/json"), ("content-type", "application/x-protobuf"));
    let version = "otlp-profiles-development-version";
    // In layout 1.9 a sample has attributes in field 3: 1.10 has a number there.
    let old = vec![0x0a, 0x0a, 0x12, 0x08, 0x12, 0x06, 0x12, 0x04, 0x1a, 0x02, 0x01, 0x02];
    for (headers, body, status, reason) in [
        (vec![], b"{}".to_vec(), 415, "content-type"),
        (vec![("content-type", "text/plain")], b"{}".to_vec(), 415, "application/json"),
        (vec![json], b"{".to_vec(), 400, "JSON"),
        (vec![protobuf], b"no protobuf".to_vec(), 400, "ExportProfilesServiceRequest"),
        (vec![protobuf], old, 400, "1.9"),
        (vec![json, (version, "2")], b"{}".to_vec(), 400, "version 1"),
        (vec![json, (version, "1"), (version, "1")], b"{}".to_vec(), 400, "several"),
        (vec![json, ("content-encoding", "br")], b"{}".to_vec(), 400, "gzip"),
        (vec![json, ("content-encoding", "gzip")], b"{}".to_vec(), 400, "cannot decompress"),
    ] {
        let (found, answer) = post_profiles(running.http_addr, &headers, body).await;
        let text = String::from_utf8_lossy(&answer);
        assert!(found == status && text.contains(reason), "{headers:?}: {found} {text}");
    }
    for (headers, want) in [(vec![json], 200), (vec![json, ("origin", "http://evil")], 403)] {
        let (status, _) = post_profiles(running.http_addr, &headers, b"{}".to_vec()).await;
        assert_eq!(status, want, "a request without profiles, and one of a web page: {headers:?}");
    }
    let (status, _) = post_profiles(running.debug_addr.unwrap(), &[json], b"{}".to_vec()).await;
    assert_eq!(status, 404, "the loopback listener takes no profiles");
    running.shutdown().await;
}

#[tokio::test]
async fn wrong_grpc_requests_are_refused_with_a_reason() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut client = ProfilesServiceClient::new(channel(running.grpc_addr).await);
    let mut request = Request::new(ExportProfilesServiceRequest::default());
    request.metadata_mut().insert("otlp-profiles-development-version", "9".parse().unwrap());
    let status = client.export(request).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("version 1"), "{status}");
    let mut strings = ExportProfilesServiceRequest::default();
    strings.dictionary.get_or_insert_default().string_table.push("not empty".into());
    let status = client.export(strings).await.unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (Code::InvalidArgument, "string_table[0] of the dictionary is not the empty string")
    );
    assert!(get(running.http_addr, "/readyz").await.text().contains("ready"));
    running.shutdown().await;
}

/// Sixteen senders that began a request and send no body take all room: another one is asked to come later, before it is read.
#[tokio::test]
async fn requests_in_memory_have_a_bound() {
    use tokio::io::AsyncWriteExt as _;
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut slow = Vec::new();
    for _ in 0..16 {
        let mut stream = tokio::net::TcpStream::connect(running.http_addr).await.unwrap();
        let head = "POST /v1development/profiles HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
                    content-length: 9\r\n\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
        slow.push(stream);
    }
    let send = async || {
        post_profiles(running.http_addr, &[("content-type", "application/json")], b"{}".to_vec()).await
    };
    eventually("there is no room", || async { send().await.0 == 503 }).await;
    let text = String::from_utf8(send().await.1).unwrap();
    assert!(text.contains("try again"), "{text}");
    drop(slow);
    eventually("there is room again", || async { send().await.0 == 200 }).await;
    running.shutdown().await;
}
