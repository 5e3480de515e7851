//! Helpers of all tests.

use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    path::Path,
    time::Duration,
};

use gannet_base::{ByteSize, TimeSpan};
use gannet_collector::{Collector, Config, Running};
use gannet_proto::{
    ingest::{
        Batch, PushRequest, PushResponse, ingest_service_client::IngestServiceClient, push_request,
        push_response,
    },
    pprof::{Builder, Header, Line, Mapping, Profile, encode},
    query::{GetProfileRequest, query_service_client::QueryServiceClient},
};
use prost_types::Timestamp;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpStream,
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Channel};
use ulid::Ulid;

/// Longest wait of a test: enough for a busy machine, and short enough to notice a hang.
pub const TEST_TIMEOUT: Duration = Duration::from_secs(30);

pub fn config(data: &Path) -> Config {
    config_with(data, |_| {})
}

/// Returns the configuration of the tests, changed by `change`.
pub fn config_with(data: &Path, change: impl FnOnce(&mut Config)) -> Config {
    let mut config = Config::new(data);
    config.store.min_free_bytes = ByteSize(0);
    config.store.flush_interval = TimeSpan(Duration::from_millis(5));
    change(&mut config);
    config
}

pub async fn start(data: &Path) -> Running {
    Collector::start(config(data)).await.unwrap()
}

pub async fn channel(addr: SocketAddr) -> Channel {
    Channel::from_shared(format!("http://{addr}")).unwrap().connect().await.unwrap()
}

pub async fn queries(running: &Running) -> QueryServiceClient<Channel> {
    QueryServiceClient::new(channel(running.grpc_addr).await).max_decoding_message_size(64 << 20)
}

pub fn now_ms() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64
}

pub fn at(ms: u64) -> Timestamp {
    Timestamp { seconds: (ms / 1000) as i64, nanos: (ms % 1000 * 1_000_000) as i32 }
}

