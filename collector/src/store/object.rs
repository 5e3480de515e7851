//! The objects: one immutable file a batch, which carries its own metadata.
//!
//! An object is two gzip members. The first is empty and holds the metadata in its header's extra field (subfield
//! `GN`: CRC-32, little endian, then an [`ObjectMeta`] in protobuf). The second is the profile, byte for byte as the
//! agent sent it; the object of a batch that only carries a ledger has none. Readers of gzip put members together and
//! skip extra fields, so `go tool pprof` opens an object as it lies on disk, and the index can be rebuilt from the
//! first bytes of each object without inflating anything.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use gannet_proto::ingest::Batch;
use object_store::{
    GetOptions, GetRange, ObjectStore, ObjectStoreExt as _, PutPayload, RetryConfig, aws::AmazonS3Builder,
    azure::MicrosoftAzureBuilder, gcp::GoogleCloudStorageBuilder, local::LocalFileSystem, path::Path as Key,
    prefix::PrefixStore,
};
use prost::Message as _;
use ulid::Ulid;

use super::StoreError;

pub(crate) const HOUR_MS: u64 = 3_600_000;
/// Of the first member: fixed header, length of the extra field, subfield header.
const BEFORE_DATA: usize = 10 + 2 + 4;
/// Of the first member: an empty deflate block, CRC and length of nothing.
const AFTER_DATA: [u8; 10] = [3, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// What the extra field can hold besides the subfield's header and the checksum.
pub(crate) const MAX_META_BYTES: usize = u16::MAX as usize - 4 - 4;
/// Heads of objects that are read from a bucket at one time.
const HEADS_AT_ONCE: usize = 16;
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

    fn path(self) -> Key {
        object_path(self.hour(), self.id)
    }
}

fn object_path(hour: u64, id: Ulid) -> Key {
    format!("{}/{id}.pb.gz", hour_path(hour)).into()
}

fn hour_path(hour: u64) -> String {
    let at = jiff::Timestamp::from_second((hour * 3600) as i64).unwrap_or_default();
    at.strftime(&format!("{TENANT}/%Y-%m-%d/%H")).to_string()
}

/// The other way round, from the path's last two names.
fn hour_of(dir: &Key) -> Option<u64> {
    let mut names = dir.as_ref().rsplit('/');
    let hour: i8 = names.next()?.parse().ok()?;
    let day: jiff::civil::Date = names.next()?.parse().ok()?;
    let at = jiff::civil::Time::new(hour, 0, 0, 0).ok()?;
    let at = day.to_datetime(at).to_zoned(jiff::tz::TimeZone::UTC).ok()?;
    u64::try_from(at.timestamp().as_second() / 3600).ok()
}

/// The id that an object's path ends with.
fn id_of(path: &Key) -> Option<Ulid> {
    Ulid::from_string(path.filename()?.strip_suffix(".pb.gz")?).ok()
}

/// What the beginning of an object says, and how large the object is.
pub(crate) struct Head {
    pub(crate) meta: ObjectMeta,
    pub(crate) bytes: u64,
}

/// All objects, in a directory or in a bucket. Nothing else knows which.
pub(crate) struct Objects {
    durable: Arc<dyn ObjectStore>,
    /// Deletes need no fsync: what comes back after a power cut is found at start, and expires again.
    relaxed: Arc<dyn ObjectStore>,
    /// Where the directory is; none: it is a bucket, which others write to as well.
    root: Option<PathBuf>,
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
            // Syncs the file before it gets its name, then every directory whose entries changed.
            durable: Arc::new(local()?.with_fsync(true)),
            relaxed: Arc::new(local()?.with_automatic_cleanup(true)),
            root: Some(root.to_owned()),
        })
    }

    pub(crate) fn in_bucket(bucket: &Bucket) -> Result<Self, StoreError> {
        // Once in a process; whoever was first chose the same.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let store = bucket.connect().map_err(StoreError::Object)?;
        let store: Arc<dyn ObjectStore> = Arc::new(PrefixStore::new(store, bucket.url.path()));
        Ok(Self { durable: Arc::clone(&store), relaxed: store, root: None })
    }

    /// Others may write there too.
    pub(crate) fn is_shared(&self) -> bool {
        self.root.is_none()
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

    /// The hours that have objects.
    pub(crate) async fn hours(&self) -> Result<BTreeSet<u64>, StoreError> {
        let below = async |dir: Key| {
            let found = self.relaxed.list_with_delimiter(Some(&dir)).await;
            Ok::<_, StoreError>(found.map_err(StoreError::Object)?.common_prefixes)
        };
        let mut hours = BTreeSet::new();
        for day in below(TENANT.into()).await? {
            hours.extend(below(day).await?.iter().filter_map(hour_of));
        }
        Ok(hours)
    }

    /// The objects of an hour. Leftovers of interrupted writes are removed.
    pub(crate) async fn of_hour(&self, hour: u64) -> Result<Vec<Ulid>, StoreError> {
        if let Some(root) = &self.root {
            remove_leftovers(&root.join(hour_path(hour)))?;
        }
        let dir = Key::from(hour_path(hour));
        self.relaxed
            .list(Some(&dir))
            .try_filter_map(async |object| Ok(id_of(&object.location)))
            .try_collect()
            .await
            .map_err(StoreError::Object)
    }

    /// Reads what objects say of themselves, without their profiles. `None`: there is no such object, or it is none.
    pub(crate) async fn heads(&self, hour: u64, ids: &[Ulid]) -> Result<Vec<Option<Head>>, StoreError> {
        stream::iter(ids.iter().map(|id| self.head(object_path(hour, *id))))
            .buffered(HEADS_AT_ONCE)
            .try_collect()
            .await
    }

    async fn head(&self, path: Key) -> Result<Option<Head>, StoreError> {
        let range = GetRange::Bounded(0..(BEFORE_DATA + usize::from(u16::MAX)) as u64);
        let found = match self
            .relaxed
            .get_opts(&path, GetOptions { range: Some(range), ..GetOptions::default() })
            .await
        {
            Ok(found) => found,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(StoreError::Object(error)),
        };
        let bytes = found.meta.size;
        let head = found.bytes().await.map_err(StoreError::Object)?;
        Ok(unpack(&head).map(|(meta, _)| Head { meta, bytes }))
    }
}

