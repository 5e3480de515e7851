//! Metrics that are declared once. Registration, `docs/metrics.md` and the tests of dashboards and alerts all read the
//! declaration.

mod check;
mod process;
mod snapshot;

pub use check::{problems, undeclared};
pub use process::{PROCESS_METRICS, ProcessUsage, register_process};
pub use snapshot::{Number, Snapshot};

use prometheus_client::{
    encoding::text::encode,
    metrics::{MetricType, TypedMetric},
    registry::Registry,
};

/// The declaration of one metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metric {
    /// The full name as a scrape shows it, with `_total` on counters and the base unit: `…_bytes`, `…_seconds`.
    pub name: &'static str,
    /// Counter, gauge or histogram.
    pub kind: MetricKind,
    /// One sentence without a full stop.
    pub help: &'static str,
    /// Names of the labels.
    pub labels: &'static [&'static str],
}

/// The type of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricKind {
    /// Only grows while the process runs.
    Counter,
    /// A current level.
    Gauge,
    /// Observations in buckets.
    Histogram,
}

impl MetricKind {
    /// Returns the word of the OpenMetrics format.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

impl Metric {
    /// Declares a counter. The name ends with `_total`.
    pub const fn counter(name: &'static str, help: &'static str, labels: &'static [&'static str]) -> Self {
        Self { name, kind: MetricKind::Counter, help, labels }
    }

    /// Declares a gauge.
    pub const fn gauge(name: &'static str, help: &'static str, labels: &'static [&'static str]) -> Self {
        Self { name, kind: MetricKind::Gauge, help, labels }
    }

    /// Declares a histogram.
    pub const fn histogram(name: &'static str, help: &'static str, labels: &'static [&'static str]) -> Self {
        Self { name, kind: MetricKind::Histogram, help, labels }
    }

    /// Returns the base unit that the name ends with; empty for plain counts.
    pub fn unit(&self) -> &'static str {
        let name = self.family();
        ["seconds", "bytes", "ratio", "percent"]
            .into_iter()
            .find(|unit| name.strip_suffix(unit).is_some_and(|rest| rest.ends_with('_')))
            .unwrap_or("")
    }

    /// Returns the name without `_total`, which `prometheus-client` appends to counters itself.
    pub fn family(&self) -> &'static str {
        match self.kind {
            MetricKind::Counter => self.name.strip_suffix("_total").unwrap_or(self.name),
            MetricKind::Gauge | MetricKind::Histogram => self.name,
        }
    }

    /// Registers a live metric under this declaration and returns it.
    pub fn register<M>(&self, registry: &mut Registry, metric: M) -> M
    where
        M: prometheus_client::registry::Metric + TypedMetric + Clone,
    {
        debug_assert!(
            matches!(
                (self.kind, M::TYPE),
                (MetricKind::Counter, MetricType::Counter)
                    | (MetricKind::Gauge, MetricType::Gauge)
                    | (MetricKind::Histogram, MetricType::Histogram)
            ),
            "{} is declared with another type",
            self.name
        );
        registry.register(self.family(), self.help, metric.clone());
        metric
    }
}

/// Declares metrics: a constant for each, and a list of all.
///
/// ```
/// gannet_base::metrics! {
///     pub(crate) ALL;
///     TICKS = counter("gannet_agent_sampler_ticks_total", "Clock ticks that reached the sampler");
///     LOST = counter("gannet_agent_samples_lost_total", "Samples lost", ["reason"]);
/// }
/// assert_eq!(ALL, [TICKS, LOST]);
/// ```
#[macro_export]
macro_rules! metrics {
    ($vis:vis $all:ident; $($name:ident = $kind:ident($text:expr, $help:expr $(, [$($label:literal),+])?);)+) => {
        $(
            pub(crate) const $name: $crate::metrics::Metric =
                $crate::metrics::Metric::$kind($text, $help, &[$($($label),+)?]);
        )+

        /// Every metric that is declared here, in the order of the documentation.
        $vis const $all: &[$crate::metrics::Metric] = &[$($name),+];
    };
}

/// Returns the OpenMetrics text of a registry.
pub fn text(registry: &Registry) -> String {
    let mut text = String::new();
    // Writing into a string cannot fail.
    let _ = encode(&mut text, registry);
    text
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram};

    use super::*;

    crate::metrics! {
        ALL;
        LOST = counter("gannet_test_samples_lost_total", "Samples lost", ["reason"]);
        BYTES = gauge("gannet_test_spool_bytes", "Size of the spool");
        SECONDS = histogram("gannet_test_commit_duration_seconds", "Time of a commit");
    }

    #[test]
    fn a_registered_metric_shows_its_declaration() {
        let mut registry = Registry::default();
        let lost: Family<Vec<(&str, &str)>, Counter> = LOST.register(&mut registry, Family::default());
        BYTES.register(&mut registry, Gauge::<i64>::default()).set(5);
        SECONDS.register(&mut registry, Histogram::new([0.1, 1.0])).observe(0.5);
        lost.get_or_create(&vec![("reason", "ring_full")]).inc_by(3);
        let text = text(&registry);
        assert!(text.contains("gannet_test_samples_lost_total{reason=\"ring_full\"} 3\n"), "{text}");
        assert!(text.contains("gannet_test_spool_bytes 5\n"), "{text}");
        assert_eq!(undeclared(&text, &[ALL]), Vec::<String>::new());
    }

    #[test]
    fn the_unit_stands_at_the_end_of_the_name() {
        assert_eq!(ALL.iter().map(Metric::unit).collect::<Vec<_>>(), ["", "bytes", "seconds"]);
        assert_eq!(problems(ALL), Vec::<String>::new());
    }
}