/// Stacks with their samples, root first: `("main;work;sum", 3)`.
pub type Stacks<'a> = &'a [(&'a str, i64)];

pub fn profile(types: [(&str, &str); 2], stacks: Stacks<'_>) -> Profile {
    let period = 10_000_000;
    let mut builder = Builder::new(Header {
        sample_types: &types,
        period_type: types[1],
        period,
        time_nanos: 1_700_000_000_000_000_000,
        duration_nanos: 10_000_000_000,
    });
    let mapping = builder.mapping(Mapping {
        start: 0x1000,
        limit: 0x9000,
        offset: 0,
        file: "/usr/bin/shop",
        build_id: "ab",
    });
    for (stack, n) in stacks {
        let stack: Vec<_> = stack
            .rsplit(';')
            .map(|name| {
                let address = 0x1000 + name.bytes().map(u64::from).sum::<u64>();
                let line =
                    Line { name, system_name: name, file: "shop.c", line: 1, column: 0, start_line: 1 };
                builder.location(Some(mapping), address, &[line])
            })
            .collect();
        builder.sample(&stack, &[*n, n * period], &[]);
    }
    builder.finish()
}

pub const CPU: [(&str, &str); 2] = [("samples", "count"), ("cpu", "nanoseconds")];
pub const OFF_CPU: [(&str, &str); 2] = [("events", "count"), ("offcpu", "nanoseconds")];

pub fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

/// Returns a batch of one service, as an agent makes it: ten seconds from `start_ms`.
pub fn batch(service: &str, start_ms: u64, stacks: Stacks<'_>) -> Batch {
    typed_batch(CPU, service, start_ms, stacks)
}

pub fn typed_batch(types: [(&str, &str); 2], service: &str, start_ms: u64, stacks: Stacks<'_>) -> Batch {
    Batch {
        batch_id: Ulid::new().to_string(),
        sequence: 1,
        labels: labels(&[("service_name", service), ("node", "n1")]),
        pprof: encode(&profile(types, stacks)),
        samples: stacks.iter().map(|(_, n)| *n as u64).sum(),
        start: Some(at(start_ms)),
        duration: Some(prost_types::Duration { seconds: 10, nanos: 0 }),
        rule_id: "r1".into(),
        revision: 7,
        reason: "always".into(),
        ..Batch::default()
    }
}

/// One push stream.
pub struct Pusher {
    requests: mpsc::Sender<PushRequest>,
    answers: Streaming<PushResponse>,
    pub limits: push_response::Limits,
}

impl Pusher {
    pub async fn open(addr: SocketAddr) -> Self {
        Self::over(channel(addr).await).await.unwrap()
    }

    pub async fn over(channel: Channel) -> Result<Self, tonic::Status> {
        Self::with_clock(channel, 0).await
    }

    /// Opens a stream of a node whose clock is ahead of the true time.
    pub async fn with_clock(channel: Channel, ahead_ms: i64) -> Result<Self, tonic::Status> {
        let (requests, receiver) = mpsc::channel(256);
        let hello = push_request::Hello {
            node: "n1".into(),
            version: "test".into(),
            at: Some(at(now_ms().saturating_add_signed(ahead_ms))),
        };
        requests.send(PushRequest { message: Some(push_request::Message::Hello(hello)) }).await.unwrap();
        let mut client = IngestServiceClient::new(channel).max_encoding_message_size(64 << 20);
        let mut answers = client.push(ReceiverStream::new(receiver)).await?.into_inner();
        match answers.message().await?.and_then(|a| a.message) {
            Some(push_response::Message::Limits(limits)) => Ok(Self { requests, answers, limits }),
            None => Err(tonic::Status::unavailable("the stream ended before the limits")),
            other => panic!("the first answer is not limits: {other:?}"),
        }
    }

    pub async fn send(&mut self, batch: Batch) -> bool {
        self.requests.send(PushRequest { message: Some(push_request::Message::Batch(batch)) }).await.is_ok()
    }

    /// Sends batches until each is accepted, and throttled ones again, as an agent does. Returns how many were accepted as
    /// duplicates, and how often one was throttled.
    pub async fn store_all(&mut self, batches: &[Batch]) -> (usize, usize) {
        let (mut duplicates, mut throttled) = (0, 0);
        let mut unsent: VecDeque<&Batch> = batches.iter().collect();
        let mut waiting: BTreeMap<&str, &Batch> = BTreeMap::new();
        while !unsent.is_empty() || !waiting.is_empty() {
            while waiting.len() < 32
                && let Some(batch) = unsent.pop_front()
            {
                assert!(self.send(batch.clone()).await);
                waiting.insert(&batch.batch_id, batch);
            }
            match self.answer().await.expect("the stream ended without an answer") {
                push_response::Message::Accepted(accepted) => {
                    assert!(waiting.remove(accepted.batch_id.as_str()).is_some());
                    duplicates += usize::from(accepted.duplicate);
                }
                push_response::Message::Throttled(answer) => {
                    throttled += 1;
                    unsent.push_back(waiting.remove(answer.batch_id.as_str()).unwrap());
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                other => panic!("{other:?}"),
            }
        }
        (duplicates, throttled)
    }

    pub async fn answer(&mut self) -> Option<push_response::Message> {
        let answer =
            tokio::time::timeout(TEST_TIMEOUT, self.answers.message()).await.expect("no answer in time");
        answer.ok()??.message
    }

    /// Returns the error that ends the stream, after all answers before it.
    pub async fn end(&mut self) -> tonic::Status {
        loop {
            match tokio::time::timeout(TEST_TIMEOUT, self.answers.message()).await.expect("no end in time") {
                Ok(Some(_)) => {}
                Ok(None) => panic!("the stream ended without an error"),
                Err(status) => return status,
            }
        }
    }

    pub async fn push(&mut self, batch: Batch) -> push_response::Message {
        assert!(self.send(batch).await);
        self.answer().await.expect("the stream ended without an answer")
    }

    /// Pushes a batch that the collector must accept as new.
    #[track_caller]
    pub fn store(&mut self, batch: Batch) -> impl Future<Output = ()> {
        let caller = std::panic::Location::caller();
        async move {
            match self.push(batch).await {
                push_response::Message::Accepted(a) => assert!(!a.duplicate, "{caller}: a duplicate"),
                other => panic!("{caller}: not accepted: {other:?}"),
            }
        }
    }
}

/// Returns the bytes of a profile, or the error of the collector.
pub async fn download(running: &Running, id: &str) -> Result<Vec<u8>, tonic::Status> {
    let request = GetProfileRequest { id: id.to_owned(), ..Default::default() };
    let mut chunks = queries(running).await.get_profile(request).await?.into_inner();
    let mut bytes = Vec::new();
    while let Some(chunk) = chunks.message().await? {
        bytes.extend(chunk.data);
    }
    Ok(bytes)
}

/// An HTTP answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e} in: {}", self.text()))
    }
}

pub async fn get(addr: SocketAddr, path: &str) -> Answer {
    get_over(TcpStream::connect(addr).await.unwrap(), path).await.unwrap()
}

/// Sends a plain GET. The server closes the connection after the answer.
pub async fn get_over(mut io: impl AsyncRead + AsyncWrite + Unpin, path: &str) -> std::io::Result<Answer> {
    send(&mut io, "GET", path, &[], &[]).await?;
    read_answer(io).await
}

/// Sends a body by POST.
pub async fn post(addr: SocketAddr, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
    post_over(TcpStream::connect(addr).await.unwrap(), path, headers, body).await
}

pub async fn post_over(
    mut io: impl AsyncRead + AsyncWrite + Unpin,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Answer {
    // The server may refuse a body before it has read all of it.
    let _ = send(&mut io, "POST", path, headers, body).await;
    read_answer(io).await.unwrap()
}

async fn send(
    io: &mut (impl AsyncWrite + Unpin),
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> std::io::Result<()> {
    let path: String = path
        .chars()
        .map(|c| match c {
            ' ' | '"' | '{' | '}' | '+' => format!("%{:02X}", c as u32),
            c => c.to_string(),
        })
        .collect();
    let length = ("Content-Length", body.len().to_string());
    let length = (method == "POST").then_some((length.0, length.1.as_str()));
    let headers = headers.iter().copied().chain(length).map(|(name, value)| format!("{name}: {value}\r\n"));
    let head: String =
        std::iter::once(format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"))
            .chain(headers)
            .collect();
    io.write_all(format!("{head}\r\n").as_bytes()).await?;
    io.write_all(body).await
}

async fn read_answer(mut io: impl AsyncRead + Unpin) -> std::io::Result<Answer> {
    let mut raw = Vec::new();
    if let Err(e) = io.read_to_end(&mut raw).await
        && raw.is_empty()
    {
        return Err(e);
    }
    let end = raw.windows(4).position(|w| w == b"\r\n\r\n").expect("no end of headers");
    let head = String::from_utf8(raw[..end].to_vec()).unwrap();
    let mut lines = head.lines();
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let headers: BTreeMap<String, String> = lines
        .filter_map(|l| l.split_once(": "))
        .map(|(k, v)| (k.to_ascii_lowercase(), v.to_owned()))
        .collect();
    let mut body = raw[end + 4..].to_vec();
    if headers.get("transfer-encoding").is_some_and(|e| e == "chunked") {
        body = unchunk(&body);
    }
    Ok(Answer { status, headers, body })
}

fn unchunk(mut rest: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    loop {
        let end = rest.windows(2).position(|w| w == b"\r\n").unwrap();
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..end]).unwrap(), 16).unwrap();
        if size == 0 {
            return out;
        }
        out.extend_from_slice(&rest[end + 2..end + 2 + size]);
        rest = &rest[end + 4 + size..];
    }
}

/// Returns the value of a metric, or 0 if the scrape does not show it.
pub async fn metric(addr: SocketAddr, name: &str) -> f64 {
    let text = get(addr, "/metrics").await.text();
    let line = text.lines().find(|l| l.strip_prefix(name).is_some_and(|rest| rest.starts_with(' ')));
    line.and_then(|l| l.rsplit(' ').next()).map_or(0.0, |v| v.parse().unwrap())
}

/// Waits until the condition holds.
pub async fn eventually<F: Future<Output = bool>>(what: &str, mut check: impl FnMut() -> F) {
    let deadline = tokio::time::Instant::now() + TEST_TIMEOUT;
    while !check().await {
        assert!(tokio::time::Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
