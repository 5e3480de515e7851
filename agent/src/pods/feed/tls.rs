//! Decides whether to trust the kubelet's certificate: signed by an authority, equal to a given one, or any.

use std::{fs, path::Path, sync::Arc};

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject as _},
};

use super::{PodFeedError, PodFeedOptions};

/// Builds the TLS configuration of one connection to the kubelet. Reads the files each time, because they are replaced
/// while the agent runs.
pub(super) fn client(options: &PodFeedOptions) -> Result<ClientConfig, PodFeedError> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| PodFeedError::Certificates {
            path: options.kubelet_ca.clone(),
            reason: error.to_string(),
        })?;
    let pinned = |expected| {
        let verifier = Arc::new(PinnedVerifier { expected, provider: Arc::clone(&provider) });
        ClientConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions().map(
            |builder| builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth(),
        )
    };
    let wrong = |path: &Path, reason: String| PodFeedError::Certificates { path: path.to_owned(), reason };
    let mut config = if options.kubelet_insecure {
        pinned(None).map_err(|error| wrong(&options.kubelet_ca, error.to_string()))?
    } else if let Some(path) = &options.kubelet_certificate {
        let expected = certificates(path, "the kubelet's certificate", "is --kubelet-certificate right?")?;
        pinned(Some(expected)).map_err(|error| wrong(path, error.to_string()))?
    } else {
        let path = &options.kubelet_ca;
        let cure = "give the cluster's authority with --kubelet-ca, or the kubelet's own certificate with \
                    --kubelet-certificate";
        let mut roots = RootCertStore::empty();
        for certificate in certificates(path, "the cluster's authority", cure)? {
            roots.add(certificate).map_err(|error| wrong(path, error.to_string()))?;
        }
        builder.with_root_certificates(roots).with_no_client_auth()
    };
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

fn certificates(
    path: &Path,
    what: &'static str,
    cure: &'static str,
) -> Result<Vec<CertificateDer<'static>>, PodFeedError> {
    let pem =
        fs::read(path).map_err(|source| PodFeedError::File { what, path: path.to_owned(), source, cure })?;
    let wrong = |reason: String| PodFeedError::Certificates { path: path.to_owned(), reason };
    let found: Vec<_> = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<_, _>>()
        .map_err(|error| wrong(error.to_string()))?;
    if found.is_empty() { Err(wrong("there is no certificate in PEM".into())) } else { Ok(found) }
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
