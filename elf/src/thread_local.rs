//! Thread-local variables that a file exports, and the words that the loader fills in to lead to them.

use object::{
    LittleEndian,
    elf::{
        PT_INTERP, PT_TLS, ProgramHeader64, R_X86_64_DTPMOD64, R_X86_64_TLSDESC, R_X86_64_TPOFF64,
        RelocationType,
    },
    pod,
};

use crate::{
    Arch, Elf, Symbol,
    file::{RELOCATION_BYTES, RELOCATION_CHUNK},
    file_header::{FileHeader, LE, PROGRAM_HEADER_BYTES},
};

/// The sections with the relocations that the loader applies.
const RELOCATIONS: [&[u8]; 2] = [b".rela.dyn", b".rela.plt"];

/// A thread-local variable of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThreadLocal {
    /// Offset in the block of thread-local variables of this file.
    pub offset: u64,
    /// Bytes of that block in memory.
    pub block_bytes: u64,
    /// The alignment of the block, in bytes; at least 1.
    pub block_align: u64,
    /// True if the file names a dynamic linker, as programs do and libraries do not.
    pub has_interpreter: bool,
    /// The word through which the file itself finds the variable; none in a program, whose code knows the offset.
    pub access: Option<ThreadLocalAccess>,
}

/// A word or pair of words that the loader fills in. Each has its ELF virtual address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadLocalAccess {
    /// The distance of the variable from the thread pointer (`R_X86_64_TPOFF64`).
    Distance(u64),
    /// A function, and its argument: that distance, or the address of module number and offset (`R_X86_64_TLSDESC`).
    Descriptor(u64),
    /// The number of the file's module (`R_X86_64_DTPMOD64`).
    Module(u64),
}

impl Elf<'_> {
    /// Finds a thread-local variable of this name among the exported symbols (`.dynsym`). Returns `None` if there is none, or if a
    /// table of the file is damaged.
    pub fn thread_local(&self, name: &str) -> Option<ThreadLocal> {
        let (index, offset) = self.thread_local_symbol(name)?;
        let header = FileHeader::read(self.data()).ok()?;
        let bytes = header.program_headers(self.data()).ok()?;
        let count = bytes.len() / PROGRAM_HEADER_BYTES;
        let (headers, _) = pod::slice_from_bytes::<ProgramHeader64<LittleEndian>>(&bytes, count).ok()?;
        let block = headers.iter().find(|header| header.p_type.get(LE) == PT_TLS)?;
        let found = ThreadLocal {
            offset,
            block_bytes: block.p_memsz.get(LE),
            block_align: block.p_align.get(LE).max(1),
            has_interpreter: headers.iter().any(|header| header.p_type.get(LE) == PT_INTERP),
            access: self.access(index),
        };
        (found.offset < found.block_bytes).then_some(found)
    }

    /// Returns number and value of a defined thread-local symbol.
    fn thread_local_symbol(&self, name: &str) -> Option<(u32, u64)> {
        let symbols = self.symbols(b".dynsym")?;
        // Most files lack the name. For them the search reads only the table of names.
        symbols.addresses_of(&[name])[0]?;
        let is_named = |symbol: &Symbol| {
            symbol.is_thread_local
                && symbol.is_defined
                && symbols.name(symbol, name.len() + 1).is_some_and(|found| found == name.as_bytes())
        };
        let mut named =
            symbols.iter().map_while(Result::ok).enumerate().filter(|(_, symbol)| is_named(symbol));
        named.next().and_then(|(index, symbol)| Some((u32::try_from(index).ok()?, symbol.address)))
    }

    /// Returns the word that leads to a thread-local symbol. A relocation without a symbol names the module of the file itself.
    fn access(&self, symbol: u32) -> Option<ThreadLocalAccess> {
        if self.arch() != Arch::X86_64 {
            return None;
        }
        let mut of_file = None;
        for section in RELOCATIONS.into_iter().filter_map(|name| self.stored_section(name)) {
            let count = usize::try_from(section.bytes).ok()? / RELOCATION_BYTES;
            for first in (0..count).step_by(RELOCATION_CHUNK) {
                let bytes = RELOCATION_CHUNK.min(count - first) * RELOCATION_BYTES;
                let place = section.offset.checked_add((first * RELOCATION_BYTES) as u64)?;
                for entry in self.data().read(place, bytes as u64)?.chunks_exact(RELOCATION_BYTES) {
                    let at = u64::from_le_bytes(*entry.first_chunk()?);
                    let info = u64::from_le_bytes(*entry.get(8..)?.first_chunk()?);
                    let (of, kind) = ((info >> 32) as u32, info as u32);
                    match RelocationType(kind) {
                        R_X86_64_TPOFF64 if of == symbol => return Some(ThreadLocalAccess::Distance(at)),
                        R_X86_64_TLSDESC if of == symbol => return Some(ThreadLocalAccess::Descriptor(at)),
                        R_X86_64_DTPMOD64 if of == symbol => return Some(ThreadLocalAccess::Module(at)),
                        R_X86_64_DTPMOD64 if of == 0 => of_file = Some(ThreadLocalAccess::Module(at)),
                        _ => {}
                    }
                }
            }
        }
        of_file
    }
}
