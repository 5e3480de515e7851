//! Profiles in the formats of other tools, frame by frame.

use std::{borrow::Cow, collections::HashMap, fmt::Write as _};

use serde_json::json;

use super::{FlameTree, InterpreterFrames, PprofError, check, flame::FrameKey, is_interpreted};
use crate::profiles::{Profile, Sample};

/// A frame of an exported stack.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ExportFrame {
    /// Name as flame graphs show it.
    pub name: String,
    /// Whether the frame is in the kernel.
    pub kernel: bool,
    /// Mapped file, with its path; empty if there is none.
    pub mapping: String,
    /// Source file; empty if unknown.
    pub file: String,
    /// Line that ran; 0 if unknown.
    pub line: i64,
    /// Address in the process.
    pub address: u64,
    /// Whether the function is inlined into that of the next outer frame.
    pub inlined: bool,
    /// Whether the name is that of a function, and not made from file and address.
    pub is_function: bool,
}

/// A sample with its frames.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportSample {
    /// Indexes of the frames, root first.
    pub frames: Vec<usize>,
    /// One value for each sample type.
    pub values: Vec<i64>,
    /// Process id; 0 if unknown.
    pub pid: i64,
    /// Thread id; 0 if unknown.
    pub tid: i64,
    /// Command name of the process.
    pub comm: String,
    /// Name of the thread.
    pub thread: String,
}

/// All stacks of a profile, with the frames that flame graphs show: without the C functions of interpreters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Export {
    /// Each different frame once.
    pub frames: Vec<ExportFrame>,
    /// The samples, in the order of the profile.
    pub samples: Vec<ExportSample>,
    /// Sample types as `cpu/nanoseconds`.
    pub sample_types: Vec<String>,
    /// Start in nanoseconds since 1970.
    pub time_nanos: i64,
    /// Length of the measured time in nanoseconds.
    pub duration_nanos: i64,
}

impl Export {
    /// Reads a profile.
    pub fn new(profile: &Profile) -> Result<Self, PprofError> {
        let summary = check(profile)?;
        let text = |index: i64| {
            usize::try_from(index).ok().and_then(|at| profile.string_table.get(at)).map_or("", String::as_str)
        };
        let mut tree = FlameTree::new();
        let named = tree.location_frames(profile)?;
        let names = tree.names();
        let mappings: HashMap<u64, &str> =
            profile.mapping.iter().map(|mapping| (mapping.id, text(mapping.filename))).collect();
        let sources: HashMap<u64, &str> =
            profile.function.iter().map(|function| (function.id, text(function.filename))).collect();
        let mut export = Self {
            sample_types: summary.sample_types,
            time_nanos: profile.time_nanos,
            duration_nanos: profile.duration_nanos,
            ..Self::default()
        };
        let mut numbers: HashMap<ExportFrame, usize> = HashMap::new();
        // Frames of each location, outermost first.
        let mut of_location: HashMap<u64, Vec<usize>> = HashMap::new();
        for (location, keys) in profile.location.iter().zip(&named) {
            let mut frames = Vec::with_capacity(keys.len());
            for (depth, key) in keys.iter().enumerate().rev() {
                let FrameKey { name, kernel } = names[*key as usize];
                let line = location.line.get(depth);
                let frame = ExportFrame {
                    name: name.clone(),
                    kernel: *kernel,
                    mapping: mappings.get(&location.mapping_id).copied().unwrap_or_default().to_owned(),
                    file: line
                        .and_then(|line| sources.get(&line.function_id))
                        .copied()
                        .unwrap_or_default()
                        .to_owned(),
                    line: line.map_or(0, |line| line.line),
                    address: location.address,
                    inlined: depth + 1 < keys.len(),
                    is_function: line.is_some(),
                };
                let next = export.frames.len();
                let number = *numbers.entry(frame.clone()).or_insert(next);
                if number == next {
                    export.frames.push(frame);
                }
                frames.push(number);
            }
            of_location.insert(location.id, frames);
        }
        let interpreters = InterpreterFrames::new(profile);
        let empty = Vec::new();
        export.samples = profile
            .sample
            .iter()
            .map(|sample| {
                let visible = interpreters.visible(sample).rev();
                let frames = visible.flat_map(|(_, id)| of_location.get(&id).unwrap_or(&empty)).copied();
                let label = |key: &str| Label::of(profile, sample, key);
                ExportSample {
                    frames: frames.collect(),
                    values: sample.value.clone(),
                    pid: label("pid").number,
                    tid: label("tid").number,
                    comm: label("comm").text.to_owned(),
                    thread: label("thread").text.to_owned(),
                }
            })
            .collect();
        Ok(export)
    }

