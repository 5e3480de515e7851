//! Objects of V8: strings, scripts, and what they say of a function.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use parking_lot::Mutex;

use super::{
    super::{
        CodeFunction, FunctionText, Memory, Unloads, WhyNot,
        memory::{half, word},
    },
    layout::Layout,
    lines,
    moves::Moves,
};

/// Characters of a name, and of a path.
const MAX_NAME: usize = 512;
const MAX_PATH: usize = 4096;
/// Strings that one string is put together of.
const MAX_PARTS: usize = 64;
/// Bytes of a script whose lines are counted, and of one piece of it.
const MAX_SOURCE: u64 = 4 << 20;
const SOURCE_PIECE: u64 = 256 << 10;
/// Scripts whose lines are kept, and lines of all of them.
const MAX_SCRIPTS: usize = 2048;
const MAX_LINES: usize = 1 << 20;
/// Functions whose texts are kept.
const MAX_FUNCTIONS: usize = 8192;
/// Maps whose type is kept.
const MAX_MAPS: usize = 256;
/// Functions of one script, functions that one search reads, and searches for one function.
const MAX_OF_SCRIPT: u64 = 1 << 13;
const MAX_SEARCHED: usize = 4096;
const MAX_SEARCHES: u32 = 8;
/// Bytes of one table of positions.
const MAX_TABLE: u64 = 64 << 10;
/// Variables of a scope; beyond the first number they are in a table of their own.
const MAX_INLINE_LOCALS: u64 = 75;
const MAX_LOCALS: u64 = 1 << 14;
/// Distances in the description of a scope.
const SCOPE_FLAGS: usize = 8;
const SCOPE_LOCALS: usize = 8 * 3;
/// Words before its variables that are read.
const SCOPE_WORDS: usize = 6;
/// Words behind its variables that may say something of the function.
const SCOPE_REST: usize = 8;
const SCOPE_TYPE: u32 = 0xf;
const HAS_CLASS_VARIABLE: u32 = 1 << 10;
const FUNCTION_VARIABLE: u32 = 3 << 12;
const HAS_INFERRED_NAME: u32 = 1 << 14;
/// Kinds of strings.
const NOT_STRING: u16 = 0xff80;
const ONE_BYTE: u16 = 8;
const REPRESENTATION: u16 = 7;
const CONS: u16 = 1;
const EXTERNAL: u16 = 2;
const SLICED: u16 = 3;
const THIN: u16 = 5;
/// Of a function without a name.
const ANONYMOUS: &str = "(anonymous)";
/// Bytes of a function's shared description that are read, and of the head of an array of bytecode.
const SHARED_BYTES: usize = 56;
const BYTECODE_BYTES: usize = 56;

/// Returns the address of an object; `None` if the word is no reference to one.
pub(super) fn object(word: u64) -> Option<u64> {
    (word & 3 == 1).then(|| word - 1)
}

/// Returns the small integer that a word is.
pub(super) fn small(word: u64) -> Option<i32> {
    (word.trailing_zeros() >= 32).then_some((word >> 32) as u32 as i32)
}

fn no_object() -> WhyNot {
    WhyNot::Implausible("no object")
}

/// Reads objects, and keeps what does not change.
#[derive(Debug)]
pub(super) struct Heap {
    pub(super) layout: Layout,
    pub(super) moves: Moves,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    /// Types by map, of objects whose maps never move.
    types: HashMap<u64, u16>,
    scripts: HashMap<u64, Arc<Script>>,
    /// Lines of all scripts.
    lines: usize,
    /// The shared description of the function that has this bytecode.
    shared: HashMap<u64, u64>,
    /// Bytecode whose function was searched in all scripts, and how often.
    searched: HashMap<u64, u32>,
    /// By object: the words that it was read from, and the texts.
    functions: HashMap<u64, (Vec<u8>, FunctionText)>,
}

/// A script, as far as functions need it.
#[derive(Debug, Default)]
pub(super) struct Script {
    /// The references to its name and its source, and its number, which no other script of its heap has.
    words: [u64; 3],
    pub(super) file: String,
    first_line: u32,
    /// The characters that end its lines.
    ends: Vec<u32>,
}

