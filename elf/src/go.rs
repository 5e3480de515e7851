//! Go's own function table, `.gopclntab`, as Go 1.16 and later write it.
//!
//! Every Go program carries the table, stripped or not, because the Go runtime unwinds and names its stacks with it. The
//! table lists the functions by address. Each function has a record, which leads to its name and to the depth of its stack
//! at each instruction. The versions differ in the order of the parts and in the width of addresses.

use std::borrow::Cow;

use crate::{
    data::{read_u32, read_u64},
    segments::Segments,
};

/// The offset in the table of the address of the first function. A position-independent program has a relocation there.
pub(crate) const TEXT_START_AT: u64 = 24;
/// Bytes of a header of Go 1.18 and later.
pub(crate) const HEADER_BYTES: usize = 72;
/// `_func.flag`: the outermost function of a stack.
const FLAG_TOP_FRAME: u8 = 1;
/// `_func.flag`: the function sets the stack pointer itself, so its depth means nothing.
const FLAG_WRITES_SP: u8 = 2;

/// The reason why a function table cannot be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("Go's function table cannot be used: {0}")]
pub struct GoFault(pub &'static str);

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Version {
    /// Addresses are absolute, 64 bits wide.
    Go116,
    /// Addresses are 32 bits wide and count from the first function.
    Go118,
    /// Records have one field more.
    Go120,
}

/// Go's function table of one file.
#[derive(Debug)]
pub struct GoTable<'d> {
    bytes: Cow<'d, [u8]>,
    version: Version,
    /// Bytes of code that one step of a stack depth's length stands for.
    quantum: u64,
    function_count: u64,
    /// ELF virtual address of the table in its file; 0 if the caller did not give it.
    address: u64,
    /// Address of the first function; 0 where the table does not hold it.
    text_start: u64,
    names_at: usize,
    /// Offsets of the files of each compilation unit.
    units_at: usize,
    files_at: usize,
    /// Tables with one value for each instruction: stack depths, files, lines.
    depths_at: usize,
    functions_at: usize,
}

/// The code of one Go function.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GoFunction {
    /// Its ELF virtual address.
    pub start: u64,
    /// The address behind its last byte.
    pub end: u64,
    /// Offset of its record from the list of functions.
    record: u32,
}

/// The record of one Go function.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GoRecord {
    name: u32,
    depths: u32,
    flags: u8,
}

impl GoRecord {
    /// Returns whether Go ends its own stack traces at this function.
    pub fn is_top_frame(&self) -> bool {
        self.flags & FLAG_TOP_FRAME != 0
    }

    /// Returns whether the function sets the stack pointer itself, so that its stack depths mean nothing.
    pub fn writes_stack_pointer(&self) -> bool {
        self.flags & FLAG_WRITES_SP != 0
    }

    /// Returns whether the table has stack depths for this function.
    pub fn has_stack_depths(&self) -> bool {
        self.depths != 0
    }
}

impl<'d> GoTable<'d> {
    /// Reads the header of a table.
    pub fn parse(bytes: impl Into<Cow<'d, [u8]>>) -> Result<Self, GoFault> {
        let bytes = bytes.into();
        let magic = read_u32(&bytes, 0).ok_or(GoFault("it is empty"))?;
        let version = match magic {
            0xffff_fffa => Version::Go116,
            0xffff_fff0 => Version::Go118,
            0xffff_fff1 => Version::Go120,
            _ => return Err(GoFault("it has an unknown form; those of Go 1.16 and later are known")),
        };
        let cut_off = GoFault("its header is cut off");
        let &[_, _, _, _, zero_1, zero_2, quantum, address_bytes] = bytes.first_chunk().ok_or(cut_off)?;
        if (zero_1, zero_2, address_bytes) != (0, 0, 8) || quantum == 0 {
            return Err(GoFault("it is not for 64 bits"));
        }
        let word = |index: usize| read_u64(&bytes, 8 + index * 8).ok_or(cut_off);
        // Go 1.18 put the start of the text between the counts and the offsets.
        let shift = usize::from(version >= Version::Go118);
        let offset = |index: usize| {
            let offset = word(index + shift)?;
            let inside = usize::try_from(offset).ok().filter(|offset| *offset <= bytes.len());
            inside.ok_or(GoFault("its parts are outside it"))
        };
        let (names_at, depths_at, functions_at) = (offset(2)?, offset(5)?, offset(6)?);
        let (units_at, files_at) = (offset(3)?, offset(4)?);
        let function_count = word(0)?;
        // Each entry takes at least 8 bytes, so that a count alone cannot ask for more than the file has.
        if function_count > bytes.len() as u64 / 8 {
            return Err(GoFault("it is shorter than its list of functions"));
        }
        let text_start = if shift == 1 { word(2)? } else { 0 };
        Ok(Self {
            bytes,
            version,
            quantum: quantum.into(),
            function_count,
            address: 0,
            text_start,
            names_at,
            units_at,
            files_at,
            depths_at,
            functions_at,
        })
    }

