//! Queries whose times are measured.

use std::time::{Duration, Instant, SystemTime};

use gannet_proto::query::{
    FlameGraphRequest, LabelNamesRequest, LabelValuesRequest, Selection,
    query_service_client::QueryServiceClient,
};
use tonic::transport::Channel;

/// Bytes of an answer, at most.
const MAX_ANSWER_BYTES: usize = 256 << 20;

pub(crate) struct Queries(QueryServiceClient<Channel>);

/// Profiles of a selector and time range.
#[derive(Clone)]
pub(crate) struct Range {
    pub(crate) query: String,
    pub(crate) from: SystemTime,
    pub(crate) until: SystemTime,
}

impl Range {
    fn selection(&self) -> Selection {
        let Self { query, from, until } = self.clone();
        Selection { query, from: Some(from.into()), until: Some(until.into()), ..Selection::default() }
    }
}

impl Queries {
    pub(crate) fn new(channel: Channel) -> Self {
        Self(QueryServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES))
    }

    /// Returns the number of merged profiles, and the time in seconds.
    pub(crate) async fn flame_graph(&mut self, range: &Range) -> anyhow::Result<(u64, f64)> {
        let request = FlameGraphRequest {
            selection: Some(range.selection()),
            flat: true,
            ..FlameGraphRequest::default()
        };
        let began = Instant::now();
        let graph = self.0.flame_graph(request).await?.into_inner();
        Ok((graph.profiles, began.elapsed().as_secs_f64()))
    }

    /// Asks for the names of all labels and the values of one with many, several times. Returns the number of values, and the 95th
    /// percentile of the time of both in seconds.
    pub(crate) async fn labels(&mut self, range: &Range) -> anyhow::Result<(usize, f64)> {
        let (mut times, mut values) = (Vec::new(), 0);
        for _ in 0..20 {
            let began = Instant::now();
            self.0.label_names(LabelNamesRequest { selection: Some(range.selection()) }).await?;
            let request = LabelValuesRequest { name: "pod".into(), selection: Some(range.selection()) };
            values = self.0.label_values(request).await?.into_inner().values.len();
            times.push(began.elapsed());
        }
        times.sort_unstable();
        Ok((values, percentile(&times, 0.95)))
    }
}

/// Returns a percentile of sorted times in seconds.
pub(crate) fn percentile(times: &[Duration], share: f64) -> f64 {
    times.get((times.len() as f64 * share) as usize).map_or(0.0, Duration::as_secs_f64)
}
