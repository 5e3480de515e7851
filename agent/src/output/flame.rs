//! Flame graphs.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    fmt::Write,
};

use gannet_proto::{
    pprof::{InterpreterFrames, folded_name, interpreted_name, is_error_frame, is_interpreted, sure_frames},
    profiles::{Function, Location, Profile, Sample},
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    /// The command name at the root.
    Command,
    Function,
    Inlined,
    Kernel,
    /// A function that an interpreter runs.
    Interpreted,
}

/// Returns one line for each different stack, root first: `comm;main;work 1234`. The value is that of the last sample type.
/// The root is the command name, so that one graph can show many processes.
pub(super) fn folded(profile: &Profile, details: &Details) -> Result<String, OutputError> {
    let stacks = stacks(profile, details, |frame, _| folded_name(&frame.name).into_owned())?;
    Ok(stacks.iter().fold(String::new(), |mut lines, (stack, value)| {
        let _ = writeln!(lines, "{} {value}", stack.join(";"));
        lines
    }))
}

/// Adds up the values of equal stacks, with the text that `text` makes of each frame. It gets whether the frame rests on a guess
/// in any sample that has the same callers.
fn stacks(
    profile: &Profile,
    details: &Details,
    text: impl Fn(&Frame, bool) -> String,
) -> Result<Stacks, OutputError> {
    let reader = Reader::new(profile, details)?;
    let mut guesses = GuessedPaths::default();
    for sample in &profile.sample {
        if sure_frames(profile, sample) < sample.location_id.len() {
            let stack = reader.stack(sample)?;
            guesses.add(&stack.frames[..stack.guessed]);
        }
    }
    let mut sums = Stacks::new();
    for sample in &profile.sample {
        let value = *sample.value.last().ok_or(OutputError::Damaged("a sample has no value"))?;
        let Stack { frames, .. } = reader.stack(sample)?;
        let guessed = guesses.depth(&frames);
        let mut stack: Vec<String> = frames
            .iter()
            .enumerate()
            .map(|(depth, frame)| text(frame, depth < guessed && frame.may_be_guessed()))
            .collect();
        if stack.is_empty() {
            stack.push("[no stack]".to_owned());
        }
        *sums.entry(stack).or_default() += value;
    }
    Ok(sums)
}

/// A frame that a graph shows.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Frame {
    name: String,
    kind: Kind,
}

impl Frame {
    fn may_be_guessed(&self) -> bool {
        self.kind != Kind::Command && !is_error_frame(&self.name)
    }
}

/// The frames of a sample, root first.
struct Stack {
    frames: Vec<Frame>,
    /// How many of them, from the root on, rest on a guess.
    guessed: usize,
}

/// The paths from the root to frames that rest on a guess. Stacks that have the same callers share them, as in the graph.
#[derive(Default)]
struct GuessedPaths(HashMap<(usize, Frame), usize>);

impl GuessedPaths {
    fn add(&mut self, path: &[Frame]) {
        let mut at = 0;
        for frame in path {
            let next = self.0.len() + 1;
            at = *self.0.entry((at, frame.clone())).or_insert(next);
        }
    }

    /// Returns how many frames of a stack, root first, are on such a path.
    fn depth(&self, stack: &[Frame]) -> usize {
        if self.0.is_empty() {
            return 0;
        }
        let mut at = 0;
        let is_known = |frame: &&Frame| match self.0.get(&(at, Frame::clone(frame))) {
            Some(next) => {
                at = *next;
                true
            }
            None => false,
        };
        stack.iter().take_while(is_known).count()
    }
}

struct Reader<'a> {
    profile: &'a Profile,
    interpreters: InterpreterFrames,
    hide_error_frames: bool,
    locations: BTreeMap<u64, &'a Location>,
    functions: BTreeMap<u64, &'a Function>,
    mappings: BTreeMap<u64, i64>,
}

impl<'a> Reader<'a> {
    fn new(profile: &'a Profile, details: &Details) -> Result<Self, OutputError> {
        if profile.sample.is_empty() {
            return Err(OutputError::Empty);
        }
        let interpreters = if details.interpreter_frames {
            InterpreterFrames::default()
        } else {
            InterpreterFrames::new(profile)
        };
        Ok(Self {
            profile,
            interpreters,
            hide_error_frames: details.hide_error_frames,
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

    fn stack(&self, sample: &Sample) -> Result<Stack, OutputError> {
        let sure = sure_frames(self.profile, sample);
        let (mut frames, mut guessed) = (Vec::with_capacity(sample.location_id.len() + 1), 0);
        let mut push = |name: &str, kind| {
            if !(self.hide_error_frames && is_error_frame(name)) {
                frames.push(Frame { name: name.to_owned(), kind });
            }
            frames.len()
        };
        if let Some(comm) = sample.label.iter().find(|label| self.text(label.key) == "comm") {
            push(self.text(comm.str), Kind::Command);
        }
        for (index, id) in self.interpreters.visible(sample).rev() {
            self.add_location(id, &mut |name, kind| {
                let depth = push(name, kind);
                if index >= sure {
                    guessed = depth;
                }
            })?;
        }
        Ok(Stack { frames, guessed })
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

/// Stands behind the name of a frame that rests on a guess.
const GUESSED: &str = " (guessed)";

/// Returns the frame of a picture, from which [`restored`] makes the name again.
fn picture_frame(frame: &Frame, is_guessed: bool) -> String {
    let stand_in = |c: char| STAND_INS.iter().find(|(from, _)| *from == c).map_or(c, |(_, to)| *to);
    let name = printable(&frame.name) + if is_guessed { GUESSED } else { "" };
    let name = name.chars().map(stand_in).collect::<String>();
    match frame.kind {
        Kind::Command | Kind::Function => name,
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
    let has_guesses = picture.contains(GUESSED);
    Ok(PAGE
        .replace("@title@", &title)
        .replace("@guesses@", if has_guesses { GUESSES } else { "" })
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

/// The legend of the page for frames that rest on a guess.
const GUESSES: &str = "<p>Frames marked “(guessed)” may be wrong: in at least one sample Gannet found them, or a function that they \
    called, by a frame pointer alone, because no unwind table had an entry.</p>";

const PAGE: &str = include_str!("page.html");
