//! Tests of the code of a process whose reader answers what a test sets.

use std::sync::atomic::AtomicU64;

use gannet_unwind::generated::SENDER_FRAME;

use super::*;
use crate::runtimes::{
    Captured, Detected, RuntimeFile, Unloads,
    hostile::{Hostile, HostileThread, named},
    python,
};

const START: u64 = 0x1000;
const CODE_BYTES: u64 = 0x100;

/// A block in each range of [`CODE_BYTES`], whose identity and number of rows the test sets.
#[derive(Debug, Default)]
struct Reader {
    identity: AtomicU64,
    rows: AtomicU64,
    is_gone: AtomicU64,
    unloaded: AtomicU64,
    replaced: AtomicU64,
    freed: AtomicU64,
    /// 1: frames name their function themselves, by the word behind the one that the frame pointer leads to.
    is_captured: AtomicU64,
    /// Growth of the identity when the next block is looked for.
    grows_next: AtomicU64,
}

impl Reader {
    fn alive(&self) -> Result<(), WhyNot> {
        if self.is_gone.load(Ordering::Relaxed) == 0 { Ok(()) } else { Err(WhyNot::Unreadable) }
    }
}

impl CodeReader for Arc<Reader> {
    fn ranges(&self, _: &dyn Memory) -> Result<Vec<Range<u64>>, WhyNot> {
        self.alive().map(|()| std::iter::once(START..1 << 40).collect())
    }

    fn unloads(&self, _: &dyn Memory) -> Unloads {
        Unloads::Count(self.unloaded.load(Ordering::Relaxed))
    }

    fn replacements(&self, _: &dyn Memory) -> Replacements {
        let [replaced, freed] = [&self.replaced, &self.freed].map(|count| count.load(Ordering::Relaxed));
        Replacements { replaced: Unloads::Count(replaced), freed: Unloads::Count(freed) }
    }

    fn find(&self, address: u64, _: &dyn Memory) -> Result<Option<BlockHead>, WhyNot> {
        self.alive()?;
        self.identity.fetch_add(self.grows_next.swap(0, Ordering::Relaxed), Ordering::Relaxed);
        let at = address / CODE_BYTES * CODE_BYTES;
        let identity = [self.identity.load(Ordering::Relaxed), 0, 0, 0];
        Ok(Some(BlockHead { at, code: at..at + CODE_BYTES, identity, epoch: 0, name: String::new() }))
    }

    fn read(&self, head: &BlockHead, _: &dyn Memory) -> Result<CodeBlock, WhyNot> {
        let captured = Captured { function: 8, position: 16, entries: Vec::new() };
        let captured = (self.is_captured.load(Ordering::Relaxed) == 1).then_some(captured);
        let rows = 0..self.rows.load(Ordering::Relaxed);
        let rule = if captured.is_some() { SENDER_FRAME } else { UnwindRule::X86_64_ENTRY };
        let rows = rows.map(|row| (head.code.start + row, rule)).collect();
        Ok(CodeBlock { rows, captured, ..CodeBlock::default() })
    }

    fn scope(&self, head: &BlockHead, _: u64, _: &dyn Memory) -> Result<Scope, WhyNot> {
        Ok(Scope { over: head.code.start..head.code.end - 1, functions: vec![(head.at, 3)] })
    }

    fn function(&self, object: u64, _: u64, _: &dyn Memory) -> Result<CodeFunction, WhyNot> {
        let name = format!("f{object:x}_{}", self.identity.load(Ordering::Relaxed));
        Ok(CodeFunction { text: FunctionText { name, ..FunctionText::default() }, instructions: 0..0 })
    }
}

struct NoMemory;

impl Memory for NoMemory {
    fn read(&self, _: u64, _: &mut [u8]) -> bool {
        false
    }
}

fn start(rows: u64) -> (Arc<Reader>, Interpreter) {
    let reader = Arc::new(Reader { rows: rows.into(), ..Reader::default() });
    let detected =
        Detected { version: (3, 11), version_text: String::new(), addresses: Vec::new(), layout: 0 };
    let file = Arc::new(RuntimeFile { runtime: &python::Python, detected });
    let code = GeneratedCode::new(Arc::new(Arc::clone(&reader)));
    (reader, Interpreter::new(file, 0).with_code(code))
}

fn read(interpreter: &Interpreter, addresses: impl IntoIterator<Item = u64>) -> Result<(), WhyNot> {
    let needs = CodeNeeds { addresses: addresses.into_iter().collect(), ..CodeNeeds::default() };
    interpreter.code.as_ref().unwrap().read(&needs, interpreter, &NoMemory)
}

