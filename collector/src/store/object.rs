//! The objects: one immutable file a batch, which carries its own metadata.
//!
//! An object is two gzip members. The first is empty and holds the metadata in its header's extra field (subfield
//! `GN`: CRC-32, little endian, then an [`ObjectMeta`] in protobuf). The second is the profile, byte for byte as the
//! agent sent it; the object of a batch that only carries a ledger has none. Readers of gzip put members together and
//! skip extra fields, so `go tool pprof` opens an object as it lies on disk, and the index can be rebuilt from the
//! first bytes of each object without inflating anything.

use std::{
    fs, io,
    io::Read as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use gannet_proto::ingest::Batch;
use object_store::{ObjectStoreExt as _, PutPayload, local::LocalFileSystem};
use prost::Message as _;
use ulid::Ulid;

use super::StoreError;

const HOUR_MS: u64 = 3_600_000;
/// Of the first member: fixed header, length of the extra field, subfield header.
const BEFORE_DATA: usize = 10 + 2 + 4;
/// Of the first member: an empty deflate block, CRC and length of nothing.
const AFTER_DATA: [u8; 10] = [3, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// What the extra field can hold besides the subfield's header and the checksum.
pub(crate) const MAX_META_BYTES: usize = u16::MAX as usize - 4 - 4;
/// Objects of one tenant lie below its name; there is one tenant until agents say which they are for.
const TENANT: &str = "default";

/// What an object says about itself.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct ObjectMeta {
    /// The batch without its profile.
    #[prost(message, optional, tag = "1")]
    pub(crate) batch: Option<Batch>,
    /// In the order of the profile's values.
    #[prost(message, repeated, tag = "2")]
    pub(crate) types: Vec<TypeTotal>,
}

/// A sample type and the sum of its values.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct TypeTotal {
    /// `cpu/nanoseconds`
    #[prost(string, tag = "1")]
    pub(crate) name: String,
    #[prost(int64, tag = "2")]
    pub(crate) total: i64,
}

/// Puts metadata before a profile. `None`: the metadata is larger than [`MAX_META_BYTES`].
pub(crate) fn pack(meta: &ObjectMeta, pprof: &[u8]) -> Option<Bytes> {
    let meta = meta.encode_to_vec();
    if meta.len() > MAX_META_BYTES {
        return None;
    }
    let data = meta.len() + 4;
    let mut out = Vec::with_capacity(BEFORE_DATA + data + AFTER_DATA.len() + pprof.len());
    // Deflate, with an extra field, no time, unknown system: the same input gives the same bytes.
    out.extend_from_slice(&[0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 255]);
    out.extend_from_slice(&((data + 4) as u16).to_le_bytes());
    out.extend_from_slice(b"GN");
    out.extend_from_slice(&(data as u16).to_le_bytes());
    out.extend_from_slice(&crc32fast::hash(&meta).to_le_bytes());
    out.extend_from_slice(&meta);
    out.extend_from_slice(&AFTER_DATA);
    out.extend_from_slice(pprof);
    Some(out.into())
}

/// How many bytes of an object come before the profile.
pub(crate) fn packed_header_len(meta: &ObjectMeta) -> u64 {
    (BEFORE_DATA + 4 + meta.encoded_len() + AFTER_DATA.len()) as u64
}

/// Takes an object apart: its metadata, and where the profile begins. `None`: it is not an object.
pub(crate) fn unpack(object: &[u8]) -> Option<(ObjectMeta, usize)> {
    let rest = object.strip_prefix(&[0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 255])?;
    let (_extra, rest) = rest.split_first_chunk::<2>()?;
    let rest = rest.strip_prefix(b"GN")?;
    let (data, rest) = rest.split_first_chunk::<2>()?;
    let data = usize::from(u16::from_le_bytes(*data));
    let meta = rest.get(..data)?;
    let (crc, meta) = meta.split_first_chunk::<4>()?;
    if crc32fast::hash(meta) != u32::from_le_bytes(*crc) {
        return None;
    }
    let meta = ObjectMeta::decode(meta).ok()?;
    Some((meta, BEFORE_DATA + data + AFTER_DATA.len()))
}

