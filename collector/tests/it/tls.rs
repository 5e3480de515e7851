use std::{path::Path, sync::Arc};

use gannet_collector::{Collector, Config, TlsFiles};
use gannet_proto::{
    control::{SetTriggersRequest, trigger_service_client::TriggerServiceClient},
    query::{ListProfilesRequest, query_service_client::QueryServiceClient},
    rules,
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Identity};

use crate::support::{Pusher, batch, config, get_over, now_ms};

struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

struct Pair {
    cert: String,
    key: String,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self { issuer: CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap() }
    }

    fn pem(&self) -> String {
        self.issuer.pem()
    }

    fn sign(&self, name: &str) -> Pair {
        let key = KeyPair::generate().unwrap();
        let cert =
            CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, &self.issuer).unwrap();
        Pair { cert: cert.pem(), key: key.serialize_pem() }
    }
}

fn files(dir: &Path, server: &Pair, client_ca: Option<&Authority>) -> TlsFiles {
    let write = |name: &str, text: &str| {
        let path = dir.join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    TlsFiles {
        cert: write("cert.pem", &server.cert),
        key: write("key.pem", &server.key),
        client_ca: client_ca.map(|ca| write("ca.pem", &ca.pem())),
    }
}

async fn dial(
    addr: std::net::SocketAddr,
    ca: &Authority,
    client: Option<&Pair>,
) -> Result<Channel, tonic::transport::Error> {
    let mut tls =
        ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca.pem())).domain_name("localhost");
    if let Some(pair) = client {
        tls = tls.identity(Identity::from_pem(&pair.cert, &pair.key));
    }
    Channel::from_shared(format!("https://{addr}")).unwrap().tls_config(tls).unwrap().connect().await
}

async fn https(
    addr: std::net::SocketAddr,
    ca: &Authority,
    client: Option<&Pair>,
    path: &str,
) -> std::io::Result<crate::support::Answer> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.pem().as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let config = match client {
        None => builder.with_no_client_auth(),
        Some(pair) => {
            let cert = CertificateDer::from_pem_slice(pair.cert.as_bytes()).unwrap();
            let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).unwrap();
            builder.with_client_auth_cert(vec![cert], key).unwrap()
        }
    };
    let tcp = TcpStream::connect(addr).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let tls = TlsConnector::from(Arc::new(config)).connect(name, tcp).await?;
    get_over(tls, path).await
}

#[tokio::test]
async fn with_a_certificate_both_listeners_speak_tls_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Authority::new();
    let tls = files(dir.path(), &ca.sign("localhost"), None);
    // With TLS any address may be served.
    let config = Config {
        tls: Some(tls),
        listen: ([0, 0, 0, 0], 0).into(),
        http: ([0, 0, 0, 0], 0).into(),
        ..config(&dir.path().join("data"))
    };
    let running = Collector::start(config).await.unwrap();
    let local = |port| std::net::SocketAddr::from(([127, 0, 0, 1], port));
    let (grpc, http) = (local(running.grpc_addr.port()), local(running.http_addr.port()));
    let mut pusher = Pusher::over(dial(grpc, &ca, None).await.unwrap()).await.unwrap();
    pusher.store(batch("shop", now_ms(), &[("main", 1)])).await;
    let answer = https(http, &ca, None, "/api/v1/labels").await.unwrap();
    assert_eq!(answer.status, 200, "{}", answer.text());
    // Plaintext gets nowhere, nor does one who trusts another authority.
    let plain = Channel::from_shared(format!("http://{grpc}")).unwrap().connect_lazy();
    assert!(QueryServiceClient::new(plain).list_profiles(ListProfilesRequest::default()).await.is_err());
    assert!(dial(grpc, &Authority::new(), None).await.is_err());
    assert!(https(http, &Authority::new(), None, "/livez").await.is_err());
    running.shutdown().await;
}

