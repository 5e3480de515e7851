//! Listening sockets. A [`Listener`] accepts connections, completes their TLS handshakes and hands them to a server.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use clap::Args;
use futures::{Stream, StreamExt as _};
use gannet_proto::ports;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use crate::{
    metrics::Metrics,
    peer::Peer,
    tls::{ListenProtocol, Tls},
};

/// Concurrent handshakes of one listener. More connections wait in the kernel.
const MAX_HANDSHAKES: usize = 128;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections that wait for the server after their handshake.
const READY_CONNECTIONS: usize = 16;

/// Addresses to listen on, and the time that a graceful end may take.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[command(next_help_heading = "Listeners")]
#[serde(default)]
pub struct ServerOptions {
    /// Address of the gRPC services, for agents, gannetctl and control services
    #[arg(long, value_name = "ADDRESS", env = "GANNET_COLLECTOR_GRPC_LISTEN", default_value = ports::COLLECTOR_GRPC)]
    pub grpc_listen: SocketAddr,
    /// Address of the page, the HTTP API, metrics and probes
    #[arg(long, value_name = "ADDRESS", env = "GANNET_COLLECTOR_HTTP_LISTEN", default_value = ports::COLLECTOR_HTTP)]
    pub http_listen: SocketAddr,
    /// Loopback address that serves the same as --http-listen in plaintext and without a client certificate, for users on
    /// this machine and for kubectl port-forward
    #[arg(long, value_name = "ADDRESS", env = "GANNET_COLLECTOR_DEBUG_LISTEN")]
    pub debug_listen: Option<SocketAddr>,
    /// Allow plaintext on addresses that other machines can reach
    #[arg(long, env = "GANNET_COLLECTOR_INSECURE")]
    pub insecure: bool,
    /// Time that open streams have to end before the collector cuts them.
    #[arg(skip = Duration::from_secs(10))]
    #[serde(skip)]
    pub shutdown_timeout: Duration,
}

impl Default for ServerOptions {
    fn default() -> Self {
        gannet_base::defaults()
    }
}

/// Why the collector cannot listen on an address.
#[derive(Debug, thiserror::Error)]
#[error("{flag} {addr}: {}", describe(source))]
pub struct BindError {
    /// The flag that names the address.
    flag: &'static str,
    /// Address that cannot be used.
    addr: SocketAddr,
    /// The error of the operating system.
    source: io::Error,
}

fn describe(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            "the port is in use: stop the other program, or choose another port".into()
        }
        io::ErrorKind::AddrNotAvailable => "this machine does not have the address".into(),
        io::ErrorKind::PermissionDenied => "not allowed to listen there: choose a port above 1023".into(),
        _ => error.to_string(),
    }
}

/// A bound socket that does not accept connections yet.
pub(crate) struct BoundSocket {
    tcp: TcpListener,
    pub(crate) addr: SocketAddr,
}

impl BoundSocket {
    /// Binds an address. `flag` names the address in errors.
    pub(crate) async fn bind(flag: &'static str, addr: SocketAddr) -> Result<Self, BindError> {
        let bind = async {
            let tcp = TcpListener::bind(addr).await?;
            let addr = tcp.local_addr()?;
            Ok(Self { tcp, addr })
        };
        bind.await.map_err(|source| BindError { flag, addr, source })
    }
}

/// The byte stream of a connection, encrypted or not.
pub(crate) trait ByteStream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> ByteStream for T {}

type Connection = (Box<dyn ByteStream>, Peer);

/// Accepts connections and completes their handshakes. A slow handshake delays no other connection.
pub(crate) struct Listener {
    addr: SocketAddr,
    ready: mpsc::Receiver<Connection>,
}

impl Listener {
    /// Starts to accept connections, until `stop`. Without `tls` the connections are plaintext.
    pub(crate) fn start(
        socket: BoundSocket,
        tls: Option<Arc<Tls>>,
        protocol: ListenProtocol,
        metrics: Metrics,
        stop: CancellationToken,
    ) -> Self {
        let (sender, ready) = mpsc::channel(READY_CONNECTIONS);
        let BoundSocket { tcp, addr } = socket;
        let handshake = Arc::new(Handshake { tls, protocol, metrics });
        tokio::spawn(accept(tcp, handshake, sender, stop));
        Self { addr, ready }
    }

    /// Returns the connections in the form that the gRPC server takes.
    pub(crate) fn grpc(self) -> impl Stream<Item = io::Result<GrpcConnection>> {
        ReceiverStream::new(self.ready).map(|(stream, peer)| Ok(GrpcConnection(stream, peer)))
    }
}

async fn accept(
    tcp: TcpListener,
    handshake: Arc<Handshake>,
    sender: mpsc::Sender<Connection>,
    stop: CancellationToken,
) {
    let slots = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let (stream, addr) = tokio::select! {
            () = stop.cancelled() => return,
            accepted = tcp.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Usually the process is out of file descriptors, which passes as connections end.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(200)).await;
                    continue;
                }
            },
        };
        let _ = stream.set_nodelay(true);
        let (sender, handshake) = (sender.clone(), Arc::clone(&handshake));
        tokio::spawn(async move {
            if let Some(connection) = handshake.complete(stream, addr).await {
                let _ = sender.send(connection).await;
            }
            drop(slot);
        });
    }
}

/// Everything that a handshake needs besides its connection.
struct Handshake {
    tls: Option<Arc<Tls>>,
    protocol: ListenProtocol,
    metrics: Metrics,
}

impl Handshake {
    /// Returns the connection, or `None` after a failed handshake.
    async fn complete(&self, stream: TcpStream, addr: SocketAddr) -> Option<Connection> {
        let Some(tls) = &self.tls else {
            return Some((Box::new(stream), Peer { addr, certificate: None }));
        };
        let accept = tls.acceptor(self.protocol).accept(stream);
        match tokio::time::timeout(HANDSHAKE_TIMEOUT, accept).await {
            Ok(Ok(stream)) => {
                let chain = stream.get_ref().1.peer_certificates();
                let certificate = chain.and_then(|certs| Some(certs.first()?.clone().into_owned()));
                Some((Box::new(stream), Peer { addr, certificate }))
            }
            failed => {
                self.metrics.tls_handshakes_failed.inc();
                let error = failed.map(|r| r.err().map(|e| e.to_string()));
                tracing::debug!(%addr, ?error, "a TLS handshake failed");
                None
            }
        }
    }
}

/// A connection of the gRPC server.
pub(crate) struct GrpcConnection(Box<dyn ByteStream>, Peer);

impl Connected for GrpcConnection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.1.clone()
    }
}

impl AsyncRead for GrpcConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for GrpcConnection {
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

impl axum::serve::Listener for Listener {
    type Io = Box<dyn ByteStream>;
    type Addr = Peer;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.ready.recv().await {
            Some(ready) => ready,
            // The channel ends only when the server has been asked to stop as well.
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
