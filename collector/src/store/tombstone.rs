//! Deletions as objects, so that all collectors of a bucket see them, and a restart loses none.
//!
//! The object begins with [`MAGIC`], the version, the length and the CRC-32 of the content, each as a little endian 32-bit number.
//! The content follows, a [`Content`] in protobuf. Its name is the id, whose time separates the profiles: a deletion takes what a
//! collector wrote before, and nothing later. The object goes once no object and no table has a deleted profile.

use std::time::Duration;

use bytes::Bytes;
use gannet_proto::labels::Labels;
use prost::Message as _;
use ulid::Ulid;

use super::{
    Chosen,
    describe::describe,
    meta::ObjectMeta,
    object::{Objects, hour_path, segment_hour},
};
use crate::{selector::Selector, store::StoreError, time};

const MAGIC: [u8; 8] = *b"GANNETDL";
/// Version of the format, which this module reads and writes.
const VERSION: u32 = 1;
/// Bytes before the content.
const HEADER_BYTES: usize = 8 + 3 * 4;

/// The content of the object.
#[derive(Clone, PartialEq, prost::Message)]
struct Content {
    /// Id of the deletion, big endian. A copy under another name is a foreign object.
    #[prost(bytes = "bytes", tag = "1")]
    id: Bytes,
    /// The selector, in the syntax of queries.
    #[prost(string, tag = "2")]
    query: String,
    #[prost(uint64, tag = "3")]
    from_ms: u64,
    #[prost(uint64, tag = "4")]
    until_ms: u64,
    #[prost(string, tag = "5")]
    who: String,
}

/// A deletion that is not carried out yet.
#[derive(Clone, Debug)]
pub(crate) struct Tombstone {
    pub(crate) id: Ulid,
    /// The selector as the caller wrote it.
    pub(crate) query: String,
    /// The caller who deleted, for people.
    pub(crate) who: String,
    /// Earliest start of a profile, in milliseconds since 1970.
    pub(crate) from_ms: u64,
    /// End of the range of starts, exclusive.
    pub(crate) until_ms: u64,
    selector: Selector,
}

/// Why bytes are not a deletion that this version reads.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum TombstoneError {
    #[error(
        "it is no deletion, or it is damaged; restore it from a backup, or remove it and delete the profiles again"
    )]
    Damaged,
    #[error("it has version {0}, and this collector reads version {VERSION}: upgrade the collector")]
    Version(u32),
}

impl Tombstone {
    pub(super) fn new(id: Ulid, query: &str, of: &Chosen, who: &str) -> Self {
        let Chosen { selector, from_ms, until_ms } = of;
        Self {
            id,
            query: query.to_owned(),
            who: who.to_owned(),
            from_ms: *from_ms,
            until_ms: *until_ms,
            selector: selector.clone(),
        }
    }

    /// Returns the profiles of the deletion, without its time.
    pub(super) fn chosen(&self) -> Chosen {
        Chosen { selector: self.selector.clone(), from_ms: self.from_ms, until_ms: self.until_ms }
    }

    /// Returns the time since the deletion.
    pub(super) fn age(&self) -> Duration {
        // A time in the future is that of another clock.
        Duration::from_millis(time::now_ms().abs_diff(self.id.timestamp_ms()))
    }

    /// Returns the hour of its directory.
    pub(super) fn hour(&self) -> u64 {
        segment_hour(self.id)
    }

    /// Reports whether it takes objects of this time: those before it. `None`: an object of the older layout, which no collector
    /// writes any more.
    pub(super) fn is_after(&self, segment: Option<Ulid>) -> bool {
        segment.is_none_or(|segment| segment.timestamp_ms() <= self.id.timestamp_ms())
    }

    /// Reports whether it takes a batch with these labels and this start, in an object before it.
    pub(super) fn matches(&self, labels: &Labels, start_ms: u64) -> bool {
        (self.from_ms..self.until_ms).contains(&start_ms) && self.selector.matches(labels)
    }

    /// Reports whether it takes a batch with this description, in an object before it.
    pub(super) fn takes(&self, meta: &ObjectMeta) -> bool {
        // Labels and start do not depend on the size.
        describe(meta, 1, 0).is_some_and(|(labels, key, _)| self.matches(&labels, key.start_ms))
    }

