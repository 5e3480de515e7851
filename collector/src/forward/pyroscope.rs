//! The client of Pyroscope. It speaks the Connect protocol over HTTP/1.1, as Pyroscope's own clients do, so that it passes
//! through every gateway.

use std::path::PathBuf;

use gannet_proto::{
    connect,
    foreign::{pyroscope, pyroscope_types},
};
use prost::Message as _;
use reqwest::{
    Client, StatusCode,
    header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue},
};

use super::{Delivery, ForwardError, ForwardOptions, ForwardTarget, LEDGER_HEADER, Part};
use crate::tls;

/// Bytes of an error response that go into the log.
const MAX_ERROR_BYTES: usize = 64 << 10;

pub(super) struct PyroscopeClient {
    client: Client,
    url: String,
    tenant: Option<String>,
    token_file: Option<PathBuf>,
}

impl PyroscopeClient {
    /// Builds the client, which connects with the first call.
    pub(super) fn new(target: &ForwardTarget, options: &ForwardOptions) -> Result<Self, ForwardError> {
        // It succeeds once in a process. An earlier call has installed the same provider.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let roots = if target.url.starts_with("https") { roots(target, options)? } else { Vec::new() };
        let client = Client::builder()
            .http1_only()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .tls_certs_only(roots)
            .user_agent(concat!("gannet-collector/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| ForwardError::Ca(connect::innermost(&error)))?;
        Ok(Self {
            client,
            url: format!("{}/push.v1.PusherService/Push", target.url),
            tenant: options.forward_tenant.clone(),
            token_file: options.forward_token_file.clone(),
        })
    }

    pub(super) async fn send(&self, series: &[(String, String)], part: &Part<'_>) -> Delivery {
        let Part { id, pprof, ledger } = *part;
        let labels = series
            .iter()
            .map(|(name, value)| pyroscope_types::LabelPair { name: name.clone(), value: value.clone() });
        let sample = pyroscope::RawSample { raw_profile: pprof.to_vec(), id: id.to_owned() };
        let message = pyroscope::PushRequest {
            series: vec![pyroscope::RawProfileSeries { labels: labels.collect(), samples: vec![sample] }],
        };
        let mut request = self
            .client
            .post(&self.url)
            .header(CONTENT_TYPE, "application/proto")
            .header("connect-protocol-version", "1")
            .body(message.encode_to_vec());
        if let Ok(ledger) = HeaderValue::from_str(ledger)
            && !ledger.is_empty()
        {
            request = request.header(LEDGER_HEADER, ledger);
        }
        if let Some(tenant) = &self.tenant {
            request = request.header("x-scope-orgid", tenant);
        }
        if let Some(file) = &self.token_file {
            match tokio::fs::read_to_string(file).await {
                Ok(token) => request = request.header(AUTHORIZATION, format!("Bearer {}", token.trim())),
                Err(error) => {
                    return Delivery::Retry(format!("--forward-token-file {}: {error}", file.display()));
                }
            }
        }
        let response = match request.send().await {
            Ok(response) => response,
            // A wrong header or URL, which no attempt can cure.
            Err(error) if error.is_builder() => return Delivery::Refused(connect::innermost(&error)),
            Err(error) => return Delivery::Retry(connect::innermost(&error)),
        };
        let status = response.status();
        if status.is_success() {
            return Delivery::Accepted;
        }
        let reason = format!("{status}: {}", error_text(response).await.trim());
        let is_temporary = status.is_server_error()
            || matches!(
                status,
                StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS | StatusCode::UNAUTHORIZED
            );
        if is_temporary { Delivery::Retry(reason) } else { Delivery::Refused(reason) }
    }
}

/// Returns the trusted authorities for an https target.
fn roots(
    target: &ForwardTarget,
    options: &ForwardOptions,
) -> Result<Vec<reqwest::Certificate>, ForwardError> {
    let pem = connect::authority(options.forward_ca.as_deref())
        .map_err(|source| ForwardError::Dial { target: target.to_string(), source })?;
    let certs = tls::parse_certificates(&pem).map_err(ForwardError::Ca)?;
    Ok(certs
        .into_iter()
        // The system's bundle may hold certificates that rustls does not understand.
        .filter(|cert| rustls::RootCertStore::empty().add(cert.clone()).is_ok())
        .filter_map(|cert| reqwest::Certificate::from_der(&cert).ok())
        .collect())
}

/// Reads the body of an error response. A broken body, or one above [`MAX_ERROR_BYTES`], counts as empty.
async fn error_text(mut response: reqwest::Response) -> String {
    let mut body = Vec::new();
    loop {
        match response.chunk().await {
            Ok(Some(chunk)) if body.len() + chunk.len() <= MAX_ERROR_BYTES => body.extend_from_slice(&chunk),
            Ok(None) => return String::from_utf8_lossy(&body).into_owned(),
            Ok(Some(_)) | Err(_) => return String::new(),
        }
    }
}
