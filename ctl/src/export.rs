//! Profiles as files of other tools.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    time::Duration,
};

use clap::ValueEnum;
use fxprof_processed_profile as firefox;
use gannet_proto::pprof::{self, Export, ExportSample, is_interpreted};

use crate::error::Error;

/// A format that `profiles get`, `merge` and `convert` write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum FileFormat {
    /// For `go tool pprof`, and for Gannet itself
    Pprof,
    /// One line a stack, for flame graph scripts
    Folded,
    /// For the viewer at speedscope.app
    Speedscope,
    /// For the viewer at profiler.firefox.com
    Firefox,
    /// As `perf script` prints it
    Perf,
    /// A request of OpenTelemetry (OTLP) in JSON, in one line
    Otlp,
}

/// The origin of a profile, which pprof has no place for.
#[derive(Debug, Default)]
pub(crate) struct Origin {
    /// Id at the collector. Empty for a merged profile, and for one of a file.
    pub(crate) id: String,
    /// Labels that all parts of the profile share.
    pub(crate) labels: BTreeMap<String, String>,
}

const NANOS_PER_MILLI: u64 = 1_000_000;

/// Endings of file names. Every other name without one of [`FOREIGN`] is a pprof file.
const ENDINGS: [(&str, FileFormat); 7] = [
    (".folded", FileFormat::Folded),
    (".speedscope.json", FileFormat::Speedscope),
    (".firefox.json", FileFormat::Firefox),
    (".perf", FileFormat::Perf),
    (".otlp.json", FileFormat::Otlp),
    (".pb.gz", FileFormat::Pprof),
    (".pprof", FileFormat::Pprof),
];
/// Endings that a pprof file never has.
const FOREIGN: [&str; 5] = [".json", ".svg", ".html", ".txt", ".data"];

