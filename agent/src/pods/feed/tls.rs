//! Decides whether to trust the kubelet's certificate: signed by an authority, equal to a given one, or any.

use std::{net::IpAddr, path::Path, sync::Arc};

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject as _},
};

use super::{PodFeedError, PodFeedOptions};
use crate::access::{OwnFiles, read_own_file};

/// Builds the TLS configuration of one connection to the kubelet at `peer`. Reads the files each time, because they are
/// replaced while the agent runs.
pub(super) fn client(options: &PodFeedOptions, peer: IpAddr) -> Result<ClientConfig, PodFeedError> {
    let provider = Arc::new(ring::default_provider());
    let pinned = |expected| {
        Arc::new(PinnedVerifier { expected, provider: Arc::clone(&provider) }) as Arc<dyn ServerCertVerifier>
    };
    let wrong = |path: &Path, reason: String| PodFeedError::Certificates { path: path.to_owned(), reason };
    let verifier = if options.kubelet_insecure {
        pinned(None)
    } else if let Some(path) = &options.kubelet_certificate {
        let expected = certificates(path, "the kubelet's certificate", "is --kubelet-certificate right?")?;
        pinned(Some(expected))
    } else {
        let path = &options.kubelet_ca;
        let cure = "give the cluster's authority with --kubelet-ca, or the kubelet's own certificate with \
                    --kubelet-certificate";
        let mut roots = RootCertStore::empty();
        for certificate in certificates(path, "the cluster's authority", cure)? {
            roots.add(certificate).map_err(|error| wrong(path, error.to_string()))?;
        }
        let signed = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()
            .map_err(|error| wrong(path, error.to_string()))?;
        let node = ServerName::try_from(options.node.clone()).ok();
        let names = [Some(ServerName::from(peer)), node].into_iter().flatten().collect();
        Arc::new(NodeVerifier { signed, names })
    };
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| wrong(&options.kubelet_ca, error.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

fn certificates(
    path: &Path,
    what: &'static str,
    cure: &'static str,
) -> Result<Vec<CertificateDer<'static>>, PodFeedError> {
    let pem = read_own_file(OwnFiles::Kubelet, path).map_err(|source| PodFeedError::File {
        what,
        path: path.to_owned(),
        source,
        cure,
    })?;
    let wrong = |reason: String| PodFeedError::Certificates { path: path.to_owned(), reason };
    let found: Vec<_> = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<_, _>>()
        .map_err(|error| wrong(error.to_string()))?;
    if found.is_empty() { Err(wrong("there is no certificate in PEM".into())) } else { Ok(found) }
}

/// Accepts a certificate that the authority signed for the host in the kubelet's address, for the address behind that host, or
/// for the name of this node. Kubelets have certificates for their names, their addresses, or both, and the agent knows both.
#[derive(Debug)]
struct NodeVerifier {
    signed: Arc<WebPkiServerVerifier>,
    names: Vec<ServerName<'static>>,
}

impl ServerCertVerifier for NodeVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verify = |name: &ServerName<'_>| {
            self.signed.verify_server_cert(end_entity, intermediates, name, ocsp_response, now)
        };
        let is_name = |error: &Error| {
            matches!(
                error,
                Error::InvalidCertificate(
                    CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. }
                )
            )
        };
        // The error about the configured host is the one to report.
        verify(server_name).or_else(|error| {
            if !is_name(&error) {
                return Err(error);
            }
            self.names.iter().find_map(|name| verify(name).ok()).ok_or(error)
        })
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signed.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signed.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.signed.supported_verify_schemes()
    }
}

/// Accepts only the expected certificates, whatever their name and validity, or any certificate. In both cases the peer must
/// prove that it has the certificate's key.
#[derive(Debug)]
struct PinnedVerifier {
    /// None: any certificate.
    expected: Option<Vec<CertificateDer<'static>>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for PinnedVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        match &self.expected {
            Some(expected) if !expected.iter().any(|known| known == end_entity) => {
                Err(Error::InvalidCertificate(CertificateError::UnknownIssuer))
            }
            _ => Ok(ServerCertVerified::assertion()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
