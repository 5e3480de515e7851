//! The rules of OTLP profiles, for tests: every request must keep them, from any sender. They are those of the comments in
//! `profiles.proto` of opentelemetry-proto 1.10 and 1.11, and of `profcheck` of OpenTelemetry's group for profiling.

use std::collections::HashSet;

use opentelemetry_proto::tonic::{
    collector::profiles::v1development::ExportProfilesServiceRequest,
    common::v1::{AnyValue, KeyValue, any_value::Value},
    profiles::v1development as otlp,
};
use prost::Message;

/// Returns every breach of the rules in a request, each as a sentence.
#[must_use]
pub fn breaches(request: &ExportProfilesServiceRequest) -> Vec<String> {
    let mut rules = Rules { tables: request.dictionary.clone().unwrap_or_default(), ..Rules::default() };
    rules.zero_entries();
    rules.duplicates();
    for resource in &request.resource_profiles {
        rules.keys(resource.resource.iter().flat_map(|r| &r.attributes), "a resource");
        for scope in &resource.scope_profiles {
            rules.keys(scope.scope.iter().flat_map(|scope| &scope.attributes), "a scope");
            for profile in &scope.profiles {
                rules.profile(profile);
            }
        }
    }
    rules.tables_refer();
    rules.orphans();
    rules.found
}

/// Tables of the dictionary.
const TABLES: [&str; 7] = ["attribute", "function", "link", "location", "mapping", "stack", "string"];

/// An OpenTelemetry Collector writes the value of the zero attribute as a message without a value.
fn is_zero_attribute(attribute: &otlp::KeyValueAndUnit) -> bool {
    let value = attribute.value.as_ref().and_then(|value| value.value.as_ref());
    attribute.key_strindex == 0 && attribute.unit_strindex == 0 && value.is_none()
}

#[derive(Default)]
struct Rules {
    tables: otlp::ProfilesDictionary,
    /// Table and index of each entry that something refers to.
    used: HashSet<(&'static str, usize)>,
    found: Vec<String>,
}

impl Rules {
    fn breach(&mut self, what: impl Into<String>) {
        self.found.push(what.into());
    }

    fn len(&self, table: &str) -> usize {
        let tables = &self.tables;
        match table {
            "attribute" => tables.attribute_table.len(),
            "function" => tables.function_table.len(),
            "link" => tables.link_table.len(),
            "location" => tables.location_table.len(),
            "mapping" => tables.mapping_table.len(),
            "stack" => tables.stack_table.len(),
            _ => tables.string_table.len(),
        }
    }

    fn refer(&mut self, table: &'static str, index: i32, from: &str) {
        match usize::try_from(index) {
            Ok(index) if index < self.len(table) => {
                self.used.insert((table, index));
            }
            _ => self.breach(format!("{from}: {table} {index} does not exist")),
        }
    }

    fn zero_entries(&mut self) {
        let tables = &self.tables;
        let is_zero = [
            tables.attribute_table.first().is_some_and(is_zero_attribute),
            tables.function_table.first() == Some(&otlp::Function::default()),
            tables.link_table.first() == Some(&otlp::Link::default()),
            tables.location_table.first() == Some(&otlp::Location::default()),
            tables.mapping_table.first() == Some(&otlp::Mapping::default()),
            tables.stack_table.first() == Some(&otlp::Stack::default()),
            tables.string_table.first().is_some_and(String::is_empty),
        ];
        for (table, is_zero) in TABLES.into_iter().zip(is_zero) {
            if !is_zero {
                self.breach(format!("{table} 0 is not the zero element"));
            }
        }
    }

    fn duplicates(&mut self) {
        fn twice<T: Message>(table: &[T]) -> bool {
            let mut seen = HashSet::new();
            table.iter().any(|entry| !seen.insert(entry.encode_to_vec()))
        }
        let tables = &self.tables;
        let strings: HashSet<&String> = tables.string_table.iter().collect();
        let has_twice = [
            twice(&tables.attribute_table),
            twice(&tables.function_table),
            twice(&tables.link_table),
            twice(&tables.location_table),
            twice(&tables.mapping_table),
            twice(&tables.stack_table),
            strings.len() != tables.string_table.len(),
        ];
        for (table, has_twice) in TABLES.into_iter().zip(has_twice) {
            if has_twice {
                self.breach(format!("an entry of the {table} table is there twice"));
            }
        }
    }

    /// Checks attributes outside of the dictionary. A relay may have written keys and texts as references into it.
    fn keys<'a>(&mut self, attributes: impl Iterator<Item = &'a KeyValue>, of: &str) {
        let mut keys = HashSet::new();
        for KeyValue { key, value, key_strindex } in attributes {
            let name = if *key_strindex == 0 {
                key.clone()
            } else {
                self.refer("string", *key_strindex, of);
                let name =
                    usize::try_from(*key_strindex).ok().and_then(|at| self.tables.string_table.get(at));
                name.cloned().unwrap_or_default()
            };
            if key.is_empty() == (*key_strindex == 0) {
                self.breach(format!(
                    "an attribute of {of} has no key, or two: {key:?} and string {key_strindex}"
                ));
            }
            self.value(value.as_ref(), of);
            if !keys.insert(name) {
                self.breach(format!("an attribute of {of} is there twice: {keys:?}"));
            }
        }
    }

