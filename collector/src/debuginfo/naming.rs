//! The frames of a profile that need names, and the profile with them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use gannet_elf::BuildId;
use gannet_proto::{
    pprof::MAX_STACK_FRAMES,
    profiles::{Function, Line, Location, Mapping, Profile},
};

use super::{layout::Place, reader::Frame};

/// Addresses from here on are the kernel's.
const FIRST_KERNEL_ADDRESS: u64 = 1 << 63;
/// Names that senders give to functions without a name.
const PLACEHOLDERS: [&str; 5] = ["", "??", "[unknown]", "<unknown>", "unknown"];
/// Maximum number of functions inlined at one address. [`with_names`] omits the outermost ones beyond it.
const MAX_INLINED: usize = MAX_STACK_FRAMES / 2;

/// The frames of one file that need names.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Wanted {
    /// Frames without a name.
    pub(super) nameless: BTreeSet<Place>,
    /// Frames with a name and without a source file: the agent took the name from a symbol table.
    pub(super) bare: BTreeSet<Place>,
}

/// Frames by file and address, innermost inlined function first.
pub(super) type Frames = HashMap<(BuildId, Place), Frame>;

/// A view of a profile by its ids.
struct Parts<'a> {
    profile: &'a Profile,
    mappings: HashMap<u64, &'a Mapping>,
    functions: HashMap<u64, &'a Function>,
}

impl<'a> Parts<'a> {
    fn of(profile: &'a Profile) -> Self {
        Self {
            profile,
            mappings: profile.mapping.iter().map(|mapping| (mapping.id, mapping)).collect(),
            functions: profile.function.iter().map(|function| (function.id, function)).collect(),
        }
    }

    fn text(&self, index: i64) -> &'a str {
        usize::try_from(index)
            .ok()
            .and_then(|at| self.profile.string_table.get(at))
            .map_or("", String::as_str)
    }

    /// Returns the file of a location that may lack a name or a line, and its address. Returns `None` for frames of the kernel and of
    /// files without a build id.
    fn place(&self, location: &Location) -> Option<(BuildId, Place)> {
        let mapping = self.mappings.get(&location.mapping_id)?;
        // The kernel and the vDSO are not files.
        let is_no_file = self.text(mapping.filename).starts_with('[');
        if is_no_file || location.address == 0 || location.address >= FIRST_KERNEL_ADDRESS {
            return None;
        }
        let build_id: BuildId = self.text(mapping.build_id).parse().ok()?;
        let place = Place {
            address: location.address,
            start: mapping.memory_start,
            limit: mapping.memory_limit,
            offset: mapping.file_offset,
        };
        build_id.is_unique().then_some((build_id, place))
    }

    fn is_nameless(&self, location: &Location) -> bool {
        location.line.iter().all(|line| {
            let name = self.functions.get(&line.function_id).map_or("", |function| self.text(function.name));
            PLACEHOLDERS.contains(&name) || is_number(name)
        })
    }

    fn is_bare(&self, location: &Location) -> bool {
        let [line] = &location.line[..] else { return false };
        let file = self.functions.get(&line.function_id).map_or(0, |function| function.filename);
        line.line == 0 && self.text(file).is_empty()
    }
}

/// Reports whether a name is an address: `0x55d0`.
fn is_number(name: &str) -> bool {
    name.strip_prefix("0x")
        .is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_hexdigit()))
}

/// Returns the frames of a checked profile that need names, by build id.
pub(super) fn wanted(profile: &Profile) -> BTreeMap<BuildId, Wanted> {
    let parts = Parts::of(profile);
    let mut all: BTreeMap<BuildId, Wanted> = BTreeMap::new();
    for location in &profile.location {
        let is_nameless = parts.is_nameless(location);
        if !is_nameless && !parts.is_bare(location) {
            continue;
        }
        let Some((build_id, place)) = parts.place(location) else { continue };
        let wanted = all.entry(build_id).or_default();
        let places = if is_nameless { &mut wanted.nameless } else { &mut wanted.bare };
        places.insert(place);
    }
    all
}

