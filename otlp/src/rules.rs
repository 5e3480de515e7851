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
