//! Code that a process makes at run time, as far as the agent has read it: the rules of its frames, and the functions that they
//! stand for.
//!
//! Such code comes and goes. So whatever a stack needs is read behind the sample, and read again behind each later sample that
//! needs it. A block that was known before the sample, and is the same block behind it, was it at the time of the sample. Of a
//! block that is read for the first time this is not proven: it may have taken the place of another one within milliseconds.
//!
//! The same holds for functions. A virtual machine counts the classes that it unloads. If its count is the same before a sample and
//! behind the reading ([`UnloadHistory`]), no address has got another meaning in between. If not, only code and functions that were
//! known before the sample, and are the same behind it, still have names.

mod walk;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt::Debug,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    mem,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use gannet_unwind::format::UnwindRule;
use parking_lot::Mutex;

pub(crate) use self::walk::{CodeWalk, WalkedCode};
use super::{
    BlockHead, CodeBlock, CodeFunction, CodeReader, FunctionText, Interpreter, Memory, Scope, WhyNot,
    cuts::{CutLimit, Cuts},
    functions,
    memory::Limited,
    unloads::UnloadHistory,
};
use crate::model::boot_time_ns;

/// Addresses and functions of one request.
const MAX_NEEDS: usize = 2048;
/// Blocks of one process.
const MAX_BLOCKS: usize = 16_384;
/// Addresses without code, of one process.
const MAX_EMPTY: usize = 4096;
/// Functions of one process: twice as many as get a name. Beyond, the agent forgets those without.
const MAX_FUNCTIONS: usize = 2 * functions::MAX_FUNCTIONS;
/// Requests whose times are kept of a function: a sample may be unwound after later ones.
const MAX_CONFIRMED: usize = 4;
/// The number of functions without a name.
const NO_FUNCTION: u64 = functions::NO_FUNCTION as u64;
/// Rows of one block; the rest of a larger one has no rule.
const MAX_BLOCK_ROWS: usize = 32_768;
/// Rows and functions at addresses, of one process and of all: some 24 bytes each.
const MAX_ROWS: usize = 256 << 10;
const MAX_ALL_ROWS: usize = 1 << 20;
/// Reads and bytes of one request. The next one goes on.
const MAX_READS: usize = 100_000;
const MAX_READ_BYTES: usize = 8 << 20;
/// Requests that fail one after another until the process is given up.
const MAX_FAILURES: u32 = 3;
/// Functions inlined at one address.
pub(super) const MAX_INLINED: usize = 64;
/// The word of a position that is not known.
pub(crate) const NO_POSITION: u32 = u32::MAX;
/// How old the last reading may be if a process has ended since.
const MAX_AGE_NS: u64 = 1_000_000_000;

/// Rows of all processes.
// Not a metric: it holds the memory below a limit.
static ALL_ROWS: AtomicUsize = AtomicUsize::new(0);

/// The code that one process makes at run time.
#[derive(Debug)]
pub(crate) struct GeneratedCode {
    reader: Arc<dyn CodeReader>,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    ranges: Vec<Range<u64>>,
    /// By the end of their code.
    blocks: BTreeMap<u64, Block>,
    /// Addresses in no block, and when that was.
    empty: HashMap<u64, u64>,
    /// By object, or by the description of a block with a name.
    functions: HashMap<u64, KnownFunction>,
    /// Rows of the blocks, which [`ALL_ROWS`] holds too.
    rows: usize,
    /// The begin of the last request that is over. Of a later one, nothing is proven yet.
    checked_ns: u64,
    unloads: UnloadHistory,
    /// The thread is reading for a request.
    is_reading: bool,
    /// Requests that failed since the last that did not.
    failures: u32,
    cuts: Arc<Cuts>,
}

#[derive(Debug)]
struct Block {
    head: BlockHead,
    content: Arc<CodeBlock>,
    /// By the end of the range, which belongs to it.
    scopes: BTreeMap<u64, KnownScope>,
    /// The number of its name.
    name: Option<u64>,
    /// Rows, and functions of scopes.
    rows: usize,
    /// The request that has read it began at the first of these times, and had read it at the second.
    first_ns: [u64; 2],
    /// When it was read last.
    read_ns: u64,
}