/// Returns the profile with these frames, and the number of locations that got names. A location that has a name keeps it if the new
/// frame has no source file.
pub(super) fn with_names(profile: &Profile, frames: &Frames) -> Option<(Profile, u64)> {
    let parts = Parts::of(profile);
    let mut found: HashMap<u64, &Frame> = HashMap::new();
    for location in &profile.location {
        let is_nameless = parts.is_nameless(location);
        if !is_nameless && !parts.is_bare(location) {
            continue;
        }
        let frame = parts.place(location).and_then(|key| frames.get(&key)).filter(|frame| !frame.is_empty());
        if let Some(frame) = frame.filter(|frame| is_nameless || frame.iter().any(|line| line.line > 0)) {
            found.insert(location.id, frame);
        }
    }
    if found.is_empty() {
        return None;
    }
    let flat = too_deep(profile, &found);
    let mut named = profile.clone();
    let mut writer = Writer::new(&mut named.string_table, &mut named.function);
    let mut mappings = BTreeSet::new();
    for location in &mut named.location {
        let Some(frame) = found.get(&location.id) else { continue };
        mappings.insert(location.mapping_id);
        let lines = shown(frame, flat.contains(&location.id));
        location.line = lines.iter().map(|line| writer.line(line)).collect();
    }
    for mapping in named.mapping.iter_mut().filter(|mapping| mappings.contains(&mapping.id)) {
        mapping.has_functions = true;
    }
    Some((named, found.len() as u64))
}

/// Returns the functions of a frame, at most [`MAX_INLINED`]. A flat frame has only the function that was not inlined.
fn shown(frame: &Frame, is_flat: bool) -> &[super::reader::NamedLine] {
    if is_flat { &frame[frame.len().saturating_sub(1)..] } else { &frame[..frame.len().min(MAX_INLINED)] }
}

/// Returns the locations of stacks that inlined functions would make deeper than readers accept.
fn too_deep(profile: &Profile, found: &HashMap<u64, &Frame>) -> BTreeSet<u64> {
    let lines: HashMap<u64, usize> =
        profile.location.iter().map(|location| (location.id, location.line.len().max(1))).collect();
    let depth = |id: &u64| {
        found.get(id).map_or_else(|| lines.get(id).copied().unwrap_or(1), |frame| shown(frame, false).len())
    };
    let deep = profile
        .sample
        .iter()
        .filter(|sample| sample.location_id.iter().map(depth).sum::<usize>() > MAX_STACK_FRAMES);
    deep.flat_map(|sample| sample.location_id.iter().copied()).collect()
}

/// Adds functions and texts to a profile, each once.
struct Writer<'a> {
    texts: HashMap<Arc<str>, i64>,
    functions: HashMap<[i64; 4], u64>,
    next_id: u64,
    all_texts: &'a mut Vec<String>,
    all_functions: &'a mut Vec<Function>,
}

impl<'a> Writer<'a> {
    fn new(all_texts: &'a mut Vec<String>, all_functions: &'a mut Vec<Function>) -> Self {
        let texts = (0..).zip(all_texts.iter()).map(|(index, text)| (text.as_str().into(), index)).collect();
        let next_id = all_functions.iter().map(|function| function.id).max().unwrap_or(0).saturating_add(1);
        Self { texts, functions: HashMap::new(), next_id, all_texts, all_functions }
    }

    fn text(&mut self, text: &Arc<str>) -> i64 {
        if let Some(index) = self.texts.get(text) {
            return *index;
        }
        let index = self.all_texts.len() as i64;
        self.all_texts.push(text.to_string());
        self.texts.insert(Arc::clone(text), index);
        index
    }

    fn line(&mut self, line: &super::reader::NamedLine) -> Line {
        let [name, system_name, filename] =
            [&line.name, &line.system_name, &line.file].map(|text| self.text(text));
        let start_line = i64::from(line.start_line);
        let function_id =
            *self.functions.entry([name, system_name, filename, start_line]).or_insert_with(|| {
                let id = self.next_id;
                self.next_id = self.next_id.saturating_add(1);
                self.all_functions.push(Function { id, name, system_name, filename, start_line });
                id
            });
        Line { function_id, line: line.line.into(), column: line.column.into() }
    }
}

#[cfg(test)]
mod tests {
    use gannet_proto::pprof::{self, Builder, Header, Line as Named, Mapping as Mapped};

    use super::{super::reader::NamedLine, *};

    const ID: &str = "00112233aabbccdd";

    fn builder() -> Builder {
        Builder::new(Header {
            sample_types: &[("cpu", "nanoseconds")],
            period_type: ("cpu", "nanoseconds"),
            period: 1,
            time_nanos: 1,
            duration_nanos: 1,
        })
    }

