//! The code of V8: builtins, and compiled functions with what was inlined.

use std::ops::Range;

use gannet_unwind::{generated::fp_rows, unwind::GeneratedFrame};

use super::{
    super::{
        BlockHead, CodeBlock, CodeFunction, CodeReader, FrameWords, MAX_INLINED, Memory, NO_POSITION,
        NamedFrame, Scope, Unloads, WhyNot,
        memory::{half, word},
    },
    heap::{Heap, object, small},
    layout::Layout,
    lines::{Numbers, Position, position_at, positions},
};

/// Instructions begin at multiples of this.
const ALIGNMENT: u64 = 64;
/// Bytes before an address in which the begin of its code is searched, and of one reading.
const MAX_BACK: u64 = 256 << 10;
const PIECE: u64 = 16 << 10;
/// Places that look like a begin, and are read.
const MAX_TRIES: usize = 64;
/// Bytes of the code of one function.
const MAX_CODE: u64 = 1 << 20;
/// User space ends here.
const USER: u64 = 1 << 47;
/// Bytecodes of one function that are counted.
const MAX_BYTECODES: usize = 1 << 20;
/// Bytes of the bytecode of one function.
const MAX_BYTECODE: u64 = 256 << 10;
/// Prefixes of bytecodes with wide operands: wide, extra wide, and the same with a break point.
const PREFIXES: [(u8, usize); 4] = [(0, 1), (1, 2), (2, 1), (3, 2)];

/// A builtin function.
#[derive(Clone, Debug)]
pub(super) struct Builtin {
    pub(super) code: Range<u64>,
    /// Its frames are those of interpreted functions.
    pub(super) is_interpreter: bool,
}

/// The code of one process.
#[derive(Debug)]
pub(super) struct Isolates {
    heap: Heap,
    builtins: Vec<Builtin>,
}

impl Isolates {
    pub(super) fn new(layout: Layout, builtins: Vec<Builtin>) -> Self {
        Self { heap: Heap::new(layout), builtins }
    }

    fn process_is_there(&self, memory: &dyn Memory) -> Result<(), WhyNot> {
        let first = self.builtins.first().map_or(0, |builtin| builtin.code.start);
        memory.array::<1>(first).map(|_| ())
    }

    fn builtin(&self, address: u64) -> Option<&Builtin> {
        let next = self.builtins.partition_point(|builtin| builtin.code.start <= address);
        self.builtins.get(next.checked_sub(1)?).filter(|builtin| builtin.code.contains(&address))
    }

    /// Returns the compiled code that holds an address. Its description and it refer to each other.
    fn compiled(&self, address: u64, memory: &dyn Memory) -> Option<BlockHead> {
        let of = &self.heap.layout.version.code;
        let mut tries = MAX_TRIES;
        // The highest place where instructions may begin.
        let mut start = address / ALIGNMENT * ALIGNMENT;
        let lowest = start.saturating_sub(MAX_BACK).max(of.header);
        while start > lowest {
            // Pieces do not go over the border of a page more than they have to: what is below may not be mapped.
            let low = (start.wrapping_sub(of.header) & !(PIECE - 1)).max(lowest);
            let end = start.wrapping_sub(of.header).wrapping_add(of.reference + 8);
            let piece = memory.bytes(low, usize::try_from(end.checked_sub(low)?).ok()?).ok()?;
            while start.wrapping_sub(of.header) >= low && start > lowest {
                let at = start - of.header;
                let index = (at - low) as usize;
                let (map, reference) = (word(&piece, index), word(&piece, index + of.reference as usize));
                if map & 3 == 1 && reference & 3 == 1 && map < USER && reference < USER && map != reference {
                    tries = tries.checked_sub(1)?;
                    let description = if of.is_inside { at + 1 } else { reference };
                    if let Some(head) = self.described(description, at, start, memory) {
                        return head.code.contains(&address).then_some(head);
                    }
                }
                start -= ALIGNMENT;
            }
        }
        None
    }

    /// Returns the code with this description, if it begins here.
    fn described(&self, reference: u64, stream: u64, start: u64, memory: &dyn Memory) -> Option<BlockHead> {
        let layout = &self.heap.layout;
        let of = &layout.version.code;
        let bytes = self.heap.read_as(reference, layout.types.code, of.bytes, memory).ok()?;
        let size = u64::from(half(&bytes, of.size as usize));
        let refers_back = || {
            if of.is_inside {
                // Nothing else refers to it, but its first field is known too: what the linker has to change in it.
                return self.heap.read_as(word(&bytes, 8), layout.types.bytes, 8, memory).is_ok();
            }
            word(&bytes, of.stream as usize) == stream + 1 && word(&bytes, of.start as usize) == start
        };
        let is_here = (1..=MAX_CODE).contains(&size) && refers_back();
        let flags = half(&bytes, of.flags as usize);
        let kind = flags & layout.kind_mask;
        let is_function = kind >= layout.baseline;
        is_here.then(|| BlockHead {
            at: reference,
            code: start..start + size,
            identity: [
                word(&bytes, of.data as usize),
                word(&bytes, of.positions as usize),
                u64::from(kind),
                size,
            ],
            epoch: self.heap.moves.epoch(),
            name: if is_function { String::new() } else { "v8 code".to_owned() },
        })
    }

