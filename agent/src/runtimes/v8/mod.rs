//! V8, the engine of Node.js. The program describes its objects by symbols for debuggers (`v8dbg_`); what they do not say is in a
//! table by version.
//!
//! All code of V8 keeps frame pointers. Frames of the interpreter name their function themselves: the function's object, and the
//! array of its bytecode, which only a full collection moves. Only if the one leads to the other there is a name. Compiled code lies
//! behind a description, which says what was inlined. In versions that need a proof a frame has a name only if no full collection
//! has begun between the sample and the reading behind it, or one alone that has left the name as it was.

mod code;
pub(super) mod fuzz;
mod heap;
mod layout;
mod lines;
mod moves;

use std::{ops::Range, sync::Arc};

use gannet_elf::Elf;

use self::{
    code::{Builtin, Isolates},
    layout::{Layout, SYMBOLS},
};
use super::{
    Attachment, Detected, FunctionText, Lack, Memory, Runtime, RuntimeFile, WhyNot, makes_code,
    memory::Limited, numbers_of,
};

/// The file that has the engine in it.
pub(super) const FILE: &str = "node";
/// Symbol tables larger than this are not read.
const MAX_SYMBOL_BYTES: u64 = 8 << 20;
/// Builtins of one engine; it has some 2,000.
const MAX_BUILTINS: usize = 8192;
/// Bytes of constants in which the version is searched, and of one piece of them.
const MAX_CONSTANTS: u64 = 128 << 20;
const PIECE: u64 = 1 << 20;
const MAX_BUILTIN_NAME: usize = 256;
const BUILTIN: &[u8] = b"Builtins_";
/// Builtins whose frames are those of interpreted functions begin with these.
const INTERPRETERS: [&[u8]; 2] = [b"Builtins_InterpreterEntryTrampoline", b"Builtins_InterpreterEnterAt"];
/// The text before the version.
const BEFORE_VERSION: &[u8] = b"/download/release/v";
const MAX_VERSION: usize = 24;
/// Releases with Maglev, an intermediate compiler, that make no table of positions for its code: major numbers, and the first minor
/// number of the releases that make one, or have no Maglev. `node --print-maglev-code` shows the table.
const WITHOUT_POSITIONS: [(u8, u8); 2] = [(22, 9), (24, 20)];
const NO_POSITIONS: Lack = Lack {
    what: "have no lines if Maglev compiled them, and hide those inlined into them",
    cure: "use a newer release of this version of Node, or start it with --no-maglev",
};
const MAX_READS: usize = 1000;
const MAX_READ_BYTES: usize = 64 << 10;

/// The runtime of JavaScript.
#[derive(Debug)]
pub(super) struct V8;

impl Runtime for V8 {
    fn name(&self) -> &'static str {
        "node"
    }

    fn mapping(&self) -> &'static str {
        "[v8]"
    }

    fn detect(&self, elf: &Elf<'_>, path: &str) -> Option<Detected> {
        if !makes_code(path) {
            return None;
        }
        let mut addresses = vec![0; SYMBOLS.len()];
        let mut sizes = 0;
        find(elf, b".dynsym", &mut addresses, &mut sizes);
        if addresses[0] == 0 {
            return None;
        }
        // Some versions do not export all of them.
        find(elf, b".symtab", &mut addresses, &mut sizes);
        addresses.push(sizes);
        addresses.extend(
            builtins(elf).into_iter().flat_map(|builtin| {
                [builtin.code.start, builtin.code.end, u64::from(builtin.is_interpreter)]
            }),
        );
        let version_text = version(elf).unwrap_or_default();
        Some(Detected { version: numbers_of(&version_text), version_text, addresses, layout: 0 })
    }

    fn code(&self, detected: &Detected) -> Range<u64> {
        // Asked for each frame, so it collects nothing.
        match (builtin_words(detected).first(), builtin_words(detected).last()) {
            (Some([start, ..]), Some([_, end, _])) => *start..*end,
            _ => 0..0,
        }
    }

    fn attach(&self, file: &RuntimeFile, bias: u64, memory: &dyn Memory) -> Result<Attachment, WhyNot> {
        let memory: &dyn Memory = &Limited::new(memory, MAX_READS, MAX_READ_BYTES);
        let layout = Layout::read(&file.detected.addresses, bias, memory)?;
        let builtins = of_file(&file.detected, bias);
        if builtins.is_empty() {
            return Err(WhyNot::Implausible("no symbols of builtins"));
        }
        Ok(Attachment::Code(Arc::new(Isolates::new(layout, builtins))))
    }

    fn lack(&self, detected: &Detected) -> Option<&'static Lack> {
        let (major, minor) = detected.version;
        let lacks = WITHOUT_POSITIONS.iter().any(|(of, end)| major == *of && minor < *end);
        lacks.then_some(&NO_POSITIONS)
    }

    fn line(&self, _: &RuntimeFile, function: &FunctionText, position: u32) -> u32 {
        lines::line_at(&function.lines, position)
    }
}

