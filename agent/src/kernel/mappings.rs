//! Executable mappings as they are made, and changes of the kernel's symbols, from perf events on every CPU.
//!
//! A process that lives for milliseconds has exited before the agent can read its `/proc/PID/maps`, and a library that is
//! opened late shows there only in a second reading. The kernel reports both as perf records, stamped by the clock of the
//! samples. So each mapping takes effect between the right samples.
//!
//! The same perf events report functions that the kernel makes at run time, such as BPF programs. They go into a log, by which
//! the symbolizer knows new names without reading `/proc/kallsyms` again.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use perf_event::{
    Builder, Clock, SampleFlag, Sampler,
    data::{
        Comm, KSymbol, KSymbolFlags, KSymbolType, Lost, Mmap2, RecordMetadata, Visitor,
        endian::Native,
        parse::{ParseConfig, Parser},
    },
    events::Software,
};

use super::{KernelError, clock::online_cpus, hotplug::WentOffline};
use crate::model::{KernelSymbolChange, KernelSymbolLog, KernelSymbolRange, MappingEvent, NewMapping};

/// Bytes of one CPU's buffer: some 1,600 mappings, that is about 300 started programs between two reads. The kernel wakes the
/// reader when the buffer is half full.
const BUFFER_BYTES: usize = 256 << 10;
/// Bytes of the header of a record: kind, flags, size.
const HEADER_BYTES: usize = 8;
/// `PERF_RECORD_MISC_COMM_EXEC`: `execve` gave the process its new name.
const COMM_EXEC: u16 = 1 << 13;

/// The buffers of all CPUs.
pub(super) struct Mappings {
    buffers: BTreeMap<u32, Sampler>,
    /// Read events that are younger than the ring buffer's events so far, oldest first.
    ahead: VecDeque<MappingEvent>,
    lost: u64,
    symbols: &'static KernelSymbolLog,
}

impl Mappings {
    /// Opens a perf event on every online CPU. Changes of symbols go into the log.
    pub(super) fn start(symbols: &'static KernelSymbolLog) -> Result<Self, KernelError> {
        let mut this = Self { buffers: BTreeMap::new(), ahead: VecDeque::new(), lost: 0, symbols };
        this.follow_cpus()?;
        Ok(this)
    }

    /// Reads the pending records, and closes the perf events of CPUs that went offline, though these may be online again.
    pub(super) fn close(&mut self, went_offline: &WentOffline) {
        if self.buffers.keys().any(|cpu| went_offline.contains(*cpu)) {
            self.read();
            self.buffers.retain(|cpu, _| !went_offline.contains(*cpu));
        }
    }

    /// Opens perf events on CPUs that came online, closes those of CPUs that went offline.
    pub(super) fn follow_cpus(&mut self) -> Result<(), KernelError> {
        let online = online_cpus()?;
        let followed: Vec<u32> = self.buffers.keys().copied().collect();
        self.buffers.retain(|cpu, _| online.contains(cpu));
        for cpu in online {
            if self.buffers.contains_key(&cpu) {
                continue;
            }
            match open(cpu) {
                Ok(buffer) => {
                    self.buffers.insert(cpu, buffer);
                }
                // The CPU went offline after it was listed.
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
                Err(source) => return Err(KernelError::PerfEvent { cpu, source }),
            }
        }
        if !self.buffers.keys().eq(&followed) {
            // What another CPU changed before is in `/proc/kallsyms`, which a reader has to read after this.
            self.symbols.missed();
        }
        Ok(())
    }

    /// Reads the pending records of all CPUs.
    pub(super) fn read(&mut self) {
        let (before, lost_before) = (self.ahead.len(), self.lost);
        let mut changes = Vec::new();
        let mut bytes = Vec::new();
        for buffer in self.buffers.values_mut() {
            let config = buffer.config().clone();
            while let Some(record) = buffer.next_record() {
                // The parser reads the header too, and the crate gives the body alone.
                bytes.clear();
                bytes.extend(record.ty().to_ne_bytes());
                bytes.extend(record.misc().to_ne_bytes());
                bytes.extend(((HEADER_BYTES + record.len()) as u16).to_ne_bytes());
                record.data().iter().for_each(|part| bytes.extend(*part));
                match decode(&bytes, config.clone()) {
                    Some(Record::Mapping(event)) => self.ahead.push_back(event),
                    Some(Record::KernelSymbol(ktime_ns, change)) => changes.push((ktime_ns, change)),
                    Some(Record::Lost(records)) => self.lost += records,
                    None => {}
                }
            }
        }
        if self.ahead.len() > before {
            self.ahead.make_contiguous().sort_by_key(MappingEvent::ktime_ns);
        }
        if self.lost > lost_before {
            self.symbols.missed();
        }
        changes.sort_by_key(|(ktime_ns, _)| *ktime_ns);
        for (_, change) in changes {
            self.symbols.push(change);
        }
    }

