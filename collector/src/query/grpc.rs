//! The query service of `query.proto`.

use std::{
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use futures::{Stream, StreamExt as _, stream};
use gannet_proto::query::{self as api, query_service_server::QueryService};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{Download, MergeProgress, Query, QueryError, Selection, Shape, SpanFilter, parse_profile_id};
use crate::{
    auth::Caller,
    sql::{Sql, SqlError},
    store::StoreError,
    table::TableError,
    time,
};

/// Size of the chunks of a profile.
const CHUNK_BYTES: usize = 512 << 10;
/// Time between two progress messages of a merge.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

/// The query service.
pub(crate) struct QueryGrpc(pub(crate) Arc<Query>, pub(crate) Arc<Sql>);

impl From<SqlError> for Status {
    fn from(error: SqlError) -> Self {
        let text = error.to_string();
        match error {
            SqlError::NoTable => Status::failed_precondition(text),
            SqlError::Invalid(_) => Status::invalid_argument(text),
            SqlError::Limit(_) => Status::resource_exhausted(text),
            SqlError::Table(TableError::Damaged { .. } | TableError::File { .. }) => Status::data_loss(text),
            SqlError::Busy | SqlError::Unclean(..) | SqlError::Table(_) => Status::unavailable(text),
            SqlError::Left => Status::cancelled(text),
            SqlError::Failed => Status::internal(text),
        }
    }
}

impl From<QueryError> for Status {
    fn from(error: QueryError) -> Self {
        let text = error.to_string();
        match error {
            QueryError::Invalid(_) => Status::invalid_argument(text),
            QueryError::NotFound(_) => Status::not_found(text),
            QueryError::TooLarge(_) => Status::resource_exhausted(text),
            QueryError::Store(StoreError::Damaged(_)) => Status::data_loss(text),
            QueryError::Busy(_) | QueryError::Store(_) | QueryError::Engine(_) => Status::unavailable(text),
        }
    }
}

fn selection(from: Option<api::Selection>) -> Result<Selection, Status> {
    let api::Selection { query, from, until, profile_id, span_id, trace_id } = from.unwrap_or_default();
    let parse = |field: &str, at: Option<prost_types::Timestamp>| match at {
        None => Ok(None),
        Some(at) => time::to_ms(&at)
            .map(Some)
            .ok_or_else(|| Status::invalid_argument(format!("selection.{field}: not a time after 1970"))),
    };
    let selection = Selection::new(&query, parse("from", from)?, parse("until", until)?, &profile_id)?;
    Ok(selection.in_spans(SpanFilter::new(span_id, trace_id)?))
}

/// Adds the spans of a request to its selections, which may have their own instead.
fn in_spans(
    spans: &SpanFilter,
    [of, base]: [Option<api::Selection>; 2],
) -> Result<(Selection, Option<Selection>), Status> {
    let add = |of: Selection| if of.has_all_samples() { of.in_spans(spans.clone()) } else { of };
    Ok((add(selection(of)?), base.map(|base| selection(Some(base))).transpose()?.map(add)))
}

fn chunks(bytes: Bytes) -> impl Stream<Item = api::ProfileChunk> + Send {
    let count = bytes.len().div_ceil(CHUNK_BYTES);
    stream::iter((0..count).map(move |i| {
        let chunk = bytes.slice(i * CHUNK_BYTES..((i + 1) * CHUNK_BYTES).min(bytes.len()));
        api::ProfileChunk { data: chunk.to_vec(), names_incomplete: false }
    }))
}

type BoxStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl QueryService for QueryGrpc {
    async fn label_names(
        &self,
        request: Request<api::LabelNamesRequest>,
    ) -> Result<Response<api::LabelNamesResponse>, Status> {
        let names = self.0.label_names(selection(request.into_inner().selection)?).await?;
        Ok(Response::new(api::LabelNamesResponse { names }))
    }

    async fn label_values(
        &self,
        request: Request<api::LabelValuesRequest>,
    ) -> Result<Response<api::LabelValuesResponse>, Status> {
        let api::LabelValuesRequest { selection: of, name } = request.into_inner();
        let values = self.0.label_values(selection(of)?, &name).await?;
        Ok(Response::new(api::LabelValuesResponse { values }))
    }

    async fn series(
        &self,
        request: Request<api::SeriesRequest>,
    ) -> Result<Response<api::SeriesResponse>, Status> {
        let series = self.0.series(selection(request.into_inner().selection)?).await?;
        Ok(Response::new(api::SeriesResponse { series }))
    }

    async fn list_profiles(
        &self,
        request: Request<api::ListProfilesRequest>,
    ) -> Result<Response<api::ListProfilesResponse>, Status> {
        let api::ListProfilesRequest { selection: of, limit, page_token } = request.into_inner();
        let (profiles, next_page_token) = self.0.list(selection(of)?, limit, page_token).await?;
        Ok(Response::new(api::ListProfilesResponse { profiles, next_page_token }))
    }

    type GetProfileStream = BoxStream<api::ProfileChunk>;

    async fn get_profile(
        &self,
        request: Request<api::GetProfileRequest>,
    ) -> Result<Response<Self::GetProfileStream>, Status> {
        let api::GetProfileRequest { id, span_id, trace_id } = request.into_inner();
        let spans = SpanFilter::new(span_id, trace_id)?;
        let Download { bytes, lacks_names } = self.0.profile(parse_profile_id(&id)?, spans).await?;
        let chunks =
            chunks(bytes).map(move |chunk| api::ProfileChunk { names_incomplete: lacks_names, ..chunk });
        Ok(Response::new(Box::pin(chunks.map(Ok))))
    }

    type MergeStream = BoxStream<api::MergeProgress>;

    async fn merge(
        &self,
        request: Request<api::MergeRequest>,
    ) -> Result<Response<Self::MergeStream>, Status> {
        use api::merge_progress::{Message, Progress as Step};
        let api::MergeRequest { selection: of, sample_type } = request.into_inner();
        let of = selection(of)?;
        let query = Arc::clone(&self.0);
        let (sender, receiver) = tokio::sync::mpsc::channel(4);
        tokio::spawn(async move {
            let progress = Arc::new(MergeProgress::default());
            let step = || {
                let step = Step {
                    profiles_done: progress.done.load(Ordering::Relaxed),
                    profiles_total: progress.total.load(Ordering::Relaxed),
                    profiles_unreadable: progress.unreadable.load(Ordering::Relaxed),
                    names_incomplete: progress.lacks_names.load(Ordering::Relaxed),
                    read: Some(progress.report()),
                };
                Ok(api::MergeProgress { message: Some(Message::Progress(step)) })
            };
            let merge = query.merge(&of, &sample_type, &progress);
            tokio::pin!(merge);
            let mut tick = tokio::time::interval(PROGRESS_INTERVAL);
            tick.tick().await;
            let merged = loop {
                tokio::select! {
                    merged = &mut merge => break merged,
                    // The client has gone. Dropping the merge ends it.
                    () = sender.closed() => return,
                    _ = tick.tick() => drop(sender.try_send(step())),
                }
            };
            match merged {
                Err(error) => drop(sender.send(Err(error.into())).await),
                Ok(bytes) => {
                    let chunks = chunks(bytes)
                        .map(|chunk| Ok(api::MergeProgress { message: Some(Message::Chunk(chunk)) }));
                    let mut messages = stream::iter([step()]).chain(chunks);
                    while let Some(message) = messages.next().await {
                        if sender.send(message).await.is_err() {
                            return;
                        }
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn flame_graph(
        &self,
        request: Request<api::FlameGraphRequest>,
    ) -> Result<Response<api::FlameGraphResponse>, Status> {
        let api::FlameGraphRequest {
            selection: of,
            base,
            sample_type,
            max_nodes,
            flat,
            interpreter_frames,
            hide_error_frames,
            span_id,
            trace_id,
        } = request.into_inner();
        let (of, base) = in_spans(&SpanFilter::new(span_id, trace_id)?, [of, base])?;
        let shape = Shape { max: max_nodes, interpreter_frames, hide_error_frames };
        let mut answer = self.0.flamegraph(&of, base.as_ref(), &sample_type, shape).await?;
        if flat {
            answer.nodes = answer.root.take().map(gannet_proto::pprof::flat).unwrap_or_default();
        }
        Ok(Response::new(answer))
    }

    async fn top(&self, request: Request<api::TopRequest>) -> Result<Response<api::TopResponse>, Status> {
        let api::TopRequest {
            selection: of,
            base,
            sample_type,
            limit,
            interpreter_frames,
            hide_error_frames,
            span_id,
            trace_id,
        } = request.into_inner();
        let (of, base) = in_spans(&SpanFilter::new(span_id, trace_id)?, [of, base])?;
        let shape = Shape { max: limit, interpreter_frames, hide_error_frames };
        let answer = self.0.top(&of, base.as_ref(), &sample_type, shape).await?;
        Ok(Response::new(answer))
    }

    async fn timeline(
        &self,
        request: Request<api::TimelineRequest>,
    ) -> Result<Response<api::TimelineResponse>, Status> {
        let api::TimelineRequest { selection: of, sample_type, step } = request.into_inner();
        let step = match step {
            None => None,
            Some(step) => Some(
                time::duration_to_ms(&step)
                    .ok_or_else(|| Status::invalid_argument("step: must not be negative"))?,
            ),
        };
        Ok(Response::new(self.0.timeline(selection(of)?, sample_type, step).await?))
    }

    type SqlStream = BoxStream<api::SqlResponse>;

    async fn sql(&self, request: Request<api::SqlRequest>) -> Result<Response<Self::SqlStream>, Status> {
        let who = request.extensions().get::<Caller>().map(|caller| caller.display_name.clone());
        let (answer, receiver) = tokio::sync::mpsc::channel(4);
        tokio::spawn(Arc::clone(&self.1).run(request.into_inner(), who.unwrap_or_default(), answer));
        Ok(Response::new(Box::pin(
            ReceiverStream::new(receiver).map(|message| message.map_err(Status::from)),
        )))
    }
}
