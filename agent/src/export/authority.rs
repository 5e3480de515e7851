//! Names the certificate authorities when agent and collector do not trust each other. Two authorities of one chart have the
//! same name, so the key of each is named too.

use std::{sync::Arc, time::Duration};

use gannet_proto::connect::{self, Dial};
use rustls::{
    ClientConfig, DigitallySignedStruct, Error, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject as _},
};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::{Status, transport::Uri};
use x509_parser::{
    extensions::ParsedExtension,
    prelude::{FromDer as _, X509Certificate},
};

/// Time in which the collector must show its certificate.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);
/// Authorities of a file to name.
const SHOWN_AUTHORITIES: usize = 3;
/// Bytes of a key's identifier to show.
const SHOWN_KEY_BYTES: usize = 8;

/// Formats a failed call for people. If one side does not trust the certificate of the other, the text names the authorities.
pub(crate) async fn explain(dial: &Dial, status: &Status) -> String {
    let text = connect::explain(&dial.url, status);
    let authorities = if connect::distrusts_collector(status) {
        let issuer = tokio::time::timeout(LOOK_TIMEOUT, issuer_of_collector(dial)).await.ok().flatten();
        issuer.zip(trusted(dial)).map(|(issuer, trusted)| {
            format!("The collector's certificate is of the authority {issuer}; {trusted}")
        })
    } else if connect::refuses_client(status) {
        let own = certificates(dial, dial.cert.as_deref());
        own.first().map(|own| format!("The certificate of this agent is of the authority {}", issuer(own)))
    } else {
        None
    };
    match authorities {
        Some(authorities) => format!("{text} {authorities}. Give both sides certificates of one authority"),
        None => text,
    }
}

/// Names the authorities that this side trusts.
fn trusted(dial: &Dial) -> Option<String> {
    let path = dial.ca.as_deref()?;
    let all = certificates(dial, Some(path));
    let names: Vec<String> =
        all.iter().take(SHOWN_AUTHORITIES).map(|certificate| subject(certificate)).collect();
    let more = all.len().saturating_sub(SHOWN_AUTHORITIES);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    Some(format!("{} holds {}{more}", path.display(), names.join(", ")))
}

fn certificates(dial: &Dial, path: Option<&std::path::Path>) -> Vec<CertificateDer<'static>> {
    let pem = path.and_then(|path| (dial.files.read)(path).ok()).unwrap_or_default();
    CertificateDer::pem_slice_iter(&pem).filter_map(Result::ok).collect()
}

/// Asks the collector for its certificate, of any authority, and names the issuer of the last one in its chain.
async fn issuer_of_collector(dial: &Dial) -> Option<String> {
    let uri: Uri = dial.url.parse().ok()?;
    let host = uri.host()?.trim_start_matches('[').trim_end_matches(']').to_owned();
    let provider = Arc::new(ring::default_provider());
    let config = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .ok()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
        .with_no_client_auth();
    let stream = TcpStream::connect((host.as_str(), uri.port_u16().unwrap_or(443))).await.ok()?;
    let name = ServerName::try_from(host).ok()?;
    let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.ok()?;
    stream.get_ref().1.peer_certificates()?.last().map(issuer)
}

/// Names the authority that signed a certificate.
fn issuer(certificate: &CertificateDer<'_>) -> String {
    let Ok((_, parsed)) = X509Certificate::from_der(certificate) else { return "(unreadable)".into() };
    let key = parsed.extensions().iter().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::AuthorityKeyIdentifier(id) => id.key_identifier.as_ref().map(|id| id.0),
        _ => None,
    });
    named(&parsed.issuer().to_string(), key)
}

/// Names an authority by its own certificate.
fn subject(certificate: &CertificateDer<'_>) -> String {
    let Ok((_, parsed)) = X509Certificate::from_der(certificate) else { return "(unreadable)".into() };
    let key = parsed.extensions().iter().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::SubjectKeyIdentifier(id) => Some(id.0),
        _ => None,
    });
    let since = jiff::Timestamp::from_second(parsed.validity().not_before.timestamp()).unwrap_or_default();
    format!("{} of {}", named(&parsed.subject().to_string(), key), since.strftime("%F %T"))
}

