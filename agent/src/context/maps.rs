//! The mappings of a process among which its context and its thread-local variables are.

use std::{
    collections::HashSet,
    fs::File,
    io::{self, BufRead as _, BufReader, Read as _},
};

use crate::model::{MapsFile, MapsLine};

/// Bytes that are read of the list of mappings.
const MAX_BYTES: u64 = 4 << 20;
/// Mappings with the name of a context that are tried. A process has one.
const MAX_CONTEXTS: usize = 4;
/// Files that are searched.
const MAX_FILES: usize = 512;

/// The names that a context's mapping may have, as `/proc/PID/maps` shows them. Before Linux 6.2 a shared anonymous one has none.
const CONTEXT_NAMES: [&str; 3] = ["/memfd:OTEL_CTX", "[anon_shmem:OTEL_CTX]", "[anon:OTEL_CTX]"];

/// The mappings that matter here.
#[derive(Debug, Default)]
pub(super) struct Maps {
    /// First addresses of mappings that may hold a context.
    pub(super) contexts: Vec<u64>,
    /// Files with code, each once, in the order of their addresses.
    pub(super) files: Vec<MappedCode>,
}

/// The code of a file in a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MappedCode {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) offset: u64,
    pub(super) id: MapsFile,
    pub(super) path: String,
}

/// Reads the mappings of a process, up to a bound.
pub(super) fn read(tgid: u32) -> io::Result<Maps> {
    let lines = BufReader::new(File::open(format!("/proc/{tgid}/maps"))?.take(MAX_BYTES)).split(b'\n');
    let mut maps = Maps::default();
    let mut seen = HashSet::new();
    for line in lines {
        maps.add(&String::from_utf8_lossy(&line?), &mut seen);
    }
    Ok(maps)
}

impl Maps {
    fn add(&mut self, line: &str, seen: &mut HashSet<MapsFile>) {
        let Some(line) = MapsLine::parse(line) else { return };
        if CONTEXT_NAMES.iter().any(|name| line.path.starts_with(name)) {
            if line.is_readable() && self.contexts.len() < MAX_CONTEXTS {
                self.contexts.push(line.start);
            }
        } else if line.path.starts_with('/') && line.is_code() && self.files.len() < MAX_FILES {
            let id = line.file();
            if seen.insert(id.clone()) {
                let MapsLine { start, end, offset, path, .. } = line;
                self.files.push(MappedCode { start, end, offset, id, path: path.to_owned() });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_and_code_are_found_among_mappings() {
        let mut maps = Maps::default();
        let mut seen = HashSet::new();
        for line in [
            "55d0de000000-55d0de001000 r--p 00000000 08:01 7                          /usr/bin/shop one",
            "55d0de001000-55d0de002000 r-xp 00001000 08:01 7                          /usr/bin/shop one",
            "55d0de003000-55d0de004000 r-xp 00003000 08:01 7                          /usr/bin/shop one",
            "7f49ea02b000-7f49ea02c000 rw-p 00000000 00:01 128830                     /memfd:OTEL_CTX (deleted)",
            "7f49ea02d000-7f49ea02e000 rw-p 00000000 00:00 0                          [anon:OTEL_CTX]",
            "7f49ea02f000-7f49ea030000 ---p 00000000 00:00 0                          [anon:OTEL_CTX]",
            "7f49ea031000-7f49ea032000 rw-p 00000000 00:00 0 ",
            "nonsense",
            "",
        ] {
            maps.add(line, &mut seen);
        }
        assert_eq!(maps.contexts, [0x7f49_ea02_b000, 0x7f49_ea02_d000]);
        let seen: Vec<_> =
            maps.files.iter().map(|file| (file.start, file.offset, file.path.as_str())).collect();
        assert_eq!(seen, [(0x55d0_de00_1000, 0x1000, "/usr/bin/shop one")]);
        for _ in 0..10 {
            maps.add("1000-2000 rw-p 0 00:00 0  [anon:OTEL_CTX]", &mut HashSet::new());
        }
        assert_eq!(maps.contexts.len(), MAX_CONTEXTS, "a process may make many");
    }
}