    fn is_baseline(&self, head: &BlockHead) -> bool {
        head.identity[2] == u64::from(self.heap.layout.baseline)
    }

    /// Returns the offset in the bytecode of an offset in baseline code.
    fn bytecode_offset(&self, head: &BlockHead, offset: u64, memory: &dyn Memory) -> Result<u32, WhyNot> {
        let [data, table, ..] = head.identity;
        let bytecode = self.heap.bytecode_of(data, memory)?;
        let table = self.heap.table(table, memory)?;
        let at = object(bytecode).ok_or(WhyNot::Implausible("no bytecode"))?;
        let length = small(memory.u64(at.wrapping_add(8))?).unwrap_or(0);
        let length = u64::try_from(length).unwrap_or(0).min(MAX_BYTECODE) as usize;
        let bytes = memory.bytes(at.wrapping_add(self.heap.layout.bytecode), length)?;
        let mut ends = Numbers(&table);
        // The first entry is the prologue, which is at the begin.
        let mut end = ends.unsigned().unwrap_or(0);
        let mut current = 0_usize;
        let mut next = 0;
        for _ in 0..MAX_BYTECODES {
            if offset <= end || next >= bytes.len() {
                break;
            }
            let Some(step) = ends.unsigned() else { break };
            current = next;
            end = end.saturating_add(step);
            next += self.bytecode_size(&bytes[next..]);
        }
        Ok(current as u32)
    }

    /// Returns the bytes of the first bytecode, with its prefix.
    fn bytecode_size(&self, bytes: &[u8]) -> usize {
        let sizes = &self.heap.layout.bytecode_sizes;
        let count = sizes.len() / 3;
        let size = |code: u8, scale: usize| {
            sizes.get(scale * count + usize::from(code)).map_or(1, |size| usize::from(*size).max(1))
        };
        let Some(first) = bytes.first() else { return 1 };
        let prefix = PREFIXES.iter().find(|(code, _)| code == first);
        match (prefix, bytes.get(1)) {
            (Some((_, scale)), Some(second)) => 1 + size(*second, *scale),
            _ => size(*first, 0),
        }
    }

    /// Returns the functions at an offset of optimized code, innermost first.
    fn inlined(
        &self,
        head: &BlockHead,
        table: &[(u32, Position)],
        offset: u32,
        memory: &dyn Memory,
    ) -> Result<Vec<(u64, u32)>, WhyNot> {
        let of = &self.heap.layout;
        let [data, ..] = head.identity;
        let version = &of.version;
        let slots = version.optimized_function.max(version.inlining).max(version.literals);
        let bytes = (of.elements + 8 * (slots + 1)) as usize;
        let data = self.heap.read_as(data, of.types.array, bytes, memory)?;
        let element = |number: u64| word(&data, (of.elements + 8 * number) as usize);
        let own = self.heap.unwrapped(element(version.optimized_function), memory)?;
        let mut functions = Vec::new();
        let mut position = position_at(table, offset);
        while let Some(number) = position.and_then(|position| position.inlined) {
            if functions.len() >= MAX_INLINED {
                return Err(WhyNot::Implausible("inlined functions without end"));
            }
            let inlining =
                object(element(version.inlining)).ok_or(WhyNot::Implausible("no table of inlining"))?;
            let length = small(memory.u64(inlining.wrapping_add(8))?).unwrap_or(0);
            let entry = 16 * u64::from(number);
            if u64::try_from(length).unwrap_or(0) < entry + 16 {
                return Err(WhyNot::Implausible("an inlined function beyond the table"));
            }
            let entry = memory.bytes(inlining.wrapping_add(16 + entry), 16)?;
            let literal = half(&entry, 8).cast_signed();
            let shared = match u64::try_from(literal) {
                Ok(literal) if literal < 1 << 16 => {
                    let literals =
                        object(element(version.literals)).ok_or(WhyNot::Implausible("no literals"))?;
                    // The lowest bits but one say whether a reference is weak.
                    let of_literal = memory.u64(literals.wrapping_add(of.elements + 8 * literal))? & !2;
                    self.heap.unwrapped(of_literal, memory)?
                }
                Ok(_) => return Err(WhyNot::Implausible("an inlined function without a literal")),
                Err(_) => own,
            };
            functions.push((shared, self.line(shared, position.and_then(|at| at.offset), memory)));
            let outer = Position::decode(word(&entry, 0));
            // Functions are numbered in the order of inlining, so that none is within a later one.
            if outer.inlined.is_some_and(|outer| outer >= number) {
                return Err(WhyNot::Implausible("inlined functions in a circle"));
            }
            position = Some(outer);
        }
        functions.push((own, self.line(own, position.and_then(|at| at.offset), memory)));
        Ok(functions)
    }

