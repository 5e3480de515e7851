//! Perf maps, `/tmp/perf-PID.map`, in which just-in-time compilers list the functions that they make. The process may write
//! anything there, so names are cut and cleaned, and the size has a limit.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read},
    time::SystemTime,
};

use super::{
    super::demangle,
    symbol_table::{SymbolTable, SymbolTableBuilder},
};
use crate::{
    model::ProcessKey,
    process::{check_identity, open_in_root},
};

const MAX_FILE_BYTES: u64 = 32 << 20;
const MAX_TABLE_BYTES: usize = 32 << 20;
const MAX_NAME_BYTES: usize = 512;

/// The perf map of one process.
#[derive(Debug)]
pub(crate) struct PerfMap {
    table: SymbolTable,
    stamp: (u64, Option<SystemTime>),
}

impl PerfMap {
    /// Reads the map of a live process. Returns `known` if it has not changed.
    pub(crate) fn read(key: ProcessKey, known: Option<Self>) -> Option<Self> {
        let Some(file) = open(key) else { return known };
        let metadata = file.metadata().ok()?;
        let stamp = (metadata.len(), metadata.modified().ok());
        if let Some(known) = known
            && known.stamp == stamp
        {
            return Some(known);
        }
        // Another process may have taken the PID before its file was opened.
        check_identity(key)
            .is_ok()
            .then(|| Self { table: parse(BufReader::new(file.take(MAX_FILE_BYTES))), stamp })
    }

    pub(crate) fn find(&self, address: u64) -> Option<String> {
        Some(demangle::cut(&String::from_utf8_lossy(self.table.find(address)?)))
    }

    pub(crate) fn bytes(&self) -> usize {
        self.table.bytes()
    }
}

fn open(key: ProcessKey) -> Option<File> {
    let status = fs::read_to_string(format!("/proc/{}/status", key.tgid)).ok()?;
    // The file name holds the PID in the process's own namespace: the last one of the line.
    let own =
        status.lines().find_map(|line| line.strip_prefix("NStgid:"))?.split_ascii_whitespace().next_back()?;
    let own: u32 = own.parse().ok()?;
    open_in_root(key.tgid, &format!("/tmp/perf-{own}.map")).ok()
}

fn parse(mut text: impl BufRead) -> SymbolTable {
    let mut builder = SymbolTableBuilder::new(MAX_TABLE_BYTES);
    let mut line = Vec::new();
    let mut number = 0;
    loop {
        line.clear();
        // A line may have any length; a line is read in parts of 4096 bytes, and only the first part has a name.
        match text.by_ref().take(4096).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
        number += 1;
        // `START SIZE name`, both numbers in hex, with or without 0x. A later line replaces an earlier one: compilers
        // reuse memory.
        if let Some((start, size, name)) = parse_line(&line)
            && builder.push(start, size, &name[..name.len().min(MAX_NAME_BYTES)], number).is_err()
        {
            break;
        }
    }
    builder.finish()
}

fn parse_line(line: &[u8]) -> Option<(u64, u64, &[u8])> {
    let mut words = line.trim_ascii().splitn(3, u8::is_ascii_whitespace);
    let mut number = || {
        let text = std::str::from_utf8(words.next()?).ok()?;
        u64::from_str_radix(text.strip_prefix("0x").unwrap_or(text), 16).ok()
    };
    let (start, size) = (number()?, number()?);
    let name = words.next()?.trim_ascii();
    (size > 0 && !name.is_empty()).then_some((start, size, name))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn later_lines_replace_earlier_ones() {
        let text = "7f00 10 LazyCompile:*fib /app.js:3\n0x7f20 0x10 second\n7f00 8 newer\nbad\n zz 1 x\n7f40 0 empty\n";
        let table = parse(text.as_bytes());
        let name = |address| table.find(address).map(|name| String::from_utf8_lossy(name).into_owned());
        assert_eq!(name(0x7f00).as_deref(), Some("newer"));
        assert_eq!(name(0x7f2f).as_deref(), Some("second"));
        assert_eq!(name(0x7f40), None);
        assert_eq!(table.len(), 2);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_harm(text in proptest::collection::vec(any::<u8>(), 0..3000)) {
            prop_assert!(parse(text.as_slice()).bytes() <= MAX_TABLE_BYTES);
        }
    }
}