/// Finds those symbols in a table of a file that are not known yet, and the bytes of the table of bytecodes.
fn find(elf: &Elf<'_>, table: &[u8], addresses: &mut [u64], sizes: &mut u64) {
    let Some(symbols) = elf.symbols(table).filter(|table| table.bytes() <= MAX_SYMBOL_BYTES) else { return };
    let longest = SYMBOLS.iter().map(|name| name.len()).max().unwrap_or(0);
    for symbol in symbols.iter().map_while(Result::ok).filter(|symbol| symbol.is_defined) {
        if !addresses.contains(&0) {
            return;
        }
        let Some(name) = symbols.name(&symbol, longest + 1) else { continue };
        let known = SYMBOLS.iter().position(|known| known.as_bytes() == name.as_slice());
        if let Some(number) = known.filter(|number| addresses[*number] == 0) {
            addresses[number] = symbol.address;
            if number == layout::BYTECODE_SIZES {
                *sizes = symbol.size;
            }
        }
    }
}

/// Returns begin, end and whether it is an interpreter of each builtin of a file.
fn builtin_words(detected: &Detected) -> &[[u64; 3]] {
    detected.addresses.get(SYMBOLS.len() + 1..).unwrap_or_default().as_chunks().0
}

/// Returns the builtins of a file, at their addresses in a process.
fn of_file(detected: &Detected, bias: u64) -> Vec<Builtin> {
    builtin_words(detected)
        .iter()
        .map(|[start, end, is_interpreter]| Builtin {
            code: start.wrapping_add(bias)..end.wrapping_add(bias),
            is_interpreter: *is_interpreter != 0,
        })
        .collect()
}

/// Finds the builtins, in the order of their addresses.
fn builtins(elf: &Elf<'_>) -> Vec<Builtin> {
    let Some(symbols) = elf.symbols(b".symtab").filter(|table| table.bytes() <= MAX_SYMBOL_BYTES) else {
        return Vec::new();
    };
    let mut found: Vec<Builtin> = symbols
        .iter()
        .map_while(Result::ok)
        .filter(|symbol| symbol.is_defined && symbol.is_function && symbol.size > 0)
        .filter_map(|symbol| {
            let name = symbols.name(&symbol, MAX_BUILTIN_NAME)?;
            let is_interpreter = INTERPRETERS.iter().any(|begin| name.starts_with(begin));
            let end = symbol.address.checked_add(symbol.size)?;
            name.starts_with(BUILTIN).then_some(Builtin { code: symbol.address..end, is_interpreter })
        })
        .take(MAX_BUILTINS)
        .collect();
    found.sort_unstable_by_key(|builtin| builtin.code.start);
    found.dedup_by_key(|builtin| builtin.code.start);
    found
}

/// Finds the version: `20.20.2` of `https://nodejs.org/download/release/v20.20.2/`.
fn version(elf: &Elf<'_>) -> Option<String> {
    let constants = elf.section(b".rodata")?;
    let (start, bytes) = (constants.vaddr, constants.bytes.min(MAX_CONSTANTS));
    let mut at = 0;
    while at < bytes {
        let piece = elf.bytes_at(start.checked_add(at)?, PIECE)?;
        let found = memchr::memmem::find_iter(&piece, BEFORE_VERSION).find_map(|begin| {
            let text = &piece[begin + BEFORE_VERSION.len()..];
            let text = &text[..text.iter().take(MAX_VERSION).position(|byte| *byte == b'/')?];
            let is_version = text.iter().all(|byte| byte.is_ascii_digit() || *byte == b'.');
            is_version.then(|| String::from_utf8_lossy(text).into_owned())
        });
        if found.is_some() {
            return found;
        }
        at += PIECE - (BEFORE_VERSION.len() + MAX_VERSION) as u64;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_without_positions_of_maglev_say_so() {
        let lacks = |text: &str| {
            let version_text = text.to_owned();
            let detected =
                Detected { version: numbers_of(text), version_text, addresses: Vec::new(), layout: 0 };
            V8.lack(&detected).is_some()
        };
        for (version, wanted) in [
            ("18.20.8", false),
            ("20.20.2", false),
            ("22.8.0", true),
            ("22.9.0", false),
            ("24.0.0", true),
            ("24.19.0", true),
            ("24.20.0", false),
            ("26.0.0", false),
        ] {
            assert_eq!(lacks(version), wanted, "{version}");
        }
    }
}
