//! The certificates of both listeners. The collector reads the files again when they change.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::metrics::Metrics;

/// Certificate files in PEM, for both listeners.
#[derive(Debug, Clone)]
pub struct TlsOptions {
    /// The certificate chain of this collector, its own certificate first.
    pub cert: PathBuf,
    /// The private key of that certificate.
    pub key: PathBuf,
    /// Authorities whose client certificates the collector requires. `None` lets every client in.
    pub client_ca: Option<PathBuf>,
    /// Time between two checks of the files for changes.
    pub reload_interval: Duration,
}

impl TlsOptions {
    /// Returns options without client authorities, with the default reload interval of 5 s.
    pub fn new(cert: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        Self { cert: cert.into(), key: key.into(), client_ca: None, reload_interval: Duration::from_secs(5) }
    }
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
        /// What is wrong with the content.
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
    /// HTTP/2.
    Grpc,
    /// HTTP/1.1.
    Http,
}

/// TLS configurations of both listeners, made from one reading of the files.
struct LoadedTls {
    grpc: Arc<ServerConfig>,
    http: Arc<ServerConfig>,
}

/// The certificates in use. [`Tls::follow`] replaces them when the files change.
pub(crate) struct Tls {
    options: TlsOptions,
    /// Clients may prove their identity with a token instead of a certificate.
    accepts_tokens: bool,
    loaded: watch::Sender<Arc<LoadedTls>>,
}

impl Tls {
    /// Reads the files. Every fault in them shows here and not at the first connection.
    pub(crate) fn load(options: &TlsOptions, accepts_tokens: bool) -> Result<Arc<Self>, TlsError> {
        let loaded = watch::Sender::new(Arc::new(load(options, accepts_tokens)?));
        Ok(Arc::new(Self { options: options.clone(), accepts_tokens, loaded }))
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
                () = tokio::time::sleep(self.options.reload_interval) => {}
                () = stop.cancelled() => return,
            }
            let now = self.stamp();
            if now == stamp {
                continue;
            }
            match load(&self.options, self.accepts_tokens) {
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
        let TlsOptions { cert, key, client_ca, reload_interval: _ } = &self.options;
        let stamp = |path: &PathBuf| {
            let metadata = fs::metadata(path).ok()?;
            Some((metadata.modified().ok()?, metadata.len()))
        };
        [Some(cert), Some(key), client_ca.as_ref()].into_iter().flatten().map(stamp).collect()
    }
}

fn load(options: &TlsOptions, accepts_tokens: bool) -> Result<LoadedTls, TlsError> {
    let cert_pem = read("--tls-cert", &options.cert)?;
    let key_pem = read("--tls-key", &options.key)?;
    let certs = certificates("--tls-cert", &options.cert, &cert_pem)?;
    let key = PrivateKeyDer::from_pem_slice(&key_pem)
        .map_err(|e| TlsError::content("--tls-key", &options.key, format!("no private key in PEM: {e}")))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let roots = match &options.client_ca {
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
            .map_err(|e| TlsError::content("--tls-cert", &options.cert, e.to_string()))?;
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
            TlsError::content("--tls-key", &options.key, format!("does not go with --tls-cert: {e}"))
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