    /// Returns the profile in the file format of speedscope: one profile for each sample type. It shows that of `type_index` first.
    pub fn speedscope(&self, name: &str, type_index: usize) -> String {
        let frames: Vec<_> = self
            .frames
            .iter()
            .map(|frame| {
                let mut of_file = json!({ "name": frame.name });
                let file = if frame.file.is_empty() { &frame.mapping } else { &frame.file };
                if !file.is_empty() {
                    of_file["file"] = json!(file);
                }
                if frame.line > 0 {
                    of_file["line"] = json!(frame.line);
                }
                of_file
            })
            .collect();
        let profiles: Vec<_> = self
            .sample_types
            .iter()
            .enumerate()
            .map(|(index, kind)| {
                let samples = self.samples.iter().filter(|sample| sample.values[index] > 0);
                let (stacks, weights): (Vec<_>, Vec<_>) =
                    samples.map(|sample| (&sample.frames, sample.values[index])).unzip();
                let total = weights.iter().fold(0_i64, |sum, weight| sum.saturating_add(*weight));
                let unit = match kind.rsplit_once('/').map_or("", |(_, unit)| unit) {
                    unit @ ("nanoseconds" | "microseconds" | "milliseconds" | "seconds" | "bytes") => unit,
                    _ => "none",
                };
                json!({
                    "type": "sampled", "name": format!("{name} {kind}"), "unit": unit, "startValue": 0, "endValue": total,
                    "samples": stacks, "weights": weights,
                })
            })
            .collect();
        json!({
            "$schema": "https://www.speedscope.app/file-format-schema.json", "name": name, "exporter": "gannet",
            "activeProfileIndex": type_index, "shared": { "frames": frames }, "profiles": profiles,
        })
        .to_string()
    }

    /// Returns the samples as `perf script` prints them, with the values of one sample type as periods. A profile has no times of
    /// samples, so they follow each other from its start, each after its value.
    pub fn perf_script(&self, type_index: usize) -> String {
        let event = match self.sample_types.get(type_index).map(String::as_str) {
            Some("offcpu/nanoseconds") => "sched:sched_switch",
            _ => "cpu-clock",
        };
        let (mut out, mut nanos) = (String::new(), u64::try_from(self.time_nanos).unwrap_or(0));
        for sample in &self.samples {
            let value = sample.values.get(type_index).copied().unwrap_or(0);
            let Ok(value) = u64::try_from(value) else { continue };
            if value == 0 {
                continue;
            }
            let comm = if sample.thread.is_empty() { &sample.comm } else { &sample.thread };
            let (seconds, micros) = (nanos / 1_000_000_000, nanos / 1000 % 1_000_000);
            let (comm, pid, tid) = (one_line(comm), sample.pid, sample.tid);
            let _ = writeln!(out, "{comm} {pid}/{tid} {seconds}.{micros:06}: {value} {event}:");
            for index in sample.frames.iter().rev() {
                let ExportFrame { mapping, address, inlined, .. } = &self.frames[*index];
                let place = if *inlined { "inlined" } else { mapping };
                let place = if place.is_empty() { "[unknown]" } else { place };
                let name = perf_name(&self.frames[*index]);
                let _ = writeln!(out, "\t{address:16x} {} ({})", one_line(&name), one_line(place));
            }
            out.push('\n');
            nanos = nanos.saturating_add(value);
        }
        out
    }
}

