//! Perf maps, `/tmp/perf-PID.map`, in which just-in-time compilers list the functions that they make. The process may write
//! anything there, and long-lived ones write hundreds of megabytes.
//!
//! So a map is never held. It is searched for the wanted addresses, in pieces. Compilers reuse memory, so the last line that
//! holds an address names it, wherever it is. New addresses are searched from the end of the file to its begin. For each
//! piece that was read, a set of pages says which code it describes, so that most pieces need not be read again. Of a file
//! that grew, the new lines are read, and replace the names that they overlap.

use std::{collections::BTreeMap, fs::File, os::unix::fs::FileExt};

use gannet_symbols::demangle::{self, MAX_NAME_BYTES};

/// The fuzzer's inputs are small, and shall have several pieces too.
pub(crate) const PIECE_BYTES: u64 = if cfg!(fuzzing) { 8 << 10 } else { 256 << 10 };
/// The part of a line that is read.
pub(crate) const MAX_LINE_BYTES: usize = 4096;
/// A larger map is searched from this many bytes before its end.
const MAX_FILE_BYTES: u64 = 2 << 30;
/// Addresses of one process whose names are remembered.
const MAX_ADDRESSES: usize = 4096;
/// The bits of a page number that [`Pages`] ignores: 64 KiB of code.
const PAGE_BITS: u32 = 16;

/// The answer for one address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Listed {
    Name(String),
    /// No line holds the address.
    Nowhere,
    /// The limit of bytes ended the search before a line was found. The next update goes on.
    NotYet,
}

/// The names of some addresses in the perf map of one process.
#[derive(Debug, Default)]
pub(crate) struct PerfMap {
    /// Device and inode number.
    file: (u64, u64),
    /// All known addresses take part in the lines that begin before this offset, as far as [`Known::low`] says.
    end: u64,
    /// The rest of the line at `end` does not count: the line is too long.
    is_inside_line: bool,
    /// The pages of the functions in each piece of the file; none for a piece that was not read.
    pieces: Vec<Option<Box<Pages>>>,
    known: BTreeMap<u64, Known>,
}

#[derive(Debug)]
struct Known {
    name: Option<Box<[u8]>>,
    /// The number of pieces, from the first one, that were not searched yet.
    low: u64,
}

/// Bytes that may be read.
#[derive(Clone, Copy, Debug)]
struct Left(u64);

impl Left {
    /// Takes a number of bytes. Returns whether there were as many.
    fn take(&mut self, bytes: u64) -> bool {
        let is_enough = self.0 >= bytes;
        self.0 = self.0.saturating_sub(bytes);
        is_enough
    }
}

impl PerfMap {
    /// Searches the map for these addresses, and reads at most about `max_bytes` of it. Returns how many it read.
    pub(crate) fn update(
        &mut self,
        file: &impl Text,
        identity: (u64, u64),
        addresses: &[u64],
        max_bytes: u64,
    ) -> u64 {
        let bytes = file.bytes();
        let mut left = Left(max_bytes);
        if identity != self.file || bytes < self.end {
            *self = Self { file: identity, ..Self::default() };
        }
        let new = addresses.iter().filter(|address| !self.known.contains_key(*address)).count();
        // With more new lines than can be read, the search from the end finds more.
        if self.known.len() + new > MAX_ADDRESSES || bytes - self.end > max_bytes {
            self.known.clear();
        }
        if self.known.is_empty() {
            let piece = bytes / PIECE_BYTES;
            self.begin_at(file, piece);
            if piece > 0 && self.is_inside_line && is_unfinished(file, self.end, bytes) {
                // The line counts when it is complete, so it is read from its begin.
                self.begin_at(file, piece - 1);
            }
        }
        self.read_on(file, bytes, &mut left);
        let low = self.end.div_ceil(PIECE_BYTES);
        for address in addresses.iter().take(MAX_ADDRESSES) {
            self.known.entry(*address).or_insert(Known { name: None, low });
        }
        self.search_back(file, &mut left);
        max_bytes - left.0
    }

