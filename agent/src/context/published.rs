//! The context that a process publishes: the attributes of its resource, in a memory region with a header (OTEP 4719).
//!
//! The process may change it at any time. It sets the time in the header to 0 before a change, and to the new time behind it. So a
//! reading counts if the header is the same before and behind it.

use std::{collections::BTreeMap, sync::Arc, thread, time::Duration};

use prost::Message;

use super::KEYS;
use crate::{
    model::{SpanKeys, printable},
    runtimes::Memory,
};

const SIGNATURE: &[u8; 8] = b"OTEL_CTX";
/// The version of the header's form.
const VERSION: u32 = 2;
const HEADER_BYTES: usize = 32;
/// Bytes of attributes that are read. Those of SDKs have some hundred.
const MAX_PAYLOAD_BYTES: u32 = 64 << 10;
/// Readings of a context that changes meanwhile, and the pause between two.
const ATTEMPTS: u32 = 8;
const PAUSE: Duration = Duration::from_millis(1);

/// The form in which threads publish their spans.
const SCHEMA: &str = "threadlocal.schema_version";
/// The names of the attributes that threads publish beside their spans, by number.
const SPAN_KEYS: &str = "threadlocal.attribute_key_map";
/// Go keeps spans in the labels of its goroutines, which are read without this.
const GO_LABELS: &str = "go_pprof_labels";

/// Why a published context is not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ContextFault {
    /// Memory that cannot be read.
    #[error("its memory cannot be read")]
    Unreadable,
    /// A form of another version.
    #[error("its form has version {0}, and the agent reads version {VERSION}")]
    Version(u32),
    /// Too many bytes.
    #[error("it has {0} bytes, and the agent reads {MAX_PAYLOAD_BYTES}")]
    TooLarge(u32),
    /// It changed during each reading.
    #[error("it changes all the time")]
    Changing,
    /// The attributes are damaged.
    #[error("its attributes are no protobuf message of that kind")]
    Malformed,
}

/// The context of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Published {
    /// The address of its header, and the bytes there.
    address: u64,
    header: [u8; HEADER_BYTES],
    /// The attributes that name a service.
    pub(super) resource: BTreeMap<&'static str, String>,
    /// The form in which threads publish their spans; empty if they publish none.
    pub(super) schema: String,
    /// The names of the attributes of spans.
    pub(super) keys: Arc<SpanKeys>,
}

impl Published {
    /// Returns the names of the attributes of spans.
    pub(crate) fn span_keys(&self) -> &Arc<SpanKeys> {
        &self.keys
    }

    /// Reports whether threads publish their spans in memory of their own.
    pub(super) fn has_spans(&self) -> bool {
        !self.schema.is_empty() && !self.schema.starts_with(GO_LABELS)
    }
}

/// Reads the context at the first of these mappings that has one. `None` if none has.
pub(super) fn find(memory: &dyn Memory, mappings: &[u64]) -> Option<Result<Published, ContextFault>> {
    mappings.iter().find_map(|address| read(memory, *address).transpose())
}

/// Reports whether a context is as it was read.
pub(super) fn is_unchanged(memory: &dyn Memory, before: &Published) -> bool {
    memory.array(before.address).is_ok_and(|header| header == before.header)
}

/// Reads the context with a header at this address; `None` if there is no header.
fn read(memory: &dyn Memory, address: u64) -> Result<Option<Published>, ContextFault> {
    for attempt in 0..ATTEMPTS {
        if attempt > 0 {
            thread::sleep(PAUSE);
        }
        let header = memory.array(address).map_err(|_| ContextFault::Unreadable)?;
        // The signature is written last.
        if !header.starts_with(SIGNATURE) {
            return Ok(None);
        }
        let Some(Header { version, bytes, published_at, payload }) = Header::of(&header) else {
            return Ok(None);
        };
        if version != VERSION {
            return Err(ContextFault::Version(version));
        }
        if published_at == 0 {
            continue;
        }
        if bytes > MAX_PAYLOAD_BYTES {
            return Err(ContextFault::TooLarge(bytes));
        }
        // During a change the former payload may be gone: only an unchanged header makes that a fault.
        let read = memory.bytes(payload, bytes as usize);
        if memory.array(address).ok() != Some(header) {
            continue;
        }
        let payload = read.map_err(|_| ContextFault::Unreadable)?;
        let context = decode(&payload).ok_or(ContextFault::Malformed)?;
        return Ok(Some(Published { address, header, ..context }));
    }
    Err(ContextFault::Changing)
}

