//! Flame graphs.

use std::{borrow::Cow, collections::BTreeMap, fmt::Write};

use gannet_proto::profiles::{Location, Profile};
use inferno::flamegraph::{self, Options, Palette, TextTruncateDirection, color::MultiPalette};

use super::{Details, OutputError};
use crate::symbols::KERNEL_MAPPING;

/// Suffixes of frames by which flame graph tools choose colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Marks {
    Plain,
    Kinds,
}

/// Returns one sorted line for each different stack, root first: `comm;main;work 1234`. The value is that of the last
/// sample type. The root is the command name, so that one graph can show many processes.
pub(super) fn stacks(profile: &Profile, marks: Marks) -> Result<Vec<String>, OutputError> {
    let reader = Reader::new(profile)?;
    let mut sums: BTreeMap<String, i64> = BTreeMap::new();
    for sample in &profile.sample {
        let value = *sample.value.last().ok_or(OutputError::Damaged("a sample has no value"))?;
        let comm = sample.label.iter().find(|label| reader.text(label.key) == "comm");
        let mut line = comm.map(|label| frame_text(reader.text(label.str))).unwrap_or_default();
        for id in sample.location_id.iter().rev() {
            reader.add_location(*id, marks, &mut line)?;
        }
        if line.is_empty() {
            line.push_str("[no stack]");
        }
        *sums.entry(line).or_default() += value;
    }
    Ok(sums.into_iter().map(|(line, value)| format!("{line} {value}")).collect())
}

struct Reader<'a> {
    profile: &'a Profile,
    locations: BTreeMap<u64, &'a Location>,
    functions: BTreeMap<u64, i64>,
    mappings: BTreeMap<u64, i64>,
}

impl<'a> Reader<'a> {
    fn new(profile: &'a Profile) -> Result<Self, OutputError> {
        if profile.sample.is_empty() {
            return Err(OutputError::Empty);
        }
        Ok(Self {
            profile,
            locations: profile.location.iter().map(|location| (location.id, location)).collect(),
            functions: profile.function.iter().map(|function| (function.id, function.name)).collect(),
            mappings: profile.mapping.iter().map(|mapping| (mapping.id, mapping.filename)).collect(),
        })
    }

    fn text(&self, index: i64) -> &'a str {
        usize::try_from(index)
            .ok()
            .and_then(|index| self.profile.string_table.get(index))
            .map_or("", String::as_str)
    }

    fn add_location(&self, id: u64, marks: Marks, line: &mut String) -> Result<(), OutputError> {
        let location = self
            .locations
            .get(&id)
            .ok_or(OutputError::Damaged("a sample names a location that is missing"))?;
        let file = self.mappings.get(&location.mapping_id).map_or("", |name| self.text(*name));
        let is_kernel = file == KERNEL_MAPPING;
        let mut push = |name: &str, is_inlined: bool| {
            if !line.is_empty() {
                line.push(';');
            }
            line.push_str(&frame_text(name));
            match marks {
                Marks::Kinds if is_kernel => line.push_str("_[k]"),
                Marks::Kinds if is_inlined => line.push_str("_[i]"),
                Marks::Kinds | Marks::Plain => {}
            }
        };
        if location.line.is_empty() {
            // A frame without a name shows its file.
            match file.rsplit('/').next().unwrap_or_default() {
                "" => push("[unknown]", false),
                name if name.starts_with('[') => push(name, false),
                name => push(&format!("[{name}]"), false),
            }
        }
        for (depth, part) in location.line.iter().enumerate().rev() {
            let name = self
                .functions
                .get(&part.function_id)
                .ok_or(OutputError::Damaged("a location names a function that is missing"))?;
            push(self.text(*name), depth + 1 < location.line.len());
        }
        Ok(())
    }
}

/// Returns a name without the characters that end a frame or a stack.
fn frame_text(name: &str) -> String {
    name.chars()
        .map(|character| match character {
            ';' => ':',
            character if character.is_control() => '?',
            character => character,
        })
        .collect()
}

/// Returns the unit to show values in, and the factor to it.
fn unit(profile: &Profile) -> (f64, &str) {
    let text = |index: i64| {
        usize::try_from(index)
            .ok()
            .and_then(|index| profile.string_table.get(index))
            .map_or("", String::as_str)
    };
    match profile.sample_type.last() {
        Some(kind) if text(kind.unit) == "nanoseconds" => (1e-6, "ms"),
        Some(kind) => (1.0, text(kind.unit)),
        None => (1.0, "samples"),
    }
}

pub(super) fn svg(profile: &Profile, title: &str) -> Result<Vec<u8>, OutputError> {
    let lines = stacks(profile, Marks::Kinds)?;
    let (factor, count_name) = unit(profile);
    let mut options = Options::default();
    title.clone_into(&mut options.title);
    options.factor = factor;
    count_name.clone_into(&mut options.count_name);
    options.colors = Palette::Multi(MultiPalette::Java);
    options.deterministic = true;
    options.text_truncate_direction = TextTruncateDirection::Right;
    let mut picture = Vec::new();
    flamegraph::from_lines(&mut options, lines.iter().map(String::as_str), &mut picture)
        .map_err(|error| OutputError::Draw(error.to_string()))?;
    Ok(picture)
}

pub(super) fn html(profile: &Profile, details: &Details) -> Result<Vec<u8>, OutputError> {
    let picture =
        String::from_utf8(svg(profile, "")?).map_err(|error| OutputError::Draw(error.to_string()))?;
    // Inside a page the picture is an element, not a document.
    let picture =
        &picture[picture.find("<svg").ok_or_else(|| OutputError::Draw("no picture".to_owned()))?..];
    let title = escape(&details.title);
    let ledger = &details.ledger;
    let mut facts = String::new();
    let mut fact = |name: &str, value: &str| {
        let _ = write!(facts, "<div><dt>{}</dt><dd>{}</dd></div>", escape(name), escape(value));
    };
    if profile.duration_nanos > 0 {
        fact("recorded for", &format!("{:.1} s", profile.duration_nanos as f64 / 1e9));
    }
    if let Ok(time) = jiff::Timestamp::from_nanosecond(i128::from(profile.time_nanos))
        && profile.time_nanos > 0
    {
        fact("from", &time.strftime("%Y-%m-%d %H:%M:%S UTC").to_string());
    }
    fact("samples taken", &ledger.taken.to_string());
    fact("delivered", &ledger.delivered.to_string());
    fact("lost", &ledger.lost_total().to_string());
    for (reason, count) in ledger.lost.iter().filter(|(_, count)| **count > 0) {
        fact(&format!("lost: {}", reason.as_str().replace('_', " ")), &count.to_string());
    }
    let comments: String = profile
        .comment
        .iter()
        .filter_map(|index| profile.string_table.get(usize::try_from(*index).ok()?))
        .fold(String::new(), |all, comment| all + "<li>" + &escape(comment) + "</li>");
    Ok(PAGE
        .replace("@title@", &title)
        .replace("@facts@", &facts)
        .replace("@comments@", &comments)
        .replace("@picture@", picture)
        .into_bytes())
}

fn escape(text: &str) -> String {
    text.chars().fold(String::new(), |mut safe, character| {
        let part: Cow<'_, str> = match character {
            '<' => "&lt;".into(),
            '>' => "&gt;".into(),
            '&' => "&amp;".into(),
            '"' => "&quot;".into(),
            // The characters of the page's own markup.
            '@' => "&#64;".into(),
            character => character.to_string().into(),
        };
        safe.push_str(&part);
        safe
    })
}

const PAGE: &str = include_str!("page.html");
