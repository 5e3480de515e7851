//! The certificates of both listeners. The collector reads the files again when they change.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use clap::Args;
use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::metrics::Metrics;

/// Certificate files in PEM, for both listeners.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[command(next_help_heading = "TLS")]
#[serde(default)]
pub struct TlsOptions {
    /// The certificate chain of this collector (PEM), its own certificate first; needs --tls-key
    #[arg(long, value_name = "FILE", env = "GANNET_COLLECTOR_TLS_CERT")]
    pub tls_cert: Option<PathBuf>,
    /// The private key of --tls-cert (PEM)
    #[arg(long, value_name = "FILE", env = "GANNET_COLLECTOR_TLS_KEY")]
    pub tls_key: Option<PathBuf>,
    /// Let in only clients with a certificate of these authorities (PEM); probes need none
    #[arg(long, value_name = "FILE", env = "GANNET_COLLECTOR_TLS_CLIENT_CA")]
    pub tls_client_ca: Option<PathBuf>,
    /// Time between two checks of the files for changes.
    #[arg(skip = Duration::from_secs(5))]
    #[serde(skip)]
    pub reload_interval: Duration,
}

impl Default for TlsOptions {
    fn default() -> Self {
        gannet_base::defaults()
    }
}

impl TlsOptions {
    /// Returns options with a certificate and no client authorities.
    pub fn new(cert: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        Self { tls_cert: Some(cert.into()), tls_key: Some(key.into()), ..Self::default() }
    }

    /// Reports whether the listeners speak TLS.
    pub fn is_on(&self) -> bool {
        self.tls_cert.is_some()
    }

    fn files(&self) -> Option<TlsFiles> {
        Some(TlsFiles {
            cert: self.tls_cert.clone()?,
            key: self.tls_key.clone()?,
            client_ca: self.tls_client_ca.clone(),
        })
    }
}

/// The files of a listener that speaks TLS.
struct TlsFiles {
    cert: PathBuf,
    key: PathBuf,
    client_ca: Option<PathBuf>,
}

/// Why the collector cannot use the certificate files.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{flag} {path}: {source}")]
    File {
        /// The flag that names the file.
        flag: &'static str,
        /// Path of the file.
        path: String,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The content of a file is wrong.
    #[error("{flag} {path}: {what}")]
    Content {
        /// The flag that names the file.
        flag: &'static str,
        /// Path of the file.
        path: String,
        /// Fault of the content.
        what: String,
    },
}

impl TlsError {
    fn content(flag: &'static str, path: &Path, what: String) -> Self {
        Self::Content { flag, path: path.display().to_string(), what }
    }
}

/// The protocol of a listener, which decides ALPN and whether a client needs a certificate for the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ListenProtocol {
    /// gRPC needs HTTP/2.
    Grpc,
    /// The page speaks HTTP/1.1.
    Http,
}

/// TLS configurations of both listeners, made from one reading of the files.
struct LoadedTls {
    grpc: Arc<ServerConfig>,
    http: Arc<ServerConfig>,
}

/// The certificates in use. [`Tls::follow`] replaces them when the files change.
pub(crate) struct Tls {
    files: TlsFiles,
    reload_interval: Duration,
    /// Clients may prove their identity with a token instead of a certificate.
    accepts_tokens: bool,
    loaded: watch::Sender<Arc<LoadedTls>>,
}

impl Tls {
    /// Reads the files. Every fault in them shows here and not at the first connection. Returns `None` without a
    /// certificate.
    pub(crate) fn load(options: &TlsOptions, accepts_tokens: bool) -> Result<Option<Arc<Self>>, TlsError> {
        let Some(files) = options.files() else { return Ok(None) };
        let loaded = watch::Sender::new(Arc::new(load(&files, accepts_tokens)?));
        let reload_interval = options.reload_interval;
        Ok(Some(Arc::new(Self { files, reload_interval, accepts_tokens, loaded })))
    }

    /// Returns an acceptor with the newest certificates, for one connection.
    pub(crate) fn acceptor(&self, protocol: ListenProtocol) -> TlsAcceptor {
        let loaded = self.loaded.borrow();
        TlsAcceptor::from(Arc::clone(match protocol {
            ListenProtocol::Grpc => &loaded.grpc,
            ListenProtocol::Http => &loaded.http,
        }))
    }

    /// Reads the files again whenever they change, until `stop`. Unusable files change nothing.
    pub(crate) async fn follow(self: Arc<Self>, metrics: Metrics, stop: CancellationToken) {
        let mut stamp = self.stamp();
        loop {
            tokio::select! {
                () = tokio::time::sleep(self.reload_interval) => {}
                () = stop.cancelled() => return,
            }
            let now = self.stamp();
            if now == stamp {
                continue;
            }
            match load(&self.files, self.accepts_tokens) {
                Ok(loaded) => {
                    // If the files changed during the reading, the next stamp differs and they are read again.
                    stamp = now;
                    self.loaded.send_replace(Arc::new(loaded));
                    metrics.tls_reloads.inc();
                    tracing::info!(
                        "the certificate files have changed; new connections use the new certificates"
                    );
                }
                // A deployment may have replaced only half of the files. The loop tries again until they fit together.
                Err(error) => {
                    tracing::warn!(
                        "cannot use the changed certificate files, the former certificates stay in use: {error}"
                    );
                }
            }
        }
    }