    /// Returns the name at an address of the last update.
    pub(crate) fn find(&self, address: u64) -> Listed {
        match self.known.get(&address) {
            Some(Known { name: Some(name), .. }) => {
                Listed::Name(demangle::cut(&String::from_utf8_lossy(name)))
            }
            Some(Known { low: 0, .. }) => Listed::Nowhere,
            _ => Listed::NotYet,
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        let names = self.known.values().map(|known| known.name.as_deref().map_or(0, <[u8]>::len));
        names.sum::<usize>()
            + self.known.len() * size_of::<(u64, Known)>() * 2
            + self.pieces.iter().flatten().count() * size_of::<Pages>()
    }

    /// Lets [`Self::read_on`] begin at this piece.
    fn begin_at(&mut self, file: &impl Text, piece: u64) {
        self.end = piece * PIECE_BYTES;
        self.pieces.truncate(usize::try_from(piece).unwrap_or(usize::MAX));
        self.is_inside_line = is_inside_line(file, self.end);
    }

    /// Reads the lines behind those of the last update.
    fn read_on(&mut self, file: &impl Text, bytes: u64, left: &mut Left) {
        let mut buffer = Vec::new();
        while self.end < bytes {
            read(file, self.end, PIECE_BYTES.min(bytes - self.end), &mut buffer);
            if buffer.is_empty() || !left.take(buffer.len() as u64) {
                return;
            }
            let begin = self.end;
            let lines = Lines { text: &buffer, at: 0, is_inside: self.is_inside_line };
            self.end = begin + self.note_lines(begin, lines, u64::MAX) as u64;
            if self.end == begin {
                // The compiler is in the middle of a line.
                return;
            }
        }
    }

    /// Takes the lines that begin before `limit`. Returns where the next one begins.
    fn note_lines(&mut self, begin: u64, mut lines: Lines<'_>, limit: u64) -> usize {
        while let Some((at, line)) = lines.next() {
            let at = begin + at as u64;
            if at >= limit {
                break;
            }
            let Some((start, size, name)) = parse_line(line) else { continue };
            let piece = usize::try_from(at / PIECE_BYTES).unwrap_or(usize::MAX);
            if piece >= self.pieces.len() {
                self.pieces.resize_with(piece + 1, || None);
            }
            let end = start.saturating_add(size);
            self.pieces[piece].get_or_insert_default().add(start, end);
            for (_, known) in self.known.range_mut(start..end) {
                *known = Known { name: Some(name[..name.len().min(MAX_NAME_BYTES + 1)].into()), low: 0 };
            }
        }
        self.is_inside_line = lines.is_inside;
        lines.at
    }

    /// Searches the pieces before `end`, the last one first, for addresses that have no name yet.
    fn search_back(&mut self, file: &impl Text, left: &mut Left) {
        let mut open: Vec<(u64, u64)> = self
            .known
            .iter()
            .filter(|(_, known)| known.low > 0)
            .map(|(address, known)| (*address, known.low))
            .collect();
        let pieces = open.iter().map(|(_, low)| *low).max().unwrap_or(0);
        let first = self.end.saturating_sub(MAX_FILE_BYTES) / PIECE_BYTES;
        let mut reached = first;
        let mut buffer = Vec::new();
        for piece in (first..pieces).rev() {
            let pages = self.pieces.get(piece as usize).and_then(Option::as_deref);
            let mut wanted: BTreeMap<u64, Option<Box<[u8]>>> = open
                .iter()
                .filter(|(address, low)| *low > piece && pages.is_none_or(|pages| pages.may_hold(*address)))
                .map(|(address, _)| (*address, None))
                .collect();
            if wanted.is_empty() {
                continue;
            }
            let begin = piece * PIECE_BYTES;
            let length = (self.end - begin).min(PIECE_BYTES + MAX_LINE_BYTES as u64);
            if !left.take(length) {
                reached = piece + 1;
                break;
            }
            read(file, begin, length, &mut buffer);
            let limit = self.end.min(begin + PIECE_BYTES);
            let found = search_piece(&buffer, is_inside_line(file, begin), limit - begin, &mut wanted);
            if piece as usize >= self.pieces.len() {
                self.pieces.resize_with(piece as usize + 1, || None);
            }
            self.pieces[piece as usize].get_or_insert(Box::new(found));
            for (address, name) in wanted {
                if let Some(known) = self.known.get_mut(&address).filter(|_| name.is_some()) {
                    *known = Known { name, low: 0 };
                }
            }
            open.retain(|(address, _)| self.known.get(address).is_some_and(|known| known.low > 0));
            if open.is_empty() {
                return;
            }
        }
        for (address, _) in open {
            if let Some(known) = self.known.get_mut(&address) {
                known.low = if reached <= first { 0 } else { known.low.min(reached) };
            }
        }
    }
}

/// Finds for each address the name in the last line that holds it, of the lines that begin before `limit`. Returns the pages
/// of all those lines.
fn search_piece(
    text: &[u8],
    is_inside: bool,
    limit: u64,
    wanted: &mut BTreeMap<u64, Option<Box<[u8]>>>,
) -> Pages {
    let mut pages = Pages::default();
    let mut lines = Lines { text, at: 0, is_inside };
    while let Some((at, line)) = lines.next() {
        if at as u64 >= limit {
            break;
        }
        let Some((start, size, name)) = parse_line(line) else { continue };
        let end = start.saturating_add(size);
        pages.add(start, end);
        for (_, found) in wanted.range_mut(start..end) {
            *found = Some(name[..name.len().min(MAX_NAME_BYTES + 1)].into());
        }
    }
    pages
}

/// Pages of code, each by some bits of its number: a page that is not there may seem to be.
#[derive(Clone, Debug)]
pub(super) struct Pages([u64; Pages::WORDS]);

impl Default for Pages {
    fn default() -> Self {
        Self([0; Self::WORDS])
    }
}

impl Pages {
    const WORDS: usize = 32;
    const BITS: u64 = Self::WORDS as u64 * 64;

