//! Patterns for names and paths in rules: an exact text, or a prefix that ends with `*`.

use std::{fmt, str::FromStr};

/// A pattern for command names, executable paths and control group paths. The BPF programs compare by the same rules.
///
/// ```
/// use gannet_proto::rules::Pattern;
///
/// let python = Pattern::parse("python3*")?;
/// assert!(python.matches(b"python3.11") && !python.matches(b"python2"));
/// assert!(!Pattern::parse("node")?.matches(b"nodejs"));
/// # Ok::<(), gannet_proto::rules::PatternError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Pattern {
    text: String,
    prefix: bool,
}

/// Reasons why a text is not a pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// The text is empty, so it would match only an empty name.
    #[error("is empty: give a name, or `*` for all names")]
    Empty,
    /// A `*` stands before the end.
    #[error("may have `*` only at the end, for a prefix: split it into several entries or shorten it")]
    StarInside,
    /// The text has a NUL character, which no name of the kernel has.
    #[error("has a NUL character: remove it")]
    Nul,
}

impl Pattern {
    /// Parses `python3` (exact) or `python3*` (prefix).
    pub fn parse(text: &str) -> Result<Self, PatternError> {
        let (name, prefix) = match text.strip_suffix('*') {
            Some(name) => (name, true),
            None => (text, false),
        };
        if text.is_empty() {
            Err(PatternError::Empty)
        } else if name.contains('*') {
            Err(PatternError::StarInside)
        } else if name.contains('\0') {
            Err(PatternError::Nul)
        } else {
            Ok(Self { text: name.to_owned(), prefix })
        }
    }

    /// Reports whether the pattern matches a name.
    pub fn matches(&self, name: &[u8]) -> bool {
        let text = self.text.as_bytes();
        if self.prefix { name.starts_with(text) } else { name == text }
    }

    /// Reports whether the pattern is a prefix.
    pub fn is_prefix(&self) -> bool {
        self.prefix
    }

    /// Returns the name or the prefix, without the `*`.
    pub fn text(&self) -> &str {
        &self.text
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.text, if self.prefix { "*" } else { "" })
    }
}

impl FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        Self::parse(text)
    }
}