/// Returns the name of the function at an address.
fn name(interpreter: &Interpreter, address: u64) -> Option<String> {
    let known = interpreter.code.as_ref().unwrap().known.lock();
    let (number, _) = *known.block(address)?.scope(address)?.functions.first()?;
    let function = interpreter.function(number)?;
    Some(function.texts()?.name.clone())
}

#[test]
fn a_block_that_another_has_replaced_gets_its_names() {
    let (reader, interpreter) = start(1);
    read(&interpreter, [START + 8, START + 16]).unwrap();
    assert_eq!(name(&interpreter, START + 8).unwrap(), "f1000_0");
    reader.identity.store(7, Ordering::Relaxed);
    read(&interpreter, [START + 8]).unwrap();
    assert_eq!(name(&interpreter, START + 8).unwrap(), "f1000_7");
    // The first function keeps its number: samples have it.
    assert_eq!(interpreter.function(0).unwrap().texts().unwrap().name, "f1000_0");
}

/// Checks that code of a new class has its function if the request has read another one at the same place before.
#[test]
fn code_has_the_function_that_took_the_place_of_one() {
    let (reader, interpreter) = start(1);
    let needs = CodeNeeds {
        addresses: std::iter::once(START + 8).collect(),
        functions: std::iter::once((START, 0)).collect(),
        ..CodeNeeds::default()
    };
    let code = interpreter.code.as_ref().unwrap();
    code.read(&needs, &interpreter, &NoMemory).unwrap();
    assert_eq!(name(&interpreter, START + 8).unwrap(), "f1000_0");
    // The request reads the function first, whose class was unloaded before. Then a new class is loaded there, and compiled.
    reader.grows_next.store(1, Ordering::Relaxed);
    code.read(&needs, &interpreter, &NoMemory).unwrap();
    let sample = boot_time_ns();
    code.read(&needs, &interpreter, &NoMemory).unwrap();
    assert_eq!(name_at(&interpreter, START + 8, sample), (Some("f1000_1".into()), 0));
}

/// Returns the name of the function at an address of a sample that was taken at a time, and the number of unproven frames.
fn name_at(interpreter: &Interpreter, address: u64, time_ns: u64) -> (Option<String>, u32) {
    let thread = HostileThread::at(address, time_ns, &NoMemory);
    let (frames, unproven) = thread.unwind_proven(interpreter.code.as_ref().unwrap());
    (named(&frames, interpreter).pop().map(|(name, _, _)| name), unproven)
}

#[test]
fn a_block_seen_first_behind_an_unloading_has_no_name() {
    let (reader, interpreter) = start(1);
    let (known, new) = (START + 8, START + CODE_BYTES + 8);
    read(&interpreter, [known]).unwrap();
    let sample = boot_time_ns();
    reader.unloaded.store(1, Ordering::Relaxed);
    assert_eq!(name_at(&interpreter, known, sample), (None, 1), "not read behind the sample");
    read(&interpreter, [known, new]).unwrap();
    assert_eq!(name_at(&interpreter, known, sample), (Some("f1000_0".into()), 0), "it was there before");
    assert_eq!(name_at(&interpreter, new, sample), (None, 1));
    let next = boot_time_ns();
    read(&interpreter, [known, new]).unwrap();
    assert_eq!(name_at(&interpreter, new, next), (Some("f1100_0".into()), 0));
    // The later reading changes nothing for the first sample.
    assert_eq!(name_at(&interpreter, new, sample), (None, 1));
}

/// Checks that a stale return address shows no name: the way to it led through a block that is not proven.
#[test]
fn callers_of_a_block_that_is_not_proven_have_no_name() {
    let (reader, interpreter) = start(1);
    let (known, new) = (START + 8, START + CODE_BYTES + 8);
    read(&interpreter, [known]).unwrap();
    let sample = boot_time_ns();
    reader.unloaded.store(1, Ordering::Relaxed);
    read(&interpreter, [known, new]).unwrap();
    // Each word of the stack is a return address into the known block.
    let word = known.to_ne_bytes();
    let names = |pc| {
        let thread = HostileThread::at(pc, sample, &Hostile::new(&word, None));
        let (frames, unproven) = thread.unwind_proven(interpreter.code.as_ref().unwrap());
        (frames.len(), named(&frames, &interpreter).len(), unproven as usize)
    };
    let (frames, names_of_known, unproven) = names(known);
    assert!(frames > 10 && names_of_known == frames && unproven == 0, "{names_of_known} of {frames}");
    assert_eq!(names(new), (frames, 0, frames));
}

