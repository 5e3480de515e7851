//! Texts: serde support for types that have one text form, cuts between characters, hex digits, errors with their causes.

use std::{error::Error, fmt::Write as _};

/// Stands at the end of a text that was cut.
const MARK: char = '…';

/// Returns the longest beginning of a text that has at most `max` bytes and ends between two characters.
pub fn head(text: &str, max: usize) -> &str {
    let end = (0..=max.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    &text[..end]
}

/// Cuts a text that has more than `max` bytes, and marks it with an ellipsis within that limit. Reports whether it was cut.
pub fn cut(text: &mut String, max: usize) -> bool {
    if text.len() <= max {
        return false;
    }
    text.truncate(head(text, max.saturating_sub(MARK.len_utf8())).len());
    text.push(MARK);
    true
}

/// Returns bytes as hex digits in lower case.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Returns the message of an error and those of its causes, from the outermost inwards: `what: why: why`. Leaves out a cause that the
/// text before it states.
pub fn with_causes(error: &(dyn Error + 'static)) -> String {
    let (mut text, mut next) = (error.to_string(), error.source());
    while let Some(cause) = next {
        let message = cause.to_string();
        if !text.contains(&message) {
            let _ = write!(text, ": {message}");
        }
        next = cause.source();
    }
    text
}

/// Implements `Serialize` by `Display` and `Deserialize` by `FromStr`, so that flags, config files and
/// `--print-config` share one text form. The type must round-trip through its text.
#[macro_export]
macro_rules! serde_as_text {
    ($type:ty) => {
        impl $crate::serde::Serialize for $type {
            fn serialize<S: $crate::serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> $crate::serde::Deserialize<'de> for $type {
            fn deserialize<D: $crate::serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <String as $crate::serde::Deserialize>::deserialize(deserializer)?;
                text.parse().map_err($crate::serde::de::Error::custom)
            }
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_cut_between_characters() {
        for (max, beginning) in [(0, ""), (1, "a"), (2, "a"), (3, "aé"), (4, "aéb"), (9, "aéb")] {
            assert_eq!(head("aéb", max), beginning, "{max}");
        }
        let cut_to = |text: &str, max| {
            let mut text = text.to_owned();
            (cut(&mut text, max), text)
        };
        assert_eq!(cut_to("abcdef", 6), (false, "abcdef".to_owned()));
        assert_eq!(cut_to("abcdefg", 6), (true, "abc…".to_owned()));
        assert_eq!(cut_to("éééé", 6), (true, "é…".to_owned()));
    }

    #[test]
    fn bytes_have_two_digits_each() {
        assert_eq!((hex(&[0, 0x0a, 0xff]).as_str(), hex(&[]).as_str()), ("000aff", ""));
    }

    /// An error with its cause, which its message may state too.
    #[derive(Debug)]
    struct Failed(&'static str, Option<Box<Self>>);

    impl std::fmt::Display for Failed {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str(self.0)
        }
    }

    impl Error for Failed {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            self.1.as_deref().map(|cause| cause as _)
        }
    }

    #[test]
    fn an_error_states_each_cause_once() {
        let of = |texts: [&'static str; 3]| {
            let error = texts.into_iter().rev().fold(None, |cause, text| Some(Box::new(Failed(text, cause))));
            with_causes(&*error.unwrap())
        };
        assert_eq!(of(["cannot start", "no room", "limit 5"]), "cannot start: no room: limit 5");
        assert_eq!(
            of(["cannot read a: is missing", "is missing", "code 2"]),
            "cannot read a: is missing: code 2"
        );
    }
}
