//! The kubelet's own list of pods, by HTTPS. It has no watch: it is asked every ten seconds, and at once when a
//! container is seen that it has not told of.

use std::{
    io::{self, Read},
    net::{IpAddr, Ipv6Addr},
    time::Duration,
};

use bytes::{Buf as _, Bytes};
use futures::stream::{self, BoxStream, StreamExt as _};
use http_body_util::{BodyExt as _, Empty};
use hyper::{Request, StatusCode, body::Incoming, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::{
    net::TcpStream,
    sync::{Notify, mpsc},
    task::spawn_blocking,
    time::{Instant, sleep_until, timeout},
};
use tokio_rustls::TlsConnector;

use super::{Change, PodSource, SourceError, SourceKind, SourceOptions, json::read_pods, said, tls};
use crate::pods::model::Pod;

/// How often the kubelet is asked: it makes the whole answer each time. Up to a tenth more, so that agents do not fall
/// into step.
const PAUSE: Duration = Duration::from_secs(10);
/// How often at most, however many unknown containers there are.
const LEAST_PAUSE: Duration = Duration::from_secs(1);
/// A larger answer is none of one node's pods: one of a thousand pods has about ten megabytes.
const MOST_BYTES: u64 = 64 << 20;
/// Of an error's text.
const MOST_ERROR_BYTES: usize = 1024;
/// Pieces of the answer that wait to be read, some 16 KiB each.
const PIECES: usize = 8;
const DEFAULT_PORT: u16 = 10250;
const RBAC: &str = "apiGroups [\"\"], resources [\"nodes/pods\"], verbs [\"get\"] (before Kubernetes 1.33 the kubelet \
                    wants nodes/proxy, which amounts to running commands on the node: allow it by name, or use \
                    --pod-source apiserver)";

/// The kubelet by HTTPS.
pub(super) struct Kubelet {
    options: SourceOptions,
    pause: Duration,
}

impl Kubelet {
    pub(super) fn new(options: &SourceOptions) -> Self {
        Self { options: options.clone(), pause: PAUSE }
    }

    /// One whole answer.
    async fn list(&self) -> Result<Vec<Pod>, SourceError> {
        let address = Address::parse(&self.options.kubelet_address)?;
        let at = format!("the kubelet at https://{}", address.authority());
        let patience = self.options.patience;
        match timeout(patience, self.fetch(&address, &at)).await {
            Ok(answer) => answer,
            Err(_) => Err(SourceError::Slow { at, seconds: patience.as_secs() }),
        }
    }

    async fn fetch(&self, address: &Address, at: &str) -> Result<Vec<Pod>, SourceError> {
        let response = self.request(address, at).await?;
        let status = response.status();
        let body = response.into_body();
        if status == StatusCode::OK {
            return read_body(body, at).await;
        }
        let said = said(&beginning(body).await);
        Err(match status {
            StatusCode::UNAUTHORIZED => {
                SourceError::Unauthenticated { at: at.to_owned(), token: self.options.token_file.clone() }
            }
            StatusCode::FORBIDDEN => SourceError::Forbidden { at: at.to_owned(), said, rule: RBAC },
            status => SourceError::Status { at: at.to_owned(), status: status.as_u16(), said },
        })
    }

    async fn request(&self, address: &Address, at: &str) -> Result<hyper::Response<Incoming>, SourceError> {
        let token = self.token()?;
        let config = tls::client(&self.options)?;
        let unreachable = |error: &dyn std::fmt::Display| SourceError::Unreachable {
            at: at.to_owned(),
            reason: error.to_string(),
        };
        let stream = TcpStream::connect((address.host.as_str(), address.port))
            .await
            .map_err(|error| unreachable(&error))?;
        let name = ServerName::try_from(address.host.clone())
            .map_err(|_| SourceError::Address(self.options.kubelet_address.clone()))?;
        let stream = TlsConnector::from(std::sync::Arc::new(config))
            .connect(name, stream)
            .await
            .map_err(|error| handshake(at, &error))?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| unreachable(&error))?;
        // Ends with the request's sender, or with its body.
        tokio::spawn(connection);
        let mut request = Request::get("/pods")
            .header(header::HOST, address.authority())
            .header(header::ACCEPT, "application/json")
            .header(header::USER_AGENT, concat!("gannet-agent/", env!("CARGO_PKG_VERSION")));
        if let Some(token) = token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let request = request.body(Empty::<Bytes>::new()).map_err(|_| SourceError::File {
            what: "the token",
            path: self.options.token_file.clone(),
            source: io::ErrorKind::InvalidData.into(),
            cure: "it holds characters that no token has",
        })?;
        sender.send_request(request).await.map_err(|error| unreachable(&error))
    }

    /// None: there is no such file, which a kubelet that knows nobody may answer anyway.
    fn token(&self) -> Result<Option<String>, SourceError> {
        match std::fs::read_to_string(&self.options.token_file) {
            Ok(token) => Ok(Some(token.trim().to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(SourceError::File {
                what: "the token",
                path: self.options.token_file.clone(),
                source,
                cure: "give another file with --kubelet-token-file",
            }),
        }
    }
}

impl PodSource for Kubelet {
    fn kind(&self) -> SourceKind {
        SourceKind::Kubelet
    }

    fn is_there(&self) -> bool {
        self.options.token_file.exists() || self.options.kubelet_certificate.is_some()
    }

    fn changes<'a>(&'a self, wanted: &'a Notify) -> BoxStream<'a, Result<Change, SourceError>> {
        // When the last answer was asked for; none before the first, and after an error there is no next.
        stream::unfold(Some(None::<Instant>), move |last| async move {
            if let Some(asked) = last? {
                let jitter = self.pause.mul_f64(rand::random_range(0.0..0.1));
                tokio::select! {
                    () = sleep_until(asked + self.pause + jitter) => {}
                    () = wanted.notified() => sleep_until(asked + LEAST_PAUSE).await,
                }
            } else if !self.is_there() && self.options.only.is_none() {
                let words = format!("there is no token in {}", self.options.token_file.display());
                return Some((Err(SourceError::Absent(words)), None));
            }
            let asked = Instant::now();
            let answer = self.list().await;
            let next = answer.is_ok().then_some(Some(asked));
            Some((answer.map(Change::All), next))
        })
        .boxed()
    }
}

/// The pods of an answer, read on a thread of its own while it comes in.
async fn read_body(mut body: Incoming, at: &str) -> Result<Vec<Pod>, SourceError> {
    let too_large = || SourceError::TooLarge { at: at.to_owned(), most_bytes: MOST_BYTES };
    let (pieces, receiver) = mpsc::channel(PIECES);
    let reading =
        spawn_blocking(move || read_pods(io::BufReader::new(Pieces { receiver, piece: Bytes::new() })));
    let mut received = 0;
    let mut trouble = None;
    while let Some(frame) = body.frame().await {
        match frame {
            Ok(frame) => {
                let Ok(piece) = frame.into_data() else { continue };
                received += piece.len() as u64;
                if received > MOST_BYTES {
                    trouble = Some(too_large());
                    break;
                }
                // Nobody reads on: what came is no list, and that is told below.
                if pieces.send(piece).await.is_err() {
                    break;
                }
            }
            Err(error) => {
                trouble =
                    Some(SourceError::Ended { at: at.to_owned(), said: format!(" in the middle: {error}") });
                break;
            }
        }
    }
    drop(pieces);
    let garbage = |reason: String| SourceError::Garbage { at: at.to_owned(), reason };
    let pods = reading.await.map_err(|error| garbage(error.to_string()))?;
    match trouble {
        Some(trouble) => Err(trouble),
        None => pods.map_err(|error| garbage(error.to_string())),
    }
}

/// What has come in, as something to read. Waits on a thread that may.
struct Pieces {
    receiver: mpsc::Receiver<Bytes>,
    piece: Bytes,
}

impl Read for Pieces {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.receiver.blocking_recv() {
                Some(piece) => self.piece = piece,
                None => return Ok(0),
            }
        }
        let length = into.len().min(self.piece.len());
        self.piece.copy_to_slice(&mut into[..length]);
        Ok(length)
    }
}

