//! Everything that the collector counts, declared once.

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

/// One label of a kind whose values are known.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Reason {
    reason: String,
}

/// A target of forwarding.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct TargetLabel {
    target: &'static str,
}

/// A target of forwarding, and what happened.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct TargetReason {
    target: &'static str,
    reason: &'static str,
}

/// One query kind.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Kind {
    kind: &'static str,
}

/// The counts. Cheap to clone: all of it is shared.
#[derive(Clone)]
pub(crate) struct Metrics {
    registry: std::sync::Arc<Registry>,
    pub(crate) batches_accepted: Counter,
    pub(crate) batches_duplicate: Counter,
    refused: Family<Reason, Counter>,
    throttled: Family<Reason, Counter>,
    pub(crate) received_bytes: Counter,
    pub(crate) ingest_streams: Gauge,
    pub(crate) commit_seconds: Histogram,
    pub(crate) commit_batches: Histogram,
    pub(crate) store_bytes: Gauge,
    pub(crate) store_profiles: Gauge,
    pub(crate) store_series: Gauge,
    pub(crate) store_errors: Counter,
    pub(crate) index_rebuilds: Counter,
    pub(crate) index_repairs: Counter,
    pub(crate) objects_corrupt: Counter,
    pub(crate) retention_removed: Counter,
    pub(crate) samples_taken: Counter,
    pub(crate) samples_delivered: Counter,
    samples_lost: Family<Reason, Counter>,
    pub(crate) ledgers_unbalanced: Counter,
    forwarded: Family<TargetLabel, Counter>,
    forward_retries: Family<TargetLabel, Counter>,
    forward_lost: Family<TargetReason, Counter>,
    query_seconds: Family<Kind, Histogram>,
    pub(crate) merged_profiles: Counter,
    pub(crate) objects_gone: Counter,
    pub(crate) nodes_connected: Gauge,
    pub(crate) nodes_known: Gauge,
    pub(crate) rule_pushes: Counter,
    pub(crate) late_answers: Counter,
    pub(crate) name_conflicts: Counter,
    pub(crate) rules_revision: Gauge,
    pub(crate) rules_corrupt: Gauge,
    pub(crate) tls_handshakes_failed: Counter,
    pub(crate) audit_lost: Counter,
    pub(crate) tls_reloads: Counter,
    pub(crate) questions: Counter,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut registry = Registry::with_prefix("gannet_collector");
        let r = &mut registry;
        let version = Family::<Vec<(&'static str, &'static str)>, Gauge>::default();
        version.get_or_create(&vec![("version", env!("CARGO_PKG_VERSION"))]).set(1);
        r.register("build_info", "The version that runs", version);
        // A counter is registered without `_total`: the encoder appends it.
        macro_rules! register {
            ($name:literal, $help:literal, $metric:expr) => {{
                let metric = $metric;
                r.register($name, $help, metric.clone());
                metric
            }};
        }
        let seconds = || Histogram::new([0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]);
        let families = || Family::<Reason, Counter>::default();
        let metrics = Self {
            batches_accepted: register!("batches_accepted", "Batches made durable", Counter::default()),
            batches_duplicate: register!(
                "batches_duplicate",
                "Batches that were there already",
                Counter::default()
            ),
            refused: register!("batches_refused", "Batches that will never be taken, by code", families()),
            throttled: register!("batches_throttled", "Batches put off, by cause", families()),
            received_bytes: register!("received_bytes", "Compressed profiles received", Counter::default()),
            ingest_streams: register!("ingest_streams", "Open push streams", Gauge::default()),
            commit_seconds: register!("commit_seconds", "Time to make a group of batches durable", seconds()),
            commit_batches: register!(
                "commit_batches",
                "Batches made durable together",
                Histogram::new([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0])
            ),
            store_bytes: register!("store_bytes", "Stored profiles", Gauge::default()),
            store_profiles: register!("store_profiles", "Stored profiles", Gauge::default()),
            store_series: register!("store_series", "Series with stored profiles", Gauge::default()),
            store_errors: register!(
                "store_errors",
                "Failures to write objects or the index",
                Counter::default()
            ),
            index_rebuilds: register!(
                "index_rebuilds",
                "Times the index was missing or corrupt and was built from the objects",
                Counter::default()
            ),
            index_repairs: register!(
                "index_repairs",
                "Rows added or removed at start because objects and index differed",
                Counter::default()
            ),
            objects_corrupt: register!(
                "objects_corrupt",
                "Objects that could not be read",
                Counter::default()
            ),
            retention_removed: register!(
                "retention_removed",
                "Profiles removed by age or size",
                Counter::default()
            ),
            samples_taken: register!(
                "samples_taken",
                "Samples taken, by the ledgers of stored windows",
                Counter::default()
            ),
            samples_delivered: register!(
                "samples_delivered",
                "Samples in profiles, by the ledgers of stored windows",
                Counter::default()
            ),
            samples_lost: register!(
                "samples_lost",
                "Samples lost, by the ledgers of stored windows",
                families()
            ),
            ledgers_unbalanced: register!(
                "ledgers_unbalanced",
                "Window ledgers whose taken is not delivered and lost together",
                Counter::default()
            ),
            query_seconds: register!(
                "query_seconds",
                "Time to answer a query",
                Family::<Kind, Histogram>::new_with_constructor(|| Histogram::new([
                    0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0
                ]))
            ),
            merged_profiles: register!("merged_profiles", "Profiles read and merged", Counter::default()),
            objects_gone: register!(
                "objects_gone",
                "Objects that a query found removed by then",
                Counter::default()
            ),
            nodes_connected: register!("nodes_connected", "Agents connected", Gauge::default()),
            nodes_known: register!("nodes_known", "Nodes connected now or lately", Gauge::default()),
            rule_pushes: register!("rule_pushes", "Rule sets sent to agents", Counter::default()),
            late_answers: register!(
                "late_answers",
                "Answers of agents that were not for the last rule set sent",
                Counter::default()
            ),
            name_conflicts: register!(
                "node_name_conflicts",
                "Times that two agents were seen to take turns with one node name",
                Counter::default()
            ),
            rules_revision: register!("rules_revision", "The newest revision of the rules", Gauge::default()),
            rules_corrupt: register!(
                "rules_corrupt",
                "1 if the rule file cannot be read and no rules are sent",
                Gauge::default()
            ),
            audit_lost: register!(
                "audit_lost",
                "Audit entries that could not be written down",
                Counter::default()
            ),
            forwarded: register!(
                "forwarded_profiles",
                "Profiles (or parts of them) that a target has taken",
                Family::<TargetLabel, Counter>::default()
            ),
            forward_retries: register!(
                "forward_retries",
                "Attempts that a target did not take",
                Family::<TargetLabel, Counter>::default()
            ),
            forward_lost: register!(
                "forward_lost_profiles",
                "Profiles that were not handed on, by target and reason; they are in the store",
                Family::<TargetReason, Counter>::default()
            ),
            tls_reloads: register!(
                "tls_reloads",
                "Times changed certificates were taken into use",
                Counter::default()
            ),
            questions: register!("questions", "Questions put to nodes", Counter::default()),
            tls_handshakes_failed: register!(
                "tls_handshakes_failed",
                "Connections to the HTTP listener that failed in the TLS handshake",
                Counter::default()
            ),
            registry: std::sync::Arc::new(Registry::default()),
        };
        Self { registry: std::sync::Arc::new(registry), ..metrics }
    }

    pub(crate) fn refused(&self, code: &str) {
        self.refused.get_or_create(&Reason { reason: code.to_owned() }).inc();
    }

    pub(crate) fn throttled(&self, cause: &str) {
        self.throttled.get_or_create(&Reason { reason: cause.to_owned() }).inc();
    }

    pub(crate) fn lost(&self, reason: &str, samples: u64) {
        self.samples_lost.get_or_create(&Reason { reason: reason.to_owned() }).inc_by(samples);
    }

    /// Counts the time until it is dropped.
    pub(crate) fn forwarded(&self, target: &'static str, n: u64) {
        self.forwarded.get_or_create(&TargetLabel { target }).inc_by(n);
    }

    pub(crate) fn forward_retries(&self, target: &'static str) {
        self.forward_retries.get_or_create(&TargetLabel { target }).inc();
    }

    pub(crate) fn forward_lost(&self, target: &'static str, reason: &'static str, n: u64) {
        self.forward_lost.get_or_create(&TargetReason { target, reason }).inc_by(n);
    }

    pub(crate) fn query_timer(&self, kind: &'static str) -> QueryTimer {
        QueryTimer {
            histogram: self.query_seconds.get_or_create(&Kind { kind }).clone(),
            began: std::time::Instant::now(),
        }
    }

    /// The OpenMetrics text.
    pub(crate) fn text(&self) -> String {
        let mut out = String::new();
        // Writing into a string does not fail.
        let _ = encode(&mut out, &self.registry);
        out
    }
}

/// Observes the time from its making to its end.
pub(crate) struct QueryTimer {
    histogram: Histogram,
    began: std::time::Instant,
}

impl Drop for QueryTimer {
    fn drop(&mut self) {
        self.histogram.observe(self.began.elapsed().as_secs_f64());
    }
}