    /// Removes and returns the events up to this boot time, oldest first.
    pub(super) fn until(&mut self, ktime_ns: u64) -> impl Iterator<Item = MappingEvent> {
        let count = self.ahead.partition_point(|event| event.ktime_ns() <= ktime_ns);
        self.ahead.drain(..count)
    }

    /// Returns descriptors that are readable when a buffer is half full.
    pub(super) fn wake_fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.buffers.values().map(|buffer| {
            // SAFETY: the buffer owns the descriptor and lives as long as the borrow.
            unsafe { BorrowedFd::borrow_raw(buffer.as_raw_fd()) }
        })
    }

    /// Returns the number of records that a full buffer could not take.
    pub(super) fn lost(&self) -> u64 {
        self.lost
    }
}

/// Returns the settings of the perf events: records of executable mappings, of `execve` and of kernel symbols, stamped by the
/// boot clock.
fn settings() -> Builder<'static> {
    let mut settings = Builder::new(Software::DUMMY);
    settings
        .any_pid()
        .include_kernel()
        .include_hv()
        .enabled(true)
        .mmap(true)
        .mmap2(true)
        .comm(true)
        .comm_exec(true)
        .ksymbol(true)
        .sample(SampleFlag::TIME)
        .sample_id_all(true)
        .clockid(Clock::BOOTTIME)
        .wakeup_watermark(BUFFER_BYTES / 2);
    settings
}

fn open(cpu: u32) -> io::Result<Sampler> {
    settings().one_cpu(cpu as usize).build()?.sampled(BUFFER_BYTES)
}

#[derive(Debug, PartialEq, Eq)]
enum Record {
    Mapping(MappingEvent),
    /// A change of the kernel's symbols, and its boot time.
    KernelSymbol(u64, KernelSymbolChange),
    /// The number of lost records.
    Lost(u64),
}

/// Decodes one record, header included; `None` for other kinds.
fn decode(record: &[u8], config: ParseConfig<Native>) -> Option<Record> {
    Parser::new(record, config).parse_record(RecordVisitor).ok()?
}

/// Selects the kinds of records that [`Mappings`] uses.
struct RecordVisitor;

impl<'a> Visitor<'a> for RecordVisitor {
    type Output = Option<Record>;

    fn visit_unimplemented(self, _: RecordMetadata) -> Self::Output {
        None
    }

    fn visit_comm(self, record: Comm<'a>, metadata: RecordMetadata) -> Self::Output {
        let is_exec = metadata.misc() & COMM_EXEC != 0;
        let ktime_ns = metadata.sample_id().time()?;
        is_exec.then_some(Record::Mapping(MappingEvent::Cleared { tgid: record.pid, ktime_ns }))
    }

    fn visit_ksymbol(self, record: KSymbol<'a>, metadata: RecordMetadata) -> Self::Output {
        let ktime_ns = metadata.sample_id().time()?;
        let name = record.name.split(|byte| *byte == 0).next().unwrap_or_default();
        let range = KernelSymbolRange {
            start: record.addr,
            bytes: record.len,
            name: String::from_utf8_lossy(name).into_owned(),
            module: symbol_module(record.ksym_type, name),
        };
        let change = if record.flags.contains(KSymbolFlags::UNREGISTER) {
            KernelSymbolChange::Removed(range)
        } else {
            KernelSymbolChange::Added(range)
        };
        Some(Record::KernelSymbol(ktime_ns, change))
    }

    fn visit_lost(self, record: Lost, _: RecordMetadata) -> Self::Output {
        Some(Record::Lost(record.lost))
    }

    fn visit_mmap2(self, record: Mmap2<'a>, metadata: RecordMetadata) -> Self::Output {
        let ktime_ns = metadata.sample_id().time()?;
        let name = String::from_utf8_lossy(&record.filename);
        let path = name.strip_suffix(" (deleted)").unwrap_or(&name);
        // `//anon`, `//enomem`, `//toolong`: the kernel has no name for it.
        let path = if path.starts_with("//") { "" } else { path };
        let mapping = NewMapping {
            start: record.addr,
            end: record.addr.checked_add(record.len).filter(|end| *end > record.addr)?,
            offset: record.pgoff,
            dev: rustix::fs::makedev(record.maj()?, record.min()?),
            inode: record.ino()?,
            path: path.to_owned(),
        };
        Some(Record::Mapping(MappingEvent::Mapped { tgid: record.pid, ktime_ns, mapping }))
    }
}

