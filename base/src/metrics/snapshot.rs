//! Metrics that are read at the time of a scrape, so that no value is counted twice.

use std::fmt;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _, MetricEncoder},
    metrics::{TypedMetric as _, counter::ConstCounter, gauge::ConstGauge},
};

use super::{Metric, MetricKind};

/// A value at one moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Number {
    /// A count or a level.
    Whole(u64),
    /// Seconds or a ratio.
    Real(f64),
}

impl From<u64> for Number {
    fn from(number: u64) -> Self {
        Self::Whole(number)
    }
}

impl From<usize> for Number {
    fn from(number: usize) -> Self {
        Self::Whole(number as u64)
    }
}

impl From<u32> for Number {
    fn from(number: u32) -> Self {
        Self::Whole(number.into())
    }
}

impl From<bool> for Number {
    fn from(number: bool) -> Self {
        Self::Whole(number.into())
    }
}

impl From<f64> for Number {
    fn from(number: f64) -> Self {
        Self::Real(number)
    }
}

impl Number {
    fn encode(self, kind: MetricKind, encoder: MetricEncoder<'_>) -> Result<(), fmt::Error> {
        match (kind, self) {
            (MetricKind::Counter, Self::Whole(count)) => ConstCounter::new(count).encode(encoder),
            (MetricKind::Counter, Self::Real(count)) => ConstCounter::new(count).encode(encoder),
            (_, Self::Whole(level)) => ConstGauge::new(level).encode(encoder),
            (_, Self::Real(level)) => ConstGauge::new(level).encode(encoder),
        }
    }
}

/// Values of counters and gauges at one moment, in the order of the scrape.
#[derive(Debug, Default)]
pub struct Snapshot {
    values: Vec<(Metric, Vec<String>, Number)>,
}

impl Snapshot {
    /// Adds a metric without labels.
    pub fn add(&mut self, metric: &Metric, number: impl Into<Number>) {
        self.add_labelled(metric, [], number);
    }

    /// Adds one series of a metric. The values stand in the order of the declared labels; the series of one metric
    /// follow one another.
    pub fn add_labelled<const N: usize>(
        &mut self,
        metric: &Metric,
        labels: [&str; N],
        number: impl Into<Number>,
    ) {
        debug_assert_eq!(metric.labels.len(), N, "{} has other labels", metric.name);
        debug_assert!(metric.kind != MetricKind::Histogram, "{} is a histogram", metric.name);
        self.values.push((*metric, labels.map(str::to_owned).to_vec(), number.into()));
    }
}

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        for series in self.values.chunk_by(|(a, ..), (b, ..)| a == b) {
            let Some((metric, ..)) = series.first() else { continue };
            let kind = match metric.kind {
                MetricKind::Counter => ConstCounter::<u64>::TYPE,
                MetricKind::Gauge | MetricKind::Histogram => ConstGauge::<u64>::TYPE,
            };
            let help = format!("{}.", metric.help);
            let mut encoder = encoder.encode_descriptor(metric.family(), &help, None, kind)?;
            for (_, values, number) in series {
                if values.is_empty() {
                    number.encode(metric.kind, encoder)?;
                    break;
                }
                let labels: Vec<(&str, &str)> =
                    metric.labels.iter().copied().zip(values.iter().map(String::as_str)).collect();
                number.encode(metric.kind, encoder.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::registry::Registry;

    use super::*;
    use crate::metrics::{text, undeclared};

    crate::metrics! {
        ALL;
        LOST = counter("gannet_test_samples_lost_total", "Samples lost", ["reason"]);
        CPU = counter("gannet_test_cpu_seconds_total", "CPU time");
        LEVEL = gauge("gannet_test_processes", "Processes");
    }

    #[test]
    fn a_snapshot_shows_its_values() {
        let mut snapshot = Snapshot::default();
        snapshot.add_labelled(&LOST, ["ring_full"], 3_u64);
        snapshot.add_labelled(&LOST, ["exit"], 0_u64);
        snapshot.add(&CPU, 1.5);
        snapshot.add(&LEVEL, 12_usize);
        let mut registry = Registry::default();
        registry.register_collector(Box::new(snapshot));
        let text = text(&registry);
        for line in [
            "# HELP gannet_test_samples_lost Samples lost.",
            "# TYPE gannet_test_samples_lost counter",
            "gannet_test_samples_lost_total{reason=\"ring_full\"} 3",
            "gannet_test_samples_lost_total{reason=\"exit\"} 0",
            "gannet_test_cpu_seconds_total 1.5",
            "# TYPE gannet_test_processes gauge",
            "gannet_test_processes 12",
        ] {
            assert!(text.lines().any(|shown| shown == line), "{line}\n{text}");
        }
        assert_eq!(undeclared(&text, &[ALL]), Vec::<String>::new());
    }
}
