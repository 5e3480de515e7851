//! Encodes and decodes profiles.

use std::io::{self, Read as _, Write as _};

use flate2::{Compression, GzBuilder, read::MultiGzDecoder};
use prost::Message as _;

use super::PprofError;
use crate::profiles::Profile;

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// Encodes a profile as gzip-compressed pprof. Equal profiles have equal bytes, because the gzip header holds no time, name
/// or system.
pub fn encode(profile: &Profile) -> Vec<u8> {
    let mut encoder =
        GzBuilder::new().mtime(0).operating_system(255).write(Vec::new(), Compression::default());
    // Writing to memory cannot fail.
    let _ = encoder.write_all(&profile.encode_to_vec());
    encoder.finish().unwrap_or_default()
}

/// Decodes a profile, compressed or not, of at most `max_inflated` bytes.
pub fn decode(bytes: &[u8], max_inflated: usize) -> Result<Profile, PprofError> {
    let too_large = || PprofError::TooLarge { max: max_inflated };
    let inflated;
    let raw = if bytes.starts_with(&GZIP_MAGIC) {
        let mut out = Vec::with_capacity(bytes.len().saturating_mul(4).min(max_inflated));
        let limit = u64::try_from(max_inflated).unwrap_or(u64::MAX).saturating_add(1);
        MultiGzDecoder::new(bytes).take(limit).read_to_end(&mut out).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => PprofError::Truncated,
            _ => PprofError::Gzip(error.to_string()),
        })?;
        inflated = out;
        &inflated
    } else {
        bytes
    };
    if raw.len() > max_inflated {
        return Err(too_large());
    }
    Profile::decode(raw).map_err(|error| PprofError::Protobuf(error.to_string()))
}
