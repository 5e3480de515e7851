//! The heaps of generated code: which block holds an address, its rules, and the methods that it stands for.

use std::{ops::Range, sync::Arc};

use gannet_unwind::{
    format::UnwindRule,
    generated::{FramedCode, Rows, SENDER_FRAME, left_frame_rows, moved_return_rows, unframed_rows},
    limits::TableLimits,
};
use parking_lot::Mutex;

use super::{
    super::{
        BlockHead, Captured, CodeBlock, CodeFunction, CodeReader, FrameWords, MAX_INLINED, Memory,
        NO_POSITION, Replacements, Scope, Unloads, WhyNot,
        memory::{half, word},
    },
    counts::Counts,
    layout::{Layout, Place, Scopes},
    method,
    numbers::Numbers,
    structs::text,
};

/// Heaps of a process.
const MAX_HEAPS: u32 = 16;
/// Segments between an address and the block's first one: more than the largest block has.
const MAX_HOPS: usize = 4096;
/// Bytes of the code of one block that are followed.
const MAX_CODE: u64 = 1 << 20;
/// Bytes of one block.
const MAX_BLOB: u64 = 8 << 20;
const MAX_BLOB_NAME: usize = 80;
/// Descriptions of addresses in one compiled method, with 16 bytes each.
const MAX_PCS: u64 = 1 << 16;
const PC_BYTES: u64 = 16;
/// Bytes that are read of one scope.
const SCOPE_BYTES: u64 = 48;
/// References to methods in one compiled method.
const MAX_METADATA: u32 = 1 << 16;
/// Codelets of the interpreter.
const MAX_CODELETS: usize = 2048;
/// From rbp, in frames of the interpreter: the method, and the address of the instruction.
const FRAME_METHOD: i64 = -3 * 8;
const FRAME_INSTRUCTION: i64 = -8 * 8;
/// Pushes behind rbp until a frame of the interpreter has both.
const FRAME_PUSHES: u32 = 8;
/// Free segments have this mark.
const FREE: u8 = 0xff;

/// The code of one process.
#[derive(Debug)]
pub(super) struct Heaps {
    layout: Layout,
    counts: Counts,
    /// The heaps at the last reading of the ranges.
    found: Mutex<Arc<Vec<Heap>>>,
}

/// A heap of generated code.
#[derive(Debug)]
struct Heap {
    code: Range<u64>,
    segments: Range<u64>,
    log2_segment: u32,
}

impl Heaps {
    pub(super) fn new(layout: Layout, counts: Counts) -> Self {
        Self { layout, counts, found: Mutex::default() }
    }

    fn space(&self, at: u64, memory: &dyn Memory) -> Result<Range<u64>, WhyNot> {
        let of = &self.layout;
        Ok(memory.u64(at.wrapping_add(of.space_low))?..memory.u64(at.wrapping_add(of.space_high))?)
    }

    fn read_heaps(&self, memory: &dyn Memory) -> Result<Vec<Heap>, WhyNot> {
        let of = &self.layout;
        let list = memory.u64(of.heaps)?;
        if list == 0 {
            return Err(WhyNot::NotStarted);
        }
        let length = u32::from_ne_bytes(memory.array(list.wrapping_add(of.list_length))?);
        if length == 0 {
            return Err(WhyNot::NotStarted);
        }
        if length > MAX_HEAPS {
            return Err(WhyNot::Implausible("too many code heaps"));
        }
        let data = memory.u64(list.wrapping_add(of.list_data))?;
        let heap = |number: u32| {
            let heap = memory.u64(data.wrapping_add(8 * u64::from(number)))?;
            let code = self.space(heap.wrapping_add(of.heap_memory), memory)?;
            let segments = self.space(heap.wrapping_add(of.heap_segments), memory)?;
            let log2_segment = u32::from_ne_bytes(memory.array(heap.wrapping_add(of.heap_log2_segment))?);
            if code.end < code.start || code.end - code.start > 1 << 32 || !(4..20).contains(&log2_segment) {
                return Err(WhyNot::Implausible("a code heap of an odd size"));
            }
            Ok(Heap { code, segments, log2_segment })
        };
        (0..length).map(heap).collect()
    }

