//! Events that the kernel side reports, decoded from the records of the ring buffer.

use std::{
    mem::{offset_of, size_of},
    ops::Range,
    sync::Arc,
};

use gannet_bpf::types;

use crate::model::{
    ExitStatus, FileNumbers, FunctionCopy, MappingEvent, Origin, ProcessKey, RECORD_HEAD_BYTES, RawLists,
    RawUserStack, Sample, SampleKind, StackEnd, StackMarks, Subject, TaskLabels,
};

// From gannet.h; the skeleton carries types, not enumerators.
const SAMPLE: u32 = 1;
const EXEC: u32 = 2;
const FORK: u32 = 3;
const EXIT: u32 = 4;
const RUNNING: u32 = 5;
const FUNCTION: u32 = 6;
const LABELS: u32 = 7;
/// Bits of a sample's flags.
const SAMPLE_OFF_CPU: u8 = 1;
const SAMPLE_KERNEL_TRUNCATED: u8 = 2;

/// One report of the kernel side. Events arrive in the order in which the kernel made them, across all CPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Something executable was mapped. It comes from perf events, not from the ring buffer.
    Mapping(MappingEvent),
    /// A stack was sampled.
    Sample(Sample),
    /// A process replaced its image.
    Exec {
        /// The process with its new image.
        subject: Subject,
        /// The path as given to `execve`, cut at 127 bytes.
        path: String,
        /// Whether another thread than the leader called `execve`.
        by_thread: bool,
        /// Its parent and user.
        origin: Origin,
        /// The executable as `/proc/PID/maps` shows it: of a script, the interpreter.
        file: FileNumbers,
    },
    /// A sampled process has a new child.
    Fork {
        /// The new process.
        subject: Subject,
        /// Its parent and user.
        origin: Origin,
    },
    /// The last thread of a process ended.
    Exit {
        /// The process of the event.
        subject: Subject,
        /// Its parent and user.
        origin: Origin,
        /// How it ended.
        status: ExitStatus,
    },
    /// A function is in a sample that follows, of a process that has just begun.
    Function {
        /// The process of the event.
        subject: Subject,
        /// The memory that its texts are read from.
        copy: FunctionCopy,
    },
    /// Labels of the task in the sample that follows with the same thread and time. The ring buffer joins them.
    Labels {
        /// The process of the event.
        subject: Subject,
        /// The sampled thread.
        tid: u32,
        /// Its task's labels.
        labels: Arc<TaskLabels>,
    },
    /// A process that was already running when rules came into force, or when it got another name or control group. If no rule
    /// matches it any more, the subject has none.
    Running {
        /// The process of the event.
        subject: Subject,
        /// Its parent and user.
        origin: Origin,
    },
}

/// Words of a raw stack before the stack itself: the program counter, and the registers by DWARF number.
const RAW_REGISTERS: usize = 33;
const USER_STACK_RAW: u8 = 10;

/// The index of the stack pointer among the registers.
const STACK_POINTER: usize = if cfg!(target_arch = "aarch64") { 31 } else { 7 };
/// Parts of a raw stack; see `raw_unread` of gannet.h.
const RAW_STACK_PAGES: u32 = 6;
/// `OFF_CPU_RAW_WORDS` there: the words of the raw stack of a blocked thread. The kernel refuses a map of another size.
pub(super) const OFF_CPU_RAW_WORDS: usize = RAW_REGISTERS + 5 * 4096 / 8;
const PAGE: u64 = 4096;

/// Returns the addresses of the parts of a raw stack that could not be read: `bits` has one bit for each part.
fn unread_parts(stack_pointer: u64, bits: u8) -> Vec<Range<u64>> {
    let page = stack_pointer & !(PAGE - 1);
    (0..RAW_STACK_PAGES)
        .filter(|part| bits >> part & 1 != 0)
        .map(|part| page.saturating_add(PAGE * u64::from(part)))
        .map(|start| start.max(stack_pointer)..start.saturating_add(PAGE))
        .collect()
}