/// Where an object lies: everything that its path is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ObjectKey {
    pub(crate) start_ms: u64,
    pub(crate) id: Ulid,
}

impl ObjectKey {
    pub(crate) fn hour(self) -> u64 {
        self.start_ms / HOUR_MS
    }

    fn path(self) -> object_store::path::Path {
        format!("{}/{}.pb.gz", hour_path(self.hour()), self.id).into()
    }
}

fn hour_path(hour: u64) -> String {
    let at = jiff::Timestamp::from_second((hour * 3600) as i64).unwrap_or_default();
    at.strftime(&format!("{TENANT}/%Y-%m-%d/%H")).to_string()
}

/// The other way round, from the directory's last two names.
fn hour_of(dir: &Path) -> Option<u64> {
    let hour: i8 = dir.file_name()?.to_str()?.parse().ok()?;
    let day: jiff::civil::Date = dir.parent()?.file_name()?.to_str()?.parse().ok()?;
    let at = jiff::civil::Time::new(hour, 0, 0, 0).ok()?;
    let at = day.to_datetime(at).to_zoned(jiff::tz::TimeZone::UTC).ok()?;
    u64::try_from(at.timestamp().as_second() / 3600).ok()
}

/// The directory of objects. Nothing else knows that it is a directory.
pub(crate) struct Objects {
    root: PathBuf,
    durable: Arc<LocalFileSystem>,
    /// Deletes need no fsync: what comes back after a power cut is found at start, and expires again.
    relaxed: Arc<LocalFileSystem>,
}

impl Objects {
    pub(crate) fn open(root: &Path) -> Result<Self, StoreError> {
        fs::create_dir_all(root).map_err(|e| StoreError::io("create", root, e))?;
        sync_dir(root)?;
        if let Some(parent) = root.parent() {
            sync_dir(parent)?;
        }
        let local = || LocalFileSystem::new_with_prefix(root).map_err(StoreError::Object);
        Ok(Self {
            root: root.to_owned(),
            // Syncs the file before it gets its name, then every directory whose entries changed.
            durable: Arc::new(local()?.with_fsync(true)),
            relaxed: Arc::new(local()?.with_automatic_cleanup(true)),
        })
    }

    /// Returns once the object survives a power cut. Writing the same object again is harmless.
    pub(crate) async fn put(&self, key: ObjectKey, object: Bytes) -> Result<(), object_store::Error> {
        self.durable.put(&key.path(), PutPayload::from_bytes(object)).await.map(drop)
    }

    /// `None`: it is gone.
    pub(crate) async fn get(&self, key: ObjectKey) -> Result<Option<Bytes>, StoreError> {
        match self.relaxed.get(&key.path()).await {
            Ok(found) => Ok(Some(found.bytes().await.map_err(StoreError::Object)?)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(StoreError::Object(error)),
        }
    }

    /// Removes an object; one that is gone already is as good.
    pub(crate) async fn delete(&self, key: ObjectKey) -> Result<(), StoreError> {
        match self.relaxed.delete(&key.path()).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(StoreError::Object(error)),
        }
    }

    /// All objects, hour by hour in no order. Leftovers of interrupted writes are removed.
    pub(crate) fn walk(
        &self,
        mut each_hour: impl FnMut(u64, Vec<(PathBuf, Ulid)>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let tenant = self.root.join(TENANT);
        for day in list(&tenant)? {
            for dir in list(&day)? {
                let Some(hour) = hour_of(&dir) else { continue };
                let mut found = Vec::new();
                for path in list(&dir)? {
                    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
                    if let Some(id) = name.strip_suffix(".pb.gz").and_then(|n| Ulid::from_string(n).ok()) {
                        found.push((path, id));
                    } else if name.contains(".pb.gz#") {
                        fs::remove_file(&path).map_err(|e| StoreError::io("remove", &path, e))?;
                    }
                }
                each_hour(hour, found)?;
            }
        }
        Ok(())
    }

    /// The file of an object, for those who compare.
    pub(crate) fn file(&self, key: ObjectKey) -> PathBuf {
        self.root.join(key.path().as_ref())
    }

    /// How much room is left on its disk.
    pub(crate) fn free_bytes(&self) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(&self.root)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }
}

