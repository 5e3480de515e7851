//! The deletion service of `deletion.proto`.

use std::sync::Arc;

use gannet_base::ByteSize;
use gannet_proto::query::{
    DeleteProfilesRequest, DeleteProfilesResponse, Deletion, ListDeletionsRequest, ListDeletionsResponse,
    deletion_service_server::DeletionService,
};
use tonic::{Code, Request, Response, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::{
    auth::Caller,
    rules::Rules,
    selector::{Matcher, Selector},
    store::{Chosen, DeletionCounts, DeletionQueue, Store, StoreError, Tombstone},
    time,
};

/// Length of a selector in bytes. It is stored with the deletion.
const MAX_QUERY_BYTES: usize = 8 << 10;

/// The deletion service.
pub(crate) struct DeletionGrpc {
    pub(crate) store: Arc<Store>,
    pub(crate) queue: DeletionQueue,
    pub(crate) rules: Arc<Rules>,
}

/// Returns the error of a request with a wrong field.
fn invalid(field: &str, reason: &str) -> Status {
    let mut details = ErrorDetails::new();
    details.add_bad_request_violation(field, reason);
    Status::with_error_details(Code::InvalidArgument, format!("{field}: {reason}"), details)
}

fn unavailable(error: &StoreError) -> Status {
    Status::unavailable(error.to_string())
}

/// Returns a time in a text, or the word for none.
fn time_text(ms: Option<u64>) -> String {
    let at = ms.and_then(|ms| jiff::Timestamp::from_millisecond(ms as i64).ok());
    at.map_or_else(|| "any time".to_owned(), |at| at.to_string())
}

impl DeletionGrpc {
    /// Checks a request, and returns its profiles.
    fn choose(&self, request: &DeleteProfilesRequest) -> Result<Chosen, Status> {
        let DeleteProfilesRequest { query, from, until, dry_run: _ } = request;
        if query.len() > MAX_QUERY_BYTES {
            return Err(invalid("query", &format!("longer than {}", ByteSize(MAX_QUERY_BYTES as u64))));
        }
        let selector = Selector::parse(query).map_err(|error| {
            let text = error.to_string();
            invalid("query", text.strip_prefix("query, ").unwrap_or(&text))
        })?;
        let at = |field: &str, at: &Option<prost_types::Timestamp>| match at {
            None => Ok(None),
            Some(at) => time::to_ms(at).map(Some).ok_or_else(|| invalid(field, "not a time after 1970")),
        };
        let (from_ms, until_ms) = (at("from", from)?, at("until", until)?);
        if selector.is_empty() && from_ms.is_none() && until_ms.is_none() {
            return Err(invalid(
                "query",
                "it is empty, and there is no range, so this would delete all profiles; give labels, `from` or `until`",
            ));
        }
        let chosen =
            Chosen { selector, from_ms: from_ms.unwrap_or(0), until_ms: until_ms.unwrap_or(u64::MAX) };
        if chosen.from_ms >= chosen.until_ms {
            let from = time_text(from_ms);
            return Err(invalid(
                "until",
                &format!("it is not after `from` ({from}), so no profile is in the range; exchange both"),
            ));
        }
        let names: Vec<&str> = chosen.selector.matchers().iter().map(Matcher::name).collect();
        if let Some((name, known)) = self.store.unknown_label(&names) {
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            return Err(invalid(
                "query",
                &format!("no stored series has the label `{name}`; the labels are: {known}"),
            ));
        }
        Ok(chosen)
    }

    async fn count(&self, chosen: &Chosen) -> Result<DeletionCounts, Status> {
        let (store, chosen) = (Arc::clone(&self.store), chosen.clone());
        let counted = tokio::task::spawn_blocking(move || store.count(&chosen)).await;
        counted.map_err(|_| unavailable(&StoreError::Ended))?.map_err(|error| unavailable(&error))
    }

    /// Writes the audit log. Without an entry, nothing is deleted.
    async fn record(&self, who: &str, note: String) -> Result<(), Status> {
        let (rules, who) = (Arc::clone(&self.rules), who.to_owned());
        let recorded = tokio::task::spawn_blocking(move || rules.audit().record_deletion(&who, note)).await;
        recorded.map_err(|_| unavailable(&StoreError::Ended))?.map_err(|error| {
            Status::unavailable(format!(
                "nothing is deleted, because the audit log cannot be written: {error}; check the disk of the collector"
            ))
        })
    }
}

#[tonic::async_trait]
impl DeletionService for DeletionGrpc {
    async fn delete_profiles(
        &self,
        request: Request<DeleteProfilesRequest>,
    ) -> Result<Response<DeleteProfilesResponse>, Status> {
        let caller = request.extensions().get::<Caller>();
        let who = caller.map_or_else(|| "anonymous".to_owned(), |caller| caller.display_name.clone());
        let request = request.into_inner();
        let chosen = self.choose(&request)?;
        let counts = self.count(&chosen).await?;
        let DeletionCounts { profiles, samples, bytes, series, unreadable } = counts;
        let mut response = DeleteProfilesResponse {
            deletion_id: String::new(),
            profiles,
            samples,
            bytes,
            series,
            unreadable_objects: unreadable,
        };
        if request.dry_run {
            return Ok(Response::new(response));
        }
        let from = time_text(Some(chosen.from_ms).filter(|ms| *ms > 0));
        let until = time_text(Some(chosen.until_ms).filter(|ms| *ms < u64::MAX));
        let of = format!(
            "{profiles} profiles ({samples} samples, {bytes} bytes, {series} series) with {} from {from} until {until}",
            chosen.selector
        );
        // The entry precedes the deletion, so that a crash cannot hide the deletion.
        self.record(&who, of.clone()).await?;
        match self.queue.delete(&request.query, chosen, &who).await {
            Ok(id) => response.deletion_id = id.to_string(),
            Err(error) => {
                self.record(&who, format!("failed: {error}; not deleted: {of}")).await?;
                return Err(unavailable(&error));
            }
        }
        Ok(Response::new(response))
    }

    async fn list_deletions(
        &self,
        _: Request<ListDeletionsRequest>,
    ) -> Result<Response<ListDeletionsResponse>, Status> {
        let deletions = self.store.pending_deletions();
        let deletions = deletions.iter().map(|of| {
            let Tombstone { id, query, who, from_ms, until_ms, .. } = &**of;
            Deletion {
                id: id.to_string(),
                query: query.clone(),
                from: Some(*from_ms).filter(|ms| *ms > 0).map(time::timestamp),
                until: Some(*until_ms).filter(|ms| *ms < u64::MAX).map(time::timestamp),
                who: who.clone(),
                at: Some(time::timestamp(id.timestamp_ms())),
            }
        });
        Ok(Response::new(ListDeletionsResponse { deletions: deletions.collect() }))
    }
}