impl Script {
    /// Returns the line of a character; 0 if it is not known.
    pub(super) fn line(&self, offset: u32) -> u32 {
        if self.ends.is_empty() {
            return 0;
        }
        let line = self.ends.partition_point(|end| *end < offset) as u32;
        line.saturating_add(1).saturating_add(self.first_line)
    }
}

impl Heap {
    pub(super) fn new(layout: Layout) -> Self {
        Self { moves: Moves::new(layout.version.heap), layout, kept: Mutex::default() }
    }

    /// Reads how often the collector has moved what stays otherwise, and forgets what may be another object by now.
    pub(super) fn unloads(&self, memory: &dyn Memory, is_there: impl FnOnce() -> bool) -> Unloads {
        if !self.layout.version.needs_proof {
            return Unloads::Count(0);
        }
        let before = (self.moves.epoch(), self.moves.heaps());
        let reading = self.moves.read(memory, is_there);
        let mut kept = self.kept.lock();
        if before.0 != self.moves.epoch() {
            kept.functions.clear();
            kept.shared.clear();
            kept.searched.clear();
        }
        if before.1 > self.moves.heaps() {
            // Scripts of another heap may have the same numbers.
            kept.scripts.clear();
            kept.lines = 0;
        }
        reading
    }

    /// Has [`Heap::unloads`] read the counts of the heap that an object is in, if names need a proof.
    pub(super) fn enter(&self, object: u64, memory: &dyn Memory) -> Result<(), WhyNot> {
        if self.layout.version.needs_proof { self.moves.enter(object, memory) } else { Ok(()) }
    }

    /// Reads an object by its reference: its first bytes, and its type.
    fn read(&self, reference: u64, bytes: usize, memory: &dyn Memory) -> Result<(u16, Vec<u8>), WhyNot> {
        let at = object(reference).ok_or_else(no_object)?;
        let bytes = memory.bytes(at, bytes)?;
        Ok((self.type_of(word(&bytes, 0), memory)?, bytes))
    }

    /// Reads an object of this type.
    pub(super) fn read_as(
        &self,
        reference: u64,
        of: u16,
        bytes: usize,
        memory: &dyn Memory,
    ) -> Result<Vec<u8>, WhyNot> {
        let (found, bytes) = self.read(reference, bytes, memory)?;
        if found == of { Ok(bytes) } else { Err(WhyNot::Implausible("an object of another type")) }
    }

    /// Returns the type of the objects with this map.
    fn type_of(&self, map: u64, memory: &dyn Memory) -> Result<u16, WhyNot> {
        if let Some(known) = self.kept.lock().types.get(&map) {
            return Ok(*known);
        }
        let number = |map: u64| -> Result<(u64, u16), WhyNot> {
            let at = object(map).ok_or_else(no_object)?;
            let [low, high] = memory.array(at.wrapping_add(self.layout.instance_type))?;
            Ok((memory.u64(at)?, u16::from_le_bytes([low, high])))
        };
        let (of_map, found) = number(map)?;
        let types = &self.layout.types;
        if number(of_map)?.1 != types.map {
            return Err(WhyNot::Implausible("no map"));
        }
        let stays = [types.bytecode, types.shared, types.script, types.scope, types.code, types.array];
        if stays.contains(&found) {
            let mut kept = self.kept.lock();
            if kept.types.len() >= MAX_MAPS {
                kept.types.clear();
            }
            kept.types.insert(map, found);
        }
        Ok(found)
    }

    /// Reads an array of bytes.
    pub(super) fn table(&self, reference: u64, memory: &dyn Memory) -> Result<Vec<u8>, WhyNot> {
        let head = self.read_as(reference, self.layout.types.bytes, 16, memory)?;
        let length = small(word(&head, 8)).and_then(|length| u64::try_from(length).ok()).unwrap_or(0);
        let at = object(reference).ok_or_else(no_object)?.wrapping_add(16);
        memory.bytes(at, length.min(MAX_TABLE) as usize)
    }