    /// Returns whether the table counts addresses from a start that it does not hold: the Go runtime of a
    /// position-independent program fills it in.
    pub(crate) fn needs_text_start(&self) -> bool {
        self.version >= Version::Go118 && self.text_start == 0
    }

    /// Returns the distance of the names from the start of the table.
    pub(crate) fn names_at(&self) -> u64 {
        self.names_at as u64
    }

    /// Returns the address of the first function in the list.
    pub(crate) fn first_function(&self) -> Option<u64> {
        Some(self.entry(0)?.0)
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    pub(crate) fn set_address(&mut self, address: u64) {
        self.address = address;
    }

    pub(crate) fn set_text_start(&mut self, text_start: u64) {
        self.text_start = text_start;
    }

    /// Returns the number of functions that the header claims.
    pub fn function_count(&self) -> u64 {
        self.function_count
    }

    /// Reads the functions, ascending. An item is `None` for a function that is out of order or outside all executable
    /// segments. The list ends at the first entry that is cut off, with an error.
    pub fn functions<'t>(&'t self, segments: &'t Segments) -> GoFunctions<'t> {
        GoFunctions { table: self, segments, index: 0, last_end: 0, next: self.entry(0) }
    }

    /// Start address and record offset of the function at `index`; behind the last function there is only an address.
    fn entry(&self, index: u64) -> Option<(u64, u32)> {
        let entry_bytes = if self.version == Version::Go116 { 16 } else { 8 };
        let at = usize::try_from(index).ok()?.checked_mul(entry_bytes)?.checked_add(self.functions_at)?;
        let is_end = index == self.function_count;
        if self.version == Version::Go116 {
            let record = if is_end { 0 } else { read_u64(&self.bytes, at + 8)? };
            // An offset that does not fit leads out of the table: it has no record.
            Some((read_u64(&self.bytes, at)?, u32::try_from(record).unwrap_or(u32::MAX)))
        } else {
            let record = if is_end { 0 } else { read_u32(&self.bytes, at + 4)? };
            Some((self.text_start.checked_add(read_u32(&self.bytes, at)?.into())?, record))
        }
    }

    /// Reads the record of a function; none if it is outside the table.
    pub fn record(&self, function: &GoFunction) -> Option<GoRecord> {
        let at = self.record_at(function)?;
        // A record begins with the function's address.
        let after_address = at.checked_add(if self.version == Version::Go116 { 8 } else { 4 })?;
        let flags_at = after_address.checked_add(if self.version == Version::Go120 { 37 } else { 33 })?;
        Some(GoRecord {
            name: read_u32(&self.bytes, after_address)?,
            depths: read_u32(&self.bytes, after_address.checked_add(12)?)?,
            flags: *self.bytes.get(flags_at)?,
        })
    }

    /// Returns the offset in the table of a function's record.
    pub(crate) fn record_at(&self, function: &GoFunction) -> Option<usize> {
        self.functions_at.checked_add(function.record as usize)
    }

    /// Returns the name of a function, up to `max_bytes` bytes of it; empty if it is outside the table.
    pub fn name(&self, record: &GoRecord, max_bytes: usize) -> &[u8] {
        self.name_at(record.name, max_bytes)
    }

    /// Returns the name at an offset in the list of names, as [`Self::name`] does.
    pub(crate) fn name_at(&self, offset: u32, max_bytes: usize) -> &[u8] {
        self.text(self.names_at, offset, max_bytes)
    }

    /// Reports whether a name begins at this offset in the list of names.
    pub(crate) fn is_name(&self, offset: u32) -> bool {
        let Some(at) = self.names_at.checked_add(offset as usize) else { return false };
        let is_first = offset == 0 || at.checked_sub(1).and_then(|at| self.bytes.get(at)) == Some(&0);
        is_first && self.bytes.get(at).is_some_and(|byte| *byte != 0)
    }

    /// Returns the path of a file of a compilation unit; empty if it is outside the table.
    pub(crate) fn file(&self, unit: u32, file: u32, max_bytes: usize) -> &[u8] {
        let index = (unit as usize).checked_add(file as usize).and_then(|index| index.checked_mul(4));
        let at = index.and_then(|index| index.checked_add(self.units_at));
        match at.and_then(|at| read_u32(&self.bytes, at)) {
            None | Some(u32::MAX) => &[],
            Some(offset) => self.text(self.files_at, offset, max_bytes),
        }
    }

    fn text(&self, list_at: usize, offset: u32, max_bytes: usize) -> &[u8] {
        let bytes = list_at.checked_add(offset as usize).and_then(|at| self.bytes.get(at..));
        let bytes = bytes.map_or(&[][..], |bytes| &bytes[..bytes.len().min(max_bytes)]);
        bytes.split(|byte| *byte == 0).next().unwrap_or_default()
    }

    /// Returns a 32-bit word of the table.
    pub(crate) fn word(&self, at: usize) -> Option<u32> {
        read_u32(&self.bytes, at)
    }

    /// Returns a byte of the table.
    pub(crate) fn byte(&self, at: usize) -> Option<u8> {
        self.bytes.get(at).copied()
    }

    /// Reports whether the records have the first lines of functions, as they do from Go 1.20 on.
    pub(crate) fn has_start_lines(&self) -> bool {
        self.version >= Version::Go120
    }

    /// Returns the function at an address.
    pub(crate) fn function_at(&self, address: u64) -> Option<GoFunction> {
        let (mut low, mut high) = (0, self.function_count);
        while low < high {
            let middle = low + (high - low) / 2;
            if self.entry(middle)?.0 <= address { low = middle + 1 } else { high = middle }
        }
        let index = low.checked_sub(1)?;
        let ((start, record), (end, _)) = (self.entry(index)?, self.entry(index + 1)?);
        (start..end).contains(&address).then_some(GoFunction { start, end, record })
    }

    /// Reads the stack depths of a function, from its first instruction on: bytes of code, and the depth throughout them.
    /// The depth is the distance from the stack pointer to the return address (x86_64) or to the caller's stack pointer
    /// (aarch64). The list ends where the table does.
    pub fn stack_depths(&self, record: &GoRecord) -> impl Iterator<Item = (u64, i32)> + '_ {
        self.values(record.depths)
    }

