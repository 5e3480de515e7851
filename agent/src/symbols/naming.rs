//! Builds finished profiles from raw ones and the names of their addresses.

use std::{
    collections::{BTreeSet, HashMap},
    fs::File,
    io::{self, Read},
    sync::{Arc, atomic::Ordering},
    time::UNIX_EPOCH,
};

use gannet_elf::BuildIds;
use gannet_proto::{
    labels::{COMM, RUNTIME, RUNTIME_VERSION},
    pprof::{
        Builder, GUESSED_FROM, Header, Label, LabelValue, Line, LocationId, MAX_STACK_FRAMES, Mapping,
        MappingId,
    },
    profiles::Profile,
};

use super::{
    finder::{FIRST_KERNEL_ADDRESS, FileFunctions, Location, NameFinder, ProcessFunctions},
    names::Function,
    options::{SymbolizerConfig, SymbolizerStats},
    vdso::VDSO_MAPPING,
};
use crate::{
    model::{self, Image, MappingKind, SampleKind, StackEnd, StackWord},
    profile::{RawProcess, RawProfile, RawStack},
};

/// The name of the mapping of kernel frames.
pub(crate) const KERNEL_MAPPING: &str = "[kernel.kallsyms]";
/// The type of the values of off-CPU profiles.
pub(crate) const OFF_CPU_TYPE: &str = "offcpu";
/// The name of mappings of code without a file.
const ANONYMOUS_MAPPING: &str = "[anon]";
/// The frame at the root of a stack that has more frames than the limit.
const TRUNCATED_FRAME: &str = "[truncated]";
/// The frame at the root of a stack that could not be unwound further.
const BROKEN_FRAME: &str = "[broken stack]";
/// The frame at the root of a stack that ends at memory that could not be read.
const UNREADABLE_FRAME: &str = "[unreadable stack]";
/// The frame in place of the stack of a 32-bit program.
const UNSUPPORTED_FRAME: &str = "[32-bit program]";

/// Functions inlined at one address; of more the outermost are left out.
const MAX_INLINED: usize = MAX_STACK_FRAMES / 2;

const MAX_NOTE_BYTES: u64 = 64 << 10;

/// Names the frames of raw profiles. Owner: the symbolizer's thread.
pub(super) struct ProfileNamer {
    finder: NameFinder,
    stats: Arc<SymbolizerStats>,
    kernel_build_id: String,
}

impl ProfileNamer {
    pub(super) fn new(config: SymbolizerConfig, stats: Arc<SymbolizerStats>) -> Self {
        let finder = NameFinder::new(config, Arc::clone(&stats));
        Self { finder, stats, kernel_build_id: kernel_build_id() }
    }

    /// Builds the finished profiles of one window. Each file is read once for all of them.
    pub(super) fn profiles(&mut self, raws: &[RawProfile]) -> Vec<Profile> {
        let addresses: Vec<Vec<BTreeSet<u64>>> = raws
            .iter()
            .map(|raw| {
                let of_process =
                    |process: &RawProcess| process.stacks.iter().flat_map(lookup_addresses).collect();
                raw.processes.iter().map(of_process).collect()
            })
            .collect();
        let processes = raws.iter().flat_map(|raw| &raw.processes).zip(addresses.iter().flatten());
        let in_files =
            self.finder.find_in_files(processes.flat_map(|(process, addresses)| {
                addresses.iter().map(|address| (&*process.image, *address))
            }));
        let finished =
            raws.iter().zip(addresses).map(|(raw, addresses)| self.profile(raw, addresses, &in_files));
        let finished = finished.collect();
        self.finder.trim();
        finished
    }