/// A bucket and a path in it: `s3://BUCKET/PATH`, `gs://BUCKET/PATH`, `az://CONTAINER/PATH`.
#[derive(Clone, PartialEq, Eq)]
pub struct Bucket {
    url: url::Url,
    /// Names in small letters, as [`object_store`] knows them: `aws_region`.
    settings: Vec<(String, String)>,
}

impl Bucket {
    /// Reads an address. What else is to be known of it (credentials, region, endpoint) is taken from the environment, under
    /// the names that the clouds' own tools know. An error says what can be written.
    pub fn parse(text: &str) -> Result<Self, String> {
        let forms = "write s3://BUCKET/PATH, gs://BUCKET/PATH, az://CONTAINER/PATH, or a directory";
        let url = url::Url::parse(text).map_err(|error| format!("{error}: {forms}"))?;
        if !matches!(url.scheme(), "s3" | "gs" | "az") {
            return Err(format!("{}:// is no bucket that can be reached: {forms}", url.scheme()));
        }
        if url.host_str().is_none_or(str::is_empty) {
            return Err(format!("it names no bucket: {forms}"));
        }
        if url.query().is_some()
            || url.fragment().is_some()
            || !url.username().is_empty()
            || url.port().is_some()
        {
            return Err(format!(
                "it holds more than a bucket and a path: {forms}; all else is taken from the environment"
            ));
        }
        let settings = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .filter(|(name, _)| ["AWS_", "GOOGLE_", "AZURE_"].iter().any(|cloud| name.starts_with(cloud)))
            .map(|(name, value)| (name.to_lowercase(), value))
            .collect();
        Ok(Self { url, settings })
    }

    /// Sets what is else taken from the environment.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.settings.push((name.to_owned(), value.into()));
        self
    }

    fn connect(&self) -> Result<Box<dyn ObjectStore>, object_store::Error> {
        // An agent waits for the answer, and sends again what was put off.
        let retry =
            RetryConfig { max_retries: 3, retry_timeout: Duration::from_secs(20), ..RetryConfig::default() };
        macro_rules! build {
            ($builder:ty) => {{
                let mut builder = <$builder>::new().with_url(self.url.as_str()).with_retry(retry);
                for (name, value) in &self.settings {
                    // What is meant for other tools is none of ours.
                    if let Ok(key) = name.parse() {
                        builder = builder.with_config(key, value);
                    }
                }
                Ok(Box::new(builder.build()?))
            }};
        }
        match self.url.scheme() {
            "s3" => build!(AmazonS3Builder),
            "gs" => build!(GoogleCloudStorageBuilder),
            _ => build!(MicrosoftAzureBuilder),
        }
    }
}

/// Without what may be secret.
impl std::fmt::Debug for Bucket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bucket({})", self.url)
    }
}

impl std::fmt::Display for Bucket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.url.fmt(f)
    }
}

/// What a write leaves behind that did not come to its end.
fn remove_leftovers(dir: &Path) -> Result<(), StoreError> {
    for path in list(dir)? {
        if path.file_name().and_then(|n| n.to_str()).is_some_and(|name| name.contains(".pb.gz#")) {
            fs::remove_file(&path).map_err(|e| StoreError::io("remove", &path, e))?;
        }
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

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

    #[rstest::rstest]
    #[case::scheme("ftp://bucket/x", "ftp:// is no bucket")]
    #[case::nameless("s3:///x", "names no bucket")]
    #[case::secret("s3://key@bucket/x", "from the environment")]
    #[case::query("gs://bucket/x?region=y", "from the environment")]
    #[case::no_url("s3:// /", "write s3://BUCKET/PATH")]
    fn what_is_no_bucket_is_refused_with_the_cure(#[case] text: &str, #[case] cure: &str) {
        let error = Bucket::parse(text).unwrap_err();
        assert!(error.contains(cure) && error.contains("or a directory"), "{error}");
    }

    #[test]
    fn a_buckets_credentials_are_not_shown() {
        let bucket = Bucket::parse("s3://bucket/some/path").unwrap().with("aws_secret_access_key", "hidden");
        assert_eq!(format!("{bucket} {bucket:?}"), "s3://bucket/some/path Bucket(s3://bucket/some/path)");
    }

    #[test]
    fn paths_say_tenant_day_and_hour() {
        let key = ObjectKey { start_ms: 1_700_000_000_000, id: Ulid::from_parts(1, 2) };
        assert_eq!(key.path().as_ref(), "default/2023-11-14/22/00000000010000000000000002.pb.gz");
        assert_eq!(hour_of(&Key::from("default/2023-11-14/22")), Some(key.hour()));
    }
}