    fn value(&mut self, value: Option<&AnyValue>, of: &str) {
        match value.and_then(|value| value.value.as_ref()) {
            Some(Value::StringValueStrindex(index)) => self.refer("string", *index, of),
            Some(Value::ArrayValue(array)) => {
                array.values.iter().for_each(|value| self.value(Some(value), of));
            }
            Some(Value::KvlistValue(list)) => self.keys(list.values.iter(), of),
            _ => {}
        }
    }

    fn attributes(&mut self, indexes: &[i32], of: &str) {
        let mut keys = HashSet::new();
        for index in indexes {
            self.refer("attribute", *index, of);
            let attribute = usize::try_from(*index).ok().and_then(|at| self.tables.attribute_table.get(at));
            if *index == 0 || !keys.insert(attribute.map(|attribute| attribute.key_strindex)) {
                self.breach(format!("{of}: attribute {index} is empty or its key is there twice"));
            }
        }
    }

    fn value_type(&mut self, of: Option<otlp::ValueType>, what: &str) {
        let of = of.unwrap_or_default();
        if of.type_strindex == 0 || of.unit_strindex == 0 {
            self.breach(format!("{what} is missing"));
        }
        self.refer("string", of.type_strindex, what);
        self.refer("string", of.unit_strindex, what);
    }

    fn profile(&mut self, profile: &otlp::Profile) {
        self.value_type(profile.sample_type, "sample_type");
        self.value_type(profile.period_type, "period_type");
        self.attributes(&profile.attribute_indices, "a profile");
        if profile.profile_id.len() != 16 || profile.profile_id.iter().all(|byte| *byte == 0) {
            self.breach(format!("profile_id is {:?}", profile.profile_id));
        }
        if profile.samples.is_empty() || profile.time_unix_nano == 0 {
            self.breach("a profile has no samples, or no time");
        }
        let mut shapes = HashSet::new();
        for sample in &profile.samples {
            shapes.insert((sample.values.len(), sample.timestamps_unix_nano.is_empty()));
            let end = profile.time_unix_nano + profile.duration_nano;
            if sample.timestamps_unix_nano.iter().any(|at| !(profile.time_unix_nano..end).contains(at)) {
                self.breach("a timestamp is outside of its profile");
            }
            self.refer("stack", sample.stack_index, "a sample");
            self.refer("link", sample.link_index, "a sample");
            self.attributes(&sample.attribute_indices, "a sample");
        }
        if shapes.len() > 1 || shapes.contains(&(0, true)) {
            self.breach(format!("samples of one profile have several shapes: {shapes:?}"));
        }
    }

    fn tables_refer(&mut self) {
        let tables = self.tables.clone();
        for attribute in &tables.attribute_table {
            self.refer("string", attribute.key_strindex, "an attribute");
            self.refer("string", attribute.unit_strindex, "an attribute");
            self.value(attribute.value.as_ref(), "an attribute");
        }
        for function in &tables.function_table {
            for text in [function.name_strindex, function.system_name_strindex, function.filename_strindex] {
                self.refer("string", text, "a function");
            }
        }
        for location in &tables.location_table {
            self.refer("mapping", location.mapping_index, "a location");
            self.attributes(&location.attribute_indices, "a location");
            for line in &location.lines {
                self.refer("function", line.function_index, "a line");
            }
        }
        for (number, mapping) in tables.mapping_table.iter().enumerate() {
            self.refer("string", mapping.filename_strindex, "a mapping");
            self.attributes(&mapping.attribute_indices, "a mapping");
            if number > 0 && mapping.memory_start >= mapping.memory_limit {
                self.breach("the limit of a mapping is not behind its start");
            }
        }
        for stack in &tables.stack_table {
            for location in &stack.location_indices {
                self.refer("location", *location, "a stack");
            }
        }
        for link in tables.link_table.iter().skip(1) {
            if link.trace_id.len() != 16 || link.span_id.len() != 8 {
                self.breach("a link has ids of a wrong length");
            }
        }
    }