    fn profile(
        &mut self,
        raw: &RawProfile,
        addresses: Vec<BTreeSet<u64>>,
        in_files: &FileFunctions,
    ) -> Profile {
        let (sample_types, period_type) = match raw.kind {
            SampleKind::OnCpu => ([("samples", "count"), ("cpu", "nanoseconds")], ("cpu", "nanoseconds")),
            SampleKind::OffCpu => {
                ([("events", "count"), (OFF_CPU_TYPE, "nanoseconds")], (OFF_CPU_TYPE, "nanoseconds"))
            }
        };
        let mut builder = Builder::new(Header {
            sample_types: &sample_types,
            period_type,
            period: raw.period_ns as i64,
            time_nanos: raw.start.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as i64),
            duration_nanos: raw.duration.as_nanos() as i64,
        });
        for (index, (process, addresses)) in raw.processes.iter().zip(addresses).enumerate() {
            self.add_process(&mut builder, process, addresses, in_files, index == 0);
        }
        for comment in &raw.comments {
            builder.comment(comment);
        }
        self.stats.profiles.fetch_add(1, Ordering::Relaxed);
        builder.finish()
    }

    fn add_process(
        &mut self,
        builder: &mut Builder,
        process: &RawProcess,
        addresses: BTreeSet<u64>,
        in_files: &FileFunctions,
        is_first: bool,
    ) {
        // The main binary is mapped below everything that it loads.
        let is_file = |mapping: &&model::Mapping| matches!(mapping.kind, MappingKind::File(_));
        if let Some(main) = process.image.mappings.iter().find(is_file) {
            let id = self.add_mapping(builder, main);
            if is_first {
                builder.main_mapping(id);
            }
        }
        let elsewhere = self.find_elsewhere(process, &addresses);
        let mut locations = HashMap::with_capacity(addresses.len());
        // The number of functions of each location.
        let mut lines = HashMap::with_capacity(addresses.len());
        for address in addresses {
            let functions = match self.finder.locate(&process.image, address) {
                Location::Kernel | Location::Jitted => elsewhere.get(&address),
                Location::File(file, elf_address) => in_files.get(&(file.id, elf_address)),
                Location::Unmapped => None,
            };
            let functions = functions.map_or(&[][..], |functions| functions);
            let functions = &functions[..functions.len().min(MAX_INLINED)];
            let id = self.add_location(builder, &process.image, address, functions);
            locations.insert(address, id);
            lines.insert(id, functions.len().max(1));
        }
        for stack in &process.stacks {
            let Frames { frames, guessed_from } = lookup_frames(stack);
            let (mut ids, mut guessed) = (Vec::with_capacity(frames.len()), None);
            for (index, frame) in frames.into_iter().enumerate() {
                if Some(index) == guessed_from {
                    guessed = Some(ids.len());
                }
                ids.extend(match frame {
                    Frame::Native(address) => locations.get(&address).copied(),
                    Frame::List { number, position } => {
                        self.add_list_frame(builder, process, number, position)
                    }
                });
            }
            let mut mark =
                |name| builder.location(None, 0, &[Line { name, system_name: name, ..Line::default() }]);
            // Where the kernel's outermost frames are missing: between its stack and the user's.
            if stack.marks.kernel_truncated {
                ids.insert(stack.kernel.len().min(ids.len()), mark(TRUNCATED_FRAME));
                // Guessed frames are the user's.
                guessed = guessed.map(|index| index + 1);
            }
            ids.extend(end_frame(stack.end).map(&mut mark));
            // A collector refuses deeper stacks, with all that comes with them.
            if let Some(frames) = shallow(&ids, |id| lines.get(&id).copied().unwrap_or(1)) {
                ids.truncate(frames);
                ids.push(mark(TRUNCATED_FRAME));
                self.stats.cut_stacks.fetch_add(stack.count, Ordering::Relaxed);
            }
            let labels = labels(process, stack, guessed.filter(|index| *index < ids.len()));
            builder.sample(&ids, &[stack.count as i64, stack.value_ns as i64], &labels);
        }
    }

    /// Finds the functions of the kernel, and those that the process made at run time.
    fn find_elsewhere(&mut self, process: &RawProcess, addresses: &BTreeSet<u64>) -> ProcessFunctions {
        let (mut kernel, mut jitted) = (Vec::new(), Vec::new());
        for &address in addresses {
            match self.finder.locate(&process.image, address) {
                Location::Kernel => kernel.push(address),
                Location::Jitted => jitted.push(address),
                Location::File(..) | Location::Unmapped => {}
            }
        }
        let mut found = self.finder.find_in_kernel(kernel.into_iter());
        found.extend(self.finder.find_jitted(process.key, &process.image, &jitted));
        found
    }

    fn add_location(
        &self,
        builder: &mut Builder,
        image: &Image,
        address: u64,
        functions: &[Function],
    ) -> LocationId {
        let mapping = if address >= FIRST_KERNEL_ADDRESS {
            Some(builder.mapping(Mapping {
                start: FIRST_KERNEL_ADDRESS,
                limit: u64::MAX,
                offset: 0,
                file: KERNEL_MAPPING,
                build_id: &self.kernel_build_id,
            }))
        } else {
            image.find(address).map(|mapping| self.add_mapping(builder, mapping))
        };
        let lines: Vec<Line<'_>> = functions
            .iter()
            .map(|function| Line {
                name: &function.name,
                system_name: &function.raw,
                file: &function.file,
                line: i64::from(function.line),
                column: i64::from(function.column),
                start_line: i64::from(function.start_line),
            })
            .collect();
        let counter = if lines.is_empty() { &self.stats.unnamed } else { &self.stats.named };
        counter.fetch_add(1, Ordering::Relaxed);
        builder.location(mapping, address, &lines)
    }

    /// Adds a frame that an interpreter kept in a list. A function whose texts could not be read shows as the interpreter.
    fn add_list_frame(
        &self,
        builder: &mut Builder,
        process: &RawProcess,
        number: u64,
        position: u32,
    ) -> Option<LocationId> {
        let interpreter = process.interpreter.as_ref()?;
        let file = interpreter.file.runtime.mapping();
        let mapping = Some(builder.mapping(Mapping { start: 0, limit: 0, offset: 0, file, build_id: "" }));
        let function = interpreter.function(number);
        let text = function.as_ref().and_then(|function| function.texts());
        let counter = if text.is_some() { &self.stats.named } else { &self.stats.unnamed };
        counter.fetch_add(1, Ordering::Relaxed);
        let line = text.map(|text| Line {
            name: &text.name,
            system_name: &text.name,
            file: &text.file,
            line: interpreter.line(text, position).into(),
            column: 0,
            start_line: text.first_line.into(),
        });
        Some(builder.location(mapping, 0, line.as_slice()))
    }

    fn add_mapping(&self, builder: &mut Builder, mapping: &model::Mapping) -> MappingId {
        let (file, build_id) = match &mapping.kind {
            MappingKind::File(file) => (file.path.as_str(), file.build_id.as_str()),
            MappingKind::Vdso => (VDSO_MAPPING, self.finder.vdso_build_id()),
            MappingKind::Anon => (ANONYMOUS_MAPPING, ""),
        };
        builder.mapping(Mapping {
            start: mapping.start,
            limit: mapping.end,
            offset: mapping.offset,
            file,
            build_id,
        })
    }
}