/// Reads the words of a raw stack and the list frames behind it; `None` if there are fewer words than registers. `unread` has
/// one bit for each part of the stack that could not be read.
fn raw_user_stack(words: &[u64], unread: u8, lists: &[u64], live_until_ns: u64) -> Option<Box<RawUserStack>> {
    let (head, stack) = words.split_at_checked(RAW_REGISTERS)?;
    let (pc, registers) = head.split_first()?;
    Some(Box::new(RawUserStack {
        pc: *pc,
        registers: registers.to_vec(),
        stack: stack.iter().flat_map(|word| word.to_ne_bytes()).collect(),
        unread: unread_parts(*registers.get(STACK_POINTER)?, unread),
        lists: RawLists::of_words(lists),
        live_until_ns,
    }))
}

/// The bytes of a raw stack that the record of a blocked thread lacks.
pub(super) struct RawPart {
    /// The offset in the record at which it belongs.
    pub(super) at: usize,
    pub(super) bytes: usize,
    /// Bytes behind it, which the record has there instead.
    pub(super) behind: usize,
}

impl RawPart {
    /// Returns that of a record; `None` if its stack is no raw one.
    pub(super) fn of(entry: &[u8]) -> Option<Self> {
        let head: types::sample = read(entry, SAMPLE).ok()?;
        (head.user_end == USER_STACK_RAW).then(|| Self {
            at: offset_of!(types::sample, frames) + usize::from(head.kernel_frames) * 8,
            bytes: usize::from(head.user_frames) * 8,
            behind: usize::from(head.context_words) * 8,
        })
    }
}

/// Returns the sample of a thread that has been blocked for this long, and still is.
pub(super) fn blocked_for(mut sample: Sample, value_ns: u64) -> Sample {
    sample.value_ns = value_ns;
    if let Some(raw) = &mut sample.raw {
        raw.live_until_ns = sample.subject.ktime_ns.saturating_add(value_ns);
    }
    sample
}

/// Why a record is no event: the agent and its BPF programs are not of one build.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DecodeError {
    /// The record has fewer bytes than its kind.
    #[error("an event of kind {kind} needs {needed} bytes and has {got}")]
    Short {
        /// The number of the kind.
        kind: u32,
        /// Bytes of this kind.
        needed: usize,
        /// Bytes of the record.
        got: usize,
    },
    /// This build does not know the kind.
    #[error("there is no event kind {0}")]
    Kind(u32),
}

impl Event {
    /// Returns the time of the event: nanoseconds of the boot clock.
    pub fn ktime_ns(&self) -> u64 {
        match self {
            Self::Mapping(mapped) => mapped.ktime_ns(),
            Self::Sample(sample) => sample.subject.ktime_ns,
            Self::Exec { subject, .. }
            | Self::Fork { subject, .. }
            | Self::Exit { subject, .. }
            | Self::Function { subject, .. }
            | Self::Labels { subject, .. }
            | Self::Running { subject, .. } => subject.ktime_ns,
        }
    }

    /// Decodes one record of the ring buffer.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let kind = bytes.first_chunk().map_or(0, |four| u32::from_ne_bytes(*four));
        match kind {
            SAMPLE => decode_sample(bytes).map(Self::Sample),
            EXEC => {
                let types::exec_record { lifecycle, path } = read(bytes, kind)?;
                Ok(Self::Exec {
                    subject: Subject::from(&lifecycle),
                    path: text(&path),
                    by_thread: lifecycle.by_thread != 0,
                    origin: Origin { parent: lifecycle.parent, uid: lifecycle.uid },
                    file: FileNumbers { dev: user_device(lifecycle.device), inode: lifecycle.inode },
                })
            }
            FORK | EXIT | RUNNING => {
                let record: types::lifecycle = read(bytes, kind)?;
                let subject = Subject::from(&record);
                let origin = Origin { parent: record.parent, uid: record.uid };
                Ok(match kind {
                    FORK => Self::Fork { subject, origin },
                    EXIT => Self::Exit { subject, origin, status: ExitStatus(record.exit_code) },
                    _ => Self::Running { subject, origin },
                })
            }
            FUNCTION => decode_function(bytes),
            LABELS => decode_labels(bytes),
            other => Err(DecodeError::Kind(other)),
        }
    }
}