    /// Adds the pages of the addresses from `start` up to `end`.
    pub(super) fn add(&mut self, start: u64, end: u64) {
        let (first, last) = (start >> PAGE_BITS, end.saturating_sub(1).max(start) >> PAGE_BITS);
        for page in first..=last.min(first + Self::BITS) {
            let bit = page % Self::BITS;
            self.0[(bit / 64) as usize] |= 1 << (bit % 64);
        }
    }

    pub(super) fn may_hold(&self, address: u64) -> bool {
        let bit = (address >> PAGE_BITS) % Self::BITS;
        self.0[(bit / 64) as usize] & 1 << (bit % 64) != 0
    }
}

/// The complete lines of a text. Of a line that is longer than [`MAX_LINE_BYTES`] it returns the first part.
struct Lines<'a> {
    text: &'a [u8],
    /// The offset of the next line.
    at: usize,
    /// The text at `at` is the rest of a line that does not count.
    is_inside: bool,
}

impl<'a> Lines<'a> {
    /// Returns a line and where it begins.
    fn next(&mut self) -> Option<(usize, &'a [u8])> {
        loop {
            let begin = self.at;
            let rest = self.text.get(begin..).filter(|rest| !rest.is_empty())?;
            let newline = rest.iter().position(|byte| *byte == b'\n');
            match newline {
                Some(length) => self.at = begin + length + 1,
                None if self.is_inside || rest.len() > MAX_LINE_BYTES => self.at = self.text.len(),
                None => return None,
            }
            let counts = !std::mem::replace(&mut self.is_inside, newline.is_none());
            if counts {
                let line = &rest[..newline.unwrap_or(rest.len()).min(MAX_LINE_BYTES)];
                return Some((begin, line));
            }
        }
    }
}