impl FileFormat {
    /// Returns the format for the name of a file.
    pub(crate) fn of_path(path: &Path) -> Result<Self, Error> {
        let name =
            path.file_name().map(|name| name.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
        if let Some((_, format)) = ENDINGS.iter().find(|(ending, _)| name.ends_with(ending)) {
            return Ok(*format);
        }
        if FOREIGN.iter().any(|ending| name.ends_with(ending)) {
            return Err(Error::Usage(format!(
                "{}: the ending names no format; end it in .pb.gz, .folded, .speedscope.json, .firefox.json, .perf or .otlp.json, or give --as",
                path.display()
            )));
        }
        Ok(Self::Pprof)
    }

    /// Reports whether people can read it in a terminal.
    pub(crate) fn is_text(self) -> bool {
        self != Self::Pprof
    }
}

/// Returns a pprof profile of at most `max_bytes`, without compression, in another format. `sample_type` chooses the values of
/// formats that have one kind; empty means the last type. Only OTLP has a place for `origin`.
pub(crate) fn convert(
    bytes: &[u8],
    max_bytes: usize,
    to: FileFormat,
    sample_type: &str,
    origin: &Origin,
) -> Result<Vec<u8>, Error> {
    let profile = pprof::decode(bytes, max_bytes)?;
    let types = pprof::check(&profile)?.sample_types;
    let index = pprof::sample_type_index(&profile, sample_type).ok_or_else(|| {
        Error::Usage(format!("the profile has no type {sample_type}; it has {}", types.join(", ")))
    })?;
    Ok(match to {
        FileFormat::Pprof => pprof::encode(&profile),
        FileFormat::Folded => pprof::folded(&profile, index)?.into_bytes(),
        FileFormat::Speedscope => Export::new(&profile)?.speedscope("gannet", index).into_bytes(),
        FileFormat::Firefox => of_firefox(&Export::new(&profile)?, index)?,
        FileFormat::Perf => Export::new(&profile)?.perf_script(index).into_bytes(),
        FileFormat::Otlp => {
            let Origin { id, labels } = origin;
            let mut encoder = gannet_otlp::Encoder::new();
            encoder.add(&gannet_otlp::Outgoing { id, labels, profile: &profile });
            let request = gannet_otlp::to_json(encoder.finish());
            let mut line = request.map_err(|error| Error::Failed(error.to_string()))?;
            line.push(b'\n');
            line
        }
    })
}

/// Returns the profile in the format of the Firefox Profiler: a track for each thread. A profile has no times of samples, so those
/// of a thread follow each other from the start.
fn of_firefox(export: &Export, index: usize) -> Result<Vec<u8>, Error> {
    let start = Duration::from_nanos(u64::try_from(export.time_nanos).unwrap_or(0));
    let reference = firefox::ReferenceTimestamp::from_duration_since_unix_epoch(start);
    let interval = firefox::SamplingInterval::from_millis(1);
    let mut out = firefox::Profile::new("gannet", reference, interval);
    let user = out.add_category("User", firefox::CategoryColor::Yellow).into();
    let kernel = out.add_category("Kernel", firefox::CategoryColor::Orange).into();
    let interpreted = out.add_category("Interpreted", firefox::CategoryColor::Green).into();
    let frames: Vec<firefox::FrameInfo> = export
        .frames
        .iter()
        .map(|frame| firefox::FrameInfo {
            frame: firefox::Frame::Label(out.intern_string(&frame.name)),
            category_pair: match () {
                () if frame.kernel => kernel,
                () if is_interpreted(&frame.mapping) => interpreted,
                () => user,
            },
            flags: firefox::FrameFlags::empty(),
        })
        .collect();
    let is_time = export.sample_types.get(index).is_some_and(|kind| kind.ends_with("/nanoseconds"));
    let zero = firefox::Timestamp::from_nanos_since_reference(0);
    let mut processes: HashMap<i64, firefox::ProcessHandle> = HashMap::new();
    // Each thread with its time so far.
    let mut threads: HashMap<(i64, i64, &str), (firefox::ThreadHandle, u64)> = HashMap::new();
    for sample in &export.samples {
        let ExportSample { frames: stack, values, pid, tid, comm, thread } = sample;
        let value = u64::try_from(values.get(index).copied().unwrap_or(0)).unwrap_or(0);
        if value == 0 {
            continue;
        }
        let process = *processes
            .entry(*pid)
            .or_insert_with(|| out.add_process(comm, u32::try_from(*pid).unwrap_or(0), zero));
        let (handle, nanos) = threads.entry((*pid, *tid, thread)).or_insert_with(|| {
            let handle = out.add_thread(process, u32::try_from(*tid).unwrap_or(0), zero, pid == tid);
            if is_time {
                out.set_thread_samples_weight_type(handle, firefox::WeightType::TracingMs);
            }
            out.set_thread_name(handle, if thread.is_empty() { comm } else { thread });
            (handle, 0)
        });
        let stack = out.intern_stack_frames(*handle, stack.iter().map(|frame| frames[*frame].clone()));
        // Weights are milliseconds, or whatever the type counts. A track needs times in both cases.
        let (weight, took, busy) = if is_time {
            let millis = (value.saturating_add(NANOS_PER_MILLI / 2) / NANOS_PER_MILLI).max(1);
            (millis, value, firefox::CpuDelta::from_nanos(value))
        } else {
            (value, value.saturating_mul(NANOS_PER_MILLI), firefox::CpuDelta::ZERO)
        };
        *nanos = nanos.saturating_add(took);
        let at = firefox::Timestamp::from_nanos_since_reference(*nanos);
        out.add_sample(*handle, at, stack, busy, i32::try_from(weight).unwrap_or(i32::MAX));
    }
    for (handle, nanos) in threads.values() {
        let end = firefox::Timestamp::from_nanos_since_reference(nanos.saturating_add(1));
        out.set_thread_end_time(*handle, end);
    }
    serde_json::to_vec(&out).map_err(|error| Error::Failed(error.to_string()))
}

#[cfg(test)]
mod tests {
    use gannet_proto::pprof::{Builder, Header, Label, LabelValue, Line};
    use rstest::rstest;
    use serde_json::Value;