    /// Returns the address of the blob that holds an address, if one does.
    fn blob_at(&self, address: u64, memory: &dyn Memory) -> Result<Option<u64>, WhyNot> {
        let heaps = Arc::clone(&*self.found.lock());
        let Some(heap) = heaps.iter().find(|heap| heap.code.contains(&address)) else { return Ok(None) };
        let mut segment = (address - heap.code.start) >> heap.log2_segment;
        for _ in 0..MAX_HOPS {
            let at = heap.segments.start.wrapping_add(segment);
            if !heap.segments.contains(&at) {
                return Ok(None);
            }
            let [mark] = memory.array(at)?;
            match mark {
                FREE => return Ok(None),
                0 => {
                    let block = heap.code.start + (segment << heap.log2_segment);
                    let [used] = memory.array(block.wrapping_add(self.layout.block_used))?;
                    return Ok((used != 0).then(|| block.wrapping_add(self.layout.block_bytes)));
                }
                back => match segment.checked_sub(back.into()) {
                    Some(before) => segment = before,
                    None => return Ok(None),
                },
            }
        }
        Ok(None)
    }

    fn place(&self, place: Place, at: u64, bytes: &[u8]) -> u64 {
        match place {
            Place::Address(field) => word(bytes, field as usize),
            Place::Offset(field) => at.wrapping_add(half(bytes, field as usize).into()),
            Place::FromCode(field) => {
                let offset = half(bytes, field as usize) as u16;
                self.place(self.layout.blob.code, at, bytes).wrapping_add(offset.into())
            }
        }
    }

    /// Returns the bytes of the description of a compiled method.
    fn compiled(&self, head: &BlockHead, memory: &dyn Memory) -> Result<Vec<u8>, WhyNot> {
        memory.bytes(head.at, self.layout.compiled.bytes.max(self.layout.blob.bytes) as usize)
    }

    fn read_compiled(&self, head: &BlockHead, code: &[u8], memory: &dyn Memory) -> Result<CodeBlock, WhyNot> {
        let of = &self.layout.compiled;
        let bytes = self.compiled(head, memory)?;
        let entries: Vec<u64> = of.entries.iter().map(|entry| self.place(*entry, head.at, &bytes)).collect();
        let deopt = of.deopt.iter().map(|handler| self.place(*handler, head.at, &bytes)).collect();
        let orig_pc = half(&bytes, of.orig_pc as usize).cast_signed();
        Ok(CodeBlock {
            rows: self.framed_rows(head, &entries, code, &bytes),
            captured: None,
            frames: FrameWords::None,
            moved: (deopt, orig_pc),
        })
    }

    /// Returns the rows of a block whose description has the size of its frame.
    fn framed_rows(&self, head: &BlockHead, entries: &[u64], code: &[u8], bytes: &[u8]) -> Rows {
        let of = &self.layout.blob;
        let complete = half(bytes, of.frame_complete as usize);
        let complete =
            if of.frame_complete_is_short { i32::from(complete as i16) } else { complete.cast_signed() };
        // Frames of more than a mebibyte are no frames.
        let words = half(bytes, of.frame_size as usize).cast_signed().clamp(0, 1 << 17);
        let never = complete < 0;
        let framed = FramedCode {
            code,
            start: head.code.start,
            entries,
            complete: head.code.start.wrapping_add(u64::from(complete.max(0).cast_unsigned())),
            frame_bytes: if never { 0 } else { words * 8 },
        };
        framed.rows()
    }

    fn read_interpreter(
        &self,
        head: &BlockHead,
        code: &[u8],
        memory: &dyn Memory,
    ) -> Result<CodeBlock, WhyNot> {
        let of = &self.layout;
        let queue = memory.u64(of.interpreter)?;
        let begin = memory.u64(queue.wrapping_add(of.codelets))?;
        let end = u32::from_ne_bytes(memory.array(queue.wrapping_add(of.codelets_end))?);
        let end = begin.wrapping_add(end.into());
        let mut rows: Rows = vec![(head.code.start, SENDER_FRAME)];
        let mut entries = Vec::new();
        let mut at = begin;
        for _ in 0..MAX_CODELETS {
            if at >= end {
                break;
            }
            let codelet = memory.bytes(at, of.codelet_bytes as usize)?;
            let size = u64::from(half(&codelet, of.codelet_size as usize));
            let description =
                text(memory, word(&codelet, of.codelet_text as usize), MAX_BLOB_NAME).unwrap_or_default();
            // The code is aligned behind the head.
            let Some(start) = at.wrapping_add(of.codelet_bytes).checked_next_multiple_of(32) else { break };
            let next = at.wrapping_add(size);
            let part = start.checked_sub(head.code.start).zip(next.checked_sub(head.code.start));
            let part = part.and_then(|(from, to)| code.get(from as usize..to as usize));
            if size == 0 || size % 8 != 0 {
                break;
            }
            if let Some(part) = part {
                if description.starts_with("method entry point") {
                    let (made, complete) = moved_return_rows(part, start, true, FRAME_PUSHES);
                    if let Some(complete) = complete {
                        rows.extend(made);
                        rows.push((complete, SENDER_FRAME));
                        entries.push(start..complete);
                    }
                }
                let behind = rows.last().map_or(start, |(last, _)| *last).max(start);
                rows.extend(left_frame_rows(part, start).into_iter().filter(|(from, _)| *from >= behind));
                rows.push((next, SENDER_FRAME));
            }
            at = next;
        }
        rows.sort_by_key(|(from, _)| *from);
        let captured = Captured { function: FRAME_METHOD, position: FRAME_INSTRUCTION, entries };
        Ok(CodeBlock { rows, captured: Some(captured), ..CodeBlock::default() })
    }

