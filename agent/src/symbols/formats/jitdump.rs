//! Jitdump files, `jit-PID.dump`, to which just-in-time compilers write the functions that they make, with code and lines. The
//! format is that of `perf inject`. The process may write anything there, and the file can have gigabytes.
//!
//! As of perf maps, only the records of wanted addresses count, and the last one wins. Of a file that grew, the new records are
//! read. Code is skipped. A record says how long it is, so the file is read from its begin to its end.

use std::collections::BTreeMap;

use gannet_symbols::demangle::{self, MAX_NAME_BYTES};

use super::perf_map::{Pages, Text};

/// `JiTD`, as a little-endian machine writes it.
const MAGIC: u32 = 0x4a69_5444;
const FILE_HEADER_BYTES: usize = 40;
const PREFIX_BYTES: usize = 16;
/// The part of a record before the name.
const LOAD_BYTES: usize = 56;
const MOVE_BYTES: usize = 64;
const DEBUG_BYTES: usize = 32;
/// Of the lines of one function, this many bytes are read.
const MAX_DEBUG_BYTES: u64 = 256 << 10;
/// Records for which one set of pages says what they hold.
const BLOCK_RECORDS: u32 = 512;
const MAX_BLOCKS: usize = 8192;
/// Addresses of one process whose names are remembered.
const MAX_ADDRESSES: usize = 4096;
/// Moves of code that one address is followed through.
const MAX_MOVES: usize = 8;
/// The compiler V8 adds the size of an ELF header to the addresses of lines, and these words to the names of functions.
const V8_SHIFT: u64 = 0x40;
const V8_TAGS: [&[u8]; 8] = [
    b"JS:",
    b"LazyCompile:",
    b"Function:",
    b"Script:",
    b"Eval:",
    b"RegExp:",
    b"Builtin:",
    b"BytecodeHandler:",
];

/// A function at an address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct DumpedFunction {
    pub(crate) name: String,
    /// Empty if unknown.
    pub(crate) file: String,
    /// 0 if unknown.
    pub(crate) line: u32,
}

/// The functions at some addresses in the jitdump of one process.
#[derive(Debug, Default)]
pub(crate) struct JitDump {
    /// Device and inode number.
    file: (u64, u64),
    /// The offset of the next record.
    end: u64,
    blocks: Vec<Block>,
    known: BTreeMap<u64, Option<DumpedFunction>>,
    /// Lines that the next function may have: its address, and where they stand.
    lines: Option<Lines>,
    /// The records so far were read completely.
    is_complete: bool,
}

/// Some records, one after the other.
#[derive(Debug)]
struct Block {
    begin: u64,
    records: u32,
    pages: Box<Pages>,
}

#[derive(Clone, Copy, Debug)]
struct Lines {
    code: u64,
    offset: u64,
    bytes: u64,
}

/// A record about code.
enum Record {
    Load { start: u64, size: u64, name: Vec<u8> },
    Move { from: u64, to: u64, size: u64 },
    Lines(Lines),
    Other,
}

impl JitDump {
    /// Searches the file for these addresses, and reads at most about `max_bytes` of it. Returns how many it read.
    pub(crate) fn update(
        &mut self,
        file: &impl Text,
        identity: (u64, u64),
        addresses: &[u64],
        max_bytes: u64,
    ) -> u64 {
        if identity != self.file || file.bytes() < self.end {
            *self = Self { file: identity, ..Self::default() };
        }
        let mut left = max_bytes;
        if self.end == 0 {
            match first_record(file) {
                Some(first) => self.end = first,
                None => return 0,
            }
        }
        let new: Vec<u64> =
            addresses.iter().copied().filter(|address| !self.known.contains_key(address)).collect();
        if self.known.len() + new.len() > MAX_ADDRESSES {
            self.known.clear();
        }
        let mut moved = Vec::new();
        let mut wanted: BTreeMap<u64, Option<DumpedFunction>> = addresses
            .iter()
            .take(MAX_ADDRESSES)
            .filter(|address| !self.known.contains_key(*address))
            .map(|address| (*address, None))
            .collect();
        let limit = self.end;
        if !wanted.is_empty() {
            self.search(file, limit, &mut wanted, &mut moved, &mut left);
        }
        if left == 0 {
            // The next update searches for these addresses again.
            self.is_complete = false;
            return max_bytes;
        }
        self.known.append(&mut wanted);
        self.read_on(file, &mut moved, &mut left);
        for (address, from, offset) in moved {
            let found = self.before(file, from, offset, &mut left);
            self.known.insert(address, found);
        }
        max_bytes - left
    }

