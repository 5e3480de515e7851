//! The client of Parca, which speaks gRPC.

use gannet_proto::{
    connect::Connection,
    foreign::parca::{self, profile_store_service_client::ProfileStoreServiceClient},
};
use tonic::Code;

use super::{Delivery, ForwardError, ForwardOptions, ForwardTarget, LEDGER_HEADER, Part, grpc_connection};

pub(super) struct ParcaClient(ProfileStoreServiceClient<Connection>);

impl ParcaClient {
    /// Builds the client, which connects with the first call.
    pub(super) fn new(target: &ForwardTarget, options: &ForwardOptions) -> Result<Self, ForwardError> {
        let connection = grpc_connection(target, options)?;
        Ok(Self(ProfileStoreServiceClient::new(connection)))
    }

    pub(super) async fn send(&self, series: &[(String, String)], part: &Part<'_>) -> Delivery {
        let labels = series
            .iter()
            .map(|(name, value)| parca::Label { name: name.clone(), value: value.clone() })
            .collect();
        let request = parca::WriteRawRequest {
            tenant: String::new(),
            series: vec![parca::RawProfileSeries {
                labels: Some(parca::LabelSet { labels }),
                samples: vec![parca::RawSample { raw_profile: part.pprof.to_vec() }],
            }],
            // The addresses are those of the running process.
            normalized: false,
        };
        let mut request = tonic::Request::new(request);
        if let (false, Ok(ledger)) = (part.ledger.is_empty(), part.ledger.parse()) {
            request.metadata_mut().insert(LEDGER_HEADER, ledger);
        }
        match self.0.clone().write_raw(request).await {
            Ok(_) => Delivery::Accepted,
            Err(status) => {
                let reason = status.to_string();
                match status.code() {
                    Code::InvalidArgument
                    | Code::NotFound
                    | Code::PermissionDenied
                    | Code::FailedPrecondition
                    | Code::OutOfRange
                    | Code::Unimplemented
                    | Code::AlreadyExists => Delivery::Refused(reason),
                    _ => Delivery::retry(reason),
                }
            }
        }
    }
}
