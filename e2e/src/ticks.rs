//! A second clock: counts the perf ticks of every CPU without any code of the agent.

use std::{
    fs::File,
    os::fd::{AsRawFd as _, FromRawFd as _},
    ptr,
    sync::atomic::{Ordering, fence},
    time::Duration,
};

use perf_event_open_sys::bindings;

/// Pages for the records: 16 bytes each, so some eight thousand ticks.
const DATA_PAGES: usize = 32;

/// A sampling cpu-clock on every CPU. Each has its own ring buffer, which [`Ticks::finish`] reads.
pub struct Ticks {
    clocks: Vec<(File, *mut bindings::perf_event_mmap_page)>,
    hz: u64,
    page: usize,
}

/// The ticks of all clocks in a span of time.
#[derive(Clone, Copy, Debug)]
pub struct Ticked {
    /// Ticks that the kernel recorded.
    pub ticks: u64,
    /// Ticks that are due by the time. A machine whose host runs other guests has fewer.
    pub due: f64,
}

impl Ticks {
    /// Starts a clock of `hz` on every CPU.
    #[track_caller]
    pub fn start(hz: u64) -> Self {
        let period_ns = 1_000_000_000 / hz;
        let page = rustix::param::page_size();
        let cpus = std::thread::available_parallelism().expect("CPUs").get();
        let clocks = (0..cpus).map(|cpu| Self::clock(cpu, period_ns, page)).collect();
        Self { clocks, hz, page }
    }

    fn clock(cpu: usize, period_ns: u64, page: usize) -> (File, *mut bindings::perf_event_mmap_page) {
        let mut attr = bindings::perf_event_attr {
            type_: bindings::PERF_TYPE_SOFTWARE,
            size: u32::try_from(size_of::<bindings::perf_event_attr>()).expect("small"),
            config: bindings::PERF_COUNT_SW_CPU_CLOCK.into(),
            ..Default::default()
        };
        attr.__bindgen_anon_1.sample_period = period_ns;
        attr.sample_type = bindings::PERF_SAMPLE_TIME.into();
        attr.set_use_clockid(1);
        attr.clockid = libc::CLOCK_MONOTONIC;
        let cpu = i32::try_from(cpu).expect("few CPUs");
        // SAFETY: the attribute structure is valid for the call and its size is set.
        let fd = unsafe { perf_event_open_sys::perf_event_open(&raw mut attr, -1, cpu, -1, 0) };
        assert!(fd >= 0, "perf_event_open on CPU {cpu}: {}", std::io::Error::last_os_error());
        // SAFETY: a new descriptor that no other value owns.
        let event = unsafe { File::from_raw_fd(fd) };
        // SAFETY: a new mapping at an address of the kernel's choice.
        let ring = unsafe {
            libc::mmap(
                ptr::null_mut(),
                (1 + DATA_PAGES) * page,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                event.as_raw_fd(),
                0,
            )
        };
        assert!(ring != libc::MAP_FAILED, "the ring is mapped: {}", std::io::Error::last_os_error());
        (event, ring.cast())
    }

    /// Stops the clocks and counts the ticks between two times of the monotonic clock.
    #[track_caller]
    pub fn finish(self, from: Duration, until: Duration) -> Ticked {
        let mut ticks = 0;
        for (event, ring) in &self.clocks {
            // SAFETY: a call on an open perf event that takes no pointer.
            let disabled = unsafe { perf_event_open_sys::ioctls::DISABLE(event.as_raw_fd(), 0) };
            assert_eq!(disabled, 0, "the clock stops");
            // SAFETY: the ring is mapped; the kernel writes data_head, and the clock is stopped.
            let head =
                usize::try_from(unsafe { ptr::read_volatile(&raw const (**ring).data_head) }).expect("fits");
            fence(Ordering::Acquire);
            assert!(head < DATA_PAGES * self.page, "nothing was overwritten: {head} bytes");
            let mut at = 0;
            while at < head {
                // SAFETY: headers are 8-aligned and lie below data_head, inside the data pages behind the first page.
                let record = unsafe { ring.byte_add(self.page + at) };
                // SAFETY: as above.
                let header = unsafe { ptr::read(record.cast::<bindings::perf_event_header>()) };
                if header.type_ == bindings::PERF_RECORD_SAMPLE {
                    // SAFETY: a sample of this clock holds its time behind the header.
                    let time = unsafe { ptr::read(record.byte_add(size_of_val(&header)).cast::<u64>()) };
                    ticks += u64::from((from..until).contains(&Duration::from_nanos(time)));
                }
                at += usize::from(header.size);
            }
        }
        let due = until.saturating_sub(from).as_secs_f64() * self.hz as f64 * self.clocks.len() as f64;
        Ticked { ticks, due }
    }
}

/// Returns the time of the clock that stamps the ticks.
pub fn monotonic() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32)
}

impl Drop for Ticks {
    fn drop(&mut self) {
        for (_, ring) in &self.clocks {
            // SAFETY: mapped in `clock` with this length, and not used any more.
            unsafe { libc::munmap((*ring).cast(), (1 + DATA_PAGES) * self.page) };
        }
    }
}
