//! The build information that each Go program has: its version, and how it was built.

const MAGIC: &[u8] = b"\xff Go buildinf:";
/// Bytes of the header. Behind it are two texts, each behind its length.
const HEADER: usize = 32;
const FLAGS_AT: usize = 15;
/// The texts are in the section itself, as since Go 1.18.
const INLINE: u8 = 2;
const MAX_VERSION: usize = 128;
/// Kinds of a program that are a library in another program.
const LIBRARIES: [&[u8]; 2] = [b"\nbuild\t-buildmode=c-shared\n", b"\nbuild\t-buildmode=plugin\n"];

/// The facts that are read of the build information.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct BuildInfo {
    /// Major and minor number.
    pub(super) version: (u8, u8),
    /// The version in labels, such as `1.24.11`.
    pub(super) version_text: String,
    /// Whether it is a library of another program.
    pub(super) is_library: bool,
}

impl BuildInfo {
    /// Reads the section; `None` if it has another form, or is of a version that was never released.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let (header, mut rest) = bytes.split_at_checked(HEADER)?;
        if !header.starts_with(MAGIC) || header[FLAGS_AT] & INLINE == 0 {
            return None;
        }
        let version = take_text(&mut rest)?;
        let modules = take_text(&mut rest).unwrap_or_default();
        let text =
            std::str::from_utf8(version.get(..version.len().min(MAX_VERSION))?).ok()?.strip_prefix("go")?;
        let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let version_text = &text[..end];
        let mut numbers = version_text.split('.').map(str::parse::<u8>);
        let version = (numbers.next()?.ok()?, numbers.next()?.ok()?);
        let is_library =
            LIBRARIES.iter().any(|line| modules.windows(line.len()).any(|window| window == *line));
        Some(Self { version, version_text: version_text.to_owned(), is_library })
    }
}

/// Takes a text behind its length, which has seven bits in each byte.
fn take_text<'b>(bytes: &mut &'b [u8]) -> Option<&'b [u8]> {
    let mut length = 0;
    for shift in (0..28).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        length |= usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            let (text, rest) = bytes.split_at_checked(length)?;
            *bytes = rest;
            return Some(text);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(version: &str, modules: &str) -> Vec<u8> {
        let mut bytes = [MAGIC, &[8, INLINE]].concat();
        bytes.resize(HEADER, 0);
        for text in [version, modules] {
            bytes.extend([text.len() as u8 & 0x7f | 0x80, (text.len() >> 7) as u8]);
            bytes.extend(text.as_bytes());
        }
        bytes
    }

    fn version(text: &str) -> Option<(u8, u8, String)> {
        BuildInfo::parse(&section(text, "")).map(|info| (info.version.0, info.version.1, info.version_text))
    }

    #[test]
    fn the_version_is_read() {
        assert_eq!(version("go1.24.11"), Some((1, 24, "1.24.11".into())));
        assert_eq!(version("go1.25rc1"), Some((1, 25, "1.25".into())));
        assert_eq!(version("go1.26.1 X:nogreenteagc"), Some((1, 26, "1.26.1".into())));
        // It may keep labels in either form.
        assert_eq!(version("devel go1.24-1234567 Mon"), None);
        assert_eq!(version("go1.999.1"), None);
        assert_eq!(version(""), None);
    }

    #[test]
    fn a_library_is_not_a_program() {
        let is_library = |mode: &str| {
            let modules = format!("path\tx\nbuild\t-buildmode={mode}\nbuild\tGOOS=linux\n");
            BuildInfo::parse(&section("go1.24.1", &modules)).unwrap().is_library
        };
        assert_eq!(["exe", "pie", "c-shared", "plugin"].map(is_library), [false, false, true, true]);
    }

    #[test]
    fn a_section_that_is_cut_has_no_version() {
        let whole = section("go1.24.1", "x");
        for length in 0..HEADER + 2 + "go1.24.1".len() {
            assert_eq!(BuildInfo::parse(&whole[..length]), None, "{length}");
        }
        let mut pointers = whole.clone();
        pointers[FLAGS_AT] = 0;
        assert_eq!(BuildInfo::parse(&pointers), None, "before 1.18");
    }
}