fn list(dir: &Path) -> Result<Vec<PathBuf>, StoreError> {
    match fs::read_dir(dir) {
        Ok(entries) => entries
            .map(|entry| entry.map(|e| e.path()))
            .collect::<io::Result<_>>()
            .map_err(|e| StoreError::io("list", dir, e)),
        // A stray file beside the directories is nobody's business here.
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(Vec::new())
        }
        Err(e) => Err(StoreError::io("list", dir, e)),
    }
}

pub(crate) fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    fs::File::open(dir).and_then(|d| d.sync_all()).map_err(|e| StoreError::io("sync", dir, e))
}

/// Reads the metadata of an object file without its profile. `None`: it is not an object.
pub(crate) fn read_meta(path: &Path) -> io::Result<Option<ObjectMeta>> {
    let mut head = Vec::with_capacity(4096);
    let file = fs::File::open(path)?;
    file.take((BEFORE_DATA + usize::from(u16::MAX)) as u64).read_to_end(&mut head)?;
    Ok(unpack(&head).map(|(meta, _)| meta))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use proptest::prelude::*;

    use super::*;

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        out.write_all(data).unwrap();
        out.finish().unwrap()
    }

    proptest! {
        #[test]
        fn an_object_gives_back_its_metadata_and_is_plain_gzip(
            reason in ".{0,200}", profile in proptest::collection::vec(any::<u8>(), 0..500),
        ) {
            let meta = ObjectMeta {
                batch: Some(Batch { reason, ..Batch::default() }),
                types: vec![TypeTotal { name: "cpu/nanoseconds".into(), total: 7 }],
            };
            let pprof = gzip(&profile);
            let object = pack(&meta, &pprof).unwrap();
            let (back, at) = unpack(&object).unwrap();
            prop_assert_eq!(back, meta);
            prop_assert_eq!(&object[at..], &pprof[..]);
            let mut plain = Vec::new();
            flate2::read::MultiGzDecoder::new(&object[..]).read_to_end(&mut plain).unwrap();
            prop_assert_eq!(plain, profile);
        }

        #[test]
        fn bytes_that_are_no_object_are_told_apart(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(unpack(&bytes).is_none());
        }

        #[test]
        fn a_flipped_bit_in_the_metadata_is_noticed(at in 0_usize..30, bit in 0_u8..8) {
            let meta = ObjectMeta {
                batch: Some(Batch { reason: "because it was slow".into(), ..Batch::default() }),
                types: vec![],
            };
            let mut object = pack(&meta, b"").unwrap().to_vec();
            let at = BEFORE_DATA + at % (object.len() - BEFORE_DATA - AFTER_DATA.len());
            object[at] ^= 1 << bit;
            prop_assert!(unpack(&object).is_none());
        }
    }

    #[test]
    fn metadata_beyond_the_header_is_refused_and_at_the_limit_taken() {
        let with = |n: usize| ObjectMeta {
            batch: Some(Batch { reason: "x".repeat(n), ..Batch::default() }),
            types: vec![],
        };
        let overhead = with(60_000).encoded_len() - 60_000;
        let fits = with(MAX_META_BYTES - overhead);
        assert_eq!(unpack(&pack(&fits, b"p").unwrap()).unwrap().0, fits);
        assert!(pack(&with(MAX_META_BYTES - overhead + 1), b"p").is_none());
    }

    #[test]
    fn paths_say_tenant_day_and_hour() {
        let key = ObjectKey { start_ms: 1_700_000_000_000, id: Ulid::from_parts(1, 2) };
        assert_eq!(key.path().as_ref(), "default/2023-11-14/22/00000000010000000000000002.pb.gz");
        assert_eq!(hour_of(Path::new("/x/default/2023-11-14/22")), Some(key.hour()));
    }
}