    /// Reads a string of at most `max` characters.
    fn string(&self, reference: u64, max: usize, memory: &dyn Memory) -> Result<String, WhyNot> {
        let mut units: Vec<u16> = Vec::new();
        // References, first character and number of characters of the parts that follow.
        let mut parts = VecDeque::from([(reference, 0_u64, max as u64)]);
        for _ in 0..MAX_PARTS {
            let Some((part, from, count)) = parts.pop_front() else { break };
            let Some(string) = self.open(part, memory)? else { return Err(no_object()) };
            let length = string.length.saturating_sub(from).min(count).min((max - units.len()) as u64);
            match string.kind {
                CONS => {
                    let first = self.open(string.words[0], memory)?.ok_or_else(no_object)?.length;
                    let of_first = first.saturating_sub(from).min(length);
                    parts.push_front((string.words[1], from.saturating_sub(first), length - of_first));
                    parts.push_front((string.words[0], from, of_first));
                }
                SLICED => {
                    let skip = small(string.words[1]).and_then(|at| u64::try_from(at).ok()).unwrap_or(0);
                    parts.push_front((string.words[0], from.saturating_add(skip), length));
                }
                THIN => parts.push_front((string.words[0], from, length)),
                _ => {
                    let at = string.chars.wrapping_add(from * string.width);
                    let bytes = memory.bytes(at, (length * string.width) as usize)?;
                    if string.width == 1 {
                        units.extend(bytes.iter().map(|byte| u16::from(*byte)));
                    } else {
                        units.extend(bytes.as_chunks().0.iter().map(|two| u16::from_le_bytes(*two)));
                    }
                }
            }
        }
        Ok(String::from_utf16_lossy(&units).replace(char::is_control, " "))
    }

    /// Reads the head of a string; `None` if the object is none.
    fn open(&self, reference: u64, memory: &dyn Memory) -> Result<Option<OpenString>, WhyNot> {
        let (kind, head) = self.read(reference, 32, memory).or_else(|_| {
            // Short strings may end before their page does.
            self.read(reference, 16, memory)
        })?;
        if kind & NOT_STRING != 0 {
            return Ok(None);
        }
        let length = head.get(self.layout.string_length as usize..).and_then(|rest| rest.first_chunk());
        let length = length.map_or(0, |four| u32::from_le_bytes(*four));
        let is_external = kind & REPRESENTATION == EXTERNAL;
        let at = reference - 1;
        Ok(Some(OpenString {
            kind: kind & REPRESENTATION,
            width: if kind & ONE_BYTE != 0 { 1 } else { 2 },
            length: u64::from(length),
            words: [word(&head, 16), word(&head, 24)],
            chars: if is_external {
                word(&head, self.layout.external_data as usize)
            } else {
                at.wrapping_add(self.layout.chars)
            },
        }))
    }

    /// Finds where the lines of a source end.
    fn line_ends(&self, source: u64, memory: &dyn Memory) -> Result<Vec<u32>, WhyNot> {
        let mut reference = source;
        for _ in 0..4 {
            let Some(string) = self.open(reference, memory)? else { break };
            match string.kind {
                // A source that was put together has its characters in the first part.
                CONS | THIN => reference = string.words[0],
                SLICED => break,
                _ => return read_ends(&string, memory),
            }
        }
        Ok(Vec::new())
    }

    /// Reads a script.
    pub(super) fn script(&self, reference: u64, memory: &dyn Memory) -> Result<Arc<Script>, WhyNot> {
        let of = &self.layout;
        let number = of.version.script_number;
        let end = of.script_name.max(of.script_source).max(number) as usize + 16;
        let bytes = self.read_as(reference, of.types.script, end, memory)?;
        let words = [of.script_name, of.script_source, number].map(|at| word(&bytes, at as usize));
        if let Some(known) = self.kept.lock().scripts.get(&reference).filter(|known| known.words == words) {
            return Ok(Arc::clone(known));
        }
        let file = self.string(words[0], MAX_PATH, memory).unwrap_or_default();
        let file = file.strip_prefix("file://").unwrap_or(&file).to_owned();
        // Behind the name.
        let first_line = small(word(&bytes, of.script_name as usize + 8)).unwrap_or(0);
        let ends = self.line_ends(words[1], memory).unwrap_or_default();
        let script =
            Arc::new(Script { words, file, first_line: u32::try_from(first_line).unwrap_or(0), ends });
        let mut kept = self.kept.lock();
        if kept.scripts.len() >= MAX_SCRIPTS || kept.lines + script.ends.len() > MAX_LINES {
            kept.scripts.clear();
            kept.lines = 0;
        }
        kept.lines += script.ends.len();
        kept.scripts.insert(reference, Arc::clone(&script));
        Ok(script)
    }

