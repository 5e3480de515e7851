//! Writes profiles as requests of OTLP.

use std::{collections::BTreeMap, hash::Hash};

use gannet_proto::{
    labels,
    pprof::Profile,
    profiles::{self, Label, Location, Mapping, Sample},
};
use indexmap::IndexSet;
use opentelemetry_proto::tonic::{
    collector::profiles::v1development::ExportProfilesServiceRequest,
    common::v1::{AnyValue, ArrayValue, InstrumentationScope, KeyValue, any_value::Value},
    profiles::v1development as otlp,
    resource::v1::Resource,
};
use sha2::{Digest as _, Sha256};
use ulid::Ulid;

use super::{SCOPE, attributes, content_id};

/// Version of the semantic conventions whose names the attributes have.
const SCHEMA_URL: &str = "https://opentelemetry.io/schemas/1.37.0";

/// A profile to send. It must have passed [`gannet_proto::pprof::check`].
pub struct Outgoing<'a> {
    /// Id of the batch, and of the part if the batch has several: `ULID`, `ULID-1`. Without one (`""`) the profile gets an id made
    /// from its content.
    pub id: &'a str,
    /// Labels of the series.
    pub labels: &'a BTreeMap<String, String>,
    /// Samples with their tables.
    pub profile: &'a Profile,
}

/// Builds one request. Its dictionary has each entry once, and none that nothing refers to.
#[derive(Default)]
pub struct Encoder {
    dictionary: Dictionary,
    resources: Vec<otlp::ResourceProfiles>,
}

impl Encoder {
    /// Starts an empty request.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a profile as a resource of its own.
    pub fn add(&mut self, outgoing: &Outgoing<'_>) {
        let Outgoing { id, labels, profile } = *outgoing;
        let id = if id.is_empty() { content_id(labels, profile).to_string() } else { id.to_owned() };
        let profiles = Conversion::new(&mut self.dictionary, profile).profiles(&id);
        let text = |index: i64| text_of(profile, index);
        let default_type = text(profile.default_sample_type);
        let scope = InstrumentationScope {
            name: SCOPE.to_owned(),
            version: gannet_proto::VERSION.to_owned(),
            attributes: (!default_type.is_empty())
                .then(|| key_value(attributes::DEFAULT_SAMPLE_TYPE, default_type))
                .into_iter()
                .collect(),
            dropped_attributes_count: 0,
        };
        self.resources.push(otlp::ResourceProfiles {
            resource: Some(Resource { attributes: resource_attributes(labels), ..Resource::default() }),
            scope_profiles: vec![otlp::ScopeProfiles {
                scope: Some(scope),
                profiles,
                schema_url: SCHEMA_URL.to_owned(),
            }],
            schema_url: SCHEMA_URL.to_owned(),
        });
    }

    /// Returns the request.
    pub fn finish(self) -> ExportProfilesServiceRequest {
        ExportProfilesServiceRequest {
            resource_profiles: self.resources,
            dictionary: Some(self.dictionary.finish()),
        }
    }
}

fn text_of(profile: &Profile, index: i64) -> &str {
    usize::try_from(index).ok().and_then(|at| profile.string_table.get(at)).map_or("", String::as_str)
}

fn string_value(text: &str) -> AnyValue {
    AnyValue { value: Some(Value::StringValue(text.to_owned())) }
}

fn key_value(key: &str, value: &str) -> KeyValue {
    KeyValue { key: key.to_owned(), value: Some(string_value(value)), key_strindex: 0 }
}

/// Returns the labels of a series as attributes of its resource, each key once.
fn resource_attributes(labels: &BTreeMap<String, String>) -> Vec<KeyValue> {
    let mut all: BTreeMap<&str, &str> = BTreeMap::new();
    for (name, value) in labels {
        all.insert(attributes::attribute(name), value);
    }
    let workload = labels.get(labels::WORKLOAD_KIND).and_then(|kind| attributes::workload_attribute(kind));
    let named = workload.as_deref().zip(labels.get(labels::WORKLOAD).map(String::as_str));
    if let Some((attribute, name)) = named {
        all.remove(labels::WORKLOAD);
        all.remove(labels::WORKLOAD_KIND);
        all.insert(attribute, name);
    }
    all.into_iter().map(|(key, value)| key_value(key, value)).collect()
}