#[derive(Debug)]
struct KnownScope {
    start: u64,
    /// The request that has read it began at the first of these times, and had read it at the second.
    first_ns: [u64; 2],
    /// Number of the function, and position.
    functions: Vec<(u64, u32)>,
}

#[derive(Debug)]
struct KnownFunction {
    number: u64,
    /// Hash of the texts.
    hash: u64,
    instructions: Range<u64>,
    /// Since when it is known as this.
    since_ns: u64,
    /// When requests began that have read it, the newest first; at the end some may be 0.
    read_ns: [u64; MAX_CONFIRMED],
}

/// The blocks that a request has found, by their ends, and the numbers of the functions that it has read behind that. What it read
/// of a function before is not used for a block: the memory may have been free then, and have held what is left of another class.
type Confirmed = HashMap<u64, HashMap<u64, u64>>;

/// Addresses and objects that have to be read before a stack can be unwound.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct CodeNeeds {
    /// Addresses of code.
    pub(crate) addresses: HashSet<u64>,
    /// Objects of functions, and the hint for each.
    pub(crate) functions: HashMap<u64, u64>,
    /// Addresses and functions beyond the limit.
    pub(crate) left_out: u64,
}

impl CodeNeeds {
    /// Reports whether nothing has to be read.
    pub(crate) fn is_empty(&self) -> bool {
        self.addresses.is_empty() && self.functions.is_empty()
    }

    /// Adds other needs, up to the limit.
    pub(crate) fn add(&mut self, other: Self) {
        self.left_out += other.left_out;
        for address in other.addresses {
            if self.addresses.len() < MAX_NEEDS {
                self.addresses.insert(address);
            } else {
                self.left_out += u64::from(!self.addresses.contains(&address));
            }
        }
        for (object, hint) in other.functions {
            if self.functions.len() < MAX_NEEDS {
                self.functions.insert(object, hint);
            } else {
                self.left_out += u64::from(!self.functions.contains_key(&object));
            }
        }
    }
}

impl GeneratedCode {
    pub(crate) fn new(reader: Arc<dyn CodeReader>) -> Self {
        Self { reader, known: Mutex::default() }
    }

    /// Returns the counts of functions and code that are left out or forgotten.
    pub(super) fn cuts(&self) -> Arc<Cuts> {
        Arc::clone(&self.known.lock().cuts)
    }

    /// Returns whether the caller may have the needs read: nothing else is being read, and reading has not failed for good.
    pub(crate) fn begin(&self) -> bool {
        let mut known = self.known.lock();
        !known.is_over() && !mem::replace(&mut known.is_reading, true)
    }

    /// Reading has ended. If it `failed` several times, the process has ended or does not answer.
    pub(crate) fn end(&self, failed: bool) {
        let mut known = self.known.lock();
        known.is_reading = false;
        known.failures = if failed { known.failures.saturating_add(1) } else { 0 };
    }

    /// Reports whether reading has failed for good.
    pub(crate) fn is_over(&self) -> bool {
        self.known.lock().is_over()
    }

    /// Returns the words of a stack that may be return addresses into the code.
    pub(crate) fn candidates(&self, stack: &[u8]) -> CodeNeeds {
        let mut needs = CodeNeeds::default();
        if self.reader.has_frame_pointers() {
            return needs;
        }
        let known = self.known.lock();
        let words = stack.as_chunks().0.iter().map(|eight| u64::from_ne_bytes(*eight));
        let addresses = words.filter(|word| known.ranges.iter().any(|range| range.contains(word)));
        needs.add(CodeNeeds { addresses: addresses.collect(), ..CodeNeeds::default() });
        needs
    }

    /// Reads blocks and functions, and enters them. `of` is the interpreter that this code belongs to. Reads less if that takes too
    /// much, and an error if the process has ended.
    pub(crate) fn read(
        &self,
        needs: &CodeNeeds,
        of: &Interpreter,
        memory: &dyn Memory,
    ) -> Result<(), WhyNot> {
        let now = boot_time_ns();
        of.cuts.count(CutLimit::Needs, needs.left_out);
        self.read_unloads(memory);
        self.read_needs(needs, now, of, &Limited::new(memory, MAX_READS, MAX_READ_BYTES))?;
        self.read_unloads(memory);
        let mut known = self.known.lock();
        known.checked_ns = now;
        known.unloads.end_request(now);
        Ok(())
    }

