//! Reading `/proc`: text that the kernel writes, with names in it that any user may have chosen.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use crate::model::{self, MapsLine, NewMapping, ProcessKey};

/// Bytes that are read of one file of a process. It is a bound, not a limit that real programs reach: maps of this size have
/// about half a million lines.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// Bytes of a `status` file.
const MAX_STATUS_BYTES: u64 = 16 << 10;
/// Bytes of a `stat` file, which is one line.
const MAX_STAT_BYTES: u64 = 4096;
/// Threads among which one that has not ended is searched.
const MAX_ENDED_THREADS: usize = 4096;
/// Files that are empty for a process whose first thread has ended. Its other threads show them.
const OF_LIVE_THREADS: [&str; 3] = ["maps", "cmdline", "environ"];

/// Why a process could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ProcError {
    /// It has exited.
    #[error("process {0} has exited")]
    Gone(u32),
    /// Another process has reused its PID.
    #[error("PID {tgid} belongs to another process now: it started at tick {found}, not {wanted}")]
    Recycled {
        /// PID of both processes.
        tgid: u32,
        /// Start tick of the wanted process.
        wanted: u64,
        /// Start tick of the process that has the PID now.
        found: u64,
    },
    /// Reading it takes too long: it may wait for a file system that does not answer.
    #[error("process {0} does not answer")]
    Unanswered(u32),
    /// The kernel refused, or the text of the file is invalid.
    #[error("cannot read /proc/{tgid}/{file}: {source}; CAP_SYS_PTRACE is needed for other users' processes")]
    Read {
        /// PID of the process.
        tgid: u32,
        /// Name of the file below `/proc/PID`.
        file: &'static str,
        /// The error of the system.
        #[source]
        source: io::Error,
    },
}

/// Fields of `/proc/PID/stat`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// Start time in clock ticks of the boot clock.
    pub start_ticks: u64,
    /// Whether it is a kernel thread.
    pub kernel_thread: bool,
    /// CPU time of all its threads in clock ticks, user and system.
    pub cpu_ticks: u64,
    /// Whether its last thread has ended: it is a zombie, or being removed.
    pub is_over: bool,
}

/// The source of facts about processes: `/proc`, or a fake in tests. It uses the PID of a key only; callers check by the start
/// time that the process is still the one of the key.
pub trait ProcFs: Send + Sync {
    /// Reads at most `max` bytes of `/proc/PID/FILE`.
    fn read(&self, key: ProcessKey, file: &'static str, max: u64) -> io::Result<Vec<u8>>;
    /// Returns the target of the link `/proc/PID/FILE`.
    fn link(&self, key: ProcessKey, file: &'static str) -> io::Result<PathBuf>;
    /// Returns the effective user id.
    fn owner(&self, key: ProcessKey) -> io::Result<u32>;
    /// Returns the boot clock of BPF programs, in nanoseconds.
    fn now_ns(&self) -> u64;
}

/// The `/proc` of the kernel.
#[derive(Clone, Debug)]
pub struct RealProc {
    root: PathBuf,
}

impl RealProc {
    /// Reads a `/proc` that is mounted at this directory.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    fn path(&self, key: ProcessKey, file: &str) -> PathBuf {
        let mut path = self.root.join(key.tgid.to_string());
        path.push(file);
        path
    }
}

impl Default for RealProc {
    fn default() -> Self {
        Self::at("/proc")
    }
}

impl ProcFs for RealProc {
    fn read(&self, key: ProcessKey, file: &'static str, max: u64) -> io::Result<Vec<u8>> {
        // The variables that the agent does not want may be secrets.
        let read = if file == "environ" { read_in_place } else { read };
        let bytes = read(&self.path(key, file), max)?;
        if bytes.is_empty()
            && OF_LIVE_THREADS.contains(&file)
            && let Some(thread) = live_thread_in(&self.path(key, ""))
        {
            return read(&thread.join(file), max);
        }
        Ok(bytes)
    }

    fn link(&self, key: ProcessKey, file: &'static str) -> io::Result<PathBuf> {
        fs::read_link(self.path(key, file)).or_else(|error| match live_thread_in(&self.path(key, "")) {
            Some(thread) => fs::read_link(thread.join(file)),
            None => Err(error),
        })
    }

    fn owner(&self, key: ProcessKey) -> io::Result<u32> {
        let owner = fs::metadata(self.path(key, ""))?.uid();
        if owner != 0 {
            return Ok(owner);
        }
        // The files of a process that has changed its user belong to root, until it calls execve.
        let status = read(&self.path(key, "status"), MAX_STATUS_BYTES).unwrap_or_default();
        Ok(effective_uid(&String::from_utf8_lossy(&status)).unwrap_or(owner))
    }