/// Returns the 16 bytes that identify one OTLP profile: the batch's own id for the first sample type, and numbers made from it for
/// the others.
fn profile_id(id: &str, sample_type: usize) -> Vec<u8> {
    match Ulid::from_string(id) {
        Ok(ulid) if sample_type == 0 => ulid.to_bytes().to_vec(),
        _ => Sha256::digest(format!("{id} {sample_type}"))[..16].to_vec(),
    }
}

/// A value of an attribute in the dictionary.
#[derive(Clone, PartialEq, Eq, Hash)]
enum AttributeValue {
    Text(String),
    Texts(Vec<String>),
    Number(i64),
    Flag(bool),
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Attribute {
    key: i32,
    value: AttributeValue,
    unit: i32,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct LocationKey {
    mapping: i32,
    address: u64,
    lines: Vec<otlp::Line>,
    attributes: Vec<i32>,
}

/// The tables of a request. Entry 0 of each is the empty one.
struct Dictionary {
    strings: IndexSet<String>,
    attributes: IndexSet<Attribute>,
    mappings: IndexSet<otlp::Mapping>,
    functions: IndexSet<otlp::Function>,
    locations: IndexSet<LocationKey>,
    stacks: IndexSet<otlp::Stack>,
    links: IndexSet<otlp::Link>,
}

/// Returns the index of an entry, and adds one that the table does not have.
fn number<T: Hash + Eq>(table: &mut IndexSet<T>, entry: T) -> i32 {
    i32::try_from(table.insert_full(entry).0).unwrap_or(i32::MAX)
}

impl Default for Dictionary {
    fn default() -> Self {
        Self {
            strings: IndexSet::from([String::new()]),
            attributes: IndexSet::from([Attribute {
                key: 0,
                value: AttributeValue::Text(String::new()),
                unit: 0,
            }]),
            mappings: IndexSet::from([otlp::Mapping::default()]),
            functions: IndexSet::from([otlp::Function::default()]),
            locations: IndexSet::from([LocationKey {
                mapping: 0,
                address: 0,
                lines: Vec::new(),
                attributes: Vec::new(),
            }]),
            stacks: IndexSet::from([otlp::Stack::default()]),
            links: IndexSet::from([otlp::Link::default()]),
        }
    }
}

impl Dictionary {
    fn string(&mut self, text: &str) -> i32 {
        if let Some(index) = self.strings.get_index_of(text) {
            return i32::try_from(index).unwrap_or(i32::MAX);
        }
        number(&mut self.strings, text.to_owned())
    }

    fn attribute(&mut self, key: &str, value: AttributeValue, unit: &str) -> i32 {
        let (key, unit) = (self.string(key), self.string(unit));
        number(&mut self.attributes, Attribute { key, value, unit })
    }

    fn value_type(&mut self, profile: &Profile, of: profiles::ValueType) -> otlp::ValueType {
        otlp::ValueType {
            type_strindex: self.string(text_of(profile, of.r#type)),
            unit_strindex: self.string(text_of(profile, of.unit)),
        }
    }

    fn finish(self) -> otlp::ProfilesDictionary {
        let mut attributes = self.attributes.into_iter().map(|Attribute { key, value, unit }| {
            let value = match value {
                AttributeValue::Text(text) => Value::StringValue(text),
                AttributeValue::Texts(texts) => Value::ArrayValue(ArrayValue {
                    values: texts.iter().map(|text| string_value(text)).collect(),
                }),
                AttributeValue::Number(number) => Value::IntValue(number),
                AttributeValue::Flag(flag) => Value::BoolValue(flag),
            };
            let value = Some(AnyValue { value: Some(value) });
            otlp::KeyValueAndUnit { key_strindex: key, value, unit_strindex: unit }
        });
        // The first one is empty: it has no value either.
        let first = attributes.next().map(|_| otlp::KeyValueAndUnit::default());
        otlp::ProfilesDictionary {
            attribute_table: first.into_iter().chain(attributes).collect(),
            mapping_table: self.mappings.into_iter().collect(),
            location_table: self
                .locations
                .into_iter()
                .map(|LocationKey { mapping, address, lines, attributes }| otlp::Location {
                    mapping_index: mapping,
                    address,
                    lines,
                    attribute_indices: attributes,
                })
                .collect(),
            function_table: self.functions.into_iter().collect(),
            link_table: self.links.into_iter().collect(),
            string_table: self.strings.into_iter().collect(),
            stack_table: self.stacks.into_iter().collect(),
        }
    }
}

/// One profile on its way into the dictionary. Its parts are added when something refers to them.
struct Conversion<'d, 'p> {
    dictionary: &'d mut Dictionary,
    profile: &'p Profile,
    mappings: BTreeMap<u64, &'p Mapping>,
    functions: BTreeMap<u64, &'p profiles::Function>,
    locations: BTreeMap<u64, &'p Location>,
    /// Indexes of the locations that were added.
    added: BTreeMap<u64, i32>,
}

impl<'d, 'p> Conversion<'d, 'p> {
    fn new(dictionary: &'d mut Dictionary, profile: &'p Profile) -> Self {
        Self {
            dictionary,
            profile,
            mappings: profile.mapping.iter().map(|mapping| (mapping.id, mapping)).collect(),
            functions: profile.function.iter().map(|function| (function.id, function)).collect(),
            locations: profile.location.iter().map(|location| (location.id, location)).collect(),
            added: BTreeMap::new(),
        }
    }

    /// Returns an OTLP profile for each sample type.
    fn profiles(mut self, id: &str) -> Vec<otlp::Profile> {
        let profile = self.profile;
        let attributes = self.profile_attributes();
        let samples: Vec<otlp::Sample> = profile.sample.iter().map(|sample| self.sample(sample)).collect();
        let period_type =
            profile.period_type.map(|period_type| self.dictionary.value_type(profile, period_type));
        let of_type = |(number, kind): (usize, &profiles::ValueType)| {
            let values = samples.iter().zip(&profile.sample).map(|(to, from)| otlp::Sample {
                values: vec![from.value.get(number).copied().unwrap_or(0)],
                ..to.clone()
            });
            otlp::Profile {
                sample_type: Some(self.dictionary.value_type(profile, *kind)),
                samples: values.collect(),
                time_unix_nano: u64::try_from(profile.time_nanos).unwrap_or(0),
                duration_nano: u64::try_from(profile.duration_nanos).unwrap_or(0),
                period_type,
                period: profile.period,
                profile_id: profile_id(id, number),
                attribute_indices: attributes.clone(),
                ..otlp::Profile::default()
            }
        };
        profile.sample_type.iter().enumerate().map(of_type).collect()
    }

    fn profile_attributes(&mut self) -> Vec<i32> {
        let profile = self.profile;
        let mut all = Vec::new();
        let comments: Vec<String> =
            profile.comment.iter().map(|index| text_of(profile, *index).to_owned()).collect();
        if !comments.is_empty() {
            all.push(self.dictionary.attribute(attributes::COMMENT, AttributeValue::Texts(comments), ""));
        }
        for (key, index) in [
            (attributes::DROP_FRAMES, profile.drop_frames),
            (attributes::KEEP_FRAMES, profile.keep_frames),
            (attributes::DOC_URL, profile.doc_url),
        ] {
            let text = text_of(profile, index);
            if !text.is_empty() {
                all.push(self.dictionary.attribute(key, AttributeValue::Text(text.to_owned()), ""));
            }
        }
        all
    }

    /// Adds stack and labels of a sample. The result has no value yet.
    fn sample(&mut self, sample: &Sample) -> otlp::Sample {
        let location_indices = sample.location_id.iter().map(|id| self.location(*id)).collect();
        let stack_index = number(&mut self.dictionary.stacks, otlp::Stack { location_indices });
        let link = self.link(sample);
        let link_index = link.clone().map_or(0, |link| number(&mut self.dictionary.links, link));
        let mut keys = Vec::with_capacity(sample.label.len());
        let mut attribute_indices = Vec::with_capacity(sample.label.len());
        for label in &sample.label {
            let name = text_of(self.profile, label.key);
            let key = attributes::attribute(name);
            let is_in_link = link.is_some() && [attributes::TRACE_ID, attributes::SPAN_ID].contains(&name);
            // Two labels may have the same attribute: `thread` and `thread.name`.
            if !is_in_link && !keys.contains(&key) {
                keys.push(key);
                attribute_indices.push(self.label(key, label));
            }
        }
        otlp::Sample { stack_index, attribute_indices, link_index, ..otlp::Sample::default() }
    }

    /// Returns the span of a sample: its labels `trace_id` and `span_id`, if both are ids in hex.
    fn link(&self, sample: &Sample) -> Option<otlp::Link> {
        let id = |name: &str, bytes: usize| {
            let label = sample.label.iter().find(|label| text_of(self.profile, label.key) == name)?;
            let id = attributes::from_hex(text_of(self.profile, label.str))?;
            (id.len() == bytes && id.iter().any(|byte| *byte != 0)).then_some(id)
        };
        Some(otlp::Link { trace_id: id(attributes::TRACE_ID, 16)?, span_id: id(attributes::SPAN_ID, 8)? })
    }

    fn label(&mut self, key: &str, label: &Label) -> i32 {
        let unit = text_of(self.profile, label.num_unit);
        let value = match label.str {
            0 => AttributeValue::Number(label.num),
            text => AttributeValue::Text(text_of(self.profile, text).to_owned()),
        };
        self.dictionary.attribute(key, value, unit)
    }

    fn location(&mut self, id: u64) -> i32 {
        if let Some(index) = self.added.get(&id) {
            return *index;
        }
        let location = self.locations.get(&id).copied();
        let index = location.map_or(0, |location| self.add_location(location));
        self.added.insert(id, index);
        index
    }

    fn add_location(&mut self, location: &'p Location) -> i32 {
        let mapping = self.mappings.get(&location.mapping_id).copied();
        let file = mapping.map_or("", |mapping| text_of(self.profile, mapping.filename));
        let kind = AttributeValue::Text(attributes::frame_type(file).to_owned());
        let mut all = vec![self.dictionary.attribute(attributes::FRAME_TYPE, kind, "")];
        if location.is_folded {
            all.push(self.dictionary.attribute(attributes::IS_FOLDED, AttributeValue::Flag(true), ""));
        }
        let lines = location.line.iter().map(|line| self.line(line)).collect();
        let mapping = mapping.map_or(0, |mapping| self.mapping(mapping));
        let key = LocationKey { mapping, address: location.address, lines, attributes: all };
        number(&mut self.dictionary.locations, key)
    }

    fn line(&mut self, line: &profiles::Line) -> otlp::Line {
        let function_index = self.functions.get(&line.function_id).copied().map_or(0, |function| {
            let mut text = |index| self.dictionary.string(text_of(self.profile, index));
            let function = otlp::Function {
                name_strindex: text(function.name),
                system_name_strindex: text(function.system_name),
                filename_strindex: text(function.filename),
                start_line: function.start_line,
            };
            number(&mut self.dictionary.functions, function)
        });
        otlp::Line { function_index, line: line.line, column: line.column }
    }

    fn mapping(&mut self, mapping: &Mapping) -> i32 {
        let Mapping { memory_start, memory_limit, file_offset, .. } = *mapping;
        let mut all = Vec::new();
        let build_id = text_of(self.profile, mapping.build_id);
        if !build_id.is_empty() {
            let is_hex = build_id.bytes().all(|byte| byte.is_ascii_hexdigit());
            let key = if is_hex { attributes::BUILD_ID_GNU } else { attributes::BUILD_ID_GO };
            all.push(self.dictionary.attribute(key, AttributeValue::Text(build_id.to_owned()), ""));
        }
        for (key, flag) in [
            (attributes::HAS_FUNCTIONS, mapping.has_functions),
            (attributes::HAS_FILENAMES, mapping.has_filenames),
            (attributes::HAS_LINE_NUMBERS, mapping.has_line_numbers),
            (attributes::HAS_INLINE_FRAMES, mapping.has_inline_frames),
            (attributes::IS_MAIN, self.profile.mapping.first().is_some_and(|first| first.id == mapping.id)),
        ] {
            if flag {
                all.push(self.dictionary.attribute(key, AttributeValue::Flag(true), ""));
            }
        }
        // No mapping starts at the last address, and a start of 0 has a limit behind it.
        let (start, limit) = if memory_start < memory_limit {
            (memory_start, memory_limit)
        } else {
            let limit = AttributeValue::Number(memory_limit.cast_signed());
            all.push(self.dictionary.attribute(attributes::MAPPING_LIMIT, limit, ""));
            (memory_start.min(u64::MAX - 1), memory_start.min(u64::MAX - 1) + 1)
        };
        let filename_strindex = self.dictionary.string(text_of(self.profile, mapping.filename));
        let mapping = otlp::Mapping {
            memory_start: start,
            memory_limit: limit,
            file_offset,
            filename_strindex,
            attribute_indices: all,
        };
        number(&mut self.dictionary.mappings, mapping)
    }
}
