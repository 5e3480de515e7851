//! Pressure stall information (PSI): its files, and the triggers of the kernel for them.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _, Seek as _, Write as _},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::OpenOptionsExt as _,
    },
    path::{Path, PathBuf},
    time::Duration,
};

/// Without CAP_SYS_RESOURCE the kernel grants only windows that are multiples of this.
const PLAIN_WINDOW: Duration = Duration::from_secs(2);

/// Why the agent cannot watch pressure.
#[derive(Debug, thiserror::Error)]
pub enum PressureError {
    /// The file does not exist, or the agent may not open it.
    #[error("cannot watch {}: {source}; is the kernel booted with psi=1, and the group in cgroup2?", path.display())]
    Open {
        /// The pressure file.
        path: PathBuf,
        /// The error of the system call.
        #[source]
        source: io::Error,
    },
    /// The file does not have the expected format.
    #[error("{} has no line `{line}`", path.display())]
    Format {
        /// The pressure file.
        path: PathBuf,
        /// The missing line.
        line: &'static str,
    },
}

/// One watched line of one pressure file.
#[derive(Debug)]
pub struct PressureFile {
    path: PathBuf,
    line: &'static str,
    /// The descriptor of the kernel's trigger. None: the kernel refused all triggers, and the agent reads the file instead.
    trigger: Option<File>,
    reader: File,
    /// The threshold in effect: the rule's own, or the nearest that the kernel grants.
    stall: Duration,
    window: Duration,
    /// The last two readings that are at least a window apart: total stall, and time of reading.
    readings: [(Duration, Duration); 2],
}

impl PressureFile {
    /// Watches for `stall` of some tasks, or of all tasks (`full`), within `window`.
    pub fn open(
        path: &Path,
        full: bool,
        stall: Duration,
        window: Duration,
        now: Duration,
    ) -> Result<Self, PressureError> {
        let line = if full { "full" } else { "some" };
        let failed = |source| PressureError::Open { path: path.to_owned(), source };
        let reader = File::open(path).map_err(failed)?;
        let plain =
            PLAIN_WINDOW * u32::try_from(window.as_nanos().div_ceil(PLAIN_WINDOW.as_nanos())).unwrap_or(1);
        let plain_stall = stall.mul_f64(plain.as_secs_f64() / window.as_secs_f64());
        let mut chosen = (None, plain_stall, plain);
        for (stall, window) in [(stall, window), (plain_stall, plain)] {
            if let Ok(trigger) = set_trigger(path, line, stall, window) {
                chosen = (Some(trigger), stall, window);
                break;
            }
        }
        let (trigger, stall, window) = chosen;
        let mut pressure = Self {
            path: path.to_owned(),
            line,
            trigger,
            reader,
            stall,
            window,
            readings: [(Duration::ZERO, now); 2],
        };
        let total = pressure.total()?;
        pressure.readings = [(total, now); 2];
        Ok(pressure)
    }

    /// Returns a descriptor that gets priority data (`POLLPRI`) when the threshold is exceeded. None: the caller must read
    /// periodically.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.trigger.as_ref().map(AsFd::as_fd)
    }

    /// Returns the stall and the window in effect.
    pub fn threshold(&self) -> (Duration, Duration) {
        (self.stall, self.window)
    }

    /// Reads the stall since the group was created.
    fn total(&mut self) -> Result<Duration, PressureError> {
        let failed = |source| PressureError::Open { path: self.path.clone(), source };
        let mut text = String::new();
        self.reader.rewind().map_err(failed)?;
        (&mut self.reader).take(4096).read_to_string(&mut text).map_err(failed)?;
        parse_total(&text, self.line)
            .ok_or_else(|| PressureError::Format { path: self.path.clone(), line: self.line })
    }

    /// Reads the file. Returns the stall per time since a reading at least a window ago, in milliseconds per second, and
    /// whether it reaches the threshold.
    pub(super) fn measure(&mut self, now: Duration) -> Result<(f64, bool), PressureError> {
        let total = self.total()?;
        if now.saturating_sub(self.readings[1].1) >= self.window {
            self.readings = [self.readings[1], (total, now)];
        }
        let (then, when) = self.readings[0];
        let time = now.saturating_sub(when).max(Duration::from_millis(1));
        let rate = total.saturating_sub(then).as_secs_f64() * 1000.0 / time.as_secs_f64();
        Ok((rate, rate >= self.threshold_rate()))
    }

    /// The threshold in milliseconds of stall per second.
    pub(super) fn threshold_rate(&self) -> f64 {
        self.stall.as_secs_f64() * 1000.0 / self.window.as_secs_f64()
    }
}

fn set_trigger(path: &Path, line: &str, stall: Duration, window: Duration) -> io::Result<File> {
    let mut file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    file.write_all(format!("{line} {} {}\0", stall.as_micros(), window.as_micros()).as_bytes())?;
    Ok(file)
}

/// Parses the total of the line of this kind: `some avg10=0.00 avg60=0.00 avg300=0.00 total=123` (microseconds).
fn parse_total(text: &str, kind: &str) -> Option<Duration> {
    let line = text.lines().find(|line| line.split(' ').next() == Some(kind))?;
    let total = line.split(' ').find_map(|field| field.strip_prefix("total="))?;
    Some(Duration::from_micros(total.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_total_of_a_line_is_parsed() {
        let text = "some avg10=1.00 avg60=0.00 avg300=0.00 total=1500\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n";
        assert_eq!(parse_total(text, "some"), Some(Duration::from_micros(1500)));
        assert_eq!(parse_total(text, "full"), Some(Duration::from_micros(7)));
        assert_eq!(parse_total("some avg10=1.00\n", "some"), None);
        assert_eq!(parse_total("", "full"), None);
    }
}