    fn now_ns(&self) -> u64 {
        model::boot_time_ns()
    }
}

fn read(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(max).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Does the same as [`read`], with one buffer that never moves: one that grows would leave copies of its bytes in freed memory, and
/// the caller could not erase them.
fn read_in_place(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let mut bytes = vec![0; usize::try_from(max).unwrap_or(usize::MAX)];
    let mut filled = 0;
    loop {
        match file.read(&mut bytes[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                bytes.fill(0);
                std::hint::black_box(&bytes);
                return Err(error);
            }
        }
    }
    bytes.truncate(filled);
    Ok(bytes)
}

/// Returns the directory in `/proc` of a thread that lives on after the first thread of its process has ended. That one shows
/// no memory any more. Of other processes it returns none.
pub(super) fn live_thread(tgid: u32) -> Option<String> {
    live_thread_in(Path::new(&format!("/proc/{tgid}")))?.into_os_string().into_string().ok()
}

fn live_thread_in(process: &Path) -> Option<PathBuf> {
    let state = |directory: &Path| {
        let text = String::from_utf8_lossy(&read(&directory.join("stat"), MAX_STAT_BYTES).ok()?).into_owned();
        text[text.rfind(')')? + 1..].trim_start().bytes().next()
    };
    let is_over = |directory: &Path| state(directory).is_none_or(|state| matches!(state, b'Z' | b'X'));
    if !is_over(process) {
        return None;
    }
    let threads = fs::read_dir(process.join("task")).ok()?;
    threads.take(MAX_ENDED_THREADS).flatten().map(|thread| thread.path()).find(|thread| !is_over(thread))
}

/// Reads at most `max` bytes of one file of a process.
pub(super) fn bytes(
    proc: &dyn ProcFs,
    key: ProcessKey,
    file: &'static str,
    max: u64,
) -> Result<Vec<u8>, ProcError> {
    proc.read(key, file, max).map_err(|source| explain(key.tgid, file, source))
}

/// Reads one file of a process as text, up to a bound.
pub(super) fn text(proc: &dyn ProcFs, key: ProcessKey, file: &'static str) -> Result<String, ProcError> {
    text_or_part(proc, key, file).map(|(text, _)| text)
}

/// Does the same as [`text`], and reports whether the file is longer than the bound.
pub(super) fn text_or_part(
    proc: &dyn ProcFs,
    key: ProcessKey,
    file: &'static str,
) -> Result<(String, bool), ProcError> {
    let bytes = bytes(proc, key, file, MAX_FILE_BYTES)?;
    let is_part = bytes.len() as u64 >= MAX_FILE_BYTES;
    let text = String::from_utf8(bytes)
        .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned());
    Ok((text, is_part))
}

/// Returns the target of a link of a process.
pub(super) fn link(proc: &dyn ProcFs, key: ProcessKey, file: &'static str) -> Result<String, ProcError> {
    let path = proc.link(key, file).map_err(|source| explain(key.tgid, file, source))?;
    Ok(path.to_string_lossy().into_owned())
}

/// Returns the effective user id of a process.
pub(super) fn owner(proc: &dyn ProcFs, key: ProcessKey) -> Result<u32, ProcError> {
    proc.owner(key).map_err(|source| explain(key.tgid, "", source))
}

fn explain(tgid: u32, file: &'static str, source: io::Error) -> ProcError {
    match source.raw_os_error() {
        Some(libc::ENOENT | libc::ESRCH) => ProcError::Gone(tgid),
        _ => ProcError::Read { tgid, file, source },
    }
}

/// Checks that the process with this PID is still the one of this key, by its start time.
pub fn check(key: ProcessKey) -> Result<Stat, ProcError> {
    check_in(&RealProc::default(), key)
}

/// Does the same as [`check`] in the given `/proc`.
pub(super) fn check_in(proc: &dyn ProcFs, key: ProcessKey) -> Result<Stat, ProcError> {
    let stat = stat_in(proc, key)?;
    let wanted = model::ticks_of(key.start_boottime_ns);
    if stat.start_ticks == wanted {
        Ok(stat)
    } else {
        Err(ProcError::Recycled { tgid: key.tgid, wanted, found: stat.start_ticks })
    }
}

fn stat_in(proc: &dyn ProcFs, key: ProcessKey) -> Result<Stat, ProcError> {
    let invalid = || io::Error::new(io::ErrorKind::InvalidData, "a field is missing");
    parse_stat(&text(proc, key, "stat")?).ok_or_else(|| explain(key.tgid, "stat", invalid()))
}

impl ProcessKey {
    /// Returns the key of the process that has this PID now. `/proc` shows the start time in clock ticks, so the key differs
    /// from the kernel's own; [`check_identity`](super::check_identity) takes both for the same process.
    pub fn of_running(tgid: u32) -> Result<Self, ProcError> {
        let any = Self { tgid, start_boottime_ns: 0 };
        let ticks = stat_in(&RealProc::default(), any)?.start_ticks;
        Ok(Self { start_boottime_ns: model::boot_time_of_ticks(ticks), ..any })
    }
}

/// Parses the effective user id in the text of `/proc/PID/status`.
fn effective_uid(status: &str) -> Option<u32> {
    // The kernel escapes line ends in the name, so no name can forge this line.
    status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// Reports whether an executable is a dynamic linker by its name. It runs the program that is its argument.
pub(crate) fn is_dynamic_linker(exe: &str) -> bool {
    let name = exe.rsplit('/').next().unwrap_or_default();
    let is_ld = |rest: &str| rest.starts_with(['-', '.']) || rest.starts_with("64.");
    name.strip_prefix("ld").is_some_and(is_ld) && (name.contains(".so") || name.starts_with("ld-musl-"))
}

/// Parses the text of `/proc/PID/stat`. The name may hold anything, parentheses and spaces included: the fields stand behind
/// the last parenthesis.
pub(super) fn parse_stat(text: &str) -> Option<Stat> {
    const PF_KTHREAD: u64 = 0x0020_0000;
    let fields: Vec<&str> = text[text.rfind(')')? + 1..].split_ascii_whitespace().collect();
    // proc(5) numbers the fields from 1; the state is 3.
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    // A leader that has ended before other threads is shown as a zombie too.
    let is_over = matches!(fields.first(), Some(&("Z" | "X"))) && field(20)? <= 1;
    Some(Stat {
        start_ticks: field(22)?,
        kernel_thread: field(9)? & PF_KTHREAD != 0,
        cpu_ticks: field(14)?.checked_add(field(15)?)?,
        is_over,
    })
}

/// An executable line of `/proc/PID/maps`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CodeMapping {
    pub(super) mapping: NewMapping,
    /// The range of a line that maps the file: `/proc/PID/map_files` leads to the file by it.
    pub(super) link: (u64, u64),
}

/// Parses the executable lines of `/proc/PID/maps`. An invalid line hides no other.
///
/// Some programs copy their code to memory without a file, for huge pages, and move that to where the file was. The lines
/// before and behind it still map the file, and their offsets leave a gap of exactly its size. Such a line counts as a mapping
/// of the file.
pub(super) fn parse_maps(text: &str) -> Vec<CodeMapping> {
    let mut lines: Vec<CodeMapping> = Vec::new();
    // The last line of a file; and the index of the first executable line behind it, while all since are without a file and
    // leave no gap.
    let mut before: Option<(NewMapping, usize)> = None;
    let mut end = 0;
    for (line, executable) in text.lines().filter_map(parse_maps_line) {
        let has_file = line.inode != 0;
        if line.start != end {
            before = None;
        }
        end = line.end;
        if has_file && let Some((file, first)) = &before {
            let is_gap_of = (file.dev, file.inode, &file.path) == (line.dev, line.inode, &line.path)
                && file.offset.wrapping_add(line.start.wrapping_sub(file.start)) == line.offset;
            for moved in lines[*first..].iter_mut().filter(|_| is_gap_of) {
                let offset = file.offset + (moved.mapping.start - file.start);
                moved.mapping =
                    NewMapping { start: moved.mapping.start, end: moved.mapping.end, offset, ..file.clone() };
                moved.link = (file.start, file.end);
            }
        }
        if executable {
            lines.push(CodeMapping { link: (line.start, line.end), mapping: line.clone() });
        }
        if has_file {
            before = Some((line, lines.len()));
        } else if !line.path.is_empty() {
            before = None;
        }
    }
    lines
}

/// Returns a mapping, and whether it is executable.
fn parse_maps_line(line: &str) -> Option<(NewMapping, bool)> {
    let parsed = MapsLine::parse(line)?;
    let MapsLine { start, end, offset, device, inode, path, .. } = parsed;
    let (major, minor) = device.split_once(':')?;
    let mapping = NewMapping {
        start,
        end,
        offset,
        dev: rustix::fs::makedev(u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?),
        inode: inode.parse().ok()?,
        path: path.strip_suffix(" (deleted)").unwrap_or(path).replace("\\012", "\n"),
    };
    Some((mapping, parsed.is_code()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_name_cannot_forge_a_stat_line() {
        let text = "42 (x) S 1 1 (9) 1 1 ) S 1 42 42 0 -1 2097216 0 0 0 0 1 2 3 4 20 0 1 0 4711 0 0\n";
        let stat = Stat { start_ticks: 4711, kernel_thread: true, cpu_ticks: 3, is_over: false };
        assert_eq!(parse_stat(text), Some(stat));
        assert_eq!(parse_stat("42 (x) S 1"), None);
        assert_eq!(parse_stat(""), None);
    }

    #[test]
    fn the_effective_user_is_the_second_number() {
        let status = "Name:\tUid:\\n\nUmask:\t0022\nUid:\t0\t33\t0\t0\nGid:\t0\t0\t0\t0\n";
        assert_eq!(effective_uid(status), Some(33));
        assert_eq!(effective_uid("Uid:\t0\n"), None);
    }

    #[test]
    fn dynamic_linkers_are_known_by_name() {
        for linker in [
            "/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
            "/lib/ld-musl-x86_64.so.1",
            "/lib/ld-linux-aarch64.so.1",
            "/nix/store/abc-glibc-2.40/lib/ld-2.40.so",
            "/lib64/ld64.so.2",
        ] {
            assert!(is_dynamic_linker(linker), "{linker}");
        }
        for other in ["/usr/bin/ld", "/usr/bin/ld.gold", "/usr/sbin/ldconfig", "/bin/ldd", "", "/opt/ld-tool"]
        {
            assert!(!is_dynamic_linker(other), "{other}");
        }
    }

    #[test]
    fn maps_lines() {
        let text = "\
55d0c0a00000-55d0c0a28000 r--p 00000000 fe:00 131  /usr/bin/cat
55d0c0a28000-55d0c0b00000 r-xp 00028000 fe:00 131                    /usr/bin/a b (deleted)
7f0000000000-7f0000001000 rwxp 00000000 00:00 0 
7ffd1-7ffd2 r-xp 00000000 00:00 0 [vdso]
nonsense
5-4 r-xp 0 0:0 0 backwards
";
        let lines = parse_maps(text);
        let lines: Vec<NewMapping> = lines.into_iter().map(|line| line.mapping).collect();
        assert_eq!(lines.len(), 3);
        assert_eq!(lines[0].path, "/usr/bin/a b");
        assert_eq!(
            (lines[0].offset, lines[0].inode, lines[0].dev),
            (0x28000, 131, rustix::fs::makedev(0xfe, 0))
        );
        assert_eq!(lines[1].path, "");
        assert_eq!(lines[2].path, "[vdso]");
    }

    #[test]
    fn text_that_was_moved_to_memory_is_its_files() {
        // In two parts, of which the first is on huge pages.
        let moved = "\
1000-2000 r--p 00000000 fe:00 7 /bin/x
2000-3000 r-xp 00000000 00:00 0 
3000-4000 r-xp 00000000 00:00 0 
4000-5000 r--p 00003000 fe:00 7 /bin/x
";
        let seen = |text: &str| {
            let of = |line: CodeMapping| (line.mapping.inode, line.mapping.offset, line.link);
            parse_maps(text).into_iter().map(of).collect::<Vec<_>>()
        };
        assert_eq!(seen(moved), [(7, 0x1000, (0x1000, 0x2000)), (7, 0x2000, (0x1000, 0x2000))]);
        // A part of the text is left in the file.
        let part =
            moved.replace("2000-3000 r-xp 00000000 00:00 0 ", "2000-3000 r-xp 00001000 fe:00 7 /bin/x");
        assert_eq!(seen(&part), [(7, 0x1000, (0x2000, 0x3000)), (7, 0x2000, (0x2000, 0x3000))]);
        // In doubt it stays code without a file.
        for (from, to) in [
            ("00003000", "00004000"),
            ("4000-5000", "4800-5000"),
            ("4000-5000 r--p 00003000 fe:00 7", "4000-5000 r--p 00003000 fe:00 8"),
            ("3000-4000 r-xp 00000000 00:00 0 ", "3000-4000 r-xp 00000000 00:00 0 [heap]"),
            ("1000-2000 r--p 00000000 fe:00 7", "1000-2000 r--p 00000000 00:00 0"),
        ] {
            let other = moved.replace(from, to);
            assert_ne!(other, moved);
            assert!(seen(&other).iter().all(|(inode, ..)| *inode == 0), "{other}");
        }
    }

    proptest! {
        /// Checks that no text makes the parsers panic (R55).
        #[test]
        fn any_text_of_proc_is_read_without_panic(text in "(?s).{0,400}") {
            let _ = (parse_stat(&text), parse_maps(&text));
        }
    }
}
