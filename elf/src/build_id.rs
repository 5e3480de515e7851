//! Build ids: the identifiers that linkers put into the notes of a file.

use std::{
    fmt::{self, Display},
    str::FromStr,
};

use object::elf::NT_GNU_BUILD_ID;

use crate::data::read_u32;

/// The type of the note that holds Go's build id.
const NT_GO_BUILD_ID: u32 = 4;
/// A Go build id is four base64 hashes with slashes between them: 83 characters.
const MAX_GO_BUILD_ID_BYTES: usize = 128;

/// The GNU build id of a file, 1 to 64 bytes. Most linkers write 20 bytes, lld can write 8, and users can give any.
#[derive(Clone, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct BuildId(Vec<u8>);

impl BuildId {
    const MAX_BYTES: usize = 64;
    const MIN_UNIQUE_BYTES: usize = 4;

    /// Reports whether the id is long enough to belong to one file alone. Linkers write 8 bytes or more.
    pub fn is_unique(&self) -> bool {
        self.0.len() >= Self::MIN_UNIQUE_BYTES
    }

    /// Returns the bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Builds an id from its bytes; none if there are no bytes or more than 64. A part of an id would name other files.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        (1..=Self::MAX_BYTES).contains(&bytes.len()).then(|| Self(bytes.to_vec()))
    }
}

impl Display for BuildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for BuildId {
    type Err = ParseHexError;

    fn from_str(text: &str) -> Result<Self, ParseHexError> {
        parse_hex(text).and_then(|bytes| Self::from_bytes(&bytes)).ok_or_else(|| ParseHexError {
            text: text.to_owned(),
            expected: "a build id (1 to 64 bytes in hex)",
        })
    }
}

/// A text that is not the hexadecimal form of an identifier.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{text:?} is not {expected}")]
pub struct ParseHexError {
    pub(crate) text: String,
    pub(crate) expected: &'static str,
}

pub(crate) fn parse_hex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    let nibble = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
    digits
        .len()
        .is_multiple_of(2)
        .then(|| digits.chunks(2).map(|pair| Some(nibble(pair[0])? << 4 | nibble(pair[1])?)).collect())
        .flatten()
}

/// The build ids of a file.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct BuildIds {
    /// The GNU build id.
    pub gnu: Option<BuildId>,
    /// Go's own build id: printable ASCII. Go programs had no GNU build id before Go 1.24.
    pub go: Option<String>,
}

impl BuildIds {
    /// Reads the ids in a section or segment of notes, each note aligned to 4 bytes.
    pub fn of_notes(notes: &[u8]) -> Self {
        let mut ids = Self::default();
        ids.add_notes(notes, 4);
        ids
    }

    /// Adds the ids that these notes hold; an id that is known already stays.
    pub(crate) fn add_notes(&mut self, notes: &[u8], align: usize) {
        for (name, kind, content) in notes_of(notes, align) {
            if name == b"GNU\0" && kind == NT_GNU_BUILD_ID.0 && self.gnu.is_none() {
                self.gnu = BuildId::from_bytes(content);
            }
            if name == b"Go\0\0" && kind == NT_GO_BUILD_ID && self.go.is_none() {
                self.go = go_build_id(content);
            }
        }
    }

    /// Returns the text by which profiles name the file: the GNU build id in lower-case hex, else Go's text, else an
    /// empty text.
    pub fn text(&self) -> String {
        self.gnu.as_ref().map(BuildId::to_string).or_else(|| self.go.clone()).unwrap_or_default()
    }
}

fn go_build_id(content: &[u8]) -> Option<String> {
    let text = content.split(|byte| *byte == 0).next()?;
    let good = (1..=MAX_GO_BUILD_ID_BYTES).contains(&text.len()) && text.iter().all(u8::is_ascii_graphic);
    good.then(|| String::from_utf8_lossy(text).into_owned())
}

/// Returns name, type and content of each note. Name and content are padded to multiples of `align`.
fn notes_of(bytes: &[u8], align: usize) -> impl Iterator<Item = (&[u8], u32, &[u8])> {
    let mut at = 0_usize;
    std::iter::from_fn(move || {
        let word = |index: usize| read_u32(bytes, at.checked_add(index * 4)?);
        let (name_bytes, content_bytes, kind) = (word(0)? as usize, word(1)? as usize, word(2)?);
        let name_at = at + 12;
        let name_end = name_at.checked_add(name_bytes)?;
        let content_at = name_end.checked_next_multiple_of(align)?;
        let content_end = content_at.checked_add(content_bytes)?;
        let (name, content) = (bytes.get(name_at..name_end)?, bytes.get(content_at..content_end)?);
        at = content_end.checked_next_multiple_of(align)?;
        Some((name, kind, content))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(name: &[u8], kind: u32, content: &[u8], align: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [name.len() as u32, content.len() as u32, kind] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(name);
        bytes.resize(bytes.len().next_multiple_of(align), 0);
        bytes.extend(content);
        bytes.resize(bytes.len().next_multiple_of(align), 0);
        bytes
    }

    #[test]
    fn build_ids_round_trip_as_text() {
        let id: BuildId = "00ffA5".parse().unwrap();
        assert_eq!(id.to_string(), "00ffa5");
        for bad in ["", "0", "zz", "é1", &"00".repeat(65)] {
            assert!(bad.parse::<BuildId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_gnu_build_id_names_a_file_that_has_both() {
        let go = note(b"Go\0\0", 4, b"abc/def-_\0", 4);
        let both = [go.clone(), note(b"GNU\0", 3, &[0, 0xff], 4)].concat();
        assert_eq!(BuildIds::of_notes(&both).text(), "00ff");
        assert_eq!(BuildIds::of_notes(&go).text(), "abc/def-_");
        assert_eq!(BuildIds::of_notes(&[]).text(), "");
    }

    #[test]
    fn a_note_that_is_no_build_id_is_passed_over() {
        let good = note(b"GNU\0", 3, &[1, 2, 3], 4);
        for bad in [
            note(b"GNU\0", 3, &[], 4),
            note(b"GNU\0", 3, &[7; 65], 4),
            note(b"GNU\0", 5, &[7; 16], 4),
            note(b"Go\0\0", 4, b"not printable\x1b", 4),
            note(b"Go\0\0", 4, b"", 4),
            note(b"stapsdt\0", 3, &[7; 20], 4),
        ] {
            let ids = BuildIds::of_notes(&[bad, good.clone()].concat());
            assert_eq!((ids.gnu.unwrap().as_bytes(), ids.go), (&[1, 2, 3][..], None));
        }
    }

    #[test]
    fn notes_in_a_segment_of_eight_byte_alignment_are_found() {
        let property = note(b"GNU\0", 5, &[1; 12], 8);
        let bytes = [property, note(b"GNU\0", 3, &[0xab; 20], 8)].concat();
        let mut ids = BuildIds::default();
        ids.add_notes(&bytes, 8);
        assert_eq!(ids.text(), "ab".repeat(20));
    }

    #[test]
    fn sizes_that_leave_the_notes_end_the_search() {
        let mut bytes = note(b"GNU\0", 3, &[1, 2, 3, 4], 4);
        for at in [0, 4] {
            let good = bytes[at];
            bytes[at] = 0xff;
            bytes[at + 3] = 0xff;
            assert_eq!(BuildIds::of_notes(&bytes), BuildIds::default());
            (bytes[at], bytes[at + 3]) = (good, 0);
        }
        assert_eq!(BuildIds::of_notes(&bytes).text(), "01020304");
    }
}
