//! The collector as it is asked: connection, errors, and the long answers with their progress.

use gannet_proto::{
    connect::{self, Connection, Dial},
    control::{fleet_service_client::FleetServiceClient, trigger_service_client::TriggerServiceClient},
    pprof,
    query::{
        MergeProgress, MergeRequest, Selection, merge_progress::Message,
        query_service_client::QueryServiceClient,
    },
};
use indicatif::{ProgressBar, ProgressStyle};
use tonic::Status;
use tonic_types::StatusExt as _;

use crate::Error;

/// Large fleets and long lists come in one answer.
const MAX_ANSWER_BYTES: usize = 256 << 20;
/// A merged profile, inflated.
pub(crate) const MAX_PROFILE_BYTES: usize = 1 << 30;

pub(crate) struct Collector {
    url: String,
    connection: Connection,
}

impl Collector {
    pub(crate) fn new(dial: Dial) -> Result<Self, Error> {
        Ok(Self { connection: connect::connect(&dial)?, url: dial.url })
    }

    pub(crate) fn triggers(&self) -> TriggerServiceClient<Connection> {
        TriggerServiceClient::new(self.connection.clone()).max_decoding_message_size(MAX_ANSWER_BYTES)
    }

    pub(crate) fn fleet(&self) -> FleetServiceClient<Connection> {
        FleetServiceClient::new(self.connection.clone()).max_decoding_message_size(MAX_ANSWER_BYTES)
    }

    pub(crate) fn query(&self) -> QueryServiceClient<Connection> {
        QueryServiceClient::new(self.connection.clone()).max_decoding_message_size(MAX_ANSWER_BYTES)
    }

    /// What a failed call means, with the fields that the collector complains about.
    pub(crate) fn fault(&self, status: &Status) -> Error {
        let violations = status.get_details_bad_request().map_or_else(Vec::new, |bad| {
            bad.field_violations
                .into_iter()
                .map(|violation| (violation.field, violation.description))
                .collect()
        });
        Error::Call { text: connect::explain(&self.url, status), violations }
    }

    /// All profiles of a selection as one, gzip-compressed. Shows its progress on a terminal.
    pub(crate) async fn merge(&self, selection: Selection, sample_type: &str) -> Result<Vec<u8>, Error> {
        let request = MergeRequest { selection: Some(selection), sample_type: sample_type.to_owned() };
        let mut answer =
            self.query().merge(request).await.map_err(|status| self.fault(&status))?.into_inner();
        // Draws on the standard error, and only if that is a terminal.
        let bar = ProgressBar::new(0).with_message("merging").with_style(style());
        let mut bytes = Vec::new();
        while let Some(MergeProgress { message }) =
            answer.message().await.map_err(|status| self.fault(&status))?
        {
            match message {
                Some(Message::Progress(progress)) => {
                    bar.set_length(progress.profiles_total);
                    bar.set_position(progress.profiles_done);
                }
                Some(Message::Chunk(chunk)) => {
                    bar.set_message("receiving");
                    if bytes.len() + chunk.data.len() > MAX_PROFILE_BYTES {
                        return Err(pprof::PprofError::TooLarge { max: MAX_PROFILE_BYTES }.into());
                    }
                    bytes.extend(chunk.data);
                }
                None => {}
            }
        }
        bar.finish_and_clear();
        if bytes.is_empty() {
            return Err(Error::Failed(
                "the collector ended its answer without a profile: try again".to_owned(),
            ));
        }
        Ok(bytes)
    }
}

fn style() -> ProgressStyle {
    ProgressStyle::with_template("{msg:>10} {wide_bar} {pos}/{len} profiles {eta}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// One line for each field.
pub(crate) fn lines(violations: &[(String, String)]) -> String {
    violations.iter().fold(String::new(), |text, (field, reason)| text + "\n  " + field + ": " + reason)
}