/// Returns how many of these locations, leaf first, leave room for a mark within the limit of a stack; none if all do without it.
fn shallow(ids: &[LocationId], lines: impl Fn(LocationId) -> usize) -> Option<usize> {
    let depths = ids.iter().scan(0, |depth, id| {
        *depth += lines(*id);
        Some(*depth)
    });
    let depths: Vec<usize> = depths.collect();
    let is_deep = depths.last().is_some_and(|depth| *depth > MAX_STACK_FRAMES);
    is_deep.then(|| depths.partition_point(|depth| *depth < MAX_STACK_FRAMES))
}

/// Returns the frame that marks how a stack ends, if it is not complete.
fn end_frame(end: StackEnd) -> Option<&'static str> {
    match end {
        StackEnd::Truncated => Some(TRUNCATED_FRAME),
        StackEnd::Broken => Some(BROKEN_FRAME),
        StackEnd::Unreadable => Some(UNREADABLE_FRAME),
        StackEnd::NotUnwound => Some(UNSUPPORTED_FRAME),
        StackEnd::Complete | StackEnd::None => None,
    }
}

/// Returns the labels of a sample; `guessed_from` is the index of its first location that was found by a guess.
fn labels<'a>(process: &'a RawProcess, stack: &'a RawStack, guessed_from: Option<usize>) -> Vec<Label<'a>> {
    let runtime = process.interpreter.as_ref().map(|interpreter| &interpreter.file);
    let text = |key, value| Label { key, value: LabelValue::Str(value) };
    let number = |key, value: i64| Label { key, value: LabelValue::Num(value, "") };
    let texts = [
        text("thread", stack.thread.as_str()),
        text(COMM, &process.comm),
        text("container_id", &process.container_id),
        text("pod_uid", &process.pod_uid),
        text(RUNTIME, runtime.map_or("", |file| file.runtime.name())),
        text(RUNTIME_VERSION, runtime.map_or("", |file| &file.detected.version_text)),
        text("state", sleep_state(stack.state)),
        text("unwinding", if guessed_from.is_some() { "guessed" } else { "" }),
    ];
    let mut labels = vec![number("pid", process.key.tgid.into()), number("tid", stack.tid.into())];
    labels.extend(guessed_from.map(|index| number(GUESSED_FROM, index as i64)));
    labels.extend(texts.into_iter().filter(|label| !matches!(label.value, LabelValue::Str(""))));
    labels.extend(
        process.start_labels.iter().flat_map(|labels| labels.iter()).map(|(name, value)| text(name, value)),
    );
    labels
        .extend(stack.labels.iter().flat_map(|labels| labels.iter()).map(|(name, value)| text(name, value)));
    labels
}

