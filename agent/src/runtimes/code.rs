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
    unloads::{Replacements, UnloadHistory, Unloads},
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
    /// The same for functions that the process has replaced, and for replaced ones that it may have freed.
    replaced: UnloadHistory,
    freed: UnloadHistory,
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
    /// The same place before the machine has moved objects.
    before: Option<Before>,
}

/// A block of an earlier epoch, whose frames are those of the block that is in its place now.
#[derive(Debug)]
struct Before {
    scopes: BTreeMap<u64, KnownScope>,
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
    /// Since when it is known as this, without a replaced function in between.
    since_ns: u64,
    /// The count of replaced functions when the last request began that has read it.
    replaced: Option<Unloads>,
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
        let Known { unloads, replaced, freed, .. } = &mut *known;
        for history in [unloads, replaced, freed] {
            history.end_request(now);
        }
        Ok(())
    }

    fn read_unloads(&self, memory: &dyn Memory) {
        let unloads = self.reader.unloads(memory);
        let Replacements { replaced, freed } = self.reader.replacements(memory);
        let (now, mut known) = (boot_time_ns(), self.known.lock());
        known.unloads.enter(unloads, now);
        known.replaced.enter(replaced, now);
        known.freed.enter(freed, now);
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
            let mut block = Block { head, content, scopes, name, rows, first_ns, read_ns: now, before: None };
            let mut known = self.known.lock();
            known.keep_before(&mut block);
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
        let replaced = known.replaced.last();
        if let Some(same) = known
            .functions
            .get_mut(&object)
            .filter(|known| known.hash == hash && known.instructions == instructions)
        {
            if same.replaced != replaced {
                same.replaced = replaced;
                same.since_ns = boot_time_ns();
            }
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
        known
            .functions
            .insert(object, KnownFunction { number, hash, instructions, since_ns, replaced, read_ns });
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

    /// Keeps what was in the place of a new block before the machine has moved objects, if its frames are of the same kind.
    fn keep_before(&mut self, block: &mut Block) {
        let Some(old) = self.blocks.get_mut(&block.head.code.end) else { return };
        let is_alike = old.head.code == block.head.code
            && old.head.epoch != block.head.epoch
            && old.name == block.name
            && old.content.frames == block.content.frames
            && old.content.rows == block.content.rows;
        if is_alike {
            block.rows += old.scopes.values().map(|scope| scope.functions.len() + 1).sum::<usize>();
            block.before = Some(Before { scopes: mem::take(&mut old.scopes), read_ns: old.read_ns });
        }
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
        scope_at(&self.scopes, address)
    }
}

fn scope_at(scopes: &BTreeMap<u64, KnownScope>, address: u64) -> Option<&KnownScope> {
    let (_, scope) = scopes.range(address..).next()?;
    (scope.start <= address).then_some(scope)
}

#[cfg(test)]
mod tests;
