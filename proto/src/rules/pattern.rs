//! Names and paths in rules: exact, or a prefix that ends with `*`.

use std::{fmt, str::FromStr};

/// What a command name, an executable's path or a control group's path is compared with. The kernel decides by the
/// same semantics.
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

/// Why a text is no pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// It would match only what has no name.
    #[error("is empty: give a name, or `*` for every name")]
    Empty,
    /// Only a `*` at the end has a meaning.
    #[error("`*` stands only at the end, for any continuation: split it into several entries or shorten it")]
    StarInside,
    /// No name of the kernel's holds it.
    #[error("holds a NUL character: remove it")]
    Nul,
}

impl Pattern {
    /// Reads `python3` (exact) or `python3*` (prefix).
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

    /// Whether this name is meant.
    pub fn matches(&self, name: &[u8]) -> bool {
        let text = self.text.as_bytes();
        if self.prefix { name.starts_with(text) } else { name == text }
    }

    /// Whether any continuation matches too.
    pub fn is_prefix(&self) -> bool {
        self.prefix
    }

    /// The name or the prefix, without the `*`.
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
