//! Flame graphs and tables of functions, of one selection or of two compared ones.

use std::sync::Arc;

use gannet_proto::{
    pprof::{self, FlameTree, Side},
    query as api,
};

use super::{
    Query, QueryError,
    merge::{MergeProgress, Merged},
    select::Selection,
    unit_of,
};

/// Nodes of a flame graph without `max_nodes`, and the highest `max_nodes`.
const DEFAULT_FLAME_NODES: u32 = 20_000;
const MAX_FLAME_NODES: u32 = 200_000;
/// Rows of a table without `limit`, and the highest `limit`.
const DEFAULT_TOP_ROWS: u32 = 100;
const MAX_TOP_ROWS: u32 = 10_000;

/// The two sides of a comparison. A side is `None` if it has no profile.
struct Comparison {
    main: Option<Arc<Merged>>,
    base: Option<Arc<Merged>>,
    sample_type: String,
    progress: Arc<MergeProgress>,
}

/// The form of a graph or table.
#[derive(Clone, Debug, Default)]
pub(crate) struct Shape {
    /// The most nodes or rows; 0 means the default.
    pub(crate) max: u32,
    /// Whether the native frames of interpreters are shown.
    pub(crate) interpreter_frames: bool,
    /// Whether frames that say what a stack lacks are left out.
    pub(crate) hide_error_frames: bool,
}

impl Comparison {
    /// Returns the number of profiles that both sides lack.
    fn unreadable(&self) -> u64 {
        [&self.main, &self.base].into_iter().flatten().map(|merged| merged.unreadable).sum()
    }

    /// Reports whether the search for the names of a side ran out of time.
    fn lacks_names(&self) -> bool {
        [&self.main, &self.base].into_iter().flatten().any(|merged| merged.lacks_names())
    }

    fn tree(&self, shape: &Shape) -> Result<FlameTree, QueryError> {
        let mut tree = FlameTree::new()
            .with_interpreter_frames(shape.interpreter_frames)
            .hide_error_frames(shape.hide_error_frames);
        for (merged, side) in [(&self.main, Side::Main), (&self.base, Side::Base)] {
            if let Some(merged) = merged
                && let Some(index) = pprof::sample_type_index(&merged.profile, &self.sample_type)
            {
                tree.add(&merged.profile, index, side).map_err(|e| QueryError::Invalid(e.to_string()))?;
            }
        }
        Ok(tree)
    }
}

impl Query {
    /// Merges both sides. The main side decides the sample type.
    async fn compare(
        self: &Arc<Self>,
        selection: &Selection,
        base: Option<&Selection>,
        sample_type: &str,
    ) -> Result<Comparison, QueryError> {
        let progress: Arc<MergeProgress> = Arc::default();
        let main = self.merged_for_view(selection, sample_type, &progress).await?;
        let wanted = main.as_ref().map_or_else(|| sample_type.to_owned(), |(_, chosen)| chosen.clone());
        let base = match base {
            Some(base) => self.merged_for_view(base, &wanted, &progress).await?,
            None => None,
        };
        let chosen = main.as_ref().or(base.as_ref()).map_or(wanted, |(_, chosen)| chosen.clone());
        let (main, base) = (main.map(|(m, _)| m), base.map(|(m, _)| m));
        Ok(Comparison { main, base, sample_type: chosen, progress })
    }

    /// Returns a flame graph of the selection, compared with `base` if given.
    pub(crate) async fn flamegraph(
        self: &Arc<Self>,
        selection: &Selection,
        base: Option<&Selection>,
        sample_type: &str,
        shape: Shape,
    ) -> Result<api::FlameGraphResponse, QueryError> {
        let _timer = self.metrics.query_timer("flamegraph");
        let max_nodes = shape.max;
        if max_nodes > MAX_FLAME_NODES {
            return Err(QueryError::Invalid(format!("max_nodes {max_nodes} is above {MAX_FLAME_NODES}")));
        }
        let max_nodes = if max_nodes == 0 { DEFAULT_FLAME_NODES } else { max_nodes } as usize;
        let compared = self.compare(selection, base, sample_type).await?;
        self.blocking(move |_| {
            let root = compared.tree(&shape)?.prune(max_nodes);
            Ok(api::FlameGraphResponse {
                unit: unit_of(&compared.sample_type),
                total: root.total,
                base_total: root.base_total,
                profiles: compared.main.as_ref().map_or(0, |m| m.origin.profiles()),
                base_profiles: compared.base.as_ref().map_or(0, |m| m.origin.profiles()),
                root: Some(root),
                unreadable_profiles: compared.unreadable(),
                names_incomplete: compared.lacks_names(),
                sample_type: compared.sample_type,
                nodes: Vec::new(),
                read: Some(compared.progress.report()),
            })
        })
        .await
    }

    /// Returns a table of the selection's functions, compared with `base` if given.
    pub(crate) async fn top(
        self: &Arc<Self>,
        selection: &Selection,
        base: Option<&Selection>,
        sample_type: &str,
        shape: Shape,
    ) -> Result<api::TopResponse, QueryError> {
        let _timer = self.metrics.query_timer("top");
        let limit = shape.max;
        if limit > MAX_TOP_ROWS {
            return Err(QueryError::Invalid(format!("limit {limit} is above {MAX_TOP_ROWS}")));
        }
        let limit = if limit == 0 { DEFAULT_TOP_ROWS } else { limit } as usize;
        let compared = self.compare(selection, base, sample_type).await?;
        self.blocking(move |_| {
            let tree = compared.tree(&shape)?;
            Ok(api::TopResponse {
                unit: unit_of(&compared.sample_type),
                total: tree.total(Side::Main),
                base_total: tree.total(Side::Base),
                rows: tree.top(limit),
                unreadable_profiles: compared.unreadable(),
                names_incomplete: compared.lacks_names(),
                sample_type: compared.sample_type,
                read: Some(compared.progress.report()),
            })
        })
        .await
    }
}