fn decode_function(bytes: &[u8]) -> Result<Event, DecodeError> {
    // The last part is only sent as far as it was copied.
    let lines = offset_of!(types::function_record, lines);
    let mut whole = bytes.to_vec();
    if bytes.len() >= lines {
        whole.resize(bytes.len().max(size_of::<types::function_record>()), 0);
    }
    let record: types::function_record = read(&whole, FUNCTION)?;
    let types::function_record { object_copy, name, file, .. } = &record;
    let copied = bytes.get(lines..).unwrap_or_default();
    let texts: [&[u8]; 3] = [name, file, copied];
    let mut pieces = vec![(record.object, cut(object_copy, record.object_bytes))];
    pieces.extend(
        record
            .at
            .into_iter()
            .zip(texts.into_iter().zip(record.bytes))
            .map(|(at, (text, n))| (at, cut(text, n))),
    );
    let copy = FunctionCopy { object: record.object, sum: record.sum, pieces };
    Ok(Event::Function { subject: Subject::from(&record.event), copy })
}

/// In the length of a text: the text is longer.
const LABEL_IS_CUT: u16 = 0x8000;

fn decode_labels(bytes: &[u8]) -> Result<Event, DecodeError> {
    // The last part is only sent as far as it is used.
    let at = offset_of!(types::labels_record, texts);
    let mut whole = bytes.to_vec();
    if bytes.len() >= at {
        whole.resize(bytes.len().max(size_of::<types::labels_record>()), 0);
    }
    let record: types::labels_record = read(&whole, LABELS)?;
    let mut texts = bytes.get(at..).unwrap_or_default();
    let mut take = |size: u16| {
        let (text, rest) = texts.split_at_checked(usize::from(size & !LABEL_IS_CUT)).unwrap_or((texts, &[]));
        texts = rest;
        (text, size & LABEL_IS_CUT != 0)
    };
    let sizes = record.sizes.iter().take(record.count as usize);
    let labels = TaskLabels::new(sizes.map(|size| (take(size.name), take(size.value))));
    let subject = Subject::from(&record.event);
    Ok(Event::Labels { subject, tid: record.event.tid, labels: Arc::new(labels) })
}

/// Returns the first `bytes` of a part.
fn cut(part: &[u8], bytes: u32) -> Vec<u8> {
    part[..part.len().min(bytes as usize)].to_vec()
}

/// The place of a sample among those of its CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SampleNumber {
    pub(super) cpu: u32,
    /// Samples that the CPU had sent before, once for each rule.
    pub(super) sequence: u64,
    /// The number of rules that want it.
    pub(super) rules: u64,
}

impl SampleNumber {
    /// Reads the number of a sample, even of one that cannot be decoded; `None` for other events, and without a complete head.
    pub(super) fn of(bytes: &[u8]) -> Option<Self> {
        let types::sample { event, cpu, sequence, .. } = read(bytes, SAMPLE).ok()?;
        (event.kind == SAMPLE).then(|| Self {
            cpu: cpu.into(),
            sequence,
            rules: event.rules.count_ones().into(),
        })
    }
}

/// Returns the bytes of a sample up to the end of its frames.
fn frames_end(head: &types::sample) -> usize {
    let words = [head.kernel_frames, head.user_frames, head.list_words].map(usize::from);
    offset_of!(types::sample, frames) + words.into_iter().sum::<usize>() * 8
}

/// The record of a thread's span in a sample, as its process has published it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SpanRecord<'r> {
    pub(super) head: &'r [u8; RECORD_HEAD_BYTES],
    pub(super) attributes: &'r [u8],
}

impl<'r> SpanRecord<'r> {
    /// Returns that of a record of a sample; `None`: the thread published no span, or the record is cut.
    pub(super) fn of(bytes: &'r [u8]) -> Option<Self> {
        let sample: types::sample = read(bytes, SAMPLE).ok()?;
        let from = frames_end(&sample);
        let words = usize::from(sample.context_words);
        let (head, rest) = bytes.get(from..from + words * 8)?.split_first_chunk()?;
        // It ends with the number of bytes behind it, which the programs have corrected.
        let attributes = u16::from_ne_bytes(*head.last_chunk()?);
        let attributes = rest.get(..attributes.into())?;
        Some(Self { head, attributes })
    }
}