    /// Reads the runs of one table from a function's first instruction on. A run is a number of bytes of code, and their value.
    /// Offset 0 is an empty table.
    pub(crate) fn values(&self, offset: u32) -> impl Iterator<Item = (u64, i32)> + '_ {
        let mut at = self.depths_at.checked_add(offset as usize).filter(|_| offset != 0);
        let mut value: i32 = -1;
        let mut is_first = true;
        std::iter::from_fn(move || {
            let mut position = at.take()?;
            let change = read_varint(&self.bytes, &mut position)?;
            if change == 0 && !is_first {
                return None;
            }
            is_first = false;
            value = value.wrapping_add((change >> 1) as i32 ^ -((change & 1) as i32));
            let length = read_varint(&self.bytes, &mut position)?;
            at = Some(position);
            Some((u64::from(length).saturating_mul(self.quantum), value))
        })
    }
}

/// The functions of a Go table; see [`GoTable::functions`].
#[derive(Debug)]
pub struct GoFunctions<'t> {
    table: &'t GoTable<'t>,
    segments: &'t Segments,
    index: u64,
    last_end: u64,
    next: Option<(u64, u32)>,
}

impl Iterator for GoFunctions<'_> {
    type Item = Result<Option<GoFunction>, GoFault>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.index >= self.table.function_count {
            return None;
        }
        self.index += 1;
        let current = self.next;
        // Each function ends where the next one begins, and one entry more ends the last.
        self.next = self.table.entry(self.index);
        let (Some((start, record)), Some((end, _))) = (current, self.next) else {
            self.index = self.table.function_count;
            return Some(Err(GoFault("its list of functions is cut off")));
        };
        let limit = self.segments.executable_end(start).filter(|_| start < end && start >= self.last_end);
        Some(Ok(limit.map(|limit| {
            self.last_end = end.min(limit);
            GoFunction { start, end: self.last_end, record }
        })))
    }
}