/// The bytes of a perf map.
pub(crate) trait Text {
    fn bytes(&self) -> u64;
    /// Reads up to the length of the buffer. Returns 0 at the end, and if reading fails.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> usize;
}

impl Text for File {
    fn bytes(&self) -> u64 {
        self.metadata().map_or(0, |metadata| metadata.len())
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> usize {
        FileExt::read_at(self, buffer, offset).unwrap_or(0)
    }
}

/// Fills the buffer with this many bytes, or fewer at the end of the file.
fn read(file: &impl Text, offset: u64, bytes: u64, buffer: &mut Vec<u8>) {
    buffer.resize(usize::try_from(bytes).unwrap_or(0), 0);
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(offset + filled as u64, &mut buffer[filled..]) {
            0 => break,
            read => filled += read,
        }
    }
    buffer.truncate(filled);
}

/// Reports whether no line begins at this offset.
fn is_inside_line(file: &impl Text, offset: u64) -> bool {
    let mut before = [0];
    offset > 0 && file.read_at(offset - 1, &mut before) == 1 && before[0] != b'\n'
}

/// Reports whether the compiler is in the middle of the line at this offset.
fn is_unfinished(file: &impl Text, offset: u64, bytes: u64) -> bool {
    let mut rest = Vec::new();
    bytes - offset <= MAX_LINE_BYTES as u64 && {
        read(file, offset, bytes - offset, &mut rest);
        !rest.contains(&b'\n')
    }
}

