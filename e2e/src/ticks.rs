//! A second clock: counts the perf ticks of every CPU with nothing of the agent's in between.

use std::{
    fs::File,
    io::Read as _,
    os::fd::{AsRawFd as _, FromRawFd as _},
    ptr,
    sync::atomic::{Ordering, fence},
};

use perf_event_open_sys::bindings;

/// Room for the records: 8 bytes of header each, so some ten thousand ticks.
const DATA_PAGES: usize = 32;

/// A sampling cpu-clock on every CPU whose records go into a ring of its own, read when it is over.
pub struct Ticks {
    clocks: Vec<(File, *mut bindings::perf_event_mmap_page)>,
    period_ns: u64,
    page: usize,
}

/// What the clocks did.
#[derive(Clone, Copy, Debug)]
pub struct Ticked {
    /// Records in the rings.
    pub ticks: u64,
    /// Those that the clocks' running time makes due. A machine that is stolen from has fewer ticks than this.
    pub due: u64,
}

impl Ticks {
    /// Starts the clocks.
    #[track_caller]
    pub fn start(hz: u64) -> Self {
        let period_ns = 1_000_000_000 / hz;
        let page = rustix::param::page_size();
        let cpus = std::thread::available_parallelism().expect("CPUs").get();
        let clocks = (0..cpus).map(|cpu| Self::clock(cpu, period_ns, page)).collect();
        Self { clocks, period_ns, page }
    }

    fn clock(cpu: usize, period_ns: u64, page: usize) -> (File, *mut bindings::perf_event_mmap_page) {
        let mut attr = bindings::perf_event_attr {
            type_: bindings::PERF_TYPE_SOFTWARE,
            size: u32::try_from(size_of::<bindings::perf_event_attr>()).expect("small"),
            config: bindings::PERF_COUNT_SW_CPU_CLOCK.into(),
            ..Default::default()
        };
        attr.__bindgen_anon_1.sample_period = period_ns;
        let cpu = i32::try_from(cpu).expect("few CPUs");
        // SAFETY: the attribute structure is valid for the call and its size is set.
        let fd = unsafe { perf_event_open_sys::perf_event_open(&raw mut attr, -1, cpu, -1, 0) };
        assert!(fd >= 0, "perf_event_open on CPU {cpu}: {}", std::io::Error::last_os_error());
        // SAFETY: a new descriptor that nobody else has.
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

    /// Stops them and counts.
    #[track_caller]
    pub fn finish(mut self) -> Ticked {
        let mut all = Ticked { ticks: 0, due: 0 };
        for (event, ring) in &mut self.clocks {
            // SAFETY: a call on an open perf event that takes no pointer.
            let disabled = unsafe { perf_event_open_sys::ioctls::DISABLE(event.as_raw_fd(), 0) };
            assert_eq!(disabled, 0, "the clock stops");
            let mut count = [0; 8];
            event.read_exact(&mut count).expect("its count");
            // The count of a cpu-clock is nanoseconds.
            all.due += u64::from_ne_bytes(count) / self.period_ns;
            // SAFETY: the ring is mapped; the kernel writes data_head, and the clock is stopped.
            let head =
                usize::try_from(unsafe { ptr::read_volatile(&raw const (**ring).data_head) }).expect("fits");
            fence(Ordering::Acquire);
            assert!(head < DATA_PAGES * self.page, "nothing was overwritten: {head} bytes");
            let mut at = 0;
            while at < head {
                // SAFETY: headers are 8-aligned and lie below data_head, inside the data pages behind the first page.
                let header =
                    unsafe { ptr::read(ring.byte_add(self.page + at).cast::<bindings::perf_event_header>()) };
                all.ticks += u64::from(header.type_ == bindings::PERF_RECORD_SAMPLE);
                at += usize::from(header.size);
            }
        }
        all
    }
}

impl Drop for Ticks {
    fn drop(&mut self) {
        for (_, ring) in &self.clocks {
            // SAFETY: mapped in `clock` with this length, and not used any more.
            unsafe { libc::munmap((*ring).cast(), (1 + DATA_PAGES) * self.page) };
        }
    }
}