    pub(super) fn encode(&self) -> Bytes {
        let content = Content {
            id: Bytes::copy_from_slice(&self.id.0.to_be_bytes()),
            query: self.query.clone(),
            from_ms: self.from_ms,
            until_ms: self.until_ms,
            who: self.who.clone(),
        };
        let content = content.encode_to_vec();
        let mut out = Vec::with_capacity(HEADER_BYTES + content.len());
        out.extend_from_slice(&MAGIC);
        for number in [VERSION, content.len() as u32, crc32fast::hash(&content)] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.extend_from_slice(&content);
        out.into()
    }

    /// Reads the object of the deletion with this id.
    pub(super) fn decode(id: Ulid, bytes: &[u8]) -> Result<Self, TombstoneError> {
        let number = |at: usize| {
            let bytes = bytes.get(at..at + 4)?;
            Some(u32::from_le_bytes(bytes.try_into().ok()?))
        };
        if !bytes.starts_with(&MAGIC) {
            return Err(TombstoneError::Damaged);
        }
        match number(8) {
            Some(VERSION) => {}
            Some(version) => return Err(TombstoneError::Version(version)),
            None => return Err(TombstoneError::Damaged),
        }
        let parse = || {
            let content = bytes.get(HEADER_BYTES..)?;
            if number(12)? as usize != content.len() || number(16)? != crc32fast::hash(content) {
                return None;
            }
            let Content { id: own, query, from_ms, until_ms, who } = Content::decode(content).ok()?;
            let selector = Selector::parse(&query).ok()?;
            (*own == id.0.to_be_bytes()[..]).then_some(Self { id, query, who, from_ms, until_ms, selector })
        };
        parse().ok_or(TombstoneError::Damaged)
    }

    /// Reads a deletion, or returns `None` if there is none. An unreadable one is an error: its profiles would come back.
    pub(super) async fn read(objects: &Objects, id: Ulid) -> Result<Option<Self>, StoreError> {
        let Some(bytes) = objects.deletion(id).await? else { return Ok(None) };
        let path = || format!("{}/{id}.deletion", hour_path(segment_hour(id)));
        let read = Self::decode(id, &bytes);
        read.map(Some).map_err(|error| StoreError::Deletion { path: path(), reason: error.to_string() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tombstone(id: Ulid) -> Tombstone {
        let query = r#"{service_name="shop",pod=~"a.*"}"#;
        let selector = Selector::parse(query).unwrap();
        Tombstone::new(id, query, &Chosen { selector, from_ms: 100, until_ms: 200 }, "anna")
    }

    #[test]
    fn a_deletion_round_trips_and_damage_is_detected() {
        let id = Ulid::from_parts(5_000, 7);
        let bytes = tombstone(id).encode();
        let back = Tombstone::decode(id, &bytes).unwrap();
        assert_eq!((back.query.as_str(), back.who.as_str()), (r#"{service_name="shop",pod=~"a.*"}"#, "anna"));
        assert_eq!((back.from_ms, back.until_ms), (100, 200));
        let damaged = |bytes: &[u8]| Tombstone::decode(id, bytes).unwrap_err();
        for at in 0..bytes.len() {
            assert_eq!(damaged(&bytes[..at]), TombstoneError::Damaged);
            let mut flipped = bytes.to_vec();
            flipped[at] ^= 1;
            assert!(Tombstone::decode(id, &flipped).is_err(), "byte {at}");
        }
        let mut newer = bytes.to_vec();
        newer[8] = 2;
        assert_eq!(damaged(&newer), TombstoneError::Version(2));
        assert!(Tombstone::decode(Ulid::from_parts(5_000, 8), &bytes).is_err(), "a copy under another name");
    }

    #[test]
    fn a_deletion_takes_what_was_written_before_it() {
        let of = tombstone(Ulid::from_parts(5_000, 7));
        let labels = |pod: &str| -> Labels {
            [("service_name", "shop"), ("pod", pod)].map(|(a, b)| (a.to_owned(), b.to_owned())).into()
        };
        assert!(of.matches(&labels("a1"), 100) && of.matches(&labels("a1"), 199));
        assert!(!of.matches(&labels("a1"), 99) && !of.matches(&labels("a1"), 200));
        assert!(!of.matches(&labels("b1"), 150));
        assert!(of.is_after(None) && of.is_after(Some(Ulid::from_parts(5_000, u128::MAX >> 48))));
        assert!(!of.is_after(Some(Ulid::from_parts(5_001, 0))));
    }
}
