//! The bytes of requests: protobuf, and protobuf's JSON with ids in hex.

use std::sync::LazyLock;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use opentelemetry_proto::tonic::collector::profiles::v1development::ExportProfilesServiceRequest;
use prost::Message as _;
use prost_reflect::{
    DescriptorPool, DeserializeOptions, DynamicMessage, MessageDescriptor, SerializeOptions,
};
use serde_json::Value;

use super::{OtlpError, attributes};

/// Name of the request in the descriptors.
const REQUEST: &str = "opentelemetry.proto.collector.profiles.v1development.ExportProfilesServiceRequest";
/// Ids, which OTLP writes in hex and protobuf in base64.
const IDS: [&str; 6] = ["profileId", "profile_id", "spanId", "span_id", "traceId", "trace_id"];

static DESCRIPTOR: LazyLock<Option<MessageDescriptor>> = LazyLock::new(|| {
    DescriptorPool::decode(opentelemetry_proto::DESCRIPTORS).ok()?.get_message_by_name(REQUEST)
});

/// Reads a request in protobuf.
pub fn from_protobuf(bytes: &[u8]) -> Result<ExportProfilesServiceRequest, OtlpError> {
    ExportProfilesServiceRequest::decode(bytes).map_err(|error| {
        let why = error.to_string();
        // The fields of a sample have other numbers in 1.9, and so other types.
        if why.contains("Sample.") { OtlpError::OldLayout { why } } else { OtlpError::Protobuf { why } }
    })
}

/// Reads a request in JSON. Unknown fields are ignored, as in protobuf.
pub fn from_json(bytes: &[u8]) -> Result<ExportProfilesServiceRequest, OtlpError> {
    let mut value: Value = serde_json::from_slice(bytes).map_err(|error| invalid(error.to_string()))?;
    ids_to_base64(&mut value).map_err(|name| invalid(format!("{name} is not in hex")))?;
    let options = DeserializeOptions::new().deny_unknown_fields(false);
    let message = DynamicMessage::deserialize_with_options(descriptor()?, value, &options)
        .map_err(|error| invalid(error.to_string()))?;
    message.transcode_to().map_err(|error| invalid(error.to_string()))
}

/// Returns a request in JSON, in one line without an end. An id has an even number of bytes.
pub fn to_json(mut request: ExportProfilesServiceRequest) -> Result<Vec<u8>, OtlpError> {
    // Protobuf's JSON has bytes in base64, whose digits include those of hex: it writes these bytes as the id in hex.
    let as_hex = |id: &mut Vec<u8>| {
        *id = STANDARD.decode(gannet_base::hex(id)).map_err(|error| invalid(error.to_string()))?;
        Ok(())
    };
    for link in request.dictionary.iter_mut().flat_map(|dictionary| &mut dictionary.link_table) {
        as_hex(&mut link.trace_id)?;
        as_hex(&mut link.span_id)?;
    }
    let scopes = request.resource_profiles.iter_mut().flat_map(|resource| &mut resource.scope_profiles);
    for profile in scopes.flat_map(|scope| &mut scope.profiles) {
        as_hex(&mut profile.profile_id)?;
    }
    let mut message = DynamicMessage::new(descriptor()?);
    message.transcode_from(&request).map_err(|error| invalid(error.to_string()))?;
    let mut json = serde_json::Serializer::new(Vec::new());
    message
        .serialize_with_options(&mut json, &SerializeOptions::new())
        .map_err(|error| invalid(error.to_string()))?;
    Ok(json.into_inner())
}

fn invalid(why: String) -> OtlpError {
    OtlpError::Json { why }
}

fn descriptor() -> Result<MessageDescriptor, OtlpError> {
    DESCRIPTOR.clone().ok_or_else(|| invalid("this program lacks the descriptors".into()))
}

/// Writes ids as protobuf's JSON has them. The error is the name of an id that is not in hex.
fn ids_to_base64(value: &mut Value) -> Result<(), String> {
    match value {
        Value::Array(values) => values.iter_mut().try_for_each(ids_to_base64),
        Value::Object(fields) => fields.iter_mut().try_for_each(|(name, value)| match value {
            Value::String(hex) if IDS.contains(&name.as_str()) => {
                let bytes = attributes::from_hex(&hex.to_ascii_lowercase()).ok_or_else(|| name.clone())?;
                *hex = STANDARD.encode(bytes);
                Ok(())
            }
            value => ids_to_base64(value),
        }),
        _ => Ok(()),
    }
}