/// The fields of a header behind the signature.
struct Header {
    version: u32,
    bytes: u32,
    published_at: u64,
    payload: u64,
}

impl Header {
    fn of(header: &[u8; HEADER_BYTES]) -> Option<Self> {
        let (_, rest) = header.split_first_chunk::<8>()?;
        let (version, rest) = rest.split_first_chunk()?;
        let (bytes, rest) = rest.split_first_chunk()?;
        let (published_at, rest) = rest.split_first_chunk()?;
        Some(Self {
            version: u32::from_ne_bytes(*version),
            bytes: u32::from_ne_bytes(*bytes),
            published_at: u64::from_ne_bytes(*published_at),
            payload: u64::from_ne_bytes(*rest.first_chunk()?),
        })
    }
}

/// `opentelemetry.proto.processcontext.v1development.ProcessContext`, with the fields that are used.
#[derive(Clone, PartialEq, Message)]
struct ProcessContext {
    #[prost(message, optional, tag = "1")]
    resource: Option<Resource>,
    #[prost(message, repeated, tag = "2")]
    attributes: Vec<KeyValue>,
}

/// The message `opentelemetry.proto.resource.v1.Resource`, with the field that is used.
#[derive(Clone, PartialEq, Message)]
struct Resource {
    #[prost(message, repeated, tag = "1")]
    attributes: Vec<KeyValue>,
}

/// The message `opentelemetry.proto.common.v1.KeyValue`, one attribute.
#[derive(Clone, PartialEq, Message)]
struct KeyValue {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(message, optional, tag = "2")]
    value: Option<AnyValue>,
}

/// `opentelemetry.proto.common.v1.AnyValue`: texts and lists of texts.
#[derive(Clone, PartialEq, Message)]
struct AnyValue {
    #[prost(string, optional, tag = "1")]
    text: Option<String>,
    #[prost(message, optional, tag = "5")]
    array: Option<ArrayValue>,
}

/// The message `opentelemetry.proto.common.v1.ArrayValue`, a list of values.
#[derive(Clone, PartialEq, Message)]
struct ArrayValue {
    #[prost(message, repeated, tag = "1")]
    values: Vec<AnyValue>,
}

impl KeyValue {
    fn text(&self) -> &str {
        self.value.as_ref().and_then(|value| value.text.as_deref()).unwrap_or_default()
    }

    fn texts(&self) -> impl Iterator<Item = &str> {
        let array = self.value.as_ref().and_then(|value| value.array.as_ref());
        array
            .into_iter()
            .flat_map(|array| &array.values)
            .map(|value| value.text.as_deref().unwrap_or_default())
    }
}