/// Checks frames that name their function themselves, as those of an interpreter do.
#[test]
fn a_function_that_was_replaced_may_have_been_another() {
    let (reader, interpreter) = start(9);
    reader.is_captured.store(1, Ordering::Relaxed);
    let (here, counts) = (START + 8, [&reader.replaced, &reader.freed, &reader.identity]);
    let set = |values: [u64; 3]| {
        counts.iter().zip(values).for_each(|(count, value)| count.store(value, Ordering::Relaxed));
    };
    let read_all = || {
        let functions = std::iter::once((here, 0)).collect();
        let needs = CodeNeeds { addresses: [here].into(), functions, ..CodeNeeds::default() };
        interpreter.code.as_ref().unwrap().read(&needs, &interpreter, &NoMemory).unwrap();
    };
    // Each word of the stack is the function, and a return address.
    let name_at = |time_ns| {
        let thread = HostileThread::at(here, time_ns, &Hostile::new(&here.to_ne_bytes(), None));
        let (frames, _) = thread.unwind_proven(interpreter.code.as_ref().unwrap());
        named(&frames, &interpreter).first().map(|(name, _, _)| name.clone())
    };
    let first = boot_time_ns();
    set([2, 30, 0]);
    read_all();
    assert_eq!(name_at(first), None, "no count from before the sample");
    let second = boot_time_ns();
    read_all();
    assert_eq!(name_at(second), Some("f1008_0".into()));
    // Nothing is replaced, but what was replaced before may be freed: a known function stays.
    let third = boot_time_ns();
    set([2, 31, 0]);
    read_all();
    assert_eq!(name_at(third), Some("f1008_0".into()));
    // A replaced function may leave its place to another one, and come back.
    let fourth = boot_time_ns();
    set([3, 32, 0]);
    read_all();
    assert_eq!(name_at(fourth), None);
    // Another function, seen first behind the sample.
    let fifth = boot_time_ns();
    set([3, 33, 1]);
    read_all();
    assert_eq!(name_at(fifth), None);
    let sixth = boot_time_ns();
    read_all();
    assert_eq!(name_at(sixth), Some("f1008_1".into()));
}

#[test]
fn a_process_that_unloads_nothing_has_names_at_once() {
    let (reader, interpreter) = start(1);
    let sample = boot_time_ns();
    read(&interpreter, [START + 8]).unwrap();
    assert_eq!(name_at(&interpreter, START + 8, sample), (Some("f1000_0".into()), 0));
    // Unloading behind the reading takes nothing back.
    reader.unloaded.store(1, Ordering::Relaxed);
    read(&interpreter, [START + 8]).unwrap();
    assert_eq!(name_at(&interpreter, START + 8, sample), (Some("f1000_0".into()), 0));
}

#[test]
fn a_process_that_has_ended_has_names_if_it_unloaded_nothing() {
    for (unloaded, expected) in [(0, (Some("f1000_0".to_owned()), 0)), (1, (None, 1))] {
        let (reader, interpreter) = start(1);
        read(&interpreter, [START + 8]).unwrap();
        reader.unloaded.store(unloaded, Ordering::Relaxed);
        read(&interpreter, [START + 8]).unwrap();
        (0..MAX_FAILURES).for_each(|_| interpreter.code.as_ref().unwrap().end(true));
        assert_eq!(name_at(&interpreter, START + 8, boot_time_ns()), expected);
    }
}

#[test]
fn what_is_known_of_a_process_outlives_it() {
    let (reader, interpreter) = start(1);
    read(&interpreter, [START]).unwrap();
    reader.is_gone.store(1, Ordering::Relaxed);
    assert_eq!(read(&interpreter, [START, START + CODE_BYTES]), Err(WhyNot::Unreadable));
    assert_eq!(name(&interpreter, START).unwrap(), "f1000_0");
    let code = interpreter.code.as_ref().unwrap();
    for _ in 0..MAX_FAILURES {
        assert!(!code.is_over() && code.begin() && !code.begin());
        code.end(true);
    }
    assert!(code.is_over() && !code.begin());
}

