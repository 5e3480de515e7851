//! The other end of a connection, as the listeners see it and the authorization checks it.

use std::net::SocketAddr;

use rustls::pki_types::CertificateDer;

/// Address and certificate of a client.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    pub(crate) addr: SocketAddr,
    /// The client's own certificate, verified against `--tls-client-ca`.
    pub(crate) certificate: Option<CertificateDer<'static>>,
}
