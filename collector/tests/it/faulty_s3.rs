//! A proxy in front of an S3 server that fails as a network and a busy service do.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    body::Bytes,
    extract::{Request, State},
    http::{HeaderMap, Method, StatusCode, Uri, header, request::Parts},
    response::{IntoResponse, Response},
};

/// Faults of 1,000 requests, each chosen by chance. The default has none.
#[derive(Clone, Copy, Debug, Default)]
pub struct FaultRates {
    /// The server answers 503 and does nothing.
    pub unavailable: u64,
    /// The request takes up to 400 ms.
    pub slow: u64,
    /// The server does it, and the connection ends before the answer.
    pub lost: u64,
    /// The server does it, and answers 500.
    pub failed: u64,
    /// Conditional writes that the server refuses with 412 without a reason.
    pub refused: u64,
    /// Beginnings of an outage: the next requests end in 503, or are lost, until a client has used up its attempts.
    pub outages: u64,
    /// Writes of objects that the next listings, up to 8, do not show.
    pub late: u64,
}

/// Requests that an outage hits.
const OUTAGE_REQUESTS: u32 = 8;
/// Largest number of listings that do not show a new object.
const MAX_LATE_LISTINGS: u64 = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    Unavailable,
    Slow(Duration),
    Lost,
    Failed,
    Refused,
}

#[derive(Default)]
struct ProxyState {
    rates: FaultRates,
    random: u64,
    outage: u32,
    /// Holds all new objects back from listings.
    is_holding: bool,
    /// Objects that this many further listings do not show.
    late: BTreeMap<String, u64>,
    written: BTreeSet<String>,
    listings: u64,
    /// Number of faults by their names.
    counts: BTreeMap<&'static str, u64>,
}

impl ProxyState {
    /// A small generator of numbers below `n` (xorshift), so that a seed repeats a run.
    fn below(&mut self, n: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % n
    }

    fn fault(&mut self, is_conditional: bool) -> Option<Fault> {
        let FaultRates { unavailable, slow, lost, failed, refused, outages, late: _ } = self.rates;
        if self.outage > 0 {
            self.outage -= 1;
            return Some(if self.below(2) == 0 { Fault::Unavailable } else { Fault::Lost });
        }
        let mut at = self.below(1000);
        let mut hits = |rate: u64| {
            let hit = at < rate;
            at = if hit { u64::MAX } else { at - rate };
            hit
        };
        if hits(unavailable) {
            Some(Fault::Unavailable)
        } else if hits(slow) {
            Some(Fault::Slow(Duration::from_millis(self.below(400))))
        } else if hits(lost) {
            Some(Fault::Lost)
        } else if hits(failed) {
            Some(Fault::Failed)
        } else if hits(refused) {
            is_conditional.then_some(Fault::Refused)
        } else {
            if hits(outages) {
                *self.counts.entry("outage").or_default() += 1;
                self.outage = OUTAGE_REQUESTS;
            }
            None
        }
    }

    fn count(&mut self, fault: Fault) {
        let name = match fault {
            Fault::Unavailable => "503",
            Fault::Slow(_) => "slow",
            Fault::Lost => "lost answer",
            Fault::Failed => "500 after the write",
            Fault::Refused => "412",
        };
        *self.counts.entry(name).or_default() += 1;
    }

    fn note_written(&mut self, key: String) {
        if !self.written.insert(key.clone()) {
            return;
        }
        if self.is_holding {
            self.late.insert(key, u64::MAX);
        } else if self.below(1000) < self.rates.late {
            *self.counts.entry("late listing").or_default() += 1;
            let listings = 1 + self.below(MAX_LATE_LISTINGS);
            self.late.insert(key, listings);
        }
    }

    /// Removes late objects from the answer to a listing, and the directories in which all objects are late.
    fn filter(&mut self, listing: &str) -> String {
        self.listings += 1;
        let mut counted = BTreeSet::new();
        let mut out = without(listing, "Contents", "Key", |key| {
            let is_late = self.late.contains_key(key);
            if is_late {
                counted.insert(key.to_owned());
            }
            is_late
        });
        out = without(&out, "CommonPrefixes", "Prefix", |prefix| {
            let below = |key: &&String| key.starts_with(prefix);
            let mut written = self.written.range(prefix.to_owned()..).take_while(below).peekable();
            let is_late = written.peek().is_some() && written.all(|key| self.late.contains_key(key.as_str()));
            if is_late {
                counted.extend(self.late.range(prefix.to_owned()..).map(|(key, _)| key.clone()).take(1));
            }
            is_late
        });
        for key in counted {
            if let Some(left) = self.late.get_mut(&key).filter(|left| **left < u64::MAX) {
                *left -= 1;
                if *left == 0 {
                    self.late.remove(&key);
                }
            }
        }
        out
    }
}

