//! The link from a program to the file that holds its debug information.

use std::{fs::File, io, os::unix::fs::FileExt};

use crate::build_id::BuildId;

/// Bytes of `.gnu_debuglink`: a file name, which Linux limits to 255 bytes, and a checksum.
pub(crate) const MAX_LINK_BYTES: u64 = 4096;
/// Debug files larger than this are found by build id only.
const MAX_CHECKED_BYTES: u64 = 1 << 30;

/// Name and checksum of a file with debug information, from `.gnu_debuglink`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DebugLink {
    /// File name without directory, as the bytes in the file.
    pub name: Vec<u8>,
    /// CRC-32 of the whole debug file.
    pub crc: u32,
}

impl DebugLink {
    /// Reads the section: the name ends with a zero byte, the checksum is at the next multiple of four.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let end = bytes.iter().position(|byte| *byte == 0)?;
        let crc = bytes.get((end + 4) & !3..)?.first_chunk()?;
        let name = &bytes[..end];
        // A name with a directory would let the file choose what is opened.
        let is_file_name = !name.is_empty() && !name.contains(&b'/') && name != b"." && name != b"..";
        is_file_name.then(|| Self { name: name.to_vec(), crc: u32::from_le_bytes(*crc) })
    }
}

/// Path and build id of a file with debug information that several files share, from `.gnu_debugaltlink`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AlternateLink {
    /// Path of any form, as the bytes in the file. If relative, then to the directory of the file that holds the link.
    pub path: Vec<u8>,
    /// Build id of the shared file.
    pub build_id: BuildId,
}

impl AlternateLink {
    /// Reads the section: the path ends with a zero byte, the rest is the build id.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let end = bytes.iter().position(|byte| *byte == 0)?;
        let build_id = BuildId::from_bytes(&bytes[end + 1..])?;
        (end > 0).then(|| Self { path: bytes[..end].to_vec(), build_id })
    }
}

/// Returns the CRC-32 of a debug file; none if it cannot be read or has more than 1 GiB.
pub fn checksum(file: &File) -> Option<u32> {
    // The length may change while the file is read, so the loop has the bound too.
    if file.metadata().ok()?.len() > MAX_CHECKED_BYTES {
        return None;
    }
    let mut hasher = crc32fast::Hasher::new();
    let mut buffer = vec![0; 256 << 10];
    let mut at = 0;
    while at <= MAX_CHECKED_BYTES {
        match file.read_at(&mut buffer, at) {
            Ok(0) => return Some(hasher.finalize()),
            Ok(read) => {
                hasher.update(&buffer[..read]);
                at += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return None,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(name: &[u8]) -> Option<DebugLink> {
        let mut bytes = name.to_vec();
        bytes.push(0);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend(0x1234_5678_u32.to_le_bytes());
        DebugLink::parse(&bytes)
    }

    #[test]
    fn a_link_names_a_file_and_never_a_path() {
        for good in ["a.debug", "abc", "..a", "a b"] {
            let expected = DebugLink { name: good.into(), crc: 0x1234_5678 };
            assert_eq!(link(good.as_bytes()), Some(expected));
        }
        for bad in ["", ".", "..", "/etc/passwd", "../x", "x/"] {
            assert_eq!(link(bad.as_bytes()), None, "{bad}");
        }
        assert_eq!(DebugLink::parse(b"abc\0\x01\x02\x03"), None);
        assert_eq!(DebugLink::parse(b"no end"), None);
    }

    #[test]
    fn the_checksum_covers_the_whole_file() {
        let mut file = tempfile::tempfile().unwrap();
        io::Write::write_all(&mut file, b"123456789").unwrap();
        assert_eq!(checksum(&file), Some(0xcbf4_3926));
        file.set_len(MAX_CHECKED_BYTES + 1).unwrap();
        assert_eq!(checksum(&file), None);
    }
}
