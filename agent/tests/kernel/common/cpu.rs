//! A CPU that a test takes offline.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
    process::{Child, Command, Stdio},
    time::Instant,
};

/// CPU 1. It comes back online when this is dropped, and also if the test is killed: then a shell ends its reading, and
/// brings the CPU back.
pub(crate) struct CpuOne {
    state: File,
    rescue: Child,
}

impl CpuOne {
    /// The number of the CPU. CPU 0 stays: many kernels cannot take it offline.
    pub(crate) const NUMBER: u32 = 1;
    const ONLINE: &str = "/sys/devices/system/cpu/cpu1/online";

    /// Fails on a machine of one CPU.
    #[track_caller]
    pub(crate) fn borrow() -> Self {
        let state = File::options().write(true).open(Self::ONLINE).unwrap_or_else(|error| {
            panic!("{}: {error}; the test needs a CPU that can go offline", Self::ONLINE)
        });
        let before = fs::read_to_string(Self::ONLINE).unwrap();
        assert_eq!(before.trim(), "1", "another test has left CPU 1 offline");
        let back = format!("trap '' INT TERM HUP; read none; echo 1 >{}", Self::ONLINE);
        let rescue = Command::new("sh").args(["-c", &back]).stdin(Stdio::piped()).spawn().unwrap();
        Self { state, rescue }
    }

    /// Switches the CPU, and returns when the kernel has done so.
    #[track_caller]
    pub(crate) fn set(&self, online: bool) {
        let begun = Instant::now();
        self.state
            .write_all_at(if online { b"1" } else { b"0" }, 0)
            .unwrap_or_else(|error| panic!("{}: {error}; the test needs it", Self::ONLINE));
        // A busy machine may take seconds, which a failure should show.
        eprintln!("CPU 1 to {} took {:?}", if online { "online" } else { "offline" }, begun.elapsed());
    }
}

impl Drop for CpuOne {
    fn drop(&mut self) {
        drop(self.rescue.stdin.take());
        let _ = self.rescue.wait();
    }
}
