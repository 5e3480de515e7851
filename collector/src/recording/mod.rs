//! Metrics from profiles: recording rules add up the values of chosen functions as profiles arrive, and `/metrics` shows them as
//! counters. Without rules, an arriving profile costs nothing more.
//!
//! The collector reads the file of the rules again when it changes. An unchanged rule keeps its counts; a changed one begins at 0, as
//! all rules do after a start. `rate()` of Prometheus allows for that. A file with a mistake changes nothing.

mod rules;

use std::{
    collections::HashMap,
    fmt::Write as _,
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use clap::Args;
use gannet_proto::{labels::Labels, profiles::Profile};
use parking_lot::{Mutex, RwLock};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use self::rules::{RecordingError, RecordingRule, SeriesKey};
use crate::metrics::Metrics;

/// Time between two checks of the file.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);
/// Maximum size of the file, in bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// The file of the recording rules.
#[derive(Args, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[command(next_help_heading = "Metrics")]
#[serde(default)]
pub struct RecordingOptions {
    /// File of recording rules, which make metrics from profiles; the collector reads it again when it changes
    #[arg(long, value_name = "FILE", env = "GANNET_COLLECTOR_RECORDING_RULES")]
    pub recording_rules: Option<PathBuf>,
}

/// The reason why the collector cannot use the recording rules.
#[derive(Debug, thiserror::Error)]
pub enum RecordingFileError {
    /// An error of the file system.
    #[error("--recording-rules {}: {source}", path.display())]
    File {
        /// Path of the file of recording rules.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// A mistake in the file.
    #[error("--recording-rules {}: {mistake}", path.display())]
    Mistake {
        /// Path of the file of recording rules.
        path: PathBuf,
        /// The rule, the field and the cure.
        mistake: String,
    },
}

/// A rule with its counts.
struct Recording {
    rule: RecordingRule,
    /// The values so far, in the unit of the sample type.
    series: Mutex<HashMap<SeriesKey, u64>>,
}

/// The values that one profile adds to the metrics. The caller counts them after it has stored the profile, so that a repeated profile
/// does not count twice.
#[derive(Default)]
pub(crate) struct Recorded(Vec<(Arc<Recording>, SeriesKey, u64)>);

/// The rules in force, and their counts.
pub(crate) struct Recorder {
    path: PathBuf,
    metrics: Metrics,
    rules: RwLock<Vec<Arc<Recording>>>,
}

impl Recorder {
    /// Reads and checks the file. Returns an error for a mistake in it.
    pub(crate) fn open(path: &Path, metrics: Metrics) -> Result<Arc<Self>, RecordingFileError> {
        let recorder = Self { path: path.to_owned(), metrics, rules: RwLock::default() };
        let text = read(path)?;
        recorder.load(&text).map_err(|mistake| recorder.mistake(&mistake))?;
        Ok(Arc::new(recorder))
    }

    fn mistake(&self, mistake: &RecordingError) -> RecordingFileError {
        RecordingFileError::Mistake { path: self.path.clone(), mistake: mistake.to_string() }
    }

    /// Puts the rules of a text in force.
    fn load(&self, text: &str) -> Result<(), RecordingError> {
        let loaded = rules::parse(text)?;
        let mut rules = self.rules.write();
        let next = loaded.into_iter().map(|rule| {
            let same = rules.iter().find(|recording| recording.rule.is_same(&rule));
            same.map_or_else(|| Arc::new(Recording { rule, series: Mutex::default() }), Arc::clone)
        });
        *rules = next.collect();
        self.metrics.recording_rules.set(rules.len() as i64);
        Ok(())
    }

    /// Reads the file again whenever it has changed.
    pub(crate) async fn follow(self: Arc<Self>, stop: CancellationToken) {
        let mut tick = tokio::time::interval(CHECK_INTERVAL);
        let mut last: Option<Result<String, String>> = None;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = tick.tick() => {}
            }
            let path = self.path.clone();
            let Ok(found) = tokio::task::spawn_blocking(move || read(&path)).await else { return };
            let found = found.map_err(|error| error.to_string());
            if last.as_ref() == Some(&found) {
                continue;
            }
            let done = match &found {
                Ok(text) => self.load(text).map_err(|mistake| self.mistake(&mistake).to_string()),
                Err(error) => Err(error.clone()),
            };
            match done {
                Ok(()) if last.is_none() => {}
                Ok(()) => tracing::info!(path = %self.path.display(), "the recording rules have changed"),
                Err(error) => {
                    self.metrics.recording_failures.inc();
                    tracing::warn!("{error}; the former rules stay in force");
                }
            }
            last = Some(found);
        }
    }

    /// Returns the values that a profile with these labels adds. The profile has passed `pprof::check`.
    pub(crate) fn values(&self, labels: &Labels, profile: &Profile) -> Recorded {
        let rules = self.rules.read().clone();
        let values =
            rules.into_iter().filter(|recording| recording.rule.selects(labels)).filter_map(|recording| {
                let value = recording.rule.value(profile);
                (value > 0).then(|| (Arc::clone(&recording), recording.rule.key(labels), value))
            });
        Recorded(values.collect())
    }

    /// Adds the values of a stored profile.
    pub(crate) fn count(&self, Recorded(values): Recorded) {
        for (recording, key, value) in values {
            let mut series = recording.series.lock();
            if series.len() >= recording.rule.max_series() && !series.contains_key(&key) {
                self.metrics.recording_refused(recording.rule.name());
                continue;
            }
            let sum = series.entry(key).or_default();
            *sum = sum.saturating_add(value);
        }
    }

    /// Adds the metrics to a text in the OpenMetrics format, before its last line.
    pub(crate) fn add_to(&self, mut text: String) -> String {
        const END: &str = "# EOF\n";
        if text.ends_with(END) {
            text.truncate(text.len() - END.len());
        }
        for recording in self.rules.read().iter() {
            let Recording { rule, series } = &**recording;
            let family = rule.name().strip_suffix("_total").unwrap_or(rule.name());
            let _ = writeln!(
                text,
                "# HELP {family} {}\n# TYPE {family} counter",
                rule.help().replace('"', "\\\"")
            );
            let mut series: Vec<_> = series.lock().iter().map(|(key, value)| (key.clone(), *value)).collect();
            series.sort();
            for (key, value) in series {
                let labels: Vec<String> = rule
                    .group_by()
                    .iter()
                    .zip(&key)
                    .filter(|(_, value)| !value.is_empty())
                    .map(|(name, value)| format!("{name}=\"{}\"", escaped(value)))
                    .collect();
                let labels =
                    if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
                let _ = writeln!(text, "{}{labels} {}", rule.name(), rule.format(value));
            }
        }
        text + END
    }
}

