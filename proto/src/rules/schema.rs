//! JSON schema of the YAML and JSON form of a rule, made from the descriptors of the protobuf types. The custom resource
//! and editors use it.

use prost::Message as _;
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet,
    field_descriptor_proto::{Label, Type},
};
use serde_json::{Map, Value, json};

const PACKAGE: &str = ".gannet.control.v1.";
/// Pattern of durations: `30s`, `1h30m`, `250ms`.
const DURATION: &str = r"^([0-9]+(\.[0-9]+)?(d|h|m|s|ms|us|ns))+$";
/// Names of fields that are label selectors, written as a text or a map.
const SELECTORS: [&str; 2] = ["pod_labels", "selector"];

/// Returns the schema of a rule in OpenAPI v3, structural as Kubernetes requires it. Returns `None` only if the built-in
/// descriptors do not match the types, which a test excludes.
pub fn json_schema() -> Option<Value> {
    let set = FileDescriptorSet::decode(crate::DESCRIPTORS).ok()?;
    let file = set.file.into_iter().find(|file| file.package() == "gannet.control.v1")?;
    Schema { file: &file }.message("Rule")
}

struct Schema<'a> {
    file: &'a FileDescriptorProto,
}

/// A message type with its descriptor path, which leads to its comments.
struct Found<'a> {
    message: &'a DescriptorProto,
    path: Vec<i32>,
}

impl<'a> Schema<'a> {
    /// Finds a message type by its name, for instance `Condition.Pressure`.
    fn find(&self, name: &str) -> Option<Found<'a>> {
        let mut parts = name.split('.');
        let first = parts.next()?;
        let at = self.file.message_type.iter().position(|m| m.name() == first)?;
        // Field numbers in descriptors: `message_type` is 4 in a file, `nested_type` is 3 in a message.
        let mut found = Found { message: &self.file.message_type[at], path: vec![4, at as i32] };
        for part in parts {
            let at = found.message.nested_type.iter().position(|m| m.name() == part)?;
            found.path.extend([3, at as i32]);
            found.message = &found.message.nested_type[at];
        }
        Some(found)
    }

    fn find_enum(&self, name: &str) -> Option<&'a EnumDescriptorProto> {
        let (outer, name) = name.rsplit_once('.')?;
        self.find(outer)?.message.enum_type.iter().find(|e| e.name() == name)
    }

    fn comment(&self, path: &[i32]) -> Option<String> {
        let info = self.file.source_code_info.as_ref()?;
        let location = info.location.iter().find(|location| location.path == path)?;
        let text = location.leading_comments.as_deref()?.split_whitespace().collect::<Vec<_>>().join(" ");
        (!text.is_empty()).then_some(text)
    }

    fn message(&self, name: &str) -> Option<Value> {
        let found = self.find(name)?;
        let mut properties = Map::new();
        let mut stacks = Map::new();
        for (at, field) in found.message.field.iter().enumerate() {
            let mut path = found.path.clone();
            path.extend([2, at as i32]);
            let mut schema = self.field(field, found.message)?;
            if let Some(comment) = self.comment(&path) {
                schema["description"] = comment.into();
            }
            // The YAML form groups these fields as `stacks: {user: true}`.
            match field.name().strip_suffix("_stacks") {
                Some(which) => stacks.insert(which.to_owned(), schema),
                None => properties.insert(field.name().to_owned(), schema),
            };
        }
        if !stacks.is_empty() {
            let schema = json!({ "type": "object", "properties": stacks, "description": "Parts of the stack to record." });
            properties.insert("stacks".to_owned(), schema);
        }
        let mut schema = json!({ "type": "object", "properties": properties });
        // The YAML form of a oneof is a map with one entry.
        if !found.message.oneof_decl.is_empty() && found.message.field.iter().all(|f| f.oneof_index.is_some())
        {
            schema["minProperties"] = 1.into();
            schema["maxProperties"] = 1.into();
        }
        Some(schema)
    }

    fn field(&self, field: &FieldDescriptorProto, within: &DescriptorProto) -> Option<Value> {
        let one = self.one(field, within)?;
        if field.label() != Label::Repeated || one.get("additionalProperties").is_some() {
            return Some(one);
        }
        Some(json!({ "type": "array", "items": one }))
    }

    fn one(&self, field: &FieldDescriptorProto, within: &DescriptorProto) -> Option<Value> {
        Some(match field.r#type() {
            Type::String if SELECTORS.contains(&field.name()) => {
                json!({ "x-kubernetes-preserve-unknown-fields": true })
            }
            Type::String => json!({ "type": "string" }),
            Type::Bool => json!({ "type": "boolean" }),
            Type::Uint32 | Type::Uint64 => json!({ "type": "integer", "format": "int64", "minimum": 0 }),
            Type::Int32 | Type::Int64 => json!({ "type": "integer", "format": "int64" }),
            Type::Enum => {
                let values = self.find_enum(field.type_name().strip_prefix(PACKAGE)?)?;
                let names: Vec<String> = values
                    .value
                    .iter()
                    // Number 0 means "not given" on the wire.
                    .filter(|value| value.number() != 0)
                    .map(|value| value.name().to_lowercase())
                    .collect();
                json!({ "type": "string", "enum": names })
            }
            Type::Message => match field.type_name() {
                ".google.protobuf.Duration" => json!({ "type": "string", "pattern": DURATION }),
                ".google.protobuf.Timestamp" => json!({ "type": "string", "format": "date-time" }),
                name => {
                    let entry = name.rsplit('.').next().unwrap_or_default();
                    let is_map = within.nested_type.iter().any(|nested| {
                        nested.name() == entry
                            && nested.options.as_ref().is_some_and(prost_types::MessageOptions::map_entry)
                    });
                    if is_map {
                        json!({ "type": "object", "additionalProperties": { "type": "string" } })
                    } else {
                        self.message(name.strip_prefix(PACKAGE)?)?
                    }
                }
            },
            _ => return None,
        })
    }
}