fn read_varint(bytes: &[u8], at: &mut usize) -> Option<u32> {
    let mut value = 0_u32;
    for shift in (0..35).step_by(7) {
        let byte = *bytes.get(*at)?;
        *at += 1;
        value |= u32::from(byte & 0x7f).checked_shl(shift).unwrap_or(0);
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::segments::Segment;

    fn code(vaddr: u64, bytes: u64) -> Segments {
        Segments::new(vec![Segment {
            vaddr,
            file_offset: 0,
            file_bytes: bytes,
            memory_bytes: bytes,
            executable: true,
        }])
    }

    /// Two functions, as each version writes them: `main.main` has depths 0 and 24, `main.work` is a top frame.
    fn table(magic: u32, text: u64) -> Vec<u8> {
        let is_old = magic == 0xffff_fffa;
        let mut bytes = magic.to_le_bytes().to_vec();
        bytes.extend([0, 0, 1, 8]);
        let (functions_at, width) = (112, if is_old { 8_u32 } else { 4 });
        let fields: &[u64] = if is_old {
            &[2, 0, 72, 0, 0, 92, functions_at]
        } else {
            &[2, 0, text, 72, 0, 0, 92, functions_at]
        };
        bytes.extend(fields.iter().flat_map(|field| field.to_le_bytes()));
        bytes.resize(72, 0);
        bytes.extend(b"main.main\0main.work\0");
        // Nothing at 0; then depth 0 for 4 bytes of code, depth 24 for 44, the end.
        bytes.extend([0, 2, 4, 48, 44, 0]);
        bytes.resize(functions_at as usize, 0);
        let mut push = |value: u64, bytes_of: u32| bytes.extend(&value.to_le_bytes()[..bytes_of as usize]);
        let base = if is_old { text } else { 0 };
        let first_record = u64::from(width * 5);
        let record_bytes = u64::from(width + if magic == 0xffff_fff1 { 38 } else { 34 });
        for (start, record) in [(0x10, first_record), (0x40, first_record + record_bytes)] {
            push(base + start, width);
            push(record, width);
        }
        push(base + 0x60, width);
        for (start, name, depths, flags) in [(0x10, 0, 1, 0), (0x40, 10, 0, FLAG_TOP_FRAME)] {
            push(base + start, width);
            for field in [name, 0, 0, depths] {
                push(field, 4);
            }
            for _ in 0..record_bytes - u64::from(width) - 17 {
                push(0, 1);
            }
            push(flags.into(), 1);
        }
        bytes
    }

    const VERSIONS: [u32; 3] = [0xffff_fffa, 0xffff_fff0, 0xffff_fff1];

    #[test]
    fn every_version_lists_its_functions_with_names_and_depths() {
        for magic in VERSIONS {
            let bytes = table(magic, 0x1000);
            let table = GoTable::parse(&bytes[..]).unwrap();
            let segments = code(0x1000, 0x1000);
            let functions: Vec<_> = table.functions(&segments).map(|found| found.unwrap().unwrap()).collect();
            let ranges: Vec<_> = functions.iter().map(|f| (f.start, f.end)).collect();
            assert_eq!(ranges, [(0x1010, 0x1040), (0x1040, 0x1060)], "{magic:x}");
            let records: Vec<_> = functions.iter().map(|function| table.record(function).unwrap()).collect();
            let names: Vec<_> = records.iter().map(|record| table.name(record, 100)).collect();
            assert_eq!(names, [&b"main.main"[..], b"main.work"]);
            assert_eq!(table.stack_depths(&records[0]).collect::<Vec<_>>(), [(4, 0), (44, 24)]);
            assert!(records[0].has_stack_depths());
            assert_eq!(table.stack_depths(&records[1]).count(), 0);
            let flags: Vec<_> =
                records.iter().map(|r| (r.is_top_frame(), r.writes_stack_pointer())).collect();
            assert_eq!(flags, [(false, false), (true, false)]);
        }
    }

    /// Checks that no function is taken from outside the code of the file.
    #[test]
    fn functions_outside_the_code_or_out_of_order_are_left_out() {
        let bytes = table(0xffff_fff1, 0x1000);
        let table = GoTable::parse(&bytes[..]).unwrap();
        let ranges = |segments: &Segments| -> Vec<_> {
            table.functions(segments).map(|found| found.unwrap().map(|f| (f.start, f.end))).collect()
        };
        assert_eq!(ranges(&code(0x1040, 0x10)), [None, Some((0x1040, 0x1050))]);
        assert_eq!(ranges(&code(0x5000, 0x10)), [None, None]);
        let mut bytes = self::table(0xffff_fff1, 0x1000);
        bytes[120] = 8;
        let table = GoTable::parse(&bytes[..]).unwrap();
        let segments = code(0x1000, 0x1000);
        assert_eq!(table.functions(&segments).filter(|found| found == &Ok(None)).count(), 1);
    }

    #[test]
    fn a_table_without_its_start_counts_from_the_one_it_is_given() {
        let bytes = table(0xffff_fff1, 0);
        let mut table = GoTable::parse(&bytes[..]).unwrap();
        assert!(table.needs_text_start());
        table.set_text_start(0x7000);
        let segments = code(0x7000, 0x1000);
        assert_eq!(table.functions(&segments).next().unwrap().unwrap().unwrap().start, 0x7010);
    }

    #[test]
    fn a_name_is_cut_at_the_length_that_the_caller_wants() {
        let bytes = table(0xffff_fff1, 0x1000);
        let table = GoTable::parse(&bytes[..]).unwrap();
        let segments = code(0x1000, 0x1000);
        let first = table.functions(&segments).next().unwrap().unwrap().unwrap();
        assert_eq!(table.name(&table.record(&first).unwrap(), 4), b"main");
    }

    #[test]
    fn a_damaged_header_names_its_fault() {
        let good = table(0xffff_fff1, 0x1000);
        let fault = |at: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[at] = value;
            GoTable::parse(bytes).unwrap_err().0
        };
        assert!(fault(0, 7).contains("unknown form"));
        assert!(fault(4, 1).contains("64 bits"));
        assert!(fault(6, 0).contains("64 bits"));
        assert!(fault(7, 4).contains("64 bits"));
        assert!(fault(9, 200).contains("shorter"));
        assert!(fault(8 + 7 * 8 + 3, 1).contains("outside"));
        assert!(GoTable::parse(&good[..20]).unwrap_err().0.contains("cut off"));
        assert!(GoTable::parse(&[][..]).unwrap_err().0.contains("empty"));
        let cut = GoTable::parse(&good[..130]).unwrap();
        let segments = code(0x1000, 0x1000);
        let last = cut.functions(&segments).last().unwrap().unwrap_err();
        assert!(last.0.contains("cut off"), "{last}");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_harm(
            version in 0usize..3,
            changes in proptest::collection::vec((0usize..260, any::<u8>()), 0..20),
            length in 0usize..260,
        ) {
            let mut bytes = table(VERSIONS[version], 0x1000);
            for (at, value) in changes {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = value;
                }
            }
            bytes.truncate(length);
            let Ok(table) = GoTable::parse(bytes) else { return Ok(()) };
            let segments = code(0x1000, 0x1000);
            for function in table.functions(&segments).flatten().flatten() {
                prop_assert!(function.start < function.end);
                if let Some(record) = table.record(&function) {
                    let _ = table.name(&record, 64);
                    prop_assert!(table.stack_depths(&record).count() <= 260);
                }
            }
        }
    }
}