    fn read_unloads(&self, memory: &dyn Memory) {
        let reading = self.reader.unloads(memory);
        self.known.lock().unloads.enter(reading, boot_time_ns());
    }

    fn read_needs(
        &self,
        needs: &CodeNeeds,
        now: u64,
        of: &Interpreter,
        memory: &Limited<'_>,
    ) -> Result<(), WhyNot> {
        let ranges = self.reader.ranges(memory)?;
        self.known.lock().ranges = ranges;
        let mut confirmed = Confirmed::new();
        let mut failed = Vec::new();
        for (object, hint) in &needs.functions {
            match self.reader.function(*object, *hint, memory) {
                Ok(CodeFunction { text, instructions }) => {
                    self.enter_function(*object, Ok(text), instructions, now, of);
                }
                Err(_) => failed.push((*object, *hint)),
            }
        }
        // What the others have shown may lead to these.
        for (object, hint) in failed {
            self.read_function(object, hint, now, of, memory);
        }
        for address in &needs.addresses {
            if memory.is_used_up() {
                break;
            }
            self.read_address(*address, now, of, memory, &mut confirmed)?;
        }
        Ok(())
    }

    fn read_address(
        &self,
        address: u64,
        now: u64,
        of: &Interpreter,
        memory: &Limited<'_>,
        confirmed: &mut Confirmed,
    ) -> Result<(), WhyNot> {
        let known_head = {
            let known = self.known.lock();
            known.block(address).map(|block| (block.head.clone(), block.scope(address).is_some()))
        };
        let head = match &known_head {
            // Another address of this request was in it.
            Some((head, _)) if confirmed.contains_key(&head.code.end) => Some(head.clone()),
            _ => match self.find(address, memory) {
                Ok(head) => head,
                Err(_) => return self.refuse(address, now, memory),
            },
        };
        let is_there =
            |head: &BlockHead| head.code.contains(&address.wrapping_sub(1)) || head.code.contains(&address);
        let Some(head) = head.filter(is_there) else {
            self.known.lock().forget(address, now);
            return Ok(());
        };
        let is_same = known_head.as_ref().is_some_and(|(known, _)| *known == head);
        if !is_same {
            let Ok(mut block) = self.reader.read(&head, memory) else {
                return self.refuse(address, now, memory);
            };
            if block.rows.len() > MAX_BLOCK_ROWS {
                of.cuts.count(CutLimit::BlockRows, (block.rows.len() - (MAX_BLOCK_ROWS - 1)) as u64);
                block.rows.truncate(MAX_BLOCK_ROWS - 1);
                let end = block.rows.last().map_or(head.code.start, |(from, _)| from.saturating_add(1));
                block.rows.push((end, UnwindRule::NONE));
            }
            let name = (!head.name.is_empty()).then(|| {
                let text = FunctionText { name: head.name.clone(), ..FunctionText::default() };
                self.enter_function(head.at, Ok(text), 0..0, now, of)
            });
            let rows = block.rows.len();
            let (head, scopes) = (head.clone(), BTreeMap::new());
            let (content, first_ns) = (Arc::new(block), [now, boot_time_ns()]);
            let block = Block { head, content, scopes, name, rows, first_ns, read_ns: now };
            let mut known = self.known.lock();
            if !known.enter(block) {
                known.forget(address, now);
                return Ok(());
            }
        }
        if !is_same {
            confirmed.remove(&head.code.end);
        }
        let read = confirmed.entry(head.code.end).or_default();
        let has_scope = is_same && known_head.is_some_and(|(_, has_scope)| has_scope);
        let scope = if has_scope || !head.name.is_empty() {
            None
        } else {
            let none = |_| Scope { over: address..address, functions: Vec::new() };
            let Scope { over, functions } = self.reader.scope(&head, address, memory).unwrap_or_else(none);
            let mut number = |object| {
                *read.entry(object).or_insert_with(|| self.read_function(object, 0, now, of, memory))
            };
            let number = |(object, position)| (number(object), position);
            Some((over, functions.into_iter().map(number).collect::<Vec<_>>()))
        };
        if memory.is_used_up() {
            // The next request reads the scope.
            return Ok(());
        }
        let mut known = self.known.lock();
        known.empty.remove(&address);
        if scope.is_some() && !known.has_room() {
            known.make_room();
            return Ok(());
        }
        let mut added = 0;
        if let Some(block) = known.blocks.get_mut(&head.code.end).filter(|block| block.head == head) {
            block.read_ns = now;
            if let Some((over, functions)) = scope {
                added = functions.len() + 1;
                block.rows += added;
                let first_ns = [now, boot_time_ns()];
                block.scopes.insert(over.end, KnownScope { start: over.start, first_ns, functions });
            }
        }
        known.rows += added;
        ALL_ROWS.fetch_add(added, Ordering::Relaxed);
        Ok(())
    }

