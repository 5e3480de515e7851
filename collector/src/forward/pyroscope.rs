//! The client of Pyroscope. It speaks the Connect protocol over HTTP/1.1, as Pyroscope's own clients do.

use gannet_proto::foreign::{pyroscope, pyroscope_types};
use prost::Message as _;
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderValue};

use super::{Delivery, ForwardError, ForwardOptions, ForwardTarget, LEDGER_HEADER, Part, http::HttpClient};

pub(super) struct PyroscopeClient {
    client: HttpClient,
    url: String,
    tenant: Option<String>,
}

impl PyroscopeClient {
    /// Builds the client, which connects with the first call.
    pub(super) fn new(target: &ForwardTarget, options: &ForwardOptions) -> Result<Self, ForwardError> {
        Ok(Self {
            client: HttpClient::new(target, options)?,
            url: format!("{}/push.v1.PusherService/Push", target.url),
            tenant: options.forward_tenant.clone(),
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
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/proto"));
        headers.insert("connect-protocol-version", HeaderValue::from_static("1"));
        if let Ok(ledger) = HeaderValue::from_str(ledger)
            && !ledger.is_empty()
        {
            headers.insert(LEDGER_HEADER, ledger);
        }
        if let Some(tenant) = &self.tenant {
            match HeaderValue::from_str(tenant) {
                Ok(tenant) => headers.insert("x-scope-orgid", tenant),
                Err(error) => return Delivery::Refused(format!("--forward-tenant: {error}")),
            };
        }
        match self.client.post(&self.url, headers, message.encode_to_vec()).await {
            Ok(_) => Delivery::Accepted,
            Err(delivery) => delivery,
        }
    }
}