    fn orphans(&mut self) {
        for table in TABLES {
            let orphans = (1..self.len(table)).filter(|index| !self.used.contains(&(table, *index))).count();
            if orphans > 0 {
                self.breach(format!("nothing refers to {orphans} entries of the {table} table"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use gannet_proto::pprof::{Builder, Header, Label, LabelValue, Line, Mapping};
    use rstest::rstest;

    use super::*;
    use crate::{Encoder, Outgoing};

    /// A request with something in each table.
    fn request() -> ExportProfilesServiceRequest {
        let mut builder = Builder::new(Header {
            sample_types: &[("samples", "count"), ("cpu", "nanoseconds")],
            period_type: ("cpu", "nanoseconds"),
            period: 10_000_000,
            time_nanos: 1_700_000_000_000_000_000,
            duration_nanos: 10_000_000_000,
        });
        let file = Mapping { start: 0x1000, limit: 0x9000, file: "/bin/app", ..Mapping::default() };
        let mapping = builder.mapping(file);
        let work = builder.location(Some(mapping), 0x1100, &[Line { name: "work", ..Line::default() }]);
        let label = |key, text| Label { key, value: LabelValue::Str(text) };
        let (trace, span) = ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331");
        let labels = [label("trace_id", trace), label("span_id", span), label("thread", "a")];
        builder.sample(&[work], &[1, 10], &labels);
        builder.sample(&[work], &[2, 20], &[]);
        let labels = [("service_name", "shop"), ("node", "n1")];
        let labels: BTreeMap<_, _> =
            labels.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        let mut encoder = Encoder::new();
        encoder.add(&Outgoing { id: "", labels: &labels, profile: &builder.finish() });
        encoder.finish()
    }

    fn tables(request: &mut ExportProfilesServiceRequest) -> &mut otlp::ProfilesDictionary {
        request.dictionary.as_mut().unwrap()
    }

    fn profile(request: &mut ExportProfilesServiceRequest) -> &mut otlp::Profile {
        &mut request.resource_profiles[0].scope_profiles[0].profiles[0]
    }

    fn resource(request: &mut ExportProfilesServiceRequest) -> &mut Vec<KeyValue> {
        &mut request.resource_profiles[0].resource.as_mut().unwrap().attributes
    }

    #[rstest]
    #[case::zero(|r: &mut _| tables(r).link_table[0].span_id = vec![0; 8], "link 0 is not the zero element")]
    #[case::zero_value(|r: &mut _| tables(r).attribute_table[0].unit_strindex = 1, "attribute 0 is not the zero element")]
    #[case::twice(|r: &mut _| { let last = tables(r).mapping_table[1].clone(); tables(r).mapping_table.push(last) }, "the mapping table is there twice")]
    #[case::orphan(|r: &mut _| tables(r).string_table.push("nobody".to_owned()), "nothing refers to 1 entries of the string table")]
    #[case::index(|r: &mut _| profile(r).samples[0].stack_index = 99, "a sample: stack 99 does not exist")]
    #[case::negative(|r: &mut _| tables(r).function_table[1].name_strindex = -1, "a function: string -1 does not exist")]
    #[case::limit(|r: &mut _| tables(r).mapping_table[1].memory_limit = 1, "the limit of a mapping is not behind its start")]
    #[case::link(|r: &mut _| tables(r).link_table[1].trace_id.truncate(15), "a link has ids of a wrong length")]
    #[case::id(|r: &mut _| profile(r).profile_id.clear(), "profile_id is []")]
    #[case::time(|r: &mut _| profile(r).time_unix_nano = 0, "has no samples, or no time")]
    #[case::samples(|r: &mut _| profile(r).samples.clear(), "has no samples, or no time")]
    #[case::period(|r: &mut _| profile(r).period_type = None, "period_type is missing")]
    #[case::shape(|r: &mut _| profile(r).samples[0].values.push(1), "several shapes")]
    #[case::outside(|r: &mut _| profile(r).samples.iter_mut().for_each(|sample| sample.timestamps_unix_nano = vec![1]), "outside of its profile")]
    #[case::attribute(|r: &mut _| { let of = profile(r).samples.iter_mut().map(|sample| &mut sample.attribute_indices).find(|of| !of.is_empty()).unwrap(); of.push(of[0]) }, "its key is there twice")]
    #[case::key(|r: &mut _| { let first = resource(r)[0].clone(); resource(r).push(first) }, "an attribute of a resource is there twice")]
    #[case::no_key(|r: &mut _| resource(r)[0].key.clear(), "has no key, or two")]
    #[case::reference(|r: &mut _| { resource(r)[0].key.clear(); resource(r)[0].key_strindex = 99 }, "a resource: string 99 does not exist")]
    fn each_breach_is_named(#[case] change: fn(&mut ExportProfilesServiceRequest), #[case] says: &str) {
        let mut request = request();
        assert_eq!(breaches(&request), Vec::<String>::new());
        change(&mut request);
        let found = breaches(&request);
        assert!(found.iter().any(|breach| breach.contains(says)), "{found:?}");
    }

    /// An OpenTelemetry Collector writes requests in this form.
    #[test]
    fn a_relay_may_write_references_and_an_empty_value() {
        let mut request = request();
        tables(&mut request).attribute_table[0].value = Some(AnyValue::default());
        for text in ["key", "value"] {
            tables(&mut request).string_table.push(text.to_owned());
        }
        let last = tables(&mut request).string_table.len() as i32 - 1;
        resource(&mut request).push(KeyValue {
            key_strindex: last - 1,
            value: Some(AnyValue { value: Some(Value::StringValueStrindex(last)) }),
            ..KeyValue::default()
        });
        assert_eq!(breaches(&request), Vec::<String>::new());
    }
}
