//! HotSpot, the virtual machine of OpenJDK. Its library describes its own structures for debuggers, so that one reader serves all
//! its versions.
//!
//! Java code runs in the interpreter, whose frames name their method themselves, and in compiled methods, each with a frame of
//! one size and tables of the methods that were inlined.

mod counts;
pub(super) mod fuzz;
mod heap;
mod layout;
mod method;
mod numbers;
mod perf_data;
mod structs;

use std::sync::Arc;

use gannet_elf::Elf;

use self::{
    counts::{Counts, LOCAL_SYMBOLS},
    heap::Heaps,
    layout::Layout,
    structs::{SYMBOLS, Structs},
};
use super::{
    Attachment, CodeReader as _, Detected, FunctionText, Memory, NO_POSITION, Runtime, RuntimeFile, WhyNot,
    makes_code, memory::Limited, numbers_of,
};

/// The file that is the virtual machine.
pub(super) const FILE: &str = "libjvm.so";
/// Symbol tables larger than this are not read.
const MAX_SYMBOL_BYTES: u64 = 4 << 20;
/// Bytes of constants in which the version is searched.
const MAX_CONSTANTS: u64 = 64 << 20;
/// The text of its version is between these.
const BEFORE_VERSION: &[u8] = b" VM (";
const BEHIND_VERSION: &[u8] = b") for linux-";
const MAX_VERSION: usize = 64;
/// Reads and bytes of the description of its structures. A real one has some 3,000 entries, of two names each.
const MAX_READS: usize = 60_000;
const MAX_READ_BYTES: usize = 8 << 20;

/// The runtime of Java, from 11 on.
#[derive(Debug)]
pub(super) struct HotSpot;

impl Runtime for HotSpot {
    fn name(&self) -> &'static str {
        "java"
    }

    fn mapping(&self) -> &'static str {
        "[jvm]"
    }

    fn detect(&self, elf: &Elf<'_>, path: &str) -> Option<Detected> {
        if !makes_code(path) {
            return None;
        }
        let symbols = elf.symbols(b".dynsym").filter(|table| table.bytes() <= MAX_SYMBOL_BYTES)?;
        let mut addresses = symbols.addresses_of(&SYMBOLS).into_iter().collect::<Option<Vec<u64>>>()?;
        let local = elf.symbols(b".symtab").filter(|table| table.bytes() <= MAX_SYMBOL_BYTES);
        let local = local.map_or([None; 2], |symbols| symbols.addresses_of(&LOCAL_SYMBOLS));
        addresses.extend(local.map(Option::unwrap_or_default));
        let version_text = version(elf).unwrap_or_default();
        Some(Detected { version: numbers_of(&version_text), version_text, addresses, layout: 0 })
    }

    fn attach(&self, file: &RuntimeFile, bias: u64, memory: &dyn Memory) -> Result<Attachment, WhyNot> {
        let (major, _) = file.detected.version;
        if !cfg!(target_arch = "x86_64") || !matches!(major, 11..=22 | 25) {
            return Err(WhyNot::Version);
        }
        let memory: &dyn Memory = &Limited::new(memory, MAX_READS, MAX_READ_BYTES);
        let symbol =
            |number: usize| file.detected.addresses.get(number).map_or(0, |at| at.wrapping_add(bias));
        let structs = Structs::read(symbol, memory)?;
        if structs.constant("frame::interpreter_frame_sender_sp_offset") != Some(-1) {
            return Err(WhyNot::Implausible("frames of another shape"));
        }
        let local = [0, 1].map(|number| {
            let at = file.detected.addresses.get(SYMBOLS.len() + number).filter(|at| **at != 0)?;
            Some(at.wrapping_add(bias))
        });
        let counts = Counts::new(&structs, local, memory);
        let heaps = Heaps::new(Layout::new(&structs, major)?, counts);
        heaps.ranges(memory)?;
        Ok(Attachment::Code(Arc::new(heaps)))
    }

    fn line(&self, _: &RuntimeFile, function: &FunctionText, position: u32) -> u32 {
        if position == NO_POSITION { 0 } else { method::line_at(&function.lines, position) }
    }
}

/// Finds the version: `17.0.15` of `OpenJDK 64-Bit Server VM (17.0.15+6-Debian-1deb12u1) for linux-amd64`.
fn version(elf: &Elf<'_>) -> Option<String> {
    let constants = elf.section_data_within(elf.section(b".rodata")?, MAX_CONSTANTS).ok()?;
    constants
        .windows(BEHIND_VERSION.len())
        .enumerate()
        .filter(|(_, window)| *window == BEHIND_VERSION)
        .find_map(|(end, _)| {
            let text = &constants[end.saturating_sub(MAX_VERSION)..end];
            let before = text.windows(BEFORE_VERSION.len()).rposition(|window| window == BEFORE_VERSION)?;
            let version = text[before + BEFORE_VERSION.len()..].iter().copied();
            let digits = version.take_while(|byte| byte.is_ascii_digit() || *byte == b'.').collect();
            String::from_utf8(digits).ok().filter(|text| !text.is_empty())
        })
}
