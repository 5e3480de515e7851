//! The form of a table on disk, where it survives restarts.
//!
//! ```text
//! 0   8   "gannetUT"
//! 8   4   version
//! 12  4   CRC-32 of everything behind it
//! 16  16  content id of the table's file
//! 32  4   architecture: 1 x86_64, 2 aarch64
//! 36  4   rules
//! 40  8   base
//! 48  4   granules
//! 52  4   lines
//! 56  4   segments
//! 60  4   bytes of build id
//! 64      rules (16 bytes each), lines (64), segments (40), build id
//! ```
//! All numbers are little-endian. [`store`] writes the complete file under another name and renames it, so that a reader sees
//! all of it or nothing. The checksum detects later damage.
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;

use gannet_elf::{Arch, BuildId, ContentId, Segment, Segments};

use crate::format::{CacheLine, LINE_BYTES, MAX_LINES, MAX_RULES, UnwindRule};
use crate::table::UnwindTable;

const MAGIC: &[u8; 8] = b"gannetUT";
/// The version of the layout and of the meaning of tables. A file of another version is built again.
pub const VERSION: u32 = 7;
const HEADER_BYTES: usize = 64;
const SUM_FROM: usize = 16;
const RULE_BYTES: usize = size_of::<UnwindRule>();
const SEGMENT_BYTES: usize = 40;
const MAX_SEGMENTS: usize = 1 << 16;
const MAX_BUILD_ID_BYTES: usize = 64;

/// A table from the cache, with the properties of its file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CachedTable {
    /// The table as it was built.
    pub table: UnwindTable,
    /// The file's segments.
    pub segments: Segments,
    /// The file's build id.
    pub build_id: Option<BuildId>,
}

/// The reason why bytes are no table of the requested file. In each case the table is built again.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CacheError {
    /// The bytes are of another kind.
    #[error("not a cached table: remove the file")]
    NotATable,
    /// Another version of this program wrote it.
    #[error("cached table has version {found} instead of {VERSION}: it is built again")]
    Version {
        /// The version in the file.
        found: u32,
    },
    /// The bytes are cut off, or more than the header says.
    #[error("cached table has {found} bytes instead of {expected}: it is built again")]
    Length {
        /// Bytes by the header.
        expected: u64,
        /// Bytes that the file has.
        found: u64,
    },
    /// The checksum is wrong.
    #[error("cached table is damaged (checksum): it is built again; check the disk if this repeats")]
    Checksum,
    /// The table is of another file content.
    #[error("cached table is of file content {found}: it is built again")]
    Content {
        /// The content of the table's file.
        found: ContentId,
    },
    /// The checksum is right, but the parts make no table.
    #[error("cached table contradicts itself: it is built again")]
    Malformed,
}

