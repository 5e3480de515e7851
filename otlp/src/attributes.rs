//! The names of Gannet's labels in OpenTelemetry: its semantic conventions, where they have the same thing.

/// Labels of series and samples, each with its attribute. Every other label has its own name there too.
const ATTRIBUTES: [(&str, &str); 17] = [
    ("cluster", "k8s.cluster.name"),
    ("comm", "process.executable.name"),
    ("container", "k8s.container.name"),
    ("container_id", "container.id"),
    ("exe", "process.executable.path"),
    ("namespace", "k8s.namespace.name"),
    ("node", "k8s.node.name"),
    ("pid", "process.pid"),
    ("pod", "k8s.pod.name"),
    ("pod_uid", "k8s.pod.uid"),
    ("runtime", "process.runtime.name"),
    ("runtime_version", "process.runtime.version"),
    ("service_name", "service.name"),
    ("service_namespace", "service.namespace"),
    ("service_version", "service.version"),
    ("thread", "thread.name"),
    ("tid", "thread.id"),
];

/// Kinds of workloads that have an attribute with their name: `k8s.deployment.name`.
const WORKLOAD_KINDS: [&str; 6] = ["cronjob", "daemonset", "deployment", "job", "replicaset", "statefulset"];

/// Returns the attribute of a label.
pub(crate) fn attribute(label: &str) -> &str {
    ATTRIBUTES.iter().find(|(name, _)| *name == label).map_or(label, |(_, attribute)| attribute)
}

/// Returns the label of an attribute.
pub(crate) fn label(attribute: &str) -> &str {
    ATTRIBUTES.iter().find(|(_, name)| *name == attribute).map_or(attribute, |(label, _)| label)
}

/// Returns the kind of the workload whose name this attribute has.
pub(crate) fn workload_kind(attribute: &str) -> Option<&'static str> {
    let kind = attribute.strip_prefix("k8s.")?.strip_suffix(".name")?;
    WORKLOAD_KINDS.into_iter().find(|known| *known == kind)
}

/// Returns the attribute with the name of a workload of this kind.
pub(crate) fn workload_attribute(kind: &str) -> Option<String> {
    WORKLOAD_KINDS.contains(&kind).then(|| format!("k8s.{kind}.name"))
}

/// Labels of a sample with the ids of its span, in lower-case hex: 32 digits and 16.
pub(crate) const TRACE_ID: &str = "trace_id";
pub(crate) const SPAN_ID: &str = "span_id";

/// The kind of a frame: what ran it.
pub(crate) const FRAME_TYPE: &str = "profile.frame.type";
/// Build id of a mapping in the note of the GNU linker, in hex.
pub(crate) const BUILD_ID_GNU: &str = "process.executable.build_id.gnu";
/// Build id of a mapping that is not in hex: that of the Go linker.
pub(crate) const BUILD_ID_GO: &str = "process.executable.build_id.go";
/// Build id of a mapping: a hash of its file, by the profiler of OpenTelemetry.
pub(crate) const BUILD_ID_HASH: &str = "process.executable.build_id.htlhash";
/// Limit of a mapping whose range is empty or unknown. OTLP requires a limit behind the start.
pub(crate) const MAPPING_LIMIT: &str = "gannet.mapping.limit";

/// Flag of the mapping of the main program, which is the first one in pprof.
pub(crate) const IS_MAIN: &str = "gannet.mapping.main";

/// Flags of mappings, in the order of pprof.
pub(crate) const HAS_FUNCTIONS: &str = "pprof.mapping.has_functions";
pub(crate) const HAS_FILENAMES: &str = "pprof.mapping.has_filenames";
pub(crate) const HAS_LINE_NUMBERS: &str = "pprof.mapping.has_line_numbers";
pub(crate) const HAS_INLINE_FRAMES: &str = "pprof.mapping.has_inline_frames";
/// Flag of a location that stands for several.
pub(crate) const IS_FOLDED: &str = "pprof.location.is_folded";
/// Lines of text of a profile; Gannet's ledger is one.
pub(crate) const COMMENT: &str = "pprof.profile.comment";
pub(crate) const DROP_FRAMES: &str = "pprof.profile.drop_frames";
pub(crate) const KEEP_FRAMES: &str = "pprof.profile.keep_frames";
pub(crate) const DOC_URL: &str = "pprof.profile.doc_url";
/// The sample type that tools show first.
pub(crate) const DEFAULT_SAMPLE_TYPE: &str = "pprof.scope.default_sample_type";

/// Mappings of Gannet that stand for a kind of frame, each with the name of that kind.
const FRAME_TYPES: [(&str, &str); 6] = [
    ("[cpython]", "cpython"),
    ("[jvm]", "jvm"),
    ("[kernel.kallsyms]", "kernel"),
    ("[php]", "php"),
    ("[ruby]", "ruby"),
    ("[v8]", "v8js"),
];

/// Returns the kind of the frames in a mapping.
pub(crate) fn frame_type(mapping: &str) -> &'static str {
    FRAME_TYPES.iter().find(|(name, _)| *name == mapping).map_or("native", |(_, kind)| kind)
}

/// Returns the mapping that stands for a kind of frame, or `None` for frames of files.
pub(crate) fn mapping_of(frame_type: &str) -> Option<&'static str> {
    FRAME_TYPES.iter().find(|(_, kind)| *kind == frame_type).map(|(name, _)| *name)
}

/// Returns the bytes of an even number of hex digits in lower case.
pub(crate) fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let pairs = text.as_bytes().chunks(2);
    pairs.map(|pair| Some(digit(pair[0])? << 4 | digit(*pair.get(1)?)?)).collect()
}