    /// Returns the function at an address of the last update. None of a file that was not read to its end yet: a later record
    /// may name another one.
    pub(crate) fn find(&self, address: u64) -> Option<&DumpedFunction> {
        self.known.get(&address)?.as_ref().filter(|_| self.is_complete)
    }

    /// Reports whether the limit of bytes ended the last update.
    pub(crate) fn is_behind(&self) -> bool {
        !self.is_complete
    }

    pub(crate) fn bytes(&self) -> usize {
        let text = |known: &Option<DumpedFunction>| {
            known.as_ref().map_or(0, |known| known.name.len() + known.file.len())
        };
        self.known.values().map(text).sum::<usize>()
            + self.known.len() * 2 * size_of::<(u64, Option<DumpedFunction>)>()
            + self.blocks.len() * (size_of::<Block>() + size_of::<Pages>())
    }

    /// Reads the records behind those of the last update.
    fn read_on(&mut self, file: &impl Text, moved: &mut Vec<(u64, u64, u64)>, left: &mut u64) {
        self.is_complete = false;
        while let Some((record, bytes)) = read_record(file, self.end, left) {
            let Some(record) = record else { return };
            if self.blocks.last().is_none_or(|block| block.records >= BLOCK_RECORDS)
                && self.blocks.len() < MAX_BLOCKS
            {
                self.blocks.push(Block { begin: self.end, records: 0, pages: Box::default() });
            }
            if let Some(block) = self.blocks.last_mut() {
                block.records += 1;
                if let Record::Load { start, size, .. } | Record::Move { to: start, size, .. } = record {
                    block.pages.add(start, start.saturating_add(size));
                }
            }
            let mut known = std::mem::take(&mut self.known);
            note(file, self.end, record, &mut self.lines, &mut known, moved, left);
            self.known = known;
            self.end += bytes;
        }
        self.is_complete = *left > 0;
    }

    /// Searches the records before `limit`.
    fn search(
        &self,
        file: &impl Text,
        limit: u64,
        wanted: &mut BTreeMap<u64, Option<DumpedFunction>>,
        moved: &mut Vec<(u64, u64, u64)>,
        left: &mut u64,
    ) {
        let ends = self.blocks.iter().skip(1).map(|block| block.begin).chain([self.end]);
        for (block, end) in self.blocks.iter().zip(ends) {
            if !wanted.keys().any(|address| block.pages.may_hold(*address)) {
                continue;
            }
            let (mut at, mut lines) = (block.begin, None);
            while at < end.min(limit) {
                let Some((Some(record), bytes)) = read_record(file, at, left) else { break };
                note(file, at, record, &mut lines, wanted, moved, left);
                at += bytes;
            }
        }
    }

    /// Returns the function at an address before the record at this offset moved it.
    fn before(&self, file: &impl Text, address: u64, offset: u64, left: &mut u64) -> Option<DumpedFunction> {
        let (mut address, mut offset) = (address, offset);
        for _ in 0..MAX_MOVES {
            let (mut wanted, mut moved) = (BTreeMap::from([(address, None)]), Vec::new());
            self.search(file, offset, &mut wanted, &mut moved, left);
            match moved.pop() {
                Some((_, from, at)) => (address, offset) = (from, at),
                None => return wanted.remove(&address)?,
            }
        }
        None
    }
}

