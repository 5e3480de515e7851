//! The identity of a process and of its image.

use std::{fmt, str::FromStr};

/// The identity of a process: its thread group id together with the moment it started. A bare pid is never an
/// identity, because the kernel hands numbers out again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProcessKey {
    /// Thread group id in the host's pid namespace.
    pub tgid: u32,
    /// `task_struct.start_boottime` of the thread group leader: nanoseconds of the boot clock.
    pub start_boottime_ns: u64,
}

/// One image of one process. Every sample belongs to one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageKey {
    /// The process that runs the image.
    pub process: ProcessKey,
    /// The image: the kernel's count of the process's `execve` calls.
    pub exec_id: u32,
}

/// The text was not `tgid@nanoseconds`.
#[derive(Debug, thiserror::Error)]
#[error("a process key is written TGID@START_BOOTTIME_NS, as in 4711@81230000000; got `{0}`")]
pub struct ParseKeyError(String);

impl fmt::Display for ProcessKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.tgid, self.start_boottime_ns)
    }
}

impl FromStr for ProcessKey {
    type Err = ParseKeyError;

    fn from_str(text: &str) -> Result<Self, ParseKeyError> {
        let wrong = || ParseKeyError(text.to_owned());
        let (tgid, start) = text.split_once('@').ok_or_else(wrong)?;
        Ok(Self {
            tgid: tgid.parse().map_err(|_| wrong())?,
            start_boottime_ns: start.parse().map_err(|_| wrong())?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_survives_its_own_text() {
        let key = ProcessKey { tgid: 4711, start_boottime_ns: 81_230_000_000 };
        assert_eq!(key.to_string().parse::<ProcessKey>().unwrap(), key);
        for wrong in ["", "1", "1@", "@1", "1@x", "-1@1", "4294967296@1"] {
            assert!(wrong.parse::<ProcessKey>().is_err(), "{wrong}");
        }
    }
}