/// Reads `START SIZE name`, both numbers in hex, with or without 0x.
pub(crate) fn parse_line(line: &[u8]) -> Option<(u64, u64, &[u8])> {
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
    use std::{cell::Cell, fmt::Write as _};

    use proptest::prelude::*;

    use super::*;

    const NO_LIMIT: u64 = u64::MAX;

    #[derive(Default)]
    struct Fake {
        text: Vec<u8>,
        read: Cell<u64>,
    }

    impl Text for Fake {
        fn bytes(&self) -> u64 {
            self.text.len() as u64
        }

        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> usize {
            let rest = self.text.get(offset as usize..).unwrap_or_default();
            let read = rest.len().min(buffer.len());
            buffer[..read].copy_from_slice(&rest[..read]);
            self.read.set(self.read.get() + read as u64);
            read
        }
    }

    fn of(text: &str) -> Fake {
        Fake { text: text.as_bytes().to_vec(), ..Fake::default() }
    }

    fn name(text: &str) -> Listed {
        Listed::Name(text.to_owned())
    }

    /// Lines of `bytes` bytes about functions of 32 bytes, from an address on.
    fn filler(bytes: usize, from: u64) -> String {
        let mut text = String::new();
        for number in 0.. {
            if text.len() >= bytes {
                break;
            }
            let start = from + number * 32;
            writeln!(text, "{start:x} 20 filler_{start:016x}_filler_filler_filler").unwrap();
        }
        text
    }

    /// Checks a line over the end of a piece that is half written when its address is wanted first.
    #[test]
    fn a_line_that_is_half_written_between_pieces_names_code_later() {
        for written in [8, 10, 20] {
            let piece = PIECE_BYTES as usize;
            let mut text = filler(piece - 100, 0x10_0000);
            text += &" ".repeat(piece - 8 - text.len() - 1);
            text.push('\n');
            let line = "7f00 10 half_written\n";
            let mut map = PerfMap::default();
            let part = of(&format!("{text}{}", &line[..written]));
            map.update(&part, (1, 1), &[0x7f00, 0x10_0000], NO_LIMIT);
            assert_eq!(map.find(0x7f00), Listed::Nowhere);
            map.update(&of(&format!("{text}{line}7e00 10 next\n")), (1, 1), &[0x7f00, 0x7e00], NO_LIMIT);
            assert_eq!(map.find(0x7f00), name("half_written"), "{written} bytes were written");
            assert_eq!(map.find(0x7e00), name("next"));
            assert!(matches!(map.find(0x10_0000), Listed::Name(_)));
        }
    }

    #[test]
    fn later_lines_replace_earlier_ones() {
        let text = "7f00 10 LazyCompile:*fib /app.js:3\n0x7f20 0x10 second\n7f00 8 newer\nbad\n zz 1 x\n7f40 0 empty\n7f50 8 cut";
        let addresses = [0x7f00, 0x7f0f, 0x7f2f, 0x7f40, 0x7f50];
        let mut map = PerfMap::default();
        map.update(&of(text), (1, 1), &addresses, NO_LIMIT);
        let found: Vec<Listed> = addresses.iter().map(|address| map.find(*address)).collect();
        let old = name("LazyCompile:*fib /app.js:3");
        assert_eq!(found, [name("newer"), old, name("second"), Listed::Nowhere, Listed::Nowhere]);
        // The compiler writes on: the rest of a line, and a newer function.
        map.update(&of(&format!("{text}_off\n7f08 8 newest\n")), (1, 1), &addresses, NO_LIMIT);
        assert_eq!([map.find(0x7f00), map.find(0x7f0f)], [name("newer"), name("newest")]);
        assert_eq!(map.find(0x7f50), name("cut_off"));
    }

    #[test]
    fn the_newest_line_wins_wherever_it_is() {
        let address = 0x7000_0000;
        for (before, after) in [(0, 3_000_000), (3_000_000, 0), (1_500_000, 1_500_000), (0, 0)] {
            let text = format!(
                "{address:x} 10 old\n{}{address:x} 10 new\n{}",
                filler(before, 0x1000),
                filler(after, 0x1000)
            );
            let mut map = PerfMap::default();
            map.update(&of(&text), (1, 1), &[address, 0x1020], NO_LIMIT);
            assert_eq!(map.find(address), name("new"), "{before} {after}");
        }
    }

    /// Checks what a map that grows each second costs: the new lines, and few pieces for addresses that were not asked for.
    #[test]
    fn a_map_that_grows_is_not_read_again() {
        let mut file = of(&filler(16 << 20, 0));
        let mut map = PerfMap::default();
        assert!(map.update(&file, (1, 1), &[u64::MAX - 1], NO_LIMIT) >= 16 << 20);
        for second in 0..20 {
            let grown = 64 << 10;
            file.text.extend(filler(grown, 0x1000_0000 + second * (1 << 20)).bytes());
            file.read.set(0);
            // Old code that was not asked for before, and new code.
            let addresses = [0x5_0000 + second * 0x1234, 0x1000_0000 + second * (1 << 20) + 5];
            map.update(&file, (1, 1), &addresses, NO_LIMIT);
            for address in addresses {
                assert!(matches!(map.find(address), Listed::Name(_)), "{second} {address:x}");
            }
            assert!(file.read.get() <= (4 * PIECE_BYTES) + 2 * grown as u64, "{} bytes", file.read.get());
        }
        assert!(map.bytes() < 64 << 10, "{} bytes", map.bytes());
    }

    #[test]
    fn a_search_that_was_limited_goes_on() {
        let file = of(&format!("7000000000 10 first\n{}", filler(8 << 20, 0x1000)));
        let mut map = PerfMap::default();
        let mut updates = 0;
        while map.find(0x70_0000_0000) == Listed::NotYet {
            file.read.set(0);
            let read = map.update(&file, (1, 1), &[0x70_0000_0000], 1 << 20);
            assert!(read <= 1 << 20 && file.read.get() <= (1 << 20) + PIECE_BYTES, "{read}");
            updates += 1;
        }
        assert_eq!(map.find(0x70_0000_0000), name("first"));
        assert!((8..=11).contains(&updates), "{updates}");
    }

    #[test]
    fn another_file_or_a_cut_one_is_read_from_the_begin() {
        let mut map = PerfMap::default();
        map.update(&of("10 10 first\n20 10 x\n"), (1, 1), &[0x10], NO_LIMIT);
        map.update(&of("10 10 second\n20 10 x\n"), (1, 2), &[0x10], NO_LIMIT);
        assert_eq!(map.find(0x10), name("second"));
        map.update(&of("10 10 third\n"), (1, 2), &[0x10], NO_LIMIT);
        assert_eq!(map.find(0x10), name("third"));
    }

    #[test]
    fn lines_without_end_hide_no_others() {
        let long = "x".repeat(2 * PIECE_BYTES as usize);
        let text = format!("10 10 a\n20 10 {long}\n30 10 b\n40 10 {long}");
        for limit in [NO_LIMIT, 1 << 20] {
            let mut map = PerfMap::default();
            for _ in 0..9 {
                map.update(&of(&text), (1, 1), &[0x10, 0x20, 0x30], limit);
            }
            assert_eq!([map.find(0x10), map.find(0x30)], [name("a"), name("b")]);
            let Listed::Name(cut) = map.find(0x20) else { panic!() };
            assert!(cut.len() < MAX_LINE_BYTES);
        }
        assert!(map_of(&text, &[0x10]).bytes() < 1 << 20);
    }

    fn map_of(text: &str, addresses: &[u64]) -> PerfMap {
        let mut map = PerfMap::default();
        map.update(&of(text), (1, 1), addresses, NO_LIMIT);
        map
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_harm(
            text in proptest::collection::vec(any::<u8>(), 0..3000),
            addresses in proptest::collection::vec(any::<u64>(), 0..20),
        ) {
            let mut map = PerfMap::default();
            let file = Fake { text, ..Fake::default() };
            for limit in [0, 1, 1000, NO_LIMIT] {
                prop_assert!(map.update(&file, (1, 1), &addresses, limit) <= limit);
            }
            prop_assert!(addresses.iter().all(|address| map.find(*address) != Listed::NotYet));
        }

        /// Checks a map that grows and is read in steps against the plain rule: the last complete line counts.
        #[test]
        fn a_map_read_in_steps_equals_one_read_at_once(
            functions in proptest::collection::vec((0u64..0x40_0000, 1u64..0x2_0000, 0usize..6000), 1..400),
            steps in proptest::collection::vec(0usize..1_500_000, 1..6),
            addresses in proptest::collection::vec(0u64..0x40_0000, 1..40),
        ) {
            let mut text = String::new();
            for (number, (start, size, length)) in functions.iter().enumerate() {
                writeln!(text, "{start:x} {size:x} f{number}{}", "_".repeat(*length)).unwrap();
            }
            let mut map = PerfMap::default();
            let mut ends: Vec<usize> = steps.iter().map(|step| *step % (text.len() + 1)).collect();
            ends.sort_unstable();
            ends.push(text.len());
            for (step, end) in ends.into_iter().enumerate() {
                // Each step asks for more of the addresses.
                let wanted = &addresses[..((step + 1) * 10).min(addresses.len())];
                map.update(&of(&text[..end]), (1, 1), wanted, NO_LIMIT);
                // A line of more than the limit counts before it ends.
                let complete = text[..end].rfind('\n').map_or(0, |at| at + 1);
                if end - complete > MAX_LINE_BYTES {
                    continue;
                }
                let lines = text[..complete].lines().count();
                for address in wanted {
                    let held = |(start, size, _): &&(u64, u64, usize)| (*start..start + size).contains(address);
                    let last = functions[..lines].iter().enumerate().rev().find(|(_, function)| held(function));
                    match (map.find(*address), last) {
                        (Listed::Name(name), Some((number, _))) => {
                            prop_assert_eq!(name.split('_').next().unwrap(), format!("f{number}"));
                        }
                        (Listed::Nowhere, None) => {}
                        (found, last) => prop_assert!(false, "{address:x}: {found:?} {last:?}"),
                    }
                }
            }
        }
    }
}
