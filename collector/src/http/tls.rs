//! Certificates for both listeners, and the HTTP listener that uses them.

use std::{fs, io, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::{Semaphore, mpsc},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Certificate, Identity, ServerTlsConfig};

use crate::{config::TlsFiles, metrics::Metrics};

/// Handshakes at one time; more connections wait in the kernel.
const HANDSHAKES_AT_ONCE: usize = 128;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// What is wrong with the certificates.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{flag} {path}: {source}")]
    File {
        /// Which flag named it.
        flag: &'static str,
        /// The file.
        path: String,
        /// Why not.
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{flag} {path}: {what}")]
    Content {
        /// Which flag named it.
        flag: &'static str,
        /// The file.
        path: String,
        /// In which way.
        what: String,
    },
}

/// The certificates, ready for both kinds of listener.
pub(crate) struct Tls {
    pub(crate) grpc: ServerTlsConfig,
    pub(crate) http: TlsAcceptor,
    /// Callers must show a certificate.
    pub(crate) clients_known: bool,
}

impl Tls {
    /// Reads the files; whatever is wrong with them shows here and not at the first connection.
    pub(crate) fn load(files: &TlsFiles) -> Result<Self, TlsError> {
        let cert_pem = read("--tls-cert", &files.cert)?;
        let key_pem = read("--tls-key", &files.key)?;
        let wrong = |flag: &'static str, path: &Path, what: String| TlsError::Content {
            flag,
            path: path.display().to_string(),
            what,
        };
        let certs = certificates("--tls-cert", &files.cert, &cert_pem)?;
        let key = PrivateKeyDer::from_pem_slice(&key_pem)
            .map_err(|e| wrong("--tls-key", &files.key, format!("no private key in PEM: {e}")))?;
        let mut grpc = ServerTlsConfig::new()
            .identity(Identity::from_pem(&cert_pem, &key_pem))
            .timeout(HANDSHAKE_TIMEOUT);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|e| wrong("--tls-cert", &files.cert, e.to_string()))?;
        let builder = match &files.client_ca {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let pem = read("--tls-client-ca", path)?;
                let mut roots = RootCertStore::empty();
                for cert in certificates("--tls-client-ca", path, &pem)? {
                    roots.add(cert).map_err(|e| wrong("--tls-client-ca", path, e.to_string()))?;
                }
                grpc = grpc.client_ca_root(Certificate::from_pem(&pem));
                // Probes come without a certificate: the kubelet has none. Everything else is refused by its path.
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                    .allow_unauthenticated()
                    .build()
                    .map_err(|e| wrong("--tls-client-ca", path, e.to_string()))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let mut config = builder
            .with_single_cert(certs, key)
            .map_err(|e| wrong("--tls-key", &files.key, format!("does not go with --tls-cert: {e}")))?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self { grpc, http: TlsAcceptor::from(Arc::new(config)), clients_known: files.client_ca.is_some() })
    }
}

fn read(flag: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|source| TlsError::File { flag, path: path.display().to_string(), source })
}

fn certificates(
    flag: &'static str,
    path: &Path,
    pem: &[u8],
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(certs) if !certs.is_empty() => Ok(certs),
        Ok(_) => Err(TlsError::Content {
            flag,
            path: path.display().to_string(),
            what: "no certificate in PEM".into(),
        }),
        Err(e) => Err(TlsError::Content { flag, path: path.display().to_string(), what: e.to_string() }),
    }
}

/// Bytes to and from a client, encrypted or not.
pub(crate) trait Io: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

/// Who is at the other end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer {
    pub(crate) addr: SocketAddr,
    /// It showed a certificate that `--tls-client-ca` vouches for.
    pub(crate) authenticated: bool,
}

/// Hands out connections that are ready to be read: a handshake that takes its time holds up nobody.
pub(crate) struct Listener {
    addr: SocketAddr,
    ready: mpsc::Receiver<(Box<dyn Io>, Peer)>,
}

impl Listener {
    pub(crate) fn new(
        tcp: TcpListener,
        addr: SocketAddr,
        tls: Option<TlsAcceptor>,
        metrics: Metrics,
        stop: CancellationToken,
    ) -> Self {
        let (sender, ready) = mpsc::channel(16);
        tokio::spawn(async move {
            let places = Arc::new(Semaphore::new(HANDSHAKES_AT_ONCE));
            loop {
                let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
                let (stream, addr) = tokio::select! {
                    () = stop.cancelled() => return,
                    accepted = tcp.accept() => match accepted {
                        Ok(accepted) => accepted,
                        Err(error) => {
                            // Out of descriptors, mostly: it passes as connections end.
                            tracing::warn!(%error, "a connection could not be taken");
                            tokio::time::sleep(Duration::from_millis(200)).await;
                            continue;
                        }
                    },
                };
                let _ = stream.set_nodelay(true);
                let (sender, tls, metrics) = (sender.clone(), tls.clone(), metrics.clone());
                tokio::spawn(async move {
                    let connection: (Box<dyn Io>, Peer) = match tls {
                        None => (Box::new(stream), Peer { addr, authenticated: false }),
                        Some(tls) => {
                            match tokio::time::timeout(HANDSHAKE_TIMEOUT, tls.accept(stream)).await {
                                Ok(Ok(stream)) => {
                                    let authenticated = stream.get_ref().1.peer_certificates().is_some();
                                    (Box::new(stream), Peer { addr, authenticated })
                                }
                                failed => {
                                    metrics.tls_handshakes_failed.inc();
                                    let error = failed.map(|r| r.err().map(|e| e.to_string()));
                                    tracing::debug!(%addr, ?error, "a TLS handshake failed");
                                    return;
                                }
                            }
                        }
                    };
                    let _ = sender.send(connection).await;
                    drop(place);
                });
            }
        });
        Self { addr, ready }
    }
}

impl axum::serve::Listener for Listener {
    type Io = Box<dyn Io>;
    type Addr = Peer;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.ready.recv().await {
            Some(ready) => ready,
            // It ends only when the server is told to stop as well.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        Ok(Peer { addr: self.addr, authenticated: false })
    }
}

impl axum::extract::connect_info::Connected<axum::serve::IncomingStream<'_, Listener>> for Peer {
    fn connect_info(stream: axum::serve::IncomingStream<'_, Listener>) -> Self {
        *stream.remote_addr()
    }
}