/// The name comes from the peer, so it is quoted and cut.
fn named(name: &str, key: Option<&[u8]>) -> String {
    let name: String = name.chars().take(100).collect();
    let Some(key) = key else { return format!("{name:?}") };
    let key: Vec<String> = key.iter().take(SHOWN_KEY_BYTES).map(|byte| format!("{byte:02x}")).collect();
    format!("{name:?} with key {}", key.join(""))
}

/// Accepts any certificate. The connection carries no data.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use gannet_proto::ingest::{PushRequest, ingest_service_client::IngestServiceClient};
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
    use rustls::{RootCertStore, ServerConfig, pki_types::PrivateKeyDer, server::WebPkiClientVerifier};
    use tokio::{net::TcpListener, time::timeout};
    use tokio_rustls::TlsAcceptor;

    use super::*;
    use crate::export::files_changed;

    type Authority = CertifiedIssuer<'static, KeyPair>;

    /// All authorities have the same name, as those of a chart have.
    fn authority() -> Authority {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "gannet-ca");
        CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
    }

    /// Writes a certificate of this authority, its key, and the certificate of another authority, as a mounted Secret has them.
    fn write(dir: &Path, own: &Authority, trusted: &Authority) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, own).unwrap();
        fs::write(dir.join("tls.crt"), certificate.pem()).unwrap();
        fs::write(dir.join("tls.key"), key.serialize_pem()).unwrap();
        fs::write(dir.join("ca.crt"), trusted.pem()).unwrap();
    }

    /// Completes handshakes with the files of `dir`, and closes each connection.
    async fn serve(dir: &Path) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("https://localhost:{}", listener.local_addr().unwrap().port());
        let provider = Arc::new(ring::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(certificates(&Dial::default(), Some(&dir.join("ca.crt"))).remove(0)).unwrap();
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .allow_unauthenticated()
            .build()
            .unwrap();
        let key = PrivateKeyDer::from_pem_file(dir.join("tls.key")).unwrap();
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(certificates(&Dial::default(), Some(&dir.join("tls.crt"))), key)
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(config));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let _ = acceptor.accept(stream).await;
            }
        });
        url
    }

    async fn failure(dial: &Dial) -> Status {
        let mut client = IngestServiceClient::new(connect::connect(dial).unwrap());
        client.push(tokio_stream::iter([PushRequest::default()])).await.err().unwrap()
    }

    fn key_of(authority: &Authority) -> String {
        let (_, parsed) = X509Certificate::from_der(authority.der()).unwrap();
        let id = parsed.extensions().iter().find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::SubjectKeyIdentifier(id) => Some(id.0),
            _ => None,
        });
        id.unwrap()[..8].iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
    }

    #[tokio::test]
    async fn authorities_that_do_not_meet_are_both_named() {
        let dir = tempfile::tempdir().unwrap();
        let (of_agent, of_collector) = (dir.path().join("agent"), dir.path().join("collector"));
        fs::create_dir(&of_agent).unwrap();
        fs::create_dir(&of_collector).unwrap();
        let (old, new) = (authority(), authority());
        write(&of_agent, &old, &old);
        write(&of_collector, &new, &new);
        let file = |name: &str| Some(of_agent.join(name));
        let dial = Dial {
            url: serve(&of_collector).await,
            ca: file("ca.crt"),
            cert: file("tls.crt"),
            key: file("tls.key"),
            ..Dial::default()
        };
        let stamps = dial.stamps();
        let said = explain(&dial, &failure(&dial).await).await;
        for part in
            [key_of(&old), key_of(&new), "gannet-ca".into(), dial.ca.clone().unwrap().display().to_string()]
        {
            assert!(said.contains(&part), "{part}: {said}");
        }
        // Equal files are no reason to try again; replaced ones are.
        assert!(timeout(Duration::from_millis(1500), files_changed(&dial, &stamps)).await.is_err());
        fs::write(dial.ca.as_ref().unwrap(), new.pem() + "\n").unwrap();
        timeout(Duration::from_secs(10), files_changed(&dial, &stamps)).await.unwrap();
        // Now the agent trusts the collector, which does not trust the agent.
        let said = explain(&dial, &failure(&dial).await).await;
        assert!(said.contains(&key_of(&old)) && said.contains("does not trust --tls-cert"), "{said}");
        write(&of_agent, &new, &new);
        let said = explain(&dial, &failure(&dial).await).await;
        assert!(!said.contains("authority") && !said.contains("trust") && !said.contains("--tls-"), "{said}");
    }
}