    /// Reads the list of methods, innermost first, from the place of a scope.
    fn functions(
        &self,
        scopes: &ScopeData,
        mut at: u32,
        memory: &dyn Memory,
    ) -> Result<Vec<(u64, u32)>, WhyNot> {
        let mut functions = Vec::new();
        while at != 0 && functions.len() < MAX_INLINED {
            let place = scopes.data.start.wrapping_add(at.into());
            if !scopes.data.contains(&place) {
                return Err(WhyNot::Implausible("a scope outside its method"));
            }
            let bytes = memory.bytes(place, (scopes.data.end - place).min(SCOPE_BYTES) as usize)?;
            let mut numbers = Numbers::new(&bytes, self.layout.without_zero);
            let (Some(sender), Some(method), Some(position)) =
                (numbers.unsigned(), numbers.unsigned(), numbers.unsigned())
            else {
                return Err(WhyNot::Implausible("a scope that breaks off"));
            };
            if method == 0 || method > MAX_METADATA {
                return Err(WhyNot::Implausible("a scope without method"));
            }
            let object = memory.u64(scopes.metadata.wrapping_add(8 * u64::from(method - 1)))?;
            // Position -1 is the method's entry, which has the line of position 0.
            functions.push((object, position.saturating_sub(1)));
            // Callers come before.
            if sender >= at {
                break;
            }
            at = sender;
        }
        Ok(functions)
    }

    fn scopes(&self, head: &BlockHead, bytes: &[u8]) -> ScopeData {
        let at = |field: u64| u64::from(half(bytes, field as usize));
        match self.layout.compiled.scopes {
            Scopes::Inside { metadata, pcs, pcs_end, data } => {
                let pcs = head.at.wrapping_add(at(pcs))..head.at.wrapping_add(at(pcs_end));
                let data = word(bytes, data as usize)..pcs.start;
                ScopeData { metadata: head.at.wrapping_add(at(metadata)), pcs, data }
            }
            Scopes::Outside { mutable, relocation, immutable, immutable_size, pcs, data } => {
                let outside = word(bytes, immutable as usize);
                let metadata = word(bytes, mutable as usize).wrapping_add(at(relocation).next_multiple_of(8));
                let data = outside.wrapping_add(at(data));
                ScopeData {
                    metadata,
                    pcs: outside.wrapping_add(at(pcs))..data,
                    data: data..outside.wrapping_add(at(immutable_size)),
                }
            }
        }
    }
}

/// Addresses of the scopes of a compiled method.
struct ScopeData {
    metadata: u64,
    pcs: Range<u64>,
    data: Range<u64>,
}

impl CodeReader for Heaps {
    fn ranges(&self, memory: &dyn Memory) -> Result<Vec<Range<u64>>, WhyNot> {
        let heaps = Arc::new(self.read_heaps(memory)?);
        let ranges = heaps.iter().map(|heap| heap.code.clone()).collect();
        *self.found.lock() = heaps;
        Ok(ranges)
    }

    fn find(&self, address: u64, memory: &dyn Memory) -> Result<Option<BlockHead>, WhyNot> {
        let of = &self.layout;
        let Some(at) = self.blob_at(address, memory)? else { return Ok(None) };
        let bytes = memory.bytes(at, of.blob.bytes as usize)?;
        let name = text(memory, word(&bytes, of.blob.name as usize), MAX_BLOB_NAME)?;
        let code = self.place(of.blob.code, at, &bytes)..self.place(of.blob.code_end, at, &bytes);
        let size = u64::from(half(&bytes, of.blob.size as usize));
        if code.start < at || code.end <= code.start || code.end > at.wrapping_add(size) || size > MAX_BLOB {
            return Err(WhyNot::Implausible("code outside its block"));
        }
        let mut head = BlockHead {
            at,
            code,
            identity: [word(&bytes, of.blob.name as usize), size, 0, 0],
            epoch: 0,
            name,
        };
        if is_compiled(&head.name) {
            let bytes = self.compiled(&head, memory)?;
            head.identity[2] = half(&bytes, of.compiled.compile_id as usize).into();
            head.identity[3] = word(&bytes, of.compiled.method as usize);
            head.name = String::new();
        } else if head.name == INTERPRETER {
            head.identity[2] = 1;
        }
        Ok(Some(head))
    }