    /// Reads the script of a function by its shared description.
    pub(super) fn script_of(&self, shared: u64, memory: &dyn Memory) -> Result<Arc<Script>, WhyNot> {
        let bytes = self.read_as(shared, self.layout.types.shared, SHARED_BYTES, memory)?;
        self.script(word(&bytes, self.layout.version.script as usize), memory)
    }

    /// Reads the name of a function, and the character where it begins.
    fn name(&self, reference: u64, memory: &dyn Memory) -> Result<(String, Option<u32>), WhyNot> {
        let named = |name: String| if name.is_empty() { ANONYMOUS.to_owned() } else { name };
        if small(reference).is_some() {
            return Ok((named(String::new()), None));
        }
        let (kind, _) = self.read(reference, 8, memory)?;
        if kind & NOT_STRING == 0 {
            return Ok((named(self.string(reference, MAX_NAME, memory)?), None));
        }
        if kind != self.layout.types.scope {
            return Err(WhyNot::Implausible("a name of an odd type"));
        }
        let of = &self.layout.version.scope;
        let head = memory.bytes(reference - 1, 8 * SCOPE_WORDS)?;
        let flags = if of.has_plain_flags {
            half(&head, SCOPE_FLAGS)
        } else {
            small(word(&head, SCOPE_FLAGS)).ok_or_else(no_object)?.cast_unsigned()
        };
        let locals = small(word(&head, SCOPE_LOCALS)).ok_or_else(no_object)?;
        let locals = u64::try_from(locals).ok().filter(|count| *count < MAX_LOCALS).ok_or_else(no_object)?;
        let offset = |word: u64| small(word).and_then(|offset| u32::try_from(offset).ok());
        let start = of.start.map(|at| offset(word(&head, 8 * at)));
        // Names and descriptions of the variables.
        let names = if locals < MAX_INLINE_LOCALS { locals } else { 1 };
        let is_module = flags & SCOPE_TYPE == of.module;
        let skipped =
            of.variables + names + locals + u64::from(is_module) + u64::from(flags & HAS_CLASS_VARIABLE != 0);
        let at = (reference - 1).wrapping_add(8 * skipped);
        let rest = memory.bytes(at, 8 * SCOPE_REST)?;
        let mut words = rest.as_chunks().0.iter().map(|eight| u64::from_ne_bytes(*eight));
        let text = |reference: u64| {
            if small(reference).is_some() {
                return Ok(String::new());
            }
            self.string(reference, MAX_NAME, memory)
        };
        let mut name = String::new();
        if flags & FUNCTION_VARIABLE != 0 {
            name = text(words.next().unwrap_or(0))?;
            words.next();
        }
        if flags & HAS_INFERRED_NAME != 0 {
            let inferred = words.next().unwrap_or(0);
            if name.is_empty() {
                name = text(inferred).unwrap_or_default();
            }
        }
        Ok((named(name), start.unwrap_or_else(|| words.next().and_then(offset))))
    }

    /// Returns the shared description of a function, to which the reference may lead by a wrapper.
    pub(super) fn unwrapped(&self, reference: u64, memory: &dyn Memory) -> Result<u64, WhyNot> {
        let Some(wrapper) = self.layout.types.wrapper else { return Ok(reference) };
        let (kind, bytes) = self.read(reference, 16, memory)?;
        Ok(if kind == wrapper { word(&bytes, 8) } else { reference })
    }

    /// Reads a function by its shared description.
    pub(super) fn shared(&self, shared: u64, memory: &dyn Memory) -> Result<CodeFunction, WhyNot> {
        let bytes = self.read_as(shared, self.layout.types.shared, SHARED_BYTES, memory)?;
        self.kept_or(shared, bytes, memory, |bytes| self.texts(bytes, memory).map(|(text, _)| text))
    }

