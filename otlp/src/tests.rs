use std::collections::BTreeMap;

use gannet_proto::{
    pprof::{self, Merger, Profile},
    profiles::{Function, Label, Line, Location, Mapping, Sample, ValueType},
};
use opentelemetry_proto::tonic::{
    collector::profiles::v1development::ExportProfilesServiceRequest,
    common::v1::{AnyValue, KeyValue, any_value::Value},
    profiles::v1development as otlp,
    resource::v1::Resource,
};
use proptest::{collection::vec, prelude::*};
use prost::Message as _;
use rstest::rstest;
use ulid::Ulid;

use super::{Encoder, Incoming, OtlpError, Outgoing, decode, from_json, from_protobuf, to_json};

/// Texts of the profiles: names, files, build ids, labels of Gannet, of OpenTelemetry and of neither.
const TEXTS: [&str; 16] = [
    "",
    "main",
    "work",
    "/usr/bin/app",
    "[kernel.kallsyms]",
    "[cpython]",
    "app.py",
    "0123456789abcdef",
    "Go/build/id",
    "samples",
    "count",
    "cpu",
    "nanoseconds",
    "ledger ticks=1 taken=1",
    "thread",
    "http.route",
];

prop_compose! {
    fn any_mapping()(start in 0_u64..9, length in 0_u64..3, file in 0_i64..16, build_id in 0_i64..16, flags in 0_u8..16) -> Mapping {
        Mapping {
            id: 0, memory_start: start, memory_limit: start + length, file_offset: start / 2, filename: file, build_id,
            has_functions: flags & 1 != 0, has_filenames: flags & 2 != 0, has_line_numbers: flags & 4 != 0,
            has_inline_frames: flags & 8 != 0,
        }
    }
}

