//! The tables of one pprof profile that is made from a request, and a bound on what a request may become.

use std::collections::HashMap;

use gannet_proto::profiles::{Function, Label, Line, Location, Mapping, Profile};
use indexmap::IndexSet;
use opentelemetry_proto::tonic::profiles::v1development as otlp;

use super::{
    OtlpError, attributes,
    dictionary::{Dictionary, Scalar},
};

/// Bytes that all profiles of a request may take in memory. A request can name one stack, or one long text, a million times.
const MAX_EXPANDED_BYTES: usize = 128 << 20;

/// The rest of [`MAX_EXPANDED_BYTES`].
pub(crate) struct Budget(usize);

impl Budget {
    pub(crate) fn new() -> Self {
        Self(MAX_EXPANDED_BYTES)
    }

    pub(crate) fn spend(&mut self, bytes: usize) -> Result<(), OtlpError> {
        self.0 = self.0.checked_sub(bytes).ok_or(OtlpError::TooLarge { max: MAX_EXPANDED_BYTES })?;
        Ok(())
    }
}

/// Strings, mappings, functions and locations of a profile. It has only those that a sample needs.
pub(crate) struct Tables<'d> {
    dictionary: &'d Dictionary,
    strings: IndexSet<String>,
    mappings: Vec<Mapping>,
    functions: Vec<Function>,
    locations: Vec<Location>,
    /// Ids in the profile by indexes in the dictionary.
    mapping_ids: HashMap<i32, u64>,
    function_ids: HashMap<i32, u64>,
    location_ids: HashMap<i32, u64>,
    /// Ids of the mappings that stand for a kind of frame.
    kind_ids: HashMap<&'static str, u64>,
    /// Index of the mapping of the main program.
    main: usize,
}

impl<'d> Tables<'d> {
    pub(crate) fn new(dictionary: &'d Dictionary) -> Self {
        Self {
            dictionary,
            strings: IndexSet::from([String::new()]),
            mappings: Vec::new(),
            functions: Vec::new(),
            locations: Vec::new(),
            mapping_ids: HashMap::new(),
            function_ids: HashMap::new(),
            location_ids: HashMap::new(),
            kind_ids: HashMap::new(),
            main: 0,
        }
    }

    /// Moves the tables into a profile.
    pub(crate) fn fill(mut self, profile: &mut Profile) {
        if self.main < self.mappings.len() {
            self.mappings.swap(0, self.main);
        }
        profile.string_table = self.strings.into_iter().collect();
        profile.mapping = self.mappings;
        profile.function = self.functions;
        profile.location = self.locations;
    }

    /// Returns the index of a text.
    pub(crate) fn text(&mut self, text: &str, budget: &mut Budget) -> Result<i64, OtlpError> {
        if let Some(index) = self.strings.get_index_of(text) {
            return Ok(index as i64);
        }
        budget.spend(text.len() + size_of::<String>())?;
        Ok(self.strings.insert_full(text.to_owned()).0 as i64)
    }

    fn string(&mut self, index: i32, budget: &mut Budget) -> Result<i64, OtlpError> {
        self.text(self.dictionary.string(index)?, budget)
    }

    pub(crate) fn value_type(
        &mut self,
        of: otlp::ValueType,
        budget: &mut Budget,
    ) -> Result<gannet_proto::profiles::ValueType, OtlpError> {
        Ok(gannet_proto::profiles::ValueType {
            r#type: self.string(of.type_strindex, budget)?,
            unit: self.string(of.unit_strindex, budget)?,
        })
    }

    /// Returns the label for an attribute of a sample.
    pub(crate) fn label(&mut self, index: i32, budget: &mut Budget) -> Result<Label, OtlpError> {
        let dictionary = self.dictionary;
        let (key, value, unit) = dictionary.attribute(index)?;
        budget.spend(size_of::<Label>())?;
        let mut label = Label { key: self.text(attributes::label(key), budget)?, ..Label::default() };
        match value {
            Scalar::Number(number) => (label.num, label.num_unit) = (number, self.text(unit, budget)?),
            Scalar::Text(text) => label.str = self.text(&text, budget)?,
        }
        Ok(label)
    }

    /// Returns the label with this text.
    pub(crate) fn text_label(
        &mut self,
        key: &str,
        text: &str,
        budget: &mut Budget,
    ) -> Result<Label, OtlpError> {
        budget.spend(size_of::<Label>())?;
        Ok(Label { key: self.text(key, budget)?, str: self.text(text, budget)?, ..Label::default() })
    }

    /// Returns the label with this number.
    pub(crate) fn number_label(
        &mut self,
        key: &str,
        num: i64,
        budget: &mut Budget,
    ) -> Result<Label, OtlpError> {
        budget.spend(size_of::<Label>())?;
        Ok(Label { key: self.text(key, budget)?, num, ..Label::default() })
    }

