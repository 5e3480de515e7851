//! Executable mappings as they are made: what perf's own sideband tells of every process, on a buffer for each CPU.
//!
//! A process that lives for milliseconds is gone before anybody can read its `/proc/PID/maps`; and a library that is
//! opened late shows there only to whoever looks again. The kernel tells both by itself, with the time of it by the
//! clock that samples carry, so what is told takes effect between the samples where it belongs.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
    ptr::{self, NonNull},
    sync::atomic::{AtomicU64, Ordering},
};

use perf_event_open_sys::bindings;

use super::{KernelError, clock::online_cpus};
use crate::model::{MappingEvent, NewMapping};

/// Of one CPU's buffer: some 1,600 mappings, that is about 300 programs started between two readings. The reader is woken
/// when it is half full.
const BUFFER_BYTES: usize = 256 << 10;
const HEADER_BYTES: usize = 8;
/// Names longer than this do not come: PATH_MAX and its padding.
const MOST_RECORD_BYTES: usize = 8192;

/// The buffers of all CPUs.
pub(super) struct Mappings {
    buffers: BTreeMap<u32, Buffer>,
    /// What was read and is younger than what the ring has shown so far.
    ahead: VecDeque<MappingEvent>,
    lost: u64,
}

struct Buffer {
    /// Closing it would end the reports.
    event: OwnedFd,
    base: NonNull<bindings::perf_event_mmap_page>,
    page: usize,
}

// SAFETY: the mapping belongs to this value alone; where it is used from makes no difference.
unsafe impl Send for Buffer {}

impl Mappings {
    /// Listens on every CPU.
    pub(super) fn start() -> Result<Self, KernelError> {
        let mut this = Self { buffers: BTreeMap::new(), ahead: VecDeque::new(), lost: 0 };
        this.follow_cpus()?;
        Ok(this)
    }

    /// Follows CPUs that came or went.
    pub(super) fn follow_cpus(&mut self) -> Result<(), KernelError> {
        let online = online_cpus()?;
        self.buffers.retain(|cpu, _| online.contains(cpu));
        for cpu in online {
            if self.buffers.contains_key(&cpu) {
                continue;
            }
            match Buffer::open(cpu) {
                Ok(buffer) => {
                    self.buffers.insert(cpu, buffer);
                }
                // It went offline between the look and the call.
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
                Err(source) => return Err(KernelError::PerfEvent { cpu, source }),
            }
        }
        Ok(())
    }

    /// Takes what was told up to now.
    pub(super) fn read(&mut self) {
        let before = self.ahead.len();
        for buffer in self.buffers.values() {
            buffer.read(&mut self.ahead, &mut self.lost);
        }
        if self.ahead.len() > before {
            self.ahead.make_contiguous().sort_by_key(MappingEvent::ktime_ns);
        }
    }

    /// What was told up to a moment, oldest first.
    pub(super) fn until(&mut self, ktime_ns: u64) -> impl Iterator<Item = MappingEvent> {
        let count = self.ahead.partition_point(|told| told.ktime_ns() <= ktime_ns);
        self.ahead.drain(..count)
    }

    /// Become readable when a buffer is half full.
    pub(super) fn wake_fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.buffers.values().map(|buffer| buffer.event.as_fd())
    }

    /// Records that found no room in a buffer.
    pub(super) fn lost(&self) -> u64 {
        self.lost
    }
}