    /// Returns the texts of an object that was read before and has not changed, or reads them.
    fn kept_or(
        &self,
        object: u64,
        bytes: Vec<u8>,
        memory: &dyn Memory,
        read: impl Fn(&[u8]) -> Result<FunctionText, WhyNot>,
    ) -> Result<CodeFunction, WhyNot> {
        let kept = self.kept.lock().functions.get(&object).filter(|(words, _)| *words == bytes).cloned();
        if let Some((_, text)) = kept {
            return Ok(CodeFunction { text, instructions: 0..0 });
        }
        if !self.layout.version.needs_proof {
            // What has moved meanwhile shows in the counts of its heap. Functions that are kept cost no reading of them.
            let _ = self.moves.enter(object, memory);
        }
        let text = self.moves.read_steadily(memory, || read(&bytes))?;
        let mut kept = self.kept.lock();
        if kept.functions.len() >= MAX_FUNCTIONS {
            kept.functions.clear();
        }
        kept.functions.insert(object, (bytes, text.clone()));
        Ok(CodeFunction { text, instructions: 0..0 })
    }

    /// Returns the texts of a function, whose positions are lines.
    fn texts(&self, shared: &[u8], memory: &dyn Memory) -> Result<(FunctionText, Arc<Script>), WhyNot> {
        let of = &self.layout;
        let (name, start) = self.name(word(shared, of.version.name_or_scope as usize), memory)?;
        let script = self.script(word(shared, of.version.script as usize), memory)?;
        let first_line = start.map_or(0, |start| script.line(start));
        Ok((FunctionText { name, file: script.file.clone(), first_line, lines: lines::plain() }, script))
    }

    /// Reads a function by its bytecode. `function` is the function's object of a frame, or another object that has come into
    /// its place since.
    pub(super) fn interpreted(
        &self,
        bytecode: u64,
        function: u64,
        memory: &dyn Memory,
    ) -> Result<CodeFunction, WhyNot> {
        let of = &self.layout;
        self.enter(bytecode, memory)?;
        let head = self.read_as(bytecode, of.types.bytecode, BYTECODE_BYTES, memory)?;
        let known = self.kept.lock().shared.get(&bytecode).copied();
        let candidates = [known, self.shared_of(function, memory).ok()];
        let check = |shared: u64| {
            let bytes = self.read_as(shared, of.types.shared, SHARED_BYTES, memory).ok()?;
            let data = word(&bytes, of.version.function_data as usize);
            (self.bytecode_of(data, memory).ok()? == bytecode).then_some((shared, bytes))
        };
        let found = candidates.into_iter().flatten().find_map(check);
        let found = found.or_else(|| check(self.search(bytecode, memory)?));
        let (shared, bytes) =
            found.ok_or(WhyNot::Implausible("the function of a frame has moved or has other bytecode"))?;
        {
            let mut kept = self.kept.lock();
            if kept.shared.len() >= MAX_FUNCTIONS {
                kept.shared.clear();
            }
            kept.shared.insert(bytecode, shared);
        }
        let words = [head.as_slice(), &bytes].concat();
        self.kept_or(bytecode, words, memory, |_| {
            let (mut text, script) = self.texts(&bytes, memory)?;
            let table = word(&head, of.version.bytecode_positions as usize);
            // Tables that no stack trace has asked for are not there.
            let positions = self.table(table, memory).map(|table| lines::positions(&table, of.version.steps));
            let entries = positions.unwrap_or_default().into_iter();
            text.lines =
                lines::table(entries.filter_map(|(at, position)| Some((at, script.line(position.offset?)))));
            Ok(text)
        })
    }