/// Reads attributes. The first SDKs published a resource alone, which has them in the place of the message around it.
fn decode(payload: &[u8]) -> Option<Published> {
    let context = ProcessContext::decode(payload).ok().or_else(|| {
        let attributes = Resource::decode(payload).ok()?.attributes;
        Some(ProcessContext { resource: Some(Resource { attributes: attributes.clone() }), attributes })
    })?;
    let mut published = Published::default();
    for attribute in context.resource.into_iter().flat_map(|resource| resource.attributes) {
        if let Some(key) = KEYS.into_iter().find(|key| *key == attribute.key) {
            published.resource.insert(key, attribute.text().to_owned());
        }
    }
    for attribute in &context.attributes {
        match attribute.key.as_str() {
            SCHEMA => published.schema = printable(attribute.text()).chars().take(64).collect(),
            SPAN_KEYS => published.keys = Arc::new(SpanKeys::of(attribute.texts())),
            _ => {}
        }
    }
    Some(published)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use proptest::prelude::*;

    use super::*;

    /// Memory at address 0, which changes between reads.
    struct Changing(RefCell<Vec<Vec<u8>>>);

    impl Memory for Changing {
        fn read(&self, address: u64, bytes: &mut [u8]) -> bool {
            let mut states = self.0.borrow_mut();
            let now = if states.len() > 1 { states.remove(0) } else { states[0].clone() };
            let from = usize::try_from(address).unwrap_or(usize::MAX);
            let part = from.checked_add(bytes.len()).and_then(|end| now.get(from..end));
            part.map(|part| bytes.copy_from_slice(part)).is_some()
        }
    }

    fn attribute(key: &str, text: &str) -> KeyValue {
        let value = AnyValue { text: Some(text.into()), ..AnyValue::default() };
        KeyValue { key: key.into(), value: Some(value) }
    }

    /// Returns a header, and the payload behind it.
    fn region(version: u32, published_at: u64, payload: &[u8]) -> Vec<u8> {
        let mut bytes = SIGNATURE.to_vec();
        bytes.extend(version.to_ne_bytes());
        bytes.extend(u32::try_from(payload.len()).unwrap().to_ne_bytes());
        bytes.extend(published_at.to_ne_bytes());
        bytes.extend((HEADER_BYTES as u64).to_ne_bytes());
        bytes.extend(payload);
        bytes
    }

    fn context(name: &str) -> ProcessContext {
        let values = ["datadog.local_root_span_id", "http.route"];
        let values = values.map(|text| AnyValue { text: Some(text.into()), ..AnyValue::default() }).to_vec();
        let keys = KeyValue {
            key: SPAN_KEYS.into(),
            value: Some(AnyValue { array: Some(ArrayValue { values }), ..AnyValue::default() }),
        };
        ProcessContext {
            resource: Some(Resource {
                attributes: vec![attribute("service.name", name), attribute("host.name", "h")],
            }),
            attributes: vec![attribute(SCHEMA, "tlsdesc_v1_dev"), keys],
        }
    }

    fn read_states(states: Vec<Vec<u8>>) -> Result<Option<Published>, ContextFault> {
        read(&Changing(RefCell::new(states)), 0)
    }

    #[test]
    fn a_published_context_is_read() {
        let bytes = region(2, 7, &context("shop").encode_to_vec());
        let found = read_states(vec![bytes.clone()]).unwrap().unwrap();
        assert_eq!(found.resource, [("service.name", "shop".to_owned())].into());
        assert!(found.has_spans());
        assert_eq!(*found.keys, SpanKeys::of(["local_root_span_id", "http.route"].into_iter()));
        assert!(is_unchanged(&Changing(RefCell::new(vec![bytes])), &found));
        let later = region(2, 8, &context("shop").encode_to_vec());
        assert!(!is_unchanged(&Changing(RefCell::new(vec![later])), &found));
        // A resource alone.
        let resource = context("old").resource.unwrap().encode_to_vec();
        let old = read_states(vec![region(2, 7, &resource)]).unwrap().unwrap();
        assert_eq!((old.resource["service.name"].as_str(), old.has_spans()), ("old", false));
    }

    #[test]
    fn a_context_that_changes_is_read_again() {
        let [first, second] =
            [(1, "first"), (2, "second")].map(|(at, name)| region(2, at, &context(name).encode_to_vec()));
        let busy = region(2, 0, &context("first").encode_to_vec());
        let name = |states| read_states(states).map(|found| found.unwrap().resource["service.name"].clone());
        // The payload of the second one, under the header of the first one.
        let states = vec![first.clone(), second.clone(), second.clone()];
        assert_eq!(name(states).as_deref(), Ok("second"));
        assert_eq!(name(vec![busy.clone(), busy.clone(), first]).as_deref(), Ok("first"));
        assert_eq!(name(vec![busy]), Err(ContextFault::Changing));
    }

    #[test]
    fn what_is_no_context_has_a_reason() {
        let payload = context("x").encode_to_vec();
        assert_eq!(read_states(vec![region(3, 1, &payload)]), Err(ContextFault::Version(3)));
        assert_eq!(read_states(vec![region(2, 1, &[0xff; 9])]), Err(ContextFault::Malformed));
        let large = vec![0; MAX_PAYLOAD_BYTES as usize + 1];
        assert_eq!(read_states(vec![region(2, 1, &large)]), Err(ContextFault::TooLarge(65_537)));
        assert_eq!(read_states(vec![vec![0; 64]]), Ok(None), "not published yet");
        assert_eq!(read_states(vec![vec![0; 8]]), Err(ContextFault::Unreadable));
        let mut lost = region(2, 1, &payload);
        lost[24..32].copy_from_slice(&u64::MAX.to_ne_bytes());
        assert_eq!(read_states(vec![lost]), Err(ContextFault::Unreadable));
    }

    proptest! {
        #[test]
        fn no_bytes_break_the_reader(bytes: Vec<u8>, payload: Vec<u8>, at: u64) {
            let _ = read_states(vec![bytes]);
            let _ = read_states(vec![region(2, at.max(1), &payload)]);
        }
    }
}
