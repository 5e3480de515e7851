//! Threads that the kernel takes for processes: they share memory and descriptors with the agent, but the end of the agent
//! does not wait for them.
//!
//! A call in an uninterruptible wait does not even end at SIGKILL: a FUSE server that has taken a request and never answers
//! it is enough. A process ends only when all of its threads have ended, so one such thread would keep its parent, a
//! container runtime for instance, waiting without end. A process that shares its memory with the agent can be left behind.

use std::{
    any::Any,
    ffi::{c_int, c_void},
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    process, ptr,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use crate::governor::CountedChild;

/// Room for a worker's stack, as much as the standard library gives to a thread. Pages without use take no memory.
const STACK_BYTES: usize = 2 << 20;
/// The thread that starts a worker only waits for it.
const HOST_STACK_BYTES: usize = 128 << 10;

/// All that a thread shares except its thread group, and no signal at the end.
const SHARED: c_int = libc::CLONE_VM | libc::CLONE_FS | libc::CLONE_FILES | libc::CLONE_SYSVSEM;

/// Workers that have not ended. Not a metric: those that hang are counted as hung calls, and at most three others stay.
static RUNNING: AtomicUsize = AtomicUsize::new(0);

/// The values that pass between a worker and the thread that started it.
struct Start<F> {
    work: Option<F>,
    /// The agent's process id.
    parent: u32,
    panicked: Option<Box<dyn Any + Send>>,
    counted: Option<CountedChild>,
}

/// Runs `work` in a process of its own that shares all memory and descriptors with this one. Where the kernel allows no such
/// process, the work runs on a thread.
///
/// The thread that starts the worker lends it its thread-local memory, and touches none until the worker has ended.
pub(super) fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let host = thread::Builder::new().name(name.to_owned()).stack_size(HOST_STACK_BYTES);
    RUNNING.fetch_add(1, Ordering::Relaxed);
    let running = Ended;
    host.spawn(move || {
        let _running = running;
        run_apart(work);
    })
    .map(drop)
}

/// Returns the number of workers that have not ended.
pub(super) fn running() -> usize {
    RUNNING.load(Ordering::Relaxed)
}

/// Counts the end of a worker when it is dropped.
struct Ended;

impl Drop for Ended {
    fn drop(&mut self) {
        RUNNING.fetch_sub(1, Ordering::Relaxed);
    }
}

fn run_apart<F: FnOnce()>(work: F) {
    let mut start = Start { work: Some(work), parent: process::id(), panicked: None, counted: None };
    match Stack::map() {
        Ok(stack) => {
            block_signals();
            // SAFETY: the stack is mapped, is used by nothing else, and outlives the worker, for whose end `wait_for` waits.
            // So does `start`. The thread-local memory is used by the worker alone: this thread makes two system calls until
            // the worker has ended, and no signal handler runs on it.
            let pid = unsafe { libc::clone(worker::<F>, stack.top(), SHARED, (&raw mut start).cast()) };
            if pid > 0 {
                wait_for(pid);
            }
        }
        Err(error) => tracing::debug!("no stack for a worker, using a thread: {error}"),
    }
    drop(start.counted.take());
    // Nothing took it: the process limit, or a sandbox.
    if let Some(work) = start.work.take() {
        work();
    }
    if let Some(panicked) = start.panicked {
        std::panic::resume_unwind(panicked);
    }
}

/// The worker's side. The thread that started it is its parent.
extern "C" fn worker<F: FnOnce()>(start: *mut c_void) -> c_int {
    // SAFETY: `run_apart` passes this type, which it does not touch until this process has ended.
    let start = unsafe { &mut *start.cast::<Start<F>>() };
    // SAFETY: takes numbers only.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) };
    // SAFETY: has no arguments.
    if u32::try_from(unsafe { libc::getppid() }) != Ok(start.parent) {
        return 0;
    }
    start.counted = Some(CountedChild::sharing_memory(process::id()));
    if let Some(work) = start.work.take() {
        start.panicked = catch_unwind(AssertUnwindSafe(work)).err();
    }
    0
}