    /// Returns trace and span of a link, or `None` for index 0.
    pub(crate) fn link(&self, index: i32) -> Result<Option<&'d otlp::Link>, OtlpError> {
        self.dictionary.link(index)
    }

    /// Returns the ids of the locations of a stack, leaf first.
    pub(crate) fn stack(&mut self, index: i32, budget: &mut Budget) -> Result<Vec<u64>, OtlpError> {
        let stack = self.dictionary.stack(index)?;
        budget.spend(size_of_val(stack))?;
        budget.spend(size_of_val(stack))?;
        stack.iter().map(|location| self.location(*location, budget)).collect()
    }

    fn location(&mut self, index: i32, budget: &mut Budget) -> Result<u64, OtlpError> {
        if let Some(id) = self.location_ids.get(&index) {
            return Ok(*id);
        }
        let dictionary = self.dictionary;
        let location = dictionary.location(index)?;
        budget.spend(size_of::<Location>() + location.lines.len() * size_of::<Line>())?;
        let mut line = Vec::with_capacity(location.lines.len());
        for otlp::Line { function_index, line: number, column } in &location.lines {
            let function_id = self.function(*function_index, budget)?;
            line.push(Line { function_id, line: *number, column: *column });
        }
        let (mut is_folded, mut kind) = (false, None);
        for attribute in &location.attribute_indices {
            match dictionary.attribute(*attribute)? {
                (attributes::IS_FOLDED, value, _) => is_folded = value.is_true(),
                (attributes::FRAME_TYPE, Scalar::Text(text), _) => kind = attributes::mapping_of(&text),
                _ => {}
            }
        }
        let mapping_id = match (location.mapping_index, kind) {
            (0, Some(kind)) => self.mapping_of(kind, budget)?,
            (0, None) => 0,
            (mapping, _) => self.mapping(mapping, budget)?,
        };
        let id = self.locations.len() as u64 + 1;
        self.locations.push(Location { id, mapping_id, address: location.address, line, is_folded });
        self.location_ids.insert(index, id);
        Ok(id)
    }

    fn function(&mut self, index: i32, budget: &mut Budget) -> Result<u64, OtlpError> {
        if let Some(id) = self.function_ids.get(&index) {
            return Ok(*id);
        }
        let function = *self.dictionary.function(index)?;
        budget.spend(size_of::<Function>())?;
        let id = self.functions.len() as u64 + 1;
        let function = Function {
            id,
            name: self.string(function.name_strindex, budget)?,
            system_name: self.string(function.system_name_strindex, budget)?,
            filename: self.string(function.filename_strindex, budget)?,
            start_line: function.start_line,
        };
        self.functions.push(function);
        self.function_ids.insert(index, id);
        Ok(id)
    }

    /// Returns the mapping that stands for a kind of frame. Other profilers give such frames no mapping.
    fn mapping_of(&mut self, kind: &'static str, budget: &mut Budget) -> Result<u64, OtlpError> {
        if let Some(id) = self.kind_ids.get(kind) {
            return Ok(*id);
        }
        let id = self.mappings.len() as u64 + 1;
        let filename = self.text(kind, budget)?;
        self.mappings.push(Mapping { id, filename, has_functions: true, ..Mapping::default() });
        self.kind_ids.insert(kind, id);
        Ok(id)
    }

    fn mapping(&mut self, index: i32, budget: &mut Budget) -> Result<u64, OtlpError> {
        if let Some(id) = self.mapping_ids.get(&index) {
            return Ok(*id);
        }
        let dictionary = self.dictionary;
        let from = dictionary.mapping(index)?;
        budget.spend(size_of::<Mapping>())?;
        let mut mapping = Mapping {
            id: self.mappings.len() as u64 + 1,
            memory_start: from.memory_start,
            memory_limit: from.memory_limit,
            file_offset: from.file_offset,
            filename: self.string(from.filename_strindex, budget)?,
            ..Mapping::default()
        };
        let (mut build_id, mut other_id) = (None, None);
        for attribute in &from.attribute_indices {
            match dictionary.attribute(*attribute)? {
                (attributes::BUILD_ID_GNU, Scalar::Text(text), _) => build_id = Some(text),
                (attributes::BUILD_ID_GO | attributes::BUILD_ID_HASH, Scalar::Text(text), _) => {
                    other_id = Some(text);
                }
                (attributes::MAPPING_LIMIT, Scalar::Number(limit), _) => {
                    mapping.memory_limit = limit.cast_unsigned();
                }
                (attributes::IS_MAIN, value, _) if value.is_true() => self.main = self.mappings.len(),
                (attributes::HAS_FUNCTIONS, value, _) => mapping.has_functions = value.is_true(),
                (attributes::HAS_FILENAMES, value, _) => mapping.has_filenames = value.is_true(),
                (attributes::HAS_LINE_NUMBERS, value, _) => mapping.has_line_numbers = value.is_true(),
                (attributes::HAS_INLINE_FRAMES, value, _) => mapping.has_inline_frames = value.is_true(),
                _ => {}
            }
        }
        // That of the linker finds debug information.
        if let Some(text) = build_id.or(other_id) {
            mapping.build_id = self.text(&text, budget)?;
        }
        let id = mapping.id;
        self.mappings.push(mapping);
        self.mapping_ids.insert(index, id);
        Ok(id)
    }
}
