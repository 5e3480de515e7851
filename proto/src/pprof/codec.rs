//! Encodes and decodes profiles.

use std::{
    borrow::Cow,
    io::{self, Read as _, Write as _},
};

use flate2::{GzBuilder, read::MultiGzDecoder};
use prost::Message as _;
use zstd::{bulk, zstd_safe};

use super::PprofError;
use crate::profiles::Profile;

/// Level of zstd. On profiles of 40 kB, level 1 takes three quarters of the time and 15 % more bytes, and level 5 two and a half
/// times as long for 5 % less.
const ZSTD_LEVEL: i32 = 3;

/// The compression of an encoded profile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// Members of gzip. The format of every download, and the one that each collector reads.
    Gzip,
    /// One frame of zstd that states the size of its content. It is as large as gzip, and encoded in a fifth of the time.
    Zstd,
}

impl Encoding {
    /// Returns the name that agent and collector use for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        }
    }

    /// Returns the compression that the first bytes show, or `None` for an uncompressed profile or foreign bytes.
    pub fn of(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [0x1f, 0x8b, ..] => Some(Self::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Self::Zstd),
            _ => None,
        }
    }
}

/// Encodes a profile as gzip-compressed pprof. Equal profiles have equal bytes, because the gzip header holds no time, name
/// or system.
pub fn encode(profile: &Profile) -> Vec<u8> {
    gzip(&profile.encode_to_vec())
}

/// Encodes a profile as pprof in this compression. Equal profiles have equal bytes.
pub fn encode_as(profile: &Profile, encoding: Encoding) -> Vec<u8> {
    let raw = profile.encode_to_vec();
    match encoding {
        Encoding::Gzip => gzip(&raw),
        Encoding::Zstd => to_zstd(&raw),
    }
}

/// Compresses an encoded profile as [`encode_as`] does with zstd. Equal profiles have equal bytes.
pub fn to_zstd(raw: &[u8]) -> Vec<u8> {
    // It fails only without memory. Every reader takes gzip too.
    bulk::compress(raw, ZSTD_LEVEL).unwrap_or_else(|_| gzip(raw))
}

/// Returns an encoded profile without compression, of at most `max_inflated` bytes.
pub fn inflate(bytes: &[u8], max_inflated: usize) -> Result<Cow<'_, [u8]>, PprofError> {
    let raw = match Encoding::of(bytes) {
        Some(Encoding::Gzip) => Cow::Owned(inflate_gzip(bytes, max_inflated)?),
        Some(Encoding::Zstd) => Cow::Owned(inflate_zstd(bytes, max_inflated)?),
        None => Cow::Borrowed(bytes),
    };
    if raw.len() > max_inflated {
        return Err(PprofError::TooLarge { max: max_inflated });
    }
    Ok(raw)
}

/// Returns an encoded profile with gzip in place of zstd, of at most `max_inflated` bytes without compression. Other bytes
/// stay as they are.
pub fn to_gzip(bytes: &[u8], max_inflated: usize) -> Result<Cow<'_, [u8]>, PprofError> {
    Ok(match Encoding::of(bytes) {
        Some(Encoding::Zstd) => Cow::Owned(gzip(&inflate_zstd(bytes, max_inflated)?)),
        _ => Cow::Borrowed(bytes),
    })
}

/// Decodes a profile, compressed or not, of at most `max_inflated` bytes.
pub fn decode(bytes: &[u8], max_inflated: usize) -> Result<Profile, PprofError> {
    decode_raw(&inflate(bytes, max_inflated)?, max_inflated)
}

/// Decodes a profile without compression, of at most `max_bytes`.
pub fn decode_raw(raw: &[u8], max_bytes: usize) -> Result<Profile, PprofError> {
    if raw.len() > max_bytes {
        return Err(PprofError::TooLarge { max: max_bytes });
    }
    Profile::decode(raw).map_err(|error| PprofError::Protobuf(error.to_string()))
}

fn gzip(raw: &[u8]) -> Vec<u8> {
    let mut encoder =
        GzBuilder::new().mtime(0).operating_system(255).write(Vec::new(), flate2::Compression::default());
    // Writing to memory cannot fail.
    let _ = encoder.write_all(raw);
    encoder.finish().unwrap_or_default()
}

/// Inflates up to one byte more than `max_inflated`.
fn inflate_gzip(bytes: &[u8], max_inflated: usize) -> Result<Vec<u8>, PprofError> {
    let mut out = Vec::with_capacity(bytes.len().saturating_mul(4).min(max_inflated));
    let limit = u64::try_from(max_inflated).unwrap_or(u64::MAX).saturating_add(1);
    MultiGzDecoder::new(bytes).take(limit).read_to_end(&mut out).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => PprofError::Truncated,
        _ => PprofError::Gzip(error.to_string()),
    })?;
    Ok(out)
}

fn inflate_zstd(bytes: &[u8], max_inflated: usize) -> Result<Vec<u8>, PprofError> {
    let damaged = |reason: &str| PprofError::Zstd(reason.to_owned());
    // The stated size bounds the memory: the decoder writes no byte more, and without it needs a window of up to 128 MiB.
    let stated = zstd_safe::get_frame_content_size(bytes)
        .map_err(|_| damaged("its header is damaged"))?
        .ok_or_else(|| damaged("its frame does not state the size of its content"))?;
    let size = usize::try_from(stated).ok().filter(|size| *size <= max_inflated);
    let size = size.ok_or(PprofError::TooLarge { max: max_inflated })?;
    // A cut frame states the size of the whole.
    if zstd_safe::find_frame_compressed_size(bytes).is_err() {
        return Err(PprofError::Truncated);
    }
    bulk::decompress(bytes, size).map_err(|error| damaged(&error.to_string()))
}
