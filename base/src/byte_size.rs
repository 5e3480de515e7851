//! Sizes in bytes, as people write them.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Units that `Display` uses, the largest first.
const UNITS: [(&str, u64); 4] = [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];

/// A number of bytes: `65536`, `64KiB`, `16MiB`, `1.5GiB`, `10GB`.
///
/// `KiB`, `Ki` and `k` count by 1024, `kB` by 1000, likewise up to tera; case does not matter. `Display` writes the
/// largest binary unit that divides the size, so the text reads back as exactly the same size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

/// Reasons why a text is no size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ByteSizeError {
    /// There is no number, or one that is not decimal.
    #[error("`{0}` is not a number of bytes: write it like 64MiB")]
    Number(String),
    /// The unit is unknown.
    #[error("`{0}` is not a unit of bytes: use KiB, MiB, GiB or TiB, as in 64MiB")]
    Unit(String),
    /// The size exceeds 64 bits.
    #[error("`{0}` is more bytes than can be counted")]
    TooLarge(String),
}

impl FromStr for ByteSize {
    type Err = ByteSizeError;

    fn from_str(text: &str) -> Result<Self, ByteSizeError> {
        let text = text.trim();
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "k" | "kib" | "ki" => 1 << 10,
            "m" | "mib" | "mi" => 1 << 20,
            "g" | "gib" | "gi" => 1 << 30,
            "t" | "tib" | "ti" => 1 << 40,
            "kb" => 1_000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            "tb" => 1_000_000_000_000,
            _ if number.is_empty() => return Err(ByteSizeError::Number(text.to_owned())),
            _ => return Err(ByteSizeError::Unit(unit.trim().to_owned())),
        };
        let too_large = || ByteSizeError::TooLarge(text.to_owned());
        if !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()) {
            let number: u64 = number.parse().map_err(|_| too_large())?;
            return number.checked_mul(factor).map(Self).ok_or_else(too_large);
        }
        let number: f64 = number.parse().map_err(|_| ByteSizeError::Number(text.to_owned()))?;
        let bytes = number * factor as f64;
        if bytes < u64::MAX as f64 { Ok(Self(bytes as u64)) } else { Err(too_large()) }
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match UNITS.iter().find(|(_, factor)| self.0 != 0 && self.0.is_multiple_of(*factor)) {
            Some((unit, factor)) => write!(f, "{}{unit}", self.0 / factor),
            None => write!(f, "{}", self.0),
        }
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    /// Accepts a whole number as well as a text.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl de::Visitor<'_> for Visitor {
            type Value = ByteSize;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size like 65536, 64KiB or 16MiB")
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<ByteSize, E> {
                Ok(ByteSize(bytes))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<ByteSize, E> {
                text.parse().map_err(E::custom)
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::plain("1000", 1000)]
    #[case::bytes("7 B", 7)]
    #[case::kubernetes("64Ki", 65_536)]
    #[case::binary("10GiB", 10 << 30)]
    #[case::fraction("1.5 KiB", 1536)]
    #[case::decimal("3MB", 3_000_000)]
    #[case::short("64k", 65_536)]
    #[case::lower_case("2gib", 2 << 30)]
    fn a_size_is_read_with_its_unit(#[case] text: &str, #[case] bytes: u64) {
        assert_eq!(text.parse(), Ok(ByteSize(bytes)));
    }

    #[rstest]
    #[case::empty("", "not a number of bytes")]
    #[case::unit_alone("KiB", "not a number of bytes")]
    #[case::two_points("1.2.3MiB", "not a number of bytes")]
    #[case::unit("1 parsec", "not a unit of bytes")]
    #[case::negative("-1KiB", "not a number of bytes")]
    #[case::product("99999999999TiB", "more bytes than can be counted")]
    #[case::number("99999999999999999999", "more bytes than can be counted")]
    #[case::fraction("99999999999999.5TiB", "more bytes than can be counted")]
    fn a_wrong_size_is_explained(#[case] text: &str, #[case] words: &str) {
        let error = text.parse::<ByteSize>().unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }

    #[test]
    fn a_config_file_may_hold_a_number_or_a_text() {
        let sizes: Vec<ByteSize> = serde_saphyr::from_str("[65536, 64KiB, '65536', 64 KiB]").unwrap();
        assert_eq!(sizes, [ByteSize(65_536); 4]);
        assert!(serde_saphyr::from_str::<ByteSize>("-5").is_err());
    }

    proptest! {
        #[test]
        fn a_size_reads_back_from_its_text(bytes: u64, shift in 0_u32..64) {
            let size = ByteSize(bytes >> shift << (shift / 2));
            prop_assert_eq!(size.to_string().parse(), Ok(size));
            let json = serde_json::to_string(&size).unwrap();
            prop_assert_eq!(serde_json::from_str::<ByteSize>(&json).unwrap(), size);
        }
    }
}
