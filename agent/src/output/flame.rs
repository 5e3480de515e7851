//! Flame graphs.

use std::{borrow::Cow, collections::BTreeMap, fmt::Write};

use gannet_proto::{
    pprof::{InterpreterFrames, folded_name, interpreted_name, is_error_frame, is_interpreted},
    profiles::{Function, Location, Profile},
};
use inferno::flamegraph::{self, Options, Palette, TextTruncateDirection, color::MultiPalette};

use super::{Details, OutputError};
use crate::symbols::KERNEL_MAPPING;

/// Value of each different stack: the command name of the process, then its functions, root first.
///
/// Sorted by frame, so that equal frames of one depth stand side by side: sorted as text, `f.cold` would come between `f` and
/// `f;g`.
type Stacks = BTreeMap<Vec<String>, i64>;

/// The end of a frame by which flame graph tools choose colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Function,
    Inlined,
    Kernel,
    /// A function that an interpreter runs.
    Interpreted,
}

/// Returns one line for each different stack, root first: `comm;main;work 1234`. The value is that of the last sample type.
/// The root is the command name, so that one graph can show many processes.
pub(super) fn folded(profile: &Profile, details: &Details) -> Result<String, OutputError> {
    let stacks = stacks(profile, details, |name, _| folded_name(name).into_owned())?;
    Ok(stacks.iter().fold(String::new(), |mut lines, (stack, value)| {
        let _ = writeln!(lines, "{} {value}", stack.join(";"));
        lines
    }))
}

/// Adds up the values of equal stacks, with the text that `frame` makes of each name.
fn stacks(
    profile: &Profile,
    details: &Details,
    frame: impl Fn(&str, Kind) -> String,
) -> Result<Stacks, OutputError> {
    let interpreters = if details.interpreter_frames {
        InterpreterFrames::default()
    } else {
        InterpreterFrames::new(profile)
    };
    let reader = Reader::new(profile)?;
    let mut sums = Stacks::new();
    for sample in &profile.sample {
        let value = *sample.value.last().ok_or(OutputError::Damaged("a sample has no value"))?;
        let mut stack = Vec::with_capacity(sample.location_id.len() + 1);
        let mut push = |name: &str, kind| {
            if !(details.hide_error_frames && is_error_frame(name)) {
                stack.push(frame(name, kind));
            }
        };
        if let Some(comm) = sample.label.iter().find(|label| reader.text(label.key) == "comm") {
            push(reader.text(comm.str), Kind::Function);
        }
        for id in interpreters.visible(sample).rev() {
            reader.add_location(id, &mut push)?;
        }
        if stack.is_empty() {
            stack.push("[no stack]".to_owned());
        }
        *sums.entry(stack).or_default() += value;
    }
    Ok(sums)
}

struct Reader<'a> {
    profile: &'a Profile,
    locations: BTreeMap<u64, &'a Location>,
    functions: BTreeMap<u64, &'a Function>,
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
            functions: profile.function.iter().map(|function| (function.id, function)).collect(),
            mappings: profile.mapping.iter().map(|mapping| (mapping.id, mapping.filename)).collect(),
        })
    }

    fn text(&self, index: i64) -> &'a str {
        usize::try_from(index)
            .ok()
            .and_then(|index| self.profile.string_table.get(index))
            .map_or("", String::as_str)
    }

    fn add_location(&self, id: u64, push: &mut impl FnMut(&str, Kind)) -> Result<(), OutputError> {
        let location = self
            .locations
            .get(&id)
            .ok_or(OutputError::Damaged("a sample names a location that is missing"))?;
        let file = self.mappings.get(&location.mapping_id).map_or("", |name| self.text(*name));
        let outer = if file == KERNEL_MAPPING { Kind::Kernel } else { Kind::Function };
        if location.line.is_empty() {
            // A frame without a name shows its file.
            match file.rsplit('/').next().unwrap_or_default() {
                "" => push("[unknown]", outer),
                name if name.starts_with('[') => push(name, outer),
                name => push(&format!("[{name}]"), outer),
            }
        }
        for (depth, part) in location.line.iter().enumerate().rev() {
            let function = self
                .functions
                .get(&part.function_id)
                .ok_or(OutputError::Damaged("a location names a function that is missing"))?;
            let is_inlined = depth + 1 < location.line.len();
            let name = self.text(function.name);
            if is_interpreted(file) {
                let name = interpreted_name(name, self.text(function.filename), function.start_line);
                push(&name, Kind::Interpreted);
            } else {
                push(name, if is_inlined && outer != Kind::Kernel { Kind::Inlined } else { outer });
            }
        }
        Ok(())
    }
}

/// Characters of a name that mean something else to inferno, with a stand-in for each: it takes a number behind the last space
/// for a second column of values, and `_[k]` at the end for a mark. No name holds a stand-in, because [`printable`] replaces
/// control characters.
const STAND_INS: [(char, char); 3] = [(' ', '\u{1}'), (';', '\u{2}'), (']', '\u{3}')];

/// Returns the frame of a picture, from which [`restored`] makes the name again.
fn picture_frame(name: &str, kind: Kind) -> String {
    let stand_in = |c: char| STAND_INS.iter().find(|(from, _)| *from == c).map_or(c, |(_, to)| *to);
    let name = printable(name).chars().map(stand_in).collect::<String>();
    match kind {
        Kind::Function => name,
        Kind::Inlined => name + "_[i]",
        Kind::Kernel => name + "_[k]",
        // The mark of functions that a JIT compiler made has the colour of other languages.
        Kind::Interpreted => name + "_[j]",
    }
}

/// Puts the characters of names back into a picture.
fn restored(picture: &str) -> String {
    let original = |c: char| STAND_INS.iter().find(|(_, to)| *to == c).map_or(c, |(from, _)| *from);
    picture.chars().map(original).collect()
}

/// Returns a text without the characters that XML does not allow.
fn printable(text: &str) -> String {
    let is_allowed = |c: char| !c.is_control() && !matches!(c, '\u{fffe}' | '\u{ffff}');
    text.chars().map(|c| if is_allowed(c) { c } else { '?' }).collect()
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

pub(super) fn svg(profile: &Profile, details: &Details) -> Result<Vec<u8>, OutputError> {
    Ok(picture(profile, details, &details.title)?.into_bytes())
}

fn picture(profile: &Profile, details: &Details, title: &str) -> Result<String, OutputError> {
    // inferno draws a "flame chart" in the order of its lines, last line first. Otherwise it sorts or wants them as text.
    let lines: Vec<String> = stacks(profile, details, picture_frame)?
        .iter()
        .rev()
        .map(|(stack, value)| format!("{} {value}", stack.join(";")))
        .collect();
    let (factor, count_name) = unit(profile);
    let mut options = Options::default();
    options.title = printable(title);
    options.factor = factor;
    count_name.clone_into(&mut options.count_name);
    options.colors = Palette::Multi(MultiPalette::Java);
    options.deterministic = true;
    options.text_truncate_direction = TextTruncateDirection::Right;
    options.flame_chart = true;
    let mut picture = Vec::new();
    flamegraph::from_lines(&mut options, lines.iter().map(String::as_str), &mut picture)
        .map_err(|error| OutputError::Draw(error.to_string()))?;
    let picture = String::from_utf8(picture).map_err(|error| OutputError::Draw(error.to_string()))?;
    Ok(restored(&picture))
}

pub(super) fn html(profile: &Profile, details: &Details) -> Result<Vec<u8>, OutputError> {
    let picture = picture(profile, details, "")?;
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
    fact("unaccounted", &ledger.unaccounted().to_string());
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
