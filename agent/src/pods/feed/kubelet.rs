//! The kubelet's list of pods, over HTTPS. The kubelet offers no watch: the agent polls it every ten seconds, and at once
//! when it sees an unknown container.

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
use rustls::{CertificateError, pki_types::ServerName};
use tokio::{
    net::TcpStream,
    sync::{Notify, mpsc},
    task::spawn_blocking,
    time::{Instant, sleep_until, timeout},
};
use tokio_rustls::TlsConnector;

use super::{
    PodChange, PodFeed, PodFeedError, PodFeedKind, PodFeedOptions, PodList, error::quote, json::read_pods,
    tls,
};
use crate::access::{OwnFiles, on_own_files, read_own_file};

/// Pause between two polls. The kubelet builds the complete answer each time. The agent adds up to a tenth, so that agents
/// do not poll in step.
const POLL_PAUSE: Duration = Duration::from_secs(10);
/// Minimum pause between two polls, however many unknown containers there are.
const MIN_POLL_PAUSE: Duration = Duration::from_secs(1);
/// Maximum size of an answer. With a thousand pods it has about ten megabytes.
const MAX_BYTES: u64 = 64 << 20;
/// Bytes to read of an error's text.
const MAX_ERROR_BYTES: usize = 1024;
/// Pieces of the answer that wait for the parser, about 16 KiB each.
const MAX_PIECES: usize = 8;
const DEFAULT_PORT: u16 = 10250;
const RBAC: &str = "apiGroups [\"\"], resources [\"nodes/pods\"], verbs [\"get\"] (before Kubernetes 1.33 the kubelet \
                    wants nodes/proxy, which amounts to running commands on the node: allow it by name, or use \
                    --pod-source apiserver)";

/// The kubelet's HTTPS server.
pub(super) struct Kubelet {
    options: PodFeedOptions,
    pause: Duration,
}

impl Kubelet {
    pub(super) fn new(options: &PodFeedOptions) -> Self {
        Self { options: options.clone(), pause: POLL_PAUSE }
    }

    /// Requests one complete answer.
    async fn list(&self) -> Result<PodList, PodFeedError> {
        let address = Address::parse(&self.options.kubelet_address)?;
        let at = format!("the kubelet at https://{}", address.authority());
        let time_limit = self.options.kubelet_timeout;
        match timeout(time_limit, self.fetch(&address, &at)).await {
            Ok(answer) => answer,
            Err(_) => Err(PodFeedError::Timeout { at, seconds: time_limit.as_secs() }),
        }
    }

    async fn fetch(&self, address: &Address, at: &str) -> Result<PodList, PodFeedError> {
        let response = self.request(address, at).await?;
        let status = response.status();
        let body = response.into_body();
        if status == StatusCode::OK {
            return read_body(body, at).await;
        }
        let said = quote(&beginning(body).await);
        Err(match status {
            StatusCode::UNAUTHORIZED => {
                PodFeedError::Unauthenticated { at: at.to_owned(), token: self.options.token_file.clone() }
            }
            StatusCode::FORBIDDEN => PodFeedError::Forbidden { at: at.to_owned(), said, rule: RBAC },
            status => PodFeedError::Status { at: at.to_owned(), status: status.as_u16(), said },
        })
    }