    fn mapping(build_id: &str) -> Mapped<'_> {
        Mapped { start: 0x1000, limit: 0x9000, offset: 0x1000, file: "/app", build_id }
    }

    fn place(address: u64) -> Place {
        Place { address, start: 0x1000, limit: 0x9000, offset: 0x1000 }
    }

    fn named(lines: &[(&str, u32)]) -> Frame {
        let line = |(name, line): &(&str, u32)| NamedLine {
            name: (*name).into(),
            system_name: (*name).into(),
            file: if *line > 0 { "a.c".into() } else { "".into() },
            line: *line,
            column: 0,
            start_line: 0,
        };
        lines.iter().map(line).collect()
    }

    fn frames(all: &[(u64, &[(&str, u32)])]) -> Frames {
        let id: BuildId = ID.parse().unwrap();
        all.iter().map(|(address, lines)| ((id.clone(), place(*address)), named(lines))).collect()
    }

    /// Returns the names of each location, with lines, in the order of addresses.
    fn names(profile: &Profile) -> Vec<Vec<String>> {
        let parts = Parts::of(profile);
        let mut locations: Vec<&Location> = profile.location.iter().collect();
        locations.sort_by_key(|location| location.address);
        let line =
            |line: &Line| format!("{}:{}", parts.text(parts.functions[&line.function_id].name), line.line);
        locations.iter().map(|location| location.line.iter().map(line).collect()).collect()
    }

    #[test]
    fn only_frames_that_lack_something_are_wanted() {
        let mut builder = builder();
        let app = builder.mapping(mapping(ID));
        let others = ["", "abc", "0011", "Go/build/id"]
            .map(|id| builder.mapping(Mapped { file: "/b", ..mapping(id) }));
        let kernel = builder.mapping(Mapped { start: 1 << 63, limit: u64::MAX, ..mapping(ID) });
        let line = |name, file, line| [Named { name, file, line, ..Named::default() }];
        let mut all = vec![
            builder.location(Some(app), 0x1001, &[]),
            builder.location(Some(app), 0x1002, &line("[unknown]", "", 0)),
            builder.location(Some(app), 0x1003, &line("0x1003", "", 0)),
            builder.location(Some(app), 0x1004, &line("memcpy", "", 0)),
            builder.location(Some(app), 0x1005, &line("known", "a.c", 7)),
            builder.location(Some(app), 0x1006, &line("file", "a.c", 0)),
            builder.location(Some(kernel), 0xffff_ffff_8000_0000, &[]),
            builder.location(None, 0x77, &[]),
        ];
        all.extend(others.map(|mapping| builder.location(Some(mapping), 0x1001, &[])));
        builder.sample(&all, &[1], &[]);
        let wanted = wanted(&builder.finish());
        assert_eq!(wanted.len(), 1);
        let of = &wanted[&ID.parse().unwrap()];
        assert_eq!(of.nameless, [0x1001, 0x1002, 0x1003].map(place).into());
        assert_eq!(of.bare, [place(0x1004)].into());
    }

    #[test]
    fn names_replace_what_was_missing_and_nothing_else() {
        let mut builder = builder();
        let app = builder.mapping(mapping(ID));
        let bare = |name| [Named { name, ..Named::default() }];
        let stack = [
            builder.location(Some(app), 0x1001, &[]),
            builder.location(Some(app), 0x1002, &bare("exported")),
            builder.location(Some(app), 0x1003, &bare("kept")),
            builder.location(Some(app), 0x1004, &[]),
        ];
        builder.sample(&stack, &[1], &[]);
        let before = builder.finish();
        let found = frames(&[
            (0x1001, &[("inner", 7), ("outer", 9)]),
            (0x1002, &[("inner", 8), ("exported", 9)]),
            // A symbol table knows no more than the agent did.
            (0x1003, &[("worse", 0)]),
            (0x1004, &[]),
        ]);
        let (after, count) = with_names(&before, &found).unwrap();
        pprof::check(&after).unwrap();
        assert_eq!(count, 2);
        let texts = |all: &[&str]| all.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        assert_eq!(
            names(&after),
            [texts(&["inner:7", "outer:9"]), texts(&["inner:8", "exported:9"]), texts(&["kept:0"]), vec![]]
        );
        assert_eq!(after.function.len(), before.function.len() + 3);
        assert_eq!(after.sample, before.sample);
        assert_eq!(with_names(&after, &frames(&[(0x1001, &[("again", 1)])])), None);
    }

    #[test]
    fn inlined_functions_make_no_stack_too_deep() {
        let mut builder = builder();
        let app = builder.mapping(mapping(ID));
        let stack: Vec<_> =
            (0..MAX_STACK_FRAMES as u64 - 1).map(|n| builder.location(Some(app), 0x1001 + n, &[])).collect();
        builder.sample(&stack, &[1], &[]);
        let short = [stack[0]];
        builder.sample(&short, &[1], &[]);
        let found: Vec<_> =
            (0..MAX_STACK_FRAMES as u64).map(|n| (0x1001 + n, &[("in", 1), ("out", 2)][..])).collect();
        let (after, _) = with_names(&builder.finish(), &frames(&found)).unwrap();
        assert!(names(&after).iter().all(|names| names == &["out:2"]));
    }
}
