//! The connection of the agent and of gannetctl to the collector: options, TLS, bearer tokens, error texts.

use std::{
    fmt::Write as _,
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use tonic::{
    Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity, Uri},
};

/// Options of a connection to the collector.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dial {
    /// Address: `http://127.0.0.1:4100`, `https://collector.gannet:4100`.
    pub url: String,
    /// Allows plaintext to an address that is not loopback.
    pub insecure: bool,
    /// Trusted certificate authorities (PEM); `None` means those of the system.
    pub ca: Option<PathBuf>,
    /// Certificate chain of the client (PEM); needs `key`.
    pub cert: Option<PathBuf>,
    /// Private key of `cert` (PEM).
    pub key: Option<PathBuf>,
    /// File with a bearer token. Each call reads it again, because the kubelet replaces it.
    pub token_file: Option<PathBuf>,
    /// How these files are read. By default the caller waits for their file systems.
    pub files: FileAccess,
}

/// Reads the files of a connection. A program whose threads must not wait for a file system without end gives functions that have
/// a deadline.
#[derive(Clone, Copy, Debug)]
pub struct FileAccess {
    /// Returns the content of a file.
    pub read: fn(&Path) -> io::Result<Vec<u8>>,
    /// Returns modification time and size of a file.
    pub stamp: fn(&Path) -> io::Result<(SystemTime, u64)>,
}

impl FileAccess {
    /// Returns modification time and size of a file, however long it takes.
    pub fn stamp_now(path: &Path) -> io::Result<(SystemTime, u64)> {
        let metadata = fs::metadata(path)?;
        Ok((metadata.modified()?, metadata.len()))
    }
}

impl Default for FileAccess {
    fn default() -> Self {
        Self { read: |path| fs::read(path), stamp: Self::stamp_now }
    }
}

/// Two connections are the same, however their files are read.
impl PartialEq for FileAccess {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for FileAccess {}

/// Modification time and size of each file of a connection.
pub type FileStamps = [Option<(SystemTime, u64)>; 4];

impl Dial {
    /// Returns the present stamps of the files. They differ after someone has replaced certificates or token.
    pub fn stamps(&self) -> FileStamps {
        [&self.ca, &self.cert, &self.key, &self.token_file]
            .map(|file| (self.files.stamp)(file.as_ref()?).ok())
    }
}

/// A channel that adds the bearer token to each call.
pub type Connection = InterceptedService<Channel, Bearer>;

/// Files in which distributions store the trusted certificates.
const SYSTEM_BUNDLES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// Interval of HTTP/2 pings. A dead peer shows after two of them, even without calls.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(20);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Reasons why a connection cannot work with the given options.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The address is not an `http://` or `https://` URL without a path.
    #[error("`{url}` is not a collector address: write it like https://HOST:4100, or http://127.0.0.1:4100")]
    Url {
        /// The given address.
        url: String,
    },
    /// Plaintext over a network without `--insecure`.
    #[error(
        "`{url}` would send everything in plaintext; use https://, or allow plaintext with --insecure (only a loopback \
         address needs neither)"
    )]
    Plaintext {
        /// The given address.
        url: String,
    },
    /// TLS options together with an address without TLS.
    #[error("`{url}` is a plaintext address, but TLS certificates were given; write https://")]
    TlsUnused {
        /// The given address.
        url: String,
    },
    /// A certificate without a key, or a key without a certificate.
    #[error("a client certificate needs its key, but only the {given} was given")]
    HalfIdentity {
        /// `certificate` or `key`.
        given: &'static str,
    },
    /// A file that cannot be read.
    #[error("cannot read the {what} {}: {source}", path.display())]
    File {
        /// Purpose of the file.
        what: &'static str,
        /// Path of the file.
        path: PathBuf,
        /// Error of the operating system.
        source: io::Error,
    },
    /// The system has no trusted certificates, so the certificate of the collector cannot be checked.
    #[error(
        "no trusted certificates on this system (looked for {}); give the certificate authority of the collector with --tls-ca FILE",
        SYSTEM_BUNDLES.join(", ")
    )]
    NoRoots,
    /// The TLS library refuses the certificates.
    #[error("cannot use the TLS certificates: {reason}")]
    Tls {
        /// Error of the TLS library.
        reason: String,
    },
}

