//! The agent's metrics: read when somebody asks, so that nothing counts twice.

use std::fmt;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _, text::encode},
    metrics::{TypedMetric as _, counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};

use crate::{engine::EngineError, kernel::lifecycle_counts, ledger::Stage, node::Node, pods::SourceKind};

/// Everything at one moment.
#[derive(Debug)]
struct Reading {
    values: Vec<Value>,
}

#[derive(Debug)]
struct Value {
    name: &'static str,
    help: &'static str,
    /// At most one label; values of one metric stand together.
    label: Option<(&'static str, String)>,
    number: Number,
}

#[derive(Debug)]
enum Number {
    Counter(u64),
    Seconds(f64),
    Gauge(i64),
}

/// The text that a scrape gets.
pub(super) async fn render(node: &Node) -> Result<String, EngineError> {
    let engine = node.engine.view().await?;
    let (suppressed, recorder, files) = (engine.suppressed_captures, engine.recorder, engine.process_stats);
    let account = node.ledger.account_now();
    let ledger = account.to_ledger();
    let (rss, cpu) = node.usage();
    let mut values = Vec::new();
    let mut add = |name, help, label: Option<(&'static str, String)>, number| {
        values.push(Value { name, help, label, number });
    };
    add("clock_ticks", "Clock ticks that reached the sampler", None, Number::Counter(ledger.ticks));
    add(
        "samples_taken",
        "Samples that a rule asked for, once for each rule",
        None,
        Number::Counter(ledger.taken),
    );
    add(
        "samples_delivered",
        "Samples that a collector has acknowledged",
        None,
        Number::Counter(ledger.delivered),
    );
    for reason in gannet_proto::ledger::LossReason::ALL {
        let lost = ledger.lost.get(&reason).copied().unwrap_or(0);
        let label = Some(("reason", reason.to_string()));
        add("samples_lost", "Samples lost, by reason", label, Number::Counter(lost));
    }
    for stage in Stage::ALL {
        let label = Some(("stage", stage.as_str().to_owned()));
        let number = Number::Gauge(account.at_stage(stage).cast_signed());
        add("samples_pending", "Samples on their way, by stage", label, number);
    }
    if let Some(counters) = engine.counters {
        let kinds = lifecycle_counts(&counters);
        for (kind, counts) in kinds {
            let label = Some(("kind", kind.to_owned()));
            let help = "Exec, fork and exit handled in the kernel, and processes found running";
            add("lifecycle_events", help, label, Number::Counter(counts.seen));
        }
        for (reason, count) in [
            ("ring_full", kinds.iter().map(|(_, counts)| counts.lost_ring_full).sum()),
            ("rate", kinds.iter().map(|(_, counts)| counts.lost_rate).sum()),
            ("refused", kinds.iter().map(|(_, counts)| counts.refused).sum()),
        ] {
            let label = Some(("reason", reason.to_owned()));
            let help = "Exec, fork and exit that were wanted and not reported (refused: at most, ends of threads included)";
            add("lifecycle_events_lost", help, label, Number::Counter(count));
        }
        add("samples_raw", "Samples taken raw, walked in user space", None, Number::Counter(counters.raw));
        add(
            "process_map_full",
            "Processes that found no place in the kernel's table",
            None,
            Number::Counter(counters.procs_full),
        );
    }
    add(
        "events_undecodable",
        "Records of the ring that were no event",
        None,
        Number::Counter(engine.undecodable_events),
    );
    add("processes", "Processes in the table", None, Number::Gauge(engine.processes as i64));
    add(
        "processes_missed",
        "Processes that were gone before they could be read",
        None,
        Number::Counter(files.missed),
    );
    for (source, count) in [("kernel", files.told), ("proc", files.loaded)] {
        let label = Some(("source", source.to_owned()));
        add(
            "processes_known",
            "Images, by where their mappings are known from",
            label,
            Number::Counter(count),
        );
    }
    add(
        "processes_saturated",
        "Processes that found no place in the agent's table; raise --processes",
        None,
        Number::Counter(files.saturated),
    );
    add(
        "processes_reconciled",
        "Processes whose end was not told and was found by looking",
        None,
        Number::Counter(files.reconciled),
    );
    add(
        "mappings_lost",
        "Executable mappings that the kernel could not tell, because a buffer was full",
        None,
        Number::Counter(engine.mappings_lost),
    );
    if let Some(tables) = engine.unwind_tables {
        add("unwind_tables", "Unwind tables in the kernel", None, Number::Gauge(tables.resident as i64));
        add(
            "unwind_table_bytes",
            "Memory of the unwind tables in the kernel",
            None,
            Number::Gauge(tables.resident_bytes as i64),
        );
        add(
            "unwind_tables_evicted",
            "Unwind tables taken out for others",
            None,
            Number::Counter(tables.evicted),
        );
        add(
            "unwind_tables_failed",
            "Files that could not be made into a table",
            None,
            Number::Counter(tables.failed),
        );
    }
    for (reason, count) in [
        ("cooldown", suppressed.cooldown),
        ("max_concurrent", suppressed.max_concurrent),
        ("budget", suppressed.budget),
    ] {
        let label = Some(("reason", reason.to_owned()));
        add("captures_held_back", "Captures that did not start, by reason", label, Number::Counter(count));
    }
    add(
        "processes_found_waiting",
        "Processes that ran when a rule came that wants them, and that are yet to be read",
        None,
        Number::Gauge(engine.discovered_waiting as i64),
    );
    add("recorder_bytes", "Memory of the flight recorder", None, Number::Gauge(recorder.bytes as i64));
    add(
        "recorder_crowded_out",
        "Samples that the flight recorder forgot before their time",
        None,
        Number::Counter(recorder.crowded_out),
    );
    add(
        "sensor_reports_dropped",
        "Reports of conditions that came faster than they were taken",
        None,
        Number::Counter(engine.sensor_reports_dropped),
    );
    add(
        "samples_stray",
        "Samples of exec conditions that were over when they came",
        None,
        Number::Counter(engine.stray_samples),
    );
    add(
        "rate_divisor",
        "How many times longer periods are than asked for, to keep within the budget",
        None,
        Number::Gauge(engine.rate_divisor.into()),
    );
    add("spool_bytes", "Batches on disk", None, Number::Gauge(node.spool.bytes() as i64));
    add("spool_batches", "Batches in the spool", None, Number::Gauge(node.spool.batches() as i64));
    add(
        "spool_corrupt_files",
        "Damaged spool files found",
        None,
        Number::Counter(node.spool.corrupt_files()),
    );
    add(
        "spool_write_errors",
        "Writes that the file system refused",
        None,
        Number::Counter(node.spool.write_errors()),
    );
    let pods = node.pods.status();
    for kind in [SourceKind::PodInfo, SourceKind::Kubelet, SourceKind::ApiServer] {
        let label = Some(("source", kind.to_string()));
        let number = Number::Gauge((pods.source == Some(kind)).into());
        add("pods_source", "1 for the source that pods come from", label, number);
    }
    add("pods_updates", "Lists and changes of pods taken in", None, Number::Counter(pods.updates));
    add("pods_errors", "Failures of the sources of pods", None, Number::Counter(pods.errors));
    if let Some(at) = pods.last_update {
        let age = at.elapsed().unwrap_or_default().as_secs();
        add(
            "pods_age_seconds",
            "Since the source of pods told of something",
            None,
            Number::Gauge(age as i64),
        );
    }
    let (containers, asked_for, in_no_list, refused) = node.pods.counts();
    add("pods_containers", "Containers whose pod is known", None, Number::Gauge(containers as i64));
    for (state, count) in [("asked_for", asked_for), ("in_no_list", in_no_list)] {
        let label = Some(("state", state.to_owned()));
        let number = Number::Gauge(count as i64);
        add("pods_unknown_containers", "Containers whose pod is not known", label, number);
    }
    add("pods_refused", "Pods beyond what is kept", None, Number::Counter(refused));
    let connected = node.connected.load(std::sync::atomic::Ordering::Relaxed);
    add("collector_connected", "1 while the control stream stands", None, Number::Gauge(connected.into()));
    add(
        "degraded",
        "Parts that work less well than they should",
        None,
        Number::Gauge(node.degraded().len() as i64),
    );
    add("resident_memory_bytes", "Memory of this process", None, Number::Gauge(rss as i64));
    add("cpu_seconds", "CPU time of all threads of this process", None, Number::Seconds(cpu.as_secs_f64()));

    let mut registry = Registry::with_prefix("gannet_agent");
    registry.register_collector(Box::new(Reading { values }));
    let mut text = String::new();
    // Writing into a String cannot fail.
    let _ = encode(&mut text, &registry);
    Ok(text)
}

impl Collector for Reading {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        for group in self.values.chunk_by(|a, b| a.name == b.name) {
            let Some(first) = group.first() else { continue };
            let kind = match first.number {
                Number::Counter(_) | Number::Seconds(_) => ConstCounter::<u64>::TYPE,
                Number::Gauge(_) => ConstGauge::<i64>::TYPE,
            };
            let mut metric = encoder.encode_descriptor(first.name, first.help, None, kind)?;
            for value in group {
                let labels: Vec<(&str, &str)> =
                    value.label.iter().map(|(name, text)| (*name, text.as_str())).collect();
                let one = if labels.is_empty() { None } else { Some(labels) };
                match &one {
                    None => value.number.encode(metric)?,
                    Some(labels) => {
                        let labelled = metric.encode_family(labels)?;
                        value.number.encode(labelled)?;
                        continue;
                    }
                }
                break;
            }
        }
        Ok(())
    }
}

impl Number {
    fn encode(&self, encoder: prometheus_client::encoding::MetricEncoder<'_>) -> Result<(), fmt::Error> {
        match self {
            Self::Counter(count) => ConstCounter::new(*count).encode(encoder),
            Self::Seconds(seconds) => ConstCounter::new(*seconds).encode(encoder),
            Self::Gauge(level) => ConstGauge::new(*level).encode(encoder),
        }
    }
}
