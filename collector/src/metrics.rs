//! The collector's metrics. One table declares each of them: name, kind, help, labels, and the field that counts it.

use std::{sync::Arc, time::Instant};

use gannet_base::metrics::{self, Metric, PROCESS_METRICS, register_process};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct ReasonLabel {
    reason: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct TargetLabel {
    target: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct TargetReasonLabels {
    target: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct RuleLabel {
    rule: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct KindLabel {
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct OutcomeLabel {
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct VersionLabel {
    version: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct ListingLabel {
    listing: &'static str,
}

/// A histogram of seconds.
fn seconds() -> Histogram {
    Histogram::new([0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0])
}

/// A histogram of bytes, from 16 KiB to 16 GiB.
fn bytes() -> Histogram {
    Histogram::new((0..11).map(|n| f64::from(1 << 14) * f64::powi(4.0, n)))
}

/// A histogram of batches.
fn batches() -> Histogram {
    Histogram::new([1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0])
}

/// Declares the metrics, and the structure that holds and registers them. Each line is
/// `field: type [= initial value] => NAME kind("name", "help" [, ["label"]]);`.
macro_rules! collector_metrics {
    (@new $type:ty) => { <$type>::default() };
    (@new $type:ty, $new:expr) => { $new };
    ($($field:ident: $type:ty $(= $new:expr)? => $name:ident $kind:ident $declaration:tt;)+) => {
        collector_metrics!(@declare $($name $kind $declaration;)+);

        /// All metrics of one collector. Clones share their values.
        #[derive(Clone)]
        pub(crate) struct Metrics {
            registry: Arc<Registry>,
            $(pub(crate) $field: $type,)+
        }

        impl Metrics {
            /// Creates and registers all metrics.
            pub(crate) fn new() -> Self {
                let mut registry = Registry::default();
                $(let $field = $name.register(&mut registry, collector_metrics!(@new $type $(, $new)?));)+
                register_process(&mut registry);
                let metrics = Self { registry: Arc::new(registry), $($field,)+ };
                let version = VersionLabel { version: env!("CARGO_PKG_VERSION") };
                metrics.build_info.get_or_create(&version).set(1);
                metrics
            }
        }
    };
    (@declare $($name:ident $kind:ident ($text:expr, $help:expr $(, [$($label:literal),+])?);)+) => {
        gannet_base::metrics! {
            COLLECTOR_METRICS;
            $($name = $kind($text, $help $(, [$($label),+])?);)+
        }
    };
}

collector_metrics! {
    build_info: Family<VersionLabel, Gauge> => BUILD_INFO
        gauge("gannet_collector_build_info", "1 for the version of this program", ["version"]);

    batches_accepted: Counter => BATCHES_ACCEPTED
        counter("gannet_collector_ingest_batches_accepted_total", "Batches that were made durable");
    batches_duplicate: Counter => BATCHES_DUPLICATE
        counter("gannet_collector_ingest_batches_duplicate_total", "Batches that were stored before");
    batches_refused: Family<ReasonLabel, Counter> => BATCHES_REFUSED
        counter("gannet_collector_ingest_batches_refused_total", "Batches refused for good, by error code", ["reason"]);
    batches_throttled: Family<ReasonLabel, Counter> => BATCHES_THROTTLED
        counter("gannet_collector_ingest_batches_throttled_total", "Batches refused for now, by cause", ["reason"]);
    batches_retimed: Counter => BATCHES_RETIMED
        counter("gannet_collector_ingest_batches_retimed_total", "Batches whose start was corrected because a node's clock is wrong");
    received_bytes: Counter => RECEIVED_BYTES
        counter("gannet_collector_ingest_received_bytes_total", "Compressed profiles received");
    ingest_streams: Gauge => INGEST_STREAMS
        gauge("gannet_collector_ingest_streams", "Open push streams");

    commit_seconds: Histogram = seconds() => COMMIT_SECONDS
        histogram("gannet_collector_store_commit_duration_seconds", "Time of one flush, which writes a segment and its index rows");
    commit_batches: Histogram = batches() => COMMIT_BATCHES
        histogram("gannet_collector_store_commit_batches", "Batches of one flush, also those that the store has already");
    segment_bytes: Counter => SEGMENT_BYTES
        counter("gannet_collector_store_segment_bytes_total", "Bytes of the written segments");
    segments_written: Counter => SEGMENTS_WRITTEN
        counter("gannet_collector_store_segments_written_total", "Segments written, each with one request");
    segments_followed: Family<ListingLabel, Counter> => SEGMENTS_FOLLOWED
        counter("gannet_collector_store_followed_segments_total", "Segments of other collectors found in the bucket, by the listing: new, or hours if the clock of their collector is wrong", ["listing"]);
    store_segments: Gauge => STORE_SEGMENTS
        gauge("gannet_collector_store_segments", "Stored segments");
    store_bytes: Gauge => STORE_BYTES
        gauge("gannet_collector_store_bytes", "Space of the stored profiles on the disk, with their part of the index; in a bucket, their size");
    store_profiles: Gauge => STORE_PROFILES
        gauge("gannet_collector_store_profiles", "Number of stored profiles");
    deletions_pending: Gauge => DELETIONS_PENDING
        gauge("gannet_collector_store_deletions_pending", "Deletions of profiles that are not carried out yet: no query returns the profiles, but objects or tables still have some");
    profiles_deleted: Counter => PROFILES_DELETED
        counter("gannet_collector_store_profiles_deleted_total", "Profiles that a deletion has hidden from the queries of this collector");
    store_series: Gauge => STORE_SERIES
        gauge("gannet_collector_store_series", "Series with stored profiles");
    store_errors: Counter => STORE_ERRORS
        counter("gannet_collector_store_errors_total", "Failed accesses to objects or index");
    index_rebuilds: Counter => INDEX_REBUILDS
        counter("gannet_collector_store_index_rebuilds_total", "Rebuilds of a missing or corrupt index from the objects");
    index_repairs: Counter => INDEX_REPAIRS
        counter("gannet_collector_store_index_repairs_total", "Index rows added or removed because objects and index differed");
    index_left_out: Gauge => INDEX_LEFT_OUT
        gauge("gannet_collector_store_index_left_out", "Segments, and profiles outside of segments, that queries do not find, because the disk has no room for the index and the memory for it is used up");
    objects_corrupt: Counter => OBJECTS_CORRUPT
        counter("gannet_collector_store_objects_corrupt_total", "Failed readings of objects that are damaged or missing");
    retention_removed: Counter => RETENTION_REMOVED
        counter("gannet_collector_store_retention_removed_profiles_total", "Profiles removed by age or size");

    table_updates: Counter => TABLE_UPDATES
        counter("gannet_collector_table_updates_total", "Times that this collector brought the table up to date");
    table_profiles: Counter => TABLE_PROFILES
        counter("gannet_collector_table_profiles_total", "Profiles added to the table");
    table_rows: Counter => TABLE_ROWS
        counter("gannet_collector_table_sample_rows_total", "Rows added to the table of samples");
    table_skipped: Counter => TABLE_SKIPPED
        counter("gannet_collector_table_skipped_profiles_total", "Damaged profiles that the table lacks");
    table_written: Counter => TABLE_WRITTEN
        counter("gannet_collector_table_written_bytes_total", "Bytes written to the table, with its logs");
    table_files: Counter => TABLE_FILES
        counter("gannet_collector_table_written_files_total", "Files written to the table, with its logs");
    table_failures: Counter => TABLE_FAILURES
        counter("gannet_collector_table_failures_total", "Failed attempts to bring the table up to date");
    table_merges: Counter => TABLE_MERGES
        counter("gannet_collector_table_merges_total", "Merges of small files of the table into one");
    table_merged_files: Counter => TABLE_MERGED_FILES
        counter("gannet_collector_table_merged_files_total", "Files of the table that merges replaced");
    table_data_files: Gauge => TABLE_DATA_FILES
        gauge("gannet_collector_table_data_files", "Files with rows in the present version of the table");
    table_damaged: Gauge => TABLE_DAMAGED
        gauge("gannet_collector_table_damaged_files", "Files of the table that a merge could not read; the log names them");
    table_debt_bytes: Gauge => TABLE_DEBT_BYTES
        gauge("gannet_collector_table_debt_bytes", "Space of the stored segments that the table lacks");
    table_debt_seconds: Gauge => TABLE_DEBT_SECONDS
        gauge("gannet_collector_table_debt_seconds", "Age of the oldest stored segment that the table lacks; 0: none");
    table_unreadable: Gauge => TABLE_UNREADABLE
        gauge("gannet_collector_table_unreadable_segments", "Segments that the table lacks because they cannot be read");
    table_bytes: Gauge => TABLE_BYTES
        gauge("gannet_collector_table_bytes", "Space of all files of the table");

    samples_taken: Counter => SAMPLES_TAKEN
        counter("gannet_collector_ledger_samples_taken_total", "Samples taken, by the ledgers of stored windows");
    samples_delivered: Counter => SAMPLES_DELIVERED
        counter("gannet_collector_ledger_samples_delivered_total", "Samples in profiles, by the ledgers of stored windows");
    samples_lost: Family<ReasonLabel, Counter> => SAMPLES_LOST
        counter("gannet_collector_ledger_samples_lost_total", "Samples lost, by the ledgers of stored windows", ["reason"]);
    samples_unaccounted: Gauge => SAMPLES_UNACCOUNTED
        gauge("gannet_collector_ledger_samples_unaccounted", "Samples without a reason, by the ledgers of stored windows; must stay 0");
    ledgers_unbalanced: Counter => LEDGERS_UNBALANCED
        counter("gannet_collector_ledger_unbalanced_windows_total", "Windows whose taken samples differ from delivered and lost together");

    query_seconds: Family<KindLabel, Histogram> = Family::new_with_constructor(seconds as fn() -> Histogram) => QUERY_SECONDS
        histogram("gannet_collector_query_duration_seconds", "Time to answer a query", ["kind"]);
    sql_read_bytes: Counter => SQL_READ_BYTES
        counter("gannet_collector_sql_read_bytes_total", "Bytes of the table that SQL queries read");
    clickhouse_statements: Family<OutcomeLabel, Counter> => CLICKHOUSE_STATEMENTS
        counter(
            "gannet_collector_clickhouse_statements_total",
            "Statements for ClickHouse (--query), by outcome: answered, limit, failed",
            ["outcome"]
        );
    clickhouse_read_bytes: Counter => CLICKHOUSE_READ_BYTES
        counter("gannet_collector_clickhouse_read_bytes_total", "Bytes that ClickHouse read for the statements of this collector");
    clickhouse_read_rows: Counter => CLICKHOUSE_READ_ROWS
        counter("gannet_collector_clickhouse_read_rows_total", "Rows that ClickHouse read for the statements of this collector");
    clickhouse_profiles: Counter => CLICKHOUSE_PROFILES
        counter("gannet_collector_clickhouse_merged_profiles_total", "Profiles that ClickHouse merged from the tables");
    query_read_bytes: Histogram = bytes() => QUERY_READ_BYTES
        histogram("gannet_collector_query_read_bytes", "Compressed profiles that one merge read from the store; merges in the cache read none");
    cache_hits: Counter => CACHE_HITS
        counter("gannet_collector_query_cache_hits_total", "Merges that the cache of merged profiles answered");
    cache_misses: Counter => CACHE_MISSES
        counter("gannet_collector_query_cache_misses_total", "Merges that the cache of merged profiles lacked");
    cache_bytes: Gauge => CACHE_BYTES
        gauge("gannet_collector_query_cache_bytes", "Memory of the merged profiles in the cache, by an estimate");
    merged_profiles: Counter => MERGED_PROFILES
        counter("gannet_collector_query_merged_profiles_total", "Profiles read and merged");
    objects_gone: Counter => OBJECTS_GONE
        counter("gannet_collector_query_missing_objects_total", "Objects that retention removed while a query ran");

    debuginfo_files: Gauge => DEBUGINFO_FILES
        gauge("gannet_collector_debuginfo_files", "Files with debug information on the disk");
    debuginfo_bytes: Gauge => DEBUGINFO_BYTES
        gauge("gannet_collector_debuginfo_bytes", "Bytes of the files with debug information on the disk");
    debuginfo_stored: Counter => DEBUGINFO_STORED
        counter("gannet_collector_debuginfo_stored_total", "Files with debug information that the collector received and stored");
    debuginfo_refused: Counter => DEBUGINFO_REFUSED
        counter("gannet_collector_debuginfo_refused_total", "Uploads of debug information that the collector refused or that failed; the log has the reasons");
    debuginfo_removed: Counter => DEBUGINFO_REMOVED
        counter("gannet_collector_debuginfo_removed_total", "Files with debug information that the collector removed because of --debuginfo-bytes");
    debuginfo_named: Counter => DEBUGINFO_NAMED
        counter("gannet_collector_debuginfo_named_frames_total", "Frames of merged and returned profiles that got names from debug information");
    debuginfod_requests: Counter => DEBUGINFOD_REQUESTS
        counter("gannet_collector_debuginfo_server_requests_total", "Build ids that the collector requested from the servers of --debuginfod");
    debuginfo_failed: Counter => DEBUGINFO_FAILED
        counter("gannet_collector_debuginfo_failed_reads_total", "Files with debug information that the collector failed to read");

    nodes_connected: Gauge => NODES_CONNECTED
        gauge("gannet_collector_fleet_nodes_connected", "Connected agents");
    nodes_known: Gauge => NODES_KNOWN
        gauge("gannet_collector_fleet_nodes_known", "Nodes that are connected or were connected lately");
    rule_pushes: Counter => RULE_PUSHES
        counter("gannet_collector_fleet_rule_pushes_total", "Rule sets sent to agents");
    rule_errors_left_out: Counter => RULE_ERRORS_LEFT_OUT
        counter("gannet_collector_fleet_rule_errors_left_out_total", "Errors of rules that nodes reported beyond the 256 of one answer that the collector keeps");
    late_answers: Counter => LATE_ANSWERS
        counter("gannet_collector_fleet_late_answers_total", "Answers of agents to a rule set that a newer one had replaced");
    name_conflicts: Counter => NAME_CONFLICTS
        counter("gannet_collector_fleet_node_name_conflicts_total", "Times that agents competed for one node name");
    node_requests: Counter => NODE_REQUESTS
        counter("gannet_collector_fleet_requests_total", "Requests sent to nodes: explanations, previews, captures");

    rules_revision: Gauge => RULES_REVISION
        gauge("gannet_collector_rules_revision", "Newest revision of the rules");
    rules_corrupt: Gauge => RULES_CORRUPT
        gauge("gannet_collector_rules_corrupt", "1 if the stored rules are damaged, so that no rules are sent");
    audit_lost: Counter => AUDIT_LOST
        counter("gannet_collector_rules_audit_entries_lost_total", "Audit entries that could not be written");

    forward_profiles: Family<TargetLabel, Counter> => FORWARD_PROFILES
        counter("gannet_collector_forward_profiles_total", "Profiles, or parts of them, that a target accepted", ["target"]);
    forward_retries: Family<TargetLabel, Counter> => FORWARD_RETRIES
        counter("gannet_collector_forward_retries_total", "Attempts that a target did not accept", ["target"]);
    forward_lost: Family<TargetReasonLabels, Counter> => FORWARD_LOST
        counter(
            "gannet_collector_forward_lost_profiles_total",
            "Profiles, or parts of them, that were not forwarded and are only in the store",
            ["target", "reason"]
        );
    forward_labels_dropped: Family<TargetLabel, Counter> => FORWARD_LABELS_DROPPED
        counter(
            "gannet_collector_forward_labels_dropped_total",
            "Labels beyond the limit of a target that forwarded profiles went without, once for each profile",
            ["target"]
        );

    recording_rules: Gauge => RECORDING_RULES
        gauge("gannet_collector_recording_rules", "Recording rules in force");
    recording_refusals: Family<RuleLabel, Counter> => RECORDING_REFUSALS
        counter(
            "gannet_collector_recording_refused_profiles_total",
            "Profiles that a recording rule did not count, because they would add series beyond its max_series",
            ["rule"]
        );
    recording_failures: Counter => RECORDING_FAILURES
        counter("gannet_collector_recording_failures_total", "Changed files of recording rules that the collector could not use; the former rules stay in force");

    tls_reloads: Counter => TLS_RELOADS
        counter("gannet_collector_tls_reloads_total", "Changed certificates taken into use");
    tls_handshakes_failed: Counter => TLS_HANDSHAKES_FAILED
        counter("gannet_collector_tls_handshakes_failed_total", "Connections that failed in the TLS handshake");
}

/// Returns the declarations of all metrics that the collector exposes, for the documentation.
pub fn declared_metrics() -> Vec<Metric> {
    [COLLECTOR_METRICS, PROCESS_METRICS].concat()
}

impl Metrics {
    pub(crate) fn refused(&self, code: &str) {
        self.batches_refused.get_or_create(&ReasonLabel { reason: code.to_owned() }).inc();
    }

    pub(crate) fn throttled(&self, cause: &str) {
        self.batches_throttled.get_or_create(&ReasonLabel { reason: cause.to_owned() }).inc();
    }

    pub(crate) fn lost(&self, reason: &str, samples: u64) {
        self.samples_lost.get_or_create(&ReasonLabel { reason: reason.to_owned() }).inc_by(samples);
    }

    pub(crate) fn forwarded(&self, target: &'static str, n: u64) {
        self.forward_profiles.get_or_create(&TargetLabel { target }).inc_by(n);
    }

    pub(crate) fn forward_retried(&self, target: &'static str) {
        self.forward_retries.get_or_create(&TargetLabel { target }).inc();
    }

    pub(crate) fn forward_lost(&self, target: &'static str, reason: &'static str, n: u64) {
        self.forward_lost.get_or_create(&TargetReasonLabels { target, reason }).inc_by(n);
    }

    pub(crate) fn forward_labels_dropped(&self, target: &'static str, n: u64) {
        self.forward_labels_dropped.get_or_create(&TargetLabel { target }).inc_by(n);
    }

    pub(crate) fn recording_refused(&self, rule: &str) {
        self.recording_refusals.get_or_create(&RuleLabel { rule: rule.to_owned() }).inc();
    }

    pub(crate) fn clickhouse_statement(&self, outcome: &'static str) {
        self.clickhouse_statements.get_or_create(&OutcomeLabel { outcome }).inc();
    }

    /// Counts segments of other collectors.
    pub(crate) fn followed(&self, listing: &'static str, segments: u64) {
        self.segments_followed.get_or_create(&ListingLabel { listing }).inc_by(segments);
    }

    /// Starts to time a query. The timer observes the time when it is dropped.
    pub(crate) fn query_timer(&self, kind: &'static str) -> QueryTimer {
        QueryTimer {
            histogram: self.query_seconds.get_or_create(&KindLabel { kind }).clone(),
            began: Instant::now(),
        }
    }

    /// Returns the OpenMetrics text.
    pub(crate) fn text(&self) -> String {
        metrics::text(&self.registry)
    }
}

/// Observes the time from its creation to its drop.
pub(crate) struct QueryTimer {
    histogram: Histogram,
    began: Instant,
}

impl Drop for QueryTimer {
    fn drop(&mut self) {
        self.histogram.observe(self.began.elapsed().as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_declarations_follow_the_conventions() {
        assert_eq!(metrics::problems(&declared_metrics()), Vec::<String>::new());
        for metric in COLLECTOR_METRICS {
            let rest = metric.name.strip_prefix("gannet_collector_").unwrap();
            let subsystem = rest.split('_').next().unwrap();
            let known = [
                "build",
                "ingest",
                "store",
                "ledger",
                "query",
                "fleet",
                "rules",
                "forward",
                "tls",
                "table",
                "recording",
                "debuginfo",
                "sql",
                "clickhouse",
            ];
            assert!(known.contains(&subsystem), "{}", metric.name);
        }
    }

    #[test]
    fn a_scrape_shows_every_declared_metric() {
        let metrics = Metrics::new();
        metrics.refused("bad_id");
        metrics.throttled("busy");
        metrics.lost("ring_full", 1);
        metrics.forwarded("parca", 1);
        metrics.forward_retried("parca");
        metrics.forward_lost("parca", "too_old", 1);
        metrics.forward_labels_dropped("parca", 1);
        metrics.recording_refused("work_seconds_total");
        metrics.clickhouse_statement("answered");
        metrics.followed("new", 1);
        drop(metrics.query_timer("merge"));
        let text = metrics.text();
        let declared = declared_metrics();
        assert_eq!(metrics::undeclared(&text, &[&declared]), Vec::<String>::new());
        for metric in declared {
            assert!(text.contains(&format!("# TYPE {} ", metric.family())), "{}", metric.name);
        }
    }
}