/// Returns a channel to the collector. It connects at the first call and again after each failure, so an unreachable
/// collector is an error of the call, not of this function. [`explain`] formats that error.
pub fn channel(dial: &Dial) -> Result<Channel, DialError> {
    let Dial { url, insecure, ca, cert, key, token_file: _, files } = dial;
    let invalid = || DialError::Url { url: url.clone() };
    let uri: Uri = url.parse().map_err(|_| invalid())?;
    let (Some(scheme), Some(host)) = (uri.scheme_str(), uri.host()) else { return Err(invalid()) };
    if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
        return Err(invalid());
    }
    let endpoint = Endpoint::from(uri.clone())
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_INTERVAL)
        .keep_alive_while_idle(true)
        .tcp_nodelay(true);
    let endpoint = match scheme {
        "http" if ca.is_some() || cert.is_some() || key.is_some() => {
            return Err(DialError::TlsUnused { url: url.clone() });
        }
        "http" if *insecure || is_loopback(host) => endpoint,
        "http" => return Err(DialError::Plaintext { url: url.clone() }),
        "https" => endpoint
            .tls_config(tls(ca.as_deref(), cert.as_deref(), key.as_deref(), *files)?)
            .map_err(|error| DialError::Tls { reason: innermost(&error) })?,
        _ => return Err(invalid()),
    };
    Ok(endpoint.connect_lazy())
}

/// Returns a channel like [`channel`] that also sends the token of [`Dial::token_file`].
pub fn connect(dial: &Dial) -> Result<Connection, DialError> {
    let bearer = Bearer { file: dial.token_file.clone(), files: dial.files };
    bearer.check()?;
    Ok(InterceptedService::new(channel(dial)?, bearer))
}

/// Reports whether a host, of a URL or of a listening address, is reachable only from this machine.
pub fn is_loopback(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn read(what: &'static str, path: &Path, files: FileAccess) -> Result<Vec<u8>, DialError> {
    (files.read)(path).map_err(|source| DialError::File { what, path: path.to_owned(), source })
}

/// Reads the trusted certificates (PEM): those of the file, or those of the system.
pub fn authority(ca: Option<&Path>) -> Result<Vec<u8>, DialError> {
    authority_by(ca, FileAccess::default())
}

fn authority_by(ca: Option<&Path>, files: FileAccess) -> Result<Vec<u8>, DialError> {
    match ca {
        Some(path) => read("certificate authority", path, files),
        None => SYSTEM_BUNDLES
            .iter()
            .find_map(|path| (files.read)(Path::new(path)).ok())
            .ok_or(DialError::NoRoots),
    }
}

fn tls(
    ca: Option<&Path>,
    cert: Option<&Path>,
    key: Option<&Path>,
    files: FileAccess,
) -> Result<ClientTlsConfig, DialError> {
    let config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(authority_by(ca, files)?));
    match (cert, key) {
        (None, None) => Ok(config),
        (Some(cert), Some(key)) => Ok(config.identity(Identity::from_pem(
            read("client certificate", cert, files)?,
            read("client key", key, files)?,
        ))),
        (Some(_), None) => Err(DialError::HalfIdentity { given: "certificate" }),
        (None, Some(_)) => Err(DialError::HalfIdentity { given: "key" }),
    }
}

/// Adds the bearer token to each call.
#[derive(Clone, Debug, Default)]
pub struct Bearer {
    file: Option<PathBuf>,
    files: FileAccess,
}

impl Bearer {
    /// Returns an interceptor that reads the token from this file, or adds none.
    pub fn new(file: Option<PathBuf>) -> Self {
        Self { file, files: FileAccess::default() }
    }

    fn check(&self) -> Result<(), DialError> {
        self.file.as_deref().map_or(Ok(()), |path| read("token file", path, self.files).map(drop))
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: tonic::Request<()>) -> Result<tonic::Request<()>, Status> {
        if let Some(path) = &self.file {
            let token = (self.files.read)(path).map_err(|error| {
                Status::unauthenticated(format!("cannot read the token file {}: {error}", path.display()))
            })?;
            let token = String::from_utf8_lossy(&token);
            let value: MetadataValue<Ascii> = format!("Bearer {}", token.trim()).parse().map_err(|_| {
                Status::unauthenticated(format!("the token file {} does not hold a token", path.display()))
            })?;
            request.metadata_mut().insert("authorization", value);
        }
        Ok(request)
    }
}