#[tokio::test]
async fn with_a_client_authority_only_its_clients_are_let_in_and_probes_still_answered() {
    let dir = tempfile::tempdir().unwrap();
    let (ca, clients, strangers) = (Authority::new(), Authority::new(), Authority::new());
    let tls = files(dir.path(), &ca.sign("localhost"), Some(&clients));
    let running = Collector::start(Config {
        tls: Some(tls),
        http_local: Some(([127, 0, 0, 1], 0).into()),
        ..config(&dir.path().join("data"))
    })
    .await
    .unwrap();
    let (grpc, http) = (running.grpc_addr, running.http_addr);
    let (client, stranger) = (clients.sign("agent"), strangers.sign("agent"));
    for who in [None, Some(&stranger)] {
        // Under TLS 1.3 the refusal shows at the first call.
        let refused = match dial(grpc, &ca, who).await {
            Err(_) => true,
            Ok(channel) => {
                QueryServiceClient::new(channel).list_profiles(ListProfilesRequest::default()).await.is_err()
            }
        };
        assert!(refused);
    }
    let known = dial(grpc, &ca, Some(&client)).await.unwrap();
    let rule = rules::parse("rules: [{id: a, match: {comm: [x]}}]", "test").unwrap();
    let mut triggers = TriggerServiceClient::new(known);
    triggers.set_triggers(SetTriggersRequest { rules: rule, ..Default::default() }).await.unwrap();
    let scope = triggers
        .get_triggers(gannet_proto::control::GetTriggersRequest::default())
        .await
        .unwrap()
        .into_inner();
    let who = scope.scope.unwrap().changed_by;
    assert!(who.starts_with("certificate sha256:") && who.len() > 40, "{who}");

    let page = https(http, &ca, None, "/").await.unwrap();
    assert_eq!(page.status, 401);
    assert!(page.text().contains("--tls-client-ca"), "{}", page.text());
    for path in ["/livez", "/readyz"] {
        assert_eq!(https(http, &ca, None, path).await.unwrap().status, 200);
    }
    assert_eq!(https(http, &ca, Some(&client), "/api/v1/rules").await.unwrap().status, 200);
    assert!(https(http, &ca, Some(&stranger), "/livez").await.is_err());

    // Who is on this machine needs none; a page elsewhere that reaches it by a name of its own gets nothing.
    let local = running.http_local_addr.unwrap();
    let answer = get_over(TcpStream::connect(local).await.unwrap(), "/api/v1/rules").await.unwrap();
    assert_eq!(answer.status, 200, "{}", answer.text());
    let mut stream = TcpStream::connect(local).await.unwrap();
    let request = "GET /api/v1/rules HTTP/1.1\r\nHost: rebound.example:80\r\nConnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    assert!(text.starts_with("HTTP/1.1 403"), "{text}");
    running.shutdown().await;
}

#[tokio::test]
async fn certificates_that_cannot_work_are_named_at_start() {
    let dir = tempfile::tempdir().unwrap();
    let (ca, other) = (Authority::new(), Authority::new());
    let good = files(dir.path(), &ca.sign("localhost"), None);
    let key = dir.path().join("other-key.pem");
    std::fs::write(&key, other.sign("localhost").key).unwrap();
    let missing = dir.path().join("missing.pem");
    let cases = [
        (TlsFiles { cert: missing.clone(), ..good.clone() }, "--tls-cert"),
        (TlsFiles { cert: good.key.clone(), ..good.clone() }, "no certificate"),
        (TlsFiles { key: good.cert.clone(), ..good.clone() }, "no private key"),
        (TlsFiles { key, ..good.clone() }, "does not go with"),
        (TlsFiles { client_ca: Some(missing), ..good.clone() }, "--tls-client-ca"),
    ];
    for (tls, says) in cases {
        let config = Config { tls: Some(tls), ..config(&dir.path().join("data")) };
        let error = Collector::start(config).await.err().expect(says).to_string();
        assert!(error.contains(says), "{error}");
    }
}