/// Encodes a table.
pub fn encode(
    content: &ContentId,
    table: &UnwindTable,
    segments: &Segments,
    build_id: Option<&BuildId>,
) -> Vec<u8> {
    let build_id = build_id.map_or(&[][..], BuildId::as_bytes);
    let segments = segments.as_slice();
    let mut bytes = Vec::with_capacity(
        HEADER_BYTES
            + table.rules().len() * RULE_BYTES
            + table.lines().len() * LINE_BYTES
            + segments.len() * SEGMENT_BYTES
            + build_id.len(),
    );
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(content.as_bytes());
    let arch: u32 = match table.arch() {
        Arch::X86_64 => 1,
        Arch::Aarch64 => 2,
    };
    let mut word = |word: u32| bytes.extend_from_slice(&word.to_le_bytes());
    word(arch);
    word(table.rules().len() as u32);
    word(table.base() as u32);
    word((table.base() >> 32) as u32);
    word(table.granules());
    word(table.lines().len() as u32);
    word(segments.len() as u32);
    word(build_id.len() as u32);
    for rule in table.rules() {
        let UnwindRule { cfa_kind, fp_kind, ra_kind, flags, cfa_offset, fp_offset, ra_offset } = *rule;
        bytes.extend_from_slice(&[cfa_kind, fp_kind, ra_kind, flags]);
        for offset in [cfa_offset, fp_offset, ra_offset] {
            bytes.extend_from_slice(&offset.to_le_bytes());
        }
    }
    for word in table.lines().iter().flat_map(|line| line.0) {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    for segment in segments {
        let Segment { vaddr, file_offset, file_bytes, memory_bytes, executable } = *segment;
        for number in [vaddr, file_offset, file_bytes, memory_bytes, u64::from(executable)] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
    }
    bytes.extend_from_slice(build_id);
    let sum = crc32fast::hash(&bytes[SUM_FROM..]);
    bytes[12..16].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// Decodes bytes that [`encode`] made for this content.
pub fn decode(bytes: &[u8], content: &ContentId) -> Result<CachedTable, CacheError> {
    let header: &[u8; HEADER_BYTES] = bytes.first_chunk().ok_or(CacheError::NotATable)?;
    if !header.starts_with(MAGIC) {
        return Err(CacheError::NotATable);
    }
    let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    if word(8) != VERSION {
        return Err(CacheError::Version { found: word(8) });
    }
    let [rules, granules, lines, segments, build_id] = [36, 48, 52, 56, 60].map(|at| word(at) as usize);
    let expected = HEADER_BYTES as u64
        + rules as u64 * RULE_BYTES as u64
        + lines as u64 * LINE_BYTES as u64
        + segments as u64 * SEGMENT_BYTES as u64
        + build_id as u64;
    if bytes.len() as u64 != expected {
        return Err(CacheError::Length { expected, found: bytes.len() as u64 });
    }
    if crc32fast::hash(&bytes[SUM_FROM..]) != word(12) {
        return Err(CacheError::Checksum);
    }
    let mut found = [0; 16];
    found.copy_from_slice(&header[16..32]);
    let found = ContentId::from_bytes(found);
    if found != *content {
        return Err(CacheError::Content { found });
    }
    let arch = match word(32) {
        1 => Arch::X86_64,
        2 => Arch::Aarch64,
        _ => return Err(CacheError::Malformed),
    };
    if rules > MAX_RULES || lines > MAX_LINES || segments > MAX_SEGMENTS || build_id > MAX_BUILD_ID_BYTES {
        return Err(CacheError::Malformed);
    }
    let base = u64::from(word(40)) | u64::from(word(44)) << 32;
    let (rule_bytes, rest) = bytes[HEADER_BYTES..].split_at(rules * RULE_BYTES);
    let (line_bytes, rest) = rest.split_at(lines * LINE_BYTES);
    let (segment_bytes, id_bytes) = rest.split_at(segments * SEGMENT_BYTES);
    let rules = rule_bytes.chunks_exact(RULE_BYTES).map(decode_rule).collect();
    let lines = line_bytes.chunks_exact(LINE_BYTES).map(decode_line).collect();
    let table =
        UnwindTable::from_parts(arch, base, granules as u32, lines, rules).ok_or(CacheError::Malformed)?;
    let segments = segment_bytes.chunks_exact(SEGMENT_BYTES).map(decode_segment).collect();
    Ok(CachedTable { table, segments: Segments::new(segments), build_id: BuildId::from_bytes(id_bytes) })
}

fn number(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn decode_rule(bytes: &[u8]) -> UnwindRule {
    UnwindRule {
        cfa_kind: bytes[0],
        fp_kind: bytes[1],
        ra_kind: bytes[2],
        flags: bytes[3],
        cfa_offset: number(bytes, 4) as i32,
        fp_offset: number(bytes, 8) as i32,
        ra_offset: number(bytes, 12) as i32,
    }
}

fn decode_line(bytes: &[u8]) -> CacheLine {
    let mut line = CacheLine::default();
    for (index, word) in line.0.iter_mut().enumerate() {
        *word = number(bytes, index * 4);
    }
    line
}

fn decode_segment(bytes: &[u8]) -> Segment {
    let number =
        |index: usize| u64::from(number(bytes, index * 8)) | u64::from(number(bytes, index * 8 + 4)) << 32;
    Segment {
        vaddr: number(0),
        file_offset: number(1),
        file_bytes: number(2),
        memory_bytes: number(3),
        executable: number(4) != 0,
    }
}

/// Writes a file so that a reader, also after a crash, finds all of it or the former file.
pub fn store(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = Path::new(&partial);
    let written = File::create(partial).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_data()?;
        fs::rename(partial, path)
    });
    if written.is_err() {
        // If this fails too, the next attempt overwrites the partial file.
        let _ = fs::remove_file(partial);
    }
    written
}

/// Reads a file that has at most `max_bytes`.
pub fn load(path: &Path, max_bytes: u64) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let mut bytes = Vec::new();
    file.take(max_bytes.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max_bytes {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("more than {max_bytes} bytes")));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::{BuildOptions, BuiltTable, build_bytes};
    use crate::limits::TableLimits;
    use proptest::prelude::*;

    fn built() -> BuiltTable {
        let bytes = fs::read("/proc/self/exe").unwrap();
        build_bytes(&bytes, &BuildOptions::new("self", &TableLimits::default())).unwrap()
    }

    fn small() -> (ContentId, Vec<u8>) {
        let mut overrides = crate::overrides::Overrides::default();
        let text =
            "content 0123456789abcdef0123456789abcdef\narch x86_64\n0x1000 sp+8\n0x1800 sp+16\nend 0x2001\n";
        let content = overrides.insert_text(text, &TableLimits::default()).unwrap();
        let segments = Segments::new(vec![Segment {
            vaddr: 1,
            file_offset: 2,
            file_bytes: 3,
            memory_bytes: 4,
            executable: true,
        }]);
        let id = "0abc".parse().unwrap();
        let bytes = encode(
            &content,
            overrides.get(&content, gannet_elf::Arch::X86_64).unwrap(),
            &segments,
            Some(&id),
        );
        (content, bytes)
    }

    #[test]
    fn a_stored_table_comes_back_as_it_was() {
        let built = built();
        let bytes = encode(&built.content, &built.table, &built.segments, built.build_id.as_ref());
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("table");
        store(&path, &bytes).unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "no partial file is left");
        let cached = decode(&load(&path, 1 << 30).unwrap(), &built.content).unwrap();
        assert_eq!(
            cached,
            CachedTable { table: built.table, segments: built.segments, build_id: built.build_id }
        );
        assert_eq!(load(&path, 100).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
    }

    /// Checks that each kind of damage has its own error (R55).
    #[test]
    fn each_kind_of_damage_has_its_own_error() {
        let (content, good) = small();
        assert!(decode(&good, &content).is_ok());
        let damaged = |at: usize| {
            let mut bytes = good.clone();
            bytes[at] ^= 1;
            decode(&bytes, &content).unwrap_err()
        };
        assert_eq!(damaged(0), CacheError::NotATable);
        assert_eq!(damaged(8), CacheError::Version { found: VERSION ^ 1 });
        assert_eq!(damaged(20), CacheError::Checksum);
        assert!(matches!(damaged(52), CacheError::Length { .. }));
        assert_eq!(damaged(good.len() - 1), CacheError::Checksum);
        assert!(matches!(decode(&good[..good.len() - 1], &content), Err(CacheError::Length { .. })));
        assert_eq!(decode(&[], &content), Err(CacheError::NotATable));
        let other = ContentId::from_bytes([7; 16]);
        assert_eq!(decode(&good, &other), Err(CacheError::Content { found: content }));
    }

    /// Checks that no change of one bit is taken for a table (R55).
    #[test]
    fn every_single_bit_of_damage_is_found() {
        let (content, good) = small();
        for bit in 0..good.len() * 8 {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&bytes, &content).is_err(), "bit {bit}");
        }
    }

    proptest! {
        /// Checks that a forged checksum makes no table that a look-up could leave (R55).
        #[test]
        fn damage_with_a_right_checksum_is_harmless(
            changes in prop::collection::vec((16usize.., any::<u8>()), 1..12),
            addresses in prop::collection::vec(any::<u64>(), 8),
        ) {
            let (content, mut bytes) = small();
            let length = bytes.len();
            for (at, value) in changes {
                bytes[32 + at % (length - 32)] = value;
            }
            let sum = crc32fast::hash(&bytes[SUM_FROM..]);
            bytes[12..16].copy_from_slice(&sum.to_le_bytes());
            if let Ok(cached) = decode(&bytes, &content) {
                let base = cached.table.base();
                for address in addresses.into_iter().chain((0..0x3000).step_by(64).map(|by| base.wrapping_add(by))) {
                    let _ = cached.table.lookup(address);
                }
            }
        }
    }
}