impl Buffer {
    fn open(cpu: u32) -> io::Result<Self> {
        let mut attr = bindings::perf_event_attr {
            type_: bindings::PERF_TYPE_SOFTWARE,
            size: size_of::<bindings::perf_event_attr>() as u32,
            config: u64::from(bindings::PERF_COUNT_SW_DUMMY),
            sample_type: u64::from(bindings::PERF_SAMPLE_TIME),
            clockid: libc::CLOCK_BOOTTIME,
            ..Default::default()
        };
        attr.set_mmap(1);
        attr.set_mmap2(1);
        attr.set_comm(1);
        attr.set_comm_exec(1);
        attr.set_sample_id_all(1);
        attr.set_use_clockid(1);
        attr.set_watermark(1);
        attr.__bindgen_anon_2.wakeup_watermark = BUFFER_BYTES as u32 / 2;
        // SAFETY: the attribute structure is valid for the call and its size is set.
        let fd = unsafe {
            perf_event_open_sys::perf_event_open(
                &raw mut attr,
                -1,
                cpu.cast_signed(),
                -1,
                bindings::PERF_FLAG_FD_CLOEXEC.into(),
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that nobody else has.
        let event = unsafe { OwnedFd::from_raw_fd(fd) };
        let page = rustix::param::page_size();
        // SAFETY: a new mapping of a descriptor that is owned here; nothing else knows it.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                page + BUFFER_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                event.as_fd().as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Self { event, base, page })
    }

    /// Where the kernel writes next, and where it is read next.
    fn positions(&self) -> (&AtomicU64, &AtomicU64) {
        let page = self.base.as_ptr();
        // SAFETY: the first page is this structure as long as the mapping lives; both are aligned numbers of 64 bits that
        // kernel and reader share, and nothing else refers to them.
        unsafe {
            (
                &*(&raw const (*page).data_head).cast::<AtomicU64>(),
                &*(&raw const (*page).data_tail).cast::<AtomicU64>(),
            )
        }
    }

    fn read(&self, told: &mut VecDeque<MappingEvent>, lost: &mut u64) {
        let (head_at, tail_at) = self.positions();
        let head = head_at.load(Ordering::Acquire);
        let mut tail = tail_at.load(Ordering::Relaxed);
        let mut record = Vec::new();
        while tail < head {
            let mut header = [0; HEADER_BYTES];
            self.copy(tail, &mut header);
            let size = usize::from(u16::from_ne_bytes([header[6], header[7]]));
            if !(HEADER_BYTES..=MOST_RECORD_BYTES).contains(&size) || size as u64 > head - tail {
                // Cannot be; what is there cannot be made sense of.
                *lost += 1;
                tail = head;
                break;
            }
            record.resize(size, 0);
            self.copy(tail, &mut record);
            tail += size as u64;
            match parse(&record) {
                Some(Record::Told(mapped)) => told.push_back(mapped),
                Some(Record::Lost(records)) => *lost += records,
                None => {}
            }
        }
        tail_at.store(tail, Ordering::Release);
    }

    /// Copies from a position on, around the end of the buffer.
    fn copy(&self, position: u64, to: &mut [u8]) {
        let begin = position as usize % BUFFER_BYTES;
        let first = to.len().min(BUFFER_BYTES - begin);
        // SAFETY: both parts are inside of the buffer, which is `BUFFER_BYTES` behind the first page; the kernel does not
        // write between tail and head.
        unsafe {
            let data = self.base.as_ptr().cast::<u8>().add(self.page);
            ptr::copy_nonoverlapping(data.add(begin), to.as_mut_ptr(), first);
            ptr::copy_nonoverlapping(data, to.as_mut_ptr().add(first), to.len() - first);
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: mapped in `open` with this size; nothing borrows it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.page + BUFFER_BYTES) };
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Record {
    Told(MappingEvent),
    Lost(u64),
}

/// One record, header included. See `man perf_event_open`: each has its time at its end.
fn parse(record: &[u8]) -> Option<Record> {
    const COMM_EXEC: u16 = 1 << 13;
    let number4 = |at: usize| Some(u32::from_ne_bytes(*record.get(at..)?.first_chunk()?));
    let number8 = |at: usize| Some(u64::from_ne_bytes(*record.get(at..)?.first_chunk()?));
    let kind = number4(0)?;
    let misc = u16::from_ne_bytes([*record.get(4)?, *record.get(5)?]);
    let time_at = record.len().checked_sub(8)?;
    let ktime_ns = number8(time_at)?;
    let tgid = number4(8)?;
    match kind {
        bindings::PERF_RECORD_COMM if misc & COMM_EXEC != 0 => {
            Some(Record::Told(MappingEvent::Cleared { tgid, ktime_ns }))
        }
        bindings::PERF_RECORD_LOST => Some(Record::Lost(number8(16)?)),
        bindings::PERF_RECORD_MMAP2 => {
            let (start, length, offset) = (number8(16)?, number8(24)?, number8(32)?);
            let (major, minor, inode) = (number4(40)?, number4(44)?, number8(48)?);
            let name = record.get(72..time_at)?;
            let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
            let name = String::from_utf8_lossy(name);
            let path = name.strip_suffix(" (deleted)").unwrap_or(&name);
            // `//anon`, `//enomem`, `//toolong`: the kernel has no name for it.
            let path = if path.starts_with("//") { "" } else { path };
            let end = start.checked_add(length).filter(|end| *end > start)?;
            Some(Record::Told(MappingEvent::Mapped {
                tgid,
                ktime_ns,
                mapping: NewMapping {
                    start,
                    end,
                    offset,
                    dev: rustix::fs::makedev(major, minor),
                    inode,
                    path: path.to_owned(),
                },
            }))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record(kind: u32, misc: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = kind.to_ne_bytes().to_vec();
        bytes.extend(misc.to_ne_bytes());
        bytes.extend(((body.len() + 16) as u16).to_ne_bytes());
        bytes.extend(body);
        bytes.extend(77_u64.to_ne_bytes());
        bytes
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
        let told = parse(&record(bindings::PERF_RECORD_MMAP2, 2, &body));
        let wanted = NewMapping {
            start: 0x1000,
            end: 0x3000,
            offset: 0x3000,
            dev: rustix::fs::makedev(8, 1),
            inode: 99,
            path: "/bin/x".into(),
        };
        assert_eq!(
            told,
            Some(Record::Told(MappingEvent::Mapped { tgid: 42, ktime_ns: 77, mapping: wanted }))
        );
    }

    #[test]
    fn only_the_name_that_an_exec_gives_is_an_exec() {
        let mut body = 42_u32.to_ne_bytes().to_vec();
        body.extend([0; 20]);
        let exec = parse(&record(bindings::PERF_RECORD_COMM, 1 << 13, &body));
        assert_eq!(exec, Some(Record::Told(MappingEvent::Cleared { tgid: 42, ktime_ns: 77 })));
        assert_eq!(parse(&record(bindings::PERF_RECORD_COMM, 0, &body)), None);
    }

    proptest! {
        #[test]
        fn r55_arbitrary_records_are_read_without_panic(kind in 0_u32..20, misc: u16, body in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&record(kind, misc, &body));
            let _ = parse(&body);
        }
    }
}