    /// Finds the block of an address, or of the call before it: that may be the last instruction of its block.
    fn find(&self, address: u64, memory: &Limited<'_>) -> Result<Option<BlockHead>, WhyNot> {
        let here = self.reader.find(address, memory)?;
        if here.as_ref().is_some_and(|head| head.code.contains(&address)) {
            return Ok(here);
        }
        let call = address.wrapping_sub(1);
        let before = self.reader.find(call, memory)?.filter(|head| head.code.contains(&call));
        Ok(before.or(here))
    }

    /// An address cannot be read. If the process has ended, what is known of it stays, and the caller gets the error.
    fn refuse(&self, address: u64, now: u64, memory: &Limited<'_>) -> Result<(), WhyNot> {
        if !memory.is_used_up() {
            self.reader.ranges(memory)?;
            self.known.lock().forget(address, now);
        }
        Ok(())
    }

    /// Reads a function, and returns its number. A function that differs from the one that was at its address gets another.
    fn read_function(&self, object: u64, hint: u64, now: u64, of: &Interpreter, memory: &Limited<'_>) -> u64 {
        if object == 0 {
            return NO_FUNCTION;
        }
        match self.reader.function(object, hint, memory) {
            Ok(CodeFunction { text, instructions }) => {
                self.enter_function(object, Ok(text), instructions, now, of)
            }
            // The next request reads it, or the process has ended.
            Err(_) if memory.is_used_up() || self.reader.ranges(memory).is_err() => {
                self.known.lock().functions.get(&object).map_or(NO_FUNCTION, |known| known.number)
            }
            Err(reason) => self.enter_function(object, Err(reason), 0..0, now, of),
        }
    }

    /// Enters a function with its texts, and returns its number.
    fn enter_function(
        &self,
        object: u64,
        text: Result<FunctionText, WhyNot>,
        instructions: Range<u64>,
        now: u64,
        of: &Interpreter,
    ) -> u64 {
        let mut hasher = DefaultHasher::new();
        text.as_ref().ok().hash(&mut hasher);
        let hash = hasher.finish();
        let mut known = self.known.lock();
        if let Some(same) = known
            .functions
            .get_mut(&object)
            .filter(|known| known.hash == hash && known.instructions == instructions)
        {
            if same.read_ns[0] < now {
                same.read_ns.rotate_right(1);
                same.read_ns[0] = now;
            }
            return same.number;
        }
        let number = of.add(object, text);
        if known.functions.len() >= MAX_FUNCTIONS {
            let before = known.functions.len();
            known.functions.retain(|_, function| function.number != NO_FUNCTION);
            of.cuts.count(CutLimit::Nameless, (before - known.functions.len()) as u64);
        }
        let (since_ns, mut read_ns) = (boot_time_ns(), [0; MAX_CONFIRMED]);
        read_ns[0] = now;
        known.functions.insert(object, KnownFunction { number, hash, instructions, since_ns, read_ns });
        number
    }
}

impl Drop for GeneratedCode {
    fn drop(&mut self) {
        self.known.get_mut().clear();
    }
}

impl Known {
    fn is_over(&self) -> bool {
        self.failures >= MAX_FAILURES
    }