fn decode_sample(bytes: &[u8]) -> Result<Sample, DecodeError> {
    let head: types::sample = read(bytes, SAMPLE)?;
    let (kernel, user) = (usize::from(head.kernel_frames), usize::from(head.user_frames));
    let needed = frames_end(&head);
    let frames = bytes.get(offset_of!(types::sample, frames)..needed).ok_or(DecodeError::Short {
        kind: SAMPLE,
        needed,
        got: bytes.len(),
    })?;
    let mut frames = frames.as_chunks().0.iter().map(|eight| u64::from_ne_bytes(*eight));
    let kernel: Vec<u64> = frames.by_ref().take(kernel).collect();
    let mut user: Vec<u64> = frames.by_ref().take(user).collect();
    let lists: Vec<u64> = frames.collect();
    // A guess may find no frame any more, or only those that a smaller record leaves out.
    let guessed_from = Some(head.guessed_from).filter(|from| *from > 0 && usize::from(*from) < user.len());
    let is_raw = head.user_end == USER_STACK_RAW;
    // A thread's stack does not change while it is off the CPU.
    let is_off_cpu = head.flags & SAMPLE_OFF_CPU != 0;
    let blocked_ns = if is_off_cpu { head.value_ns } else { 0 };
    let live_until_ns = head.event.ktime.saturating_add(blocked_ns);
    let raw = if is_raw {
        raw_user_stack(&std::mem::take(&mut user), head.raw_unread, &lists, live_until_ns)
    } else {
        None
    };
    Ok(Sample {
        tid: head.event.tid,
        kind: if is_off_cpu { SampleKind::OffCpu } else { SampleKind::OnCpu },
        value_ns: head.value_ns,
        kernel,
        user,
        end_code: head.user_end,
        marks: StackMarks { kernel_truncated: head.flags & SAMPLE_KERNEL_TRUNCATED != 0, guessed_from },
        state: head.state,
        list_layout: head.list_layout,
        labels: None,
        raw,
        end: match head.user_end {
            0 => StackEnd::None,
            1 => StackEnd::Complete,
            2 => StackEnd::Truncated,
            7 => StackEnd::Unreadable,
            9 => StackEnd::NotUnwound,
            _ => StackEnd::Broken,
        },
        subject: Subject::from(&head.event),
    })
}

impl From<&types::lifecycle> for Subject {
    fn from(record: &types::lifecycle) -> Self {
        Self { candidates: record.candidates, ..Self::from(&record.event) }
    }
}

impl From<&types::event> for Subject {
    fn from(event: &types::event) -> Self {
        Self {
            key: ProcessKey { tgid: event.tgid, start_boottime_ns: event.start_boottime },
            exec_id: event.exec_id,
            ktime_ns: event.ktime,
            cgroup_id: event.cgroup_id,
            comm: text(&event.comm),
            rules: event.rules,
            candidates: 0,
        }
    }
}

/// Converts a device number of the kernel, which has 20 bits for the minor number, to that of `stat(2)`.
fn user_device(device: u32) -> u64 {
    rustix::fs::makedev(device >> 20, device & 0xf_ffff)
}