    async fn request(&self, address: &Address, at: &str) -> Result<hyper::Response<Incoming>, PodFeedError> {
        let token = self.token()?;
        let unreachable = |error: &dyn std::fmt::Display| PodFeedError::Unreachable {
            at: at.to_owned(),
            reason: error.to_string(),
        };
        let stream = TcpStream::connect((address.host.as_str(), address.port))
            .await
            .map_err(|error| unreachable(&error))?;
        let peer = stream.peer_addr().map_err(|error| unreachable(&error))?.ip();
        let config = tls::client(&self.options, peer)?;
        let name = ServerName::try_from(address.host.clone())
            .map_err(|_| PodFeedError::Address(self.options.kubelet_address.clone()))?;
        let stream = TlsConnector::from(std::sync::Arc::new(config))
            .connect(name, stream)
            .await
            .map_err(|error| handshake_error(at, &error))?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| unreachable(&error))?;
        // The task ends with the request's sender, or with its body.
        tokio::spawn(connection);
        let mut request = Request::get("/pods")
            .header(header::HOST, address.authority())
            .header(header::ACCEPT, "application/json")
            .header(header::USER_AGENT, concat!("gannet-agent/", env!("CARGO_PKG_VERSION")));
        if let Some(token) = token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let request = request.body(Empty::<Bytes>::new()).map_err(|_| PodFeedError::File {
            what: "the token",
            path: self.options.token_file.clone(),
            source: io::ErrorKind::InvalidData.into(),
            cure: "it holds characters that no token has",
        })?;
        sender.send_request(request).await.map_err(|error| unreachable(&error))
    }

    /// Reads the token. None: the file does not exist. A kubelet without authentication answers anyway.
    fn token(&self) -> Result<Option<String>, PodFeedError> {
        let text = read_own_file(OwnFiles::Kubelet, &self.options.token_file).and_then(|token| {
            String::from_utf8(token).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
        });
        match text {
            Ok(token) => Ok(Some(token.trim().to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(PodFeedError::File {
                what: "the token",
                path: self.options.token_file.clone(),
                source,
                cure: "give another file with --kubelet-token-file",
            }),
        }
    }
}

impl PodFeed for Kubelet {
    fn kind(&self) -> PodFeedKind {
        PodFeedKind::Kubelet
    }

    fn is_present(&self) -> bool {
        let token = self.options.token_file.clone();
        // If its file system does not answer, the error of the first request says so.
        on_own_files(OwnFiles::Kubelet, &self.options.token_file, move || token.exists()).unwrap_or(true)
            || self.options.kubelet_certificate.is_some()
    }

    fn changes<'a>(&'a self, requested: &'a Notify) -> BoxStream<'a, Result<PodChange, PodFeedError>> {
        // The time of the last request. None before the first; the outer None after an error ends the stream.
        stream::unfold(Some(None::<Instant>), move |last| async move {
            if let Some(asked) = last? {
                let jitter = self.pause.mul_f64(rand::random_range(0.0..0.1));
                tokio::select! {
                    () = sleep_until(asked + self.pause + jitter) => {}
                    () = requested.notified() => sleep_until(asked + MIN_POLL_PAUSE).await,
                }
            } else if !self.is_present() && self.options.only.is_none() {
                let reason = format!("there is no token in {}", self.options.token_file.display());
                return Some((Err(PodFeedError::Absent(reason)), None));
            }
            let asked = Instant::now();
            let answer = self.list().await;
            let next = answer.is_ok().then_some(Some(asked));
            Some((answer.map(PodChange::All), next))
        })
        .boxed()
    }
}

/// Parses the pods of an answer on a separate thread while it arrives.
async fn read_body(mut body: Incoming, at: &str) -> Result<PodList, PodFeedError> {
    let too_large = || PodFeedError::TooLarge { at: at.to_owned(), max_bytes: MAX_BYTES };
    let (pieces, receiver) = mpsc::channel(MAX_PIECES);
    let reading =
        spawn_blocking(move || read_pods(io::BufReader::new(Pieces { receiver, piece: Bytes::new() })));
    let mut received = 0;
    let mut failure = None;
    while let Some(frame) = body.frame().await {
        match frame {
            Ok(frame) => {
                let Ok(piece) = frame.into_data() else { continue };
                received += piece.len() as u64;
                if received > MAX_BYTES {
                    failure = Some(too_large());
                    break;
                }
                // The parser has stopped, because the answer is no list. Its error is returned below.
                if pieces.send(piece).await.is_err() {
                    break;
                }
            }
            Err(error) => {
                failure =
                    Some(PodFeedError::Ended { at: at.to_owned(), said: format!(" in the middle: {error}") });
                break;
            }
        }
    }
    drop(pieces);
    let invalid = |reason: String| PodFeedError::Invalid { at: at.to_owned(), reason };
    let pods = reading.await.map_err(|error| invalid(error.to_string()))?;
    match failure {
        Some(failure) => Err(failure),
        None => pods.map_err(|error| invalid(error.to_string())),
    }
}

/// Reads the received pieces. Blocks, so it needs a thread that may block.
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

/// Reads the beginning of an error's text.
async fn beginning(mut body: Incoming) -> String {
    let mut text = Vec::new();
    while let Some(Ok(frame)) = body.frame().await {
        text.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
        if text.len() > MAX_ERROR_BYTES {
            break;
        }
    }
    text.truncate(MAX_ERROR_BYTES);
    String::from_utf8_lossy(&text).into_owned()
}

/// Converts the error of a failed TLS handshake.
fn handshake_error(at: &str, error: &io::Error) -> PodFeedError {
    let reason = error.to_string();
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match tls {
        Some(rustls::Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        )) => PodFeedError::WrongName { at: at.to_owned(), reason },
        Some(rustls::Error::InvalidCertificate(_)) => PodFeedError::Untrusted { at: at.to_owned(), reason },
        _ => PodFeedError::Unreachable { at: at.to_owned(), reason },
    }
}

/// The kubelet's address.
#[derive(Debug, PartialEq, Eq)]
struct Address {
    /// The host without brackets.
    host: String,
    port: u16,
}

impl Address {
    /// Parses `10.0.0.1`, `fd00::1`, `[fd00::1]:10250`, `node-1:10250`, `https://10.0.0.1:10250/`.
    fn parse(text: &str) -> Result<Self, PodFeedError> {
        let wrong = || PodFeedError::Address(text.to_owned());
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
            // The downward API writes status.hostIP without brackets.
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

/// Checks the syntax of an address.
pub(crate) fn check_kubelet_address(text: &str) -> Result<(), PodFeedError> {
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
    fn valid_addresses_are_parsed(#[case] text: &str, #[case] authority: &str) {
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
    fn invalid_addresses_are_refused(#[case] text: &str) {
        let error = Address::parse(text).unwrap_err().to_string();
        assert!(error.contains("write HOST, HOST:PORT"), "{error}");
    }
}