    fn has_room(&self) -> bool {
        self.rows < MAX_ROWS && ALL_ROWS.load(Ordering::Relaxed) < MAX_ALL_ROWS
    }

    /// Removes a block by its end.
    fn remove(&mut self, end: u64) {
        if let Some(block) = self.blocks.remove(&end) {
            self.rows -= block.rows;
            ALL_ROWS.fetch_sub(block.rows, Ordering::Relaxed);
        }
    }

    /// Removes all blocks.
    fn clear(&mut self) {
        self.blocks.clear();
        ALL_ROWS.fetch_sub(mem::take(&mut self.rows), Ordering::Relaxed);
    }

    /// Removes all blocks, to make room. Those that are still in use are read again.
    fn make_room(&mut self) {
        self.cuts.count(CutLimit::Blocks, self.blocks.len() as u64);
        self.clear();
    }

    /// Returns the block that holds an address, or a return address.
    fn block(&self, address: u64) -> Option<&Block> {
        let (_, block) = self.blocks.range(address..).next()?;
        (block.head.code.start <= address).then_some(block)
    }

    /// No block holds this address any more.
    fn forget(&mut self, address: u64, now: u64) {
        if let Some(end) = self.block(address).map(|block| block.head.code.end) {
            self.remove(end);
        }
        if self.empty.len() >= MAX_EMPTY {
            self.cuts.count(CutLimit::Addresses, self.empty.len() as u64);
            self.empty.clear();
        }
        self.empty.insert(address, now);
    }

    /// Enters a block, in place of all that were in its range. Returns false if there is no room.
    fn enter(&mut self, block: Block) -> bool {
        let Range { start, end } = block.head.code;
        let covered: Vec<u64> = self
            .blocks
            .range(start + 1..)
            .take_while(|(_, old)| old.head.code.start < end)
            .map(|(end, _)| *end)
            .collect();
        for end in covered {
            self.remove(end);
        }
        if self.blocks.len() >= MAX_BLOCKS || self.rows + block.rows > MAX_ROWS {
            self.make_room();
        }
        if ALL_ROWS.load(Ordering::Relaxed) + block.rows > MAX_ALL_ROWS {
            self.cuts.count(CutLimit::AllRows, 1);
            return false;
        }
        self.rows += block.rows;
        ALL_ROWS.fetch_add(block.rows, Ordering::Relaxed);
        self.blocks.insert(end, block);
        true
    }
}

impl Block {
    fn scope(&self, address: u64) -> Option<&KnownScope> {
        let (_, scope) = self.scopes.range(address..).next()?;
        (scope.start <= address).then_some(scope)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;
    use crate::runtimes::{
        Detected, RuntimeFile, Unloads,
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
        /// What the identity grows by when the next block is looked for.
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

        fn find(&self, address: u64, _: &dyn Memory) -> Result<Option<BlockHead>, WhyNot> {
            self.alive()?;
            self.identity.fetch_add(self.grows_next.swap(0, Ordering::Relaxed), Ordering::Relaxed);
            let at = address / CODE_BYTES * CODE_BYTES;
            let identity = [self.identity.load(Ordering::Relaxed), 0, 0, 0];
            Ok(Some(BlockHead { at, code: at..at + CODE_BYTES, identity, name: String::new() }))
        }

        fn read(&self, head: &BlockHead, _: &dyn Memory) -> Result<CodeBlock, WhyNot> {
            let rows = 0..self.rows.load(Ordering::Relaxed);
            let rows = rows.map(|row| (head.code.start + row, UnwindRule::X86_64_ENTRY)).collect();
            Ok(CodeBlock { rows, ..CodeBlock::default() })
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

    #[test]
    fn code_has_the_function_that_took_the_place_of_one_in_the_same_request() {
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
        let head = BlockHead { at: START, code: START..START + 8, identity: [0; 4], name: String::new() };
        let (content, scopes) = (Arc::new(CodeBlock::default()), BTreeMap::new());
        let rows = MAX_ALL_ROWS + 1;
        let block = Block { head, content, scopes, name: None, rows, first_ns: [0; 2], read_ns: 0 };
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
}