    fn line(&self, shared: u64, offset: Option<u32>, memory: &dyn Memory) -> u32 {
        let Some(offset) = offset else { return NO_POSITION };
        match self.heap.script_of(shared, memory).map(|script| script.line(offset)) {
            Ok(0) | Err(_) => NO_POSITION,
            Ok(line) => line,
        }
    }
}

impl CodeReader for Isolates {
    fn ranges(&self, memory: &dyn Memory) -> Result<Vec<Range<u64>>, WhyNot> {
        self.process_is_there(memory)?;
        // Code may be anywhere.
        Ok(std::iter::once(0..USER).collect())
    }

    fn has_frame_pointers(&self) -> bool {
        true
    }

    fn unloads(&self, memory: &dyn Memory) -> Unloads {
        self.heap.unloads(memory, || self.process_is_there(memory).is_ok())
    }

    fn find(&self, address: u64, memory: &dyn Memory) -> Result<Option<BlockHead>, WhyNot> {
        if let Some(builtin) = self.builtin(address) {
            return Ok(Some(BlockHead {
                at: builtin.code.start,
                code: builtin.code.clone(),
                identity: [0; 4],
                epoch: 0,
                name: String::new(),
            }));
        }
        let found = self.compiled(address, memory);
        Ok(found.filter(|head| self.heap.enter(head.at, memory).is_ok()))
    }

    fn read(&self, head: &BlockHead, memory: &dyn Memory) -> Result<CodeBlock, WhyNot> {
        let bytes =
            memory.bytes(head.code.start, (head.code.end - head.code.start).min(MAX_CODE) as usize)?;
        let frames = match self.builtin(head.code.start) {
            Some(builtin) if builtin.is_interpreter => FrameWords::WithPosition,
            None if self.is_baseline(head) => FrameWords::WithoutPosition,
            _ => FrameWords::None,
        };
        // The prologue of baseline code is a builtin.
        let by_call = frames == FrameWords::WithoutPosition;
        Ok(CodeBlock { rows: fp_rows(&bytes, head.code.start, by_call), frames, ..CodeBlock::default() })
    }

    fn named(&self, frame: &GeneratedFrame<'_>) -> Option<NamedFrame> {
        let of = &self.heap.layout.frame;
        let word = |distance: i64| frame.read(frame.fp?.wrapping_add_signed(distance));
        // Frames without a function have a small number in the place of their context.
        object(word(of.marker)?)?;
        let (function, bytecode) = (word(of.function)?, word(of.bytecode)?);
        object(function)?;
        object(bytecode)?;
        let position = small(word(of.offset)?)
            .and_then(|offset| u32::try_from(offset).ok())
            // From the reference to the array.
            .and_then(|offset| offset.checked_sub(self.heap.layout.bytecode as u32 - 1));
        Some(NamedFrame { object: bytecode, hint: function, position: position.unwrap_or(NO_POSITION) })
    }

    fn scope(&self, head: &BlockHead, address: u64, memory: &dyn Memory) -> Result<Scope, WhyNot> {
        let whole = head.code.start..head.code.end - 1;
        if self.builtin(head.code.start).is_some() {
            return Ok(Scope { over: whole, functions: Vec::new() });
        }
        // A return address is behind its call.
        let offset = address.saturating_sub(head.code.start);
        if self.is_baseline(head) {
            let position = self.bytecode_offset(head, offset, memory)?;
            // The frame knows the function.
            return Ok(Scope { over: address..address, functions: vec![(0, position)] });
        }
        let table = self
            .heap
            .table(head.identity[1], memory)
            .map(|table| positions(&table, self.heap.layout.version.steps));
        let offset = u32::try_from(offset.saturating_sub(1)).unwrap_or(u32::MAX);
        let functions = self.inlined(head, &table.unwrap_or_default(), offset, memory)?;
        Ok(Scope { over: address..address, functions })
    }

    fn function(&self, object: u64, hint: u64, memory: &dyn Memory) -> Result<CodeFunction, WhyNot> {
        if hint == 0 { self.heap.shared(object, memory) } else { self.heap.interpreted(object, hint, memory) }
    }
}
