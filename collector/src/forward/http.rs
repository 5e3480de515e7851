//! The HTTP/1.1 client of the targets that speak it, so that profiles pass through every gateway.

use std::{path::PathBuf, time::Duration};

use super::{Delivery, ForwardError, ForwardOptions, ForwardTarget};
use crate::tls;
use gannet_proto::connect;
use reqwest::{
    Client, StatusCode,
    header::{AUTHORIZATION, HeaderMap, RETRY_AFTER},
};

/// Bytes of a response that the client reads.
const MAX_ANSWER_BYTES: usize = 64 << 10;

pub(super) struct HttpClient {
    client: Client,
    token_file: Option<PathBuf>,
}

impl HttpClient {
    /// Builds the client, which connects with the first call.
    pub(super) fn new(target: &ForwardTarget, options: &ForwardOptions) -> Result<Self, ForwardError> {
        let roots = if target.url.starts_with("https") { roots(target, options)? } else { Vec::new() };
        let client =
            tls::http_client(roots).build().map_err(|error| ForwardError::Ca(connect::innermost(&error)))?;
        Ok(Self { client, token_file: options.forward_token_file.clone() })
    }

    /// Posts a message, and returns the body of a response that accepts it. Every other outcome is the error.
    pub(super) async fn post(
        &self,
        url: &str,
        headers: HeaderMap,
        body: Vec<u8>,
    ) -> Result<Vec<u8>, Delivery> {
        let mut request = self.client.post(url).headers(headers).body(body);
        if let Some(file) = &self.token_file {
            match tokio::fs::read_to_string(file).await {
                Ok(token) => request = request.header(AUTHORIZATION, format!("Bearer {}", token.trim())),
                Err(error) => {
                    return Err(Delivery::retry(format!("--forward-token-file {}: {error}", file.display())));
                }
            }
        }
        let response = match request.send().await {
            Ok(response) => response,
            // A wrong header or URL, which no attempt can cure.
            Err(error) if error.is_builder() => return Err(Delivery::Refused(connect::innermost(&error))),
            Err(error) => return Err(Delivery::retry(connect::innermost(&error))),
        };
        let status = response.status();
        let after = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        let body = body_of(response).await;
        if status.is_success() {
            return Ok(body);
        }
        let why = format!("{status}: {}", String::from_utf8_lossy(&body).trim());
        let is_temporary = status.is_server_error()
            || matches!(
                status,
                StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS | StatusCode::UNAUTHORIZED
            );
        Err(if is_temporary {
            Delivery::Retry { why, after: after.map(Duration::from_secs) }
        } else {
            Delivery::Refused(why)
        })
    }
}

/// Returns the trusted authorities for an https target.
fn roots(
    target: &ForwardTarget,
    options: &ForwardOptions,
) -> Result<Vec<reqwest::Certificate>, ForwardError> {
    let pem = connect::authority(options.forward_ca.as_deref())
        .map_err(|source| ForwardError::Dial { target: target.to_string(), source })?;
    tls::client_roots(&pem).map_err(ForwardError::Ca)
}

/// Reads the body of a response. A broken body, or one above [`MAX_ANSWER_BYTES`], counts as empty.
async fn body_of(mut response: reqwest::Response) -> Vec<u8> {
    let mut body = Vec::new();
    loop {
        match response.chunk().await {
            Ok(Some(chunk)) if body.len() + chunk.len() <= MAX_ANSWER_BYTES => body.extend_from_slice(&chunk),
            Ok(None) => return body,
            Ok(Some(_)) | Err(_) => return Vec::new(),
        }
    }
}