/// Formats a failed call for people, with the address and the cause if the collector is unreachable.
pub fn explain(url: &str, status: &Status) -> String {
    let cause = std::error::Error::source(status);
    match (status.code(), cause) {
        (_, Some(cause)) if cause.is::<tonic::transport::Error>() => {
            let reason = innermost(cause);
            let mut text = format!("cannot reach the collector at {url}: {reason}");
            let lower = reason.to_lowercase();
            if refuses_client(status) {
                text.push_str(
                    "; the collector does not trust --tls-cert: is it signed by its --tls-client-ca?",
                );
            } else if lower.contains("certificaterequired") || lower.contains("certificate required") {
                text.push_str("; the collector requires a client certificate: give --tls-cert and --tls-key");
            } else if lower.contains("certificate") {
                text.push_str("; is --tls-ca the certificate authority of the collector?");
            } else if ["corrupt message", "frame", "handshake"].iter().any(|word| lower.contains(word)) {
                text.push_str("; does only one side use TLS, or is this the HTTP port?");
            } else {
                text.push_str("; is gannet-collector running there?");
            }
            text
        }
        (tonic::Code::Unimplemented, _) => format!(
            "the server at {url} does not know this call; is it the gRPC address of a gannet-collector of this version?"
        ),
        (code, _) => {
            let mut text = status.message().to_owned();
            if text.is_empty() {
                let _ = write!(text, "the collector at {url} answered {code:?} without a message");
            }
            text
        }
    }
}

/// Reports whether this side does not trust the collector's certificate.
pub fn distrusts_collector(status: &Status) -> bool {
    let reason = std::error::Error::source(status).map(innermost).unwrap_or_default().to_lowercase();
    reason.contains("invalid peer certificate")
}

/// Reports whether the collector does not trust the client's certificate.
pub fn refuses_client(status: &Status) -> bool {
    let reason = std::error::Error::source(status).map(innermost).unwrap_or_default().to_lowercase();
    let alerts = ["unknownca", "badcertificate", "decrypterror", "certificateunknown", "certificateexpired"];
    reason.contains("fatal alert") && alerts.iter().any(|alert| reason.contains(alert))
}

/// Returns the text of the last error in a chain of sources. It says more than the first one, "transport error".
pub fn innermost(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    let text = error.to_string();
    // "Connection refused (os error 111)": drops the number.
    match text.split_once(" (os error") {
        Some((words, _)) => words.to_lowercase(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn dial(url: &str) -> Dial {
        Dial { url: url.to_owned(), ..Dial::default() }
    }

    #[rstest]
    #[case("http://127.0.0.1:4100", None)]
    #[case("http://[::1]:4100/", None)]
    #[case("http://localhost:4100", None)]
    #[case("http://collector.gannet:4100", Some("use https://, or allow plaintext with --insecure"))]
    #[case("127.0.0.1:4100", Some("is not a collector address: write it like https://HOST:4100"))]
    #[case("ftp://127.0.0.1:4100", Some("is not a collector address"))]
    #[case("http://127.0.0.1:4100/ui", Some("is not a collector address"))]
    #[case("", Some("is not a collector address"))]
    #[tokio::test]
    async fn plaintext_leaves_the_machine_only_with_insecure(#[case] url: &str, #[case] error: Option<&str>) {
        match (connect(&dial(url)), error) {
            (Ok(_), None) => {}
            (Err(found), Some(error)) => assert!(found.to_string().contains(error), "{found}"),
            (found, error) => panic!("{url}: {found:?}, not {error:?}"),
        }
        if error.is_some_and(|error| error.contains("--insecure")) {
            connect(&Dial { insecure: true, ..dial(url) }).unwrap();
        }
    }

    #[tokio::test]
    async fn wrong_tls_options_are_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let here = Some(file.path().to_owned());
        let missing = Some(PathBuf::from("/nonexistent/ca.pem"));
        let https = || dial("https://collector:4100");
        let words = |dial: Dial| connect(&dial).unwrap_err().to_string();
        assert!(
            words(Dial { ca: here.clone(), ..dial("http://127.0.0.1:1") }).contains("is a plaintext address")
        );
        assert!(
            words(Dial { ca: missing.clone(), ..https() })
                .contains("certificate authority /nonexistent/ca.pem")
        );
        let half = Dial { ca: here.clone(), cert: here.clone(), ..https() };
        assert!(words(half).contains("only the certificate was given"));
        let token = Dial { token_file: missing, ..dial("http://127.0.0.1:1") };
        assert!(words(token).contains("token file /nonexistent/ca.pem"));
    }

    #[tokio::test]
    async fn an_unreachable_collector_is_named_with_its_cause() {
        // A port that was free just now.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let url = format!("http://127.0.0.1:{port}");
        let connection = connect(&dial(&url)).unwrap();
        let mut client = crate::control::fleet_service_client::FleetServiceClient::new(connection);
        let status = client.list_nodes(crate::control::ListNodesRequest {}).await.unwrap_err();
        assert_eq!(
            explain(&url, &status),
            format!(
                "cannot reach the collector at {url}: connection refused; is gannet-collector running there?"
            )
        );
        assert_eq!(explain(&url, &Status::aborted("the etag is stale")), "the etag is stale");
        assert!(explain(&url, &Status::unimplemented("")).contains("gRPC address"));
    }
}