/// Waits until the worker has ended. If it died of a signal, it may have held locks: the agent dies as if one of its threads
/// had done so.
fn wait_for(pid: c_int) {
    let mut status: c_int = 0;
    // SAFETY: the kernel writes the status. Not the C library's function, which touches thread-local memory.
    let waited = unsafe {
        libc::syscall(libc::SYS_wait4, pid, &raw mut status, libc::__WALL, ptr::null_mut::<libc::rusage>())
    };
    if waited != libc::c_long::from(pid) || !libc::WIFEXITED(status) {
        process::abort();
    }
}

/// No signal of the agent, such as Ctrl-C, is for a worker, and none interrupts the wait for it.
fn block_signals() {
    let mut all = std::mem::MaybeUninit::<libc::sigset_t>::zeroed();
    // SAFETY: the first call initializes the set that the second one reads.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), ptr::null_mut());
    }
}

/// Memory for a stack, below it a page that cannot be touched.
struct Stack(*mut c_void);

impl Stack {
    fn map() -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_STACK | libc::MAP_NORESERVE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: new memory, at an address of the kernel's choice.
        let start = unsafe { libc::mmap(ptr::null_mut(), STACK_BYTES, access, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let stack = Self(start);
        // SAFETY: the lowest page of the memory above.
        match unsafe { libc::mprotect(start, rustix::param::page_size(), libc::PROT_NONE) } {
            0 => Ok(stack),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn top(&self) -> *mut c_void {
        self.0.wrapping_byte_add(STACK_BYTES)
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, and the worker on it has ended.
        unsafe { libc::munmap(self.0, STACK_BYTES) };
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Read as _, Write as _},
        os::fd::{FromRawFd as _, IntoRawFd as _, OwnedFd, RawFd},
        sync::mpsc,
        time::{Duration, Instant},
    };

    use super::*;
    use crate::governor::children_cpu_time;

    #[test]
    fn a_worker_is_a_process_that_shares_memory_and_descriptors() {
        let (sender, received) = mpsc::channel::<(u32, String, RawFd)>();
        let (mut reader, writer) = std::io::pipe().unwrap();
        let back: RawFd = OwnedFd::from(writer).into_raw_fd();
        spawn("gannet-test", move || {
            // SAFETY: the descriptor was given up for this.
            let mut writer = unsafe { File::from_raw_fd(back) };
            writer.write_all(b"written by the worker").unwrap();
            drop(writer);
            let opened = File::open("/proc/version").unwrap().into_raw_fd();
            sender.send((process::id(), "x".repeat(10_000), opened)).unwrap();
        })
        .unwrap();
        let (pid, text, opened) = received.recv().unwrap();
        assert_ne!(pid, process::id());
        assert_eq!(text.len(), 10_000);
        let mut read = String::new();
        // The end of the pipe comes only if the worker has closed its end in both processes.
        reader.read_to_string(&mut read).unwrap();
        assert_eq!(read, "written by the worker");
        read.clear();
        // SAFETY: the worker opened it and gave it up.
        unsafe { File::from_raw_fd(opened) }.read_to_string(&mut read).unwrap();
        assert!(read.starts_with("Linux"), "{read}");
    }

    #[test]
    fn a_panic_ends_the_worker_and_nothing_else() {
        let (sender, received) = mpsc::channel::<()>();
        spawn("gannet-test", move || {
            let _held = sender;
            panic!("on purpose");
        })
        .unwrap();
        assert_eq!(received.recv_timeout(Duration::from_secs(20)), Err(mpsc::RecvTimeoutError::Disconnected));
    }

    /// Checks that CPU time counts while a worker runs, with that of the children that it waited for, and after its end.
    #[test]
    fn the_time_of_a_worker_and_its_children_counts() {
        let before = children_cpu_time();
        let used = || children_cpu_time().saturating_sub(before);
        let (sender, received) = mpsc::channel::<()>();
        let (release, held) = mpsc::channel::<()>();
        spawn("gannet-test", move || {
            let busy = "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done";
            assert!(process::Command::new("sh").args(["-c", busy]).status().unwrap().success());
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_millis(200) {}
            sender.send(()).unwrap();
            let _ = held.recv();
        })
        .unwrap();
        received.recv().unwrap();
        let running = used();
        assert!(running > Duration::from_millis(150), "{running:?}");
        drop(release);
        let end = Instant::now() + Duration::from_secs(20);
        while super::running() > 0 && Instant::now() < end {
            thread::sleep(Duration::from_millis(1));
        }
        let ended = used() + Duration::from_millis(40);
        assert!(ended >= running, "{ended:?} {running:?}");
    }
}