    fn read(&self, head: &BlockHead, memory: &dyn Memory) -> Result<CodeBlock, WhyNot> {
        let length = (head.code.end - head.code.start).min(MAX_CODE);
        let code = memory.bytes(head.code.start, length as usize)?;
        let start = head.code.start;
        if head.name.is_empty() {
            return self.read_compiled(head, &code, memory);
        }
        let rows = match head.name.as_str() {
            INTERPRETER => return self.read_interpreter(head, &code, memory),
            "I2C/C2I adapters" => moved_return_rows(&code, start, false, FRAME_PUSHES).0,
            "vtable chunks" => vec![(start, UnwindRule::X86_64_ENTRY)],
            _ => {
                let bytes = memory.bytes(head.at, self.layout.blob.bytes as usize)?;
                if half(&bytes, self.layout.blob.frame_size as usize) > 0 {
                    self.framed_rows(head, &[start], &code, &bytes)
                } else {
                    let mut rows = unframed_rows(&code, start, &TableLimits::default());
                    // Calls from native code keep their frame by rbp.
                    let call = memory.u64(self.layout.call_stub)?;
                    if call > 0 && head.code.contains(&call) {
                        let next = rows.partition_point(|(from, _)| *from < call - 1);
                        let behind = rows[..next].last().map_or(UnwindRule::NONE, |(_, rule)| *rule);
                        rows.retain(|(from, _)| *from != call - 1 && *from != call);
                        let at = rows.partition_point(|(from, _)| *from < call - 1);
                        let rule = UnwindRule { flags: 0, ..UnwindRule::FRAME_POINTER };
                        rows.splice(at..at, [(call - 1, rule), (call, behind)]);
                    }
                    rows
                }
            }
        };
        Ok(CodeBlock { rows, ..CodeBlock::default() })
    }

    fn scope(&self, head: &BlockHead, address: u64, memory: &dyn Memory) -> Result<Scope, WhyNot> {
        let of = &self.layout;
        let bytes = self.compiled(head, memory)?;
        let scopes = self.scopes(head, &bytes);
        let root = (word(&bytes, of.compiled.method as usize), NO_POSITION);
        let length = scopes.pcs.end.wrapping_sub(scopes.pcs.start);
        if length > MAX_PCS * PC_BYTES {
            return Err(WhyNot::Implausible("too many scopes"));
        }
        let pcs = memory.bytes(scopes.pcs.start, length as usize)?;
        let offset = |entry: &[u8]| i64::from(half(entry, 0).cast_signed());
        let wanted = address.wrapping_sub(head.code.start).cast_signed();
        let entries: Vec<&[u8]> = pcs.chunks_exact(PC_BYTES as usize).collect();
        let next = entries.partition_point(|entry| offset(entry) < wanted);
        let whole = |functions| Scope { over: address..address, functions };
        // The last entry is behind all code.
        let Some(entry) = entries.get(next).filter(|_| next + 1 < entries.len()) else {
            // The end of a method has no description. It belongs to the method itself: near its position in the last one.
            let last =
                next.min(entries.len().saturating_sub(1)).checked_sub(1).map(|last| half(entries[last], 4));
            let functions =
                last.and_then(|last| self.functions(&scopes, last, memory).ok()).unwrap_or_default();
            return Ok(whole(vec![
                functions.last().copied().filter(|(object, _)| *object == root.0).unwrap_or(root),
            ]));
        };
        let functions = self.functions(&scopes, half(entry, 4), memory)?;
        let before = next.checked_sub(1).map_or(-1, |before| offset(entries[before]));
        let at = |offset: i64| head.code.start.wrapping_add_signed(offset);
        let over = at(before.max(-1) + 1)..at(offset(entry));
        Ok(Scope { over, functions: if functions.is_empty() { vec![root] } else { functions } })
    }

    fn unloads(&self, memory: &dyn Memory) -> Unloads {
        self.counts.unloads(memory)
    }

    fn replacements(&self, memory: &dyn Memory) -> Replacements {
        self.counts.replacements(memory)
    }

    fn function(&self, object: u64, _: u64, memory: &dyn Memory) -> Result<CodeFunction, WhyNot> {
        method::read(&self.layout, object, memory)
    }
}

const INTERPRETER: &str = "Interpreter";

fn is_compiled(name: &str) -> bool {
    matches!(name, "nmethod" | "native nmethod")
}
