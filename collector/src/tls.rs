//! Both listeners: connections that are ready to be read, and the certificates that they are made with, which are read
//! again when their files change.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use futures::{Stream, StreamExt as _};

use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpListener,
    sync::{Semaphore, mpsc, watch},
};
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

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

/// What is spoken on a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Speaks {
    /// HTTP/2.
    Grpc,
    /// HTTP/1.1.
    Http,
}

/// The certificates, ready for both kinds of listener.
struct Loaded {
    grpc: Arc<ServerConfig>,
    http: Arc<ServerConfig>,
}

/// The certificates as their files hold them now.
pub(crate) struct Tls {
    files: TlsFiles,
    /// Callers may prove who they are by a token instead of a certificate.
    tokens: bool,
    loaded: watch::Sender<Arc<Loaded>>,
}

impl Tls {
    /// Reads the files; whatever is wrong with them shows here and not at the first connection.
    pub(crate) fn load(files: &TlsFiles, tokens: bool) -> Result<Arc<Self>, TlsError> {
        let loaded = watch::Sender::new(Arc::new(load(files, tokens)?));
        Ok(Arc::new(Self { files: files.clone(), tokens, loaded }))
    }

    fn acceptor(&self, speaks: Speaks) -> TlsAcceptor {
        let loaded = self.loaded.borrow();
        TlsAcceptor::from(Arc::clone(match speaks {
            Speaks::Grpc => &loaded.grpc,
            Speaks::Http => &loaded.http,
        }))
    }

    /// Reads the files again whenever they change. What cannot be used changes nothing.
    pub(crate) async fn follow(self: Arc<Self>, every: Duration, metrics: Metrics, stop: CancellationToken) {
        let mut stamp = self.stamp();
        loop {
            tokio::select! {
                () = tokio::time::sleep(every) => {}
                () = stop.cancelled() => return,
            }
            let now = self.stamp();
            if now == stamp {
                continue;
            }
            match load(&self.files, self.tokens) {
                Ok(loaded) => {
                    // Looked at again next time if the files changed while they were read.
                    stamp = now;
                    self.loaded.send_replace(Arc::new(loaded));
                    metrics.tls_reloads.inc();
                    tracing::info!(
                        "the certificates have changed: new connections are made with the new ones"
                    );
                }
                // The files may be half replaced: they are tried again until they fit together.
                Err(error) => {
                    tracing::warn!(
                        "the certificates have changed and cannot be used, the former ones stay: {error}"
                    );
                }
            }
        }
    }

    fn stamp(&self) -> Vec<Option<(SystemTime, u64)>> {
        let TlsFiles { cert, key, client_ca } = &self.files;
        let stamp = |path: &PathBuf| {
            let of = fs::metadata(path).ok()?;
            Some((of.modified().ok()?, of.len()))
        };
        [Some(cert), Some(key), client_ca.as_ref()].into_iter().flatten().map(stamp).collect()
    }
}

fn load(files: &TlsFiles, tokens: bool) -> Result<Loaded, TlsError> {
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
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let roots = match &files.client_ca {
        None => None,
        Some(path) => {
            let pem = read("--tls-client-ca", path)?;
            let mut roots = RootCertStore::empty();
            for cert in certificates("--tls-client-ca", path, &pem)? {
                roots.add(cert).map_err(|e| wrong("--tls-client-ca", path, e.to_string()))?;
            }
            Some((path, Arc::new(roots)))
        }
    };
    let config = |speaks: Speaks| {
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|e| wrong("--tls-cert", &files.cert, e.to_string()))?;
        let builder = match &roots {
            None => builder.with_no_client_auth(),
            Some((path, roots)) => {
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::clone(roots), Arc::clone(&provider));
                // Probes come without a certificate: the kubelet has none. Everything else is refused by its path.
                let verifier = if speaks == Speaks::Http || tokens {
                    verifier.allow_unauthenticated()
                } else {
                    verifier
                };
                let verifier = verifier.build().map_err(|e| wrong("--tls-client-ca", path, e.to_string()))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let mut config = builder
            .with_single_cert(certs.clone(), key.clone_key())
            .map_err(|e| wrong("--tls-key", &files.key, format!("does not go with --tls-cert: {e}")))?;
        config.alpn_protocols = match speaks {
            Speaks::Grpc => vec![b"h2".to_vec()],
            Speaks::Http => vec![b"http/1.1".to_vec()],
        };
        Ok::<_, TlsError>(Arc::new(config))
    };
    Ok(Loaded { grpc: config(Speaks::Grpc)?, http: config(Speaks::Http)? })
}

fn read(flag: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|source| TlsError::File { flag, path: path.display().to_string(), source })
}

/// The certificates in a text; an error if there is none.
pub(crate) fn certificates_of(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
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
    certificates_of(pem).map_err(|what| TlsError::Content { flag, path: path.display().to_string(), what })
}

/// Bytes to and from a client, encrypted or not.
pub(crate) trait Io: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

/// Who is at the other end.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    pub(crate) addr: SocketAddr,
    /// That it showed and `--tls-client-ca` vouches for, its own first.
    pub(crate) certificate: Option<CertificateDer<'static>>,
}

/// A connection as the gRPC server takes it.
pub(crate) struct GrpcIo(Box<dyn Io>, Peer);

impl Connected for GrpcIo {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.1.clone()
    }
}

impl AsyncRead for GrpcIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for GrpcIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }
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
        tls: Option<Arc<Tls>>,
        speaks: Speaks,
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
                        None => (Box::new(stream), Peer { addr, certificate: None }),
                        Some(tls) => {
                            let accept = tls.acceptor(speaks).accept(stream);
                            match tokio::time::timeout(HANDSHAKE_TIMEOUT, accept).await {
                                Ok(Ok(stream)) => {
                                    let shown = stream.get_ref().1.peer_certificates();
                                    let certificate =
                                        shown.and_then(|certs| Some(certs.first()?.clone().into_owned()));
                                    (Box::new(stream), Peer { addr, certificate })
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

    /// The connections, as the gRPC server takes them.
    pub(crate) fn grpc(self) -> impl Stream<Item = io::Result<GrpcIo>> {
        ReceiverStream::new(self.ready).map(|(io, peer)| Ok(GrpcIo(io, peer)))
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
        Ok(Peer { addr: self.addr, certificate: None })
    }
}

impl axum::extract::connect_info::Connected<axum::serve::IncomingStream<'_, Listener>> for Peer {
    fn connect_info(stream: axum::serve::IncomingStream<'_, Listener>) -> Self {
        stream.remote_addr().clone()
    }
}
