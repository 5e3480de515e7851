//! The connection to the collector: gRPC clients, error texts and the download of merged profiles.

use std::collections::BTreeMap;

use gannet_proto::{
    connect::{self, Connection, Dial},
    control::{fleet_service_client::FleetServiceClient, trigger_service_client::TriggerServiceClient},
    debuginfo::debug_info_service_client::DebugInfoServiceClient,
    pprof,
    query::{
        MergeProgress, MergeRequest, ReadReport, Selection, SeriesRequest,
        deletion_service_client::DeletionServiceClient, merge_progress::Message,
        query_service_client::QueryServiceClient,
    },
};
use indicatif::{ProgressBar, ProgressStyle};
use tonic::Status;
use tonic_types::StatusExt as _;

use crate::{error::Error, render::Console};

/// Largest answer in one message. A list of all nodes or profiles of a large fleet comes as one.
const MAX_ANSWER_BYTES: usize = 256 << 20;
/// Largest profile that gannetctl accepts, inflated.
pub(crate) const MAX_PROFILE_BYTES: usize = 1 << 30;

/// A collector's address with a connection that opens at the first call.
pub(crate) struct Collector {
    url: String,
    connection: Connection,
}

impl Collector {
    /// Prepares the connection; fails if the options cannot work, without a network call.
    pub(crate) fn new(dial: Dial) -> Result<Self, Error> {
        Ok(Self { connection: connect::connect(&dial)?, url: dial.url })
    }

    pub(crate) fn triggers(&self) -> TriggerServiceClient<Connection> {
        TriggerServiceClient::new(self.connection.clone()).max_decoding_message_size(MAX_ANSWER_BYTES)
    }

    pub(crate) fn fleet(&self) -> FleetServiceClient<Connection> {
        FleetServiceClient::new(self.connection.clone()).max_decoding_message_size(MAX_ANSWER_BYTES)
    }

    pub(crate) fn debug_info(&self) -> DebugInfoServiceClient<Connection> {
        DebugInfoServiceClient::new(self.connection.clone()).max_decoding_message_size(MAX_ANSWER_BYTES)
    }

    pub(crate) fn query(&self) -> QueryServiceClient<Connection> {
        QueryServiceClient::new(self.connection.clone()).max_decoding_message_size(MAX_ANSWER_BYTES)
    }

    pub(crate) fn deletions(&self) -> DeletionServiceClient<Connection> {
        DeletionServiceClient::new(self.connection.clone()).max_decoding_message_size(MAX_ANSWER_BYTES)
    }

    /// Converts a failed call into an error text, with the request fields that the collector refuses.
    pub(crate) fn fault(&self, status: &Status) -> Error {
        let violations = status.get_details_bad_request().map_or_else(Vec::new, |bad| {
            bad.field_violations
                .into_iter()
                .map(|violation| (violation.field, violation.description))
                .collect()
        });
        Error::Call { text: connect::explain(&self.url, status), violations }
    }

    /// Returns the labels that all series of a selection share.
    pub(crate) async fn shared_labels(
        &self,
        selection: Selection,
    ) -> Result<BTreeMap<String, String>, Error> {
        let answer = self.query().series(SeriesRequest { selection: Some(selection) }).await;
        let mut series = answer.map_err(|status| self.fault(&status))?.into_inner().series.into_iter();
        let mut shared = series.next().map(|first| first.labels).unwrap_or_default();
        for other in series {
            shared.retain(|name, value| other.labels.get(name) == Some(value));
        }
        Ok(shared.into_iter().collect())
    }

    /// Downloads all profiles of a selection merged into one, as gzip-compressed pprof, with what the collector read for it. Shows the
    /// progress on a terminal, and reports on standard error what the result lacks.
    pub(crate) async fn merge(
        &self,
        selection: Selection,
        sample_type: &str,
        console: &mut Console<'_>,
    ) -> Result<(Vec<u8>, ReadReport), Error> {
        let request = MergeRequest { selection: Some(selection), sample_type: sample_type.to_owned() };
        let mut answer =
            self.query().merge(request).await.map_err(|status| self.fault(&status))?.into_inner();
        // The bar draws on standard error, and only if that is a terminal.
        let bar = ProgressBar::new(0).with_message("merging").with_style(style());
        let (mut bytes, mut unreadable, mut lacks_names) = (Vec::new(), 0, false);
        let mut read = ReadReport::default();
        while let Some(MergeProgress { message }) =
            answer.message().await.map_err(|status| self.fault(&status))?
        {
            match message {
                Some(Message::Progress(progress)) => {
                    bar.set_length(progress.profiles_total);
                    bar.set_position(progress.profiles_done);
                    unreadable = progress.profiles_unreadable;
                    lacks_names = progress.names_incomplete;
                    read = progress.read.unwrap_or_default();
                }
                Some(Message::Chunk(chunk)) => {
                    bar.set_message("receiving");
                    append(&mut bytes, &chunk.data)?;
                }
                None => {}
            }
        }
        bar.finish_and_clear();
        if bytes.is_empty() {
            return Err(Error::Failed(
                "the collector ended its answer without a profile; try again".to_owned(),
            ));
        }
        console.note_unreadable(unreadable);
        console.note_names(lacks_names);
        Ok((bytes, read))
    }
}

/// Appends a received chunk to a profile, up to [`MAX_PROFILE_BYTES`].
pub(crate) fn append(profile: &mut Vec<u8>, chunk: &[u8]) -> Result<(), Error> {
    if profile.len() + chunk.len() > MAX_PROFILE_BYTES {
        return Err(pprof::PprofError::TooLarge { max: MAX_PROFILE_BYTES }.into());
    }
    profile.extend_from_slice(chunk);
    Ok(())
}

fn style() -> ProgressStyle {
    ProgressStyle::with_template("{msg:>10} {wide_bar} {pos}/{len} profiles {eta}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
}