/// The beginning of an error's text.
async fn beginning(mut body: Incoming) -> String {
    let mut text = Vec::new();
    while let Some(Ok(frame)) = body.frame().await {
        text.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
        if text.len() > MOST_ERROR_BYTES {
            break;
        }
    }
    text.truncate(MOST_ERROR_BYTES);
    String::from_utf8_lossy(&text).into_owned()
}

/// What a failed handshake means.
fn handshake(at: &str, error: &io::Error) -> SourceError {
    let reason = error.to_string();
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match tls {
        Some(rustls::Error::InvalidCertificate(_)) => SourceError::Untrusted { at: at.to_owned(), reason },
        _ => SourceError::Unreachable { at: at.to_owned(), reason },
    }
}

/// Where the kubelet listens.
#[derive(Debug, PartialEq, Eq)]
struct Address {
    /// Without brackets.
    host: String,
    port: u16,
}

impl Address {
    /// `10.0.0.1`, `fd00::1`, `[fd00::1]:10250`, `node-1:10250`, `https://10.0.0.1:10250/`.
    fn parse(text: &str) -> Result<Self, SourceError> {
        let wrong = || SourceError::Address(text.to_owned());
        let rest = text.trim();
        let rest = rest.strip_prefix("https://").unwrap_or(rest);
        let rest = rest.strip_suffix("/pods").unwrap_or(rest).trim_end_matches('/');
        let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port != 0).ok_or_else(wrong);
        let (host, port) = if let Some(inner) = rest.strip_prefix('[') {
            let (host, after) = inner.split_once(']').ok_or_else(wrong)?;
            host.parse::<Ipv6Addr>().map_err(|_| wrong())?;
            match after.strip_prefix(':') {
                Some(digits) => (host, port(digits)?),
                None if after.is_empty() => (host, DEFAULT_PORT),
                None => return Err(wrong()),
            }
        } else if rest.parse::<Ipv6Addr>().is_ok() {
            // As the downward API gives status.hostIP.
            (rest, DEFAULT_PORT)
        } else {
            match rest.rsplit_once(':') {
                Some((host, digits)) => (host, port(digits)?),
                None => (rest, DEFAULT_PORT),
            }
        };
        let named = !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b".-".contains(&b));
        if host.parse::<IpAddr>().is_err() && !named {
            return Err(wrong());
        }
        Ok(Self { host: host.to_owned(), port })
    }

    fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

/// That an address is one.
pub fn check_address(text: &str) -> Result<(), SourceError> {
    Address::parse(text).map(drop)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("10.0.0.1", "10.0.0.1:10250")]
    #[case("10.0.0.1:1", "10.0.0.1:1")]
    #[case("fd00::1", "[fd00::1]:10250")]
    #[case("[fd00::1]", "[fd00::1]:10250")]
    #[case("[fd00::1]:99", "[fd00::1]:99")]
    #[case("https://node-1.example:10250/", "node-1.example:10250")]
    #[case("https://10.0.0.1:10250/pods", "10.0.0.1:10250")]
    fn addresses(#[case] text: &str, #[case] authority: &str) {
        assert_eq!(Address::parse(text).unwrap().authority(), authority);
    }

    #[rstest]
    #[case("")]
    #[case("http://10.0.0.1")]
    #[case("10.0.0.1:0")]
    #[case("10.0.0.1:99999")]
    #[case("[fd00::1")]
    #[case("[x]:1")]
    #[case("a b")]
    fn no_addresses(#[case] text: &str) {
        let error = Address::parse(text).unwrap_err().to_string();
        assert!(error.contains("write HOST, HOST:PORT"), "{error}");
    }
}