/// Returns a name that readers of `perf script` take as it is. They cut names at `+0x` and at the first parenthesis.
fn perf_name(frame: &ExportFrame) -> Cow<'_, str> {
    match frame.name.strip_suffix(')').and_then(|name| name.rsplit_once(" (")) {
        _ if !frame.is_function && !frame.name.starts_with('[') => "[unknown]".into(),
        Some((function, place)) if is_interpreted(&frame.mapping) => format!("{function}@{place}").into(),
        _ => frame.name.as_str().into(),
    }
}

/// Text and number of a label of a sample.
struct Label<'p> {
    text: &'p str,
    number: i64,
}

impl<'p> Label<'p> {
    fn of(profile: &'p Profile, sample: &Sample, key: &str) -> Self {
        let text = |index: i64| {
            usize::try_from(index).ok().and_then(|at| profile.string_table.get(at)).map_or("", String::as_str)
        };
        let label = sample.label.iter().find(|label| text(label.key) == key);
        Self { text: label.map_or("", |label| text(label.str)), number: label.map_or(0, |label| label.num) }
    }
}

/// Returns a text without line ends and other control characters; empty texts become `?`.
fn one_line(text: &str) -> String {
    let line: String = text.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
    if line.is_empty() { "?".to_owned() } else { line }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use inferno::collapse::{Collapse as _, perf};
    use serde_json::Value;

    use super::*;
    use crate::pprof::{Builder, Header, Label, LabelValue, Line, Mapping, folded};

    /// Two processes: C with an inlined function, the kernel and an address without a name; Python with its interpreter.
    fn profile() -> Profile {
        let mut builder = Builder::new(Header {
            sample_types: &[("samples", "count"), ("cpu", "nanoseconds")],
            period_type: ("cpu", "nanoseconds"),
            period: 10_000_000,
            time_nanos: 1_700_000_000_123_456_789,
            duration_nanos: 10_000_000_000,
        });
        let map = |file, start| Mapping { start, limit: start + 0x1000, offset: 0, file, build_id: "" };
        let app = builder.mapping(map("/usr/bin/app", 0x1000));
        let kernel = builder.mapping(map("[kernel.kallsyms]", 0xffff_0000));
        let python = builder.mapping(map("/usr/bin/python3", 0x8000));
        let cpython = builder.mapping(Mapping { file: "[cpython]", ..Mapping::default() });
        let line = |name, file, line| Line { name, system_name: name, file, line, ..Line::default() };
        let main = builder.location(Some(app), 0x1010, &[line("main", "app.c", 7)]);
        let inlined = builder.location(
            Some(app),
            0x1020,
            &[line("inner<a, b>", "app.c", 3), line("outer", "app.c", 5)],
        );
        let read = builder.location(Some(kernel), 0xffff_0010, &[line("ksys_read", "", 0)]);
        let bare = builder.location(Some(app), 0x1234, &[]);
        let eval = builder.location(Some(python), 0x8010, &[line("_PyEval_EvalFrameDefault", "", 0)]);
        let handle = builder.location(
            Some(cpython),
            1,
            &[Line { start_line: 10, ..line("handle", "/srv/app.py", 12) }],
        );
        let of = |comm: &'static str, pid, tid| {
            [
                Label { key: "comm", value: LabelValue::Str(comm) },
                Label { key: "pid", value: LabelValue::Num(pid, "") },
                Label { key: "tid", value: LabelValue::Num(tid, "") },
            ]
        };
        builder.sample(&[read, inlined, main], &[3, 30_000_000], &of("app", 7, 7));
        builder.sample(&[bare, main], &[1, 10_000_000], &of("app", 7, 8));
        builder.sample(&[handle, eval], &[2, 20_000_000], &of("python3", 9, 9));
        builder.finish()
    }

    #[test]
    fn stacks_have_the_frames_of_flame_graphs() {
        let profile = profile();
        let export = Export::new(&profile).unwrap();
        let mut lines: Vec<String> = export
            .samples
            .iter()
            .map(|sample| {
                let names: Vec<&str> =
                    sample.frames.iter().map(|frame| &*export.frames[*frame].name).collect();
                format!("{} {}", names.join(";"), sample.values[1])
            })
            .collect();
        lines.sort();
        let text = folded(&profile, 1).unwrap();
        let mut want: Vec<&str> = text.lines().collect();
        want.sort_unstable();
        assert_eq!(lines, want);
        assert!(text.contains("main;outer;inner<a, b>;ksys_read 30000000"), "{text}");
        assert!(
            text.contains("handle (app.py:10) 20000000"),
            "the interpreter's own frame is hidden: {text}"
        );
    }

    /// A reader of another project finds the stacks in the text.
    #[test]
    fn a_reader_of_perf_script_finds_the_stacks() {
        let script = Export::new(&profile()).unwrap().perf_script(1);
        let mut folder = perf::Folder::default();
        let mut out = Vec::new();
        folder.collapse(script.as_bytes(), &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let found: BTreeSet<&str> =
            text.lines().filter_map(|line| line.rsplit_once(' ')).map(|(stack, _)| stack).collect();
        let want = ["app;main;outer;inner<a, b>;ksys_read", "app;main;[app]", "python3;handle@app.py:10"];
        assert_eq!(found, BTreeSet::from(want), "{script}");
        // The first sample starts with the profile, and its period is its time.
        let head = script.lines().next().unwrap();
        assert!(head.contains(" 1700000000.123456: ") && head.ends_with("0000000 cpu-clock:"), "{head}");
    }

    #[test]
    fn a_speedscope_file_adds_up() {
        let export = Export::new(&profile()).unwrap();
        let file: Value = serde_json::from_str(&export.speedscope("shop", 1)).unwrap();
        let frames = file["shared"]["frames"].as_array().unwrap();
        let profiles = file["profiles"].as_array().unwrap();
        assert_eq!((profiles.len(), &file["activeProfileIndex"]), (2, &1.into()));
        for (profile, (unit, total)) in profiles.iter().zip([("none", 6), ("nanoseconds", 60_000_000)]) {
            let weights: i64 =
                profile["weights"].as_array().unwrap().iter().map(|w| w.as_i64().unwrap()).sum();
            assert_eq!(
                (weights, &profile["endValue"], &profile["unit"]),
                (total, &total.into(), &unit.into())
            );
            let samples = profile["samples"].as_array().unwrap();
            assert_eq!(samples.len(), profile["weights"].as_array().unwrap().len());
            for frame in samples.iter().flat_map(|stack| stack.as_array().unwrap()) {
                assert!((frame.as_u64().unwrap() as usize) < frames.len());
            }
        }
        let handle = frames.iter().find(|frame| frame["name"] == "handle (app.py:10)").unwrap();
        assert_eq!((&handle["file"], &handle["line"]), (&"/srv/app.py".into(), &12.into()));
    }

    /// Names of a hostile program end no line.
    #[test]
    fn control_characters_end_no_line() {
        let mut builder = Builder::new(Header {
            sample_types: &[("samples", "count")],
            period_type: ("cpu", "nanoseconds"),
            period: 1,
            time_nanos: -5,
            duration_nanos: 0,
        });
        let name = "a\n\nevil 1/1 0.0: 1 cpu-clock:\n";
        let line = Line { name, system_name: name, ..Line::default() };
        let location = builder.location(None, 1, &[line]);
        builder.sample(&[location], &[1], &[Label { key: "comm", value: LabelValue::Str("x\ny") }]);
        let export = Export::new(&builder.finish()).unwrap();
        assert_eq!(export.perf_script(0).lines().count(), 3, "{}", export.perf_script(0));
        assert!(serde_json::from_str::<Value>(&export.speedscope("x", 0)).is_ok());
    }
}