#[test]
fn the_rows_of_a_process_have_a_limit() {
    let (_, interpreter) = start(u64::from(u16::MAX));
    let held = || interpreter.code.as_ref().unwrap().known.lock().rows;
    for block in 0..20 {
        read(&interpreter, [START + block * CODE_BYTES]).unwrap();
        assert!(held() > 0 && held() <= MAX_ROWS + 2, "{} rows", held());
    }
    let known = interpreter.code.as_ref().unwrap().known.lock();
    let counted: usize = known.blocks.values().map(|block| block.rows).sum();
    assert_eq!(counted, known.rows);
    assert!(known.blocks.values().all(|block| block.content.rows.len() <= MAX_BLOCK_ROWS));
    // Twenty blocks, of which seven fit at one time, were read; each kept one row less than the limit, and one as its end.
    let cut = |limit| known.cuts.of(limit);
    assert_eq!(cut(CutLimit::Blocks), 20 - known.blocks.len() as u64);
    assert_eq!(cut(CutLimit::BlockRows), 20 * (u64::from(u16::MAX) - (MAX_BLOCK_ROWS as u64 - 1)));
    drop(known);
    // Other tests may hold rows too.
    let (all, own) = (ALL_ROWS.load(Ordering::Relaxed), held());
    assert!(all >= own);
}

#[test]
fn forgotten_code_is_counted() {
    let (_, interpreter) = start(1);
    let cut = |limit| interpreter.cuts.of(limit);
    let code = interpreter.code.as_ref().unwrap();
    // As many blocks as there is room for are kept; one more takes the place of all.
    let blocks = |range: Range<usize>| range.map(|block| START + 8 + block as u64 * CODE_BYTES);
    read(&interpreter, blocks(0..MAX_BLOCKS)).unwrap();
    assert_eq!(interpreter.cuts.text(), "");
    assert_eq!(interpreter.cuts.text_to_log(), None);
    read(&interpreter, blocks(MAX_BLOCKS..MAX_BLOCKS + 1)).unwrap();
    assert_eq!(cut(CutLimit::Blocks), MAX_BLOCKS as u64);
    assert_eq!(cut(CutLimit::Functions), 1, "each block is one function");
    let text = "1 frames of functions beyond 16,384 have no name, 16384 blocks of code were forgotten, to be read again";
    assert_eq!(interpreter.cuts.text_to_log().as_deref(), Some(text));
    assert_eq!(interpreter.cuts.text_to_log(), None, "it was logged");
    let mut known = code.known.lock();
    let at = |number: usize| (1 << 50) + number as u64;
    (0..MAX_EMPTY).for_each(|number| known.forget(at(number), 1));
    assert_eq!(cut(CutLimit::Addresses), 0);
    known.forget(at(MAX_EMPTY), 1);
    assert_eq!(cut(CutLimit::Addresses), MAX_EMPTY as u64);
    let head =
        BlockHead { at: START, code: START..START + 8, identity: [0; 4], epoch: 0, name: String::new() };
    let (content, scopes) = (Arc::new(CodeBlock::default()), BTreeMap::new());
    let rows = MAX_ALL_ROWS + 1;
    let block = Block { head, content, scopes, name: None, rows, first_ns: [0; 2], read_ns: 0, before: None };
    assert!(!known.enter(block));
    assert_eq!(cut(CutLimit::AllRows), 1);
    drop(known);
    // Half of the functions have names, and stay.
    let function = |object: usize| {
        let text = FunctionText { name: object.to_string(), ..FunctionText::default() };
        code.enter_function(at(object), Ok(text), 0..0, 1, &interpreter)
    };
    (MAX_BLOCKS + 1..MAX_FUNCTIONS).for_each(|object| assert_eq!(function(object), NO_FUNCTION));
    assert_eq!(cut(CutLimit::Nameless), 0);
    function(MAX_FUNCTIONS);
    assert_eq!(cut(CutLimit::Nameless), (MAX_FUNCTIONS - functions::MAX_FUNCTIONS) as u64);
}

#[test]
fn needs_beyond_the_limit_are_counted_once() {
    let needs = |range: Range<u64>| CodeNeeds {
        addresses: range.clone().collect(),
        functions: range.map(|object| (object, 0)).collect(),
        left_out: 0,
    };
    let max = MAX_NEEDS as u64;
    let mut all = needs(0..10);
    all.add(needs(0..max));
    assert_eq!((all.addresses.len(), all.functions.len(), all.left_out), (MAX_NEEDS, MAX_NEEDS, 0));
    // Those that are there already are no loss.
    all.add(needs(10..max + 3));
    assert_eq!((all.addresses.len(), all.functions.len(), all.left_out), (MAX_NEEDS, MAX_NEEDS, 6));
    let (_, interpreter) = start(1);
    interpreter.code.as_ref().unwrap().read(&all, &interpreter, &NoMemory).unwrap();
    assert_eq!(interpreter.cuts.of(CutLimit::Needs), 6);
}