/// Returns the bytes before the first NUL as text; bytes that are no UTF-8 are replaced.
fn text(bytes: &[i8]) -> String {
    let bytes: Vec<u8> =
        bytes.iter().map(|byte| byte.cast_unsigned()).take_while(|byte| *byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The structures that BPF programs write: only integers and arrays of them, so that any bytes are a valid value.
trait Plain: Copy {}
impl Plain for types::lifecycle {}
impl Plain for types::exec_record {}
impl Plain for types::sample {}
impl Plain for types::function_record {}
impl Plain for types::labels_record {}
impl Plain for types::event {}

fn read<T: Plain>(bytes: &[u8], kind: u32) -> Result<T, DecodeError> {
    if bytes.len() < size_of::<T>() {
        return Err(DecodeError::Short { kind, needed: size_of::<T>(), got: bytes.len() });
    }
    // SAFETY: there are enough bytes, the read is unaligned, and `Plain` types have no invalid values.
    Ok(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes_of_lifecycle(record: &types::lifecycle) -> Vec<u8> {
        // SAFETY: a plain structure without uninitialised padding: `Default` and the fields fill it.
        unsafe {
            std::slice::from_raw_parts(std::ptr::from_ref(record).cast::<u8>(), size_of::<types::lifecycle>())
        }
        .to_vec()
    }

    /// Checks that code and signal are read from the status of `wait(2)` (R21).
    #[test]
    fn an_exit_has_its_code_and_signal() {
        let mut record = types::lifecycle::default();
        record.event.kind = EXIT;
        record.event.tgid = 42;
        record.event.start_boottime = 7;
        for (status, code, signal) in [(7 << 8, 7, 0), (9, 0, 9)] {
            record.exit_code = status;
            let Event::Exit { subject, status, .. } = Event::decode(&bytes_of_lifecycle(&record)).unwrap()
            else {
                panic!("an exit");
            };
            assert_eq!(subject.key, ProcessKey { tgid: 42, start_boottime_ns: 7 });
            assert_eq!((status.code(), status.signal()), (code, signal));
        }
    }

    #[test]
    fn a_sample_that_claims_more_frames_than_it_has_is_refused() {
        let mut bytes = vec![0; size_of::<types::sample>() + 16];
        bytes[..4].copy_from_slice(&SAMPLE.to_ne_bytes());
        let at = offset_of!(types::sample, kernel_frames);
        bytes[at..at + 2].copy_from_slice(&2_u16.to_ne_bytes());
        assert!(matches!(Event::decode(&bytes), Ok(Event::Sample(sample)) if sample.kernel.len() == 2));
        bytes[at..at + 2].copy_from_slice(&3_u16.to_ne_bytes());
        assert!(matches!(Event::decode(&bytes), Err(DecodeError::Short { .. })));
    }

    /// Checks the mark of guessed frames: a guess behind the last frame marks none.
    #[test]
    fn the_first_guessed_frame_is_one_of_the_sample() {
        for (from, expected) in [(0, None), (1, Some(1)), (2, Some(2)), (3, None), (u16::MAX, None)] {
            let mut bytes = vec![0; size_of::<types::sample>() + 3 * 8];
            bytes[..4].copy_from_slice(&SAMPLE.to_ne_bytes());
            for (at, value) in
                [(offset_of!(types::sample, user_frames), 3), (offset_of!(types::sample, guessed_from), from)]
            {
                bytes[at..at + 2].copy_from_slice(&u16::to_ne_bytes(value));
            }
            let Ok(Event::Sample(sample)) = Event::decode(&bytes) else { panic!("a sample") };
            assert_eq!(sample.marks.guessed_from, expected, "{from}");
        }
    }

    /// Checks which addresses the bits of a raw stack stand for: the first part ends with its page.
    #[test]
    fn each_bit_is_a_part_of_the_raw_stack() {
        assert_eq!(unread_parts(0x7ff8, 0), []);
        assert_eq!(unread_parts(0x7ff8, 0b100_011), [0x7ff8..0x8000, 0x8000..0x9000, 0xc000..0xd000]);
        assert_eq!(unread_parts(0x7000, 0b11), [0x7000..0x8000, 0x8000..0x9000]);
        let top = u64::MAX - 4096 - 7;
        assert_eq!(unread_parts(top, 0b1100_0011), [top..u64::MAX - 4095, u64::MAX - 4095..u64::MAX]);
    }

    proptest! {
        /// Checks that records of another build are refused (R24).
        #[test]
        fn any_bytes_decode_or_fail_but_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..600), kind in 0_u32..9) {
            if let Some(first) = bytes.first_chunk_mut() {
                *first = kind.to_ne_bytes();
            }
            let _ = Event::decode(&bytes);
        }
    }
}