/// Escapes a label value as OpenMetrics writes it.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn read(path: &Path) -> Result<String, RecordingFileError> {
    let fault = |source| RecordingFileError::File { path: path.to_owned(), source };
    let mut text = String::new();
    let file = File::open(path).map_err(fault)?;
    file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(fault)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(fault(io::Error::new(
            io::ErrorKind::FileTooLarge,
            "larger than 1 MiB: shorten it, for instance with fewer rules",
        )));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use gannet_proto::pprof::{Builder, Header, Line};

    use super::*;

    fn profile(samples: i64) -> Profile {
        let mut builder = Builder::new(Header {
            sample_types: &[("cpu", "nanoseconds")],
            period_type: ("cpu", "nanoseconds"),
            period: 1,
            time_nanos: 0,
            duration_nanos: 1,
        });
        let location = builder.location(None, 1, &[Line { name: "work", ..Line::default() }]);
        builder.sample(&[location], &[samples * 10_000_000], &[]);
        builder.finish()
    }

    fn labels(service: &str) -> Labels {
        Labels::from([("service_name".to_owned(), service.to_owned()), ("node".to_owned(), "n1".to_owned())])
    }

    fn recorder(text: &str) -> (tempfile::TempDir, Arc<Recorder>) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("rules.yaml");
        std::fs::write(&path, text).unwrap();
        let recorder = Recorder::open(&path, Metrics::new()).unwrap();
        (directory, recorder)
    }

    const RULES: &str = "rules:\n- name: work_seconds_total\n  help: Time in work\n  function: work\n  max_series: 2\n\
                         - name: other_seconds_total\n  selector: '{service_name=\"other\"}'\n  group_by: []\n";

    #[test]
    fn counters_show_seconds_by_label_up_to_the_limit() {
        let (_directory, recorder) = recorder(RULES);
        for (service, samples) in [("shop", 7), ("a\"b\\", 1), ("shop", 143), ("third", 5)] {
            recorder.count(recorder.values(&labels(service), &profile(samples)));
        }
        let text = recorder.add_to("# TYPE x gauge\nx 1\n# EOF\n".to_owned());
        let want = "# TYPE x gauge\nx 1\n# HELP work_seconds Time in work\n# TYPE work_seconds counter\n\
                    work_seconds_total{service_name=\"a\\\"b\\\\\"} 0.010000000\n\
                    work_seconds_total{service_name=\"shop\"} 1.500000000\n\
                    # HELP other_seconds Values of cpu/nanoseconds by a recording rule\n\
                    # TYPE other_seconds counter\n# EOF\n";
        assert_eq!(text, want);
        let own = recorder.metrics.text();
        let refused = "gannet_collector_recording_refused_profiles_total{rule=\"work_seconds_total\"} 1";
        assert!(own.contains(refused) && own.contains("gannet_collector_recording_rules 2"), "{own}");
    }

    #[test]
    fn a_changed_file_keeps_the_counts_of_the_same_rules() {
        let (_directory, recorder) = recorder(RULES);
        recorder.count(recorder.values(&labels("shop"), &profile(100)));
        recorder.count(recorder.values(&labels("other"), &profile(100)));
        recorder.load(&RULES.replace("group_by: []", "group_by: [node]")).unwrap();
        let text = recorder.add_to(String::new());
        assert!(text.contains("work_seconds_total{service_name=\"shop\"} 1.000000000"), "{text}");
        assert!(!text.contains("other_seconds_total"), "{text}");
        assert!(recorder.load("rules:\n- name: bad\n").is_err());
        assert_eq!(recorder.add_to(String::new()), text);
    }
}