/// Removes the elements `name` in which the text of `inner` is one that `is_removed` takes.
fn without(xml: &str, name: &str, inner: &str, mut is_removed: impl FnMut(&str) -> bool) -> String {
    let (begin, end) = (format!("<{name}>"), format!("</{name}>"));
    let (inner_begin, inner_end) = (format!("<{inner}>"), format!("</{inner}>"));
    let (mut out, mut rest) = (String::with_capacity(xml.len()), xml);
    while let Some(at) = rest.find(&begin) {
        let (before, from) = rest.split_at(at);
        let (element, after) = from.split_at(from.find(&end).unwrap() + end.len());
        let text = element.split_once(&inner_begin).unwrap().1.split_once(&inner_end).unwrap().0;
        out.push_str(before);
        if !is_removed(text) {
            out.push_str(element);
        }
        rest = after;
    }
    out + rest
}

/// The proxy. It repeats the faults of a seed if the requests come in the same order.
#[derive(Clone)]
pub struct FaultyS3(Arc<Proxy>);

struct Proxy {
    upstream: String,
    client: reqwest::Client,
    state: Mutex<ProxyState>,
    /// s3s-fs checks and writes in two steps, so two conditional writes at once would both succeed.
    conditional: tokio::sync::Mutex<()>,
}

impl FaultyS3 {
    /// Starts a proxy in front of `upstream`, without faults. Returns it with its URL.
    pub async fn serve(upstream: String, seed: u64) -> (Self, String) {
        // Another test of this process may have installed it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let state = ProxyState { random: seed.max(1), ..ProxyState::default() };
        let proxy =
            Proxy { upstream, client, state: Mutex::new(state), conditional: tokio::sync::Mutex::default() };
        let proxy = Self(Arc::new(proxy));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().fallback(answer).with_state(proxy.clone());
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        (proxy, format!("http://{address}"))
    }

    pub fn set_rates(&self, rates: FaultRates) {
        let mut state = self.0.state.lock().unwrap();
        state.rates = rates;
        state.outage = 0;
    }

    /// Holds objects that are new from now on back from listings, or shows all.
    pub fn hold_listings(&self, is_holding: bool) {
        let mut state = self.0.state.lock().unwrap();
        state.is_holding = is_holding;
        if !is_holding {
            state.late.clear();
        }
    }

    /// Number of answered listings.
    pub fn listings(&self) -> u64 {
        self.0.state.lock().unwrap().listings
    }

    /// Returns the number of faults by their names.
    pub fn counts(&self) -> BTreeMap<&'static str, u64> {
        self.0.state.lock().unwrap().counts.clone()
    }
}

async fn answer(State(FaultyS3(proxy)): State<FaultyS3>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    // A killed client sends a part of it.
    let Ok(body) = axum::body::to_bytes(body, 64 << 20).await else {
        return StatusCode::BAD_REQUEST.into_response();
    };
    let is_conditional = parts.headers.contains_key(header::IF_NONE_MATCH);
    let fault = {
        let mut state = proxy.state.lock().unwrap();
        let fault = state.fault(is_conditional);
        if let Some(fault) = fault {
            state.count(fault);
        }
        fault
    };
    match fault {
        Some(Fault::Unavailable) => return StatusCode::SERVICE_UNAVAILABLE.into_response(),
        Some(Fault::Refused) => return StatusCode::PRECONDITION_FAILED.into_response(),
        Some(Fault::Slow(time)) => tokio::time::sleep(time).await,
        Some(Fault::Lost | Fault::Failed) | None => {}
    }
    // The server completes a request whose client is killed.
    let forwarded = tokio::spawn(async move {
        let _one = if is_conditional { Some(proxy.conditional.lock().await) } else { None };
        proxy.forward(parts, body).await
    });
    let answer = forwarded.await.unwrap();
    match fault {
        // It ends the task of the connection, without an answer and without a message.
        Some(Fault::Lost) => std::panic::resume_unwind(Box::new("the answer is lost")),
        Some(Fault::Failed) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        _ => answer,
    }
}

impl Proxy {
    async fn forward(&self, parts: Parts, body: Bytes) -> Response {
        let Parts { method, uri, headers, .. } = parts;
        let key = key(&uri);
        // Before the server has it: a listing at the same time must not show it.
        if method == Method::PUT {
            self.state.lock().unwrap().note_written(key.clone());
        }
        let url = format!("{}{}", self.upstream, uri.path_and_query().unwrap());
        let sent = self.client.request(method.clone(), url).headers(headers).body(body).send().await;
        let answer = sent.unwrap();
        let (status, mut headers) = (answer.status(), answer.headers().clone());
        for name in [header::TRANSFER_ENCODING, header::CONNECTION] {
            headers.remove(name);
        }
        let bytes = answer.bytes().await.unwrap();
        if method == Method::GET && key.is_empty() && status.is_success() {
            let listing = std::str::from_utf8(&bytes).unwrap();
            return filtered(status, headers, self.state.lock().unwrap().filter(listing));
        }
        (status, headers, bytes).into_response()
    }
}

fn filtered(status: StatusCode, mut headers: HeaderMap, listing: String) -> Response {
    headers.remove(header::CONTENT_LENGTH);
    (status, headers, listing).into_response()
}

/// Returns the key of an object, or nothing for the bucket itself.
fn key(uri: &Uri) -> String {
    // The client encodes `=`.
    uri.path().trim_start_matches('/').split_once('/').map_or("", |(_, key)| key).replace("%3D", "=")
}
