//! The child processes that read debug information, and the workers that are processes: their use of resources counts as the
//! agent's.

use std::{fs, time::Duration};

use parking_lot::Mutex;

/// The children that run now.
static RUNNING: Mutex<Vec<Running>> = Mutex::new(Vec::new());

#[derive(Clone, Copy)]
struct Running {
    pid: u32,
    /// It has the agent's memory, which counts already.
    shares_memory: bool,
}

/// A child that counts as part of the agent, until this is dropped.
#[derive(Debug)]
pub(crate) struct CountedChild(u32);

impl CountedChild {
    /// Counts a child that has just started. Drop the result after the child has been waited for.
    pub(crate) fn new(pid: u32) -> Self {
        RUNNING.lock().push(Running { pid, shares_memory: false });
        Self(pid)
    }

    /// Counts the CPU time of a process that shares the agent's memory.
    pub(crate) fn sharing_memory(pid: u32) -> Self {
        RUNNING.lock().push(Running { pid, shares_memory: true });
        Self(pid)
    }
}

impl Drop for CountedChild {
    fn drop(&mut self) {
        RUNNING.lock().retain(|running| running.pid != self.0);
    }
}

/// Returns the CPU time of all children so far: those that were waited for, and those that run.
pub(crate) fn children_cpu_time() -> Duration {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the kernel writes the structure, of which every bit pattern is valid.
    let waited = unsafe {
        libc::getrusage(libc::RUSAGE_CHILDREN, usage.as_mut_ptr());
        usage.assume_init()
    };
    let time = |time: libc::timeval| {
        Duration::from_secs(time.tv_sec.unsigned_abs()) + Duration::from_micros(time.tv_usec.unsigned_abs())
    };
    let running = RUNNING.lock().clone();
    let running = running.iter().filter_map(|Running { pid, shares_memory }| {
        // The first number is the time on a CPU in nanoseconds.
        let text = fs::read_to_string(format!("/proc/{pid}/schedstat")).ok()?;
        let own = Duration::from_nanos(text.split_ascii_whitespace().next()?.parse().ok()?);
        // The others have no children.
        Some(own + if *shares_memory { waited_for(*pid) } else { Duration::ZERO })
    });
    time(waited.ru_utime) + time(waited.ru_stime) + running.sum::<Duration>()
}

/// Returns the CPU time of the children that a process has waited for.
fn waited_for(pid: u32) -> Duration {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // User and system time are the fields 16 and 17 of proc(5), in clock ticks; the name before may contain spaces.
    let behind_name = text.rfind(')').and_then(|end| text.get(end + 2..)).unwrap_or_default();
    let ticks: u64 = behind_name.split_ascii_whitespace().skip(13).take(2).flat_map(str::parse::<u64>).sum();
    Duration::from_millis(ticks.saturating_mul(1000) / rustix::param::clock_ticks_per_second().max(1))
}

/// Returns the resident memory of the children that run now.
pub(crate) fn children_resident_bytes() -> u64 {
    let children = RUNNING.lock().clone();
    let own = children.iter().filter(|running| !running.shares_memory);
    own.map(|running| resident_bytes(&running.pid.to_string())).sum()
}

/// Returns the resident memory of a process, by its name in `/proc`; 0 if it has ended.
pub(crate) fn resident_bytes(process: &str) -> u64 {
    let statm = fs::read_to_string(format!("/proc/{process}/statm")).unwrap_or_default();
    let pages = statm.split_ascii_whitespace().nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    pages * rustix::param::page_size() as u64
}

#[cfg(test)]
mod tests {
    use std::{
        process::{Child, Command},
        thread,
        time::Instant,
    };

    use super::*;

    fn busy() -> Child {
        Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap()
    }

    /// Checks that the time of a child counts while it runs, and does not go back when it has ended.
    #[test]
    fn a_child_counts_while_it_runs_and_afterwards() {
        let (before, memory) = (children_cpu_time(), children_resident_bytes());
        let mut child = busy();
        let counted = CountedChild::new(child.id());
        let until = Instant::now() + Duration::from_secs(20);
        let running = loop {
            let used = children_cpu_time().saturating_sub(before);
            if used > Duration::from_millis(100) || Instant::now() > until {
                break used;
            }
            thread::sleep(Duration::from_millis(20));
        };
        assert!(running > Duration::from_millis(100), "{running:?}");
        assert!(children_resident_bytes() > memory);
        child.kill().unwrap();
        child.wait().unwrap();
        drop(counted);
        // The kernel counts the time of ended children by the microsecond.
        let ended = children_cpu_time().saturating_sub(before) + Duration::from_millis(20);
        assert!(ended >= running, "{ended:?} {running:?}");
        assert!(RUNNING.lock().iter().all(|running| running.pid != child.id()));
    }
}