/// Returns how a thread slept, from the low bits of the kernel's task state; empty for a thread that did not sleep.
fn sleep_state(state: u8) -> &'static str {
    match state {
        0 => "",
        state if state & 1 != 0 => "interruptible",
        state if state & 2 != 0 => "uninterruptible",
        state if state & 0x0c != 0 => "stopped",
        _ => "other",
    }
}

/// A frame of a stack.
enum Frame {
    /// The address to look up.
    Native(u64),
    /// A frame that an interpreter kept: a number of [`RawProcess::interpreter`], and a position in that function.
    List { number: u64, position: u32 },
}

/// The frames of a stack, leaf first.
struct Frames {
    frames: Vec<Frame>,
    /// The index of the first frame that was found by a guess.
    guessed_from: Option<usize>,
}

/// Returns the frames. Of a native caller it is the byte before the return address, which belongs to the call: if
/// the call is the last instruction of a function, the return address belongs to the next function.
fn lookup_frames(stack: &RawStack) -> Frames {
    let mut frames = Vec::with_capacity(stack.kernel.len() + stack.user.len());
    let (from, mut guessed_from) = (stack.marks.guessed_from.map(usize::from), None);
    for (words, from) in [(&stack.kernel, None), (&stack.user, from)] {
        for (depth, word) in words.iter().enumerate() {
            if Some(depth) == from {
                guessed_from = Some(frames.len());
            }
            match StackWord::decode(*word) {
                StackWord::Address(address) => {
                    frames.push(Frame::Native(if depth == 0 { address } else { address.saturating_sub(1) }));
                }
                StackWord::Function(number) => frames.push(Frame::List { number, position: 0 }),
                StackWord::Position { position: at, .. } => {
                    if let Some(Frame::List { position, .. }) = frames.last_mut() {
                        *position = at;
                    }
                }
            }
        }
    }
    Frames { frames, guessed_from }
}

/// Returns the addresses to look up of the native frames.
fn lookup_addresses(stack: &RawStack) -> impl Iterator<Item = u64> {
    lookup_frames(stack).frames.into_iter().filter_map(|frame| match frame {
        Frame::Native(address) => Some(address),
        Frame::List { .. } => None,
    })
}

fn kernel_build_id() -> String {
    let notes = File::open("/sys/kernel/notes").and_then(|file| {
        let mut bytes = Vec::new();
        file.take(MAX_NOTE_BYTES).read_to_end(&mut bytes)?;
        io::Result::Ok(bytes)
    });
    notes.map(|notes| BuildIds::of_notes(&notes).text()).unwrap_or_default()
}