    /// Returns modification time and size of each file. Equal stamps mean unchanged files.
    fn stamp(&self) -> Vec<Option<(SystemTime, u64)>> {
        let TlsFiles { cert, key, client_ca } = &self.files;
        let stamp = |path: &PathBuf| {
            let metadata = fs::metadata(path).ok()?;
            Some((metadata.modified().ok()?, metadata.len()))
        };
        [Some(cert), Some(key), client_ca.as_ref()].into_iter().flatten().map(stamp).collect()
    }
}

fn load(files: &TlsFiles, accepts_tokens: bool) -> Result<LoadedTls, TlsError> {
    let cert_pem = read("--tls-cert", &files.cert)?;
    let key_pem = read("--tls-key", &files.key)?;
    let certs = certificates("--tls-cert", &files.cert, &cert_pem)?;
    let key = PrivateKeyDer::from_pem_slice(&key_pem)
        .map_err(|e| TlsError::content("--tls-key", &files.key, format!("no private key in PEM: {e}")))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let roots = match &files.client_ca {
        None => None,
        Some(path) => {
            let pem = read("--tls-client-ca", path)?;
            let mut roots = RootCertStore::empty();
            for cert in certificates("--tls-client-ca", path, &pem)? {
                roots.add(cert).map_err(|e| TlsError::content("--tls-client-ca", path, e.to_string()))?;
            }
            Some((path, Arc::new(roots)))
        }
    };
    let config = |protocol: ListenProtocol| {
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|e| TlsError::content("--tls-cert", &files.cert, e.to_string()))?;
        let builder = match &roots {
            None => builder.with_no_client_auth(),
            Some((path, roots)) => {
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::clone(roots), Arc::clone(&provider));
                // The kubelet probes without a certificate. The HTTP routes refuse every other call without one.
                let verifier = if protocol == ListenProtocol::Http || accepts_tokens {
                    verifier.allow_unauthenticated()
                } else {
                    verifier
                };
                let verifier = verifier
                    .build()
                    .map_err(|e| TlsError::content("--tls-client-ca", path, e.to_string()))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let mut config = builder.with_single_cert(certs.clone(), key.clone_key()).map_err(|e| {
            TlsError::content("--tls-key", &files.key, format!("does not go with --tls-cert: {e}"))
        })?;
        config.alpn_protocols = match protocol {
            ListenProtocol::Grpc => vec![b"h2".to_vec()],
            ListenProtocol::Http => vec![b"http/1.1".to_vec()],
        };
        Ok::<_, TlsError>(Arc::new(config))
    };
    Ok(LoadedTls { grpc: config(ListenProtocol::Grpc)?, http: config(ListenProtocol::Http)? })
}

fn read(flag: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|source| TlsError::File { flag, path: path.display().to_string(), source })
}

/// Installs the cryptography of all clients. Only the first call in a process has an effect.
pub(crate) fn install_provider() {
    // Another call may have been faster.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// Starts an HTTP/1.1 client, which passes through every gateway, that trusts these authorities. It follows no redirect and uses no
/// proxy: the operator names the server.
pub(crate) fn http_client(roots: Vec<reqwest::Certificate>) -> reqwest::ClientBuilder {
    install_provider();
    reqwest::Client::builder()
        .http1_only()
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .tls_certs_only(roots)
        .user_agent(concat!("gannet-collector/", env!("CARGO_PKG_VERSION")))
}

/// Returns the authorities in a PEM text for an HTTP client. Omits certificates that rustls does not understand, which the system's
/// bundle may hold.
pub(crate) fn client_roots(pem: &[u8]) -> Result<Vec<reqwest::Certificate>, String> {
    let certs = parse_certificates(pem)?;
    Ok(certs
        .into_iter()
        .filter(|cert| rustls::RootCertStore::empty().add(cert.clone()).is_ok())
        .filter_map(|cert| reqwest::Certificate::from_der(&cert).ok())
        .collect())
}

/// Parses all certificates of a PEM text. A text without a certificate is an error.
pub(crate) fn parse_certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let certs: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match certs {
        Ok(certs) if !certs.is_empty() => Ok(certs),
        Ok(_) => Err("no certificate in PEM".into()),
        Err(error) => Err(error.to_string()),
    }
}

fn certificates(
    flag: &'static str,
    path: &Path,
    pem: &[u8],
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    parse_certificates(pem).map_err(|what| TlsError::content(flag, path, what))
}