/// Takes a record: it names wanted addresses, or moves code to them. `moved` gets the address, its former address and the offset
/// of the record, for the last record about an address only.
fn note(
    file: &impl Text,
    at: u64,
    record: Record,
    lines: &mut Option<Lines>,
    wanted: &mut BTreeMap<u64, Option<DumpedFunction>>,
    moved: &mut Vec<(u64, u64, u64)>,
    left: &mut u64,
) {
    match record {
        Record::Load { start, size, name } => {
            let of_this = lines.take().filter(|lines| lines.code == start);
            let text = demangle::cut(&String::from_utf8_lossy(&name));
            for (address, known) in wanted.range_mut(start..start.saturating_add(size)) {
                moved.retain(|(of, ..)| of != address);
                let (file, line) =
                    of_this.and_then(|lines| line_of(file, lines, *address, &name, left)).unwrap_or_default();
                *known = Some(DumpedFunction { name: text.clone(), file, line });
            }
        }
        Record::Move { from, to, size } => {
            for (address, known) in wanted.range_mut(to..to.saturating_add(size)) {
                moved.retain(|(of, ..)| of != address);
                moved.push((*address, from.saturating_add(address - to), at));
                *known = None;
            }
        }
        Record::Lines(new) => *lines = Some(new),
        Record::Other => {}
    }
}

/// Finds the line of an address among the lines of a function: that of the last entry at or before it.
fn line_of(
    file: &impl Text,
    lines: Lines,
    address: u64,
    name: &[u8],
    left: &mut u64,
) -> Option<(String, u32)> {
    let bytes = read(file, lines.offset, lines.bytes.min(MAX_DEBUG_BYTES), left)?;
    let is_v8 = V8_TAGS.iter().any(|tag| name.starts_with(tag));
    let mut rest = bytes.get(DEBUG_BYTES..)?;
    let mut file_name = &b""[..];
    let mut best: Option<(u64, &[u8], u32)> = None;
    while let (Some(at), Some(line)) = (number(rest, 0), rest.get(8..12)) {
        let name_bytes = rest.get(16..)?;
        let Some(end) = name_bytes.iter().position(|byte| *byte == 0) else { break };
        // The mark of the same file as before.
        if name_bytes[..end] != [0xff] {
            file_name = &name_bytes[..end];
        }
        let at = if is_v8 { at.checked_sub(V8_SHIFT)? } else { at };
        let line = u32::from_le_bytes(line.try_into().ok()?);
        if at <= address && best.is_none_or(|(of, ..)| of <= at) {
            best = Some((at, file_name, line));
        }
        rest = &name_bytes[end + 1..];
    }
    let (_, file_name, line) = best?;
    // In doubt there is no line.
    let file_name = std::str::from_utf8(file_name).ok()?;
    let is_text = !file_name.is_empty() && !file_name.contains(char::is_control);
    is_text.then(|| (demangle::cut(file_name), line))
}

/// Returns the offset of the first record; none if the file is no jitdump of this machine's byte order.
fn first_record(file: &impl Text) -> Option<u64> {
    let mut header = [0; FILE_HEADER_BYTES];
    if file.read_at(0, &mut header) < header.len() || header[..4] != MAGIC.to_le_bytes() {
        return None;
    }
    let bytes = u64::from(u32::from_le_bytes(header.get(8..12)?.try_into().ok()?));
    (bytes >= FILE_HEADER_BYTES as u64).then_some(bytes)
}

/// Reads the record at an offset, and returns it with its length. The inner value is none if the bytes are used up; the outer one
/// if there is no complete record.
fn read_record(file: &impl Text, offset: u64, left: &mut u64) -> Option<(Option<Record>, u64)> {
    let mut head = [0; LOAD_BYTES + 128];
    if *left < head.len() as u64 {
        *left = 0;
        return Some((None, 0));
    }
    let read_bytes = file.read_at(offset, &mut head);
    *left -= head.len() as u64;
    let head = head.get(..read_bytes)?;
    let kind = u32::from_le_bytes(head.get(..4)?.try_into().ok()?);
    let bytes = u64::from(u32::from_le_bytes(head.get(4..8)?.try_into().ok()?));
    if bytes < PREFIX_BYTES as u64 || offset.checked_add(bytes)? > file.bytes() {
        return None;
    }
    let head = &head[..read_bytes.min(bytes as usize)];
    let record = match kind {
        0 if head.len() > LOAD_BYTES => {
            let name = if let Some(end) = head[LOAD_BYTES..].iter().position(|byte| *byte == 0) {
                head[LOAD_BYTES..LOAD_BYTES + end].to_vec()
            } else {
                let most = (bytes - LOAD_BYTES as u64).min(MAX_NAME_BYTES as u64 + 1);
                let mut name = read(file, offset + LOAD_BYTES as u64, most, left)?;
                name.truncate(name.iter().position(|byte| *byte == 0).unwrap_or(name.len()));
                name
            };
            Record::Load { start: number(head, 32)?, size: number(head, 40)?, name }
        }
        1 if head.len() >= MOVE_BYTES => {
            Record::Move { from: number(head, 32)?, to: number(head, 40)?, size: number(head, 48)? }
        }
        2 if head.len() >= DEBUG_BYTES => Record::Lines(Lines { code: number(head, 16)?, offset, bytes }),
        _ => Record::Other,
    };
    Some((Some(record), bytes))
}