/// Returns the module that `/proc/kallsyms` shows for code that the kernel made at run time.
fn symbol_module(kind: KSymbolType, name: &[u8]) -> &'static str {
    match kind {
        KSymbolType::BPF => "bpf",
        KSymbolType::OOL if name.starts_with(b"kprobe_") => "__builtin__kprobes",
        KSymbolType::OOL if name.starts_with(b"ftrace_") => "__builtin__ftrace",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PERF_RECORD_LOST: u32 = 2;
    const PERF_RECORD_COMM: u32 = 3;
    const PERF_RECORD_MMAP2: u32 = 10;
    const PERF_RECORD_KSYMBOL: u32 = 17;

    /// Decodes a record with this body, which the time 77 follows.
    fn record(kind: u32, misc: u16, body: &[u8]) -> Option<Record> {
        let mut bytes = kind.to_ne_bytes().to_vec();
        bytes.extend(misc.to_ne_bytes());
        bytes.extend(((HEADER_BYTES + body.len() + 8) as u16).to_ne_bytes());
        bytes.extend(body);
        bytes.extend(77_u64.to_ne_bytes());
        decode(&bytes, ParseConfig::from(*settings().attrs()))
    }

    #[test]
    fn a_mapping_is_read_as_maps_would_show_it() {
        let mut body = Vec::new();
        body.extend(42_u32.to_ne_bytes());
        body.extend(43_u32.to_ne_bytes());
        for number in [0x1000_u64, 0x2000, 0x3000] {
            body.extend(number.to_ne_bytes());
        }
        body.extend(8_u32.to_ne_bytes());
        body.extend(1_u32.to_ne_bytes());
        body.extend(99_u64.to_ne_bytes());
        body.extend([0; 16]);
        body.extend(b"/bin/x (deleted)\0\0\0\0\0\0\0\0");
        let mapping = NewMapping {
            start: 0x1000,
            end: 0x3000,
            offset: 0x3000,
            dev: rustix::fs::makedev(8, 1),
            inode: 99,
            path: "/bin/x".into(),
        };
        let wanted = MappingEvent::Mapped { tgid: 42, ktime_ns: 77, mapping };
        assert_eq!(record(PERF_RECORD_MMAP2, 2, &body), Some(Record::Mapping(wanted)));
    }

    #[test]
    fn only_the_name_that_an_exec_gives_is_an_exec() {
        let mut body = 42_u32.to_ne_bytes().to_vec();
        body.extend([0; 20]);
        let wanted = MappingEvent::Cleared { tgid: 42, ktime_ns: 77 };
        assert_eq!(record(PERF_RECORD_COMM, 1 << 13, &body), Some(Record::Mapping(wanted)));
        assert_eq!(record(PERF_RECORD_COMM, 0, &body), None);
    }

    #[test]
    fn a_symbol_of_the_kernel_is_read_as_kallsyms_would_show_it() {
        let body = |kind: u16, flags: u16, name: &[u8]| {
            let mut body = 0xffff_ffff_c000_1000_u64.to_ne_bytes().to_vec();
            body.extend(200_u32.to_ne_bytes());
            body.extend(kind.to_ne_bytes());
            body.extend(flags.to_ne_bytes());
            body.extend(name);
            body.resize(body.len().next_multiple_of(8), 0);
            body
        };
        for (kind, name, module) in
            [(1, "bpf_prog_6deef7357e7b4530_sample", "bpf"), (2, "ftrace_trampoline", "__builtin__ftrace")]
        {
            let start = 0xffff_ffff_c000_1000;
            let range = KernelSymbolRange { start, bytes: 200, name: name.to_owned(), module };
            assert_eq!(
                record(PERF_RECORD_KSYMBOL, 0, &body(kind, 0, name.as_bytes())),
                Some(Record::KernelSymbol(77, KernelSymbolChange::Added(range.clone())))
            );
            assert_eq!(
                record(PERF_RECORD_KSYMBOL, 0, &body(kind, 1, name.as_bytes())),
                Some(Record::KernelSymbol(77, KernelSymbolChange::Removed(range)))
            );
        }
    }

    #[test]
    fn lost_records_are_counted() {
        let body = [7_u64.to_ne_bytes(), 3_u64.to_ne_bytes()].concat();
        assert_eq!(record(PERF_RECORD_LOST, 0, &body), Some(Record::Lost(3)));
    }

    proptest! {
        /// Checks that no record makes the decoder panic (R55).
        #[test]
        fn any_record_is_read_without_panic(
            kind in 0_u32..20,
            misc: u16,
            body in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let _ = record(kind, misc, &body);
            let _ = decode(&body, ParseConfig::from(*settings().attrs()));
        }
    }
}