    use super::*;

    /// Checks the stacks of each thread and their weights: milliseconds of a type that counts time, else its values.
    #[rstest]
    #[case("", "tracing-ms", [50, 20])]
    #[case("samples/count", "samples", [5, 2])]
    fn a_firefox_file_has_the_stacks_of_each_thread(
        #[case] sample_type: &str,
        #[case] weights: &str,
        #[case] want: [i64; 2],
    ) {
        let mut builder = Builder::new(Header {
            sample_types: &[("samples", "count"), ("cpu", "nanoseconds")],
            period_type: ("cpu", "nanoseconds"),
            period: 10_000_000,
            time_nanos: 1_700_000_000_000_000_000,
            duration_nanos: 1_000_000_000,
        });
        let [main, work] = ["main", "work"].map(|name| {
            let line = Line { name, system_name: name, ..Line::default() };
            builder.location(None, name.len() as u64, &[line])
        });
        for (thread, tid, count) in [("one", 1, 5), ("two", 2, 2)] {
            let labels = [
                Label { key: "comm", value: LabelValue::Str("shop") },
                Label { key: "pid", value: LabelValue::Num(1, "") },
                Label { key: "tid", value: LabelValue::Num(tid, "") },
                Label { key: "thread", value: LabelValue::Str(thread) },
            ];
            builder.sample(&[work, main], &[count, count * 10_000_000], &labels);
        }
        let bytes = pprof::encode(&builder.finish());
        let file = convert(&bytes, 1 << 20, FileFormat::Firefox, sample_type, &Origin::default()).unwrap();
        let file: Value = serde_json::from_slice(&file).unwrap();
        let mut found: Vec<(String, i64, Vec<String>)> = file["threads"]
            .as_array()
            .unwrap()
            .iter()
            .map(|thread| {
                let number = |table: &str, column: &str, row: &Value| {
                    thread[table][column][row.as_u64().unwrap() as usize].clone()
                };
                assert_eq!(thread["samples"]["weightType"], weights);
                let (mut stack, mut names) = (thread["samples"]["stack"][0].clone(), Vec::new());
                while !stack.is_null() {
                    let func = number("frameTable", "func", &number("stackTable", "frame", &stack));
                    let name = number("funcTable", "name", &func).as_u64().unwrap() as usize;
                    names.push(thread["stringArray"][name].as_str().unwrap().to_owned());
                    stack = number("stackTable", "prefix", &stack);
                }
                let weight = thread["samples"]["weight"][0].as_i64().unwrap();
                (thread["name"].as_str().unwrap().to_owned(), weight, names)
            })
            .collect();
        found.sort();
        let stack = || vec!["work".to_owned(), "main".to_owned()];
        // The first thread has the name of the process.
        assert_eq!(found, [("shop".to_owned(), want[0], stack()), ("two".to_owned(), want[1], stack())]);
    }

    #[rstest]
    #[case("a.pb.gz", Some(FileFormat::Pprof))]
    #[case("a", Some(FileFormat::Pprof))]
    #[case("dir.folded/b.FOLDED", Some(FileFormat::Folded))]
    #[case("a.speedscope.json", Some(FileFormat::Speedscope))]
    #[case("a.firefox.json", Some(FileFormat::Firefox))]
    #[case("a.perf", Some(FileFormat::Perf))]
    #[case("a.otlp.json", Some(FileFormat::Otlp))]
    #[case("a.json", None)]
    #[case("a.svg", None)]
    fn the_ending_of_a_name_chooses_the_format(#[case] name: &str, #[case] want: Option<FileFormat>) {
        let found = FileFormat::of_path(Path::new(name));
        if let Err(error) = &found {
            assert!(error.to_string().contains(".speedscope.json"), "{error}");
        }
        assert_eq!(found.ok(), want);
    }
}