prop_compose! {
    fn any_profile()(
        mappings in vec(any_mapping(), 1..4),
        functions in vec((0_i64..16, 0_i64..16, 0_i64..16, 0_i64..99), 1..5),
        locations in vec((0_u64..4, any::<u64>(), vec((1_u64..5, 0_i64..999, 0_i64..9), 0..3), any::<bool>()), 1..8),
        samples in vec((vec(1_u64..8, 0..6).prop_map(|mut stack| { stack.push(1); stack }), 0_i64..99, 0_i64..9999, vec((1_i64..16, 0_i64..16, -9_i64..9), 0..4)), 1..12),
        comments in vec(0_i64..16, 0..3),
        frames in (0_i64..16, 0_i64..16, 0_i64..16, 0_i64..16),
        time in 0_i64..i64::MAX / 4,
    ) -> Profile {
        let numbered = |index: usize| index as u64 + 1;
        let (mapping_count, function_count, location_count) = (mappings.len() as u64, functions.len() as u64, locations.len() as u64);
        Profile {
            sample_type: vec![ValueType { r#type: 9, unit: 10 }, ValueType { r#type: 11, unit: 12 }],
            period_type: Some(ValueType { r#type: 11, unit: 12 }),
            period: 10_101_010,
            time_nanos: time,
            duration_nanos: 10_000_000_000,
            mapping: mappings.into_iter().enumerate().map(|(i, mapping)| Mapping { id: numbered(i), ..mapping }).collect(),
            function: functions.into_iter().enumerate().map(|(i, (name, system_name, filename, start_line))| Function {
                id: numbered(i), name, system_name, filename, start_line,
            }).collect(),
            location: locations.into_iter().enumerate().map(|(i, (mapping, address, lines, is_folded))| Location {
                id: numbered(i), mapping_id: if i == 0 { 1 } else { mapping % (mapping_count + 1) }, address, is_folded,
                line: lines.into_iter().map(|(function, line, column)| Line { function_id: (function - 1) % function_count + 1, line, column }).collect(),
            }).collect(),
            sample: samples.into_iter().map(|(stack, count, time, labels)| {
                let labels: BTreeMap<i64, (i64, i64)> = labels.into_iter().map(|(key, text, number)| (key, (text, number))).collect();
                Sample {
                    location_id: stack.into_iter().map(|id| (id - 1) % location_count + 1).collect(),
                    value: vec![count, time],
                    label: labels.into_iter().map(|(key, (str, num))| match str {
                        0 => Label { key, num, num_unit: 12, ..Label::default() },
                        str => Label { key, str, ..Label::default() },
                    }).collect(),
                }
            }).collect(),
            comment: comments,
            drop_frames: frames.0, keep_frames: frames.1, doc_url: frames.2, default_sample_type: frames.3,
            string_table: TEXTS.map(str::to_owned).to_vec(),
        }
    }
}

/// One form for all profiles with the same content.
fn normal(profile: &Profile) -> Profile {
    let mut merger = Merger::new();
    merger.add(profile).unwrap();
    merger.finish().unwrap()
}

fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn request(id: &str, of: &BTreeMap<String, String>, profile: &Profile) -> ExportProfilesServiceRequest {
    let mut encoder = Encoder::new();
    encoder.add(&Outgoing { id, labels: of, profile });
    encoder.finish()
}

fn only(request: ExportProfilesServiceRequest) -> Incoming {
    let mut decoded = decode(request).unwrap();
    assert_eq!((decoded.rejected, decoded.error), (0, None));
    assert_eq!(decoded.profiles.len(), 1);
    decoded.profiles.remove(0)
}

proptest! {
    /// Checks that a profile comes back as it was sent: samples, labels, tables, and what only pprof has.
    #[test]
    fn profiles_are_equal_after_a_round_trip(profile in any_profile()) {
        let id = Ulid::from_parts(1_700_000_000_000, 42);
        let of = labels(&[
            ("service_name", "shop"), ("node", "n1"), ("workload", "shop"), ("workload_kind", "deployment"), ("team", "a"),
        ]);
        let sent = request(&id.to_string(), &of, &profile);
        let received = from_protobuf(&sent.encode_to_vec()).unwrap();
        prop_assert_eq!(&from_json(&to_json(sent).unwrap()).unwrap(), &received);
        let back = only(received);
        pprof::check(&back.profile).unwrap();
        prop_assert_eq!(back.id, id);
        prop_assert_eq!(back.labels, of);
        // Mappings that no sample needs stay behind.
        let sent = pprof::split(profile, usize::MAX, usize::MAX).remove(0);
        let unneeded = |profile: &Profile| {
            let mut profile = normal(profile);
            let used: Vec<u64> = profile.location.iter().map(|location| location.mapping_id).collect();
            profile.mapping.retain(|mapping| used.contains(&mapping.id));
            normal(&profile)
        };
        prop_assert_eq!(unneeded(&back.profile), unneeded(&sent));
    }
}

fn profile_of(samples: Vec<otlp::Sample>) -> otlp::Profile {
    otlp::Profile {
        sample_type: Some(otlp::ValueType { type_strindex: 1, unit_strindex: 2 }),
        period_type: Some(otlp::ValueType { type_strindex: 3, unit_strindex: 4 }),
        period: 50,
        time_unix_nano: 1_700_000_000_000_000_000,
        samples,
        ..otlp::Profile::default()
    }
}

/// A resource as a profiler sends it for a process, and a relay passes on.
fn foreign_resource(pid: i64) -> Resource {
    let value = |value| Some(AnyValue { value: Some(value) });
    let text = |key: &str, text: &str| KeyValue {
        key: key.to_owned(),
        value: value(Value::StringValue(text.to_owned())),
        key_strindex: 0,
    };
    let pid = KeyValue { key: "process.pid".to_owned(), value: value(Value::IntValue(pid)), key_strindex: 0 };
    // A relay writes keys and texts as indexes.
    let of_relay =
        KeyValue { key: String::new(), value: value(Value::StringValueStrindex(15)), key_strindex: 14 };
    Resource {
        attributes: vec![
            pid,
            text("process.executable.name", "python3"),
            text("host.name", "n7"),
            text("os.type", "linux"),
            text("process.command_line", "python3 --password=x"),
            of_relay,
        ],
        ..Resource::default()
    }
}

/// A request as OpenTelemetry's profiler sends it: one resource for each process, times and no values.
fn foreign() -> ExportProfilesServiceRequest {
    let strings = [
        "",
        "samples",
        "count",
        "cpu",
        "nanoseconds",
        "profile.frame.type",
        "cpython",
        "handle",
        "app.py",
        "native",
        "libc.so.6",
        "process.executable.build_id.htlhash",
        "thread.name",
        "worker",
        "service.namespace",
        "prod",
    ];
    let attribute = |key, value: &str| otlp::KeyValueAndUnit {
        key_strindex: key,
        value: Some(AnyValue { value: Some(Value::StringValue(value.to_owned())) }),
        unit_strindex: 0,
    };
    let dictionary = otlp::ProfilesDictionary {
        string_table: strings.map(str::to_owned).to_vec(),
        attribute_table: vec![
            otlp::KeyValueAndUnit::default(),
            attribute(5, "cpython"),
            attribute(5, "native"),
            attribute(11, "00112233445566778899aabbccddeeff"),
            attribute(12, "worker"),
        ],
        mapping_table: vec![
            otlp::Mapping::default(),
            otlp::Mapping {
                memory_limit: 1,
                filename_strindex: 10,
                attribute_indices: vec![3],
                ..otlp::Mapping::default()
            },
        ],
        function_table: vec![
            otlp::Function::default(),
            otlp::Function { name_strindex: 7, filename_strindex: 8, ..otlp::Function::default() },
        ],
        location_table: vec![
            otlp::Location::default(),
            otlp::Location {
                lines: vec![otlp::Line { function_index: 1, line: 12, column: 0 }],
                attribute_indices: vec![1],
                ..otlp::Location::default()
            },
            otlp::Location {
                mapping_index: 1,
                address: 0x1234,
                attribute_indices: vec![2],
                ..otlp::Location::default()
            },
        ],
        stack_table: vec![otlp::Stack::default(), otlp::Stack { location_indices: vec![2, 1] }],
        link_table: vec![
            otlp::Link::default(),
            otlp::Link { trace_id: vec![0xab; 16], span_id: vec![0xcd; 8] },
        ],
    };
    let samples = |link_index| {
        let times = vec![1_700_000_000_000_000_001, 1_700_000_000_000_000_002];
        vec![otlp::Sample {
            stack_index: 1,
            link_index,
            attribute_indices: vec![4],
            timestamps_unix_nano: times,
            ..otlp::Sample::default()
        }]
    };
    let resources = [(7, 0), (8, 1)].map(|(pid, link)| otlp::ResourceProfiles {
        resource: Some(foreign_resource(pid)),
        scope_profiles: vec![otlp::ScopeProfiles {
            profiles: vec![profile_of(samples(link))],
            ..otlp::ScopeProfiles::default()
        }],
        schema_url: String::new(),
    });
    ExportProfilesServiceRequest { resource_profiles: resources.to_vec(), dictionary: Some(dictionary) }
}

#[test]
fn processes_of_a_foreign_profiler_share_a_series() {
    let Incoming { labels: of, profile, parts, id } = only(foreign());
    let want = [
        ("comm", "python3"),
        ("node", "n7"),
        ("os_type", "linux"),
        ("service_name", "python3"),
        ("service_namespace", "prod"),
    ];
    assert_eq!(of, labels(&want), "no series for each process, and no command line");
    assert_eq!(parts, 2);
    assert_eq!(id, only(foreign()).id, "a request that is sent again is a duplicate");
    let summary = pprof::check(&profile).unwrap();
    assert_eq!(summary.sample_types, ["samples/count", "cpu/nanoseconds"]);
    assert_eq!(summary.totals, [4, 200]);
    let text = |index: i64| profile.string_table[index as usize].as_str();
    let mappings: Vec<&str> = profile.mapping.iter().map(|mapping| text(mapping.filename)).collect();
    assert!(mappings.contains(&"[cpython]") && mappings.contains(&"libc.so.6"), "{mappings:?}");
    let mut all: Vec<Vec<String>> = profile
        .sample
        .iter()
        .map(|sample| {
            let mut labels: Vec<String> = sample
                .label
                .iter()
                .map(|label| format!("{}={}{}", text(label.key), text(label.str), label.num))
                .collect();
            labels.sort();
            labels
        })
        .collect();
    all.sort();
    let spans = format!("span_id={}0", "cd".repeat(8));
    let traces = format!("trace_id={}0", "ab".repeat(16));
    assert_eq!(
        all,
        [
            vec!["pid=7".to_owned(), "thread=worker0".into()],
            vec!["pid=8".into(), spans, "thread=worker0".into(), traces]
        ]
    );
}

#[test]
fn the_span_of_a_sample_travels_as_a_link() {
    let profile = &only(foreign()).profile;
    let sent = request("x", &labels(&[]), profile);
    assert_eq!(sent.dictionary.as_ref().unwrap().link_table.len(), 2);
    let back = only(sent);
    assert_eq!(normal(&back.profile), normal(profile));
}

/// Each index of a request may be wrong. Only the profile that has it is lost.
#[rstest]
#[case("stack_table", |r: &mut ExportProfilesServiceRequest| r.resource_profiles[0].scope_profiles[0].profiles[0].samples[0].stack_index = 9)]
#[case("link_table", |r: &mut ExportProfilesServiceRequest| r.resource_profiles[0].scope_profiles[0].profiles[0].samples[0].link_index = -1)]
#[case("attribute_table", |r: &mut ExportProfilesServiceRequest| r.resource_profiles[0].scope_profiles[0].profiles[0].samples[0].attribute_indices = vec![99])]
#[case("string_table", |r: &mut ExportProfilesServiceRequest| r.resource_profiles[0].scope_profiles[0].profiles[0].sample_type = Some(otlp::ValueType { type_strindex: 99, unit_strindex: 0 }))]
fn a_wrong_index_refuses_its_profile(
    #[case] table: &str,
    #[case] change: fn(&mut ExportProfilesServiceRequest),
) {
    let mut request = foreign();
    change(&mut request);
    let decoded = decode(request).unwrap();
    assert_eq!((decoded.rejected, decoded.profiles.len()), (1, 1));
    let error = decoded.error.unwrap().to_string();
    assert!(error.contains(table) && error.contains("1.9"), "{error}");
}

#[test]
fn a_wrong_index_in_a_resource_refuses_its_profiles() {
    let mut request = foreign();
    request.resource_profiles[0].resource.as_mut().unwrap().attributes[5].key_strindex = 99;
    let decoded = decode(request).unwrap();
    assert_eq!((decoded.rejected, decoded.profiles.len()), (1, 1));
}

/// Wrong indexes in tables that both profiles use.
#[rstest]
#[case("location_table", |d: &mut otlp::ProfilesDictionary| d.stack_table[1].location_indices[0] = 77)]
#[case("mapping_table", |d: &mut otlp::ProfilesDictionary| d.location_table[2].mapping_index = 77)]
#[case("function_table", |d: &mut otlp::ProfilesDictionary| d.location_table[1].lines[0].function_index = -77)]
#[case("string_table", |d: &mut otlp::ProfilesDictionary| d.function_table[1].name_strindex = 77)]
fn a_wrong_index_in_a_table_is_named(#[case] table: &str, #[case] change: fn(&mut otlp::ProfilesDictionary)) {
    let mut request = foreign();
    change(request.dictionary.as_mut().unwrap());
    let decoded = decode(request).unwrap();
    assert_eq!((decoded.rejected, decoded.profiles.len()), (2, 0));
    assert!(decoded.error.unwrap().to_string().contains(table));
}

#[test]
fn a_request_may_not_grow_without_bound() {
    let mut request = foreign();
    let dictionary = request.dictionary.as_mut().unwrap();
    dictionary.stack_table.push(otlp::Stack { location_indices: vec![1; 100_000] });
    let sample = otlp::Sample { stack_index: 2, values: vec![1], ..otlp::Sample::default() };
    request.resource_profiles[0].scope_profiles[0].profiles = vec![profile_of(vec![sample; 1000])];
    assert!(matches!(decode(request), Err(OtlpError::TooLarge { .. })));
}

#[test]
fn samples_without_values_and_times_are_refused() {
    let mut request = foreign();
    request.resource_profiles[0].scope_profiles[0].profiles[0].samples[0].timestamps_unix_nano.clear();
    let decoded = decode(request).unwrap();
    assert_eq!((decoded.rejected, decoded.error), (1, Some(OtlpError::NoValue { sample: 0 })));
}

/// A sample of layout 1.9: values have number 2, attributes 3, the link 4.
#[derive(Clone, PartialEq, prost::Message)]
struct OldSample {
    #[prost(int32, tag = "1")]
    stack_index: i32,
    #[prost(int64, repeated, tag = "2")]
    values: Vec<i64>,
    #[prost(int32, repeated, tag = "3")]
    attribute_indices: Vec<i32>,
}

#[test]
fn layout_1_9_is_refused_by_name() {
    let old = OldSample { stack_index: 1, values: vec![5], attribute_indices: vec![1] }.encode_to_vec();
    // Field 2 of the profile, field 2 of the scope, field 2 of the resource, field 1 of the request.
    let nested = [2_u8, 2, 2, 1].iter().fold(old, |inner, field| {
        let mut outer = vec![field << 3 | 2, inner.len() as u8];
        outer.extend(inner);
        outer
    });
    let error = from_protobuf(&nested).unwrap_err();
    assert!(matches!(error, OtlpError::OldLayout { .. }), "{error}");
    assert!(error.to_string().contains("1.9"));
}

/// Checks the forms that OTLP demands of JSON: ids in hex, other bytes in base64, integers of 64 bits as texts, names in lowerCamelCase.
#[test]
fn json_has_the_forms_of_otlp() {
    let mut request = foreign();
    let profile = &mut request.resource_profiles[1].scope_profiles[0].profiles[0];
    profile.profile_id = (0xf0..=0xff).collect();
    let bytes = Value::BytesValue(vec![0xab; 3]);
    request.dictionary.as_mut().unwrap().attribute_table[4].value = Some(AnyValue { value: Some(bytes) });
    let text = to_json(request).unwrap();
    assert!(!text.contains(&b'\n'), "a line for each request");
    let json: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let profile = &json["resourceProfiles"][1]["scopeProfiles"][0]["profiles"][0];
    assert_eq!(profile["profileId"], "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff");
    assert_eq!(profile["timeUnixNano"], "1700000000000000000");
    assert_eq!(profile["period"], "50");
    assert_eq!(
        profile["samples"][0],
        serde_json::json!({
            "stackIndex": 1, "linkIndex": 1, "attributeIndices": [4],
            "timestampsUnixNano": ["1700000000000000001", "1700000000000000002"],
        })
    );
    let dictionary = &json["dictionary"];
    assert_eq!(dictionary["attributeTable"][4]["value"]["bytesValue"], "q6ur");
    assert_eq!(
        dictionary["linkTable"],
        serde_json::json!([{}, { "traceId": "ab".repeat(16), "spanId": "cd".repeat(8) }])
    );
}

/// Checks that a profile without the id of a batch has one by its content: the same for the same profile.
#[test]
fn a_profile_without_an_id_gets_one_from_its_content() {
    let profile = &only(foreign()).profile;
    let id = |labels: &BTreeMap<String, String>, profile: &Profile| only(request("", labels, profile)).id;
    let none = labels(&[]);
    let first = id(&none, profile);
    assert_eq!(first, id(&none, profile));
    assert_eq!(first.timestamp_ms(), 1_700_000_000_000);
    assert_ne!(first, id(&labels(&[("node", "n1")]), profile));
    assert_ne!(first, id(&none, &Profile { period: 7, ..profile.clone() }));
}

#[test]
fn json_has_ids_in_hex_and_ignores_what_is_new() {
    let text = r#"{
        "resourceProfiles": [{"scopeProfiles": [{"profiles": [{
            "sampleType": {"typeStrindex": 1, "unitStrindex": 2},
            "timeUnixNano": "1700000000000000000", "profileId": "000102030405060708090A0B0C0D0E0F", "ofTheFuture": 1,
            "samples": [{"stackIndex": 1, "linkIndex": 1, "values": ["3"]}]
        }]}]}],
        "dictionary": {
            "stringTable": ["", "samples", "count", "main"], "stackTable": [{}, {"locationIndices": [1]}],
            "locationTable": [{}, {"lines": [{"functionIndex": 1}]}], "functionTable": [{}, {"nameStrindex": 3}],
            "linkTable": [{}, {"traceId": "5b8efff798038103d269b633813fc60c", "spanId": "eee19b7ec3c1b174"}]
        }
    }"#;
    let request = from_json(text.as_bytes()).unwrap();
    let profile = &request.resource_profiles[0].scope_profiles[0].profiles[0];
    assert_eq!(profile.profile_id, (0..16).collect::<Vec<u8>>());
    let decoded = only(request.clone());
    let texts = &decoded.profile.string_table;
    assert!(texts.contains(&"5b8efff798038103d269b633813fc60c".to_owned()), "{texts:?}");
    assert_eq!(pprof::check(&decoded.profile).unwrap().totals, [3]);
    for (text, why) in [
        ("{", "JSON"),
        (r#"{"dictionary": 1}"#, "JSON"),
        (r#"{"a": {"traceId": "xy"}}"#, "traceId is not in hex"),
    ] {
        let error = from_json(text.as_bytes()).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
}