    /// Searches the scripts that are known for the function with this bytecode: descriptions and bytecode stay where they are, when
    /// the function's object has moved. Returns the shared description.
    fn search(&self, bytecode: u64, memory: &dyn Memory) -> Option<u64> {
        let scripts: Vec<u64> = {
            let mut kept = self.kept.lock();
            if kept.searched.len() >= MAX_FUNCTIONS {
                kept.searched.clear();
            }
            let searches = kept.searched.entry(bytecode).or_default();
            *searches += 1;
            if *searches > MAX_SEARCHES {
                return None;
            }
            kept.scripts.keys().copied().collect()
        };
        let of = &self.layout;
        let mut left = MAX_SEARCHED;
        for script in scripts {
            let Some(functions) = object(script)
                .and_then(|at| memory.u64(at.wrapping_add(of.version.script_functions)).ok())
                .and_then(object)
            else {
                continue;
            };
            let length = memory.u64(functions.wrapping_add(8)).ok().and_then(small);
            let length = length.and_then(|length| u64::try_from(length).ok()).unwrap_or(0).min(MAX_OF_SCRIPT);
            let Ok(all) = memory.bytes(functions.wrapping_add(of.elements), 8 * length as usize) else {
                continue;
            };
            let references = all.as_chunks().0.iter().map(|eight| u64::from_ne_bytes(*eight) & !2);
            for shared in references.filter(|reference| object(*reference).is_some()) {
                left = left.checked_sub(1)?;
                let data = memory.u64((shared - 1).wrapping_add(of.version.function_data)).ok();
                let leads = |data: u64| data == bytecode || self.bytecode_of(data, memory) == Ok(bytecode);
                if data.is_some_and(leads) {
                    return Some(shared);
                }
            }
        }
        None
    }

    /// Returns the shared description of a function's object.
    fn shared_of(&self, function: u64, memory: &dyn Memory) -> Result<u64, WhyNot> {
        let of = &self.layout;
        let (kind, bytes) = self.read(function, of.shared as usize + 8, memory)?;
        // Functions of several kinds have neighbouring numbers.
        if !(of.types.function..of.types.function.saturating_add(24)).contains(&kind) {
            return Err(WhyNot::Implausible("no function"));
        }
        Ok(word(&bytes, of.shared as usize))
    }

    /// Returns the bytecode that the data of a function leads to.
    pub(super) fn bytecode_of(&self, data: u64, memory: &dyn Memory) -> Result<u64, WhyNot> {
        let of = &self.layout;
        let mut at = data;
        // Compiled code, a pair of bytecode and entry, bytecode.
        for _ in 0..3 {
            let (kind, bytes) = self.read(at, 24, memory)?;
            at = match kind {
                kind if kind == of.types.bytecode => return Ok(at),
                kind if kind == of.types.interpreter_data => word(&bytes, 8),
                kind if kind == of.types.code => word(&bytes, of.version.code.data as usize),
                _ => return Err(WhyNot::Implausible("a function without bytecode")),
            };
        }
        Err(WhyNot::Implausible("a function without bytecode"))
    }
}

/// A string whose head is read.
struct OpenString {
    kind: u16,
    /// Bytes of a character.
    width: u64,
    length: u64,
    words: [u64; 2],
    /// Address of the characters.
    chars: u64,
}

/// Finds the ends of lines: each line feed, each carriage return without one, and the two separators of Unicode.
fn read_ends(string: &OpenString, memory: &dyn Memory) -> Result<Vec<u32>, WhyNot> {
    let bytes = string.length * string.width;
    if bytes > MAX_SOURCE {
        return Err(WhyNot::TooLarge);
    }
    let mut ends = Vec::new();
    let mut was_return = false;
    for at in (0..bytes).step_by(SOURCE_PIECE as usize) {
        let piece = memory.bytes(string.chars.wrapping_add(at), (bytes - at).min(SOURCE_PIECE) as usize)?;
        let first = (at / string.width) as u32;
        let mut add = |index: usize, unit: u16| {
            let here = first + index as u32;
            if was_return && unit != 0x0a {
                ends.push(here - 1);
            }
            was_return = unit == 0x0d;
            if matches!(unit, 0x0a | 0x2028 | 0x2029) {
                ends.push(here);
            }
        };
        if string.width == 1 {
            piece.iter().enumerate().for_each(|(index, byte)| add(index, u16::from(*byte)));
        } else {
            let units = piece.as_chunks().0.iter().map(|two| u16::from_le_bytes(*two));
            units.enumerate().for_each(|(index, unit)| add(index, unit));
        }
    }
    ends.push((bytes / string.width) as u32);
    Ok(ends)
}