/// Returns the number of 8 bytes at an offset.
fn number(bytes: &[u8], offset: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(offset..offset + 8)?.try_into().ok()?))
}

fn read(file: &impl Text, offset: u64, bytes: u64, left: &mut u64) -> Option<Vec<u8>> {
    *left = left.checked_sub(bytes)?;
    let mut buffer = vec![0; usize::try_from(bytes).ok()?];
    let read = file.read_at(offset, &mut buffer);
    buffer.truncate(read);
    Some(buffer)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    struct Fake(Vec<u8>);

    impl Text for Fake {
        fn bytes(&self) -> u64 {
            self.0.len() as u64
        }

        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> usize {
            let rest = self.0.get(offset as usize..).unwrap_or_default();
            let read = rest.len().min(buffer.len());
            buffer[..read].copy_from_slice(&rest[..read]);
            read
        }
    }

    impl Fake {
        fn new() -> Self {
            let mut bytes = MAGIC.to_le_bytes().to_vec();
            bytes.extend([1u32, 40, 62, 0, 7].iter().flat_map(|word| word.to_le_bytes()));
            bytes.extend([0; 16]);
            Self(bytes)
        }

        fn record(&mut self, kind: u32, body: &[u8]) {
            self.0.extend(kind.to_le_bytes());
            self.0.extend((body.len() as u32 + 16).to_le_bytes());
            self.0.extend([0; 8]);
            self.0.extend(body);
        }

        fn load(&mut self, start: u64, size: u64, name: &str) {
            let mut body = [7u32.to_le_bytes(), 7u32.to_le_bytes()].concat();
            body.extend([start, start, size, 1].iter().flat_map(|word| word.to_le_bytes()));
            body.extend(name.bytes().chain([0]));
            body.extend(vec![0xcc; size as usize]);
            self.record(0, &body);
        }

        fn moved(&mut self, from: u64, to: u64, size: u64) {
            let mut body = [0; 8].to_vec();
            body.extend([to, from, to, size, 1].iter().flat_map(|word| word.to_le_bytes()));
            self.record(1, &body);
        }

        fn lines(&mut self, code: u64, entries: &[(u64, u32, &[u8])]) {
            let mut body =
                [code, entries.len() as u64].iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
            for (at, line, file) in entries {
                body.extend(at.to_le_bytes());
                body.extend([*line, 0].iter().flat_map(|word| word.to_le_bytes()));
                body.extend(file.iter().chain(&[0]));
            }
            self.record(2, &body);
        }
    }

    fn found(dump: &JitDump, address: u64) -> Option<(&str, &str, u32)> {
        dump.find(address).map(|found| (found.name.as_str(), found.file.as_str(), found.line))
    }

    #[test]
    fn functions_have_names_and_lines() {
        let mut file = Fake::new();
        file.lines(0x1000, &[(0x1000, 3, b"a.js"), (0x1010, 4, &[0xff]), (0x1020, 9, b"b.js")]);
        file.load(0x1000, 0x40, "first");
        file.load(0x2000, 0x400, &"x".repeat(3000));
        file.lines(0x3000, &[(0x3044, 8, b"v8.js"), (0x3060, 9, &[0xff])]);
        file.load(0x3000, 0x40, "JS:*hot");
        let mut dump = JitDump::default();
        let addresses = [0xfff, 0x1000, 0x1011, 0x103f, 0x1040, 0x2001, 0x3005, 0x3021];
        let read = dump.update(&file, (1, 1), &addresses, u64::MAX);
        assert!(read < file.bytes() + 4096, "{read}");
        assert_eq!(found(&dump, 0x1000), Some(("first", "a.js", 3)));
        assert_eq!(found(&dump, 0x1011), Some(("first", "a.js", 4)));
        assert_eq!(found(&dump, 0x103f), Some(("first", "b.js", 9)));
        assert_eq!(found(&dump, 0x3005), Some(("JS:*hot", "v8.js", 8)));
        assert_eq!(found(&dump, 0x3021), Some(("JS:*hot", "v8.js", 9)));
        assert_eq!((found(&dump, 0xfff), found(&dump, 0x1040)), (None, None));
        assert!(found(&dump, 0x2001).is_some_and(|(name, ..)| name.starts_with("xxx") && name.len() < 2100));
    }

    /// Checks code that is overwritten and moved, in records that were read before, in one update and in several.
    #[test]
    fn the_last_record_about_an_address_counts() {
        let mut file = Fake::new();
        file.load(0x1000, 0x40, "old");
        file.load(0x1000, 0x20, "new");
        file.moved(0x1000, 0x5000, 0x20);
        file.moved(0x5000, 0x6000, 0x20);
        file.load(0x1000, 0x10, "newest");
        let addresses = [0x1000, 0x1010, 0x1030, 0x5008, 0x6008];
        let expected = [Some("newest"), Some("new"), Some("old"), Some("new"), Some("new")];
        let names =
            |dump: &JitDump| addresses.map(|address| dump.find(address).map(|found| found.name.clone()));
        let mut dump = JitDump::default();
        dump.update(&file, (1, 1), &addresses, u64::MAX);
        assert_eq!(names(&dump), expected.map(|name| name.map(str::to_owned)));
        // One address after the other, of records that were read already.
        let mut dump = JitDump::default();
        for address in addresses {
            dump.update(&file, (1, 1), &[address], u64::MAX);
        }
        assert_eq!(names(&dump), expected.map(|name| name.map(str::to_owned)));
        // A record after the other.
        let (mut grown, mut dump) = (Fake::new(), JitDump::default());
        for end in 40..=file.0.len() {
            grown.0.clear();
            grown.0.extend(&file.0[..end]);
            dump.update(&grown, (1, 1), &addresses, u64::MAX);
        }
        assert_eq!(names(&dump), expected.map(|name| name.map(str::to_owned)));
    }

    #[test]
    fn a_limited_reading_gives_no_name_until_it_is_done() {
        let mut file = Fake::new();
        file.load(0x1000, 0x40, "old");
        for number in 0..2000 {
            file.load(0x10_0000 + number * 0x1000, 64, "filler");
        }
        file.load(0x1000, 0x40, "new");
        let mut dump = JitDump::default();
        for update in 0.. {
            dump.update(&file, (1, 1), &[0x1000], 64 << 10);
            if !dump.is_behind() {
                assert!((4..40).contains(&update), "{update}");
                break;
            }
            assert_eq!(found(&dump, 0x1000), None);
        }
        assert_eq!(found(&dump, 0x1000), Some(("new", "", 0)));
        // An address that was not asked for before needs few records.
        let read = dump.update(&file, (1, 1), &[0x10_5003], u64::MAX);
        assert_eq!(found(&dump, 0x10_5003), Some(("filler", "", 0)));
        assert!(read < file.bytes(), "{read}");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_harm(
            changes in proptest::collection::vec((0usize..700, any::<u8>()), 0..30),
            addresses in proptest::collection::vec(0x0fffu64..0x6100, 0..20),
        ) {
            let mut file = Fake::new();
            file.lines(0x1000, &[(0x1000, 3, b"a.js"), (0x1010, 4, &[0xff])]);
            file.load(0x1000, 0x40, "first");
            file.moved(0x1000, 0x5000, 0x20);
            file.load(0x1000, 0x40, "second");
            for (at, value) in changes {
                if let Some(byte) = file.0.get_mut(at) {
                    *byte = value;
                }
            }
            for limit in [0, 100, 1000, u64::MAX] {
                let mut dump = JitDump::default();
                prop_assert!(dump.update(&file, (1, 1), &addresses, limit) <= limit);
            }
        }
    }
}
