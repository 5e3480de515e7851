//! Errors of the kernel side.

use std::io;

/// Why the kernel side cannot be loaded, changed or read.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The BPF object in this program cannot be opened.
    #[error("cannot open the BPF object: {0}; this build is broken, install another")]
    Open(#[source] libbpf_rs::Error),
    /// The kernel refused programs or maps.
    #[error(
        "the kernel refused the BPF programs: {source:#}; run `gannet-agent check` to see what is missing\n{log}"
    )]
    Load {
        /// The end of the log of libbpf and the verifier.
        log: String,
        /// The error of the kernel.
        #[source]
        source: libbpf_rs::Error,
    },
    /// A program cannot be attached.
    #[error("cannot attach {what}: {source:#}; run `gannet-agent check` to see what is missing")]
    Attach {
        /// The program and its hook.
        what: &'static str,
        /// The error of the kernel.
        #[source]
        source: libbpf_rs::Error,
    },
    /// The sampling clock of a CPU cannot be opened.
    #[error("cannot open the clock of CPU {cpu}: {source}; run `gannet-agent check` to see what is missing")]
    PerfEvent {
        /// The number of the CPU.
        cpu: u32,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// A file of the kernel cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// Path of the file.
        path: &'static str,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// A map cannot be written or read.
    #[error("cannot access BPF map {map}: {source:#}")]
    Map {
        /// The name of the map.
        map: &'static str,
        /// The error of the kernel.
        #[source]
        source: libbpf_rs::Error,
    },
    /// The scan of the running processes failed.
    #[error("cannot scan the running processes: {0}")]
    Scan(#[source] io::Error),
    /// The event ring buffer cannot be read.
    #[error("cannot read the event ring buffer: {0:#}")]
    Ring(#[source] libbpf_rs::Error),
}

/// The reason why the kernel refused to write to a BPF map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shortage {
    /// The map is full. Tries report ENOSPC, hash tables E2BIG.
    Entries,
    /// ENOMEM: the kernel has no memory now, or the agent's control group reached its limit.
    Memory,
}

impl KernelError {
    /// Returns what the map lacked; `None` for other errors.
    pub(crate) fn shortage(&self) -> Option<Shortage> {
        let Self::Map { source, .. } = self else { return None };
        // The error keeps its number to itself, but shows it.
        let text = format!("{source:#}");
        let is = |errno: i32| text.contains(&format!("(os error {errno})"));
        if is(libc::ENOMEM) {
            Some(Shortage::Memory)
        } else {
            (is(libc::ENOSPC) || is(libc::E2BIG)).then_some(Shortage::Entries)
        }
    }
}
